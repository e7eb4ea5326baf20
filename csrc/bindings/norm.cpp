#include "bindings/bindings.h"

namespace penstock {

namespace {

// Elements below which a call keeps the GIL (a few microseconds of work).
constexpr int64_t kSmall = 100'000;

void rms_norm(const KernelTable& table, Address x, Address residual, Address weight, Address out, int64_t tokens,
              int64_t size, float eps, int dtype, int num_threads) {
    GilReleaseIf guard(tokens * size > kSmall);
    table.norm.rms_norm({pointer<void>(x), pointer<void>(residual), pointer<void>(weight), pointer<void>(out), tokens,
                         size, eps, DType(dtype), num_threads});
}

void layer_norm(const KernelTable& table, Address x, Address residual, Address weight, Address bias, Address out,
                int64_t tokens, int64_t size, float eps, int dtype, int num_threads) {
    GilReleaseIf guard(tokens * size > kSmall);
    table.norm.layer_norm({pointer<void>(x), pointer<void>(residual), pointer<void>(weight), pointer<void>(bias),
                           pointer<void>(out), tokens, size, eps, DType(dtype), num_threads});
}

}  // namespace

void bind_norm(KernelsClass& kernels) {
    kernels.def("rms_norm", &rms_norm);
    kernels.def("layer_norm", &layer_norm);
}

}  // namespace penstock
