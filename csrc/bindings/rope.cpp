#include "bindings/bindings.h"

namespace penstock {

namespace {

// Elements of qkv below which a call keeps the GIL (a few microseconds of work).
constexpr int64_t kSmall = 50'000;

void rope_and_cache(const KernelTable& table, Address qkv, Address cos, Address sin, Address key_cache,
                    Address value_cache, Address slot_mapping, Address q_norm, Address k_norm, int64_t tokens,
                    int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, float eps, int dtype, int cache_dtype,
                    int num_threads) {
    GilReleaseIf guard(tokens * (num_heads + 2 * num_kv_heads) * head_dim > kSmall);
    table.rope.rope_and_cache({pointer<void>(qkv), pointer<float>(cos), pointer<float>(sin), pointer<void>(key_cache),
                               pointer<void>(value_cache), pointer<int64_t>(slot_mapping), pointer<void>(q_norm),
                               pointer<void>(k_norm), tokens, num_heads, num_kv_heads, head_dim, eps, DType(dtype),
                               DType(cache_dtype), num_threads});
}

}  // namespace

void bind_rope(KernelsClass& kernels) { kernels.def("rope_and_cache", &rope_and_cache); }

}  // namespace penstock
