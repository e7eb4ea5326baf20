// Quantised linears whose activations are rounded to 8 bits.
#include "ops/quantized_driver.h"
#include "ops/quantized_parts.h"

namespace penstock::PENSTOCK_ISA {

namespace {

// With more rows, six bits are better unpacked once for all of them.
constexpr int64_t kRowsUnpackedTwice = 2 * kRowsOfGroups;

#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AMX
// So few wait for the memory, and tiles, whose codes are made bytes first, would not multiply them faster.
constexpr int64_t kRowsOfVectors = 8;
#endif

template <class Elem>
void run(const QuantizedLinearArgs& args) {
    using Rows = BytesOfRows<Elem>;
    const WeightLayout& layout = args.layout;
    if (layout.group_size == 0) return run_quantized<QuantizedKernel<TightByteFamily, WholeReader, Scaling::row>, Rows>(args);
    const bool has_minimums = layout.minimums != MinimumKind::none;
    if (layout.bits == 6 && rows_of_a_product(args) <= kRowsUnpackedTwice)
        return run_quantized<QuantizedKernel<ByteFamily, SixBitReader, Scaling::group>, Rows>(args);
    if (layout.bits == 4 && layout.table != nullptr)
        return run_quantized<QuantizedKernel<ByteFamily, TableReader, Scaling::group>, Rows>(args);
    if (layout.bits == 4 && has_minimums)
        return run_quantized<QuantizedKernel<TightByteFamily, NibbleReader, Scaling::minimum>, Rows>(args);
    if (layout.bits == 4) return run_quantized<QuantizedKernel<TightByteFamily, NibbleReader, Scaling::group>, Rows>(args);
    if (has_minimums) return run_quantized<QuantizedKernel<TightByteFamily, WholeReader, Scaling::minimum>, Rows>(args);
    run_quantized<QuantizedKernel<TightByteFamily, WholeReader, Scaling::group>, Rows>(args);
}

}  // namespace

void linear_of_bytes(const QuantizedLinearArgs& args) {
#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AMX
    if (rows_of_a_product(args) > kRowsOfVectors) return linear_of_bytes_tiles(args);
#endif
    if (args.dtype == DType::f32)
        run<F32>(args);
    else
        run<Bf16>(args);
}

}  // namespace penstock::PENSTOCK_ISA
