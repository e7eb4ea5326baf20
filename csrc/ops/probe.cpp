// Small products of whole numbers, exact in any order of adding, through the real kernels: packing, both element types,
// codes of 8 bits, rounding to bf16, and (through them) the dot products, conversions and tiles of the instruction set.
#include "ops/probe.h"

#include "ops/linear.h"
#include "ops/quantized.h"
#include "simd.h"

namespace penstock::PENSTOCK_ISA {

extern const LinearKernels linear_kernels;
extern const QuantizedKernels quantized_kernels;

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

// Codes of 8 bits times x in 8 bits, which whole numbers of up to 127 remain. All scales are 1.
bool quantized_is_right(int group_size, int rows) {
    constexpr int kGroupHeader = 128, kStep = 64, kTileBytes = kGroupHeader + 16 * kStep;
    const int header = group_size ? kGroupHeader : 0;
    const WeightLayout layout = {8, group_size, false, ScaleKind::f32, MinimumKind::none, 128, false, kStep, header,
                                 header + 16 * kStep, nullptr};
    float x[kRows * kInputs], scales[kOutputs * 2], bias[kOutputs], out[kRows * kOutputs];
    uint8_t codes[kOutputs * kInputs];
    alignas(64) char packed[2 * (kTileBytes + 64)] = {};
    for (int r = 0; r < rows; ++r)
        for (int i = 0; i < kInputs; ++i) x[r * kInputs + i] = i == 0 ? 127.0f : x_at(r, i);
    for (int o = 0; o < kOutputs; ++o) {
        bias[o] = float(o % 3);
        scales[2 * o] = scales[2 * o + 1] = 1.0f;
        for (int i = 0; i < kInputs; ++i) codes[o * kInputs + i] = uint8_t(128.0f + weight_at(o, i));
    }
    quantized_kernels.pack(
        {layout, PackSource::parts, codes, scales, nullptr, 0, packed, 0, kOutputs, kOutputs, kInputs, 1});
    quantized_kernels.linear({layout, x, packed, bias, out, rows, kOutputs, kInputs, DType::f32, DType::f32, 1});
    for (int r = 0; r < rows; ++r)
        for (int o = 0; o < kOutputs; ++o)
            if (out[r * kOutputs + o] != expected(r, o) + (127.0f - x_at(r, 0)) * weight_at(o, 0)) return false;
    return true;
}

// Few rows and many: AMX multiplies them differently.
bool quantized_are_right() {
    return quantized_is_right(0, 3) && quantized_is_right(0, kRows) && quantized_is_right(32, 3) &&
           quantized_is_right(32, kRows);
}

bool self_test() {
    return linear_is_right<float>(DType::f32, DType::f32) && linear_is_right<bf16_t>(DType::bf16, DType::f32) &&
           linear_is_right<bf16_t>(DType::bf16, DType::bf16) && quantized_are_right();
}

}  // namespace

extern const ProbeKernels probe_kernels = {self_test};

}  // namespace penstock::PENSTOCK_ISA
