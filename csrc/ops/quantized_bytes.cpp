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

constexpr int kMostNarrow = 127;

int largest_byte(const WeightLayout& layout) {
    int most = 0;
    for (int i = 0; i < 16; ++i)
        if (const int byte = static_cast<const uint8_t*>(layout.table)[i]; byte > most) most = byte;
    return most;
}

// One or two rows read codes of an odd width as they are.
template <class Rows, class Reader, Scaling kScaling>
void run_few_rows(const QuantizedLinearArgs& args) {
    run_quantized<QuantizedKernel<NarrowByteFamily, Reader, kScaling, kRowsOfOneStream>, Rows>(args);
}

template <class Rows, Scaling kScaling>
void run_narrow(const QuantizedLinearArgs& args) {
    const bool has_few_rows = rows_of_a_product(args) <= kRowsOfOneStream;
    switch (args.layout.bits) {
        case 2: if (has_few_rows) return run_few_rows<Rows, TwoBitReader, kScaling>(args); break;
        case 3: if (has_few_rows) return run_few_rows<Rows, ThreeBitReader, kScaling>(args); break;
        case 4: return run_quantized<QuantizedKernel<TightNarrowByteFamily, NibbleReader, kScaling>, Rows>(args);
        case 5: if (has_few_rows) return run_few_rows<Rows, FiveBitReader, kScaling>(args); break;
    }
    run_quantized<QuantizedKernel<TightNarrowByteFamily, WholeReader, kScaling>, Rows>(args);
}

template <class Elem>
void run(const QuantizedLinearArgs& args) {
    using Rows = BytesOfRows<Elem>;
    const WeightLayout& layout = args.layout;
    if (layout.group_size == 0) return run_quantized<QuantizedKernel<TightByteFamily, WholeReader, Scaling::row>, Rows>(args);
    const bool has_minimums = layout.minimums != MinimumKind::none;
    if (layout.bits == 4 && layout.table != nullptr && largest_byte(layout) <= kMostNarrow)
        return run_quantized<QuantizedKernel<NarrowByteFamily, TableReader, Scaling::group>, Rows>(args);
    if (layout.bits == 4 && layout.table != nullptr)
        return run_quantized<QuantizedKernel<ByteFamily, TableReader, Scaling::group>, Rows>(args);
    if (layout.bits == 8 && has_minimums)
        return run_quantized<QuantizedKernel<TightByteFamily, WholeReader, Scaling::minimum>, Rows>(args);
    if (layout.bits == 8) return run_quantized<QuantizedKernel<TightByteFamily, WholeReader, Scaling::group>, Rows>(args);
    if (has_minimums) return run_narrow<Rows, Scaling::minimum>(args);
    if (layout.bits == 6 && rows_of_a_product(args) <= kRowsUnpackedTwice)
        return run_quantized<QuantizedKernel<NarrowByteFamily, SixBitReader, Scaling::group>, Rows>(args);
    run_narrow<Rows, Scaling::group>(args);
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
