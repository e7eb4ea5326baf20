#include "bindings/experts_args.h"

namespace penstock {

namespace {

void choose_experts(const KernelTable& table, Address logits, Address experts, Address weights, int64_t tokens,
                    int num_experts, int top_k, bool is_renormalized, int num_threads) {
    GilReleaseIf guard(tokens * num_experts > 10'000);
    table.experts.choose({pointer<float>(logits), pointer<int32_t>(experts), pointer<float>(weights), tokens,
                          num_experts, top_k, is_renormalized, num_threads});
}

void experts_mlp(const KernelTable& table, const LayoutNumbers& gate_up_layout, Address gate_up,
                 const LayoutNumbers& down_layout, Address down, Address x, Address experts, Address weights,
                 Address out, int64_t tokens, int num_experts, int top_k, int64_t hidden, int64_t inner, int dtype,
                 int num_threads) {
    const ExpertsMlpArgs args = {pointer<void>(x), pointer<int32_t>(experts), pointer<float>(weights),
                                 pointer<void>(out), matrices_of(gate_up_layout, gate_up),
                                 matrices_of(down_layout, down), tokens, num_experts, top_k, hidden, inner,
                                 DType(dtype), num_threads};
    GilReleaseIf guard(tokens * top_k * hidden * inner > 100'000);
    table.experts.mlp(args);
}

void add_shared_expert(const KernelTable& table, Address mixed, Address logits, Address shared, Address out,
                       int64_t tokens, int64_t size, int dtype, int num_threads) {
    GilReleaseIf guard(tokens * size > 50'000);
    table.experts.add_shared({pointer<void>(mixed), pointer<float>(logits), pointer<void>(shared), pointer<void>(out),
                              tokens, size, DType(dtype), num_threads});
}

}  // namespace

void bind_experts(KernelsClass& kernels) {
    kernels.def("choose_experts", &choose_experts);
    kernels.def("experts_mlp", &experts_mlp);
    kernels.def("add_shared_expert", &add_shared_expert);
}

}  // namespace penstock
