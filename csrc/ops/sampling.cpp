#include "ops/sampling.h"

#include <atomic>

#include "division.h"
#include "ops/sampling_row.h"
#include "scratch.h"
#include "threads.h"

namespace penstock::PENSTOCK_ISA {

namespace {

// Logits below which another thread does not pay.
constexpr int64_t kMinThreadWork = 30'000;

struct RowMemory {
    Scratch<float> values;  // buffer of the search for the k-th largest, then the candidates' weights
    Scratch<float> spare;   // what a search for a threshold destroys
    Scratch<int32_t> ids;   // the candidates' ids, rising
    Scratch<double> sums;   // of each chunk's weights
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
    Vec operator()(Vec logits) const { return exp_nonpositive((logits - splat(peak)) * splat(inverse_temperature)); }
};

// Tokens still in the draw, ids rising, with their weights.
struct Candidates {
    int32_t* ids;
    float* weights;
    int64_t count;
};

// Tokens whose logit is at least `threshold`, with their weights.
Candidates collect(const float* logits, int64_t vocab, float threshold, const Weigher& weigh, RowMemory& memory) {
    Candidates candidates{memory.ids.at_least(vocab + kLanes), memory.values.at_least(vocab + kLanes), 0};
    for_each_vec(logits, 0, vocab, [&](int64_t i, Vec x, int lanes) {
        const uint32_t mask = existing(mask_greater_equal(x, splat(threshold)), lanes);
        if (mask == 0) return;
        compress_indices(candidates.ids + candidates.count, mask, int32_t(i));
        candidates.count += compress(candidates.weights + candidates.count, mask, weigh(x));
    });
    return candidates;
}

// Drops all but the smallest set of largest weights that holds `wanted`; of equals at its edge the lower ids stay.
void keep_mass(Candidates& candidates, double wanted, RowMemory& memory) {
    constexpr float kLowest = 1.17549435e-38f;  // the smallest weight that is not zero
    float* spare = memory.spare.at_least(candidates.count + kLanes);
    memcpy(spare, candidates.weights, size_t(candidates.count) * sizeof(float));
    const Threshold<Weighed> edge = find_threshold<Weighed>(spare, candidates.count, kLowest, 1.0f, wanted);
    double mass = edge.above;
    int64_t kept = 0;
    for_each_vec(candidates.weights, 0, candidates.count, [&](int64_t i, Vec weights, int lanes) {
        uint32_t mask = mask_greater(weights, splat(edge.value));
        uint32_t ties = mask_greater_equal(weights, splat(edge.value)) & ~mask;
        for (; ties != 0 && mass < wanted; ties &= ties - 1, mass += double(edge.value)) mask |= ties & -ties;
        compress_ids(candidates.ids + kept, existing(mask, lanes), candidates.ids + i);
        kept += compress(candidates.weights + kept, existing(mask, lanes), weights);
    });
    candidates.count = kept;
}

// Weights of the whole vocabulary, or of candidates: at(i, lanes) gives those from i on, 0 in missing lanes.
struct VocabularyWeights {
    const float* logits;
    int64_t count;
    Weigher weigh;
    Vec at(int64_t i, int lanes) const {
        if (lanes == kLanes) return weigh(load(logits + i));
        return select_lanes(weigh(load_n(logits + i, lanes)), 0, lanes, 0.0f);
    }
};
struct CandidateWeights {
    const float* weights;
    int64_t count;
    Vec at(int64_t i, int lanes) const { return lanes == kLanes ? load(weights + i) : load_n(weights + i, lanes); }
};

// Calls body(index, weights) for each 16 weights of [begin, end); those below min_p are 0.
template <class Weights, class Body>
void for_each_weight(const Weights& weights, int64_t begin, int64_t end, float min_p, Body body) {
    for (int64_t i = begin; i < end; i += kLanes) {
        const Vec weight = weights.at(i, int(min_of(kLanes, end - i)));
        body(i, keep_where(mask_greater_equal(weight, splat(min_p)), weight));
    }
}

// The sum of each chunk's weights, of those at least min_p; returns their total.
template <class Weights>
double sum_chunks(const Weights& weights, float min_p, double* sums) {
    double total = 0.0;
    for (int64_t chunk = 0; chunk < weights.count; chunk += kChunk) {
        DoubleSum sum;
        for_each_weight(weights, chunk, min_of(chunk + kChunk, weights.count), min_p,
                        [&](int64_t, Vec weight) { sum.add(weight); });
        sums[chunk / kChunk] = sum.total();
        total += sums[chunk / kChunk];
    }
    return total;
}

double* room_for_sums(RowMemory& memory, int64_t count) { return memory.sums.at_least(ceil_div(count, kChunk)); }

// The index at which the cumulative weight passes its `uniform`-th part: by chunks first, then closely in one of them.
template <class Weights>
int64_t draw(const Weights& weights, float min_p, double uniform, RowMemory& memory) {
    double* sums = room_for_sums(memory, weights.count);
    const double target = uniform * sum_chunks(weights, min_p, sums);
    double cumulative = 0.0;
    int64_t chosen = 0;
    for (int64_t chunk = 0; chunk * kChunk < weights.count; ++chunk) {
        if (sums[chunk] == 0.0) continue;
        chosen = chunk;  // the last one that weighs anything, should rounding leave the target beyond the end
        if (cumulative + sums[chunk] > target) break;
        cumulative += sums[chunk];
    }
    const int64_t begin = chosen * kChunk, end = min_of(begin + kChunk, weights.count);
    alignas(64) float close[kChunk];
    for_each_weight(weights, begin, end, min_p, [&](int64_t i, Vec weight) { store(close + i - begin, weight); });
    int64_t last = begin;
    for (int64_t i = begin; i < end; ++i) {
        if (close[i - begin] == 0.0f) continue;
        last = i;
        cumulative += double(close[i - begin]);
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
    const VocabularyWeights all{logits, vocab, weigh};
    const bool has_top_p = row.top_p < 1.0f;
    if (row.top_k == 0 && !has_top_p) return draw(all, row.min_p, row.uniform, memory);

    Candidates candidates;
    double total;
    if (row.top_k == 0) {
        total = sum_chunks(all, 0.0f, room_for_sums(memory, vocab));
        candidates = collect_for_top_p(logits, vocab, weigh, row, total, memory);
    } else {
        const int64_t room = selection_room(vocab, row.top_k);
        const float kth = kth_largest(logits, vocab, row.top_k, peak.value, memory.values.at_least(room),
                                      memory.spare.at_least(room));
        candidates = collect(logits, vocab, kth, weigh, memory);
        total = Weighed::at_least(candidates.weights, candidates.count, 0.0f);
    }
    if (has_top_p) keep_mass(candidates, double(row.top_p) * total, memory);
    const CandidateWeights kept{candidates.weights, candidates.count};
    return candidates.ids[draw(kept, row.min_p, row.uniform, memory)];
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
    const int64_t room = selection_room(vocab, k);
    const float kth = kth_largest(logits, vocab, k, peak, memory.values.at_least(room), memory.spare.at_least(room));
    int64_t count = 0, ties = 0;
    for_each_vec(logits, 0, vocab, [&](int64_t i, Vec x, int) {
        for (uint32_t mask = mask_greater(x, splat(kth)); mask != 0; mask &= mask - 1)
            ids[count++] = i + __builtin_ctz(mask);
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
        const VocabularyWeights weights{logits, args.vocab, {peak.value, 1.0f}};
        const double total = sum_chunks(weights, 0.0f, room_for_sums(memory, args.vocab));
        normaliser = double(peak.value) + std::log(total);
        if (args.top > 0) find_top(logits, args.vocab, args.top, peak.value, top_ids, top_logprobs, memory);
    } else {
        for (int64_t i = 0; i < args.top; ++i) top_ids[i] = i;
    }
    for (int64_t i = 0; i < args.top; ++i) top_logprobs[i] = float(double(logits[top_ids[i]]) - normaliser);
    const float chosen = logits[args.ids[row]];
    args.logprobs[row] = float(double(chosen) - normaliser);
    if (args.ranks != nullptr) args.ranks[row] = rank_of(logits, args.vocab, chosen);
}

// ---- masks ---------------------------------------------------------------------------------------------------------

void mask_row(const MaskArgs& args, int64_t row, RowMemory&) {
    constexpr float kNever = -__builtin_inff();
    float* logits = args.logits + args.row_ids[row] * args.vocab;
    const int64_t words = (args.vocab + 31) / 32;
    const uint32_t* mask = args.masks + row * words;
    for (int64_t word = 0; word < words; ++word) {
        const uint32_t bits = mask[word];
        if (bits == 0xffffffffu) continue;
        float* values = logits + word * 32;
        const int count = int(min_of(32, args.vocab - word * 32));
        if (bits == 0) {
            for (int i = 0; i < count; ++i) values[i] = kNever;
        } else {
            for (int i = 0; i < count; ++i) values[i] = (bits >> i) & 1 ? values[i] : kNever;
        }
    }
}

// ---- all rows ------------------------------------------------------------------------------------------------------

template <class Args, class Row>
void for_each_row(const Args& args, Row row) {
    const int threads = int(min_of(threads_for(args.rows * args.vocab, kMinThreadWork, args.num_threads), args.rows));
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
void mask_logits(const MaskArgs& args) { for_each_row(args, mask_row); }

}  // namespace

extern const SamplingKernels sampling_kernels = {sample, logprobs, mask_logits};

}  // namespace penstock::PENSTOCK_ISA
