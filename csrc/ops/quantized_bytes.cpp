// Quantised linears whose activations are rounded to 8 bits.
#include "ops/quantized_driver.h"
#include "ops/quantized_parts.h"

namespace penstock::PENSTOCK_ISA {

namespace {

// With more rows, two tiles of six bits are better unpacked once for all of them.
constexpr int64_t kRowsUnpackedTwice = 2 * kRowsOfGroups;

// Up to so many rows, beyond a strip for two tiles, are multiplied with one tile at a time: 8 rows of nibbles, which
// would be two strips, and with 6 and 8 bits a few taller strips, which read and unpack half as often. Measured on Zen 4,
// of the time of two tiles: with 8 rows Q4_0 0.94, Q4_K 0.98, Q6_K 0.91, Q8_0 0.86; with 16 to 32 Q4_0 1.02, Q6_K and
// Q8_0 0.95; with 64 Q6_K 1.15, Q8_0 1.01. Where products are twice as fast (tuning.h), loads hold one tile up, and only a
// single strip of bytes pays: on Zen 5, of the rate of one tile, two had with 32 and 39 rows Q8_0 1.14 and 1.2, Q6_K 1.05
// and 1.2.
constexpr int64_t kRowsOfOneTileOfNibbles = 8;
int64_t rows_of_one_tile_of_bytes() { return (tuning().halves_vectors ? 3 : 1) * kRowsOfOneTile; }

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

// Where there are two tiles at once, and rows for more than a strip of them.
bool fit_one_tile(const QuantizedLinearArgs& args, int64_t most) {
    const int64_t rows = rows_of_a_product(args);
    return kQuantizedTiles > 1 && rows > kRowsOfGroups && rows <= most;
}

template <class Rows, class Family, class Reader, Scaling kScaling>
void run_one_tile(const QuantizedLinearArgs& args) {
    if constexpr (kQuantizedTiles > 1)
        run_quantized<QuantizedKernel<Family, Reader, kScaling, kRowsOfOneTile, 1>, Rows>(args);
}

template <class Rows, Scaling kScaling>
void run_narrow(const QuantizedLinearArgs& args) {
    const bool has_few_rows = rows_of_a_product(args) <= kRowsOfOneStream;
    switch (args.layout.bits) {
        case 2: if (has_few_rows) return run_few_rows<Rows, TwoBitReader, kScaling>(args); break;
        case 3: if (has_few_rows) return run_few_rows<Rows, ThreeBitReader, kScaling>(args); break;
        case 4:
            if (fit_one_tile(args, kRowsOfOneTileOfNibbles))
                return run_one_tile<Rows, TightNarrowByteFamily, NibbleReader, kScaling>(args);
            return run_quantized<QuantizedKernel<TightNarrowByteFamily, NibbleReader, kScaling>, Rows>(args);
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
    if (layout.bits == 8 && fit_one_tile(args, rows_of_one_tile_of_bytes()))
        return run_one_tile<Rows, TightByteFamily, WholeReader, Scaling::group>(args);
    if (layout.bits == 8) return run_quantized<QuantizedKernel<TightByteFamily, WholeReader, Scaling::group>, Rows>(args);
    if (has_whole_minimums(layout)) return run_narrow<Rows, Scaling::whole_minimum>(args);
    if (has_minimums) return run_narrow<Rows, Scaling::minimum>(args);
    if (layout.bits == 6 && fit_one_tile(args, rows_of_one_tile_of_bytes()))
        return run_one_tile<Rows, TightNarrowByteFamily, SixBitReader, Scaling::group>(args);
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
