// One row of logits: its peak, its k-th largest value, its weights.
#pragma once

#include "division.h"
#include "simd.h"

namespace penstock::PENSTOCK_ISA {

// Values that one partial result covers.
constexpr int64_t kChunk = 1024;

// Calls body(index, values, lanes) for each 16 values of [begin, end); the last may have fewer lanes, the missing ones
// -inf.
template <class Body>
static inline void for_each_vec(const float* values, int64_t begin, int64_t end, Body body) {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) body(i, load(values + i), kLanes);
    const int rest = int(end - i);
    if (rest > 0) body(i, select_lanes(load_n(values + i, rest), 0, rest, -INFINITY), rest);
}

struct Peak {
    float value;
    int64_t id;     // the lowest that has the value
    bool is_valid;  // the value is finite, and there is no NaN
};

static inline Peak find_peak(const float* logits, int64_t vocab) {
    float best = -INFINITY;
    int64_t best_chunk = 0;
    uint32_t nans = 0;
    for (int64_t chunk = 0; chunk < vocab; chunk += kChunk) {
        Vec most = splat(-INFINITY);
        for_each_vec(logits, chunk, min_of(chunk + kChunk, vocab), [&](int64_t, Vec x, int) {
            nans |= mask_nan(x);
            most = max(most, x);
        });
        const float chunk_best = reduce_max(most);
        if (chunk_best > best) {
            best = chunk_best;
            best_chunk = chunk;
        }
    }
    if (nans != 0 || best == -INFINITY || best == INFINITY) return {best, -1, false};
    int64_t id = best_chunk;
    while (logits[id] != best) ++id;
    return {best, id, true};
}

// Floats in their order: as integers, with the negative ones flipped.
static inline int64_t ordinal(float value) {
    const int32_t bits = int32_t(bits_of(value));
    return bits < 0 ? int64_t(INT32_MIN) - bits : int64_t(bits);
}
static inline float from_ordinal(int64_t order) {
    return f32_from_bits(uint32_t(order < 0 ? int64_t(INT32_MIN) - order : order));
}

// The mask's lanes that exist.
static inline uint32_t existing(uint32_t mask, int lanes) { return mask & ((1u << lanes) - 1u); }

// How many values reach a threshold, and how much they weigh together.
struct Counted {
    using Total = int64_t;
    static Total at_least(const float* values, int64_t count, float threshold) {
        const Vec limit = splat(threshold);
        int64_t found = 0;
        for_each_vec(values, 0, count, [&](int64_t, Vec x, int lanes) {
            found += __builtin_popcount(existing(mask_greater_equal(x, limit), lanes));
        });
        return found;
    }
};
struct Weighed {
    using Total = double;
    static Total at_least(const float* values, int64_t count, float threshold) {
        const Vec limit = splat(threshold);
        DoubleSum sum;
        for_each_vec(values, 0, count,
                     [&](int64_t, Vec x, int) { sum.add(keep_where(mask_greater_equal(x, limit), x)); });
        return sum.total();
    }
};

// Keeps the values in [low, high), in their order; gives their number.
static inline int64_t keep_between(float* values, int64_t count, float low, float high) {
    const Vec least = splat(low), bound = splat(high);
    int64_t kept = 0;
    for_each_vec(values, 0, count, [&](int64_t, Vec x, int lanes) {
        const uint32_t mask = mask_greater_equal(x, least) & mask_greater(bound, x);
        kept += compress(values + kept, existing(mask, lanes), x);
    });
    return kept;
}

template <class Measure>
struct Threshold {
    float value;
    typename Measure::Total above;  // of the values greater than it
};

// The largest threshold at which the values that reach it amount to `wanted` in their number or weight; all of them,
// which lie in [low, high], must. Bisects, and looks again only at the values still in question. Destroys `values`,
// which need room for 16 more.
template <class Measure>
static inline Threshold<Measure> find_threshold(float* values, int64_t count, float low, float high,
                                                typename Measure::Total wanted) {
    int64_t reaches = ordinal(low), fails = ordinal(high) + 1;
    typename Measure::Total above = 0;
    while (fails - reaches > 1) {
        const int64_t middle = reaches + (fails - reaches) / 2;
        const typename Measure::Total amount = Measure::at_least(values, count, from_ordinal(middle));
        if (above + amount >= wanted) {
            reaches = middle;
        } else {
            fails = middle;
            above += amount;
        }
        count = keep_between(values, count, from_ordinal(reaches), from_ordinal(fails));
    }
    return {from_ordinal(reaches), above};
}

// Leaves the k largest of `count` values (count >= k, none above `peak`) and gives the least of them. values and spare
// have room for 16 more.
static inline float keep_largest(float* values, int64_t count, int64_t k, float peak, float* spare) {
    memcpy(spare, values, size_t(count) * sizeof(float));
    const float kth = find_threshold<Counted>(spare, count, -3.402823466e38f, peak, k).value;
    int64_t kept = 0;
    for_each_vec(values, 0, count, [&](int64_t, Vec x, int lanes) {
        kept += compress(values + kept, existing(mask_greater(x, splat(kth)), lanes), x);
    });
    while (kept < k) values[kept++] = kth;
    return kth;
}

// Room that kth_largest needs in its buffer and in `spare`.
static inline int64_t selection_room(int64_t vocab, int64_t k) { return min_of(vocab, k * 2 + 1024) + 3 * kLanes; }

// The k-th largest logit, or -inf if fewer than k are finite. One pass: values above the k-th largest so far are
// collected, and the lowest dropped when the buffer is full.
static inline float kth_largest(const float* logits, int64_t vocab, int64_t k, float peak, float* buffer,
                                float* spare) {
    const int64_t capacity = selection_room(vocab, k) - kLanes;
    Vec threshold = splat(-INFINITY);
    int64_t count = 0;
    for_each_vec(logits, 0, vocab, [&](int64_t, Vec x, int) {
        const uint32_t mask = mask_greater(x, threshold);
        if (mask == 0) return;
        count += compress(buffer + count, mask, x);
        if (count + kLanes > capacity) {
            threshold = splat(keep_largest(buffer, count, k, peak, spare));
            count = k;
        }
    });
    if (count < k) return -INFINITY;
    return keep_largest(buffer, count, k, peak, spare);
}

}  // namespace penstock::PENSTOCK_ISA
