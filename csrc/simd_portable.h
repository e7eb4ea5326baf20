// Sixteen lanes as four 128-bit vectors of the compiler, for any processor. Included by simd.h, which documents the
// functions. There may be no fused multiply-add here, so `fma` rounds twice: the results of this instruction set differ
// from the others' in the last bits, as theirs do among themselves.
#pragma once

namespace penstock::PENSTOCK_ISA {

constexpr int kAccumulators = 4;

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef uint32_t Uint4 __attribute__((vector_size(16)));

struct Vec {
    Float4 part[4];
    float lane(int i) const { return part[i / 4][i % 4]; }
};
struct Units {
    Uint4 part[4];
};

#define PENSTOCK_PARTS(expression)              \
    Vec result;                                 \
    for (int i = 0; i < 4; ++i) {               \
        result.part[i] = (expression);          \
    }                                           \
    return result

static inline Vec splat(float x) { PENSTOCK_PARTS((Float4{x, x, x, x})); }
static inline Vec zero() { return splat(0.0f); }
static inline Vec load(const float* p) {
    Vec result;
    memcpy(&result, p, sizeof result);
    return result;
}
static inline Vec load_n(const float* p, int n) {
    Vec result = zero();
    memcpy(&result, p, size_t(n) * sizeof(float));
    return result;
}
static inline Vec load_n(const bf16_t* p, int n) {
    float lanes[16] = {};
    for (int i = 0; i < n; ++i) lanes[i] = to_f32(p[i]);
    return load(lanes);
}
static inline Vec load(const bf16_t* p) { return load_n(p, 16); }
static inline void store(float* p, Vec x) { memcpy(p, &x, sizeof x); }
static inline void store_n(float* p, Vec x, int n) { memcpy(p, &x, size_t(n) * sizeof(float)); }
static inline void store_n(bf16_t* p, Vec x, int n) {
    for (int i = 0; i < n; ++i) p[i] = to_bf16(x.lane(i));
}
static inline void store(bf16_t* p, Vec x) { store_n(p, x, 16); }

static inline Vec round_bf16(Vec x) {
    bf16_t rounded[16];
    store(rounded, x);
    return load(rounded);
}

static inline Vec operator+(Vec a, Vec b) { PENSTOCK_PARTS(a.part[i] + b.part[i]); }
static inline Vec operator-(Vec a, Vec b) { PENSTOCK_PARTS(a.part[i] - b.part[i]); }
static inline Vec operator*(Vec a, Vec b) { PENSTOCK_PARTS(a.part[i] * b.part[i]); }
static inline Vec operator/(Vec a, Vec b) { PENSTOCK_PARTS(a.part[i] / b.part[i]); }
static inline Vec fma(Vec a, Vec b, Vec c) { PENSTOCK_PARTS(a.part[i] * b.part[i] + c.part[i]); }

static inline Float4 choose(Int4 mask, Float4 yes, Float4 no) {
    return (Float4)((mask & (Int4)yes) | (~mask & (Int4)no));
}
// Where either is NaN, the second operand.
static inline Vec max(Vec a, Vec b) { PENSTOCK_PARTS(choose(a.part[i] > b.part[i], a.part[i], b.part[i])); }
static inline Vec min(Vec a, Vec b) { PENSTOCK_PARTS(choose(a.part[i] < b.part[i], a.part[i], b.part[i])); }
static inline Float4 round4(Float4 x) {
    // Adding and taking away 1.5 * 2^23 rounds to nearest even; larger magnitudes (and NaN) are whole already.
    const Float4 magic = {12582912.0f, 12582912.0f, 12582912.0f, 12582912.0f};
    const Int4 in_range = (x < 4194304.0f) & (x > -4194304.0f);
    return choose(in_range, (x + magic) - magic, x);
}
static inline Vec round_nearest(Vec x) { PENSTOCK_PARTS(round4(x.part[i])); }
static inline Float4 scale4(Float4 p, Float4 n) {
    // 2^n in two factors: 2^128 alone has no f32.
    const Int4 in_range = (n >= -126.0f) & (n <= 200.0f);
    const Float4 above = choose(n > 200.0f, Float4{200.0f, 200.0f, 200.0f, 200.0f}, Float4{});
    const Int4 whole = __builtin_convertvector(choose(in_range, n, above), Int4);
    const Int4 half = whole >> 1;
    const Float4 first = (Float4)((half + 127) << 23);
    const Float4 second = (Float4)((whole - half + 127) << 23);
    return choose(n < -126.0f, Float4{}, p * first * second);
}
static inline Vec scale_by_power(Vec p, Vec n) { PENSTOCK_PARTS(scale4(p.part[i], n.part[i])); }
static inline Vec scale_down(Vec p, Vec n) { return scale_by_power(p, n); }

static inline float reduce_sum(Vec x) {
    const Float4 four = (x.part[0] + x.part[1]) + (x.part[2] + x.part[3]);
    return (four[0] + four[2]) + (four[1] + four[3]);
}
static inline float reduce_max(Vec x) {
    float most = x.lane(0);
    for (int i = 1; i < 16; ++i) most = x.lane(i) > most ? x.lane(i) : most;
    return most;
}

// x in lanes [begin, end), `fill` in the others.
static inline Vec select_lanes(Vec x, int begin, int end, float fill) {
    float lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = i >= begin && i < end ? x.lane(i) : fill;
    return load(lanes);
}

// A bit per lane.
static inline uint32_t mask_greater(Vec a, Vec b) {
    uint32_t mask = 0;
    for (int i = 0; i < 16; ++i) mask |= uint32_t(a.lane(i) > b.lane(i)) << i;
    return mask;
}
static inline uint32_t mask_greater_equal(Vec a, Vec b) {
    uint32_t mask = 0;
    for (int i = 0; i < 16; ++i) mask |= uint32_t(a.lane(i) >= b.lane(i)) << i;
    return mask;
}
static inline uint32_t mask_nan(Vec a) {
    uint32_t mask = 0;
    for (int i = 0; i < 16; ++i) mask |= uint32_t(a.lane(i) != a.lane(i)) << i;
    return mask;
}
static inline Vec keep_where(uint32_t mask, Vec x) {
    float lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = (mask >> i) & 1 ? x.lane(i) : 0.0f;
    return load(lanes);
}

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
    double lanes[16] = {};
    void add(Vec x) {
        for (int i = 0; i < 16; ++i) lanes[i] += double(x.lane(i));
    }
    double total() const {
        double sum = 0.0;
        for (double lane : lanes) sum += lane;
        return sum;
    }
};

static inline Units load_units(const uint32_t* p) {
    Units result;
    memcpy(&result, p, sizeof result);
    return result;
}
static inline Units load_units_n(const uint32_t* p, int n) {
    Units result = {};
    memcpy(&result, p, size_t(n) * sizeof(uint32_t));
    return result;
}
static inline Units splat_unit(const uint32_t* p) {
    uint32_t unit;
    memcpy(&unit, p, sizeof unit);
    const Uint4 part = {unit, unit, unit, unit};
    return {{part, part, part, part}};
}

static inline Vec dot(F32, Vec acc, Units a, Units b) {
    PENSTOCK_PARTS((Float4)a.part[i] * (Float4)b.part[i] + acc.part[i]);
}
static inline Vec dot(Bf16, Vec acc, Units a, Units b) {
    // The lower element first, then the upper: the order of the pair.
    PENSTOCK_PARTS((Float4)(a.part[i] & 0xffff0000u) * (Float4)(b.part[i] & 0xffff0000u) +
                   ((Float4)(a.part[i] << 16) * (Float4)(b.part[i] << 16) + acc.part[i]));
}

#undef PENSTOCK_PARTS

}  // namespace penstock::PENSTOCK_ISA
