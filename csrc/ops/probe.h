// A self-test per instruction set: executes the instructions that its kernels rely on and checks the results.
#pragma once

namespace penstock {

struct ProbeKernels {
    // True if the instructions gave the right results. May die of SIGILL: call it through dispatch.
    bool (*self_test)();
};

}  // namespace penstock
