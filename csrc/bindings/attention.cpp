#include "bindings/bindings.h"

namespace penstock {

namespace {

// Slots times (query heads and what reading a slot costs beside them) times head_dim: below this, some 10
// microseconds, a call keeps the GIL.
constexpr int64_t kSmall = 500'000, kSlotCost = 10;

bool is_small(const AttentionArgs& args) {
    int64_t cost = 0;
    for (int64_t request = 0; request < args.num_requests && cost <= kSmall; ++request) {
        const int64_t new_tokens = args.query_starts[request + 1] - args.query_starts[request];
        cost += args.context_lens[request] * args.head_dim *
                (kSlotCost * args.num_kv_heads + new_tokens * args.num_heads);
    }
    return cost <= kSmall;
}

void paged_attention(const KernelTable& table, Address q, int64_t q_stride, Address key_cache, Address value_cache,
                     Address block_tables, int64_t max_blocks, Address context_lens, Address query_starts, Address out,
                     int64_t num_requests, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, float scale,
                     int64_t sliding_window, int dtype, int cache_dtype, int num_threads) {
    const AttentionArgs args{pointer<void>(q), q_stride, pointer<void>(key_cache), pointer<void>(value_cache),
                             pointer<int32_t>(block_tables), max_blocks, pointer<int32_t>(context_lens),
                             pointer<int32_t>(query_starts), pointer<void>(out), num_requests, num_heads,
                             num_kv_heads, head_dim, scale, sliding_window, DType(dtype), DType(cache_dtype),
                             num_threads};
    GilReleaseIf guard(!is_small(args));
    table.attention.paged_attention(args);
}

}  // namespace

void bind_attention(KernelsClass& kernels) { kernels.def("paged_attention", &paged_attention); }

}  // namespace penstock
