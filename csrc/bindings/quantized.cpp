#include "bindings/quantized_layout.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/vector.h>

namespace penstock {

namespace {

void quantized_linear(const KernelTable& table, const LayoutNumbers& layout, Address x, Address weight, Address bias,
                      Address out, int64_t m, int64_t n, int64_t k, int dtype, int out_dtype, int num_threads,
                      bool is_gated) {
    const QuantizedLinearArgs args = {layout_of(layout), pointer<void>(x), pointer<void>(weight), pointer<void>(bias),
                                      pointer<void>(out), m, n, k, DType(dtype), DType(out_dtype), num_threads, {},
                                      is_gated};
    GilReleaseIf guard(m * n * k > 200'000);
    table.quantized.linear(args);
}

// groups: (weight, x_row, out_row, rows) of each; none: `weight` is multiplied with all rows.
void quantized_linear_emulated_tiles(const KernelTable& table, const LayoutNumbers& layout, Address x, Address weight,
                                     const std::vector<std::array<int64_t, 4>>& groups, Address out, int64_t m,
                                     int64_t n, int64_t k, int dtype, int out_dtype, int num_threads, bool is_gated) {
    std::vector<RowGroup> row_groups;
    for (const auto& group : groups)
        row_groups.push_back({pointer<void>(Address(group[0])), group[1], group[2], group[3]});
    QuantizedLinearArgs args = {layout_of(layout), pointer<void>(x), pointer<void>(weight), nullptr, pointer<void>(out),
                                m, n, k, DType(dtype), DType(out_dtype), num_threads, {}, is_gated};
    if (!groups.empty()) args.groups = {row_groups.data(), int64_t(row_groups.size())};
    table.quantized.linear_emulated_tiles(args);
}

void quantized_pack(const KernelTable& table, const LayoutNumbers& layout, int kind, Address source, Address scales,
                    Address minimums, int source_type, Address packed, int64_t first_row, int64_t rows, int64_t n,
                    int64_t k, int num_threads) {
    const QuantizedPackArgs args = {layout_of(layout), PackSource(kind), pointer<void>(source),
                                    pointer<float>(scales), pointer<float>(minimums), source_type,
                                    pointer<void>(packed), first_row, rows, n, k, num_threads};
    GilReleaseIf guard(rows * k > 20'000);
    table.quantized.pack(args);
}

void quantized_rows(const KernelTable& table, const LayoutNumbers& layout, Address weight, Address ids,
                    int64_t first_row, int64_t count, Address out, int64_t n, int64_t k, int out_dtype,
                    int num_threads) {
    const QuantizedRowsArgs args = {layout_of(layout), pointer<void>(weight), pointer<int64_t>(ids), first_row, count,
                                    pointer<void>(out), n, k, DType(out_dtype), num_threads};
    GilReleaseIf guard(count * k > 5'000);
    table.quantized.rows(args);
}

}  // namespace

void bind_quantized(KernelsClass& kernels) {
    kernels.def("quantized_linear", &quantized_linear);
    kernels.def("quantized_linear_emulated_tiles", &quantized_linear_emulated_tiles);
    kernels.def("quantized_pack", &quantized_pack);
    kernels.def("quantized_rows", &quantized_rows);
}

}  // namespace penstock
