// Sixteen lanes as two AVX2 registers. Included by simd.h, which documents the functions.
#pragma once

#include <immintrin.h>

namespace penstock::PENSTOCK_ISA {

constexpr int kAccumulators = 4;

struct Vec {
    __m256 low, high;
};
struct Units {
    __m256i low, high;
};

// All ones in the first n of 8 lanes.
static inline __m256i first_lanes8(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

static inline Vec splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline Vec load_n(const float* p, int n) {
    if (n <= 8) return {_mm256_maskload_ps(p, first_lanes8(n)), _mm256_setzero_ps()};
    return {_mm256_loadu_ps(p), _mm256_maskload_ps(p + 8, first_lanes8(n - 8))};
}
static inline __m256 widen8(const bf16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
static inline Vec load(const bf16_t* p) { return {widen8(p), widen8(p + 8)}; }
static inline Vec load_n(const bf16_t* p, int n) {
    alignas(32) bf16_t lanes[16] = {};
    memcpy(lanes, p, size_t(n) * sizeof(bf16_t));
    return load(lanes);
}
static inline void store(float* p, Vec x) {
    _mm256_storeu_ps(p, x.low);
    _mm256_storeu_ps(p + 8, x.high);
}
static inline void store_n(float* p, Vec x, int n) {
    if (n <= 8) return _mm256_maskstore_ps(p, first_lanes8(n), x.low);
    _mm256_storeu_ps(p, x.low);
    _mm256_maskstore_ps(p + 8, first_lanes8(n - 8), x.high);
}
// Round to nearest even, NaN to a quiet NaN; the result in the low half of each lane.
static inline __m256i round8(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
static inline void store(bf16_t* p, Vec x) {
    const __m256i packed = _mm256_packus_epi32(round8(x.low), round8(x.high));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
static inline void store_n(bf16_t* p, Vec x, int n) {
    alignas(32) bf16_t lanes[16];
    store(lanes, x);
    memcpy(p, lanes, size_t(n) * sizeof(bf16_t));
}

static inline Vec round_bf16(Vec x) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(round8(x.low), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(round8(x.high), 16))};
}

static inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
static inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
static inline Vec fma(Vec a, Vec b, Vec c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
// Where either is NaN, the second operand.
static inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
static inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
static inline Vec round_nearest(Vec x) {
    constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.low, kMode), _mm256_round_ps(x.high, kMode)};
}
static inline __m256 scale8(__m256 p, __m256 n) {
    // 2^n in two factors: 2^128 alone has no f32.
    const __m256 limited = _mm256_min_ps(_mm256_set1_ps(200.0f), _mm256_max_ps(_mm256_set1_ps(-200.0f), n));
    const __m256i whole = _mm256_cvtps_epi32(limited);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    const __m256i bias = _mm256_set1_epi32(127);
    const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    const __m256 second =
        _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23));
    const __m256 small = _mm256_cmp_ps(n, _mm256_set1_ps(-126.0f), _CMP_LT_OQ);
    return _mm256_andnot_ps(small, _mm256_mul_ps(_mm256_mul_ps(p, first), second));
}
static inline Vec scale_by_power(Vec p, Vec n) { return {scale8(p.low, n.low), scale8(p.high, n.high)}; }
// The same for n from -126 to 0; below, 0.
static inline __m256 scale_down8(__m256 p, __m256 n) {
    const __m256i exponent = _mm256_cvtps_epi32(_mm256_max_ps(_mm256_set1_ps(-127.0f), n));
    const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(bits));
}
static inline Vec scale_down(Vec p, Vec n) { return {scale_down8(p.low, n.low), scale_down8(p.high, n.high)}; }

static inline float reduce_sum(Vec x) {
    const __m256 eight = _mm256_add_ps(x.low, x.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
static inline float reduce_max(Vec x) {
    const __m256 eight = _mm256_max_ps(x.low, x.high);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// x in lanes [begin, end), `fill` in the others.
static inline Vec select_lanes(Vec x, int begin, int end, float fill) {
    const __m256 other = _mm256_set1_ps(fill);
    const __m256 low = _mm256_castsi256_ps(_mm256_andnot_si256(first_lanes8(begin), first_lanes8(end)));
    const __m256 high = _mm256_castsi256_ps(_mm256_andnot_si256(first_lanes8(begin - 8), first_lanes8(end - 8)));
    return {_mm256_blendv_ps(other, x.low, low), _mm256_blendv_ps(other, x.high, high)};
}

static inline uint32_t lane_bits(__m256 low, __m256 high) {
    return uint32_t(_mm256_movemask_ps(low)) | (uint32_t(_mm256_movemask_ps(high)) << 8);
}
// A bit per lane.
static inline uint32_t mask_greater(Vec a, Vec b) {
    return lane_bits(_mm256_cmp_ps(a.low, b.low, _CMP_GT_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_GT_OQ));
}
static inline uint32_t mask_greater_equal(Vec a, Vec b) {
    return lane_bits(_mm256_cmp_ps(a.low, b.low, _CMP_GE_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_GE_OQ));
}
static inline uint32_t mask_nan(Vec a) {
    return lane_bits(_mm256_cmp_ps(a.low, a.low, _CMP_UNORD_Q), _mm256_cmp_ps(a.high, a.high, _CMP_UNORD_Q));
}
static inline __m256 keep8(uint32_t mask, __m256 x) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(int(mask)), bit);
    return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit)));
}
static inline Vec keep_where(uint32_t mask, Vec x) { return {keep8(mask, x.low), keep8(mask >> 8, x.high)}; }

// Writes the lanes of the mask side by side (up to 16 values may be overwritten) and gives their number.
static inline int compress(float* p, uint32_t mask, Vec x) {
    float lanes[16];
    store(lanes, x);
    int count = 0;
    for (; mask != 0; mask &= mask - 1) p[count++] = lanes[__builtin_ctz(mask)];
    return count;
}
static inline int compress_indices(int32_t* p, uint32_t mask, int32_t first) {
    int count = 0;
    for (; mask != 0; mask &= mask - 1) p[count++] = first + __builtin_ctz(mask);
    return count;
}
// `ids` has 16 readable; p may be ids or before it.
static inline void compress_ids(int32_t* p, uint32_t mask, const int32_t* ids) {
    for (; mask != 0; mask &= mask - 1) *p++ = ids[__builtin_ctz(mask)];
}

// The sum of all lanes added, in double.
struct DoubleSum {
    __m256d parts[4] = {_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd()};
    void add(Vec x) {
        parts[0] = _mm256_add_pd(parts[0], _mm256_cvtps_pd(_mm256_castps256_ps128(x.low)));
        parts[1] = _mm256_add_pd(parts[1], _mm256_cvtps_pd(_mm256_extractf128_ps(x.low, 1)));
        parts[2] = _mm256_add_pd(parts[2], _mm256_cvtps_pd(_mm256_castps256_ps128(x.high)));
        parts[3] = _mm256_add_pd(parts[3], _mm256_cvtps_pd(_mm256_extractf128_ps(x.high, 1)));
    }
    double total() const {
        const __m256d four = _mm256_add_pd(_mm256_add_pd(parts[0], parts[1]), _mm256_add_pd(parts[2], parts[3]));
        const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
        return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
    }
};

static inline Units load_units(const uint32_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))};
}
static inline Units load_units_n(const uint32_t* p, int n) {
    if (n <= 8) return {_mm256_maskload_epi32((const int*)p, first_lanes8(n)), _mm256_setzero_si256()};
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_maskload_epi32((const int*)p + 8, first_lanes8(n - 8))};
}
static inline Units splat_unit(const uint32_t* p) {
    int32_t unit;
    memcpy(&unit, p, sizeof unit);
    return {_mm256_set1_epi32(unit), _mm256_set1_epi32(unit)};
}

static inline __m256 dot8(F32, __m256 acc, __m256i a, __m256i b) {
    return _mm256_fmadd_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), acc);
}
static inline __m256 dot8(Bf16, __m256 acc, __m256i a, __m256i b) {
    const __m256i upper = _mm256_set1_epi32(int(0xffff0000u));
    acc = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)),
                          _mm256_castsi256_ps(_mm256_slli_epi32(b, 16)), acc);
    return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(a, upper)),
                           _mm256_castsi256_ps(_mm256_and_si256(b, upper)), acc);
}
template <class Elem>
static inline Vec dot(Elem elem, Vec acc, Units a, Units b) {
    return {dot8(elem, acc.low, a.low, b.low), dot8(elem, acc.high, a.high, b.high)};
}

}  // namespace penstock::PENSTOCK_ISA
