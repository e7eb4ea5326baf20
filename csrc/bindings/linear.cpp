#include "bindings/bindings.h"

namespace penstock {

namespace {

// Multiply-adds and bytes below which a call keeps the GIL (a few microseconds of work).
constexpr int64_t kSmallLinear = 200'000, kSmallCopy = 50'000;

void linear(const KernelTable& table, Address x, Address weight, Address bias, Address out, int64_t m, int64_t n,
            int64_t k, int dtype, int out_dtype, int num_threads) {
    GilReleaseIf guard(m * n * k > kSmallLinear);
    table.linear.linear({pointer<void>(x), pointer<void>(weight), pointer<void>(bias), pointer<void>(out), m, n, k,
                         DType(dtype), DType(out_dtype), num_threads});
}

void linear_emulated_tiles(const KernelTable& table, Address x, Address weight, Address bias, Address out, int64_t m,
                           int64_t n, int64_t k, int out_dtype, int num_threads) {
    table.linear.linear_emulated_tiles({pointer<void>(x), pointer<void>(weight), pointer<void>(bias),
                                        pointer<void>(out), m, n, k, DType::bf16, DType(out_dtype), num_threads});
}

void pack(const KernelTable& table, Address source, Address packed, int64_t first_row, int64_t rows, int64_t k,
          int source_dtype, int dtype, int num_threads) {
    GilReleaseIf guard(rows * k > kSmallCopy);
    table.linear.pack({pointer<void>(source), pointer<void>(packed), first_row, rows, k, DType(source_dtype),
                       DType(dtype), num_threads});
}

void embedding(const KernelTable& table, Address ids, Address weight, Address out, int64_t tokens, int64_t k,
               int dtype, int num_threads) {
    GilReleaseIf guard(tokens * k > kSmallCopy);
    table.linear.embedding(
        {pointer<int64_t>(ids), pointer<void>(weight), pointer<void>(out), tokens, k, DType(dtype), num_threads});
}

}  // namespace

void bind_linear(KernelsClass& kernels) {
    kernels.def("linear", &linear);
    kernels.def("linear_emulated_tiles", &linear_emulated_tiles);
    kernels.def("pack", &pack);
    kernels.def("embedding", &embedding);
}

}  // namespace penstock
