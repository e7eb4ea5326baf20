// The table of kernel families. To add one: a header csrc/ops/<family>.h with `struct <Type>` of function pointers, a
// source csrc/ops/<family>.cpp that defines `extern const <Type> <family>_kernels` in namespace penstock::PENSTOCK_ISA,
// a csrc/bindings/<family>.cpp that defines `bind_<family>`, and one line in each list below.
#pragma once

#include "isa.h"
#include "ops/linear.h"
#include "ops/probe.h"

#define PENSTOCK_FOR_EACH_FAMILY(X) \
    X(linear, LinearKernels)        \
    X(probe, ProbeKernels)

namespace penstock {

struct KernelTable {
    const char* isa;
#define PENSTOCK_FIELD(family, Type) Type family;
    PENSTOCK_FOR_EACH_FAMILY(PENSTOCK_FIELD)
#undef PENSTOCK_FIELD
};

}  // namespace penstock
