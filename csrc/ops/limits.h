// What the machine can do at best: the yardsticks of benchmarks/ops.py.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace penstock {

struct LimitsKernels {
    // Reads `bytes` (a multiple of 256) once, in as many parts as threads. The result keeps the reading from being
    // optimised away.
    int64_t (*read)(const void* data, int64_t bytes, int num_threads);
    // Multiplies and adds in registers only, with the instruction that the linear layers use for `dtype`, `steps` times
    // on each thread; int8: that of quantised ones. Returns the operations done.
    int64_t (*multiply)(DType dtype, int64_t steps, int num_threads);
};

}  // namespace penstock
