// The linear layer: columns are dealt to the threads panel by panel, a panel being kBlockTiles tiles of 16 outputs.
// Within a panel k is cut into blocks that stay in L2 (kBlockBytes) while all rows of x pass over them, and while a
// block is multiplied, the next one is prefetched from DRAM: so few rows run at the speed of the memory and many at
// that of the multipliers.
#include "ops/linear.h"

#include "ops/linear_block.h"
#include "ops/linear_pack.h"
#include "scratch.h"
#include "threads.h"

namespace penstock::PENSTOCK_ISA {

namespace {

#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX512
constexpr int64_t kBlockBytes = 256 << 10;
#else
constexpr int64_t kBlockBytes = 128 << 10;  // older processors have 256 KB of L2
#endif
constexpr int64_t kMaxRows = 512;  // rows that pass over a block before it is fetched again: bounds the sums

// Multiply-adds worth waking one more thread for.
constexpr int64_t kMinWorkPerThread = 200'000;

int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A part of a panel's k, while all rows of a row block pass over it.
struct PanelBlock {
    Range rows;
    int64_t panel;
    Range units;
    const char* next;  // the block after it, or null
};

template <class Elem>
class Linear {
    using T = typename Elem::Storage;

public:
    Linear(const LinearArgs& args, const void* x, int threads)
        : args_(args),
          x_(static_cast<const uint32_t*>(x)),
          weight_(static_cast<const char*>(args.weight)),
          units_(ceil_div(args.k, Elem::kPerUnit)),
          tiles_(ceil_div(args.n, kTileColumns)),
          // Narrower panels where there would be too few for all threads to be busy to the end.
          panel_tiles_(int(min_of(kBlockTiles, ceil_div(tiles_, 2 * threads)))),
          panels_(ceil_div(tiles_, panel_tiles_)),
          row_blocks_(int(ceil_div(args.m, kMaxRows))),
          k_blocks_(int(ceil_div(units_ * kTileRowBytes * kBlockTiles, kBlockBytes))) {}

    // What one thread does: draw items (a panel for one row block) until none is left, always knowing the next one, so
    // that it can be prefetched.
    void run() {
        static thread_local Scratch<float> scratch;
        const int64_t rows_kept = k_blocks_ > 1 ? min_of(kMaxRows, args_.m) : kBlockRows;
        float* sums = scratch.at_least(rows_kept * kBlockTiles * kTileColumns);
        const int64_t items = panels_ * row_blocks_;
        for (int64_t item = draw_item(); item < items;) {
            const int64_t next_item = draw_item();
            const Range rows = split(args_.m, row_blocks_, int(item / panels_));
            const int64_t panel = item % panels_;
            for (int b = 0; b < k_blocks_; ++b) {
                const Range units = split(units_, k_blocks_, b);
                const char* next = b + 1 < k_blocks_   ? address(panel, units.end)
                                   : next_item < items ? address(next_item % panels_, 0)
                                                       : nullptr;
                multiply({rows, panel, units, next}, sums);
            }
            item = next_item;
        }
    }

private:
    int64_t draw_item() { return __atomic_fetch_add(&next_item_, 1, __ATOMIC_RELAXED); }

    const char* address(int64_t panel, int64_t unit) const {
        return weight_ + panel * panel_tiles_ * tile_stride() + unit * kTileRowBytes;
    }
    int64_t tile_stride() const { return units_ * kTileRowBytes; }

    void multiply(const PanelBlock& block, float* sums) const {
        const int64_t rows = block.rows.end - block.rows.begin;
        const int strips = int(ceil_div(rows, kBlockRows));
        const int tiles = int(min_of(panel_tiles_, tiles_ - block.panel * panel_tiles_));
        const bool first = block.units.begin == 0, last = block.units.end == units_;
        for (int s = 0; s < strips; ++s) {
            const Range strip = split(rows, strips, s);
            const int height = int(strip.end - strip.begin);
            const int64_t row = block.rows.begin + strip.begin;
            float* strip_sums = first && last ? sums : sums + strip.begin * tiles * kTileColumns;
            int prefetches;
            const Prefetch prefetch = plan_prefetch(block, s, strips, prefetches);
            const int64_t units = block.units.end - block.units.begin;
            kBlockKernels<Elem>.at[height - 1][tiles - 1][prefetches](
                {x_ + row * units_ + block.units.begin, units_, address(block.panel, block.units.begin), tile_stride(),
                 units, strip_sums, first, prefetch});
            if (last) finish(row, height, block.panel, tiles, strip_sums);
        }
    }

    // Divides the lines of the next block among the strips of this one.
    Prefetch plan_prefetch(const PanelBlock& block, int strip, int strips, int& prefetches) const {
        const int64_t tile_bytes = (block.units.end - block.units.begin) * kTileRowBytes;
        prefetches = 0;
        // A single strip reads each line once, in order: the hardware's own prefetching does as well.
        if (block.next == nullptr || strips == 1) return {};
        if (strips < panel_tiles_) {  // whole tiles, two at a time
            if (2 * strip >= panel_tiles_) return {};
            prefetches = 2;
            return {block.next + 2 * strip * tile_stride(), kTileRowBytes, tile_stride()};
        }
        const int tile = strip * panel_tiles_ / strips;
        const int first_strip = int(ceil_div(int64_t(tile) * strips, panel_tiles_));
        const int sharers = int(ceil_div(int64_t(tile + 1) * strips, panel_tiles_)) - first_strip;
        prefetches = 1;
        return {block.next + tile * tile_stride() + (strip - first_strip) * tile_bytes / sharers,
                ceil_div(kTileRowBytes, sharers), 0};
    }

    void finish(int64_t row, int height, int64_t panel, int tiles, const float* sums) const {
        if (args_.out_dtype == DType::f32)
            write(static_cast<float*>(args_.out), row, height, panel, tiles, sums);
        else
            write(static_cast<bf16_t*>(args_.out), row, height, panel, tiles, sums);
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
    const uint32_t* x_;
    const char* weight_;
    const int64_t units_, tiles_;
    const int panel_tiles_;
    const int64_t panels_;
    const int row_blocks_, k_blocks_;
    int64_t next_item_ = 0;
};

template <class Elem>
void linear_of(const LinearArgs& args, const void* x) {
    const int threads = threads_for(args.m * args.n * args.k, kMinWorkPerThread, args.num_threads);
    Linear<Elem> job(args, x, threads);
    if (threads == 1) return job.run();
#pragma omp parallel num_threads(threads)
    job.run();
}

// Rows of an odd number of bf16 do not consist of whole pairs: a padded copy does.
const void* pad_rows(const LinearArgs& args) {
    static thread_local Scratch<bf16_t> scratch;
    bf16_t* padded = scratch.at_least(args.m * (args.k + 1));
    for (int64_t row = 0; row < args.m; ++row) {
        memcpy(padded + row * (args.k + 1), static_cast<const bf16_t*>(args.x) + row * args.k, size_t(args.k) * 2);
        padded[row * (args.k + 1) + args.k] = 0;
    }
    return padded;
}

void linear(const LinearArgs& args) {
    if (args.m == 0) return;
    if (args.dtype == DType::f32)
        linear_of<F32>(args, args.x);
    else
        linear_of<Bf16>(args, args.k % 2 ? pad_rows(args) : args.x);
}

}  // namespace

extern const LinearKernels linear_kernels = {linear, pack, embedding};

}  // namespace penstock::PENSTOCK_ISA
