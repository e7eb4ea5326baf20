// The quantised linear layer around a block kernel. As in linear_driver.h, threads draw panels of a few tiles, and the
// rows of x pass over one block of a panel's k after another, while the next block is fetched. Where more than one strip
// of rows passes, a block's scales are made f32 once. Codes that the kernel does not take as they are become bytes (or
// floats) in a buffer that stays in cache: for one strip of rows 256 inputs at a time, in the first level, else more, in
// the second.
#pragma once

#include "division.h"
#include "ops/activation.h"
#include "ops/products.h"
#include "ops/quantized_activations.h"
#include "ops/quantized_block.h"
#include "ops/silu.h"
#include "tuning.h"

namespace penstock::PENSTOCK_ISA {

extern const ActivationKernels activation_kernels;

// Inputs that the rows of x pass over before the next ones. A kernel's start costs a few products in a hundred; but what
// several strips share, be it expanded, should stay near the first level of cache (measured on Zen 5, 1024 -> 2048: 1.02
// to 1.04 of the rate, expanded codes 0.97 to 1.0; Zen 4 and AMX: not measured).
constexpr int64_t kQuantizedBlockInputs = 1024, kLongBlockInputs = 2048;
constexpr int64_t kQuantizedMaxRows = 512;
constexpr int64_t kQuantizedMinWork = 300'000;  // multiply-adds worth waking one more thread for
constexpr int64_t kRowsConvertedAlone = 8;      // up to so many rows of x each thread converts for itself

template <class Kernel>
class QuantizedJob {
    using Family = typename Kernel::Family;
    static constexpr bool kIsBytes = Kernel::kIsBytes;
    static constexpr bool kIsWhole = Kernel::kScaling == Scaling::row;  // nothing is prepared for a block
    static constexpr int kTilesOfGated = 2;  // a gate's and what it gates

public:
    // Whether gated results are written at once, of panels of a gate's tile and what it gates. Rows that had better read one
    // stream do not: these are two.
    static bool writes_gated(const QuantizedLinearArgs& args) {
        return Kernel::kTiles == kTilesOfGated && args.m > rows_of_one_stream(args.layout) && args.n % (2 * kLanes) == 0;
    }

    QuantizedJob(const QuantizedLinearArgs& args, int threads)
        : args_(args),
          layout_(args.layout),
          groups_per_step_(layout_.group_size ? layout_.step / layout_.group_size : 0),
          steps_(ceil_div(args.k, layout_.step)),
          tiles_(ceil_div(args.n, kLanes)),
          threads_(threads),
          panel_tiles_(args.is_gated ? kTilesOfGated : tiles_of_panel(args, tiles_, threads)),
          panels_(ceil_div(tiles_, panel_tiles_)),
          tiles_apart_(args.is_gated ? panels_ : 1),
          out_columns_(args.is_gated ? args.n / 2 : args.n),
          row_blocks_(int(ceil_div(args.m, kQuantizedMaxRows))),
          expands_(expands(layout_)),
          has_whole_minimums_(has_whole_minimums(layout_)),
          block_steps_(block_inputs(args.m) / layout_.step),
          k_blocks_(ceil_div(steps_, block_steps_)),
          unit_inputs_(kIsBytes ? 4 : args.dtype == DType::bf16 ? 2 : 1),
          step_units_(layout_.step / unit_inputs_),
          x_block_steps_(kXBlock / layout_.step),
          expanded_step_bytes_(int64_t(step_units_) * kVectorBytes) {}

    void run(const Activations& x) {
        static thread_local Scratch<float> sums_scratch, scales_scratch;
        static thread_local Scratch<char> codes_scratch;
        const int64_t block_groups = block_steps_ * groups_per_step_;
        float* scales = scales_scratch.at_least(2 * panel_tiles_ * block_groups * kLanes + kLanes);
        float* sums = sums_scratch.at_least(min_of(kQuantizedMaxRows, args_.m) * panel_tiles_ * kLanes);
        char* codes = expands_ ? codes_scratch.at_least(panel_tiles_ * block_steps_ * expanded_step_bytes_) : nullptr;
        Kernel kernel(layout_);
        for (Range items = draw(); items.begin < items.end;) {
            const Range rest = {items.begin + 1, items.end};
            const Range next = rest.begin < rest.end ? rest : draw();
            const int64_t item = items.begin;
            for (int64_t b = 0; b < k_blocks_; ++b) {
                const char* ahead = b + 1 < k_blocks_       ? address(item % panels_, b + 1)
                                    : next.begin < next.end ? address(next.begin % panels_, 0)
                                                            : nullptr;
                multiply(kernel, {x, split(args_.m, row_blocks_, int(item / panels_)), item % panels_, b, ahead}, scales,
                         codes, sums);
            }
            items = next;
        }
    }

private:
    // Whether the kernel does not take a weight's codes as they are.
    static bool expands(const WeightLayout& layout) {
        return Kernel::kExpandsAll ||
               (!Kernel::Reader::kFused && (layout.bits != 8 || layout.table != nullptr || !kIsBytes));
    }

    // Rows of bytes that wait for the memory read one stream: where products are twice as fast (tuning.h), a whole strip of
    // them. Measured on Zen 5 beside two tiles, from memory: 3 to 8 rows of whole rows' scales 1.01 to 1.05 times as fast,
    // 3 to 6 rows of Q8_0 1.03 to 1.1, of Q4_0 1.02 to 1.13, of Q4_K 1.03 to 1.1, of Q6_K 0.99 to 1.03.
    static int64_t rows_of_one_stream(const WeightLayout& layout) {
        return reads_strips(layout) ? Kernel::kRows : kRowsOfOneStream;
    }
    static bool reads_strips(const WeightLayout& layout) {
        return Kernel::kIsVectors && kIsBytes && !tuning().halves_vectors && !expands(layout);
    }
    static int tiles_of_panel(const QuantizedLinearArgs& args, int64_t tiles, int threads) {
        const int most = args.m == 1                                             ? Kernel::kTilesOfOneRow
                         : kIsBytes && args.m <= rows_of_one_stream(args.layout) ? 1
                                                                                 : Kernel::kTiles;
        return tiles < 2 * most * threads ? 1 : most;
    }

    // Whether a single strip of rows shares scales made f32, as several do, unless these hold minimums, too (measured on
    // Zen 4: Q4_K with 4 rows takes half the time). Others had better be read in passing: those of a whole block, before
    // it, wait for what is fetched last (Zen 5, of the rate of a plain sum: 8 rows of Q8_0 0.85, as it is 0.9).
    static bool shares_scales(int64_t rows) {
        constexpr int64_t kWaiting = has_minimum(Kernel::kScaling) ? kRowsOfOneStream : kRowsOfOneTile;
        return Kernel::kExpandsAll || (kIsBytes && !kIsWhole && rows > kWaiting);
    }

    int64_t block_inputs(int64_t rows) const {
        if (rows <= Kernel::kRows) return expands_ ? kXBlock : kLongBlockInputs;
        const bool is_long = PENSTOCK_ISA_LEVEL < PENSTOCK_LEVEL_AMX && !expands_ && !tuning().halves_vectors;
        return is_long ? kLongBlockInputs : kQuantizedBlockInputs;
    }

    // A part of a panel's k, while all rows of a row block pass over it.
    struct PanelBlock {
        const Activations& x;
        Range rows;
        int64_t panel, index;
        const char* ahead;  // the block after it, or null
    };
    // Which strips of rows fetch what is ahead: those from `begin` on, `bytes` of each tile each.
    struct AheadPlan {
        Ahead first;
        int64_t bytes;
        int begin;
        Ahead of(int strip) const {
            if (strip < begin) return {};
            Ahead part = first;
            part.at += (strip - begin) * bytes;
            return part;
        }
    };

    // The panels that the calling thread does next: at first many, whose memory is one stream, at last one, so that all
    // threads end together.
    Range draw() {
        const int64_t items = panels_ * row_blocks_;
        int64_t begin = __atomic_load_n(&next_item_, __ATOMIC_RELAXED), end;
        do {
            const int64_t fair = (items - begin) / (2 * threads_);
            end = min_of(items, begin + (fair > 1 ? fair : 1));
        } while (!__atomic_compare_exchange_n(&next_item_, &begin, end, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
        return {begin, end};
    }
    // From a tile of a panel to the next.
    int64_t tile_stride() const { return tiles_apart_ * steps_ * layout_.step_bytes; }
    int64_t first_tile(int64_t panel) const { return tiles_apart_ > 1 ? panel : panel * panel_tiles_; }
    int64_t first_column(int64_t panel, int tile) const { return (first_tile(panel) + tile * tiles_apart_) * kLanes; }
    const char* tile(int64_t index) const {
        return static_cast<const char*>(args_.weight) + index * steps_ * layout_.step_bytes;
    }
    const char* address(int64_t panel, int64_t block) const {
        return tile(first_tile(panel)) + block * block_steps_ * layout_.step_bytes;
    }

    void multiply(Kernel& kernel, const PanelBlock& block, float* scales, char* codes, float* sums) const {
        const int64_t first_step = block.index * block_steps_, steps = min_of(block_steps_, steps_ - first_step);
        const int tiles = int(min_of(panel_tiles_, tiles_ - block.panel * panel_tiles_));
        const char* packed = address(block.panel, block.index);
        const int64_t rows = block.rows.end - block.rows.begin;
        const int strips = int(ceil_div(rows, Kernel::kRows));
        if (strips == 1 && !shares_scales(rows)) scales = nullptr;
        expand(packed, steps, tiles, scales, codes);
        QuantizedBlock work = locate(block.x, block.rows.begin, first_step);
        work.codes = expands_ ? codes : packed + layout_.header_bytes;
        work.step_stride = expands_ ? expanded_step_bytes_ : layout_.step_bytes;
        work.tile_stride = expands_ ? steps * expanded_step_bytes_ : tile_stride();
        work.scales = scales;
        work.scales_stride = steps * groups_per_step_ * kLanes;
        work.minimums = scales ? scales + tiles * work.scales_stride : nullptr;
        work.headers = packed;
        work.header_tile_stride = tile_stride();
        work.steps = steps;
        work.sums = sums;
        const AheadPlan ahead = plan_ahead(block, strips, steps);
        const int64_t short_strip = rows / strips, longer_strips = rows % strips;
        int64_t row = block.rows.begin;
        for (int s = 0; s < strips; ++s) {
            const int height = int(short_strip + (s < longer_strips));
            work.ahead = ahead.of(s);
            if (block.index == 0) memset(work.sums, 0, size_t(height) * size_t(tiles) * kLanes * sizeof(float));
            if (block.index + 1 == k_blocks_) fetch_output(row, height, block.panel);
            if (tiles == panel_tiles_)
                kernel.multiply(work, height, tiles);
            else
                multiply_single_tiles(kernel, work, height, tiles);
            if (block.index + 1 == k_blocks_) write_any(row, height, block.panel, tiles, work.sums);
            row += height;
            work.skip_rows(height);
            work.sums += height * panel_tiles_ * kLanes;
        }
    }

    // Of a panel that is not full, each tile for itself; its sums follow one another then, too.
    void multiply_single_tiles(Kernel& kernel, QuantizedBlock part, int height, int tiles) const {
        for (int t = 0; t < tiles; ++t) {
            kernel.multiply(part, height, 1);
            part.sums += height * kLanes;
            part.codes += part.tile_stride;
            if (part.scales) {
                part.scales += part.scales_stride;
                part.minimums += part.scales_stride;
            }
            part.headers += part.header_tile_stride;
            part.ahead.at += tile_stride();
            part.ahead.end += tile_stride();
        }
    }

    // The scales of a block (unless null), and where the kernel needs them, its codes.
    void expand(const char* packed, int64_t steps, int tiles, float* scales, char* codes) const {
        const int64_t values = steps * groups_per_step_ * kLanes;
        for (int t = 0; t < tiles; ++t, packed += tile_stride()) {
            const auto expand_any = has_whole_minimums_ ? expand_whole_minimums : expand_headers;
            if (scales && values) expand_any(layout_, packed, steps, scales + t * values, scales + (tiles + t) * values);
            for (int64_t step = 0; expands_ && step < steps; ++step) {
                const char* from = packed + step * layout_.step_bytes + layout_.header_bytes;
                char* to = codes + (t * steps + step) * expanded_step_bytes_;
                if constexpr (kIsBytes)
                    expand_step<Kernel::kSignedCodes>(layout_, from, to);
                else
                    expand_floats<typename Family::Elem>(layout_, from, to);
            }
        }
    }

    // Where x is, from a step on, for the rows from `row` on. Without groups, 256 inputs are one.
    QuantizedBlock locate(const Activations& x, int64_t row, int64_t step) const {
        const int64_t chunk = x.chunk_rows ? step * layout_.step / kXChunkInputs : 0;
        const int64_t input = step * layout_.step - chunk * kXChunkInputs;
        row += chunk * x.chunk_rows;
        QuantizedBlock work{};
        work.x = x.x + row * x.x_stride + input / unit_inputs_ * int64_t(sizeof(uint32_t));
        work.x_stride = x.x_stride;
        work.x_scales = x.scales ? x.scales + row * x.scale_stride + input / kXBlock : nullptr;
        work.x_scale_stride = x.scale_stride;
        const int group = layout_.group_size ? layout_.group_size : kXBlock;
        work.x_sums = x.sums ? x.sums + row * x.sum_stride + input / group / (has_whole_minimums_ ? 2 : 1) : nullptr;
        work.x_sum_stride = x.sum_stride;
        work.layout = &layout_;
        work.x_block_steps = x_block_steps_;
        work.step_units = step_units_;
        work.group_units = layout_.group_size / unit_inputs_;
        work.minimum_pairs = has_whole_minimums_ ? groups_per_step_ / 2 : 0;
        return work;
    }

    // The last strips fetch the next block, a line or more of each tile with every four units of theirs: earlier, the
    // rows of x would push it out again. A single strip, which waits for the memory anyhow, does it all the time. On
    // Zen 4, where its tiles are long streams, it takes each fourth line: the hardware sees where that goes, and fetches
    // the others without keeping the thread's own loads waiting (1.15 to 1.3 times as fast as all lines; not where little
    // is read between two headers, in 2 and 5 bits: 0.5 and 0.8). On Zen 5 all lines are 1.05 to 1.4 times as fast, FP8's
    // with 4 rows 2.4 times; evenly, which Zen 4 has not been asked; and a few rows of bytes, where these come as fast as
    // they are read, had better fetch what is near, which more rows would push out again.
    AheadPlan plan_ahead(const PanelBlock& block, int strips, int64_t steps) const {
        if (fetches_near()) return {{.is_near = true}, 0, 0};
        if (block.ahead == nullptr) return {{}, 0, strips};
        const bool is_stream = panel_tiles_ == 1 || panel_tiles_ > kQuantizedTiles;
        const bool is_helped = tuning().halves_vectors && strips == 1 && !shares_scales(args_.m) &&
                               (is_stream || layout_.bits == 8) && !Kernel::Reader::kFetchesEachLine;
        const int64_t distance = is_helped ? 4 * kVectorBytes : kVectorBytes;
        const int64_t bytes = steps * layout_.step_bytes, turns = steps * step_units_ / 4;  // of a strip: four units each
        const int64_t fetching = min_of(strips, ceil_div(bytes, turns * distance));
        const int64_t even = ceil_div(bytes, turns * fetching);
        const int64_t pace = tuning().halves_vectors ? round_up(even, distance) : even;
        return {{block.ahead, block.ahead + bytes, tile_stride(), distance, pace, false}, turns * pace,
                int(strips - fetching)};
    }
    // Not floats: W4A16 on Zen 5, of the rate of a plain sum, near 0.67 (one row) and 0.44 (two), as it is 0.77 and 0.56.
    bool fetches_near() const {
        const int64_t most = Kernel::Reader::kFused ? kRowsOfOneStream : kRowsFetchedNear;
        return reads_strips(layout_) && args_.m <= most && !shares_scales(args_.m);
    }

    // Fetches where a strip's results will be written: each row is another line, which the core has to own first. And what
    // they are scaled with, a line for each tile, which lies behind all tiles.
    void fetch_output(int64_t row, int height, int64_t panel) const {
        const int64_t size = size_of(args_.out_dtype);
        const char* to = static_cast<const char*>(args_.out) + (row * out_columns_ + first_column(panel, 0)) * size;
        for (int r = 0; r < height; ++r, to += out_columns_ * size) __builtin_prefetch(to, 1, 3);
        for (int t = 0; kIsWhole && t < panel_tiles_; ++t) __builtin_prefetch(row_scales() + first_column(panel, t), 0, 3);
        asm volatile("");  // GCC 12 drops calls of what does nothing but fetch
    }

    void write_any(int64_t row, int height, int64_t panel, int tiles, const float* sums) const {
        auto* floats = static_cast<float*>(args_.out);
        auto* halves = static_cast<bf16_t*>(args_.out);
        if (args_.is_gated)
            args_.dtype == DType::f32 ? write_gated<F32>(floats, row, height, panel, sums)
                                      : write_gated<Bf16>(halves, row, height, panel, sums);
        else
            args_.out_dtype == DType::f32 ? write(floats, row, height, panel, tiles, sums)
                                          : write(halves, row, height, panel, tiles, sums);
    }

    template <class Out>
    void write(Out* out, int64_t row, int height, int64_t panel, int tiles, const float* sums) const {
        const bool is_whole = tiles == panel_tiles_;
        for (int t = 0; t < tiles; ++t) {
            const int64_t column = first_column(panel, t);
            const int columns = int(min_of(kLanes, args_.n - column));
            const Vec bias = load_bias(column, columns), scale = load_scale(column);
            for (int r = 0; r < height; ++r) {
                const float* sum = sums + (is_whole ? r * tiles + t : t * height + r) * kLanes;
                const Vec value = load(sum) * scale + bias;
                Out* to = out + (row + r) * args_.n + column;
                columns == kLanes ? store(to, value) : store_n(to, value, columns);
            }
        }
    }

    // As write, and silu_and_mul after it.
    template <class Elem>
    void write_gated(typename Elem::Storage* out, int64_t row, int height, int64_t panel, const float* sums) const {
        const int64_t gate = first_column(panel, 0), up = first_column(panel, 1);
        const Vec biases[] = {load_bias(gate, kLanes), load_bias(up, kLanes)};
        const Vec scales[] = {load_scale(gate), load_scale(up)};
        for (int r = 0; r < height; ++r) {
            Vec values[kTilesOfGated];
            for (int t = 0; t < kTilesOfGated; ++t, sums += kLanes)
                values[t] = round_to(Elem{}, load(sums) * scales[t] + biases[t]);
            store(out + (row + r) * out_columns_ + gate, silu_times<Elem>(values[0], values[1]));
        }
    }

    Vec load_scale(int64_t column) const { return kIsWhole ? load(row_scales() + column) : splat(1.0f); }
    const float* row_scales() const { return reinterpret_cast<const float*>(tile(tiles_)); }

    Vec load_bias(int64_t column, int columns) const {
        if (!args_.bias) return zero();
        if (args_.dtype == DType::f32) return load_n(static_cast<const float*>(args_.bias) + column, columns);
        return load_n(static_cast<const bf16_t*>(args_.bias) + column, columns);
    }

    const QuantizedLinearArgs& args_;
    const WeightLayout& layout_;
    const int groups_per_step_;
    const int64_t steps_, tiles_;
    const int threads_, panel_tiles_;
    const int64_t panels_, tiles_apart_, out_columns_;
    const int row_blocks_;
    const bool expands_, has_whole_minimums_;
    const int64_t block_steps_, k_blocks_;
    const int unit_inputs_, step_units_;
    const int x_block_steps_;
    const int64_t expanded_step_bytes_;
    int64_t next_item_ = 0;
};

// A gated linear in two passes.
template <class Linear>
void run_and_gate(const QuantizedLinearArgs& args, const Linear& linear) {
    static thread_local Scratch<char> gate_up;
    QuantizedLinearArgs plain = args;
    plain.is_gated = false;
    plain.out = gate_up.at_least(args.m * args.n * size_of(args.dtype));
    linear(plain);
    activation_kernels.silu_and_mul({plain.out, args.out, args.m, args.n / 2, args.dtype, args.num_threads});
}

template <class Kernel, class Rows>
void run_quantized(const QuantizedLinearArgs& args) {
    if (args.is_gated && !QuantizedJob<Kernel>::writes_gated(args)) return run_and_gate(args, run_quantized<Kernel, Rows>);
    const int threads = threads_for(output_rows(args) * args.n * args.k, kQuantizedMinWork, args.num_threads);
    const int64_t padded_k = round_up(args.k, args.layout.step);
    Products<QuantizedJob<Kernel>, QuantizedLinearArgs> products(args, threads);
    const auto run = [&](const Rows& rows) { products.run([&](int64_t row) { return rows.result().from(row); }); };
    // What one thread writes, another would wait for: first to be allowed to go on, and then for each line.
    const auto run_alone = [&] {
        const Rows rows(args, padded_k);
        for (int64_t row = 0; row < args.m; ++row) rows.convert(row);
        run(rows);
    };
    if (threads == 1) return run_alone();
    if (args.m <= kRowsConvertedAlone) {
#pragma omp parallel num_threads(threads)
        run_alone();
        return;
    }
    const Rows rows(args, padded_k);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < args.m; ++row) rows.convert(row);
        run(rows);
    }
}

}  // namespace penstock::PENSTOCK_ISA
