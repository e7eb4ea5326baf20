// Divides paged attention into tasks and runs them. The arithmetic is in attention_tile.h.
#include "ops/attention.h"

#include <atomic>

#include "division.h"
#include "ops/attention_tile.h"
#include "scratch.h"
#include "threads.h"

namespace penstock::PENSTOCK_ISA {

namespace {

// A share of a tile's segments, done by one thread.
struct Task {
    int32_t tile;
    int32_t segment_begin, segment_end;
};

// Tiles and tasks of one call, and the partial results of tiles that several tasks share.
struct Plan {
    const Tile* tiles;
    const Task* tasks;
    float* partials;
    int64_t num_tiles, num_tasks, num_shared;
    int num_threads;
};

// Cost of one segment: bringing in a slot's key and value, in units of one row's arithmetic over it.
constexpr int64_t kSlotCost = 10;
// Below this cost (times head_dim) another thread does not pay: some 10 microseconds.
constexpr int64_t kMinThreadCost = 400'000;
constexpr int64_t kTasksPerThread = 4;
// Contexts so many times as long as a full tile has tokens lose a hundredth by its height, and gain two to four where
// keys and values are kept in 8 bits.
constexpr int64_t kContextOfFullTiles = 64;

int64_t cost_of(const Tile& tile) {
    return int64_t(tile.segment_end - tile.segment_begin) * kSegmentSlots * (kSlotCost + tile.rows);
}

// Floats that the result of one segment of a tile takes: max and sum and values of each row.
int64_t partial_floats(const Tile& tile, int64_t padded_dim) { return tile.rows * (padded_dim + 2); }

int64_t new_tokens_of(const AttentionArgs& args, int64_t request) {
    return args.query_starts[request + 1] - args.query_starts[request];
}

// A tile brings its context in once for all its rows, and computes up to its last row's position for all of them: where
// the context is long, many rows cost least.
int64_t rows_of_tiles(const AttentionArgs& args, int64_t request) {
    const int64_t tokens = kTileRows * args.num_kv_heads / args.num_heads, window = args.sliding_window;
    const int64_t context = args.context_lens[request], seen = window > 0 && window < context ? window : context;
    return seen < kContextOfFullTiles * tokens ? kTileRows / 2 : kTileRows;
}

int64_t tiles_of(const AttentionArgs& args, int64_t request) {
    const int64_t rows = new_tokens_of(args, request) * (args.num_heads / args.num_kv_heads);
    return args.num_kv_heads * ceil_div(rows, rows_of_tiles(args, request));
}

Tile make_tile(const AttentionArgs& args, int64_t request, int64_t kv_head, Range rows) {
    const int64_t group = args.num_heads / args.num_kv_heads;
    const int64_t first_row = rows.begin;
    Tile tile{};
    tile.request = int32_t(request);
    tile.kv_head = int32_t(kv_head);
    tile.first_row = int32_t(first_row);
    tile.rows = int32_t(rows.end - first_row);
    const int64_t start = args.context_lens[request] - new_tokens_of(args, request);
    const int64_t first = start + first_row / group;
    const int64_t last = start + (first_row + tile.rows - 1) / group;
    const int64_t seen_from = args.sliding_window > 0 && first + 1 > args.sliding_window ? first + 1 - args.sliding_window : 0;
    tile.segment_begin = int32_t(seen_from / kSegmentSlots);
    tile.segment_end = int32_t(last / kSegmentSlots + 1);
    tile.partials = -1;
    return tile;
}

struct PlanMemory {
    Scratch<Tile> tiles;
    Scratch<Task> tasks;
    Scratch<float> partials;
};

int64_t fill_tiles(const AttentionArgs& args, Tile* tiles, int64_t* total_cost) {
    int64_t count = 0;
    for (int64_t request = 0; request < args.num_requests; ++request) {
        const int64_t rows = new_tokens_of(args, request) * (args.num_heads / args.num_kv_heads);
        const int64_t height = rows_of_tiles(args, request);
        for (int64_t kv_head = 0; kv_head < args.num_kv_heads; ++kv_head)
            for (int64_t row = 0; row < rows; row += height) {
                tiles[count] = make_tile(args, request, kv_head, {row, min_of(row + height, rows)});
                *total_cost += cost_of(tiles[count++]);
            }
    }
    return count;
}

// How many tasks a tile becomes: as many as bring each below `most`, at whole segments.
int64_t shares_of(const Tile& tile, int64_t most) {
    const int64_t segments = tile.segment_end - tile.segment_begin;
    const int64_t wanted = ceil_div(cost_of(tile), most);
    return min_of(wanted, segments);
}

Plan make_plan(const AttentionArgs& args, PlanMemory& memory, int64_t padded_dim) {
    Plan plan{};
    int64_t num_tiles = 0, total = 0;
    for (int64_t request = 0; request < args.num_requests; ++request) num_tiles += tiles_of(args, request);
    Tile* tiles = memory.tiles.at_least(num_tiles);
    plan.num_tiles = fill_tiles(args, tiles, &total);
    plan.num_threads = threads_for(total * args.head_dim, kMinThreadCost, args.num_threads);
    const int64_t fair = ceil_div(total, plan.num_threads * kTasksPerThread);
    // One thread takes each tile whole; several share those that would keep one of them busy for too long.
    const int64_t most = plan.num_threads == 1 ? total + 1 : fair + 1;

    int64_t floats = 0;
    for (int64_t i = 0; i < num_tiles; ++i) {
        const int64_t shares = shares_of(tiles[i], most);
        plan.num_tasks += shares;
        if (shares == 1) continue;
        tiles[i].partials = floats;
        floats += partial_floats(tiles[i], padded_dim) * (tiles[i].segment_end - tiles[i].segment_begin);
        ++plan.num_shared;
    }
    Task* tasks = memory.tasks.at_least(plan.num_tasks);
    int64_t count = 0;
    for (int64_t i = 0; i < num_tiles; ++i) {
        const int64_t shares = tiles[i].partials < 0 ? 1 : shares_of(tiles[i], most);
        const int64_t segments = tiles[i].segment_end - tiles[i].segment_begin;
        for (int64_t share = 0; share < shares; ++share) {
            const Range range = split(segments, int(shares), int(share));
            tasks[count++] = {int32_t(i), tiles[i].segment_begin + int32_t(range.begin),
                              tiles[i].segment_begin + int32_t(range.end)};
        }
    }
    plan.tiles = tiles;
    plan.tasks = tasks;
    plan.partials = memory.partials.at_least(floats);
    return plan;
}

float* partial_of(const Plan& plan, const Tile& tile, int segment, int64_t padded_dim) {
    return plan.partials + tile.partials + (segment - tile.segment_begin) * partial_floats(tile, padded_dim);
}

void save_partial(const RowSums& sums, float* to, int rows, int padded_dim) {
    memcpy(to, sums.max, size_t(rows) * sizeof(float));
    memcpy(to + rows, sums.sum, size_t(rows) * sizeof(float));
    for (int row = 0; row < rows; ++row)
        memcpy(to + 2 * rows + row * padded_dim, sums.values[row], size_t(padded_dim) * sizeof(float));
}

void load_partial(const float* from, RowSums& sums, int rows, int padded_dim) {
    memcpy(sums.max, from, size_t(rows) * sizeof(float));
    memcpy(sums.sum, from + rows, size_t(rows) * sizeof(float));
    for (int row = 0; row < rows; ++row)
        memcpy(sums.values[row], from + 2 * rows + row * padded_dim, size_t(padded_dim) * sizeof(float));
}

template <class Elem>
void run_task(const Plan& plan, const Task& task, TileKernel<Elem>& kernel, TileScratch& scratch) {
    const Tile& tile = plan.tiles[task.tile];
    const int padded_dim = kernel.padded_dim();
    kernel.begin(tile);
    if (tile.partials < 0) kernel.clear(scratch.merged, tile.rows, padded_dim);
    for (int segment = task.segment_begin; segment < task.segment_end; ++segment) {
        kernel.run_segment(segment);
        if (tile.partials < 0)
            kernel.merge(scratch.merged, scratch.segment, tile.rows, padded_dim);
        else
            save_partial(scratch.segment, partial_of(plan, tile, segment, padded_dim), tile.rows, padded_dim);
    }
    if (tile.partials < 0) kernel.write_output(tile, scratch.merged);
}

template <class Elem>
void merge_shared(const Plan& plan, const Tile& tile, TileKernel<Elem>& kernel, TileScratch& scratch) {
    const int padded_dim = kernel.padded_dim();
    kernel.clear(scratch.merged, tile.rows, padded_dim);
    for (int segment = tile.segment_begin; segment < tile.segment_end; ++segment) {
        load_partial(partial_of(plan, tile, segment, padded_dim), scratch.segment, tile.rows, padded_dim);
        kernel.merge(scratch.merged, scratch.segment, tile.rows, padded_dim);
    }
    kernel.write_output(tile, scratch.merged);
}

template <class Elem>
void run_plan(const AttentionArgs& args, const Plan& plan) {
    std::atomic<int64_t> next_task{0}, next_tile{0};
#pragma omp parallel num_threads(plan.num_threads)
    {
        thread_local Scratch<TileScratch> memory;
        TileScratch& scratch = *memory.at_least(1);
        TileKernel<Elem> kernel(args, scratch);
        for (int64_t i = next_task++; i < plan.num_tasks; i = next_task++)
            run_task(plan, plan.tasks[i], kernel, scratch);
        if (plan.num_shared > 0) {
#pragma omp barrier
            for (int64_t i = next_tile++; i < plan.num_tiles; i = next_tile++)
                if (plan.tiles[i].partials >= 0) merge_shared(plan, plan.tiles[i], kernel, scratch);
        }
    }
}

void paged_attention(const AttentionArgs& args) {
    thread_local PlanMemory memory;
    const int64_t padded_dim = round_up(args.head_dim, kLanes);
    const Plan plan = make_plan(args, memory, padded_dim);
    if (plan.num_tasks == 0) return;
    args.dtype == DType::bf16 ? run_plan<Bf16>(args, plan) : run_plan<F32>(args, plan);
}

}  // namespace

extern const AttentionKernels attention_kernels = {paged_attention};

}  // namespace penstock::PENSTOCK_ISA
