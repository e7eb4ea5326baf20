#include "bindings/bindings.h"

namespace penstock {

namespace {

// Elements of qkv below which a call keeps the GIL: texts of a few tokens.
constexpr int64_t kSmall = 10'000;

void full_attention(const KernelTable& table, Address qkv, Address query_starts, Address out, int64_t num_texts,
                    int64_t num_heads, int64_t head_dim, float scale, int dtype, int num_threads) {
    const int32_t* starts = pointer<int32_t>(query_starts);
    GilReleaseIf guard(starts[num_texts] * 3 * num_heads * head_dim > kSmall);
    table.full_attention.full_attention({pointer<void>(qkv), starts, pointer<void>(out), num_texts, num_heads, head_dim,
                                         scale, DType(dtype), num_threads});
}

}  // namespace

void bind_full_attention(KernelsClass& kernels) { kernels.def("full_attention", &full_attention); }

}  // namespace penstock
