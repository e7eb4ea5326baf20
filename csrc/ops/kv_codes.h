// Keys and values kept in 8 bits: for each head of a block its 16 * head_dim codes, in the order of the bf16 layout
// (attention.h), and then the 16 slots' scales in f32. int8: value = scale * code; FP8 E4M3 the same.
#pragma once

#include "ops/attention.h"
#include "ops/quantized_codes.h"

namespace penstock::PENSTOCK_ISA {

static inline bool is_quantized(DType cache_dtype) { return cache_dtype == DType::int8 || cache_dtype == DType::fp8_e4m3; }

// Of a head of a block.
static inline int64_t kv_block_bytes(DType cache_dtype, int64_t head_dim) {
    const int64_t scales = is_quantized(cache_dtype) ? kBlockSlots * int64_t(sizeof(float)) : 0;
    return kBlockSlots * head_dim * size_of(cache_dtype) + scales;
}

// The bf16 of whole / 2^below, for whole of at most eight bits.
constexpr uint16_t bf16_of_whole(unsigned whole, int below) {
    if (whole == 0) return 0;
    int top = 0;
    while (whole >> (top + 1)) ++top;
    const unsigned mantissa = (top <= 7 ? whole << (7 - top) : whole >> (top - 7)) & 0x7f;
    return uint16_t((127 + top - below) << 7 | mantissa);
}

// What codes mean, in bf16, which holds all of them.
struct KvTable {
    uint16_t values[256] = {};
    constexpr explicit KvTable(DType dtype) {
        for (int code = 0; code < 256; ++code) {
            const bool is_negative = code >= 128;
            if (dtype == DType::int8) {
                values[code] = bf16_of_whole(is_negative ? unsigned(256 - code) : unsigned(code), 0);
            } else {
                const int magnitude = code & 127, exponent = magnitude >> 3, mantissa = magnitude & 7;
                values[code] = magnitude == 127 ? uint16_t(0x7fc0)
                               : exponent == 0  ? bf16_of_whole(unsigned(mantissa), 9)
                                                : uint16_t((exponent + 120) << 7 | mantissa << 4);
            }
            if (is_negative) values[code] |= 0x8000;
        }
    }
};
static constexpr KvTable kInt8Table{DType::int8}, kFp8Table{DType::fp8_e4m3};

static inline const uint16_t* kv_table(DType dtype) {
    return dtype == DType::int8 ? kInt8Table.values : kFp8Table.values;
}

#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX512

static inline Units bf16_of_int8(const uint8_t* codes) {
    const auto* from = reinterpret_cast<const __m128i*>(codes);
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from + 1)));
    return bf16_of_exact(low, high);
}

// Of numbers (no code that is kept is NaN): exponent and mantissa go where bf16 has them, but for the smallest, m / 512.
static inline Units bf16_of_fp8(const uint8_t* codes) {
    const __m512i words = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    const __m512i smallest = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kFp8Table.values)));
    const __mmask32 is_small = _mm512_testn_epi16_mask(words, _mm512_set1_epi16(0x78));
    const __m512i placed = _mm512_and_si512(_mm512_slli_epi16(words, 4), _mm512_set1_epi16(0x7f0));
    const __m512i usual = _mm512_add_epi16(placed, _mm512_set1_epi16(120 << 7));
    const __m512i size = _mm512_mask_permutexvar_epi16(usual, is_small, words, smallest);
    return {_mm512_or_si512(size, _mm512_and_si512(words, _mm512_set1_epi16(short(0x8000))))};
}

#endif

// The codes of a block's head as the units that its attention multiplies. `pairs`: how many codes of the f32 layout's
// fastest dimension are interleaved in pairs (16 slots of keys, head_dim of values).
static inline void expand_kv(F32, DType dtype, const uint8_t* codes, int64_t count, int64_t pairs, uint32_t* units) {
    const uint16_t* table = kv_table(dtype);
    for (int64_t at = 0; at < count; at += 2 * pairs)
        for (int64_t i = 0; i < pairs; ++i)
            for (int part = 0; part < 2; ++part)
                units[at + part * pairs + i] = uint32_t(table[codes[at + 2 * i + part]]) << 16;
}
static inline void expand_kv(Bf16, DType dtype, const uint8_t* codes, int64_t count, int64_t, uint32_t* units) {
#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX512
    if (dtype == DType::int8)
        for (int64_t i = 0; i < count; i += 32) store_units(units + i / 2, bf16_of_int8(codes + i));
    else
        for (int64_t i = 0; i < count; i += 32) store_units(units + i / 2, bf16_of_fp8(codes + i));
#else
    const uint16_t* table = kv_table(dtype);
    auto* to = reinterpret_cast<uint16_t*>(units);
    for (int64_t i = 0; i < count; ++i) to[i] = table[codes[i]];
#endif
}

// To the nearest, ties to even; |x| <= 464.
static inline uint8_t to_fp8_e4m3(float x) {
    const uint32_t bits = bits_of(x), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
    if (f32_from_bits(magnitude) < 0x1p-6f) {
        // Adding 2^14 leaves the rounded multiple of 2^-9 in the lowest bits.
        return uint8_t(sign | (bits_of(f32_from_bits(magnitude) + 0x1p14f) - bits_of(0x1p14f)));
    }
    const uint32_t rounded = (magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
    const uint32_t code = rounded - (120u << 3);
    return uint8_t(sign | (code < 0x7eu ? code : 0x7eu));
}

// Rounds a head's values to codes. Returns their scale, NaN if one of them is not finite.
template <class Storage>
static inline float round_kv(DType dtype, const Storage* values, int64_t dim, uint8_t* codes) {
    const float largest = dtype == DType::int8 ? 127.0f : 448.0f;
    float most = 0.0f;
    bool is_finite = true;
    for (int64_t d = 0; d < dim; ++d) {
        const float size = std::fabs(as_f32(values[d]));
        is_finite &= size <= 3.4028234e38f;
        most = size > most ? size : most;
    }
    const float inverse = is_finite && most >= 1e-30f ? largest / most : 0.0f;
    for (int64_t d = 0; d < dim; ++d) {
        const float scaled = is_finite ? as_f32(values[d]) * inverse : 0.0f;
        codes[d] = dtype == DType::int8 ? uint8_t(int8_t(std::nearbyint(scaled))) : to_fp8_e4m3(scaled);
    }
    return !is_finite ? NAN : most >= 1e-30f ? most / largest : 0.0f;
}

}  // namespace penstock::PENSTOCK_ISA
