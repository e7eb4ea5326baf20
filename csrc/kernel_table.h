// The table of kernel families. To add one: a header csrc/ops/<family>.h with `struct <Type>` of function pointers, a
// source csrc/ops/<family>.cpp that defines `extern const <Type> <family>_kernels` in namespace penstock::PENSTOCK_ISA,
// a csrc/bindings/<family>.cpp that defines `bind_<family>`, and one line in each list below.
#pragma once

#include "isa.h"
#include "ops/activation.h"
#include "ops/attention.h"
#include "ops/copy.h"
#include "ops/experts.h"
#include "ops/full_attention.h"
#include "ops/limits.h"
#include "ops/linear.h"
#include "ops/norm.h"
#include "ops/probe.h"
#include "ops/quantized.h"
#include "ops/rope.h"
#include "ops/sampling.h"
#include "ops/scale_search.h"

#define PENSTOCK_FOR_EACH_FAMILY(X)         \
    X(activation, ActivationKernels)        \
    X(attention, AttentionKernels)          \
    X(copy, CopyKernels)                    \
    X(experts, ExpertsKernels)              \
    X(full_attention, FullAttentionKernels) \
    X(limits, LimitsKernels)                \
    X(linear, LinearKernels)                \
    X(norm, NormKernels)                    \
    X(probe, ProbeKernels)                  \
    X(quantized, QuantizedKernels)          \
    X(rope, RopeKernels)                    \
    X(sampling, SamplingKernels)            \
    X(scale_search, ScaleSearchKernels)

namespace penstock {

struct KernelTable {
    const char* isa;
#define PENSTOCK_FIELD(family, Type) Type family;
    PENSTOCK_FOR_EACH_FAMILY(PENSTOCK_FIELD)
#undef PENSTOCK_FIELD
};

}  // namespace penstock
