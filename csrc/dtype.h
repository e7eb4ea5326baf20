// Element types, numbered as in src/penstock/kernels/native/dtypes.py, and scalar conversions.
#pragma once

#include <cstdint>
#include <cstring>

namespace penstock {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, int8 = 3, fp8_e4m3 = 4 };

using bf16_t = uint16_t;  // raw bits
using f16_t = uint16_t;   // raw bits

constexpr int64_t size_of(DType dtype) {
    return dtype == DType::f32 ? 4 : dtype == DType::bf16 || dtype == DType::f16 ? 2 : 1;
}

// `static inline`: sources compiled for different instruction sets must not share one out-of-line copy.
static inline float f32_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float to_f32(bf16_t value) { return f32_from_bits(uint32_t(value) << 16); }

// Round to nearest even; NaN stays NaN (quiet), as torch converts.
static inline bf16_t to_bf16(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16_t((bits >> 16) | 0x40u);
    return bf16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float f32_of_f16(f16_t value) {
    const uint32_t sign = uint32_t(value & 0x8000u) << 16;
    const uint32_t magnitude = value & 0x7fffu;
    if (magnitude >= 0x7c00u) return f32_from_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    if (magnitude >= 0x0400u) return f32_from_bits(sign | ((magnitude << 13) + 0x38000000u));
    const float subnormal = float(magnitude) * 0x1p-24f;
    return f32_from_bits(sign | bits_of(subnormal));
}

}  // namespace penstock
