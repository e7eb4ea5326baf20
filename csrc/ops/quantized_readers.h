// What the block kernels of quantised linears multiply, unit by unit: codes as they lie, or made of the bits that lie there.
#pragma once

#include "ops/quantized_codes.h"

namespace penstock::PENSTOCK_ISA {

// Where codes come from: vectors as they are multiplied, or bits made into them on the way. kUnits are read one after
// another, with `codes` where the first of them lies on the whole, and `unit` its number. A pointer that goes on by
// kStride for each unit is all the arithmetic of addresses there is: with one row of x, every instruction counts.
struct Reader {
    static constexpr int kUnits = 4;
    // Where headers and codes take turns so quickly that the hardware does not see where they go.
    static constexpr bool kFetchesEachLine = false;
};
struct WholeReader : Reader {
    static constexpr bool kFused = false;
    static constexpr int kStride = kVectorBytes;
    explicit WholeReader(const WeightLayout&) {}
    template <int kPlace>
    Units unit(const char* codes, int64_t) const {
        return load_vector(codes, kPlace);
    }
};
struct TwoBitReader : Reader {
    static constexpr bool kFused = true, kFetchesEachLine = true;
    static constexpr int kStride = kVectorBytes / 4;
    explicit TwoBitReader(const WeightLayout&) {}
    template <int kPlace>
    Units unit(const char* codes, int64_t) const {
        return plane_unit<2, kPlace>(codes, kPlace);
    }
};
// Of eight units two vectors of pairs, and behind them one of single bits.
struct ThreeBitReader : Reader {
    static constexpr bool kFused = true;
    static constexpr int kStride = kVectorBytes * 3 / 8;
    explicit ThreeBitReader(const WeightLayout&) {}
    template <int kPlace>
    Units unit(const char* codes, int64_t unit) const {
        const int64_t later = unit / 4 % 2;
        const char* block = codes - later * (4 * kStride);
        const Units upper = shift_right(load_vector(block, 2), int(later * 4));
        return plane_over<1, kPlace, 2>(upper, plane_unit<2, kPlace>(block + later * kVectorBytes, kPlace));
    }
};
struct NibbleReader : Reader {
    static constexpr bool kFused = true;
    static constexpr int kStride = kVectorBytes / 2;
    explicit NibbleReader(const WeightLayout&) {}
    template <int kPlace>
    Units unit(const char* codes, int64_t) const {
        return plane_unit<4, kPlace % 2>(codes, kPlace);
    }
};
// Of eight units four vectors of nibbles, and behind them one of single bits.
struct FiveBitReader : Reader {
    static constexpr bool kFused = true, kFetchesEachLine = true;
    static constexpr int kStride = kVectorBytes * 5 / 8, kUnits = 8;
    explicit FiveBitReader(const WeightLayout&) {}
    template <int kPlace>
    Units unit(const char* codes, int64_t) const {
        return plane_over<1, kPlace, 4>(load_vector(codes, 4), plane_unit<4, kPlace % 2>(codes, kPlace));
    }
};
// Of four units two vectors of nibbles, and behind them one of pairs.
struct SixBitReader : Reader {
    static constexpr bool kFused = true;
    static constexpr int kStride = kVectorBytes * 3 / 4;
    explicit SixBitReader(const WeightLayout&) {}
    template <int kPlace>
    Units unit(const char* codes, int64_t) const {
        return plane_over<2, kPlace, 4>(load_vector(codes, 2), plane_unit<4, kPlace % 2>(codes, kPlace));
    }
};
// Codes of 4 bits with a table.
struct TableReader : Reader {
    static constexpr bool kFused = true;
    static constexpr int kStride = kVectorBytes / 2;
    explicit TableReader(const WeightLayout& layout) : table(static_cast<const uint8_t*>(layout.table)) {}
    template <int kPlace>
    Units unit(const char* codes, int64_t) const {
        return table.of(plane_unit<4, kPlace % 2>(codes, kPlace));
    }
    ByteTable table;
};
#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX2
struct FloatNibbleReader : Reader {
    static constexpr bool kFused = true;
    static constexpr int kStride = kVectorBytes / 4;
    explicit FloatNibbleReader(const WeightLayout& layout) : table(layout.table) {}
    template <int kPlace>
    Units unit(const char* codes, int64_t) const {
        return table.of<kPlace>(load_vector(codes, 0));
    }
    NibbleTable table;
};
// Codes: IntegerCodes or Fp8Codes.
template <class Codes>
struct FloatByteReader : Reader {
    static constexpr bool kFused = true;
    static constexpr int kStride = kVectorBytes / 2;
    explicit FloatByteReader(const WeightLayout& layout) : codes(layout) {}
    template <int kPlace>
    auto unit(const char* at, int64_t) const {
        return codes.of(at + kPlace * kStride);
    }
    Codes codes;
};
#endif

}  // namespace penstock::PENSTOCK_ISA
