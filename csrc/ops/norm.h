// RMSNorm and LayerNorm, alone and after a sum.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace penstock {

struct RmsNormArgs {
    const void* x;       // [tokens, size]
    void* residual;      // [tokens, size] or null: x is added to it in place, and the sum is what is normed
    const void* weight;  // [size]
    void* out;           // [tokens, size]
    int64_t tokens, size;
    float eps;
    DType dtype;  // of all: f32 or bf16
    int num_threads;
};

struct LayerNormArgs {
    const void* x;         // [tokens, size]
    const void* residual;  // [tokens, size] or null: x + residual, rounded to the dtype, is what is normed
    const void* weight;    // [size]
    const void* bias;      // [size]
    void* out;             // [tokens, size]
    int64_t tokens, size;
    float eps;
    DType dtype;  // of all: f32 or bf16
    int num_threads;
};

struct NormKernels {
    // Rounds to the dtype where the published model code does: the residual sum, the normed value, its product with
    // the weight.
    void (*rms_norm)(const RmsNormArgs&);
    // In f32, rounded once.
    void (*layer_norm)(const LayerNormArgs&);
};

}  // namespace penstock
