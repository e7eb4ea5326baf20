// The block kernel of the linear layers: up to kBlockRows rows of x by up to kBlockTiles tiles of 16 outputs, all
// accumulators in registers, strictly in the order of k.
//
// What was measured on Zen 4 (32 registers, one 512-bit dot per cycle): 6x4, 8x3, 14x2 and 16x1 all reach the peak out
// of L2. 6x4 needs the least of x per output, so x is read where it lies, row-major: packing it gained nothing.
#pragma once

#include "ops/linear.h"
#include "simd.h"

namespace penstock::PENSTOCK_ISA {

#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX512
constexpr int kBlockRows = 6, kBlockTiles = 4;
#elif PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX2
constexpr int kBlockRows = 6, kBlockTiles = 1;
#else
constexpr int kBlockRows = 2, kBlockTiles = 1;
#endif

constexpr int kTileColumns = 16;
constexpr int64_t kTileRowBytes = 64;  // one unit of each of a tile's columns

// Where a block kernel prefetches into L2 while it computes: `step` bytes further with each unit of k.
struct Prefetch {
    const char* at;
    int64_t step;
    int64_t second;  // distance of a second line, if two are fetched per step
};

struct Block {
    const uint32_t* x;  // the units of the first row
    int64_t x_stride;   // units from row to row
    const char* weight;
    int64_t tile_stride;  // bytes from tile to tile
    int64_t units;        // of k
    float* sums;          // [rows][tiles * 16], added to, or overwritten if `first`
    bool first;
    Prefetch prefetch;
};

template <class Elem, int kRows, int kTiles, int kPrefetches>
void multiply_block(const Block& block) {
    const uint32_t* x = block.x;
    const char* weight = block.weight;
    const char* prefetch = block.prefetch.at;
    const int64_t x_stride = block.x_stride, tile_stride = block.tile_stride;
    const int64_t prefetch_step = block.prefetch.step, second = block.prefetch.second;
    Vec sums[kRows][kTiles];
    for (int r = 0; r < kRows; ++r)
        for (int t = 0; t < kTiles; ++t)
            sums[r][t] = block.first ? zero() : load(block.sums + (r * kTiles + t) * kTileColumns);
    for (int64_t u = 0; u < block.units; ++u) {
        Units w[kTiles];
        for (int t = 0; t < kTiles; ++t)
            w[t] = load_units(reinterpret_cast<const uint32_t*>(weight + t * tile_stride + u * kTileRowBytes));
        if constexpr (kPrefetches >= 1) __builtin_prefetch(prefetch, 0, 2);
        if constexpr (kPrefetches >= 2) __builtin_prefetch(prefetch + second, 0, 2);
        prefetch += prefetch_step;
        for (int r = 0; r < kRows; ++r) {
            const Units splat = splat_unit(x + r * x_stride + u);
            for (int t = 0; t < kTiles; ++t) sums[r][t] = dot(Elem{}, sums[r][t], splat, w[t]);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int t = 0; t < kTiles; ++t) store(block.sums + (r * kTiles + t) * kTileColumns, sums[r][t]);
}

using BlockKernel = void (*)(const Block&);

// [rows - 1][tiles - 1][prefetches]
template <class Elem>
struct BlockKernels {
    BlockKernel at[kBlockRows][kBlockTiles][3];
};

template <class Elem, int kRows, int kTiles>
constexpr void fill_block_kernels(BlockKernels<Elem>& kernels) {
    kernels.at[kRows - 1][kTiles - 1][0] = multiply_block<Elem, kRows, kTiles, 0>;
    kernels.at[kRows - 1][kTiles - 1][1] = multiply_block<Elem, kRows, kTiles, 1>;
    kernels.at[kRows - 1][kTiles - 1][2] = multiply_block<Elem, kRows, kTiles, 2>;
    if constexpr (kTiles > 1)
        fill_block_kernels<Elem, kRows, kTiles - 1>(kernels);
    else if constexpr (kRows > 1)
        fill_block_kernels<Elem, kRows - 1, kBlockTiles>(kernels);
}

template <class Elem>
constexpr BlockKernels<Elem> make_block_kernels() {
    BlockKernels<Elem> kernels{};
    fill_block_kernels<Elem, kBlockRows, kBlockTiles>(kernels);
    return kernels;
}

template <class Elem>
constexpr BlockKernels<Elem> kBlockKernels = make_block_kernels<Elem>();

}  // namespace penstock::PENSTOCK_ISA
