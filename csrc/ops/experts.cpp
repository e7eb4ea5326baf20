#include "ops/experts.h"

#include "ops/activation.h"
#include "ops/linear.h"
#include "scratch.h"
#include "simd.h"
#include "threads.h"

namespace penstock::PENSTOCK_ISA {

extern const ActivationKernels activation_kernels;
extern const LinearKernels linear_kernels;
extern const QuantizedKernels quantized_kernels;

namespace {

// Numbers below which another thread does not pay.
constexpr int64_t kMinThreadWork = 20'000;

template <class Body>
void for_each_row(int64_t rows, int64_t work, int num_threads, const Body& body) {
    const int threads = threads_for(work, kMinThreadWork, num_threads);
    if (threads == 1) {
        for (int64_t row = 0; row < rows; ++row) body(row);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) body(row);
}

// The softmax of logits, in place.
void softmax(float* logits, int count) {
    float largest = -INFINITY;
    for (int i = 0; i < count; ++i) largest = logits[i] > largest ? logits[i] : largest;
    float total = 0.0f;
    for (int i = 0; i < count; i += kLanes) {
        const int lanes = count - i < kLanes ? count - i : kLanes;
        const Vec value = exp(load_n(logits + i, lanes) - splat(largest));
        store_n(logits + i, value, lanes);
        total += reduce_sum(load_n(logits + i, lanes));
    }
    for (int i = 0; i < count; ++i) logits[i] /= total;
}

// The top_k largest, largest first, of equals the first. What is no number is never larger.
void take_largest(const float* values, int count, int32_t* places, float* largest, int top_k) {
    int taken = 0;
    for (int i = 0; i < count; ++i) {
        if (taken == top_k && !(values[i] > largest[top_k - 1])) continue;
        int at = taken < top_k ? taken++ : top_k - 1;
        for (; at > 0 && values[i] > largest[at - 1]; --at) {
            largest[at] = largest[at - 1];
            places[at] = places[at - 1];
        }
        largest[at] = values[i];
        places[at] = i;
    }
}

void choose(const ChooseExpertsArgs& args) {
    for_each_row(args.tokens, args.tokens * args.num_experts, args.num_threads, [&](int64_t token) {
        float probabilities[kMaxExperts];
        memcpy(probabilities, args.logits + token * args.num_experts, size_t(args.num_experts) * sizeof(float));
        softmax(probabilities, args.num_experts);
        float* weights = args.weights + token * args.top_k;
        take_largest(probabilities, args.num_experts, args.experts + token * args.top_k, weights, args.top_k);
        if (!args.is_renormalized) return;
        float total = weights[0];
        for (int i = 1; i < args.top_k; ++i) total += weights[i];
        for (int i = 0; i < args.top_k; ++i) weights[i] /= total;
    });
}

// Pairs in the order of their experts, and for each matrix the rows of each expert that has any.
struct Order {
    RowGroups gate_up, down;
    const int32_t* places;  // of each pair, its row
};

Order order_pairs(const ExpertsMlpArgs& args) {
    static thread_local Scratch<int32_t> places_scratch;
    static thread_local Scratch<RowGroup> groups_scratch;
    int32_t* places = places_scratch.at_least(args.tokens * args.top_k);
    RowGroup *gate_up = groups_scratch.at_least(2 * args.num_experts), *down = gate_up + args.num_experts;
    int32_t next[kMaxExperts] = {};
    for (int64_t pair = 0; pair < args.tokens * args.top_k; ++pair) ++next[args.experts[pair]];
    int64_t count = 0;
    int32_t begin = 0;
    for (int expert = 0; expert < args.num_experts; ++expert) {
        const int32_t rows = next[expert];
        next[expert] = begin;
        if (rows == 0) continue;
        // All experts of a single token read its one row.
        gate_up[count] = {args.gate_up.weights[expert], args.tokens == 1 ? 0 : begin, begin, rows};
        down[count++] = {args.down.weights[expert], begin, begin, rows};
        begin += rows;
    }
    for (int64_t pair = 0; pair < args.tokens * args.top_k; ++pair) places[pair] = next[args.experts[pair]]++;
    return {{gate_up, count}, {down, count}, places};
}

void multiply(const ExpertsMlpArgs& args, const ExpertMatrices& matrices, const RowGroups& groups, const void* x,
              int64_t m, void* out, int64_t n, int64_t k) {
    if (matrices.is_quantized)
        quantized_kernels.linear({matrices.layout, x, nullptr, nullptr, out, m, n, k, args.dtype, args.dtype,
                                  args.num_threads, groups});
    else
        linear_kernels.linear({x, nullptr, nullptr, out, m, n, k, args.dtype, args.dtype, args.num_threads, groups});
}

template <class Elem>
void combine(const ExpertsMlpArgs& args, const void* rows, const int32_t* places) {
    using T = typename Elem::Storage;
    for_each_row(args.tokens, args.tokens * args.top_k * args.hidden, args.num_threads, [&](int64_t token) {
        const float* weights = args.weights + token * args.top_k;
        const int32_t* its_places = places + token * args.top_k;
        T* out = static_cast<T*>(args.out) + token * args.hidden;
        for (int64_t i = 0; i < args.hidden; i += kLanes) {
            const int lanes = int(args.hidden - i < kLanes ? args.hidden - i : kLanes);
            Vec total = zero();
            for (int pair = 0; pair < args.top_k; ++pair) {
                const T* row = static_cast<const T*>(rows) + its_places[pair] * args.hidden + i;
                const Vec value = (lanes == kLanes ? load(row) : load_n(row, lanes)) * splat(weights[pair]);
                total = pair == 0 ? value : total + value;
            }
            lanes == kLanes ? store(out + i, total) : store_n(out + i, total, lanes);
        }
    });
}

void mlp(const ExpertsMlpArgs& args) {
    if (args.tokens == 0) return;
    static thread_local Scratch<char> rows_scratch, inner_scratch;
    const int64_t pairs = args.tokens * args.top_k, size = size_of(args.dtype);
    // One piece of memory for the experts' inputs and, later, their outputs.
    char* rows = rows_scratch.at_least(pairs * args.hidden * size);
    char* gate_ups = inner_scratch.at_least(pairs * 3 * args.inner * size);
    char* inners = gate_ups + pairs * 2 * args.inner * size;
    const Order order = order_pairs(args);
    const void* x = args.x;
    if (args.tokens > 1) {
        const auto row_bytes = size_t(args.hidden * size);
        for_each_row(pairs, pairs * args.hidden, args.num_threads, [&](int64_t pair) {
            memcpy(rows + size_t(order.places[pair]) * row_bytes,
                   static_cast<const char*>(args.x) + size_t(pair / args.top_k) * row_bytes, row_bytes);
        });
        x = rows;
    }
    multiply(args, args.gate_up, order.gate_up, x, args.tokens > 1 ? pairs : 1, gate_ups, 2 * args.inner, args.hidden);
    activation_kernels.silu_and_mul({gate_ups, inners, pairs, args.inner, args.dtype, args.num_threads});
    multiply(args, args.down, order.down, inners, pairs, rows, args.hidden, args.inner);
    args.dtype == DType::bf16 ? combine<Bf16>(args, rows, order.places) : combine<F32>(args, rows, order.places);
}

template <class Elem>
void add_shared_row(const AddSharedArgs& args, int64_t token) {
    using T = typename Elem::Storage;
    const int64_t begin = token * args.size;
    const Vec share = splat(1.0f) / (splat(1.0f) + exp(splat(-args.logits[token])));
    for (int64_t i = 0; i < args.size; i += kLanes) {
        const int lanes = int(args.size - i < kLanes ? args.size - i : kLanes);
        const Vec mixed = load_n(static_cast<const T*>(args.mixed) + begin + i, lanes);
        const Vec shared = load_n(static_cast<const T*>(args.shared) + begin + i, lanes);
        store_n(static_cast<T*>(args.out) + begin + i, mixed + share * shared, lanes);
    }
}

void add_shared(const AddSharedArgs& args) {
    for_each_row(args.tokens, args.tokens * args.size, args.num_threads, [&](int64_t token) {
        args.dtype == DType::bf16 ? add_shared_row<Bf16>(args, token) : add_shared_row<F32>(args, token);
    });
}

}  // namespace

extern const ExpertsKernels experts_kernels = {choose, mlp, add_shared};

}  // namespace penstock::PENSTOCK_ISA
