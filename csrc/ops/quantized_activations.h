// What x becomes before it is multiplied with quantised weights: 8-bit codes with a scale per token and 256 inputs, or
// itself, padded; and the sums of its groups, which offsets and minimums of the codes are multiplied with.
#pragma once

#include "division.h"
#include "ops/quantized_block.h"
#include "scratch.h"
#include "threads.h"

namespace penstock::PENSTOCK_ISA {

// Rows of x as the block kernels read them. Bytes lie in chunks of kXChunkInputs, [chunk][chunk_rows], with what belongs
// to them; floats, with chunk_rows 0, are one chunk.
struct Activations {
    char* x;
    int64_t x_stride;  // bytes
    float* scales;     // [chunk][row][scale_stride]; null for floats
    int64_t scale_stride;
    // Likewise, or null: int32 to begin a group's sum with; or to multiply minimums with, f32, or int16 (where these are whole
    // numbers, has_whole_minimums), two of a row in each place.
    uint32_t* sums;
    int64_t sum_stride;
    int64_t chunk_rows;

    Activations from(int64_t row) const {
        return {x + row * x_stride, x_stride, scales ? scales + row * scale_stride : nullptr, scale_stride,
                sums ? sums + row * sum_stride : nullptr, sum_stride, chunk_rows};
    }
};

template <class Elem>
class BytesOfRows {
    using T = typename Elem::Storage;

public:
    BytesOfRows(const QuantizedLinearArgs& args, int64_t padded_k)
        : args_(args),
          padded_k_(padded_k),
          has_minimums_(args.layout.minimums != MinimumKind::none),
          has_whole_minimums_(has_whole_minimums(args.layout)) {
        const WeightLayout& layout = args.layout;
        group_ = layout.group_size ? layout.group_size : kXBlock;
        out_.x_stride = kXChunkStride;
        out_.scale_stride = kXChunkScales;
        out_.sum_stride = kXChunkSums;
        out_.chunk_rows = args.m;
        static thread_local Scratch<char> bytes;
        static thread_local Scratch<float> scales;
        static thread_local Scratch<uint32_t> sums;
        const int64_t rows = ceil_div(padded_k, kXChunkInputs) * args.m;
        out_.x = bytes.at_least(rows * out_.x_stride);
        out_.scales = scales.at_least(rows * out_.scale_stride);
        out_.sums = sums.at_least(rows * out_.sum_stride);
    }

    const Activations& result() const { return out_; }

    // First all scales, so that no block waits for its own.
    void convert(int64_t row) const {
        const T* x = static_cast<const T*>(args_.x) + row * args_.k;
        const float row_most = args_.layout.x_per_token ? largest(x, 0, args_.k) : 0.0f;
        for (int64_t begin = 0; begin < padded_k_; begin += kXBlock)
            *scale_of(row, begin) = args_.layout.x_per_token ? row_most : largest(x, begin, min_of(begin + kXBlock, args_.k));
        for (int64_t begin = 0; begin < padded_k_; begin += kXBlock)
            convert_block(row, x, {begin, min_of(begin + kXBlock, padded_k_)});
    }

private:
    static Vec load_up_to(const T* x, int64_t count) {
        return count >= kLanes ? load(x) : count > 0 ? load_n(x, int(count)) : zero();
    }
    // The row of its chunk that an input of a row is in.
    int64_t chunk_row(int64_t row, int64_t input) const { return input / kXChunkInputs * args_.m + row; }
    float* scale_of(int64_t row, int64_t input) const {
        return out_.scales + chunk_row(row, input) * kXChunkScales + input % kXChunkInputs / kXBlock;
    }

    // The largest magnitude; NaN if there is one.
    static float largest(const T* x, int64_t begin, int64_t end) {
        Vec most = zero();
        for (int64_t i = begin; i < end; i += kLanes) most = larger_bits(magnitude(load_up_to(x + i, end - i)), most);
        return mask_nan(most) ? NAN : reduce_max(most);
    }

    // Writes codes and sums of inputs [begin, end), of which those from k on are zero, and their scale over their largest.
    void convert_block(int64_t row, const T* x, Range inputs) const {
        const int64_t k = args_.k, group = group_, chunk_row = this->chunk_row(row, inputs.begin);
        const int64_t in_chunk = inputs.begin % kXChunkInputs;
        auto* codes = reinterpret_cast<int8_t*>(out_.x + chunk_row * kXChunkStride) + in_chunk;
        uint32_t* sums = out_.sums + chunk_row * kXChunkSums;
        int64_t group_index = in_chunk / group;
        float* scale = scale_of(row, inputs.begin);
        const bool is_finite = *scale <= 3.4028234e38f, is_zero = *scale < 1e-30f;
        const Vec inverse = splat(is_zero ? 0.0f : 127.0f / *scale);
        *scale = !is_finite ? NAN : is_zero ? 0.0f : *scale / 127.0f;
        // A group larger than a block of x never comes here: groups are of 256 inputs at most.
        for (int64_t i = inputs.begin; i < inputs.end; ++group_index) {
            Ints sum = splat_int(0);
            for (const int64_t end = min_of(i + group, inputs.end); i < end; i += kLanes, codes += kLanes) {
                const Ints whole = is_finite ? to_nearest_ints(load_up_to(x + i, k - i) * inverse) : splat_int(0);
                store_int8(codes, whole);
                sum = sum + whole;
            }
            write_sum(sums, group_index, reduce_sum(to_vec(sum)));
        }
    }

    // sum: a whole number.
    void write_sum(uint32_t* sums, int64_t group, float sum) const {
        if (!has_minimums_)
            sums[group] = uint32_t(-args_.layout.offset * int32_t(sum));
        else if (has_whole_minimums_)
            reinterpret_cast<int16_t*>(sums)[group] = int16_t(sum);
        else
            sums[group] = bits_of(sum);
    }

    const QuantizedLinearArgs& args_;
    int64_t padded_k_;
    bool has_minimums_, has_whole_minimums_;
    int group_;
    Activations out_{};
};

// Floats stay; they are copied only where their rows have to be padded.
template <class Elem>
class FloatRows {
    using T = typename Elem::Storage;

public:
    FloatRows(const QuantizedLinearArgs& args, int64_t padded_k) : args_(args), padded_k_(padded_k) {
        out_.x_stride = padded_k * int64_t(sizeof(T));
        is_copied_ = padded_k != args.k;
        static thread_local Scratch<char> copies;
        static thread_local Scratch<uint32_t> sums;
        out_.x = is_copied_ ? copies.at_least(args.m * out_.x_stride) : static_cast<char*>(const_cast<void*>(args.x));
        if (args.layout.minimums == MinimumKind::none) return;
        out_.sum_stride = padded_k / args.layout.group_size;
        out_.sums = sums.at_least(args.m * out_.sum_stride);
    }

    const Activations& result() const { return out_; }

    void convert(int64_t row) const {
        if (is_copied_) {
            char* to = out_.x + row * out_.x_stride;
            memcpy(to, static_cast<const T*>(args_.x) + row * args_.k, size_t(args_.k) * sizeof(T));
            memset(to + args_.k * int64_t(sizeof(T)), 0, size_t(padded_k_ - args_.k) * sizeof(T));
        }
        if (!out_.sums) return;
        const T* x = reinterpret_cast<const T*>(out_.x + row * out_.x_stride);
        const int group = args_.layout.group_size;
        for (int64_t g = 0; g < out_.sum_stride; ++g) {
            Vec sum = zero();
            for (int i = 0; i < group; i += kLanes) sum = sum + load(x + g * group + i);
            out_.sums[row * out_.sum_stride + g] = bits_of(reduce_sum(sum));
        }
    }

private:
    const QuantizedLinearArgs& args_;
    int64_t padded_k_;
    bool is_copied_;
    Activations out_{};
};

}  // namespace penstock::PENSTOCK_ISA
