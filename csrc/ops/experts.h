// Mixtures of experts: which experts a token meets, what these give, and their weighted sum.
//
// Pairs of a token and one of its experts are put in the order of the experts, so that a linear layer of groups
// (row_groups.h) reads each expert once for all its tokens. A token's result does not depend on the others.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "ops/quantized.h"

namespace penstock {

constexpr int kMaxExperts = 1024;

struct ChooseExpertsArgs {
    const float* logits;  // [tokens, num_experts]
    int32_t* experts;     // [tokens, top_k]: the most probable first, of equals the lower number
    float* weights;       // [tokens, top_k]: their softmax weights
    int64_t tokens;
    int num_experts, top_k;
    bool is_renormalized;  // the weights are divided by their sum
    int num_threads;
};

// A matrix [n, k] of every expert, each packed by itself, all in one layout.
struct ExpertMatrices {
    const void* const* weights;  // [experts]
    bool is_quantized;
    WeightLayout layout;  // if so
};

struct ExpertsMlpArgs {
    const void* x;         // [tokens, hidden]
    const int32_t* experts;  // [tokens, top_k]
    const float* weights;    // [tokens, top_k]
    void* out;             // [tokens, hidden]
    ExpertMatrices gate_up;  // [2 * inner, hidden], gate's rows first
    ExpertMatrices down;     // [hidden, inner]
    int64_t tokens;
    int num_experts, top_k;
    int64_t hidden, inner;
    DType dtype;  // of x and out: f32 or bf16
    int num_threads;
};

struct AddSharedArgs {
    const void* mixed;    // [tokens, size]
    const float* logits;  // [tokens]
    const void* shared;   // [tokens, size]
    void* out;            // [tokens, size]
    int64_t tokens, size;
    DType dtype;  // of mixed, shared and out
    int num_threads;
};

struct ExpertsKernels {
    void (*choose)(const ChooseExpertsArgs&);
    // The sum over a token's experts of weight * down(silu(gate(x)) * up(x)), in f32 and in their order, rounded once.
    void (*mlp)(const ExpertsMlpArgs&);
    // mixed + sigmoid(logit) * shared in f32, rounded once.
    void (*add_shared)(const AddSharedArgs&);
};

}  // namespace penstock
