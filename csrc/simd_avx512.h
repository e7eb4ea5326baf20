// Sixteen lanes with AVX-512 F/BW/DQ/VL, and BF16 where there is. Included by simd.h, which documents the functions.
#pragma once

// GCC 12 takes the undefined operand of some intrinsics, which no lane reads, for an uninitialised one.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace penstock::PENSTOCK_ISA {

// Accumulators that fit into the registers beside their operands.
constexpr int kAccumulators = 24;

struct Vec {
    __m512 v;
};
struct Units {
    __m512i v;
};

static inline __mmask16 first_lanes(int n) { return __mmask16(n >= 16 ? 0xffffu : (1u << n) - 1u); }

static inline Vec splat(float x) { return {_mm512_set1_ps(x)}; }
static inline Vec zero() { return {_mm512_setzero_ps()}; }
static inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline Vec load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
static inline Vec widen(__m256i x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
static inline Vec load(const bf16_t* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
static inline Vec load_n(const bf16_t* p, int n) { return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
static inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
static inline void store_n(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x.v); }
#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_BF16
static inline __m256i narrow(Vec x) { return (__m256i)_mm512_cvtneps_pbh(x.v); }
#else
// Round to nearest even, NaN to a quiet NaN.
static inline __m256i narrow(Vec x) {
    const __m512i bits = _mm512_castps_si512(x.v), upper = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, is_nan, upper, _mm512_set1_epi32(0x40)));
}
#endif
static inline void store(bf16_t* p, Vec x) { _mm256_storeu_si256((__m256i*)p, narrow(x)); }
static inline void store_n(bf16_t* p, Vec x, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(x)); }

static inline Vec round_bf16(Vec x) { return widen(narrow(x)); }

static inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// Where either is NaN, the second operand.
static inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline Vec round_nearest(Vec x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// p * 2^n for p in [0.5, 2); 0 where the result would be subnormal or n is -inf.
static inline Vec scale_by_power(Vec p, Vec n) {
    const __mmask16 small = _mm512_cmp_ps_mask(n.v, _mm512_set1_ps(-126.0f), _CMP_LT_OQ);
    return {_mm512_mask_blend_ps(small, _mm512_scalef_ps(p.v, n.v), _mm512_setzero_ps())};
}
// The same for n from -126 to 0; below, the result may also be subnormal.
static inline Vec scale_down(Vec p, Vec n) { return {_mm512_scalef_ps(p.v, n.v)}; }

static inline float reduce_sum(Vec x) { return _mm512_reduce_add_ps(x.v); }
static inline float reduce_max(Vec x) { return _mm512_reduce_max_ps(x.v); }

// x in lanes [begin, end), `fill` in the others.
static inline Vec select_lanes(Vec x, int begin, int end, float fill) {
    const __mmask16 keep = __mmask16(first_lanes(end) & ~first_lanes(begin));
    return {_mm512_mask_blend_ps(keep, _mm512_set1_ps(fill), x.v)};
}

// A bit per lane.
static inline uint32_t mask_greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
static inline uint32_t mask_greater_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
static inline uint32_t mask_nan(Vec a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q); }
static inline Vec keep_where(uint32_t mask, Vec x) { return {_mm512_maskz_mov_ps(__mmask16(mask), x.v)}; }

// Writes the lanes of the mask side by side (up to 16 values are overwritten) and gives their number.
static inline int compress(float* p, uint32_t mask, Vec x) {
    _mm512_storeu_ps(p, _mm512_maskz_compress_ps(__mmask16(mask), x.v));
    return __builtin_popcount(mask);
}
static inline int compress_indices(int32_t* p, uint32_t mask, int32_t first) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i indices = _mm512_add_epi32(lanes, _mm512_set1_epi32(first));
    _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(__mmask16(mask), indices));
    return __builtin_popcount(mask);
}
// `ids` has 16 readable; p may be ids or before it.
static inline void compress_ids(int32_t* p, uint32_t mask, const int32_t* ids) {
    _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(__mmask16(mask), _mm512_loadu_si512(ids)));
}

// The sum of all lanes added, in double.
struct DoubleSum {
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
    void add(Vec x) {
        low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(x.v)));
        high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1)));
    }
    double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
};

static inline Units load_units(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
static inline Units load_units_n(const uint32_t* p, int n) { return {_mm512_maskz_loadu_epi32(first_lanes(n), p)}; }
static inline Units splat_unit(const uint32_t* p) {
    int32_t unit;
    memcpy(&unit, p, sizeof unit);
    return {_mm512_set1_epi32(unit)};
}

static inline Vec dot(F32, Vec acc, Units a, Units b) {
    return {_mm512_fmadd_ps(_mm512_castsi512_ps(a.v), _mm512_castsi512_ps(b.v), acc.v)};
}
#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_BF16
static inline Vec dot(Bf16, Vec acc, Units a, Units b) {
    return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)};
}
#else
static inline Vec dot(Bf16, Vec acc, Units a, Units b) {
    const __m512i upper = _mm512_set1_epi32(int(0xffff0000u));
    const Vec lower = dot(F32{}, acc, {_mm512_slli_epi32(a.v, 16)}, {_mm512_slli_epi32(b.v, 16)});
    return dot(F32{}, lower, {_mm512_and_si512(a.v, upper)}, {_mm512_and_si512(b.v, upper)});
}
#endif

}  // namespace penstock::PENSTOCK_ISA
