// Linear layers over prepacked weights, and the embedding gathered out of them.
//
// Packed layout, for a weight [N, K] (N rounded up to 16, K to 2 for bf16; the padding is zero):
//   bf16: [N/16][K/2][16][2]   16 output columns of one pair of inputs fill one 512-bit vector
//   f32:  [N/16][K][16]
// It is the layout of an AMX B tile too (16 pairs of inputs by 16 columns).
#pragma once

#include <cstdint>

#include "dtype.h"
#include "ops/row_groups.h"

namespace penstock {

struct LinearArgs {
    const void* x;       // [m, k], of the weight's dtype
    const void* weight;  // packed [n, k]
    const void* bias;    // [n] of the weight's dtype, or null; added in f32 before the output is rounded
    void* out;           // [m, n]
    int64_t m, n, k;
    DType dtype;      // of x, weight and bias
    DType out_dtype;  // f32, or the weight's dtype
    int num_threads;
    RowGroups groups = {};  // then without a bias; m: the rows of x
};

struct PackArgs {
    const void* source;  // [rows, k], rows contiguous
    void* packed;        // the whole packed weight
    int64_t first_row;   // where the source's first row goes
    int64_t rows, k;
    DType source_dtype;  // f32, bf16 or f16
    DType dtype;         // of the packed weight: f32 or bf16
    int num_threads;
};

struct EmbeddingArgs {
    const int64_t* ids;  // [tokens], each in [0, n)
    const void* weight;  // packed [n, k]
    void* out;           // [tokens, k]
    int64_t tokens, k;
    DType dtype;
    int num_threads;
};

struct LinearKernels {
    // A row of the result is bit-identical for any m: each output is one f32 accumulator, fed in the order of k.
    void (*linear)(const LinearArgs&);
    // The loop of the AMX kernel over emulated tiles, bf16 only: for tests.
    void (*linear_emulated_tiles)(const LinearArgs&);
    // Writes rows [first_row, first_row + rows) of the packed weight, their padding of k included. The padding rows
    // beyond n must be zeroed by the caller.
    void (*pack)(const PackArgs&);
    void (*embedding)(const EmbeddingArgs&);
};

}  // namespace penstock
