// Small products of whole numbers, exact in any order of adding, through the real kernels: packing, both element types,
// rounding to bf16, and (through them) the dot products, conversions and tiles of the instruction set.
#include "ops/probe.h"

#include "ops/linear.h"
#include "simd.h"

namespace penstock::PENSTOCK_ISA {

extern const LinearKernels linear_kernels;

namespace {

constexpr int kRows = 19, kOutputs = 18, kInputs = 37;  // whole tiles and rests
constexpr int kPackedOutputs = 32, kPackedInputs = 38;

float x_at(int row, int i) { return float((row * 7 + i * 3) % 5 - 2); }
float weight_at(int output, int i) { return float((output * 5 + i * 11) % 7 - 3); }

float expected(int row, int output) {
    float sum = float(output % 3);  // the bias
    for (int i = 0; i < kInputs; ++i) sum += x_at(row, i) * weight_at(output, i);
    return sum;
}

template <class T>
T narrow(float value);
template <>
float narrow(float value) {
    return value;
}
template <>
bf16_t narrow(float value) {
    return to_bf16(value);
}

template <class T>
bool linear_is_right(DType dtype, DType out_dtype) {
    // One call to the kernels takes one thread: only this one is guarded against traps.
    T x[kRows * kInputs], bias[kOutputs];
    float weight[kOutputs * kInputs];
    alignas(64) T packed[kPackedOutputs * kPackedInputs] = {};
    for (int r = 0; r < kRows; ++r)
        for (int i = 0; i < kInputs; ++i) x[r * kInputs + i] = narrow<T>(x_at(r, i));
    for (int o = 0; o < kOutputs; ++o) {
        bias[o] = narrow<T>(float(o % 3));
        for (int i = 0; i < kInputs; ++i) weight[o * kInputs + i] = weight_at(o, i);
    }
    linear_kernels.pack({weight, packed, 0, kOutputs, kInputs, DType::f32, dtype, 1});
    float out_f32[kRows * kOutputs];
    bf16_t out_bf16[kRows * kOutputs];
    void* out = out_dtype == DType::f32 ? static_cast<void*>(out_f32) : out_bf16;
    linear_kernels.linear({x, packed, bias, out, kRows, kOutputs, kInputs, dtype, out_dtype, 1});
    for (int r = 0; r < kRows; ++r)
        for (int o = 0; o < kOutputs; ++o) {
            const int at = r * kOutputs + o;
            const float value = out_dtype == DType::f32 ? out_f32[at] : to_f32(out_bf16[at]);
            if (value != expected(r, o)) return false;  // below 256, so bf16 holds it
        }
    return true;
}

#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX512

// VNNI, which only quantised kernels use.
bool byte_dots_are_right() {
    int32_t lanes[16];
    _mm512_storeu_si512(lanes, _mm512_dpbusd_epi32(_mm512_set1_epi32(5), _mm512_set1_epi8(3), _mm512_set1_epi8(-2)));
    for (int32_t lane : lanes)
        if (lane != 5 + 4 * 3 * -2) return false;
    return true;
}

#else

bool byte_dots_are_right() { return true; }

#endif

bool self_test() {
    return linear_is_right<float>(DType::f32, DType::f32) && linear_is_right<bf16_t>(DType::bf16, DType::f32) &&
           linear_is_right<bf16_t>(DType::bf16, DType::bf16) && byte_dots_are_right();
}

}  // namespace

extern const ProbeKernels probe_kernels = {self_test};

}  // namespace penstock::PENSTOCK_ISA
