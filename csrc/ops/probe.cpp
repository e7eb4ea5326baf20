#include "ops/probe.h"

#include "isa.h"

namespace penstock::PENSTOCK_ISA {

namespace {

bool self_test() { return true; }

}  // namespace

extern const ProbeKernels probe_kernels = {self_test};

}  // namespace penstock::PENSTOCK_ISA
