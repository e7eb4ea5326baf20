// The block kernel of quantised linears: a few rows of x by up to 2 tiles of 16 outputs. Both the sum of a group and the
// scaled sum of groups stay in registers, which is what bounds the rows; after 256 inputs they go to the block's sums.
#pragma once

#include "division.h"
#include "ops/quantized_fetch.h"
#include "ops/quantized_readers.h"

namespace penstock::PENSTOCK_ISA {

// Measured on Zen 4, of its peak: 8x2 whole 0.92; groups of 32 bytes 6x2 0.86 (a group's scale takes the multiplier, too:
// 8 of 9 instructions are products), where 8 rows are 4x2 twice 0.79, and 8x1 once 0.84.
#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX512
constexpr int kRowsOfWhole = 8, kRowsOfGroups = 6, kRowsOfOneTile = 13, kQuantizedTiles = 2;
#elif PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX_VNNI
constexpr int kRowsOfWhole = 6, kRowsOfGroups = 3, kRowsOfOneTile = 3, kQuantizedTiles = 1;
#elif PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX2
constexpr int kRowsOfWhole = 4, kRowsOfGroups = 2, kRowsOfOneTile = 2, kQuantizedTiles = 1;
#else
constexpr int kRowsOfWhole = 2, kRowsOfGroups = 2, kRowsOfOneTile = 2, kQuantizedTiles = 1;
#endif

// Rows of x in 8 bits lie in chunks of so many inputs, at distances known when kernels are compiled: where these are
// variables, a kernel of many rows runs out of registers for addresses (measured on Zen 4: 0.95 of the rate). In bytes,
// and in numbers of scales and sums; the distances are no powers of two, which would share sets of the first-level cache.
constexpr int64_t kXChunkInputs = 2048, kXChunkStride = kXChunkInputs + 64;
constexpr int64_t kXChunkScales = kXChunkInputs / kXBlock, kXChunkSums = kXChunkInputs / 16 + 16;

// With so few rows, the sums of two groups of expanded floats are made at once.
constexpr int kRowsOfTwoSteps = 2;

struct QuantizedBlock {
    const char* x;  // the first row's units
    int64_t x_stride;
    const float* x_scales;  // of the first row; null: 1
    int64_t x_scale_stride;
    const uint32_t* x_sums;  // of the first row's groups, as the weights need them (Activations)
    int64_t x_sum_stride;
    const char* codes;  // the first step's
    int64_t tile_stride, step_stride;
    // f32 [tile][groups][16] (minimums that are whole: as expand_whole_minimums makes them), or null: read where they are, in
    // the steps' headers.
    const float* scales;
    const float* minimums;
    int64_t scales_stride;  // from tile to tile
    const WeightLayout* layout;
    const char* headers;
    int64_t header_tile_stride;
    int64_t steps;
    int x_block_steps, step_units;
    int group_units;  // a multiple of 4
    int minimum_pairs;  // of a step, where minimums are whole
    float* sums;              // [rows][tiles * 16], added to
    Ahead ahead;

    // Goes on to later rows of x.
    void skip_rows(int64_t rows) {
        x += rows * x_stride;
        x_scales += rows * x_scale_stride;
        x_sums += rows * x_sum_stride;
    }
};

// How x and codes are multiplied: 4 bytes a unit, exactly; a group's sum begins with what the codes' offset takes away.
struct ByteFamily {
    static constexpr bool kIsScaled = true;  // x is, by 256 inputs
    static constexpr int64_t x_stride(const QuantizedBlock&) { return kXChunkStride; }
    static constexpr int64_t sum_stride(const QuantizedBlock&) { return kXChunkSums; }
    using Acc = Ints;
    static Acc start(bool has_minimums, uint32_t x_sum) { return splat_int(has_minimums ? 0 : int32_t(x_sum)); }
    static Acc dot(Acc acc, Units codes, Units x) { return dot_bytes(acc, codes, x); }
    static void settle() {}
};
#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX512
// The same where sums and parts fill the registers: no operand is loaded earlier than it is used, and no sum is copied,
// since GCC 12 spills a third of them otherwise (measured with groups of whole bytes: 0.92 of the rate; Q4_K 0.96).
struct TightByteFamily : ByteFamily {
    static Acc dot(Acc acc, Units codes, Units x) { return dot_bytes_in_place(acc, codes, x); }
    // For a single tile, which is all that meets the unit.
    static Acc dot_unit(Acc acc, Units codes, const uint32_t* x) { return dot_unit_in_place(acc, codes, x); }
    static void settle() { asm volatile("" ::: "memory"); }
};
#else
using TightByteFamily = ByteFamily;
#endif
#if PENSTOCK_ISA_LEVEL == PENSTOCK_LEVEL_AVX2
// For codes of at most 127.
struct NarrowByteFamily : ByteFamily {
    static Acc dot(Acc acc, Units codes, Units x) { return dot_narrow_bytes(acc, codes, x); }
};
using TightNarrowByteFamily = NarrowByteFamily;
#else
using NarrowByteFamily = ByteFamily;
using TightNarrowByteFamily = TightByteFamily;
#endif

template <class ElemType>
struct FloatFamily {
    static constexpr bool kIsScaled = false;
    static int64_t x_stride(const QuantizedBlock& block) { return block.x_stride; }
    static int64_t sum_stride(const QuantizedBlock& block) { return block.x_sum_stride; }
    using Elem = ElemType;
    using Acc = Vec;
    static Acc start(bool, uint32_t) { return zero(); }
    template <class Weights>
    static Acc dot(Acc acc, const Weights& weights, Units x) {
        return penstock::PENSTOCK_ISA::dot(Elem{}, acc, weights, x);
    }
    static void settle() {}
};
static inline Vec to_vec(Vec x) { return x; }
static inline Vec splat_float(const uint32_t* bits) { return splat(f32_from_bits(*bits)); }

// What a group's sum is multiplied with and given: nothing (one scale a row), a scale, or a scale and a minimum. Minimums
// that are whole are given to all groups of 256 inputs at once: as integers, in pairs, they take half of the multiplier's
// time (64 and 512 rows of Q4_K on Zen 5: 1.03 times as fast).
enum class Scaling { row, group, minimum, whole_minimum };
constexpr bool has_minimum(Scaling scaling) { return scaling == Scaling::minimum || scaling == Scaling::whole_minimum; }

// f.operator()<0>(), and so on to kCount - 1.
template <int kCount, class Function>
[[gnu::always_inline]] static constexpr inline void for_each_place(const Function& f) {
    if constexpr (kCount > 0) {
        for_each_place<kCount - 1>(f);
        f.template operator()<kCount - 1>();
    }
}

// One unit of a tile that alone meets the unit of x.
template <class Family, class Weights>
[[gnu::always_inline]] static inline typename Family::Acc dot_alone(typename Family::Acc sum, const Weights& weights,
                                                                    const uint32_t* x) {
    if constexpr (requires { &Family::dot_unit; })
        return Family::dot_unit(sum, weights, x);
    else
        return Family::dot(sum, weights, splat_unit(x));
}

// The products of a group, from unit `unit` of a step on (a multiple of 4): `sums` begins with what the family says, and
// is fed in the order of k. With kSteps > 1, of the same group of as many steps at once: each sum is a chain, and too few
// of them wait for the multiplier. Inlined by force: out of line, the sums would be in memory.
template <class Family, class Reader, int kRows, int kTiles, int kSteps>
[[gnu::always_inline]] static inline void multiply_group(const QuantizedBlock& block, const Reader& reader,
                                                         const char* step, int64_t unit, int64_t units, const char* x,
                                                         Fetcher<kTiles>& fetcher,
                                                         typename Family::Acc (&sums)[kSteps][kRows][kTiles]) {
    const char* codes = step + unit * Reader::kStride;
    const char* end = codes + units * Reader::kStride;
    const int64_t tile_stride = block.tile_stride, x_stride = Family::x_stride(block);
    const int64_t step_stride = block.step_stride, step_x = int64_t(block.step_units) * int64_t(sizeof(uint32_t));
    for (; codes != end; codes += Reader::kUnits * Reader::kStride, x += Reader::kUnits * sizeof(uint32_t),
                         unit += Reader::kUnits) {
        const auto multiply = [&]<int kPlace>(int s) __attribute__((always_inline)) {
            Family::settle();
            decltype(reader.template unit<kPlace>(codes, unit)) w[kTiles];
            for (int t = 0; t < kTiles; ++t) {
                const int64_t at = s * step_stride + t * tile_stride;
                w[t] = reader.template unit<kPlace>(codes + at, unit);
            }
            for (int r = 0; r < kRows; ++r) {
                const char* its_x = x + s * step_x + r * x_stride;
                const auto* its_unit = reinterpret_cast<const uint32_t*>(its_x) + kPlace;
                if constexpr (kTiles == 1) {
                    sums[s][r][0] = dot_alone<Family>(sums[s][r][0], w[0], its_unit);
                } else {
                    const Units splat = splat_unit(its_unit);
                    for (int t = 0; t < kTiles; ++t) sums[s][r][t] = Family::dot(sums[s][r][t], w[t], splat);
                }
            }
        };
        if (kRows <= kRowsFetchedNear && block.ahead.is_near)
            for (int s = 0; s < kSteps; ++s)
                fetch_near(codes + s * step_stride, Reader::kUnits * Reader::kStride, kTiles, tile_stride);
        else
            for (int turn = 0; turn < kSteps * Reader::kUnits / 4; ++turn) fetcher.turn();
        for_each_place<Reader::kUnits>([&]<int kPlace>() __attribute__((always_inline)) {
            for (int s = 0; s < kSteps; ++s) multiply.template operator()<kPlace>(s);
        });
    }
}

// A row of x's scaled sums, for 256 inputs, into the block's.
template <class Family, int kTiles>
[[gnu::always_inline]] static inline void add_scaled(const QuantizedBlock& block, int row, int64_t x_block,
                                                     const Vec (&parts)[kTiles]) {
    const Vec x_scale = splat(Family::kIsScaled ? block.x_scales[row * kXChunkScales + x_block] : 1.0f);
    for (int t = 0; t < kTiles; ++t) {
        float* sum = block.sums + (row * kTiles + t) * kLanes;
        store(sum, fma(parts[t], x_scale, load(sum)));
    }
}

// Where a row has one scale: the products of 256 inputs are one sum.
template <class Family, class Reader, int kRows, int kTiles>
void multiply_whole_rows(const QuantizedBlock& block, const Reader& reader) {
    Fetcher<kTiles> fetcher(block.ahead);
    const int64_t x_block_units = int64_t(block.x_block_steps) * block.step_units;
    const int64_t units = block.steps * block.step_units;
    for (int64_t begin = 0, x_block = 0; begin < units; begin += x_block_units, ++x_block) {
        typename Family::Acc sums[1][kRows][kTiles];
        for (int r = 0; r < kRows; ++r)
            for (int t = 0; t < kTiles; ++t)
                sums[0][r][t] = Family::start(false, block.x_sums[r * Family::sum_stride(block) + x_block]);
        const int64_t count = min_of(x_block_units, units - begin);
        multiply_group<Family, Reader, kRows, kTiles, 1>(block, reader, block.codes, begin, count, block.x + begin * 4,
                                                      fetcher, sums);
        for (int r = 0; r < kRows; ++r) {
            Vec parts[kTiles];
            for (int t = 0; t < kTiles; ++t) parts[t] = to_vec(sums[0][r][t]);
            add_scaled<Family, kTiles>(block, r, x_block, parts);
        }
    }
}

// Where a group's scale and minimum come from. Many rows of x share what was made f32 once.
template <int kTiles>
class ExpandedScales {
public:
    explicit ExpandedScales(const QuantizedBlock& block) : block_(block), group_(-1) {}
    void begin_step(int64_t) {}
    void begin_group(int) { ++group_; }
    Vec scale(int tile) const { return load(block_.scales + tile * block_.scales_stride + group_ * kLanes); }
    Vec minimum(int tile, Vec) const { return load(block_.minimums + tile * block_.scales_stride + group_ * kLanes); }
    Units minimum_pair(int tile, int64_t step, int pair) const {
        return load_units(reinterpret_cast<const uint32_t*>(whole_minimums(tile, step) + pair * kLanes));
    }
    Vec super_minimum(int tile, int64_t step) const {
        return load(whole_minimums(tile, step) + block_.minimum_pairs * kLanes);
    }

private:
    const float* whole_minimums(int tile, int64_t step) const {
        return block_.minimums + tile * block_.scales_stride + step * (block_.minimum_pairs + 1) * kLanes;
    }

    const QuantizedBlock& block_;
    int64_t group_;
};

// A few rows, which wait for the memory, read the weights in one pass.
template <int kTiles>
class StoredScales {
public:
    explicit StoredScales(const QuantizedBlock& block) : block_(block) {}
    void begin_step(int64_t step) {
        for (int t = 0; t < kTiles; ++t)
            headers_[t] = StepHeader(*block_.layout, block_.headers + t * block_.header_tile_stride +
                                                         step * block_.layout->step_bytes);
    }
    void begin_group(int group) { group_ = group; }
    Vec scale(int tile) const { return headers_[tile].scale(group_); }
    Vec minimum(int tile, Vec scale) const { return headers_[tile].minimum(group_, scale); }
    Units minimum_pair(int tile, int64_t, int pair) const { return headers_[tile].minimum_pair(pair); }
    Vec super_minimum(int tile, int64_t) const { return headers_[tile].super_minimum; }

private:
    const QuantizedBlock& block_;
    StepHeader headers_[kTiles];
    int group_ = 0;
};

// What the minimums of a step, which is 256 inputs, add to each row's scaled sums, which begin with it: after the products
// these would be waited for. x_sums: of the first row.
template <class Family, int kRows, int kTiles, class Scales>
[[gnu::always_inline]] static inline void begin_with_minimums(const QuantizedBlock& block, const Scales& scales, int64_t step,
                                                              const uint32_t* x_sums, Vec (&parts)[kRows][kTiles]) {
    constexpr int kPairsAtOnce = 4;  // of 4 or 8
    for_each_place<kTiles>([&]<int kTile>() __attribute__((always_inline)) {
        Ints sums[kRows];
        for_each_place<kRows>([&]<int kRow>() __attribute__((always_inline)) { sums[kRow] = splat_int(0); });
        for (int first = 0; first < block.minimum_pairs; first += kPairsAtOnce)
            for_each_place<kPairsAtOnce>([&]<int kPlace>() __attribute__((always_inline)) {
                const Units minimums = scales.minimum_pair(kTile, step, first + kPlace);
                for_each_place<kRows>([&]<int kRow>() __attribute__((always_inline)) {
                    const uint32_t* its_sums = x_sums + kRow * Family::sum_stride(block) + first;
                    sums[kRow] = dot_pairs_in_place(sums[kRow], minimums, its_sums + kPlace);
                });
            });
        const Vec scale = scales.super_minimum(kTile, step);
        for_each_place<kRows>([&]<int kRow>() __attribute__((always_inline)) {
            parts[kRow][kTile] = to_vec(sums[kRow]) * scale;
        });
    });
}

template <class Family, class Reader, Scaling kScaling, int kRows, int kTiles, class Scales>
void multiply_groups(const QuantizedBlock& block, const Reader& reader, Scales scales) {
    Fetcher<kTiles> fetcher(block.ahead);
    const char *codes = block.codes, *x = block.x;
    const uint32_t* x_sums = block.x_sums;
    Vec parts[kRows][kTiles];
    // The same group of kSteps steps; their sums are added one after another.
    const auto multiply = [&]<int kSteps>(int64_t step, int unit, int group) __attribute__((always_inline)) {
        typename Family::Acc sums[kSteps][kRows][kTiles];
        for (int s = 0; s < kSteps; ++s)
            for (int r = 0; r < kRows; ++r) {
                const uint32_t start = Family::kIsScaled ? x_sums[r * Family::sum_stride(block)] : 0;
                for (int t = 0; t < kTiles; ++t) sums[s][r][t] = Family::start(has_minimum(kScaling), start);
            }
        multiply_group<Family, Reader, kRows, kTiles, kSteps>(block, reader, codes, unit, block.group_units, x, fetcher,
                                                              sums);
        for (int s = 0; s < kSteps; ++s, x += int64_t(block.group_units) * 4, ++x_sums) {
            if (unit == 0) scales.begin_step(step + s);
            if (kRows <= kRowsFetchedNear && unit == 0 && block.ahead.is_near)
                fetch_near(codes + s * block.step_stride - block.layout->header_bytes, block.layout->header_bytes, kTiles,
                           block.tile_stride);
            scales.begin_group(group);
            for (int t = 0; t < kTiles; ++t) {
                const Vec scale = scales.scale(t);
                for (int r = 0; r < kRows; ++r) parts[r][t] = fma(to_vec(sums[s][r][t]), scale, parts[r][t]);
                if constexpr (kScaling == Scaling::minimum) {
                    const Vec minimum = scales.minimum(t, scale);
                    for (int r = 0; r < kRows; ++r)
                        parts[r][t] = fma(splat_float(x_sums + r * Family::sum_stride(block)), minimum, parts[r][t]);
                }
            }
        }
    };
    for (int64_t begin = 0, x_block = 0; begin < block.steps; begin += block.x_block_steps, ++x_block) {
        if constexpr (kScaling == Scaling::whole_minimum) {
            scales.begin_step(begin);
            begin_with_minimums<Family>(block, scales, begin, block.x_sums + x_block * block.minimum_pairs, parts);
        } else {
            for (int r = 0; r < kRows; ++r)
                for (int t = 0; t < kTiles; ++t) parts[r][t] = zero();
        }
        const int64_t end = min_of(begin + block.x_block_steps, block.steps);
        int64_t step = begin;
        // Groups of bytes are short, and the next one's products need not wait for them.
        if constexpr (!Family::kIsScaled && !Reader::kFused && kRows <= kRowsOfTwoSteps)
            for (; block.group_units == block.step_units && step + 2 <= end; step += 2, codes += 2 * block.step_stride)
                multiply.template operator()<2>(step, 0, 0);
        for (; step < end; ++step, codes += block.step_stride)
            for (int unit = 0, group = 0; unit < block.step_units; unit += block.group_units, ++group)
                multiply.template operator()<1>(step, unit, group);
        for (int r = 0; r < kRows; ++r) add_scaled<Family, kTiles>(block, r, x_block, parts[r]);
    }
}

// Where one row of x reads one tile: fetches what lies at one distance from what is read, a line or each fourth.
template <class Reader>
class StreamFetcher {
public:
    explicit StreamFetcher(const QuantizedBlock& block)
        : is_near_(block.ahead.is_near),
          header_bytes_(block.layout->header_bytes),
          distance_(block.ahead.pace ? block.ahead.at - block.codes : 0) {}
    template <int kUnits>
    void turn(const char* codes) const {
        constexpr int kBytes = kUnits * Reader::kStride;
        if (is_near_) return fetch_near(codes, kBytes, 1, 0);
        for (int at = 0; at < kBytes; at += kStep) __builtin_prefetch(codes + distance_ + at, 0, 2);
    }
    void begin_step(const char* header) const {
        if (is_near_) fetch_near(header, header_bytes_, 1, 0);
    }

private:
    static constexpr int kStep = Reader::kFetchesEachLine ? kVectorBytes : 4 * kVectorBytes;
    const bool is_near_;
    const int header_bytes_;
    const int64_t distance_;
};

// Adds the products of one row of x and one tile to `sum`, from unit `unit` of a step on. kUnits: at most Reader::kUnits
// or a multiple of it.
template <class Family, class Reader, int kUnits>
[[gnu::always_inline]] static inline typename Family::Acc stream_units(typename Family::Acc sum, const Reader& reader,
                                                                       const char* codes, int64_t unit, const char* x) {
    for_each_place<kUnits>([&]<int kPlace>() __attribute__((always_inline)) {
        constexpr int kInReader = kPlace % Reader::kUnits, kBefore = kPlace - kInReader;
        const Units weights = reader.template unit<kInReader>(codes + kBefore * Reader::kStride, unit + kBefore);
        sum = dot_alone<Family>(sum, weights, reinterpret_cast<const uint32_t*>(x) + kPlace);
    });
    return sum;
}

// One row of x by one tile, which wait for the memory if there are few instructions: groups of a known size (0: any), and
// headers read where the stream comes to them. Reading those of 256 inputs at once, Q8_0's four a kilobyte apart, waited
// for the memory: 0.84 of its rate, as it is 0.91 (Zen 5).
template <class Family, class Reader, Scaling kScaling, int kGroupUnits>
void stream_groups(const QuantizedBlock& block, const Reader& reader) {
    constexpr int kAtOnce = kGroupUnits ? kGroupUnits : Reader::kUnits;
    const StreamFetcher<Reader> fetcher(block);
    const int units = kGroupUnits ? kGroupUnits : block.group_units, groups = block.step_units / units;
    const char *codes = block.codes, *header = block.headers, *x = block.x;
    const uint32_t* x_sums = block.x_sums;
    for (int64_t begin = 0, x_block = 0; begin < block.steps; begin += block.x_block_steps, ++x_block) {
        const int64_t end = min_of(begin + block.x_block_steps, block.steps);
        Vec parts[1] = {zero()};
        if constexpr (kScaling == Scaling::whole_minimum) {
            const StepHeader values(*block.layout, header);
            Ints sum = splat_int(0);
            for (int pair = 0; pair < block.minimum_pairs; ++pair)
                sum = dot_pairs_in_place(sum, values.minimum_pair(pair), block.x_sums + x_block * block.minimum_pairs + pair);
            parts[0] = to_vec(sum) * values.super_minimum;
        }
        for (int64_t step = begin; step < end; ++step, codes += block.step_stride, header += block.layout->step_bytes) {
            fetcher.begin_step(header);
            const StepHeader values(*block.layout, header);
            for (int group = 0; group < groups; ++group, ++x_sums) {
                auto sum = Family::start(has_minimum(kScaling), *x_sums);
                for (int unit = group * units, last = unit + units; unit < last; unit += kAtOnce, x += kAtOnce * 4) {
                    const char* from = codes + unit * Reader::kStride;
                    fetcher.template turn<kAtOnce>(from);
                    sum = stream_units<Family, Reader, kAtOnce>(sum, reader, from, unit, x);
                }
                const Vec scale = values.scale(group);
                parts[0] = fma(to_vec(sum), scale, parts[0]);
                if constexpr (kScaling == Scaling::minimum)
                    parts[0] = fma(splat_float(x_sums), values.minimum(group, scale), parts[0]);
            }
        }
        add_scaled<Family, 1>(block, 0, x_block, parts);
    }
}

// The same where a row has one scale: 256 inputs are two sums, whose order is free.
template <class Family, class Reader>
void stream_whole_rows(const QuantizedBlock& block, const Reader& reader) {
    constexpr int kAtOnce = 8, kHalf = kAtOnce / 2;
    const StreamFetcher<Reader> fetcher(block);
    const int64_t x_block_units = int64_t(block.x_block_steps) * block.step_units;
    const int64_t units = block.steps * block.step_units;
    const char *codes = block.codes, *x = block.x;
    for (int64_t begin = 0, x_block = 0; begin < units; begin += x_block_units, ++x_block) {
        const int64_t end = min_of(begin + x_block_units, units);
        auto sum = Family::start(false, block.x_sums[x_block]), other = splat_int(0);
        for (int64_t unit = begin; unit < end; unit += kAtOnce, codes += kAtOnce * Reader::kStride, x += kAtOnce * 4) {
            fetcher.template turn<kAtOnce>(codes);
            sum = stream_units<Family, Reader, kHalf>(sum, reader, codes, unit, x);
            other = stream_units<Family, Reader, kHalf>(other, reader, codes + kHalf * Reader::kStride, unit + kHalf,
                                                        x + kHalf * 4);
        }
        const Vec parts[1] = {to_vec(sum + other)};
        add_scaled<Family, 1>(block, 0, x_block, parts);
    }
}

template <class Family, class Reader, Scaling kScaling>
void multiply_stream(const QuantizedBlock& block, const Reader& reader) {
    if constexpr (kScaling == Scaling::row)
        stream_whole_rows<Family, Reader>(block, reader);
    else if (block.group_units == 8)
        stream_groups<Family, Reader, kScaling, 8>(block, reader);
    else if (Reader::kUnits == 4 && block.group_units == 4)
        stream_groups<Family, Reader, kScaling, Reader::kUnits>(block, reader);
    else
        stream_groups<Family, Reader, kScaling, 0>(block, reader);
}

template <class Family, class Reader, Scaling kScaling, int kRows, int kTiles>
void multiply_quantized(const QuantizedBlock& block, const Reader& reader) {
    if constexpr (kRows == 1 && kTiles == 1 && Family::kIsScaled)
        multiply_stream<Family, Reader, kScaling>(block, reader);
    else if constexpr (kScaling == Scaling::row)
        multiply_whole_rows<Family, Reader, kRows, kTiles>(block, reader);
    else if (block.scales)
        multiply_groups<Family, Reader, kScaling, kRows, kTiles>(block, reader, ExpandedScales<kTiles>(block));
    else
        multiply_groups<Family, Reader, kScaling, kRows, kTiles>(block, reader, StoredScales<kTiles>(block));
}

// kMostRows: that are asked for. kTilesAtOnce: with one tile there are registers for more rows.
template <class FamilyType, class ReaderType, Scaling kScalingOf, int kMostRows = 8, int kTilesAtOnce = kQuantizedTiles>
class QuantizedKernel {
public:
    using Family = FamilyType;
    using Reader = ReaderType;
    static constexpr Scaling kScaling = kScalingOf;
    // Groups of floats are long enough for their sums to be spilled between them.
    static constexpr bool kIsBytes = __is_same(typename Family::Acc, Ints);
    static constexpr int kRowsOfRegisters = kScaling == Scaling::row || !kIsBytes ? kRowsOfWhole
                                            : kTilesAtOnce < kQuantizedTiles      ? kRowsOfOneTile
                                                                                  : kRowsOfGroups;
    static constexpr int kRows = kMostRows < kRowsOfRegisters ? kMostRows : kRowsOfRegisters;
    static constexpr int kTiles = kTilesAtOnce;
    static constexpr bool kExpandsAll = false, kSignedCodes = false, kIsVectors = true;
    // One row of bytes reads one stream. Sums of floats are chains that wait for the multiplier, and so need several
    // tiles, each a stream (measured: two steps of two tiles at once read a sixth less).
    static constexpr int kTilesOfOneRow = kIsBytes ? 1 : Reader::kFused ? 4 : kQuantizedTiles;
    explicit QuantizedKernel(const WeightLayout& layout) : reader_(layout) {}

    // tiles: 1 or kTiles; of one row also kTilesOfOneRow.
    void multiply(const QuantizedBlock& block, int rows, int tiles) const {
        if constexpr (kTilesOfOneRow > kQuantizedTiles)
            if (tiles == kTilesOfOneRow)
                return multiply_quantized<Family, Reader, kScaling, 1, kTilesOfOneRow>(block, reader_);
        (tiles == 1 ? kInstances.single : kInstances.all)[rows - 1](block, reader_);
    }

private:
    struct Instances {
        void (*single[kRows])(const QuantizedBlock&, const Reader&);
        void (*all[kRows])(const QuantizedBlock&, const Reader&);
    };

    static constexpr Instances make() {
        Instances instances{};
        for_each_place<kRows>([&]<int kPlace>() {
            instances.single[kPlace] = multiply_quantized<Family, Reader, kScaling, kPlace + 1, 1>;
            instances.all[kPlace] = multiply_quantized<Family, Reader, kScaling, kPlace + 1, kTiles>;
        });
        return instances;
    }
    static const Instances kInstances;

    Reader reader_;
};

template <class Family, class Reader, Scaling kScaling, int kMostRows, int kTiles>
constexpr typename QuantizedKernel<Family, Reader, kScaling, kMostRows, kTiles>::Instances
    QuantizedKernel<Family, Reader, kScaling, kMostRows, kTiles>::kInstances = make();

}  // namespace penstock::PENSTOCK_ISA
