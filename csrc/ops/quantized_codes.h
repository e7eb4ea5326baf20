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
            f(j, join<4>(plane_unit<2, j % 4>(from + (j / 4 * 3 + 2) * kVectorBytes, 0),
                         plane_unit<4, j % 2>(from + j / 4 * 3 * kVectorBytes, j % 4)));
        else if constexpr (kBits == 5)
            f(j, join<4>(plane_unit<1, j>(from + 4 * kVectorBytes, 0), plane_unit<4, j % 2>(from, j)));
        else
            f(j, join<2>(plane_unit<1, j>(from + 2 * kVectorBytes, 0), plane_unit<2, j % 4>(from, j)));
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
    StepHeader(const WeightLayout& layout, const char* header) : scales(layout.scales), minimums(layout.minimums) {
        at = header;
        if (scales == ScaleKind::super) {
            super = load_half(reinterpret_cast<const f16_t*>(at));
            at += kLanes * sizeof(f16_t);
            if (minimums == MinimumKind::own) {
                super_minimum = load_half(reinterpret_cast<const f16_t*>(at));
                at += kLanes * sizeof(f16_t);
            }
        }
        minimums_at = at + layout.step / layout.group_size * kLanes * scale_bytes(scales);
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

    ScaleKind scales;
    MinimumKind minimums;
    Vec super = splat(1.0f), super_minimum = splat(1.0f);
    const char *at, *minimums_at;
};

// A step's scales, and its minimums if there are any, in f32: [groups][16] each.
static inline void expand_header(const WeightLayout& layout, const char* header, float* scales, float* minimums) {
    const StepHeader values(layout, header);
    for (int g = 0; g < layout.step / layout.group_size; ++g) {
        const Vec scale = values.scale(g);
        store(scales + g * kLanes, scale);
        if (layout.minimums != MinimumKind::none) store(minimums + g * kLanes, values.minimum(g, scale));
    }
}

// ---- the "float" family: a unit is two codes of each of 16 lanes, of one f32 it is one

// Inputs of a vector of 64 bytes.
static inline int float_inputs(const WeightLayout& layout) { return layout.bits == 4 ? 8 : 2; }

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

// Values of 256 codes whose upper half is the negative of the lower one, as FP8's is.
struct SignedTable {
    __m512i v[4];
    explicit SignedTable(const void* values) {
        for (int i = 0; i < 4; ++i) v[i] = _mm512_loadu_si512(static_cast<const char*>(values) + i * 64);
    }
    Units of(__m256i codes) const {
        const __m512i words = _mm512_cvtepu8_epi16(codes);
        const __mmask32 upper = _mm512_test_epi16_mask(words, _mm512_set1_epi16(64));
        const __m512i low = _mm512_permutex2var_epi16(v[0], words, v[1]);
        const __m512i high = _mm512_permutex2var_epi16(v[2], words, v[3]);
        const __m512i sign = _mm512_slli_epi16(_mm512_srli_epi16(words, 7), 15);
        return {_mm512_or_si512(sign, _mm512_mask_blend_epi16(upper, low, high))};
    }
};

// Integers of -128 to 255, exact in bf16.
static inline Units bf16_of_int16(__m512i words) {
    const __m512 odd = _mm512_cvtepi32_ps(_mm512_srai_epi32(words, 16));
    const __m512 even = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, 16), 16));
    const __m512i upper = _mm512_and_si512(_mm512_castps_si512(odd), _mm512_set1_epi32(int(0xffff0000u)));
    return {_mm512_or_si512(upper, _mm512_srli_epi32(_mm512_castps_si512(even), 16))};
}

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
    const auto* pairs = reinterpret_cast<const __m256i*>(codes);
    if (layout.offset == 0 && layout.minimums == MinimumKind::none) {
        const SignedTable table(layout.table);
        for (int u = 0; u < layout.step / 2; ++u, to += kLanes) store_units(to, table.of(_mm256_loadu_si256(pairs + u)));
        return;
    }
    // Integers: code - offset; with a zero point the code itself, which the minimum moves.
    const __m512i offset = _mm512_set1_epi16(short(layout.offset));
    for (int u = 0; u < layout.step / 2; ++u, to += kLanes)
        store_units(to, bf16_of_int16(_mm512_sub_epi16(_mm512_cvtepu8_epi16(_mm256_loadu_si256(pairs + u)), offset)));
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
    // Of the lowest four bits of each word.
    __m256i of(__m256i words) const {
        const __m256i index = _mm256_and_si256(words, _mm256_set1_epi16(15));
        // A byte of an index whose highest bit is set gives zero.
        const __m256i low = _mm256_shuffle_epi8(lower, _mm256_or_si256(index, _mm256_set1_epi16(short(0x8000))));
        const __m256i high =
            _mm256_shuffle_epi8(upper, _mm256_or_si256(_mm256_slli_epi16(index, 8), _mm256_set1_epi16(0x80)));
        return _mm256_or_si256(low, high);
    }
};

// Integers of -128 to 255, exact in bf16.
static inline __m256i bf16_of_int16(__m256i words) {
    const __m256 odd = _mm256_cvtepi32_ps(_mm256_srai_epi32(words, 16));
    const __m256 even = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, 16), 16));
    const __m256i upper = _mm256_and_si256(_mm256_castps_si256(odd), _mm256_set1_epi32(int(0xffff0000u)));
    return _mm256_or_si256(upper, _mm256_srli_epi32(_mm256_castps_si256(even), 16));
}

template <>
inline void expand_floats<Bf16>(const WeightLayout& layout, const char* codes, char* units) {
    const auto* from = reinterpret_cast<const __m128i*>(codes);
    auto* to = reinterpret_cast<__m256i*>(units);
    if (layout.bits == 4) {
        const NibbleTable table(layout.table);
        for (int v = 0; v < layout.step / 8; ++v, to += 8)
            for (int half = 0; half < 2; ++half) {
                const __m256i words = _mm256_loadu_si256((const __m256i*)(codes + v * kVectorBytes) + half);
                _mm256_storeu_si256(to + half, table.of(words));
                _mm256_storeu_si256(to + 2 + half, table.of(_mm256_srli_epi16(words, 4)));
                _mm256_storeu_si256(to + 4 + half, table.of(_mm256_srli_epi16(words, 8)));
                _mm256_storeu_si256(to + 6 + half, table.of(_mm256_srli_epi16(words, 12)));
            }
        return;
    }
    if (layout.offset == 0 && layout.minimums == MinimumKind::none)  // FP8
        return expand_one_by_one<Bf16>(layout, codes, units);
    // Integers: code - offset; with a zero point the code itself, which the minimum moves.
    const __m256i offset = _mm256_set1_epi16(short(layout.offset));
    for (int i = 0; i < layout.step; ++i, ++from, ++to)
        _mm256_storeu_si256(to, bf16_of_int16(_mm256_sub_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(from)), offset)));
}

#endif

}  // namespace penstock::PENSTOCK_ISA
