// Packing is a transposition of 16 x 16 units (one f32, or a pair of bf16), with a conversion on the way. Loading a
// checkpoint is this, so it has to run at the speed of the memory.
#include "ops/linear_pack.h"

#include "division.h"
#include "simd.h"
#include "threads.h"

namespace penstock::PENSTOCK_ISA {

namespace {

constexpr int kTile = 16;                    // rows of a tile, and units that are transposed at a time
constexpr int64_t kMinBytesPerThread = 100'000;

struct F16 {
    using Storage = f16_t;
};

Vec load_f16(const f16_t* p, int n) {
#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX512
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))};
#else
    float lanes[16] = {};
    for (int i = 0; i < n; ++i) {
#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX2
        lanes[i] = _cvtsh_ss(p[i]);
#else
        lanes[i] = f32_of_f16(p[i]);
#endif
    }
    return load(lanes);
#endif
}

Vec load_source(F32, const float* p, int n) { return load_n(p, n); }
Vec load_source(Bf16, const bf16_t* p, int n) { return load_n(p, n); }
Vec load_source(F16, const f16_t* p, int n) { return load_f16(p, n); }

// 16 units of a row, of which the source has `elements`; the rest is zero.
template <class Source, class Elem>
void convert_units(const typename Source::Storage* source, int elements, uint32_t* units) {
    auto* to = reinterpret_cast<typename Elem::Storage*>(units);
    for (int i = 0; i < Elem::kPerUnit; ++i) {
        const int rest = elements - i * 16;
        store(to + i * 16, rest > 0 ? load_source(Source{}, source + i * 16, rest < 16 ? rest : 16) : zero());
    }
}

template <>
void convert_units<Bf16, Bf16>(const bf16_t* source, int elements, uint32_t* units) {
    if (elements < 2 * kTile) memset(units, 0, kTile * sizeof(uint32_t));
    memcpy(units, source, size_t(elements < 2 * kTile ? elements : 2 * kTile) * sizeof(bf16_t));
}

#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX512

// block[row][unit] -> packed[unit][row]; stored past the caches, since nothing reads it soon.
void transpose(const uint32_t (&block)[kTile][kTile], uint32_t* packed, int units) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_load_si512(block[i]);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // a[4g + c] holds, in its 128-bit part p, unit 4p + c of rows 4g to 4g + 3.
    for (int c = 0; c < 4; ++c) {
        const __m512i low01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88), high01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
        const __m512i low23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
        const __m512i high23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
        b[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
        b[8 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        b[4 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
        b[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
    for (int i = 0; i < units; ++i) _mm512_stream_si512(reinterpret_cast<__m512i*>(packed + i * kTile), b[i]);
}

#else

void transpose(const uint32_t (&block)[kTile][kTile], uint32_t* packed, int units) {
    for (int unit = 0; unit < units; ++unit)
        for (int row = 0; row < kTile; ++row) packed[unit * kTile + row] = block[row][unit];
}

#endif

// Rows [first, first + rows) of a tile of 16.
template <class Source, class Elem>
void pack_tile(const typename Source::Storage* source, int64_t k, int first, int rows, uint32_t* packed) {
    const int64_t all_units = ceil_div(k, Elem::kPerUnit);
    alignas(64) uint32_t block[kTile][kTile] = {};
    for (int64_t unit = 0; unit < all_units; unit += kTile) {
        const int64_t element = unit * Elem::kPerUnit;
        const int elements = int(k - element < kTile * Elem::kPerUnit ? k - element : kTile * Elem::kPerUnit);
        const int units = int(all_units - unit < kTile ? all_units - unit : kTile);
        for (int row = 0; row < rows; ++row)
            convert_units<Source, Elem>(source + row * k + element, elements, block[row]);
        uint32_t* to = packed + unit * kTile;
        if (rows == kTile) {
            transpose(block, to, units);
            continue;
        }
        for (int i = 0; i < units; ++i)
            for (int row = 0; row < rows; ++row) to[i * kTile + first + row] = block[row][i];
    }
}

template <class Source, class Elem>
void pack_rows(const PackArgs& args) {
    using T = typename Source::Storage;
    const int64_t units = ceil_div(args.k, Elem::kPerUnit);
    const int64_t end_row = args.first_row + args.rows;
    const int64_t first_tile = args.first_row / kTile, end_tile = ceil_div(end_row, kTile);
    const int threads = threads_for(args.rows * units * 4, kMinBytesPerThread, args.num_threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t tile = first_tile; tile < end_tile; ++tile) {
        const int64_t begin = tile * kTile > args.first_row ? tile * kTile : args.first_row;
        const int64_t end = (tile + 1) * kTile < end_row ? (tile + 1) * kTile : end_row;
        pack_tile<Source, Elem>(static_cast<const T*>(args.source) + (begin - args.first_row) * args.k, args.k,
                                int(begin % kTile), int(end - begin),
                                static_cast<uint32_t*>(args.packed) + tile * units * kTile);
#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX512
        _mm_sfence();
#endif
    }
}

template <class Elem>
void pack_to(const PackArgs& args) {
    switch (args.source_dtype) {
        case DType::f32: return pack_rows<F32, Elem>(args);
        case DType::bf16: return pack_rows<Bf16, Elem>(args);
        default: return pack_rows<F16, Elem>(args);
    }
}

template <class Elem>
void gather_rows(const EmbeddingArgs& args) {
    using T = typename Elem::Storage;
    const int64_t whole_units = args.k / Elem::kPerUnit, rest = args.k % Elem::kPerUnit;
    const int64_t units = whole_units + (rest > 0);
    // Each unit gathered costs a cache line.
    const int threads = threads_for(args.tokens * units * 64, kMinBytesPerThread, args.num_threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t token = 0; token < args.tokens; ++token) {
        const int64_t row = args.ids[token];
        const uint32_t* from = static_cast<const uint32_t*>(args.weight) + row / kTile * units * kTile + row % kTile;
        T* to = static_cast<T*>(args.out) + token * args.k;
        for (int64_t unit = 0; unit < whole_units; ++unit)
            memcpy(to + unit * Elem::kPerUnit, from + unit * kTile, sizeof(uint32_t));
        if (rest > 0) memcpy(to + whole_units * Elem::kPerUnit, from + whole_units * kTile, size_t(rest) * sizeof(T));
    }
}

}  // namespace

void pack(const PackArgs& args) {
    if (args.dtype == DType::f32)
        pack_to<F32>(args);
    else
        pack_to<Bf16>(args);
}

void embedding(const EmbeddingArgs& args) {
    if (args.dtype == DType::f32)
        gather_rows<F32>(args);
    else
        gather_rows<Bf16>(args);
}

}  // namespace penstock::PENSTOCK_ISA
