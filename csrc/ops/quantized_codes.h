// Reading the codes of a packed step, unit by unit (src/penstock/kernels/quantized.py describes the planes).
#pragma once

#include "ops/quantized.h"
#include "ops/quantized_simd.h"

namespace penstock::PENSTOCK_ISA {

constexpr int kVectorBytes = 64;

static inline Units load_vector(const char* codes, int64_t vector) {
    return load_units(reinterpret_cast<const uint32_t*>(codes + vector * kVectorBytes));
}

// Unit u of a plane of kBits (1, 2, 4), where u % (8 / kBits) == kPlace.
template <int kBits, int kPlace>
static inline Units plane_unit(const char* plane, int64_t unit) {
    return field<kPlace * kBits, (1 << kBits) - 1>(load_vector(plane, unit * kBits / 8));
}

// `lower`, and above its kTo bits what plane_unit gives.
template <int kBits, int kPlace, int kTo>
static inline Units plane_over(Units plane, Units lower) {
    return field_over<kPlace * kBits - kTo, ((1 << kBits) - 1) << kTo>(plane, lower);
}

// Eight units, from unit u on (a multiple of 8), of codes of kBits: f(j, unit u + j).
template <int kBits, class Function>
static inline void for_each_of_8(const char* codes, int64_t u, Function f) {
    const char* from = codes + u / 8 * kBits * kVectorBytes;
    const auto one = [&]<int j>() {
        if constexpr (kBits == 8)
            f(j, load_vector(from, j));
        else if constexpr (kBits == 4 || kBits == 2)
            f(j, plane_unit<kBits, j % (8 / kBits)>(from, j));
        else if constexpr (kBits == 6)
            f(j, plane_over<2, j % 4, 4>(load_vector(from, j / 4 * 3 + 2),
                                         plane_unit<4, j % 2>(from + j / 4 * 3 * kVectorBytes, j % 4)));
        else if constexpr (kBits == 5)
            f(j, plane_over<1, j, 4>(load_vector(from, 4), plane_unit<4, j % 2>(from, j)));
        else
            f(j, plane_over<1, j, 2>(load_vector(from, 2), plane_unit<2, j % 4>(from, j)));
    };
    one.template operator()<0>();
    one.template operator()<1>();
    one.template operator()<2>();
    one.template operator()<3>();
    one.template operator()<4>();
    one.template operator()<5>();
    one.template operator()<6>();
    one.template operator()<7>();
}

// A step's codes as bytes, a vector of 64 a unit; kSigned: less the layout's offset.
template <int kBits, bool kSigned>
static inline void expand_bits(const WeightLayout& layout, const char* codes, char* bytes) {
    const auto write = [&](int64_t unit, Units value) {
        if constexpr (kSigned) value = subtract_from_bytes(value, layout.offset);
        store_units(reinterpret_cast<uint32_t*>(bytes + unit * kVectorBytes), value);
    };
    if (layout.table == nullptr) {
        for (int64_t u = 0; u < layout.step / 4; u += 8)
            for_each_of_8<kBits>(codes, u, [&](int j, Units value) { write(u + j, value); });
        return;
    }
    const ByteTable table(static_cast<const uint8_t*>(layout.table));
    for (int64_t u = 0; u < layout.step / 4; u += 8)
        for_each_of_8<kBits>(codes, u, [&](int j, Units value) { write(u + j, table.of(value)); });
}

template <bool kSigned = false>
static inline void expand_step(const WeightLayout& layout, const char* codes, char* bytes) {
    switch (layout.bits) {
        case 2: return expand_bits<2, kSigned>(layout, codes, bytes);
        case 3: return expand_bits<3, kSigned>(layout, codes, bytes);
        case 4: return expand_bits<4, kSigned>(layout, codes, bytes);
        case 5: return expand_bits<5, kSigned>(layout, codes, bytes);
        case 6: return expand_bits<6, kSigned>(layout, codes, bytes);
        default: return expand_bits<8, kSigned>(layout, codes, bytes);
    }
}

// The place of the group's 16 values of a header part that begins at `at`.
static inline Vec load_scales(ScaleKind kind, const char* at, int group) {
    switch (kind) {
        case ScaleKind::f16: return load_half(reinterpret_cast<const f16_t*>(at) + group * kLanes);
        case ScaleKind::bf16: return load(reinterpret_cast<const bf16_t*>(at) + group * kLanes);
        case ScaleKind::f32: return load(reinterpret_cast<const float*>(at) + group * kLanes);
        default: return load_int8(reinterpret_cast<const int8_t*>(at) + group * kLanes);
    }
}
static inline int64_t scale_bytes(ScaleKind kind) { return kind == ScaleKind::super ? 1 : kind == ScaleKind::f32 ? 4 : 2; }

// The header of a step: scales of its groups, and minimums where there are any, for 16 outputs.
struct StepHeader {
    StepHeader() = default;
    StepHeader(const WeightLayout& layout, const char* header)
        : StepHeader(layout.scales, layout.minimums, layout.step / layout.group_size, header) {}
    StepHeader(ScaleKind scales_kind, MinimumKind minimums_kind, int groups, const char* header)
        : scales(scales_kind), minimums(minimums_kind) {
        at = header;
        if (scales == ScaleKind::super) {
            super = load_half(reinterpret_cast<const f16_t*>(at));
            at += kLanes * sizeof(f16_t);
            if (minimums == MinimumKind::own) {
                super_minimum = load_half(reinterpret_cast<const f16_t*>(at));
                at += kLanes * sizeof(f16_t);
            }
        }
        minimums_at = at + groups * kLanes * scale_bytes(scales);
    }
    Vec scale(int group) const {
        const Vec scale = load_scales(scales, at, group);
        return scales == ScaleKind::super ? super * scale : scale;
    }
    Vec minimum(int group, Vec its_scale) const {
        if (minimums == MinimumKind::point)
            return (zero() - its_scale) * load_uint8(reinterpret_cast<const uint8_t*>(minimums_at) + group * kLanes);
        const Vec minimum = load_scales(scales, minimums_at, group);
        return scales == ScaleKind::super ? super_minimum * minimum : minimum;
    }

    // Of two groups, where minimums are whole.
    Units minimum_pair(int pair) const {
        const auto* from = reinterpret_cast<const int8_t*>(minimums_at) + pair * 2 * kLanes;
        return load_pairs(from, from + kLanes);
    }

    ScaleKind scales;
    MinimumKind minimums;
    Vec super = splat(1.0f), super_minimum = splat(1.0f);
    const char *at, *minimums_at;
};

// The scales of steps, and their minimums if there are any, in f32: [steps][groups][16] each. The kinds are the layout's,
// known when this is compiled: made one by one at run time, they were an eighth of the work where 8 rows share them.
template <ScaleKind kScales, MinimumKind kMinimums>
[[gnu::flatten]] static void expand_headers_of(const WeightLayout& layout, const char* header, int64_t steps, float* scales,
                              float* minimums) {
    const int groups = layout.step / layout.group_size;
    for (int64_t step = 0; step < steps; ++step, header += layout.step_bytes) {
        const StepHeader values(kScales, kMinimums, groups, header);
        for (int g = 0; g < groups; ++g, scales += kLanes, minimums += kLanes) {
            const Vec scale = values.scale(g);
            store(scales, scale);
            if constexpr (kMinimums != MinimumKind::none) store(minimums, values.minimum(g, scale));
        }
    }
}

template <ScaleKind kScales>
static inline void expand_headers_of(const WeightLayout& layout, const char* header, int64_t steps, float* scales,
                                     float* minimums) {
    switch (layout.minimums) {
        case MinimumKind::none:
            return expand_headers_of<kScales, MinimumKind::none>(layout, header, steps, scales, minimums);
        case MinimumKind::own:
            return expand_headers_of<kScales, MinimumKind::own>(layout, header, steps, scales, minimums);
        case MinimumKind::point:
            return expand_headers_of<kScales, MinimumKind::point>(layout, header, steps, scales, minimums);
    }
}

static inline void expand_headers(const WeightLayout& layout, const char* header, int64_t steps, float* scales,
                                  float* minimums) {
    switch (layout.scales) {
        case ScaleKind::f16: return expand_headers_of<ScaleKind::f16>(layout, header, steps, scales, minimums);
        case ScaleKind::bf16: return expand_headers_of<ScaleKind::bf16>(layout, header, steps, scales, minimums);
        case ScaleKind::f32: return expand_headers_of<ScaleKind::f32>(layout, header, steps, scales, minimums);
        case ScaleKind::super: return expand_headers_of<ScaleKind::super>(layout, header, steps, scales, minimums);
    }
}

// Whether a step's minimums are whole numbers with one scale: their products with sums of 8-bit x are exact then. Block
// kernels take those of 8 groups at once.
static inline bool has_whole_minimums(const WeightLayout& layout) {
    return !layout.is_float && layout.bits < 8 && layout.scales == ScaleKind::super && layout.minimums == MinimumKind::own &&
           layout.step % (8 * layout.group_size) == 0;
}

// Then: scales as above, and of each step units of two groups' minimums in 16 bits, and what they are scaled with,
// [steps][groups / 2 + 1][16].
static inline void expand_whole_minimums(const WeightLayout& layout, const char* header, int64_t steps, float* scales,
                                         float* minimums) {
    const int groups = layout.step / layout.group_size;
    for (int64_t step = 0; step < steps; ++step, header += layout.step_bytes) {
        const StepHeader values(ScaleKind::super, MinimumKind::own, groups, header);
        for (int g = 0; g < groups; ++g, scales += kLanes) store(scales, values.scale(g));
        for (int pair = 0; pair < groups / 2; ++pair, minimums += kLanes)
            store_units(reinterpret_cast<uint32_t*>(minimums), values.minimum_pair(pair));
        store(minimums, values.super_minimum);
        minimums += kLanes;
    }
}

// ---- the "float" family: a unit is two codes of each of 16 lanes, of one f32 it is one

static inline bool is_fp8(const WeightLayout& layout) {
    return layout.bits == 8 && layout.offset == 0 && layout.minimums == MinimumKind::none;
}

// The code of input i of a step for one of its columns.
static inline int float_code(const WeightLayout& layout, const char* codes, int i, int column) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(codes);
    if (layout.bits == 8) return bytes[(i / 2 * kLanes + column) * 2 + i % 2];
    const int place = i / 2 % 4;
    const uint8_t byte = bytes[i / 8 * kVectorBytes + column * 4 + i % 2 * 2 + place / 2];
    return byte >> (place % 2 * 4) & 15;
}

template <class Elem>
static inline void expand_one_by_one(const WeightLayout& layout, const char* codes, char* units) {
    const auto* table = static_cast<const typename Elem::Storage*>(layout.table);
    auto* to = reinterpret_cast<typename Elem::Storage*>(units);
    for (int i = 0; i < layout.step; i += Elem::kPerUnit)
        for (int column = 0; column < kLanes; ++column)
            for (int part = 0; part < Elem::kPerUnit; ++part) *to++ = table[float_code(layout, codes, i + part, column)];
}

template <class Elem>
static inline void expand_floats(const WeightLayout& layout, const char* codes, char* units) {
    expand_one_by_one<Elem>(layout, codes, units);
}

#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX512

// The values of 4-bit codes, twice, so that the lowest bit of the next code in a word does not matter.
struct NibbleTable {
    __m512i v;
    explicit NibbleTable(const void* values)
        : v(_mm512_broadcast_i64x4(_mm256_loadu_si256(static_cast<const __m256i*>(values)))) {}
    template <int kPlace>
    Units of(Units words) const {
        const __m512i index = kPlace == 0 ? words.v : _mm512_srli_epi16(words.v, 4 * kPlace);
        return {_mm512_permutexvar_epi16(index, v)};
    }
};

// FP8: values of 256 codes whose upper half is the negative of the lower one.
struct Fp8Codes {
    __m512i v[4];
    explicit Fp8Codes(const WeightLayout& layout) {
        for (int i = 0; i < 4; ++i) v[i] = _mm512_loadu_si512(static_cast<const char*>(layout.table) + i * 64);
    }
    // Of a unit, two bytes of each lane.
    Units of(const char* codes) const {
        const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)codes));
        const __mmask32 upper = _mm512_test_epi16_mask(words, _mm512_set1_epi16(64));
        const __m512i low = _mm512_permutex2var_epi16(v[0], words, v[1]);
        const __m512i high = _mm512_permutex2var_epi16(v[2], words, v[3]);
        const __m512i magnitude = _mm512_mask_blend_epi16(upper, low, high);
        // The sign above the magnitude.
        return {_mm512_ternarylogic_epi32(_mm512_slli_epi16(words, 8), _mm512_set1_epi16(short(0x8000)), magnitude, 0xea)};
    }
};

// bf16 of 32 numbers that it holds exactly.
static inline Units bf16_of_exact(__m512 low, __m512 high) {
#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_BF16
    return {(__m512i)_mm512_cvtne2ps_pbh(high, low)};
#else
    const __m256i lower = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(low), 16));
    const __m256i upper = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(high), 16));
    return {_mm512_inserti64x4(_mm512_castsi256_si512(lower), upper, 1)};
#endif
}

// Integers of -128 to 255: code - offset, or with a zero point the code itself.
struct IntegerCodes {
    __m512i offset;
    explicit IntegerCodes(const WeightLayout& layout) : offset(_mm512_set1_epi32(layout.offset)) {}
    Units of(const char* codes) const {
        return bf16_of_exact(eight_lanes(codes), eight_lanes(codes + 16));
    }

private:
    __m512 eight_lanes(const char* codes) const {
        const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes));
        return _mm512_cvtepi32_ps(_mm512_sub_epi32(wide, offset));
    }
};

template <class Codes>
static inline void expand_float_bytes(const WeightLayout& layout, const char* from, uint32_t* to) {
    const Codes codes(layout);
    for (int u = 0; u < layout.step / 2; ++u) store_units(to + u * kLanes, codes.of(from + u * (kVectorBytes / 2)));
}

#elif PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX2

// The values of 4-bit codes, their lower and their upper bytes, for both halves of a vector.
struct NibbleTable {
    __m256i lower, upper;
    explicit NibbleTable(const void* values) {
        alignas(16) char bytes[2][16];
        for (int i = 0; i < 16; ++i)
            for (int part = 0; part < 2; ++part) bytes[part][i] = static_cast<const char*>(values)[2 * i + part];
        lower = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)bytes[0]));
        upper = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)bytes[1]));
    }
    template <int kPlace>
    Units of(Units words) const {
        return {of8<kPlace>(words.low), of8<kPlace>(words.high)};
    }

private:
    // Two places share their bytes, and what is looked up for them.
    template <int kPlace>
    __m256i of8(__m256i words) const {
        const __m256i shifted = kPlace % 2 ? _mm256_srli_epi16(words, 4) : words;
        const __m256i index = _mm256_and_si256(shifted, _mm256_set1_epi8(15));
        const __m256i low = _mm256_shuffle_epi8(lower, index), high = _mm256_shuffle_epi8(upper, index);
        if constexpr (kPlace < 2)
            return _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi16(255)), _mm256_slli_epi16(high, 8));
        else
            return _mm256_or_si256(_mm256_srli_epi16(low, 8), _mm256_and_si256(high, _mm256_set1_epi16(short(0xff00))));
    }
};

// Units of bf16 as f32.
struct Pairs {
    Vec even, odd;
};

// As dot() of the same in bf16.
static inline Vec dot(Bf16, Vec acc, const Pairs& w, Units x) {
    const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(x.low, 16));
    const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(x.low, _mm256_set1_epi32(int(0xffff0000u))));
    return {_mm256_fmadd_ps(w.odd.low, odd, _mm256_fmadd_ps(w.even.low, even, acc.low)),
            _mm256_fmadd_ps(w.odd.high, odd, _mm256_fmadd_ps(w.even.high, even, acc.high))};
}

// Integers of -128 to 255, which are exact in bf16: code - offset, or with a zero point the code itself.
struct IntegerCodes {
    __m256 offset;
    explicit IntegerCodes(const WeightLayout& layout) : offset(_mm256_set1_ps(float(layout.offset))) {}
    // Of a unit, two bytes of each lane.
    Pairs of(const char* codes) const {
        const __m256i low = words8(codes), high = words8(codes + 16), even = _mm256_set1_epi32(0xffff);
        return {{value8(_mm256_and_si256(low, even)), value8(_mm256_and_si256(high, even))},
                {value8(_mm256_srli_epi32(low, 16)), value8(_mm256_srli_epi32(high, 16))}};
    }

private:
    static __m256i words8(const char* codes) { return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)codes)); }
    __m256 value8(__m256i codes) const { return _mm256_sub_ps(_mm256_cvtepi32_ps(codes), offset); }
};

// FP8: exponent and mantissa are moved to where bf16 has them, and a product makes up for the exponents' other zero, also
// where a code is subnormal. What is not finite is given the highest exponent first.
struct Fp8Codes {
    __m128i shift;
    __m256i mask, most;
    __m256 factor;
    explicit Fp8Codes(const WeightLayout& layout) {
        const bool is_e5m2 = static_cast<const bf16_t*>(layout.table)[0x7c] == bf16_t(0x7f80);  // infinity
        shift = _mm_cvtsi32_si128(is_e5m2 ? 5 : 4);
        mask = _mm256_set1_epi16(short(is_e5m2 ? 0x8fe0 : 0x87f0));
        most = _mm256_set1_epi16(short(is_e5m2 ? 0x7b << 5 : 0x7e << 4));
        factor = _mm256_set1_ps(is_e5m2 ? 0x1p112f : 0x1p120f);
    }
    Pairs of(const char* codes) const {
        const __m256i low = words8(codes), high = words8(codes + 16), odd = _mm256_set1_epi32(int(0xffff0000u));
        return {{value8(_mm256_slli_epi32(low, 16)), value8(_mm256_slli_epi32(high, 16))},
                {value8(_mm256_and_si256(low, odd)), value8(_mm256_and_si256(high, odd))}};
    }

private:
    __m256i words8(const char* codes) const {
        const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)codes));
        const __m256i words = _mm256_and_si256(_mm256_sll_epi16(wide, shift), mask);
        const __m256i magnitude = _mm256_and_si256(words, _mm256_set1_epi16(0x7fff));
        const __m256i highest = _mm256_set1_epi16(0x7f80);
        return _mm256_or_si256(words, _mm256_and_si256(_mm256_cmpgt_epi16(magnitude, most), highest));
    }
    __m256 value8(__m256i bits) const { return _mm256_mul_ps(_mm256_castsi256_ps(bits), factor); }
};

template <class Codes>
static inline void expand_float_bytes(const WeightLayout& layout, const char* from, uint32_t* to) {
    const Codes codes(layout);
    const auto bits = [](__m256 even, __m256 odd) {
        return _mm256_or_si256(_mm256_srli_epi32(_mm256_castps_si256(even), 16), _mm256_castps_si256(odd));
    };
    for (int u = 0; u < layout.step / 2; ++u, to += kLanes) {
        const Pairs unit = codes.of(from + u * (kVectorBytes / 2));
        store_units(to, {bits(unit.even.low, unit.odd.low), bits(unit.even.high, unit.odd.high)});
    }
}

#endif
#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX2

template <>
inline void expand_floats<Bf16>(const WeightLayout& layout, const char* codes, char* units) {
    auto* to = reinterpret_cast<uint32_t*>(units);
    if (layout.bits == 4) {
        const NibbleTable table(layout.table);
        for (int v = 0; v < layout.step / 8; ++v, to += 4 * kLanes) {
            const Units words = load_vector(codes, v);
            store_units(to, table.of<0>(words));
            store_units(to + kLanes, table.of<1>(words));
            store_units(to + 2 * kLanes, table.of<2>(words));
            store_units(to + 3 * kLanes, table.of<3>(words));
        }
        return;
    }
    is_fp8(layout) ? expand_float_bytes<Fp8Codes>(layout, codes, to) : expand_float_bytes<IntegerCodes>(layout, codes, to);
}

#endif

}  // namespace penstock::PENSTOCK_ISA
