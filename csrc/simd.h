// Sixteen f32 lanes, the width every kernel is written for, and one 32-bit *unit* per lane: a unit is what one step of
// a dot product consumes, either one f32 or a pair of bf16 (the lower index in the lower half). Each instruction set
// implements the same functions, so a kernel is written once:
//   Vec     splat zero load load_n store store_n round_bf16 + - * / fma max min round_nearest scale_by_power scale_down
//           select_lanes keep_where compress compress_indices compress_ids mask_greater mask_greater_equal mask_nan reduce_sum reduce_max DoubleSum
//   Units   load_units load_units_n splat_unit; dot(Elem, acc, a, b)
// `_n` versions touch only the first n lanes (the others read as zero). Results of one instruction set never depend on
// how a kernel was inlined: contraction of a*b+c is off (-ffp-contract=off), a fused one is spelled `fma`.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace penstock::PENSTOCK_ISA {

// Element types by their tags: what a tensor holds, and how many elements one unit takes.
struct F32 {
    using Storage = float;
    static constexpr int kPerUnit = 1;
};
struct Bf16 {
    using Storage = bf16_t;
    static constexpr int kPerUnit = 2;
};

}  // namespace penstock::PENSTOCK_ISA

#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX512
#include "simd_avx512.h"
#elif PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX2
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace penstock::PENSTOCK_ISA {

constexpr int kLanes = 16;

static inline float as_f32(float value) { return value; }
static inline float as_f32(bf16_t value) { return to_f32(value); }

// Rounds to the element type and back, as storing and loading again would.
static inline Vec round_to(F32, Vec x) { return x; }
static inline Vec round_to(Bf16, Vec x) { return round_bf16(x); }

// 2^x for x <= 0 that is not -inf. Relative error 1e-4, enough for what is rounded to bf16 next. Where the result would
// be subnormal it is anything from 0 to 2^-126. NaN stays NaN.
static inline Vec exp2_coarse(Vec x) {
    const Vec n = round_nearest(x);
    const Vec f = x - n;
    Vec p = splat(0.05500679904760206f);
    p = fma(p, f, splat(0.24221904590741464f));
    p = fma(p, f, splat(0.6932840462119527f));
    p = fma(p, f, splat(1.0f));
    return scale_down(p, n);
}

// 2^n e^r for |r| <= 0.35, relative error 1e-7.
static inline Vec exp_from_parts(Vec n, Vec r) {
    Vec p = splat(0.0013843476322990486f);
    p = fma(p, r, splat(0.00837431946839257f));
    p = fma(p, r, splat(0.04166801281276116f));
    p = fma(p, r, splat(0.16666429377221081f));
    p = fma(p, r, splat(0.4999999413860749f));
    p = fma(p, r, splat(1.0000000325473177f));
    p = fma(p, r, splat(1.0f));
    return scale_by_power(p, n);
}

// x - n ln 2, with ln 2 in two parts.
static inline Vec exp_remainder(Vec x, Vec n) {
    return fma(n, splat(-1.428606765330187045e-6f), fma(n, splat(-0.693145751953125f), x));
}

// e^x. Relative error 1e-7; exp(0) is exactly 1. Below e^-87.3 gives 0, above e^88.7 infinity; NaN stays NaN.
static inline Vec exp(Vec x) {
    // -128 and 129 take scale_by_power out of range on the right side; `x` last, so that a NaN gets through.
    const Vec n = round_nearest(min(splat(129.0f), max(splat(-128.0f), x * splat(1.44269504088896341f))));
    return exp_from_parts(n, exp_remainder(min(splat(90.0f), max(splat(-90.0f), x)), n));
}

// The same for x <= 0 (or a rounding above it).
static inline Vec exp_nonpositive(Vec x) {
    const Vec bounded = max(splat(-90.0f), x);
    const Vec n = round_nearest(bounded * splat(1.44269504088896341f));
    return exp_from_parts(n, exp_remainder(bounded, n));
}

}  // namespace penstock::PENSTOCK_ISA
