// Attention over the paged KV cache, for prefill chunks and decodes in one call.
//
// A cache block holds 16 slots; one 512-bit vector holds their f32 scores. Layouts, per layer:
//   keys    bf16 [num_blocks, num_kv_heads, head_dim/2, 16, 2]    f32 [num_blocks, num_kv_heads, head_dim, 16]
//   values  bf16 [num_blocks, num_kv_heads, 8, head_dim, 2]       f32 [num_blocks, num_kv_heads, 16, head_dim]
#pragma once

#include <cstdint>

#include "dtype.h"

namespace penstock {

constexpr int kBlockSlots = 16;
constexpr int kMaxHeadDim = 256;

struct AttentionArgs {
    const void* q;     // [tokens, num_heads, head_dim], `q_stride` elements from token to token
    int64_t q_stride;
    const void* key_cache;
    const void* value_cache;
    const int32_t* block_tables;  // [num_requests, max_blocks]
    int64_t max_blocks;
    const int32_t* context_lens;  // [num_requests], this step's tokens included
    const int32_t* query_starts;  // [num_requests + 1]
    void* out;                    // [tokens, num_heads * head_dim]
    int64_t num_requests, num_heads, num_kv_heads, head_dim;
    float scale;
    int64_t sliding_window;  // a row at p sees (p - window, p]; 0: all up to p
    DType dtype;             // of q and out: f32 or bf16
    DType cache_dtype;       // `dtype`, or int8 or fp8_e4m3 (layout: kv_codes.h)
    int num_threads;
};

struct AttentionKernels {
    // A row of the result is bit-identical for any batch, chunking of its request and number of threads.
    void (*paged_attention)(const AttentionArgs&);
};

}  // namespace penstock
