// Sixteen f32 lanes, the width every kernel is written for, and one 32-bit *unit* per lane: a unit is what one step of
// a dot product consumes, either one f32 or a pair of bf16 (the lower index in the lower half). Each instruction set
// implements the same functions, so a kernel is written once:
//   Vec     splat zero load load_n store store_n round_bf16 + - * / fma max min round_nearest scale_by_power
//           select_lanes keep_where mask_greater mask_greater_equal mask_nan reduce_sum reduce_max DoubleSum
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

// 2^x. Relative error 3e-6 (enough for what is rounded to bf16 next). Below 2^-126 gives 0; NaN stays NaN.
static inline Vec exp2_fast(Vec x) {
    const Vec n = round_nearest(x);
    const Vec f = x - n;
    Vec p = splat(0.009582703677498935f);
    p = fma(p, f, splat(0.05590804502732442f));
    p = fma(p, f, splat(0.24024110630980602f));
    p = fma(p, f, splat(0.693124011310954f));
    p = fma(p, f, splat(1.0f));
    return scale_by_power(p, n);
}

// e^x. Relative error 1e-7; exp(0) is exactly 1. Below e^-87.3 gives 0, above e^88.7 infinity; NaN stays NaN.
static inline Vec exp(Vec x) {
    // -128 and 129 take scale_by_power out of range on the right side; `x` last, so that a NaN gets through.
    const Vec n = round_nearest(min(splat(129.0f), max(splat(-128.0f), x * splat(1.44269504088896341f))));
    const Vec bounded = min(splat(90.0f), max(splat(-90.0f), x));
    Vec r = fma(n, splat(-0.693145751953125f), bounded);
    r = fma(n, splat(-1.428606765330187045e-6f), r);
    Vec p = splat(0.0013843476322990486f);
    p = fma(p, r, splat(0.00837431946839257f));
    p = fma(p, r, splat(0.04166801281276116f));
    p = fma(p, r, splat(0.16666429377221081f));
    p = fma(p, r, splat(0.4999999413860749f));
    p = fma(p, r, splat(1.0000000325473177f));
    p = fma(p, r, splat(1.0f));
    return scale_by_power(p, n);
}

}  // namespace penstock::PENSTOCK_ISA
