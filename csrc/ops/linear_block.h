// What a block kernel of the linear layers is given, and the one made of vectors: a few rows of x by a few tiles of 16
// outputs, all accumulators in registers, strictly in the order of k.
#pragma once

#include "ops/linear.h"
#include "simd.h"

namespace penstock::PENSTOCK_ISA {

constexpr int kTileColumns = 16;
constexpr int64_t kTileRowBytes = 64;  // one unit of each of a tile's columns

// Where a block kernel prefetches into L2 while it computes: `lines` (0 to 2) at each unit of k, `distance` bytes apart,
// `step` bytes further with each unit.
struct Prefetch {
    const char* at;
    int64_t step;
    int64_t distance;
    int lines;
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

template <class Elem, int kRows, int kTiles, int kLines>
void multiply_block(const Block& block) {
    const uint32_t* x = block.x;
    const char* weight = block.weight;
    const char* prefetch = block.prefetch.at;
    const int64_t x_stride = block.x_stride, tile_stride = block.tile_stride;
    const int64_t step = block.prefetch.step, distance = block.prefetch.distance;
    Vec sums[kRows][kTiles];
    for (int r = 0; r < kRows; ++r)
        for (int t = 0; t < kTiles; ++t)
            sums[r][t] = block.first ? zero() : load(block.sums + (r * kTiles + t) * kTileColumns);
    for (int64_t u = 0; u < block.units; ++u) {
        Units w[kTiles];
        for (int t = 0; t < kTiles; ++t)
            w[t] = load_units(reinterpret_cast<const uint32_t*>(weight + t * tile_stride + u * kTileRowBytes));
        if constexpr (kLines >= 1) __builtin_prefetch(prefetch, 0, 2);
        if constexpr (kLines >= 2) __builtin_prefetch(prefetch + distance, 0, 2);
        prefetch += step;
        for (int r = 0; r < kRows; ++r) {
            const Units splat = splat_unit(x + r * x_stride + u);
            for (int t = 0; t < kTiles; ++t) sums[r][t] = dot(Elem{}, sums[r][t], splat, w[t]);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int t = 0; t < kTiles; ++t) store(block.sums + (r * kTiles + t) * kTileColumns, sums[r][t]);
}

// Rows of x by tiles at once.
struct KernelShape {
    int rows, tiles;
};
#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_BF16
// What was measured on Zen 4 (32 registers, one 512-bit dot per cycle): 6x4, 8x3, 14x2 and 16x1 all reach the peak out
// of L2. 6x4 needs the least of x per output, so x is read where it lies, row-major: packing it gained nothing.
constexpr KernelShape kUsualShape = {6, 4};
// On Zen 5, where products are twice as fast, what counts is how often weights are read: 8 rows once, 16 twice. 8x3 beside
// 6x4, from memory: 7 and 8 rows 1.05 times as fast, 16 rows 1.15 to 1.2, 24 to 40 1.03, others as fast.
constexpr KernelShape kTallShape = {8, 3};
#elif PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX512
constexpr KernelShape kUsualShape = {6, 3};  // both halves of each tile's pairs are held in registers
#elif PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX2
constexpr KernelShape kUsualShape = {6, 1};
#else
constexpr KernelShape kUsualShape = {2, 1};
#endif

template <class ElemType, KernelShape kShape = kUsualShape>
class VectorKernel {
public:
    using Elem = ElemType;
    static constexpr int kRows = kShape.rows, kTiles = kShape.tiles;

    void multiply(const Block& block, int rows, int tiles) const {
        kInstances.at[rows - 1][tiles - 1][block.prefetch.lines](block);
    }

private:
    struct Instances {
        void (*at[kRows][kTiles][3])(const Block&);
    };

    template <int kR, int kT>
    static constexpr void fill(Instances& instances) {
        instances.at[kR - 1][kT - 1][0] = multiply_block<Elem, kR, kT, 0>;
        instances.at[kR - 1][kT - 1][1] = multiply_block<Elem, kR, kT, 1>;
        instances.at[kR - 1][kT - 1][2] = multiply_block<Elem, kR, kT, 2>;
        if constexpr (kT > 1)
            fill<kR, kT - 1>(instances);
        else if constexpr (kR > 1)
            fill<kR - 1, kTiles>(instances);
    }

    static constexpr Instances make() {
        Instances instances{};
        fill<kRows, kTiles>(instances);
        return instances;
    }

    static const Instances kInstances;
};

template <class ElemType, KernelShape kShape>
constexpr typename VectorKernel<ElemType, kShape>::Instances VectorKernel<ElemType, kShape>::kInstances = make();

}  // namespace penstock::PENSTOCK_ISA
