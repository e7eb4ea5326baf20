// One row of logits: its peak, its k-th largest value, its weights.
#pragma once

#include "simd.h"

namespace penstock::PENSTOCK_ISA {

// Values that one partial result covers.
constexpr int64_t kChunk = 1024;

static inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls body(index, values, lanes) for each 16 values of [begin, end); the last may have fewer lanes, the missing ones
// -inf.
template <class Body>
static inline void for_each_vec(const float* values, int64_t begin, int64_t end, Body body) {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) body(i, load(values + i), kLanes);
    const int rest = int(end - i);
    if (rest > 0) body(i, select_lanes(load_n(values + i, rest), 0, rest, -INFINITY), rest);
}

// Calls body(lane) for each set bit.
template <class Body>
static inline void for_each_lane(uint32_t mask, Body body) {
    for (; mask != 0; mask &= mask - 1) body(__builtin_ctz(mask));
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
        for_each_vec(logits, chunk, lesser(chunk + kChunk, vocab), [&](int64_t, Vec x, int) {
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

// The largest threshold t in [low, high] with reaches(t), which must hold for low and not get true again once false.
template <class Reaches>
static inline float largest_threshold(float low, float high, Reaches reaches) {
    int64_t yes = ordinal(low), no = ordinal(high) + 1;
    while (no - yes > 1) {
        const int64_t middle = yes + (no - yes) / 2;
        if (reaches(from_ordinal(middle)))
            yes = middle;
        else
            no = middle;
    }
    return from_ordinal(yes);
}

static inline int64_t count_at_least(const float* values, int64_t count, float threshold) {
    const Vec limit = splat(threshold);
    int64_t found = 0;
    for_each_vec(values, 0, count, [&](int64_t, Vec x, int lanes) {
        found += __builtin_popcount(mask_greater_equal(x, limit) & ((1u << lanes) - 1u));
    });
    return found;
}

// Leaves the k largest of `count` values (count >= k, none above `peak`) and gives the least of them.
static inline float keep_largest(float* values, int64_t count, int64_t k, float peak) {
    const float lowest = -3.402823466e38f;
    const float kth = largest_threshold(lowest, peak, [&](float t) { return count_at_least(values, count, t) >= k; });
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i)
        if (values[i] > kth) values[kept++] = values[i];
    while (kept < k) values[kept++] = kth;
    return kth;
}

// The k-th largest logit, or -inf if fewer than k are finite. buffer: room for `capacity` >= 2 * k + 16 values. One
// pass: values above the k-th largest so far are collected, and the lowest dropped when the buffer is full.
static inline float kth_largest(const float* logits, int64_t vocab, int64_t k, float peak, float* buffer,
                                int64_t capacity) {
    float threshold = -INFINITY;
    int64_t count = 0;
    for_each_vec(logits, 0, vocab, [&](int64_t, Vec x, int) {
        const uint32_t mask = mask_greater(x, splat(threshold));
        if (mask == 0) return;
        alignas(64) float lanes[kLanes];
        store(lanes, x);
        for_each_lane(mask, [&](int lane) { buffer[count++] = lanes[lane]; });
        if (count + kLanes > capacity) {
            threshold = keep_largest(buffer, count, k, peak);
            count = k;
        }
    });
    if (count < k) return -INFINITY;
    return keep_largest(buffer, count, k, peak);
}

}  // namespace penstock::PENSTOCK_ISA
