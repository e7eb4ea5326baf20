// Linear layers over quantised weights, the embedding gathered out of them, and their packing. The layouts are described
// in src/penstock/kernels/quantized.py, whose numbers arrive here as they are.
//
// Two families. "int8": x is rounded to 8 bits, with one scale per token and 256 inputs (or per token), and multiplied
// with the codes as integers, so a group's sum is exact in any order; the sums of groups are added in f32 in the order
// of k. "float": codes become bf16 (or f32) in registers, exactly, and a group's sum is scaled once.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "ops/row_groups.h"

namespace penstock {

constexpr int kXBlock = 256;  // inputs of a token that share an activation scale

enum class ScaleKind : int { f16 = 0, bf16 = 1, f32 = 2, super = 3 };
enum class MinimumKind : int { none = 0, own = 1, point = 2 };

struct WeightLayout {
    int bits;
    int group_size;  // 0: one scale a row, behind the tiles
    bool is_float;   // the family
    ScaleKind scales;
    MinimumKind minimums;
    int offset;       // "int8": value = code (or table's byte) - offset
    bool x_per_token;
    int step, header_bytes, step_bytes;
    // What codes mean: "int8" null, or 16 bytes (value + offset); "float" 2^bits values of x's type.
    const void* table;
};

struct QuantizedLinearArgs {
    WeightLayout layout;
    const void* x;  // [m, k] of `dtype`
    const void* weight;
    const void* bias;  // [n] of `dtype`, or null
    void* out;         // [m, n]; gated: [m, n / 2]
    int64_t m, n, k;
    DType dtype;      // f32 or bf16
    DType out_dtype;  // f32 or `dtype`; gated: `dtype`
    int num_threads;
    RowGroups groups = {};  // then without a bias, and not gated; m: the rows of x
    bool is_gated = false;  // what silu_and_mul makes of the n columns
};

// What rows are packed from.
enum class PackSource : int { parts = 0, gguf = 1, floats = 2 };

struct QuantizedPackArgs {
    WeightLayout layout;
    PackSource kind;
    const void* source;  // codes [rows, k]; GGUF blocks; floats [rows, k]
    const float* scales;    // parts: [rows, groups]
    const float* minimums;  // parts: [rows, groups], or null
    int source_type;        // GGUF's type, or the DType of floats
    void* packed;
    int64_t first_row, rows, n, k;
    int num_threads;
};

struct QuantizedRowsArgs {
    WeightLayout layout;
    const void* weight;
    const int64_t* ids;  // [count] rows; null: first_row and on
    int64_t first_row, count;
    void* out;  // [count, k]
    int64_t n, k;
    DType out_dtype;  // f32 or bf16
    int num_threads;
};

struct QuantizedKernels {
    // A row of the result is bit-identical for any m.
    void (*linear)(const QuantizedLinearArgs&);
    // The loops of the AMX kernels over emulated tiles, "int8" only, for tests; bit-identical to `linear`.
    void (*linear_emulated_tiles)(const QuantizedLinearArgs&);
    // Rows [first_row, first_row + rows) of the packed weight; other rows of their tiles are left as they are.
    void (*pack)(const QuantizedPackArgs&);
    void (*rows)(const QuantizedRowsArgs&);
};

}  // namespace penstock
