// Attention of every token over all tokens of its own text: encoders, which keep no cache.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace penstock {

struct FullAttentionArgs {
    const void* qkv;              // [tokens, 3 * num_heads * head_dim]: all queries, then all keys, then all values
    const int32_t* query_starts;  // [num_texts + 1]
    void* out;                    // [tokens, num_heads * head_dim]
    int64_t num_texts, num_heads, head_dim;
    float scale;
    DType dtype;  // of qkv and out: f32 or bf16
    int num_threads;
};

struct FullAttentionKernels {
    // In f32, rounded once. A row's bits depend on its own text only, and not on the number of threads.
    void (*full_attention)(const FullAttentionArgs&);
};

}  // namespace penstock
