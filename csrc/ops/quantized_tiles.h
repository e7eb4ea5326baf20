// The block kernels of quantised linears made of matrix tiles (AMX int8). Sums of integers are exact, and what follows
// is done in the same order as by the kernels made of vectors (quantized_block.h): results are theirs bit for bit, so
// few rows may go through vectors and many through tiles.
//
// A unit of 16 outputs is a row of a weight's tile as it lies, 4 inputs of a row of x are a unit of x's.
//
// What bounds them, in cycles of a core of Sapphire Rapids by the rates that Intel gives (not measured: no machine at hand
// has AMX). A product of 16 rows by 16 outputs takes 16, for 64 inputs or fewer; in each cycle two vectors are loaded, two
// computed with, and one stored. A product's sums pass through memory, 16 vectors of them.
//   one scale a row: 64 of products for 256 inputs, 56 of loads: 1024 multiply-adds a cycle (with vectors 128)
//   groups of 32: 20 of loads (8 of x, 4 of codes, 8 of sums), 16 of products, of stores, and of conversions and scales:
//     410 (102); with minimums 28, since sums of x are loaded, too: 290 (93); whole ones 24: 340 (95)
//   groups of 16: 18, with whole minimums 22, for half the inputs: 230 (85), 186 (78)
// The offset of codes would be one more load and addition for each vector of sums, 28 cycles for groups of 32: codes of
// groups lose it as they are made bytes.
#pragma once

#include "division.h"
#include "ops/quantized_block.h"
#include "ops/tile_registers.h"

namespace penstock::PENSTOCK_ISA {

// One scale a row: 32 rows of x by 2 tiles of 16 outputs. While 256 inputs are multiplied, the sums of those before are
// scaled and added, a few rows with each product of 64 inputs, so that both parts of the processor are busy.
template <class Tiles>
class RowTileKernel {
public:
    using Family = ByteFamily;
    using Reader = WholeReader;
    static constexpr Scaling kScaling = Scaling::row;
    static constexpr bool kIsBytes = true, kExpandsAll = false, kSignedCodes = false, kIsVectors = false;
    static constexpr int kRows = 2 * kTileRows, kTilesOfOneRow = 1, kTiles = kQuantizedTiles;
    explicit RowTileKernel(const WeightLayout&) {}

    void multiply(const QuantizedBlock& block, int rows, int tiles) {
        shape_whole_tiles(tiles_, rows);
        if (rows <= kTileRows)
            tiles == 1 ? multiply_block<1, 1>(block, rows) : multiply_block<1, 2>(block, rows);
        else
            tiles == 1 ? multiply_block<2, 1>(block, rows) : multiply_block<2, 2>(block, rows);
    }

private:
    static constexpr int kRowsAddedAtOnce = kRows / 4;  // of the 4 products of 256 inputs

    template <int kTiles>
    using Sums = int32_t[kTiles][kRows][kLanes];

    template <int kRowTiles, int kTiles>
    void multiply_block(const QuantizedBlock& block, int rows) {
        alignas(64) Sums<kTiles> sums[2];
        Fetcher<kTiles> fetcher(block.ahead);
        const int64_t units = block.steps * block.step_units;
        const int64_t x_block_units = int64_t(block.x_block_steps) * block.step_units;
        int64_t x_block = 0;
        for (int64_t begin = 0; begin < units; begin += x_block_units, ++x_block) {
            const int64_t end = min_of(begin + x_block_units, units);
            for_each_sum<kRowTiles, kTiles>([&]<int kRow, int kColumn>() {
                tiles_.template zero<accumulator<kRowTiles>(kRow, kColumn)>();
            });
            int added = 0;
            for (int64_t u = begin; u < end; u += kTileRows) {
                multiply_whole_tiles<Codes<false>, kRowTiles, kTiles>(tiles_, block.x + u * 4, block.x_stride,
                                                                       block.codes + u * kVectorBytes, block.tile_stride);
                for (int turn = 0; turn < kTileRows / 4; ++turn) fetcher.turn();
                if (x_block > 0)
                    added = add_rows<kTiles>(block, x_block - 1, sums[(x_block - 1) % 2], added,
                                             added + kRowsAddedAtOnce < rows ? added + kRowsAddedAtOnce : rows);
            }
            if (x_block > 0) add_rows<kTiles>(block, x_block - 1, sums[(x_block - 1) % 2], added, rows);
            for_each_sum<kRowTiles, kTiles>([&]<int kRow, int kColumn>() {
                tiles_.template store<accumulator<kRowTiles>(kRow, kColumn)>(
                    sums[x_block % 2][kColumn][kRow * kTileRows], kTileLineBytes);
            });
        }
        add_rows<kTiles>(block, x_block - 1, sums[(x_block - 1) % 2], 0, rows);
    }

    // Adds rows [begin, end) of 256 inputs' sums, scaled, to the block's; returns end.
    template <int kTiles>
    static int add_rows(const QuantizedBlock& block, int64_t x_block, const Sums<kTiles>& sums, int begin, int end) {
        for (int r = begin; r < end; ++r) {
            const Ints start = Family::start(false, block.x_sums[r * block.x_sum_stride + x_block]);
            Vec parts[kTiles];
            for (int t = 0; t < kTiles; ++t) parts[t] = to_vec(start + load_ints(sums[t][r]));
            add_scaled<Family, kTiles>(block, r, x_block, parts);
        }
        return end;
    }

    ShapedTiles<Tiles> tiles_;
};

// A scale for each group: 16 rows of x by 1 tile of 16 outputs, whose scaled sums stay in vector registers. While a group
// is multiplied, the sums of the one before are scaled and added; they take turns with the registers.
template <class Tiles, Scaling kScalingOf>
class GroupTileKernel {
public:
    using Family = ByteFamily;
    using Reader = WholeReader;
    static constexpr Scaling kScaling = kScalingOf;
    static constexpr bool kIsBytes = true, kExpandsAll = true, kSignedCodes = !has_minimum(kScaling), kIsVectors = false;
    static constexpr int kRows = kTileRows, kTilesOfOneRow = 1, kTiles = kQuantizedTiles;
    explicit GroupTileKernel(const WeightLayout&) {}

    void multiply(const QuantizedBlock& block, int rows, int tiles) {
        const auto depth = uint8_t(block.group_units < kTileRows ? block.group_units : kTileRows);
        const TileShape sums = {uint8_t(rows)}, x = {uint8_t(rows), uint8_t(4 * depth)}, codes = {depth};
        tiles_.shape({sums, sums, x, x, codes, codes, {}, {}});
        for (int t = 0; t < tiles; ++t) kInstances.of_rows[rows - 1](tiles_, block, t, tiles);
    }

private:
    struct Instances {
        void (*of_rows[kRows])(ShapedTiles<Tiles>&, const QuantizedBlock&, int, int);
    };

    template <int kHeight>
    static void multiply_tile(ShapedTiles<Tiles>& tiles, const QuantizedBlock& block, int tile, int num_tiles) {
        Ahead ahead = block.ahead;
        ahead.at += tile * ahead.tile_stride;
        ahead.end += tile * ahead.tile_stride;
        Fetcher<1> fetcher(ahead);
        const int64_t units = block.group_units, x_stride = block.x_stride;
        const int64_t step_groups = block.step_units / units;
        const int64_t groups = block.steps * step_groups, x_block_groups = block.x_block_steps * step_groups;
        const char *x = block.x, *codes = block.codes + tile * block.tile_stride;
        alignas(64) int32_t sums[2][kHeight][kLanes];
        const auto multiply_group = [&](int64_t group) {
            if (group % 2 == 0)
                multiply_sums<0>(tiles, x, x_stride, codes, units, sums[0][0]);
            else
                multiply_sums<1>(tiles, x, x_stride, codes, units, sums[1][0]);
            x += 4 * units;
            codes += kVectorBytes * units;
            for (int64_t u = 0; u < units; u += 4) fetcher.turn();
        };
        const float* scales = block.scales + tile * block.scales_stride;
        const float* minimums = block.minimums + tile * block.scales_stride;
        multiply_group(0);
        for (int64_t group = 0, x_block = 0; group < groups; ++x_block) {
            Vec parts[kHeight];
            for (int r = 0; r < kHeight; ++r) parts[r] = zero();
            if constexpr (kScaling == Scaling::whole_minimum)
                begin_with_minimums(block, minimums + x_block * (block.minimum_pairs + 1) * kLanes,
                                    block.x_sums + x_block * block.minimum_pairs, parts);
            const int64_t end = min_of(group + x_block_groups, groups);
            for (; group < end; ++group) {
                if (group + 1 < groups) multiply_group(group + 1);
                const int32_t* sum = sums[group % 2][0];
                const Vec scale = load(scales + group * kLanes);
                for (int r = 0; r < kHeight; ++r) parts[r] = fma(to_vec(load_ints(sum + r * kLanes)), scale, parts[r]);
                if constexpr (kScaling == Scaling::minimum) {
                    const Vec minimum = load(minimums + group * kLanes);
                    for (int r = 0; r < kHeight; ++r)
                        parts[r] = fma(splat_float(block.x_sums + r * block.x_sum_stride + group), minimum, parts[r]);
                }
            }
            for (int r = 0; r < kHeight; ++r) {
                float* to = block.sums + (r * num_tiles + tile) * kLanes;
                const Vec x_scale = splat(block.x_scales[r * block.x_scale_stride + x_block]);
                store(to, fma(parts[r], x_scale, load(to)));
            }
        }
    }

    // What minimums add to 256 inputs' scaled sums. x_sums: of the first row.
    template <int kHeight>
    static void begin_with_minimums(const QuantizedBlock& block, const float* minimums, const uint32_t* x_sums,
                                    Vec (&parts)[kHeight]) {
        Ints sums[kHeight];
        for (int r = 0; r < kHeight; ++r) sums[r] = splat_int(0);
        for (int pair = 0; pair < block.minimum_pairs; ++pair, minimums += kLanes) {
            const Units units = load_units(reinterpret_cast<const uint32_t*>(minimums));
            for (int r = 0; r < kHeight; ++r)
                sums[r] = dot_pairs_in_place(sums[r], units, x_sums + r * block.x_sum_stride + pair);
        }
        for (int r = 0; r < kHeight; ++r) parts[r] = to_vec(sums[r]) * load(minimums);
    }

    // The sums of a group, with the registers 0, 2, 4 or 1, 3, 5.
    template <int kTurn>
    static void multiply_sums(ShapedTiles<Tiles>& tiles, const char* x, int64_t x_stride, const char* codes,
                              int64_t units, int32_t* sums) {
        tiles.template zero<kTurn>();
        for (int64_t u = 0; u < units; u += kTileRows) {
            tiles.template load<2 + kTurn>(x + u * 4, x_stride);
            tiles.template load<4 + kTurn>(codes + u * kVectorBytes, kVectorBytes);
            tiles.template multiply<kTurn, 2 + kTurn, 4 + kTurn>(Codes<kSignedCodes>{});
        }
        tiles.template store<kTurn>(sums, kTileLineBytes);
    }

    static constexpr Instances make() {
        Instances instances{};
        for_each_place<kRows>([&]<int kPlace>() { instances.of_rows[kPlace] = multiply_tile<kPlace + 1>; });
        return instances;
    }
    static const Instances kInstances;

    ShapedTiles<Tiles> tiles_;
};

template <class Tiles, Scaling kScalingOf>
constexpr typename GroupTileKernel<Tiles, kScalingOf>::Instances GroupTileKernel<Tiles, kScalingOf>::kInstances = make();

}  // namespace penstock::PENSTOCK_ISA
