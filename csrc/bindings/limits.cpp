#include "bindings/bindings.h"

namespace penstock {

namespace {

int64_t read_all(const KernelTable& table, Address data, int64_t bytes, int num_threads) {
    nb::gil_scoped_release release;
    return table.limits.read(pointer<void>(data), bytes, num_threads);
}

int64_t multiply_all(const KernelTable& table, int dtype, int64_t steps, int num_threads) {
    nb::gil_scoped_release release;
    return table.limits.multiply(DType(dtype), steps, num_threads);
}

}  // namespace

void bind_limits(KernelsClass& kernels) {
    kernels.def("read_all", &read_all);
    kernels.def("multiply_all", &multiply_all);
}

}  // namespace penstock
