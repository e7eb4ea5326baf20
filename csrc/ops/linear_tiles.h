// The block kernel made of matrix tiles (AMX): up to 32 rows of x by up to 4 tiles of 16 outputs, bf16.
//
// x is loaded as it lies, a tile of the weight is 16 units of a packed tile.
// All sizes of a batch go through tiles, one row too: the multipliers of AMX and AVX-512 round differently, and a row's
// result must not depend on its batch.
#pragma once

#include "ops/linear_block.h"
#include "ops/tile_registers.h"

namespace penstock::PENSTOCK_ISA {

template <class Tiles>
class TileKernel {
public:
    using Elem = Bf16;
    static constexpr int kRows = 2 * kTileRows, kTiles = 4;

    void multiply(const Block& block, int rows, int tiles) {
        shape_whole_tiles(tiles_, rows);
        const int64_t sums_stride = int64_t(tiles) * kTileColumns;
        if (rows <= kTileRows) {
            switch (tiles) {
                case 1: return multiply_part<1, 1>(block, rows, 0, sums_stride);
                case 2: return multiply_part<1, 2>(block, rows, 0, sums_stride);
                case 3: return multiply_part<1, 3>(block, rows, 0, sums_stride);
                default: return multiply_part<1, 4>(block, rows, 0, sums_stride);
            }
        }
        for (int tile = 0; tile + 2 <= tiles; tile += 2) multiply_part<2, 2>(block, rows, tile, sums_stride);
        if (tiles % 2) multiply_part<2, 1>(block, rows, tiles - 1, sums_stride);
    }

private:
    // kRowTiles x kColumnTiles accumulators over all units of the block.
    template <int kRowTiles, int kColumnTiles>
    void multiply_part(const Block& block, int rows, int first_tile, int64_t sums_stride) {
        const char* weight = block.weight + first_tile * block.tile_stride;
        float* sums = block.sums + first_tile * kTileColumns;
        const int64_t stride_bytes = sums_stride * int64_t(sizeof(float));
        for_each_sum<kRowTiles, kColumnTiles>([&]<int kRow, int kColumn>() {
            constexpr int kSums = accumulator<kRowTiles>(kRow, kColumn);
            if (block.first)
                tiles_.template zero<kSums>();
            else
                tiles_.template load<kSums>(sums + kRow * kTileRows * sums_stride + kColumn * kTileColumns, stride_bytes);
        });
        const int64_t whole = block.units / kTileRows * kTileRows;
        for (int64_t u = 0; u < whole; u += kTileRows) {
            prefetch(block.prefetch, u);
            multiply_whole_tiles<Bf16, kRowTiles, kColumnTiles>(tiles_, block.x + u, block.x_stride * 4,
                                                                weight + u * kTileRowBytes, block.tile_stride);
        }
        if (whole < block.units) last_step<kRowTiles, kColumnTiles>(block, rows, weight, whole);
        for_each_sum<kRowTiles, kColumnTiles>([&]<int kRow, int kColumn>() {
            tiles_.template store<accumulator<kRowTiles>(kRow, kColumn)>(
                sums + kRow * kTileRows * sums_stride + kColumn * kTileColumns, stride_bytes);
        });
    }

    // The units that are left, out of copies padded with zeros.
    template <int kRowTiles, int kColumnTiles>
    void last_step(const Block& block, int rows, const char* weight, int64_t begin) {
        alignas(64) uint32_t x[kRowTiles * kTileRows][kTileRows] = {};
        alignas(64) char padded[kColumnTiles][kTileRows * kTileRowBytes] = {};
        const auto units = size_t(block.units - begin);
        for (int r = 0; r < rows; ++r) memcpy(x[r], block.x + r * block.x_stride + begin, units * sizeof(uint32_t));
        for (int c = 0; c < kColumnTiles; ++c)
            memcpy(padded[c], weight + c * block.tile_stride + begin * kTileRowBytes, units * size_t(kTileRowBytes));
        multiply_whole_tiles<Bf16, kRowTiles, kColumnTiles>(tiles_, x[0], kTileRowBytes, padded[0],
                                                            kTileRows * kTileRowBytes);
    }

    static void prefetch(const Prefetch& prefetch, int64_t unit) {
        const char* at = prefetch.at + unit * prefetch.step;
        for (int i = 0; i < prefetch.lines; ++i)
            for (int64_t u = 0; u < kTileRows; ++u)
                __builtin_prefetch(at + i * prefetch.distance + u * prefetch.step, 0, 2);
        asm volatile("");  // GCC 12 drops calls of what does nothing but fetch
    }

    ShapedTiles<Tiles> tiles_;
};

}  // namespace penstock::PENSTOCK_ISA
