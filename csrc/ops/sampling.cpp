#include "ops/sampling.h"

#include <atomic>

#include "ops/sampling_row.h"
#include "scratch.h"
#include "threads.h"

namespace penstock::PENSTOCK_ISA {

namespace {

// Logits below which another thread does not pay.
constexpr int64_t kMinThreadWork = 30'000;

struct RowMemory {
    Scratch<float> values;    // buffer of the k-th largest search, then the candidates' weights
    Scratch<int32_t> ids;     // the candidates' ids, rising
    Scratch<double> sums;     // of each chunk's weights
};

// ---- sampling one row ----------------------------------------------------------------------------------------------

struct RowSettings {
    float temperature;
    int64_t top_k;  // 0: off
    float top_p, min_p;
    double uniform;
};

// The weight of a logit relative to the peak's, which is exactly 1.
struct Weigher {
    float peak, inverse_temperature;
    Vec operator()(Vec logits) const { return exp((logits - splat(peak)) * splat(inverse_temperature)); }
};

// Tokens still in the draw, ids rising, with their weights.
struct Candidates {
    int32_t* ids;
    float* weights;
    int64_t count;
};

double total_weight(const float* weights, int64_t count, float threshold) {
    DoubleSum sum;
    const Vec limit = splat(threshold);
    for_each_vec(weights, 0, count,
                 [&](int64_t, Vec w, int) { sum.add(keep_where(mask_greater_equal(w, limit), w)); });
    return sum.total();
}

// Tokens whose logit is at least `threshold`, with their weights.
Candidates collect(const float* logits, int64_t vocab, float threshold, const Weigher& weigh, RowMemory& memory) {
    Candidates candidates{memory.ids.at_least(vocab), memory.values.at_least(vocab), 0};
    int64_t count = 0;
    for_each_vec(logits, 0, vocab, [&](int64_t i, Vec x, int lanes) {
        const uint32_t mask = mask_greater_equal(x, splat(threshold)) & ((1u << lanes) - 1u);
        if (mask == 0) return;
        alignas(64) float weights[kLanes];
        store(weights, weigh(x));
        for_each_lane(mask, [&](int lane) {
            candidates.ids[count] = int32_t(i + lane);
            candidates.weights[count++] = weights[lane];
        });
    });
    candidates.count = count;
    return candidates;
}

// Drops all but the smallest set of largest weights that holds `wanted`; of equals at its edge the lower ids stay.
void keep_mass(Candidates& candidates, float lowest, double wanted) {
    const auto mass = [&](float t) { return total_weight(candidates.weights, candidates.count, t); };
    const float edge = largest_threshold(lowest, 1.0f, [&](float t) { return mass(t) >= wanted; });
    double kept_mass = mass(from_ordinal(ordinal(edge) + 1));
    int64_t kept = 0;
    for (int64_t i = 0; i < candidates.count; ++i) {
        const float weight = candidates.weights[i];
        const bool is_tie = weight == edge;
        if (weight < edge || (is_tie && kept_mass >= wanted)) continue;
        if (is_tie) kept_mass += double(weight);
        candidates.ids[kept] = candidates.ids[i];
        candidates.weights[kept++] = weight;
    }
    candidates.count = kept;
}

// Inverse of the cumulative distribution over candidates whose weight is at least min_p (the peak's weight is 1).
int64_t draw(const Candidates& candidates, float min_p, double uniform) {
    double total = 0.0;
    for (int64_t i = 0; i < candidates.count; ++i)
        if (candidates.weights[i] >= min_p) total += double(candidates.weights[i]);
    const double target = uniform * total;
    double cumulative = 0.0;
    int64_t last = -1;
    for (int64_t i = 0; i < candidates.count; ++i) {
        if (!(candidates.weights[i] >= min_p) || candidates.weights[i] == 0.0f) continue;
        last = candidates.ids[i];
        cumulative += double(candidates.weights[i]);
        if (cumulative > target) break;
    }
    return last;
}

// The sum of each chunk's weights, of those at least min_p; returns their total.
double sum_chunks(const float* logits, int64_t vocab, const Weigher& weigh, float min_p, double* sums) {
    const Vec limit = splat(min_p);
    double total = 0.0;
    for (int64_t chunk = 0; chunk < vocab; chunk += kChunk) {
        DoubleSum sum;
        for_each_vec(logits, chunk, lesser(chunk + kChunk, vocab), [&](int64_t, Vec x, int) {
            const Vec weight = weigh(x);
            sum.add(keep_where(mask_greater_equal(weight, limit), weight));
        });
        sums[chunk / kChunk] = sum.total();
        total += sums[chunk / kChunk];
    }
    return total;
}

// The draw without top-k and top-p: no candidates are gathered, only one chunk is looked at closely.
int64_t draw_from_all(const float* logits, int64_t vocab, const Weigher& weigh, const RowSettings& row,
                      RowMemory& memory) {
    const int64_t chunks = (vocab + kChunk - 1) / kChunk;
    double* sums = memory.sums.at_least(chunks);
    const double target = row.uniform * sum_chunks(logits, vocab, weigh, row.min_p, sums);
    double before = 0.0;
    int64_t chosen = -1;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        if (sums[chunk] == 0.0) continue;
        chosen = chunk;  // the last chunk that has any weight, should rounding leave the target beyond the end
        if (before + sums[chunk] > target) break;
        before += sums[chunk];
    }
    const int64_t begin = chosen * kChunk, end = lesser(begin + kChunk, vocab);
    alignas(64) float weights[kChunk];
    for_each_vec(logits, begin, end, [&](int64_t i, Vec x, int) { store(weights + i - begin, weigh(x)); });
    double cumulative = before;
    int64_t last = -1;
    for (int64_t i = begin; i < end; ++i) {
        const float weight = weights[i - begin];
        if (!(weight >= row.min_p) || weight == 0.0f) continue;
        last = i;
        cumulative += double(weight);
        if (cumulative > target) break;
    }
    return last;
}

// Candidates of a top-p without top-k: all tokens but those so light that even all of them together weigh less than
// what top-p leaves out. So few remain, in a vocabulary of any size.
Candidates collect_for_top_p(const float* logits, int64_t vocab, const Weigher& weigh, const RowSettings& row,
                             double total, RowMemory& memory) {
    const double lightest = (1.0 - double(row.top_p)) * total / double(vocab);
    constexpr double kMargin = 0.01;  // for the rounding of weights and thresholds
    const double threshold = double(weigh.peak) + (std::log(lightest) - kMargin) * double(row.temperature);
    return collect(logits, vocab, float(threshold), weigh, memory);
}

int64_t sample_row(const float* logits, int64_t vocab, const RowSettings& row, RowMemory& memory) {
    const Peak peak = find_peak(logits, vocab);
    if (!peak.is_valid) return -1;
    if (row.temperature == 0.0f) return peak.id;
    const float inverse = 1.0f / row.temperature;
    const Weigher weigh{peak.value, inverse < 3.402823466e38f ? inverse : 3.402823466e38f};
    const bool has_top_p = row.top_p < 1.0f;
    if (row.top_k == 0 && !has_top_p) return draw_from_all(logits, vocab, weigh, row, memory);

    constexpr float kLowest = 1.17549435e-38f;  // the smallest weight that is not zero
    if (row.top_k == 0) {
        double* sums = memory.sums.at_least((vocab + kChunk - 1) / kChunk);
        const double total = sum_chunks(logits, vocab, weigh, 0.0f, sums);
        Candidates candidates = collect_for_top_p(logits, vocab, weigh, row, total, memory);
        keep_mass(candidates, kLowest, double(row.top_p) * total);
        return draw(candidates, row.min_p, row.uniform);
    }
    const int64_t capacity = lesser(vocab, row.top_k * 2 + 1024) + 2 * kLanes;
    const float kth = kth_largest(logits, vocab, row.top_k, peak.value, memory.values.at_least(capacity), capacity);
    Candidates candidates = collect(logits, vocab, kth, weigh, memory);
    if (has_top_p) {
        const double total = total_weight(candidates.weights, candidates.count, 0.0f);
        keep_mass(candidates, kLowest, double(row.top_p) * total);
    }
    return draw(candidates, row.min_p, row.uniform);
}

void sample_one(const SampleArgs& args, int64_t row, RowMemory& memory) {
    const int64_t top_k = args.top_k[row] > 0 && args.top_k[row] < args.vocab ? args.top_k[row] : 0;
    const RowSettings settings{args.temperature[row], top_k, args.top_p[row], args.min_p[row], args.uniform[row]};
    args.ids[row] = sample_row(args.logits + row * args.vocab, args.vocab, settings, memory);
}

// ---- log-probabilities of one row ----------------------------------------------------------------------------------

// The k largest logits by falling value, then rising id.
void find_top(const float* logits, int64_t vocab, int64_t k, float peak, int64_t* ids, float* values,
              RowMemory& memory) {
    const int64_t capacity = lesser(vocab, k * 2 + 1024) + 2 * kLanes;
    const float kth = kth_largest(logits, vocab, k, peak, memory.values.at_least(capacity), capacity);
    int64_t count = 0, ties = 0;
    for_each_vec(logits, 0, vocab, [&](int64_t i, Vec x, int) {
        for_each_lane(mask_greater(x, splat(kth)), [&](int lane) { ids[count++] = i + lane; });
    });
    for (int64_t i = 0; count + ties < k; ++i)
        if (logits[i] == kth) ids[count + ties++] = i;
    for (int64_t i = 1; i < count; ++i) {
        const int64_t id = ids[i];
        int64_t at = i;
        for (; at > 0 && logits[ids[at - 1]] < logits[id]; --at) ids[at] = ids[at - 1];
        ids[at] = id;
    }
    for (int64_t i = 0; i < k; ++i) values[i] = logits[ids[i]];
}

int32_t rank_of(const float* logits, int64_t vocab, float value) {
    int32_t larger = 0;
    for_each_vec(logits, 0, vocab,
                 [&](int64_t, Vec x, int) { larger += __builtin_popcount(mask_greater(x, splat(value))); });
    return larger + 1;
}

void logprobs_of_row(const LogprobArgs& args, int64_t row, RowMemory& memory) {
    const float* logits = args.logits + row * args.vocab;
    int64_t* top_ids = args.top_ids + row * args.top;
    float* top_logprobs = args.top_logprobs + row * args.top;
    const Peak peak = find_peak(logits, args.vocab);
    double normaliser = std::nan("");
    if (peak.is_valid) {
        const Weigher weigh{peak.value, 1.0f};
        double* sums = memory.sums.at_least((args.vocab + kChunk - 1) / kChunk);
        normaliser = double(peak.value) + std::log(sum_chunks(logits, args.vocab, weigh, 0.0f, sums));
        find_top(logits, args.vocab, args.top, peak.value, top_ids, top_logprobs, memory);
    } else {
        for (int64_t i = 0; i < args.top; ++i) top_ids[i] = i;
    }
    for (int64_t i = 0; i < args.top; ++i) top_logprobs[i] = float(double(logits[top_ids[i]]) - normaliser);
    const float chosen = logits[args.ids[row]];
    args.logprobs[row] = float(double(chosen) - normaliser);
    if (args.ranks != nullptr) args.ranks[row] = rank_of(logits, args.vocab, chosen);
}

// ---- all rows ------------------------------------------------------------------------------------------------------

template <class Args, class Row>
void for_each_row(const Args& args, Row row) {
    const int threads = int(lesser(threads_for(args.rows * args.vocab, kMinThreadWork, args.num_threads), args.rows));
    thread_local RowMemory memory;
    if (threads <= 1) {
        for (int64_t i = 0; i < args.rows; ++i) row(args, i, memory);
        return;
    }
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
    for (int64_t i = next++; i < args.rows; i = next++) row(args, i, memory);
}

void sample(const SampleArgs& args) { for_each_row(args, sample_one); }
void logprobs(const LogprobArgs& args) { for_each_row(args, logprobs_of_row); }

}  // namespace

extern const SamplingKernels sampling_kernels = {sample, logprobs};

}  // namespace penstock::PENSTOCK_ISA
