// Per-head norm (optional), rotary embedding, and the write of keys and values into the cache, in one pass over qkv.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace penstock {

struct RopeArgs {
    void* qkv;                    // [tokens, num_heads + 2 * num_kv_heads, head_dim]; q is rotated in place
    const float* cos;             // [tokens, head_dim / 2]
    const float* sin;             // [tokens, head_dim / 2]
    void* key_cache;              // layouts: see attention.h
    void* value_cache;
    const int64_t* slot_mapping;  // [tokens]: block * 16 + offset; negative: keys and values are not written
    const void* q_norm;           // [head_dim] or null
    const void* k_norm;           // [head_dim] or null
    int64_t tokens, num_heads, num_kv_heads, head_dim;
    float eps;
    DType dtype;        // of qkv and the norms: f32 or bf16
    DType cache_dtype;  // `dtype`, or int8 or fp8_e4m3
    int num_threads;
};

struct RopeKernels {
    void (*rope_and_cache)(const RopeArgs&);
};

}  // namespace penstock
