// The linear layer around a block kernel: columns are dealt to the threads panel by panel, a panel being kTiles tiles
// of 16 outputs. Within a panel k is cut into blocks that stay in L2 (kBlockBytes) while all rows of x pass over them,
// and while a block is multiplied, the next one is prefetched from DRAM: so few rows run at the speed of the memory and
// many at that of the multipliers. Panels are drawn, not dealt in advance: on a shared machine one thread is often held
// up, and the other then does more.
#pragma once

#include "division.h"
#include "ops/linear_block.h"
#include "ops/products.h"
#include "scratch.h"
#include "threads.h"
#include "tuning.h"

namespace penstock::PENSTOCK_ISA {

#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX512
constexpr int64_t kBlockBytes = 256 << 10;
#else
constexpr int64_t kBlockBytes = 128 << 10;  // older processors have 256 KB of L2
#endif
constexpr int64_t kMaxRows = 512;     // rows that pass over a block before it is fetched again: bounds the sums
constexpr int64_t kUnitAlignment = 16;  // blocks of k begin at multiples of it: what the tile kernel takes at a time

// Multiply-adds worth waking one more thread for.
constexpr int64_t kMinWorkPerThread = 200'000;

// A part of a panel's k, while all rows of a row block pass over it.
struct PanelBlock {
    const uint32_t* x;
    Range rows;
    int64_t panel;
    Range units;
    const char* next;  // the block after it, or null
};

template <class Kernel>
class Linear {
    using Elem = typename Kernel::Elem;
    using T = typename Elem::Storage;

public:
    Linear(const LinearArgs& args, int threads)
        : args_(args),
          weight_(static_cast<const char*>(args.weight)),
          units_(ceil_div(args.k, Elem::kPerUnit)),
          tiles_(ceil_div(args.n, kTileColumns)),
          // Narrower panels where there would be too few for all threads to be busy to the end.
          panel_tiles_(int(min_of(Kernel::kTiles, ceil_div(tiles_, 2 * threads)))),
          panels_(ceil_div(tiles_, panel_tiles_)),
          row_blocks_(int(ceil_div(args.m, kMaxRows))),
          // A block is for being read again by the next strip of rows: with a single one, k stays whole.
          k_blocks_(args.m <= Kernel::kRows ? 1 : int(ceil_div(units_ * kTileRowBytes * Kernel::kTiles, kBlockBytes))) {}

    // What one thread does: draw items (a panel for one row block) until none is left, always knowing the next one, so
    // that it can be prefetched.
    void run(const void* x) {
        static thread_local Scratch<float> scratch;
        const int64_t rows_kept = k_blocks_ > 1 ? min_of(kMaxRows, args_.m) : Kernel::kRows;
        float* sums = scratch.at_least(rows_kept * Kernel::kTiles * kTileColumns);
        Kernel kernel;
        const int64_t items = panels_ * row_blocks_;
        for (int64_t item = draw_item(); item < items;) {
            const int64_t next_item = draw_item();
            const Range rows = split(args_.m, row_blocks_, int(item / panels_));
            const int64_t panel = item % panels_;
            for (int b = 0; b < k_blocks_; ++b) {
                const Range units = block_units(b);
                const char* next = b + 1 < k_blocks_   ? address(panel, units.end)
                                   : next_item < items ? address(next_item % panels_, 0)
                                                       : nullptr;
                multiply(kernel, {static_cast<const uint32_t*>(x), rows, panel, units, next}, sums);
            }
            item = next_item;
        }
    }

private:
    int64_t draw_item() { return __atomic_fetch_add(&next_item_, 1, __ATOMIC_RELAXED); }

    Range block_units(int k_block) const {
        const Range groups = split(ceil_div(units_, kUnitAlignment), k_blocks_, k_block);
        return {groups.begin * kUnitAlignment, min_of(groups.end * kUnitAlignment, units_)};
    }

    const char* address(int64_t panel, int64_t unit) const {
        return weight_ + panel * panel_tiles_ * tile_stride() + unit * kTileRowBytes;
    }
    int64_t tile_stride() const { return units_ * kTileRowBytes; }

    void multiply(Kernel& kernel, const PanelBlock& block, float* sums) const {
        const int64_t rows = block.rows.end - block.rows.begin, units = block.units.end - block.units.begin;
        const int strips = int(ceil_div(rows, Kernel::kRows));
        const int tiles = int(min_of(panel_tiles_, tiles_ - block.panel * panel_tiles_));
        const bool first = block.units.begin == 0, last = block.units.end == units_;
        for (int s = 0; s < strips; ++s) {
            const Range strip = split(rows, strips, s);
            const int height = int(strip.end - strip.begin);
            const int64_t row = block.rows.begin + strip.begin;
            float* strip_sums = first && last ? sums : sums + strip.begin * tiles * kTileColumns;
            kernel.multiply({block.x + row * units_ + block.units.begin, units_, address(block.panel, block.units.begin),
                             tile_stride(), units, strip_sums, first, plan_prefetch(block, s, strips)},
                            height, tiles);
            if (!last) continue;
            if (args_.out_dtype == DType::f32)
                write(static_cast<float*>(args_.out), row, height, block.panel, tiles, strip_sums);
            else
                write(static_cast<bf16_t*>(args_.out), row, height, block.panel, tiles, strip_sums);
        }
    }

    // The next block is fetched tile by tile by the last strips of this one: earlier, many rows of x would push it out of
    // L2 again. Few strips fetch two tiles each. A single one, which the memory holds up anyway, on Zen 4 touches each fourth
    // line of the next panel (its tiles adjoin): that sets the hardware's own prefetching going, and all lines were slower.
    // On Zen 5 it had better leave all to the hardware (1.03 to 1.1 times as fast).
    Prefetch plan_prefetch(const PanelBlock& block, int strip, int strips) const {
        if (block.next == nullptr) return {};
        if (strips == 1) return tuning().halves_vectors ? Prefetch{block.next, kTileRowBytes * panel_tiles_, 0, 1} : Prefetch{};
        const int per_strip = strips < panel_tiles_ ? 2 : 1;
        const int first_strip = strips < panel_tiles_ ? 0 : strips - panel_tiles_;
        const int tile = (strip - first_strip) * per_strip;
        if (tile < 0 || tile >= panel_tiles_) return {};
        return {block.next + tile * tile_stride(), kTileRowBytes, tile_stride(), per_strip};
    }

    template <class Out>
    void write(Out* out, int64_t row, int height, int64_t panel, int tiles, const float* sums) const {
        for (int t = 0; t < tiles; ++t) {
            const int64_t column = (panel * panel_tiles_ + t) * kTileColumns;
            const int columns = int(min_of(kTileColumns, args_.n - column));
            const Vec bias = args_.bias ? load_n(static_cast<const T*>(args_.bias) + column, columns) : zero();
            for (int r = 0; r < height; ++r) {
                const Vec value = load(sums + (r * tiles + t) * kTileColumns) + bias;
                Out* to = out + (row + r) * args_.n + column;
                columns == kTileColumns ? store(to, value) : store_n(to, value, columns);
            }
        }
    }

    const LinearArgs& args_;
    const char* weight_;
    const int64_t units_, tiles_;
    const int panel_tiles_;
    const int64_t panels_;
    const int row_blocks_, k_blocks_;
    int64_t next_item_ = 0;
};

template <class Kernel>
void run_linear(const LinearArgs& args, const void* x) {
    const int threads = threads_for(output_rows(args) * args.n * args.k, kMinWorkPerThread, args.num_threads);
    const int64_t row_bytes = ceil_div(args.k, Kernel::Elem::kPerUnit) * int64_t(sizeof(uint32_t));
    const auto x_from = [&](int64_t row) { return static_cast<const char*>(x) + row * row_bytes; };
    Products<Linear<Kernel>, LinearArgs> products(args, threads);
    if (threads == 1) return products.run(x_from);
#pragma omp parallel num_threads(threads)
    products.run(x_from);
}

}  // namespace penstock::PENSTOCK_ISA
