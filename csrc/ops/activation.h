// The activations.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace penstock {

struct SiluAndMulArgs {
    const void* gate_up;  // [tokens, 2 * size]: gate, then up
    void* out;            // [tokens, size]
    int64_t tokens, size;
    DType dtype;  // of both: f32 or bf16
    int num_threads;
};

struct GeluArgs {
    const void* x;  // [count]
    void* out;      // [count]
    int64_t count;
    DType dtype;  // of both: f32 or bf16
    int num_threads;
};

struct ActivationKernels {
    // silu(gate) in f32, rounded to the dtype, times up.
    void (*silu_and_mul)(const SiluAndMulArgs&);
    // x times the normal distribution up to x, in f32.
    void (*gelu)(const GeluArgs&);
};

}  // namespace penstock
