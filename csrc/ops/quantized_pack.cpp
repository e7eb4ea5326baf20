// Packing quantised weights, tile by tile and step by step: a step of 16 rows is taken apart (GGUF), rounded (floats) or
// just read (parts), and then laid out. And reading rows back.
#include "division.h"
#include "ops/quantized_codes.h"
#include "ops/quantized_gguf.h"
#include "ops/quantized_parts.h"
#include "threads.h"

namespace penstock::PENSTOCK_ISA {

namespace {

constexpr int kTileRows = 16;
constexpr int64_t kMinCodesPerThread = 50'000;

// To nearest, ties to even, as hardware does.
f16_t to_f16(float value) {
#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX2
    return f16_t(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude >= 0x7f800000u) return f16_t(sign | 0x7c00u | (magnitude > 0x7f800000u ? 0x200u : 0u));
    if (magnitude >= 0x477ff000u) return f16_t(sign | 0x7c00u);
    if (magnitude < 0x38800000u)  // below 2^-14: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
        return f16_t(sign | (bits_of(f32_from_bits(magnitude) + 0.5f) - bits_of(0.5f)));
    return f16_t(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13));
#endif
}

// ---- taking apart

class RowReader {
public:
    explicit RowReader(const QuantizedPackArgs& args) : args_(args), layout_(args.layout) {
        if (layout_.group_size) groups_ = ceil_div(args.k, layout_.group_size);
    }

    // Inputs [step * layout.step, ...) of a row; what lies beyond k has code 0 and scale 0. Where a row has one scale,
    // it is in to.scales[0] already.
    void read(int64_t row, int64_t step, RowStep& to) const {
        const int64_t begin = step * layout_.step;
        const int inputs = int(args_.k - begin < layout_.step ? args_.k - begin : layout_.step);
        if (inputs < layout_.step) {
            const float scale = to.scales[0];
            memset(&to, 0, sizeof to);
            if (!layout_.group_size) to.scales[0] = scale;
        }
        switch (args_.kind) {
            case PackSource::parts: return read_parts(row, begin, inputs, to);
            case PackSource::gguf: return read_blocks(row, begin, inputs, to);
            default: return round_floats(row, begin, inputs, to);
        }
    }

    // The scale of a whole row, where it has one.
    float row_scale(int64_t row) const {
        return args_.kind == PackSource::parts ? args_.scales[row] : largest(row, 0, args_.k) / float(layout_.offset - 1);
    }

private:
    void read_parts(int64_t row, int64_t begin, int inputs, RowStep& to) const {
        memcpy(to.codes, static_cast<const uint8_t*>(args_.source) + row * args_.k + begin, size_t(inputs));
        if (!layout_.group_size) return;
        for (int i = 0; i < inputs; i += layout_.group_size) {
            const int64_t at = row * groups_ + (begin + i) / layout_.group_size;
            to.scales[i / layout_.group_size] = args_.scales[at];
            if (args_.minimums) to.minimums[i / layout_.group_size] = args_.minimums[at];
        }
    }

    void read_blocks(int64_t row, int64_t begin, int inputs, RowStep& to) const {
        const GgmlBlock size = ggml_block(args_.source_type);
        const uint8_t* block =
            static_cast<const uint8_t*>(args_.source) + (row * args_.k + begin) / size.inputs * size.bytes;
        if (size.inputs == kXBlock) return split_large_block(args_.source_type, block, to);
        for (int i = 0; i < inputs / size.inputs; ++i)
            split_small_block(args_.source_type, block + i * size.bytes, to, i);
    }

    float float_at(int64_t at) const {
        switch (DType(args_.source_type)) {
            case DType::f32: return static_cast<const float*>(args_.source)[at];
            case DType::bf16: return to_f32(static_cast<const bf16_t*>(args_.source)[at]);
            default: return f32_of_f16(static_cast<const f16_t*>(args_.source)[at]);
        }
    }

    // The value of the largest magnitude, the first of equals, with its sign if 4 bits are to have it.
    float largest(int64_t row, int64_t begin, int64_t end) const {
        float most = 0.0f, its_magnitude = 0.0f;
        for (int64_t i = begin; i < end; ++i) {
            const float value = float_at(row * args_.k + i), size = std::fabs(value);
            if (size > its_magnitude) {
                its_magnitude = size;
                most = value;
            }
        }
        return layout_.bits == 4 ? most : its_magnitude;
    }

    void round_floats(int64_t row, int64_t begin, int inputs, RowStep& to) const {
        const int group = layout_.group_size ? layout_.group_size : inputs;
        const float offset = float(layout_.offset);
        for (int i = 0; i < inputs; i += group) {
            const int end = i + group < inputs ? i + group : inputs;
            const float scale = !layout_.group_size ? to.scales[0]
                                : layout_.bits == 4 ? largest(row, begin + i, begin + end) / -offset
                                                    : largest(row, begin + i, begin + end) / (offset - 1.0f);
            if (layout_.group_size) to.scales[i / group] = scale;
            const float inverse = scale != 0.0f ? 1.0f / scale : 0.0f;
            for (int j = i; j < end; ++j) {
                // Rounded as llama.cpp does: in 4 bits behind the offset, halves upwards; in 8 away from zero.
                const float value = float_at(row * args_.k + begin + j) * inverse;
                const float code = layout_.bits == 4
                                       ? std::floor(value + (offset + 0.5f))
                                       : std::copysign(std::floor(std::fabs(value) + 0.5f), value) + offset;
                to.codes[j] = uint8_t(code > 0.0f ? code < 2.0f * offset - 1.0f ? code : 2.0f * offset - 1.0f : 0.0f);
            }
        }
    }

    const QuantizedPackArgs& args_;
    const WeightLayout& layout_;
    int64_t groups_ = 1;
};

// ---- laying out

// Unit u of a row: four codes.
uint32_t unit_of(const RowStep& row, int64_t u) {
    uint32_t unit;
    memcpy(&unit, row.codes + 4 * u, sizeof unit);
    return unit;
}

// A plane's vectors among those of another one: of each `period`, `count` from `begin` on.
struct PlanePlace {
    int begin = 0, count = 1, period = 1;
};

// Bits [low, low + kBits) of the codes.
template <int kBits>
void write_plane(const RowStep* rows, int first, int count, int step, int low, PlanePlace place, char* codes) {
    constexpr int kPerByte = 8 / kBits;
    constexpr uint32_t kMask = ((1u << kBits) - 1u) * 0x01010101u;
    for (int v = 0; v < step / 4 / kPerByte; ++v) {
        const int vector = v / place.count * place.period + place.begin + v % place.count;
        auto* to = reinterpret_cast<uint32_t*>(codes + vector * kVectorBytes);
        for (int r = first; r < first + count; ++r) {
            uint32_t packed = 0;
            for (int j = 0; j < kPerByte; ++j) packed |= (unit_of(rows[r], v * kPerByte + j) >> low & kMask) << (j * kBits);
            to[r] = packed;
        }
    }
}

void write_float_codes(const WeightLayout& layout, const RowStep* rows, int first, int count, char* codes) {
    if (layout.bits == 8) {
        for (int u = 0; u < layout.step / 2; ++u)
            for (int r = first; r < first + count; ++r)
                memcpy(codes + (u * kTileRows + r) * 2, rows[r].codes + 2 * u, 2);
        return;
    }
    for (int v = 0; v < layout.step / 8; ++v)
        for (int r = first; r < first + count; ++r) {
            const uint8_t* from = rows[r].codes + 8 * v;
            const uint8_t bytes[4] = {uint8_t(from[0] | from[2] << 4), uint8_t(from[4] | from[6] << 4),
                                      uint8_t(from[1] | from[3] << 4), uint8_t(from[5] | from[7] << 4)};
            memcpy(codes + v * kVectorBytes + r * 4, bytes, sizeof bytes);
        }
}

void write_codes(const WeightLayout& layout, const RowStep* rows, int first, int count, char* codes) {
    if (layout.is_float) return write_float_codes(layout, rows, first, count, codes);
    const int step = layout.step;
    switch (layout.bits) {
        case 8: return write_plane<8>(rows, first, count, step, 0, {}, codes);
        case 4: return write_plane<4>(rows, first, count, step, 0, {}, codes);
        case 2: return write_plane<2>(rows, first, count, step, 0, {}, codes);
        case 6:
            write_plane<4>(rows, first, count, step, 0, {0, 2, 3}, codes);
            return write_plane<2>(rows, first, count, step, 4, {2, 1, 3}, codes);
        case 5:
            write_plane<4>(rows, first, count, step, 0, {0, 4, 5}, codes);
            return write_plane<1>(rows, first, count, step, 4, {4, 1, 5}, codes);
        default:
            write_plane<2>(rows, first, count, step, 0, {0, 2, 3}, codes);
            return write_plane<1>(rows, first, count, step, 2, {2, 1, 3}, codes);
    }
}

// One value of a header, and where the next of its column is.
char* write_scale(ScaleKind kind, char* part, int column, float value) {
    if (kind == ScaleKind::super) {
        reinterpret_cast<int8_t*>(part)[column] = int8_t(value);
        return part + kTileRows;
    }
    if (kind == ScaleKind::f32) {
        reinterpret_cast<float*>(part)[column] = value;
        return part + kTileRows * sizeof(float);
    }
    reinterpret_cast<uint16_t*>(part)[column] = kind == ScaleKind::f16 ? to_f16(value) : to_bf16(value);
    return part + kTileRows * sizeof(uint16_t);
}

void write_header(const WeightLayout& layout, const RowStep& row, int column, char* part) {
    if (!layout.group_size) return;
    const int groups = layout.step / layout.group_size;
    if (layout.scales == ScaleKind::super)
        for (int i = 0; i < (layout.minimums == MinimumKind::own ? 2 : 1); ++i)
            part = write_scale(ScaleKind::f16, part, column, row.supers[i]);
    for (int g = 0; g < groups; ++g) part = write_scale(layout.scales, part, column, row.scales[g]);
    if (layout.minimums == MinimumKind::none) return;
    for (int g = 0; g < groups; ++g) {
        if (layout.minimums == MinimumKind::own) {
            part = write_scale(layout.scales, part, column, row.minimums[g]);
            continue;
        }
        reinterpret_cast<uint8_t*>(part)[column] = uint8_t(row.minimums[g]);
        part += kTileRows;
    }
}

// Rows [begin, end) of the weight, all of one tile.
void pack_tile(const QuantizedPackArgs& args, const RowReader& reader, int64_t begin, int64_t end) {
    const WeightLayout& layout = args.layout;
    const int64_t steps = ceil_div(args.k, layout.step), tile = begin / kTileRows;
    const int first = int(begin % kTileRows), count = int(end - begin);
    char* to = static_cast<char*>(args.packed) + tile * steps * layout.step_bytes;
    RowStep rows[kTileRows];
    if (!layout.group_size)
        for (int r = first; r < first + count; ++r)
            rows[r].scales[0] = reader.row_scale(begin + (r - first) - args.first_row);
    for (int64_t step = 0; step < steps; ++step, to += layout.step_bytes) {
        for (int r = first; r < first + count; ++r) {
            reader.read(begin + (r - first) - args.first_row, step, rows[r]);
            write_header(layout, rows[r], r, to);
        }
        write_codes(layout, rows, first, count, to + layout.header_bytes);
    }
    if (layout.group_size) return;
    const int64_t tiles = ceil_div(args.n, kTileRows);
    auto* scales = reinterpret_cast<float*>(static_cast<char*>(args.packed) + tiles * steps * layout.step_bytes);
    for (int64_t row = begin; row < end; ++row) scales[row] = rows[first + (row - begin)].scales[0];
}

// ---- reading back

// Codes of one column of a step, as numbers.
void read_codes(const WeightLayout& layout, const char* codes, int column, float* values) {
    if (layout.is_float) {
        const auto* table = static_cast<const float*>(layout.table);
        for (int i = 0; i < layout.step; ++i) values[i] = table[float_code(layout, codes, i, column)];
        return;
    }
    alignas(64) char bytes[kXBlock * kTileRows];
    if (layout.bits != 8 || layout.table) {
        expand_step(layout, codes, bytes);
        codes = bytes;
    }
    for (int i = 0; i < layout.step; ++i)
        values[i] = float(int(uint8_t(codes[i / 4 * kVectorBytes + column * 4 + i % 4])) - layout.offset);
}

template <class Out>
void read_row(const QuantizedRowsArgs& args, int64_t row, Out* out) {
    const WeightLayout& layout = args.layout;
    const int64_t steps = ceil_div(args.k, layout.step);
    const int column = int(row % kTileRows);
    const char* weight = static_cast<const char*>(args.weight);
    const char* from = weight + row / kTileRows * steps * layout.step_bytes;
    alignas(64) float values[kXBlock], scales[16 * kLanes], minimums[16 * kLanes] = {};
    const bool has_minimums = layout.minimums != MinimumKind::none;
    const int64_t tiles = ceil_div(args.n, kTileRows);
    if (!layout.group_size)
        scales[column] = reinterpret_cast<const float*>(weight + tiles * steps * layout.step_bytes)[row];
    for (int64_t begin = 0; begin < args.k; begin += layout.step, from += layout.step_bytes) {
        read_codes(layout, from + layout.header_bytes, column, values);
        if (layout.group_size) expand_headers(layout, from, 1, scales, minimums);
        const int inputs = int(args.k - begin < layout.step ? args.k - begin : layout.step);
        for (int i = 0; i < inputs; ++i) {
            const int at = (layout.group_size ? i / layout.group_size : 0) * kLanes + column;
            values[i] = has_minimums ? values[i] * scales[at] + minimums[at] : values[i] * scales[at];
        }
        for (int i = 0; i < inputs; i += kLanes) {
            const int count = inputs - i < kLanes ? inputs - i : kLanes;
            store_n(out + begin + i, load_n(values + i, count), count);
        }
    }
}

}  // namespace

void pack_quantized(const QuantizedPackArgs& args) {
    const RowReader reader(args);
    const int64_t end_row = args.first_row + args.rows;
    const int64_t first_tile = args.first_row / kTileRows, end_tile = ceil_div(end_row, kTileRows);
    const int threads = threads_for(args.rows * args.k, kMinCodesPerThread, args.num_threads);
    // Most of the time is the first touch of pages, which keeps one thread longer than another.
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4) if (threads > 1)
    for (int64_t tile = first_tile; tile < end_tile; ++tile) {
        const int64_t begin = tile * kTileRows > args.first_row ? tile * kTileRows : args.first_row;
        const int64_t end = (tile + 1) * kTileRows < end_row ? (tile + 1) * kTileRows : end_row;
        pack_tile(args, reader, begin, end);
    }
}

void read_quantized_rows(const QuantizedRowsArgs& args) {
    // Each input costs a vector of its tile.
    const int threads = threads_for(args.count * args.k, 5'000, args.num_threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < args.count; ++i) {
        const int64_t row = args.ids ? args.ids[i] : args.first_row + i;
        if (args.out_dtype == DType::f32)
            read_row(args, row, static_cast<float*>(args.out) + i * args.k);
        else
            read_row(args, row, static_cast<bf16_t*>(args.out) + i * args.k);
    }
}

}  // namespace penstock::PENSTOCK_ISA
