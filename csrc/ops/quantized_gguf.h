// GGUF's blocks taken apart: codes one a byte, and the scales as they are stored (llama.cpp's ggml-common.h).
#pragma once

#include "ops/quantized.h"

namespace penstock::PENSTOCK_ISA {

// A row's part of a step. "super": `supers` are the scale of 256 inputs and the minimum's.
struct RowStep {
    alignas(64) uint8_t codes[kXBlock];
    float supers[2];
    float scales[16];
    float minimums[16];
};

enum GgmlType : int {
    kQ4_0 = 2, kQ4_1 = 3, kQ5_0 = 6, kQ5_1 = 7, kQ8_0 = 8, kQ2_K = 10, kQ3_K = 11, kQ4_K = 12, kQ5_K = 13, kQ6_K = 14,
    kIQ4_NL = 20, kIQ4_XS = 23, kMXFP4 = 39,
};

struct GgmlBlock {
    int inputs, bytes;
};

static inline GgmlBlock ggml_block(int type) {
    switch (type) {
        case kQ4_0: return {32, 18};
        case kQ4_1: return {32, 20};
        case kQ5_0: return {32, 22};
        case kQ5_1: return {32, 24};
        case kQ8_0: return {32, 34};
        case kQ2_K: return {256, 84};
        case kQ3_K: return {256, 110};
        case kQ4_K: return {256, 144};
        case kQ5_K: return {256, 176};
        case kQ6_K: return {256, 210};
        case kIQ4_NL: return {32, 18};
        case kIQ4_XS: return {256, 136};
        default: return {32, 17};
    }
}

static inline float half_at(const uint8_t* p) {
    f16_t bits;
    memcpy(&bits, p, sizeof bits);
    return f32_of_f16(bits);
}

// `bytes` of fields of kBits: first all lowest fields, then the next ...
template <int kBits>
static inline void spread(const uint8_t* from, int bytes, uint8_t* to) {
    for (int shift = 0; shift < 8; shift += kBits, to += bytes)
        for (int i = 0; i < bytes; ++i) to[i] = uint8_t(from[i] >> shift & ((1 << kBits) - 1));
}

// The same, above what is there.
template <int kBits>
static inline void spread_above(const uint8_t* from, int bytes, int place, uint8_t* to) {
    for (int shift = 0; shift < 8; shift += kBits, to += bytes)
        for (int i = 0; i < bytes; ++i) to[i] |= uint8_t((from[i] >> shift & ((1 << kBits) - 1)) << place);
}

// A block of 32 inputs, the `group`-th of its step.
static inline void split_small_block(int type, const uint8_t* block, RowStep& row, int group) {
    uint8_t* codes = row.codes + group * 32;
    if (type == kMXFP4) {
        const uint32_t e = block[0];
        row.scales[group] = f32_from_bits(e < 2 ? 0x00200000u << e : (e - 1) << 23);
        return spread<4>(block + 1, 16, codes);
    }
    row.scales[group] = half_at(block);
    block += 2;
    if (type == kQ8_0) {
        for (int i = 0; i < 32; ++i) codes[i] = block[i] ^ 128;
        return;
    }
    if (type == kQ4_1 || type == kQ5_1) {
        row.minimums[group] = half_at(block);
        block += 2;
    }
    const bool has_high = type == kQ5_0 || type == kQ5_1;
    spread<4>(block + 4 * has_high, 16, codes);
    if (!has_high) return;
    for (int i = 0; i < 32; ++i) codes[i] |= uint8_t((block[i / 8] >> (i % 8) & 1) << 4);
}

// The 6-bit scales and minimums of Q4_K and Q5_K.
static inline void split_k_scales(const uint8_t* block, RowStep& row) {
    row.supers[0] = half_at(block);
    row.supers[1] = -half_at(block + 2);
    const uint8_t *first = block + 4, *second = first + 4, *third = first + 8;
    for (int i = 0; i < 4; ++i) {
        row.scales[i] = float(first[i] & 63);
        row.minimums[i] = float(second[i] & 63);
        row.scales[i + 4] = float((third[i] & 15) | (first[i] >> 2 & 48));
        row.minimums[i + 4] = float(third[i] >> 4 | (second[i] >> 2 & 48));
    }
}

static inline void split_q3_k_scales(const uint8_t* scales, RowStep& row) {
    for (int i = 0; i < 16; ++i) {
        const int low = scales[i % 8] >> (i / 8 * 4) & 15, high = scales[8 + i % 4] >> (i / 4 * 2) & 3;
        row.scales[i] = float((low | high << 4) - 32);
    }
}

static inline void split_iq4_xs_scales(const uint8_t* block, RowStep& row) {
    for (int i = 0; i < 8; ++i) {
        const int low = block[4 + i / 2] >> (i % 2 * 4) & 15, high = block[2 + i / 4] >> (i % 4 * 2) & 3;
        row.scales[i] = float((low | high << 4) - 32);
    }
}

// A block of 256 inputs.
static inline void split_large_block(int type, const uint8_t* block, RowStep& row) {
    switch (type) {
        case kQ4_K:
        case kQ5_K: {
            split_k_scales(block, row);
            const uint8_t* low = block + (type == kQ4_K ? 16 : 48);
            for (int i = 0; i < 4; ++i) spread<4>(low + i * 32, 32, row.codes + i * 64);
            if (type == kQ5_K) spread_above<1>(block + 16, 32, 4, row.codes);
            return;
        }
        case kQ2_K:
            row.supers[0] = half_at(block + 80);
            row.supers[1] = -half_at(block + 82);
            for (int i = 0; i < 16; ++i) {
                row.scales[i] = float(block[i] & 15);
                row.minimums[i] = float(block[i] >> 4);
            }
            for (int i = 0; i < 2; ++i) spread<2>(block + 16 + i * 32, 32, row.codes + i * 128);
            return;
        case kQ3_K:
            row.supers[0] = half_at(block + 108);
            split_q3_k_scales(block + 96, row);
            for (int i = 0; i < 2; ++i) spread<2>(block + 32 + i * 32, 32, row.codes + i * 128);
            return spread_above<1>(block, 32, 2, row.codes);
        case kQ6_K:
            row.supers[0] = half_at(block + 208);
            for (int i = 0; i < 16; ++i) row.scales[i] = float(int8_t(block[192 + i]));
            for (int i = 0; i < 2; ++i) {
                spread<4>(block + i * 64, 64, row.codes + i * 128);
                spread_above<2>(block + 128 + i * 32, 32, 4, row.codes + i * 128);
            }
            return;
        default:  // IQ4_XS
            row.supers[0] = half_at(block);
            split_iq4_xs_scales(block, row);
            for (int i = 0; i < 8; ++i) spread<4>(block + 8 + i * 16, 16, row.codes + i * 32);
    }
}

}  // namespace penstock::PENSTOCK_ISA
