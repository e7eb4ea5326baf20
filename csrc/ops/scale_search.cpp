// Sixteen groups at a time, one a lane, so that no sum crosses lanes; and without fused multiply-add, so that a file is
// the same whatever processor wrote it.
#include "ops/scale_search.h"

#include "simd.h"
#include "threads.h"

namespace penstock::PENSTOCK_ISA {

namespace {

constexpr int kMaxSize = 32;
constexpr int kSteps = 21;
constexpr float kTiny = 1e-15f;
constexpr int64_t kMinGroupsPerThread = 2'000;

// x[i] and weight[i]: the i-th value of each group.
struct Tile {
    Vec x[kMaxSize], weight[kMaxSize], codes[kMaxSize];
    int size;
};

void load_transposed(const float* from, int groups, int size, Vec* to) {
    for (int i = 0; i < size; ++i) {
        float lanes[kLanes] = {};
        for (int group = 0; group < groups; ++group) lanes[group] = from[group * size + i];
        to[i] = load(lanes);
    }
}

Vec choose(uint32_t mask, Vec yes, Vec no) { return keep_where(mask, yes) + keep_where(~mask, no); }

Vec clamped_round(Vec x, float low, float high) { return min(splat(high), max(splat(low), round_nearest(x))); }

// Of scale * code + low.
Vec error_of(const Tile& tile, Vec scale, Vec low) {
    Vec sum = zero();
    for (int i = 0; i < tile.size; ++i) {
        const Vec apart = tile.codes[i] * scale + low - tile.x[i];
        sum = sum + tile.weight[i] * (apart * apart);
    }
    return sum;
}

void search_affine(Tile& tile, float top, Vec& best_scale, Vec& best_low) {
    Vec low = zero(), high = tile.x[0], sum_w = zero(), sum_x = zero();
    for (int i = 0; i < tile.size; ++i) {
        low = min(tile.x[i], low);
        high = max(tile.x[i], high);
        sum_w = sum_w + tile.weight[i];
        sum_x = sum_x + tile.weight[i] * tile.x[i];
    }
    best_scale = max(high - low, splat(kTiny)) / splat(top);
    best_low = low;
    for (int i = 0; i < tile.size; ++i) tile.codes[i] = clamped_round((tile.x[i] - low) / best_scale, 0.0f, top);
    Vec best_error = error_of(tile, best_scale, best_low);
    for (int step = 0; step < kSteps; ++step) {
        const Vec factor = splat(top - 1.0f + 0.1f * float(step)) / max(high - best_low, splat(kTiny));
        Vec sum_l = zero(), sum_l2 = zero(), sum_xl = zero();
        for (int i = 0; i < tile.size; ++i) {
            const Vec code = clamped_round((tile.x[i] - best_low) * factor, 0.0f, top);
            const Vec weighted = tile.weight[i] * code;
            tile.codes[i] = code;
            sum_l = sum_l + weighted;
            sum_l2 = sum_l2 + weighted * code;
            sum_xl = sum_xl + weighted * tile.x[i];
        }
        const Vec determinant = sum_w * sum_l2 - sum_l * sum_l;
        const Vec unbounded = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        const Vec scale = choose(mask_greater(unbounded, zero()), sum_xl / max(sum_l2, splat(kTiny)),
                                 (sum_w * sum_xl - sum_x * sum_l) / determinant);
        const Vec new_low = min(unbounded, zero());
        const Vec error = error_of(tile, scale, new_low);
        const uint32_t better = mask_greater(determinant, zero()) & mask_greater(best_error, error);
        best_scale = choose(better, scale, best_scale);
        best_low = choose(better, new_low, best_low);
        best_error = choose(better, error, best_error);
    }
}

Vec search_symmetric(Tile& tile, float half) {
    Vec largest = zero(), magnitude = zero();
    for (int i = 0; i < tile.size; ++i) {
        const Vec absolute = max(tile.x[i], zero() - tile.x[i]);
        const uint32_t above = mask_greater(absolute, magnitude);
        largest = choose(above, tile.x[i], largest);
        magnitude = max(absolute, magnitude);
    }
    const uint32_t is_usable = mask_greater_equal(magnitude, splat(kTiny));
    const Vec usable = choose(is_usable, largest, splat(1.0f));
    Vec best_scale = zero(), best = splat(-1.0f);
    for (int step = 0; step < kSteps; ++step) {
        const Vec factor = splat(-(half + 0.1f * float(step - kSteps / 2))) / usable;
        Vec sum_xl = zero(), sum_l2 = zero();
        for (int i = 0; i < tile.size; ++i) {
            const Vec code = clamped_round(tile.x[i] * factor, -half, half - 1.0f);
            const Vec weighted = tile.weight[i] * code;
            sum_xl = sum_xl + weighted * tile.x[i];
            sum_l2 = sum_l2 + weighted * code;
        }
        const Vec scale = sum_xl / max(sum_l2, splat(kTiny));
        const Vec gained = sum_xl * sum_xl / max(sum_l2, splat(kTiny));
        const uint32_t better = mask_greater(sum_l2, zero()) & mask_greater(gained, best);
        best_scale = choose(better, scale, best_scale);
        best = choose(better, gained, best);
    }
    return keep_where(is_usable, best_scale);
}

template <bool is_affine>
void search_groups(const ScaleSearchArgs& args, Range groups) {
    Tile tile;
    tile.size = args.size;
    for (int64_t first = groups.begin; first < groups.end; first += kLanes) {
        const int count = groups.end - first < kLanes ? int(groups.end - first) : kLanes;
        load_transposed(args.x + first * args.size, count, args.size, tile.x);
        load_transposed(args.weight + first * args.size, count, args.size, tile.weight);
        if (is_affine) {
            Vec scale, low;
            search_affine(tile, float(args.top), scale, low);
            store_n(args.scale + first, scale, count);
            store_n(args.minimum + first, zero() - low, count);
        } else {
            store_n(args.scale + first, search_symmetric(tile, float(args.top)), count);
        }
    }
}

template <bool is_affine>
void search(const ScaleSearchArgs& args) {
    const int threads = threads_for(args.groups, kMinGroupsPerThread, args.num_threads);
    if (threads == 1) return search_groups<is_affine>(args, {0, args.groups});
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; ++thread)
        search_groups<is_affine>(args, split(args.groups, threads, thread));
}

}  // namespace

extern const ScaleSearchKernels scale_search_kernels = {search<true>, search<false>};

}  // namespace penstock::PENSTOCK_ISA
