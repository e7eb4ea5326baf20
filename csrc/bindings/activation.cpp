#include "bindings/bindings.h"

namespace penstock {

namespace {

// Elements below which a call keeps the GIL (a few microseconds of work).
constexpr int64_t kSmall = 30'000;

void silu_and_mul(const KernelTable& table, Address gate_up, Address out, int64_t tokens, int64_t size, int dtype,
                  int num_threads) {
    GilReleaseIf guard(tokens * size > kSmall);
    table.activation.silu_and_mul(
        {pointer<void>(gate_up), pointer<void>(out), tokens, size, DType(dtype), num_threads});
}

void gelu(const KernelTable& table, Address x, Address out, int64_t count, int dtype, int num_threads) {
    GilReleaseIf guard(count > kSmall);
    table.activation.gelu({pointer<void>(x), pointer<void>(out), count, DType(dtype), num_threads});
}

}  // namespace

void bind_activation(KernelsClass& kernels) {
    kernels.def("silu_and_mul", &silu_and_mul);
    kernels.def("gelu", &gelu);
}

}  // namespace penstock
