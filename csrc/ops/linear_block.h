// What a block kernel of the linear layers is given, and the one made of vectors: up to 6 rows of x by up to 4 tiles of
// 16 outputs, all accumulators in registers, strictly in the order of k.
//
// What was measured on Zen 4 (32 registers, one 512-bit dot per cycle): 6x4, 8x3, 14x2 and 16x1 all reach the peak out
// of L2. 6x4 needs the least of x per output, so x is read where it lies, row-major: packing it gained nothing.
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

template <class ElemType>
class VectorKernel {
public:
    using Elem = ElemType;
#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_BF16
    static constexpr int kRows = 6, kTiles = 4;
#elif PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX512
    static constexpr int kRows = 6, kTiles = 3;  // both halves of each tile's pairs are held in registers
#elif PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX2
    static constexpr int kRows = 6, kTiles = 1;
#else
    static constexpr int kRows = 2, kTiles = 1;
#endif

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

template <class ElemType>
constexpr typename VectorKernel<ElemType>::Instances VectorKernel<ElemType>::kInstances = VectorKernel<ElemType>::make();

}  // namespace penstock::PENSTOCK_ISA
