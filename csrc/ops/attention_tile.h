// One tile of attention: up to 128 query rows that share a KV head, over the segments of its context.
//
// Why a row's bits never depend on how its request was cut into steps:
//   - the context is cut at multiples of 256 positions, wherever the rows are;
//   - inside a segment a score is one accumulator fed in the order of the head's dimensions, and an output lane is one
//     accumulator fed in the order of the slots; how many rows or blocks a loop handles at a time changes neither;
//   - slots that a row does not see get weight 0, which changes no bit of a sum (their values are finite: those that
//     no row of the tile sees are zeroed first, whatever they held);
//   - segments are merged in ascending order with the same arithmetic, at once or later; one that a row sees nothing
//     of is skipped.
#pragma once

#include "division.h"
#include "ops/attention.h"
#include "ops/kv_codes.h"
#include "simd.h"

namespace penstock::PENSTOCK_ISA {

constexpr int kTileRows = 128;
constexpr int kSegmentBlocks = 16;
constexpr int kSegmentSlots = kSegmentBlocks * kBlockSlots;
// One row of q, of scores, of weights: a compile-time distance, and no power of two, which would pile rows up in the
// same sets of the first-level cache.
constexpr int kRowStride = 256 + 16;
constexpr int kBlocksAtOnce = 4;
constexpr int kBlocksAhead = 4;
constexpr int kRowsAtOnce = kAccumulators >= 16 ? 8 : 4;

static_assert(kMaxHeadDim <= 256 && kSegmentSlots <= 256 && kBlockSlots == kLanes);

// Weights are 2^x where they are rounded to bf16 next, e^x where the last bits count. `of` takes no -inf; `precise`
// does, and gives exactly 0 for it, and exactly 1 for 0.
template <class Elem>
struct Weight;
template <>
struct Weight<Bf16> {
    static constexpr float kUnit = 1.44269504088896341f;
    static Vec of(Vec x) { return exp2_coarse(x); }
    static Vec precise(Vec x) { return exp_nonpositive(x * splat(0.693147180559945309f)); }
};
template <>
struct Weight<F32> {
    static constexpr float kUnit = 1.0f;
    static Vec of(Vec x) { return exp_nonpositive(x); }
    static Vec precise(Vec x) { return exp_nonpositive(x); }
};

// What a segment (or the segments so far) gave for each row: weights relative to 2^max or e^max, their sum, and the
// values weighted by them.
struct RowSums {
    alignas(64) float max[kTileRows];
    alignas(64) float sum[kTileRows];
    alignas(64) float values[kTileRows][kMaxHeadDim];
};

struct TileScratch {
    alignas(64) uint32_t q[kTileRows][kRowStride];
    alignas(64) float scores[kTileRows][kRowStride];  // then, in place, the weights as units
    alignas(64) uint32_t edge_values[2][kBlockSlots * kMaxHeadDim];
    // A segment's keys, then its values, where the cache keeps them in 8 bits.
    alignas(64) uint32_t expanded[kSegmentBlocks * kBlockSlots * kMaxHeadDim];
    RowSums segment, merged;
};

// Where a tile stands. Rows count (token, head of the group) pairs of one request and KV head, token by token.
struct Tile {
    int32_t request, kv_head;
    int32_t first_row, rows;
    int32_t segment_begin, segment_end;
    int64_t partials;  // where its segments' results are kept for a later merge; -1: merged at once
};

// The half-open range of positions that each row sees, and that any row sees.
struct Visible {
    int begin[kTileRows], end[kTileRows];
    int any_begin, any_end;
};

template <class Elem>
class TileKernel {
public:
    TileKernel(const AttentionArgs& args, TileScratch& scratch)
        : args_(args),
          scratch_(scratch),
          group_(int(args.num_heads / args.num_kv_heads)),
          units_(int(args.head_dim) / Elem::kPerUnit),
          is_expanding_(is_quantized(args.cache_dtype)),
          padded_dim_(int(round_up(args.head_dim, kLanes))) {}

    void begin(const Tile& tile) {
        tile_ = tile;
        locate_rows();
        load_queries();
    }

    // Leaves max, sum and values of one segment in scratch.segment.
    void run_segment(int segment) {
        const int first_slot = segment * kSegmentSlots;
        const int end_slot = lesser(first_slot + kSegmentSlots, visible_.any_end);
        const int begin_block = greater(first_slot, visible_.any_begin) / kBlockSlots;
        const int end_block = int(ceil_div(end_slot, kBlockSlots));
        num_blocks_ = end_block - begin_block;
        first_position_ = begin_block * kBlockSlots;
        find_blocks(begin_block, end_block);
        if (is_expanding_) expand(keys_, key_scales_, kBlockSlots);
        compute_scores();
        if (is_expanding_) expand(values_, value_scales_, int(args_.head_dim));
        for (int row = 0; row < tile_.rows; ++row) is_expanding_ ? weigh_row<true>(row) : weigh_row<false>(row);
        hide_unseen_values();
        sum_values();
    }

    // merged = merged and then segment, for every row that saw something of it.
    static void merge(RowSums& merged, const RowSums& segment, int rows, int padded_dim) {
        alignas(64) float keep[kTileRows] = {}, take[kTileRows] = {};
        for (int row = 0; row < rows; ++row) {
            const bool seen = segment.max[row] != -INFINITY;
            const float peak = merged.max[row] > segment.max[row] ? merged.max[row] : segment.max[row];
            keep[row] = seen ? merged.max[row] - peak : 0.0f;
            take[row] = seen ? segment.max[row] - peak : -INFINITY;
            if (seen) merged.max[row] = peak;
        }
        for (int row = 0; row < rows; row += kLanes) {
            store(keep + row, Weight<Elem>::precise(load(keep + row)));
            store(take + row, Weight<Elem>::precise(load(take + row)));
        }
        for (int row = 0; row < rows; ++row) {
            const Vec kept = splat(keep[row]), taken = splat(take[row]);
            merged.sum[row] = merged.sum[row] * keep[row] + segment.sum[row] * take[row];
            for (int d = 0; d < padded_dim; d += kLanes) {
                float* values = merged.values[row] + d;
                store(values, fma(load(values), kept, load(segment.values[row] + d) * taken));
            }
        }
    }

    static void clear(RowSums& sums, int rows, int padded_dim) {
        for (int row = 0; row < rows; ++row) {
            sums.max[row] = -INFINITY;
            sums.sum[row] = 0.0f;
            for (int d = 0; d < padded_dim; d += kLanes) store(sums.values[row] + d, zero());
        }
    }

    void write_output(const Tile& tile, const RowSums& sums) const {
        using Storage = typename Elem::Storage;
        const int dim = int(args_.head_dim);
        for (int row = 0; row < tile.rows; ++row) {
            const int flat = tile.first_row + row;
            const int64_t token = args_.query_starts[tile.request] + flat / group_;
            const int64_t head = int64_t(tile.kv_head) * group_ + flat % group_;
            Storage* out = static_cast<Storage*>(args_.out) + (token * args_.num_heads + head) * dim;
            const Vec scale = splat(1.0f / sums.sum[row]);
            for (int d = 0; d < dim; d += kLanes) {
                const Vec value = load(sums.values[row] + d) * scale;
                if (dim - d >= kLanes)
                    store(out + d, value);
                else
                    store_n(out + d, value, dim - d);
            }
        }
    }

    int padded_dim() const { return padded_dim_; }

private:
    static int lesser(int a, int b) { return a < b ? a : b; }
    static int greater(int a, int b) { return a > b ? a : b; }

    void locate_rows() {
        const int start = args_.query_starts[tile_.request];
        const int new_tokens = args_.query_starts[tile_.request + 1] - start;
        const int first_position = args_.context_lens[tile_.request] - new_tokens;
        for (int row = 0; row < tile_.rows; ++row) {
            const int position = first_position + (tile_.first_row + row) / group_;
            const int64_t window = args_.sliding_window;
            visible_.end[row] = position + 1;
            visible_.begin[row] = window > 0 && position + 1 > window ? int(position + 1 - window) : 0;
        }
        visible_.any_begin = visible_.begin[0];
        visible_.any_end = visible_.end[tile_.rows - 1];
    }

    void load_queries() {
        using Storage = typename Elem::Storage;
        const Storage* q = static_cast<const Storage*>(args_.q);
        for (int row = 0; row < tile_.rows; ++row) {
            const int flat = tile_.first_row + row;
            const int64_t token = args_.query_starts[tile_.request] + flat / group_;
            const int64_t head = int64_t(tile_.kv_head) * group_ + flat % group_;
            const Storage* source = q + token * args_.q_stride + head * args_.head_dim;
            memcpy(scratch_.q[row], source, size_t(args_.head_dim) * sizeof(Storage));
        }
    }

    // Pointers to the segment's keys and values, and behind each list what is read after it: the first values, the
    // first keys of the next segment (where there is one; else something harmless). They are fetched ahead: blocks are
    // scattered, so the processor does not foresee them.
    void find_blocks(int begin_block, int end_block) {
        const int32_t* table = args_.block_tables + tile_.request * args_.max_blocks;
        const int64_t block_units = kv_block_bytes(args_.cache_dtype, args_.head_dim) / int64_t(sizeof(uint32_t));
        const int last_block = (visible_.any_end - 1) / kBlockSlots;
        for (int block = begin_block; block < end_block + kBlocksAhead; ++block) {
            const int id = table[lesser(block, last_block)];
            const int64_t offset = (int64_t(id) * args_.num_kv_heads + tile_.kv_head) * block_units;
            keys_[block - begin_block] = static_cast<const uint32_t*>(args_.key_cache) + offset;
            values_[block - begin_block] = static_cast<const uint32_t*>(args_.value_cache) + offset;
        }
        for (int ahead = 0; ahead < kBlocksAhead; ++ahead) {
            const uint32_t* next_key = keys_[num_blocks_ + ahead];
            keys_[num_blocks_ + ahead] = values_[lesser(ahead, num_blocks_ - 1)];
            values_[num_blocks_ + ahead] = next_key;
        }
    }

    // Makes units of a segment's codes, and remembers the scales of its slots.
    void expand(const uint32_t** blocks, const float** scales, int pairs) {
        const int64_t count = kBlockSlots * args_.head_dim;
        uint32_t* units = scratch_.expanded;
        for (int block = 0; block < num_blocks_; ++block, units += count / Elem::kPerUnit) {
            const auto* codes = reinterpret_cast<const uint8_t*>(blocks[block]);
            const auto* ahead = reinterpret_cast<const char*>(blocks[block + kBlocksAhead]);
            for (int64_t line = 0; line <= count; line += 64) __builtin_prefetch(ahead + line, 0, 2);
            expand_kv(Elem{}, args_.cache_dtype, codes, count, pairs, units);
            scales[block] = reinterpret_cast<const float*>(codes + count);
            blocks[block] = units;
        }
    }

    // ---- scores: q . k for every row and slot of the segment -------------------------------------------------------

    template <int Rows, int Blocks, bool kFetch>
    static void score_blocks(const uint32_t* q, const uint32_t* const* keys, const float* const* scales, int units,
                             float* scores) {
        Vec acc[Rows][Blocks];
        for (int row = 0; row < Rows; ++row)
            for (int block = 0; block < Blocks; ++block) acc[row][block] = zero();
        for (int unit = 0; unit < units; ++unit) {
            Units key[Blocks];
            for (int block = 0; block < Blocks; ++block) {
                key[block] = load_units(keys[block] + unit * kBlockSlots);
                if (kFetch) __builtin_prefetch(keys[block + kBlocksAhead] + unit * kBlockSlots, 0, 2);
            }
            for (int row = 0; row < Rows; ++row) {
                const Units query = splat_unit(q + row * kRowStride + unit);
                for (int block = 0; block < Blocks; ++block)
                    acc[row][block] = dot(Elem{}, acc[row][block], query, key[block]);
            }
        }
        for (int block = 0; scales != nullptr && block < Blocks; ++block) {
            const Vec scale = load(scales[block]);
            for (int row = 0; row < Rows; ++row) acc[row][block] = acc[row][block] * scale;
        }
        for (int row = 0; row < Rows; ++row)
            for (int block = 0; block < Blocks; ++block)
                store(scores + row * kRowStride + block * kBlockSlots, acc[row][block]);
    }

    template <int Rows, bool kFetch>
    static void score_rows(const uint32_t* q, const uint32_t* const* keys, const float* const* scales, int num_blocks,
                           int units, float* scores) {
        constexpr int kBlocks = kAccumulators / Rows >= 4 ? 4 : kAccumulators / Rows >= 2 ? 2 : 1;
        int block = 0;
        for (; block + kBlocks <= num_blocks; block += kBlocks)
            score_blocks<Rows, kBlocks, kFetch>(q, keys + block, scales ? scales + block : nullptr, units,
                                                scores + block * kBlockSlots);
        for (; block < num_blocks; ++block)
            score_blocks<Rows, 1, kFetch>(q, keys + block, scales ? scales + block : nullptr, units,
                                          scores + block * kBlockSlots);
    }

    void compute_scores() {
        for (int block = 0; block < num_blocks_; block += kBlocksAtOnce) {
            const int count = lesser(kBlocksAtOnce, num_blocks_ - block);
            const float* const* scales = is_expanding_ ? key_scales_ + block : nullptr;
            for (int row = 0; row < tile_.rows; row += kRowsAtOnce) {
                const uint32_t* q = scratch_.q[row];
                float* scores = scratch_.scores[row] + block * kBlockSlots;
                with_rows(lesser(kRowsAtOnce, tile_.rows - row), [&](auto rows) {
                    constexpr int kRows = decltype(rows)::value;
                    if (row == 0)
                        score_rows<kRows, true>(q, keys_ + block, scales, count, units_, scores);
                    else
                        score_rows<kRows, false>(q, keys_ + block, scales, count, units_, scores);
                });
            }
        }
    }

    // ---- weights ---------------------------------------------------------------------------------------------------

    // Turns a row's scores into weights, in place: the row's max and sum go to scratch.segment. What the row does not
    // see may have any score, even NaN: it is taken out of the max, and its weight is set to 0 afterwards.
    template <bool kScaled>
    void weigh_row(int row) {
        using Storage = typename Elem::Storage;
        const int slots = num_blocks_ * kBlockSlots;
        const int begin = visible_.begin[row] - first_position_;
        const int end = visible_.end[row] - first_position_;
        const float* scores = scratch_.scores[row];
        Storage* weights = reinterpret_cast<Storage*>(scratch_.scores[row]);
        Vec peak = splat(-INFINITY);
        for (int slot = 0; slot < slots; slot += kBlockSlots) {
            Vec score = load(scores + slot);
            if (slot < begin || slot + kBlockSlots > end)
                score = select_lanes(score, lane(begin - slot), lane(end - slot), -INFINITY);
            peak = max(peak, score);
        }
        const float factor = args_.scale * Weight<Elem>::kUnit;
        const float most = reduce_max(peak) * factor;
        Vec sum = zero();
        for (int slot = 0; slot < slots; slot += kBlockSlots) {
            Vec weight = Weight<Elem>::of(fma(load(scores + slot), splat(factor), splat(-most)));
            const bool is_edge = slot < begin || slot + kBlockSlots > end;
            if (is_edge) weight = select_lanes(weight, lane(begin - slot), lane(end - slot), 0.0f);
            sum = sum + weight;
            if (kScaled) weight = weight * load(value_scales_[slot / kBlockSlots]);
            if (kScaled && is_edge) weight = select_lanes(weight, lane(begin - slot), lane(end - slot), 0.0f);
            store(weights + slot, weight);
        }
        scratch_.segment.max[row] = most;
        scratch_.segment.sum[row] = reduce_sum(sum);
    }

    static int lane(int slot) { return slot < 0 ? 0 : slot > kLanes ? kLanes : slot; }

    // ---- values ----------------------------------------------------------------------------------------------------

    // Weight 0 does not silence a NaN: blocks that hold slots no row sees (another request's, or never written) are
    // replaced by copies in which those slots are zero.
    void hide_unseen_values() {
        const int begin = visible_.any_begin - first_position_;
        const int end = visible_.any_end - first_position_;
        if (begin > 0) values_[0] = copy_seen(values_[0], scratch_.edge_values[0], begin, end);
        const int last = num_blocks_ - 1;
        if (end < num_blocks_ * kBlockSlots && !(last == 0 && begin > 0))
            values_[last] = copy_seen(values_[last], scratch_.edge_values[1], 0, end - last * kBlockSlots);
    }

    const uint32_t* copy_seen(const uint32_t* source, uint32_t* copy, int begin, int end) const {
        const int dim = int(args_.head_dim);
        for (int unit = 0; unit < kBlockSlots / Elem::kPerUnit; ++unit) {
            uint32_t keep = 0;
            for (int part = 0; part < Elem::kPerUnit; ++part) {
                const int slot = unit * Elem::kPerUnit + part;
                const uint32_t part_bits = Elem::kPerUnit == 1 ? 0xffffffffu : 0xffffu << (16 * part);
                if (slot >= begin && slot < end) keep |= part_bits;
            }
            for (int d = 0; d < dim; ++d) copy[unit * dim + d] = source[unit * dim + d] & keep;
        }
        return copy;
    }

    // `columns` vectors of 16 output dimensions for `Rows` rows; kPartial: the (only) vector has `lanes` dimensions.
    template <int Rows, int Columns, bool kPartial, bool kFetch>
    static void sum_columns(const uint32_t* weights, const uint32_t* const* values, int num_blocks, int dim, int first,
                            float* out) {
        constexpr int kUnits = kBlockSlots / Elem::kPerUnit;
        Vec acc[Rows][Columns];
        for (int row = 0; row < Rows; ++row)
            for (int column = 0; column < Columns; ++column) acc[row][column] = zero();
        for (int block = 0; block < num_blocks; ++block) {
            const uint32_t* block_values = values[block] + first;
            for (int unit = 0; unit < kUnits; ++unit) {
                Units value[Columns];
                for (int column = 0; column < Columns; ++column) {
                    const uint32_t* source = block_values + unit * dim + column * kLanes;
                    value[column] = kPartial ? load_units_n(source, dim - first) : load_units(source);
                    if (kFetch)
                        __builtin_prefetch(values[block + kBlocksAhead] + first + unit * dim + column * kLanes, 0, 2);
                }
                for (int row = 0; row < Rows; ++row) {
                    const Units weight = splat_unit(weights + row * kRowStride + block * kUnits + unit);
                    for (int column = 0; column < Columns; ++column)
                        acc[row][column] = dot(Elem{}, acc[row][column], weight, value[column]);
                }
            }
        }
        for (int row = 0; row < Rows; ++row)
            for (int column = 0; column < Columns; ++column)
                store(out + row * kMaxHeadDim + first + column * kLanes, acc[row][column]);
    }

    template <int Rows, bool kFetch>
    void sum_rows(int first_row) {
        constexpr int kColumns = kAccumulators / Rows >= 4 ? 4 : kAccumulators / Rows >= 2 ? 2 : 1;
        const int dim = int(args_.head_dim);
        const uint32_t* weights = reinterpret_cast<const uint32_t*>(scratch_.scores[first_row]);
        float* out = scratch_.segment.values[first_row];
        int first = 0;
        for (; first + kColumns * kLanes <= dim; first += kColumns * kLanes)
            sum_columns<Rows, kColumns, false, kFetch>(weights, values_, num_blocks_, dim, first, out);
        for (; first + kLanes <= dim; first += kLanes)
            sum_columns<Rows, 1, false, kFetch>(weights, values_, num_blocks_, dim, first, out);
        if (first < dim) sum_columns<Rows, 1, true, kFetch>(weights, values_, num_blocks_, dim, first, out);
    }

    void sum_values() {
        for (int row = 0; row < tile_.rows; row += kRowsAtOnce)
            with_rows(lesser(kRowsAtOnce, tile_.rows - row), [&](auto rows) {
                constexpr int kRows = decltype(rows)::value;
                row == 0 ? sum_rows<kRows, true>(row) : sum_rows<kRows, false>(row);
            });
    }

    // Calls `body` with the number of rows as a compile-time constant.
    template <int Value>
    struct Constant {
        static constexpr int value = Value;
    };
    template <class Body>
    static void with_rows(int rows, Body body) {
        switch (rows) {
            case 1: return body(Constant<1>{});
            case 2: return body(Constant<2>{});
            case 3: return body(Constant<3>{});
            case 4: return body(Constant<4>{});
        }
        if constexpr (kRowsAtOnce > 4) {
            switch (rows) {
                case 5: return body(Constant<5>{});
                case 6: return body(Constant<6>{});
                case 7: return body(Constant<7>{});
                case 8: return body(Constant<8>{});
            }
        }
    }

    const AttentionArgs& args_;
    TileScratch& scratch_;
    const int group_, units_;
    const bool is_expanding_;
    const int padded_dim_;
    Tile tile_{};
    Visible visible_{};
    int num_blocks_ = 0;      // of the current segment, seen by some row
    int first_position_ = 0;  // of the first of them
    const uint32_t* keys_[kSegmentBlocks + kBlocksAhead] = {};
    const uint32_t* values_[kSegmentBlocks + kBlocksAhead] = {};
    const float* key_scales_[kSegmentBlocks] = {};  // of blocks in 8 bits
    const float* value_scales_[kSegmentBlocks] = {};
};

}  // namespace penstock::PENSTOCK_ISA
