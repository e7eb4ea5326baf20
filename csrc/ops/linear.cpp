#include "ops/linear.h"

#include "isa.h"
#include "threads.h"

namespace penstock::PENSTOCK_ISA {

namespace {

template <class T>
float widen(T value);
template <>
float widen(float value) { return value; }
template <>
float widen(bf16_t value) { return to_f32(value); }

template <class T, int kGroup>
void linear_tile(const LinearArgs& args, int64_t row, int64_t tile) {
    const int64_t k_padded = (args.k + kGroup - 1) / kGroup * kGroup;
    const T* x = static_cast<const T*>(args.x) + row * args.k;
    const T* w = static_cast<const T*>(args.weight) + tile * k_padded * 16;
    float acc[16] = {};
    for (int64_t i = 0; i < args.k; ++i)
        for (int c = 0; c < 16; ++c) acc[c] += widen(x[i]) * widen(w[(i / kGroup * 16 + c) * kGroup + i % kGroup]);
    for (int64_t c = 0; c < 16 && tile * 16 + c < args.n; ++c) {
        const int64_t column = tile * 16 + c;
        const float value = acc[c] + (args.bias ? widen(static_cast<const T*>(args.bias)[column]) : 0.f);
        if (args.out_dtype == DType::f32)
            static_cast<float*>(args.out)[row * args.n + column] = value;
        else
            static_cast<bf16_t*>(args.out)[row * args.n + column] = to_bf16(value);
    }
}

void linear(const LinearArgs& args) {
    const int64_t tiles = (args.n + 15) / 16;
#pragma omp parallel for num_threads(args.num_threads)
    for (int64_t tile = 0; tile < tiles; ++tile)
        for (int64_t row = 0; row < args.m; ++row) {
            if (args.dtype == DType::f32)
                linear_tile<float, 1>(args, row, tile);
            else
                linear_tile<bf16_t, 2>(args, row, tile);
        }
}

float load_source(const PackArgs& args, int64_t index) {
    if (args.source_dtype == DType::f32) return static_cast<const float*>(args.source)[index];
    if (args.source_dtype == DType::bf16) return to_f32(static_cast<const bf16_t*>(args.source)[index]);
    return f32_of_f16(static_cast<const f16_t*>(args.source)[index]);
}

void pack(const PackArgs& args) {
    const int64_t group = args.dtype == DType::bf16 ? 2 : 1;
    const int64_t k_padded = (args.k + group - 1) / group * group;
#pragma omp parallel for num_threads(args.num_threads)
    for (int64_t r = 0; r < args.rows; ++r) {
        const int64_t row = args.first_row + r;
        for (int64_t i = 0; i < k_padded; ++i) {
            const int64_t to = row / 16 * k_padded * 16 + (i / group * 16 + row % 16) * group + i % group;
            const float value = i < args.k ? load_source(args, r * args.k + i) : 0.f;
            if (args.dtype == DType::f32)
                static_cast<float*>(args.packed)[to] = value;
            else
                static_cast<bf16_t*>(args.packed)[to] = to_bf16(value);
        }
    }
}

void embedding(const EmbeddingArgs& args) {
    const int64_t group = args.dtype == DType::bf16 ? 2 : 1;
    const int64_t k_padded = (args.k + group - 1) / group * group;
    for (int64_t t = 0; t < args.tokens; ++t) {
        const int64_t row = args.ids[t];
        for (int64_t i = 0; i < args.k; ++i) {
            const int64_t from = row / 16 * k_padded * 16 + (i / group * 16 + row % 16) * group + i % group;
            if (args.dtype == DType::f32)
                static_cast<float*>(args.out)[t * args.k + i] = static_cast<const float*>(args.weight)[from];
            else
                static_cast<bf16_t*>(args.out)[t * args.k + i] = static_cast<const bf16_t*>(args.weight)[from];
        }
    }
}

}  // namespace

extern const LinearKernels linear_kernels = {linear, pack, embedding};

}  // namespace penstock::PENSTOCK_ISA
