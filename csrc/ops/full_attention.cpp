// One task is a head of a text. Its keys are laid out by dimension and its values by token, in f32; then a few queries
// at a time take their scores, the softmax and the weighted sum, each in the order of the tokens.
#include "ops/full_attention.h"

#include "division.h"
#include "scratch.h"
#include "simd.h"
#include "threads.h"

namespace penstock::PENSTOCK_ISA {

namespace {

// Queries of a tile, and vectors of keys (or of value dimensions) beside them: as many sums as registers hold.
constexpr int kQueries = PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX512 ? 6 : 2;
constexpr int kVectors = 2;
constexpr int64_t kWidth = kVectors * kLanes;
// Multiply-adds below which another thread does not pay.
constexpr int64_t kMinThreadWork = 200'000;

// One head of one text. stride: elements from a token to the next in qkv.
template <class Storage>
struct Head {
    const Storage *q, *k, *v;
    Storage* out;
    int64_t length, dim, stride, out_stride;
    float scale;
};

// sums[q][j] += factors[q * factor_stride + i] * rows[i * row_stride + 16 j + lane], for i from 0 on in order.
static inline void multiply(const float* factors, int64_t factor_stride, const float* rows, int64_t row_stride,
                            int64_t count, Vec (&sums)[kQueries][kVectors]) {
    for (int query = 0; query < kQueries; ++query)
        for (int vector = 0; vector < kVectors; ++vector) sums[query][vector] = zero();
    for (int64_t i = 0; i < count; ++i) {
        Vec row[kVectors];
        for (int vector = 0; vector < kVectors; ++vector) row[vector] = load(rows + i * row_stride + vector * kLanes);
        for (int query = 0; query < kQueries; ++query) {
            const Vec factor = splat(factors[query * factor_stride + i]);
            for (int vector = 0; vector < kVectors; ++vector)
                sums[query][vector] = fma(factor, row[vector], sums[query][vector]);
        }
    }
}

// Scores become weights, in place, not yet divided by their sum, which is returned. Those past `length` become 0.
static inline float soften(float* scores, int64_t length, int64_t padded) {
    Vec highest = splat(-INFINITY);
    for (int64_t i = 0; i < padded; i += kLanes) {
        const int64_t left = length - i;
        const Vec row = select_lanes(load(scores + i), 0, left < 0 ? 0 : left < kLanes ? int(left) : kLanes, -INFINITY);
        store(scores + i, row);
        highest = max(highest, row);
    }
    const Vec top = splat(reduce_max(highest));
    Vec sum = zero();
    for (int64_t i = 0; i < padded; i += kLanes) {
        const Vec weight = exp_nonpositive(load(scores + i) - top);
        store(scores + i, weight);
        sum = sum + weight;
    }
    return reduce_sum(sum);
}

// Keys [dim, padded length] and values [length, padded dim] in f32; padding is zero.
template <class Storage>
void lay_out(const Head<Storage>& head, float* keys, int64_t padded_length, float* values, int64_t padded_dim) {
    memset(keys, 0, size_t(head.dim * padded_length) * sizeof(float));
    memset(values, 0, size_t(head.length * padded_dim) * sizeof(float));
    for (int64_t token = 0; token < head.length; ++token)
        for (int64_t i = 0; i < head.dim; ++i) {
            keys[i * padded_length + token] = as_f32(head.k[token * head.stride + i]);
            values[token * padded_dim + i] = as_f32(head.v[token * head.stride + i]);
        }
}

template <class Storage>
void attend(const Head<Storage>& head) {
    static thread_local Scratch<float> scratch;
    const int64_t padded_length = round_up(head.length, kWidth), padded_dim = round_up(head.dim, kWidth);
    float* keys = scratch.at_least(head.dim * padded_length + head.length * padded_dim +
                                   kQueries * (head.dim + padded_length) + kWidth);
    float* values = keys + head.dim * padded_length;
    float* queries = values + head.length * padded_dim;
    float* scores = queries + kQueries * head.dim;
    lay_out(head, keys, padded_length, values, padded_dim);
    Vec sums[kQueries][kVectors];
    for (int64_t first = 0; first < head.length; first += kQueries) {
        const int rows = head.length - first < kQueries ? int(head.length - first) : kQueries;
        for (int query = 0; query < kQueries; ++query)
            for (int64_t i = 0; i < head.dim; ++i)  // past the last row the last one again
                queries[query * head.dim + i] =
                    as_f32(head.q[(first + (query < rows ? query : rows - 1)) * head.stride + i]) * head.scale;
        for (int64_t key = 0; key < padded_length; key += kWidth) {
            multiply(queries, head.dim, keys + key, padded_length, head.dim, sums);
            for (int query = 0; query < kQueries; ++query)
                for (int vector = 0; vector < kVectors; ++vector)
                    store(scores + query * padded_length + key + vector * kLanes, sums[query][vector]);
        }
        Vec inverse[kQueries];
        for (int query = 0; query < kQueries; ++query)
            inverse[query] = splat(1.0f / soften(scores + query * padded_length, head.length, padded_length));
        for (int64_t i = 0; i < head.dim; i += kWidth) {
            multiply(scores, padded_length, values + i, padded_dim, head.length, sums);
            for (int query = 0; query < rows; ++query)
                for (int vector = 0; vector < kVectors; ++vector) {
                    const int64_t begin = i + vector * kLanes, left = head.dim - begin;
                    if (left <= 0) continue;
                    Storage* out = head.out + (first + query) * head.out_stride + begin;
                    const Vec result = sums[query][vector] * inverse[query];
                    if (left >= kLanes)
                        store(out, result);
                    else
                        store_n(out, result, int(left));
                }
        }
    }
}

template <class Elem>
void run_task(const FullAttentionArgs& args, int64_t task) {
    using Storage = typename Elem::Storage;
    const int64_t text = task / args.num_heads, head = task % args.num_heads, hidden = args.num_heads * args.head_dim;
    const int64_t begin = args.query_starts[text], length = args.query_starts[text + 1] - begin;
    const Storage* q = static_cast<const Storage*>(args.qkv) + begin * 3 * hidden + head * args.head_dim;
    Storage* out = static_cast<Storage*>(args.out) + begin * hidden + head * args.head_dim;
    if (length > 0)
        attend<Storage>({q, q + hidden, q + 2 * hidden, out, length, args.head_dim, 3 * hidden, hidden, args.scale});
}

void full_attention(const FullAttentionArgs& args) {
    const auto run = args.dtype == DType::bf16 ? run_task<Bf16> : run_task<F32>;
    const int64_t tasks = args.num_texts * args.num_heads;
    int64_t work = 0;
    for (int64_t text = 0; text < args.num_texts; ++text) {
        const int64_t length = args.query_starts[text + 1] - args.query_starts[text];
        work += 2 * length * length * args.num_heads * args.head_dim;
    }
    const int threads = threads_for(work, kMinThreadWork, args.num_threads);
    if (threads == 1) {
        for (int64_t task = 0; task < tasks; ++task) run(args, task);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) run(args, task);
}

}  // namespace

extern const FullAttentionKernels full_attention_kernels = {full_attention};

}  // namespace penstock::PENSTOCK_ISA
