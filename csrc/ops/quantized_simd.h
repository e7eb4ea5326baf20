// Sixteen 32-bit integers, and units of four bytes: what products of 8-bit codes are made of.
#pragma once

#include "simd.h"

namespace penstock::PENSTOCK_ISA {

// A unit is four codes (u8) or four activations (s8) of each of 16 lanes.
#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX512

struct Ints {
    __m512i v;
};

static inline Ints splat_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
static inline Ints load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
static inline Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline Vec to_vec(Ints x) { return {_mm512_cvtepi32_ps(x.v)}; }
static inline Ints dot_bytes(Ints acc, Units codes, Units x) { return {_mm512_dpbusd_epi32(acc.v, codes.v, x.v)}; }
static inline Ints dot_bytes_in_place(Ints acc, Units codes, Units x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(codes.v), "v"(x.v));
    return acc;
}
static inline Ints dot_unit_in_place(Ints acc, Units codes, const uint32_t* x) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc.v) : "v"(codes.v), "m"(*x));
    return acc;
}
// Units of two 16-bit integers, of two rows of lanes; and a product with one such unit for all lanes.
static inline Units load_pairs(const int8_t* first, const int8_t* second) {
    const __m512i low = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)first));
    const __m512i high = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)second));
    return {_mm512_mask_blend_epi16(0xaaaaaaaau, low, _mm512_slli_epi32(high, 16))};
}
static inline Ints dot_pairs_in_place(Ints acc, Units pairs, const uint32_t* x) {
    asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(acc.v) : "v"(pairs.v), "m"(*x));
    return acc;
}
// (bytes >> kShift) & mask
template <int kShift, int kMask>
static inline Units field(Units bytes) {
    const __m512i shifted = kShift == 0 ? bytes.v : _mm512_srli_epi16(bytes.v, kShift);
    return {_mm512_and_si512(shifted, _mm512_set1_epi8(char(kMask)))};
}
// (bytes >> kShift) & mask | lower; a negative shift is one to the left.
template <int kShift, int kMask>
static inline Units field_over(Units bytes, Units lower) {
    const __m512i shifted = kShift < 0 ? _mm512_slli_epi16(bytes.v, -kShift) : _mm512_srli_epi16(bytes.v, kShift);
    return {_mm512_ternarylogic_epi32(shifted, _mm512_set1_epi8(char(kMask)), lower.v, 0xea)};
}
static inline Units subtract_from_bytes(Units bytes, int x) { return {_mm512_sub_epi8(bytes.v, _mm512_set1_epi8(char(x)))}; }
// By 0 to 7; a byte's upper bits are its neighbour's then.
static inline Units shift_right(Units bytes, int count) { return {_mm512_srl_epi16(bytes.v, _mm_cvtsi32_si128(count))}; }
struct ByteTable {
    __m512i v;
    explicit ByteTable(const uint8_t* bytes) : v(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)bytes))) {}
    Units of(Units codes) const { return {_mm512_shuffle_epi8(v, codes.v)}; }
};
static inline void store_units(uint32_t* p, Units x) { _mm512_storeu_si512(p, x.v); }
static inline Vec load_int8(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
static inline Vec load_uint8(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
static inline Vec load_half(const f16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
static inline Ints to_nearest_ints(Vec x) { return {_mm512_cvtps_epi32(x.v)}; }
// Of at most 127 in magnitude.
static inline void store_int8(int8_t* p, Ints x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x.v)); }
static inline Vec magnitude(Vec x) { return {_mm512_abs_ps(x.v)}; }
// Of magnitudes; a NaN is larger than all numbers.
static inline Vec larger_bits(Vec a, Vec b) {
    return {_mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)))};
}

#elif PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX2

struct Ints {
    __m256i low, high;
};

static inline Ints splat_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
static inline Ints load_ints(const int32_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))};
}
static inline Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
static inline Vec to_vec(Ints x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX_VNNI
static inline __m256i dot_bytes8(__m256i acc, __m256i codes, __m256i x) {
#ifdef PENSTOCK_HAS_FOREIGN_INSTRUCTIONS  // tools/foreign_instructions: AVX-512's name for it
    asm("%{evex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(codes), "x"(x));
    return acc;
#else
    return _mm256_dpbusd_avx_epi32(acc, codes, x);
#endif
}
#else
// In 16 bits by even and odd bytes: the products of maddubs would saturate.
static inline __m256i dot_bytes8(__m256i acc, __m256i codes, __m256i x) {
    const __m256i even = _mm256_and_si256(codes, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(codes, 8);
    const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(even, x_even));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(odd, x_odd));
}
#endif
static inline Ints dot_bytes(Ints acc, Units codes, Units x) {
    return {dot_bytes8(acc.low, codes.low, x.low), dot_bytes8(acc.high, codes.high, x.high)};
}
// Codes of at most 127: the products of maddubs fit.
static inline __m256i dot_narrow_bytes8(__m256i acc, __m256i codes, __m256i x) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
}
static inline Ints dot_narrow_bytes(Ints acc, Units codes, Units x) {
    return {dot_narrow_bytes8(acc.low, codes.low, x.low), dot_narrow_bytes8(acc.high, codes.high, x.high)};
}
static inline __m256i load_pairs8(const int8_t* first, const int8_t* second) {
    const __m256i low = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)first));
    const __m256i high = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)second));
    return _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa);
}
static inline Units load_pairs(const int8_t* first, const int8_t* second) {
    return {load_pairs8(first, second), load_pairs8(first + 8, second + 8)};
}
static inline Ints dot_pairs_in_place(Ints acc, Units pairs, const uint32_t* x) {
    const __m256i unit = _mm256_set1_epi32(int(*x));
    return {_mm256_add_epi32(acc.low, _mm256_madd_epi16(pairs.low, unit)),
            _mm256_add_epi32(acc.high, _mm256_madd_epi16(pairs.high, unit))};
}
template <int kShift, int kMask>
static inline Units field(Units bytes) {
    const __m256i mask = _mm256_set1_epi8(char(kMask));
    if constexpr (kShift == 0) return {_mm256_and_si256(bytes.low, mask), _mm256_and_si256(bytes.high, mask)};
    return {_mm256_and_si256(_mm256_srli_epi16(bytes.low, kShift), mask),
            _mm256_and_si256(_mm256_srli_epi16(bytes.high, kShift), mask)};
}
template <int kShift, int kMask>
static inline __m256i field_over8(__m256i bytes, __m256i lower) {
    const __m256i shifted = kShift < 0 ? _mm256_slli_epi16(bytes, -kShift) : _mm256_srli_epi16(bytes, kShift);
    return _mm256_or_si256(_mm256_and_si256(shifted, _mm256_set1_epi8(char(kMask))), lower);
}
template <int kShift, int kMask>
static inline Units field_over(Units bytes, Units lower) {
    return {field_over8<kShift, kMask>(bytes.low, lower.low), field_over8<kShift, kMask>(bytes.high, lower.high)};
}
static inline Units shift_right(Units bytes, int count) {
    const __m128i by = _mm_cvtsi32_si128(count);
    return {_mm256_srl_epi16(bytes.low, by), _mm256_srl_epi16(bytes.high, by)};
}
static inline Units subtract_from_bytes(Units bytes, int x) {
    const __m256i all = _mm256_set1_epi8(char(x));
    return {_mm256_sub_epi8(bytes.low, all), _mm256_sub_epi8(bytes.high, all)};
}
struct ByteTable {
    __m256i v;
    explicit ByteTable(const uint8_t* bytes) : v(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)bytes))) {}
    Units of(Units codes) const { return {_mm256_shuffle_epi8(v, codes.low), _mm256_shuffle_epi8(v, codes.high)}; }
};
static inline void store_units(uint32_t* p, Units x) {
    _mm256_storeu_si256((__m256i*)p, x.low);
    _mm256_storeu_si256((__m256i*)(p + 8), x.high);
}
static inline Vec load_int8(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
static inline Vec load_uint8(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
static inline Vec load_half(const f16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
static inline Ints to_nearest_ints(Vec x) { return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)}; }
static inline void store_int8(int8_t* p, Ints x) {
    const __m256i pairs = _mm256_packs_epi32(x.low, x.high);  // of each half of 128 bits: four of x.low, four of x.high
    const __m256i ordered = _mm256_permute4x64_epi64(pairs, 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
}
static inline Vec magnitude(Vec x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
}
static inline __m256 larger_bits8(__m256 a, __m256 b) {
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
static inline Vec larger_bits(Vec a, Vec b) { return {larger_bits8(a.low, b.low), larger_bits8(a.high, b.high)}; }

#else

struct Ints {
    Int4 part[4];
};

static inline Ints splat_int(int32_t x) {
    const Int4 part = {x, x, x, x};
    return {{part, part, part, part}};
}
static inline Ints load_ints(const int32_t* p) {
    Ints x;
    memcpy(&x, p, sizeof x);
    return x;
}
static inline Ints operator+(Ints a, Ints b) {
    for (int i = 0; i < 4; ++i) a.part[i] += b.part[i];
    return a;
}
static inline Vec to_vec(Ints x) {
    Vec result;
    for (int i = 0; i < 4; ++i) result.part[i] = __builtin_convertvector(x.part[i], Float4);
    return result;
}
static inline Ints dot_bytes(Ints acc, Units codes, Units x) {
    for (int i = 0; i < 4; ++i)
        for (int byte = 0; byte < 4; ++byte)
            acc.part[i] += (Int4)((codes.part[i] >> (8 * byte)) & 255u) * ((Int4)(x.part[i] << (24 - 8 * byte)) >> 24);
    return acc;
}
static inline Units load_pairs(const int8_t* first, const int8_t* second) {
    Units pairs;
    for (int i = 0; i < 16; ++i) pairs.part[i / 4][i % 4] = uint16_t(first[i]) | uint32_t(uint16_t(second[i])) << 16;
    return pairs;
}
static inline Ints dot_pairs_in_place(Ints acc, Units pairs, const uint32_t* x) {
    for (int i = 0; i < 4; ++i)
        acc.part[i] += ((Int4)(pairs.part[i] << 16) >> 16) * int32_t(int16_t(*x)) + ((Int4)pairs.part[i] >> 16) * (int32_t(*x) >> 16);
    return acc;
}
template <int kShift, int kMask>
static inline Units field(Units bytes) {
    for (int i = 0; i < 4; ++i) bytes.part[i] = (bytes.part[i] >> kShift) & (uint32_t(kMask) * 0x01010101u);
    return bytes;
}
template <int kShift, int kMask>
static inline Units field_over(Units bytes, Units lower) {
    constexpr int kLeft = kShift < 0 ? -kShift : 0, kRight = kShift < 0 ? 0 : kShift;
    for (int i = 0; i < 4; ++i) lower.part[i] |= (bytes.part[i] << kLeft >> kRight) & (uint32_t(kMask) * 0x01010101u);
    return lower;
}
static inline Units subtract_from_bytes(Units bytes, int x) {
    uint8_t lanes[64];
    memcpy(lanes, &bytes, sizeof lanes);
    for (uint8_t& lane : lanes) lane = uint8_t(lane - x);
    memcpy(&bytes, lanes, sizeof lanes);
    return bytes;
}
static inline Units shift_right(Units bytes, int count) {
    for (int i = 0; i < 4; ++i) bytes.part[i] >>= count;
    return bytes;
}
struct ByteTable {
    uint8_t bytes[16];
    explicit ByteTable(const uint8_t* from) { memcpy(bytes, from, sizeof bytes); }
    Units of(Units codes) const {
        uint8_t lanes[64];
        memcpy(lanes, &codes, sizeof lanes);
        for (uint8_t& lane : lanes) lane = bytes[lane & 15];
        memcpy(&codes, lanes, sizeof lanes);
        return codes;
    }
};
static inline void store_units(uint32_t* p, Units x) { memcpy(p, &x, sizeof x); }
template <class T>
static inline Vec load_whole(const T* p) {
    float lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = float(p[i]);
    return load(lanes);
}
static inline Vec load_int8(const int8_t* p) { return load_whole(p); }
static inline Vec load_uint8(const uint8_t* p) { return load_whole(p); }
static inline Vec load_half(const f16_t* p) {
    float lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = f32_of_f16(p[i]);
    return load(lanes);
}
static inline Ints to_nearest_ints(Vec x) {
    const Vec whole = round_nearest(x);
    Ints result;
    for (int i = 0; i < 4; ++i) result.part[i] = __builtin_convertvector(whole.part[i], Int4);
    return result;
}
static inline void store_int8(int8_t* p, Ints x) {
    for (int i = 0; i < 16; ++i) p[i] = int8_t(x.part[i / 4][i % 4]);
}
static inline Vec magnitude(Vec x) {
    for (int i = 0; i < 4; ++i) x.part[i] = (Float4)((Uint4)x.part[i] & 0x7fffffffu);
    return x;
}
static inline Vec larger_bits(Vec a, Vec b) {
    for (int i = 0; i < 4; ++i) a.part[i] = (Uint4)a.part[i] > (Uint4)b.part[i] ? a.part[i] : b.part[i];
    return a;
}

#endif

}  // namespace penstock::PENSTOCK_ISA
