// The block kernel of quantised linears: a few rows of x by up to 2 tiles of 16 outputs, over at most 256 inputs. Both
// the sum of a group and the scaled sum of groups stay in registers, which is what bounds the rows.
#pragma once

#include "ops/quantized_codes.h"

namespace penstock::PENSTOCK_ISA {

// Measured on Zen 4, of its peak: 8x2 whole 0.97; groups of 32 bytes 4x2 0.82, 6x2 0.68, 8x3 0.6 (a group's conversion
// and scale are two more instructions to 8; beyond 4x2 registers are spilled).
#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX512
constexpr int kRowsOfWhole = 8, kRowsOfGroups = 4, kQuantizedTiles = 2;
#elif PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX2
constexpr int kRowsOfWhole = 4, kRowsOfGroups = 2, kQuantizedTiles = 1;
#else
constexpr int kRowsOfWhole = 2, kRowsOfGroups = 2, kQuantizedTiles = 1;
#endif

// What a call fetches into the second-level cache: of each tile `lines` with each four units of its own, from `at` on,
// `step` bytes apart.
struct Ahead {
    const char* at;
    int64_t tile_stride, step;
    int lines;
};

struct QuantizedBlock {
    const char* x;  // the first row's units
    int64_t x_stride;
    const float* x_scales;  // of the first row; null: 1
    int64_t x_scale_stride;
    const uint32_t* x_sums;  // of the first row's groups
    int64_t x_sum_stride;
    const char* codes;  // the first step's
    int64_t tile_stride, step_stride;
    const float* scales;  // [tile][groups][16], and as many minimums
    const float* minimums;
    int64_t scales_stride;  // from tile to tile
    int steps, groups;      // groups of a step
    int group_units;        // a multiple of 4
    float* sums;            // [rows][tiles * 16]
    bool first;
    Ahead ahead;
};

// How x and codes are multiplied: 4 bytes a unit, exactly; a group's sum begins with what the codes' offset takes away.
struct ByteFamily {
    using Acc = Ints;
    static Acc start(bool has_minimums, uint32_t x_sum) { return splat_int(has_minimums ? 0 : int32_t(x_sum)); }
    static Acc dot(Acc acc, Units codes, Units x) { return dot_bytes(acc, codes, x); }
};

template <class ElemType>
struct FloatFamily {
    using Elem = ElemType;
    using Acc = Vec;
    static Acc start(bool, uint32_t) { return zero(); }
    static Acc dot(Acc acc, Units codes, Units x) { return penstock::PENSTOCK_ISA::dot(Elem{}, acc, x, codes); }
};
static inline Vec to_vec(Vec x) { return x; }

// Where codes come from: vectors as they are multiplied, or nibbles made into them on the way.
struct WholeReader {
    static constexpr bool kFused = false;
    explicit WholeReader(const WeightLayout&) {}
    template <int kPlace>
    Units unit(const char* codes, int64_t u) const {
        return load_vector(codes, u + kPlace);
    }
};
struct NibbleReader {
    static constexpr bool kFused = true;
    explicit NibbleReader(const WeightLayout&) {}
    template <int kPlace>
    Units unit(const char* codes, int64_t u) const {
        return plane_unit<4, kPlace % 2>(codes, u + kPlace);
    }
};
struct TableReader {
    static constexpr bool kFused = true;
    explicit TableReader(const WeightLayout& layout) : table(static_cast<const uint8_t*>(layout.table)) {}
    template <int kPlace>
    Units unit(const char* codes, int64_t u) const {
        return table.of(plane_unit<4, kPlace % 2>(codes, u + kPlace));
    }
    ByteTable table;
};
#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX512
struct FloatNibbleReader {
    static constexpr bool kFused = true;
    explicit FloatNibbleReader(const WeightLayout& layout) : table(layout.table) {}
    template <int kPlace>
    Units unit(const char* codes, int64_t u) const {
        return table.of<kPlace>(load_vector(codes, u / 4));
    }
    NibbleTable table;
};
#endif

// What a group's sum is multiplied with and given: nothing (one scale a row), a scale, or a scale and a minimum.
enum class Scaling { row, group, minimum };

// The products of one group: `sums` begins with what the family says, and is fed in the order of k.
// Inlined by force: out of line, the sums would be in memory.
template <class Family, class Reader, int kRows, int kTiles>
[[gnu::always_inline]] static inline void multiply_group(const QuantizedBlock& block, const Reader& reader,
                                                         const char* codes, int64_t unit, const char* x,
                                                         const char* ahead,
                                                         typename Family::Acc (&sums)[kRows][kTiles]) {
    for (int64_t u = 0; u < block.group_units; u += 4) {
        for (int line = 0; line < block.ahead.lines; ++line, ahead += block.ahead.step)
            for (int t = 0; t < kTiles; ++t) __builtin_prefetch(ahead + t * block.ahead.tile_stride, 0, 2);
        const auto multiply = [&]<int kPlace>() __attribute__((always_inline)) {
            Units w[kTiles];
            for (int t = 0; t < kTiles; ++t)
                w[t] = reader.template unit<kPlace>(codes + t * block.tile_stride, unit + u);
            for (int r = 0; r < kRows; ++r) {
                const Units splat = splat_unit(reinterpret_cast<const uint32_t*>(x + r * block.x_stride) + u + kPlace);
                for (int t = 0; t < kTiles; ++t) sums[r][t] = Family::dot(sums[r][t], w[t], splat);
            }
        };
        multiply.template operator()<0>();
        multiply.template operator()<1>();
        multiply.template operator()<2>();
        multiply.template operator()<3>();
    }
}

template <class Family, class Reader, Scaling kScaling, int kRows, int kTiles>
void multiply_quantized(const QuantizedBlock& block, const Reader& reader) {
    constexpr bool kMinimum = kScaling == Scaling::minimum;
    const char* ahead = block.ahead.at;
    Vec parts[kRows][kTiles];
    for (int r = 0; r < kRows; ++r)
        for (int t = 0; t < kTiles; ++t) parts[r][t] = zero();
    for (int step = 0, group = 0; step < block.steps; ++step) {
        const char* codes = block.codes + step * block.step_stride;
        for (int in_step = 0; in_step < block.groups; ++in_step, ++group) {
            typename Family::Acc sums[kRows][kTiles];
            for (int r = 0; r < kRows; ++r) {
                const uint32_t x_sum = block.x_sums ? block.x_sums[r * block.x_sum_stride + group] : 0;
                for (int t = 0; t < kTiles; ++t) sums[r][t] = Family::start(kMinimum, x_sum);
            }
            const int64_t unit = int64_t(in_step) * block.group_units;
            const char* x = block.x + (int64_t(step) * block.groups * block.group_units + unit) * 4;
            multiply_group<Family, Reader, kRows, kTiles>(block, reader, codes, unit, x, ahead, sums);
            ahead += block.group_units / 4 * block.ahead.lines * block.ahead.step;
            for (int t = 0; t < kTiles; ++t) {
                const int64_t at = t * block.scales_stride + group * kLanes;
                const Vec scale = kScaling == Scaling::row ? zero() : load(block.scales + at);
                const Vec minimum = kMinimum ? load(block.minimums + at) : zero();
                for (int r = 0; r < kRows; ++r) {
                    Vec sum = to_vec(sums[r][t]);
                    if constexpr (kScaling != Scaling::row) sum = fma(sum, scale, parts[r][t]);
                    if constexpr (kMinimum)
                        sum = fma(splat(f32_from_bits(block.x_sums[r * block.x_sum_stride + group])), minimum, sum);
                    parts[r][t] = sum;
                }
            }
        }
    }
    for (int r = 0; r < kRows; ++r) {
        const Vec x_scale = splat(block.x_scales ? block.x_scales[r * block.x_scale_stride] : 1.0f);
        for (int t = 0; t < kTiles; ++t) {
            float* sums = block.sums + (r * kTiles + t) * kLanes;
            store(sums, fma(parts[r][t], x_scale, block.first ? zero() : load(sums)));
        }
    }
}

template <class FamilyType, class ReaderType, Scaling kScalingOf>
class QuantizedKernel {
public:
    using Family = FamilyType;
    using Reader = ReaderType;
    static constexpr Scaling kScaling = kScalingOf;
    // Groups of floats are long enough for their sums to be spilled between them.
    static constexpr bool kIsBytes = __is_same(typename Family::Acc, Ints);
    static constexpr int kRows = kScaling != Scaling::row && kIsBytes ? kRowsOfGroups : kRowsOfWhole;
    explicit QuantizedKernel(const WeightLayout& layout) : reader_(layout) {}

    // tiles: 1 or kQuantizedTiles.
    void multiply(const QuantizedBlock& block, int rows, int tiles) const {
        (tiles == 1 ? kInstances.single : kInstances.all)[rows - 1](block, reader_);
    }

private:
    struct Instances {
        void (*single[kRows])(const QuantizedBlock&, const Reader&);
        void (*all[kRows])(const QuantizedBlock&, const Reader&);
    };

    template <int kHeight>
    static constexpr void fill(Instances& instances) {
        instances.single[kHeight - 1] = multiply_quantized<Family, Reader, kScaling, kHeight, 1>;
        instances.all[kHeight - 1] = multiply_quantized<Family, Reader, kScaling, kHeight, kQuantizedTiles>;
        if constexpr (kHeight > 1) fill<kHeight - 1>(instances);
    }
    static constexpr Instances make() {
        Instances instances{};
        fill<kRows>(instances);
        return instances;
    }
    static const Instances kInstances;

    Reader reader_;
};

template <class Family, class Reader, Scaling kScaling>
constexpr typename QuantizedKernel<Family, Reader, kScaling>::Instances
    QuantizedKernel<Family, Reader, kScaling>::kInstances = QuantizedKernel<Family, Reader, kScaling>::make();

}  // namespace penstock::PENSTOCK_ISA
