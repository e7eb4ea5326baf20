// Choosing the next token, and log-probabilities. Each row alone, so its result never depends on the others.
#pragma once

#include <cstdint>

namespace penstock {

struct SampleArgs {
    const float* logits;       // [rows, vocab]; -inf: never chosen
    const float* temperature;  // [rows]; 0: the largest logit, the lowest id among equals
    const int32_t* top_k;      // [rows]; outside [1, vocab): off. Equals of the k-th stay
    const float* top_p;        // [rows]; 1 or more: off. Of equals at the edge, lower ids stay
    const float* min_p;        // [rows]; 0: off
    const double* uniform;     // [rows], in [0, 1)
    int64_t* ids;              // [rows]; -1 where no logit is finite, or one is NaN or +inf
    int64_t rows, vocab;
    int num_threads;
};

struct LogprobArgs {
    const float* logits;   // [rows, vocab]
    const int64_t* ids;    // [rows]
    float* logprobs;       // [rows], of `ids`; NaN for a row that has a NaN or +inf, or nothing finite
    int32_t* ranks;        // [rows] or null: 1 + how many logits are larger
    int64_t* top_ids;      // [rows, top], by falling logit, then rising id
    float* top_logprobs;   // [rows, top]
    int64_t rows, vocab, top;
    int num_threads;
};

struct MaskArgs {
    float* logits;           // [any, vocab]
    const int64_t* row_ids;  // [rows] which of them are masked
    const uint32_t* masks;   // [rows, (vocab + 31) / 32]; bit i % 32 of word i / 32 keeps logit i
    int64_t rows, vocab;
    int num_threads;
};

struct SamplingKernels {
    // Temperature, then top-k, then top-p over what top-k left, then min-p; then the inverse of the cumulative
    // distribution in rising id order, summed in double.
    void (*sample)(const SampleArgs&);
    void (*logprobs)(const LogprobArgs&);
    // Every logit that is not kept becomes -inf.
    void (*mask_logits)(const MaskArgs&);
};

}  // namespace penstock
