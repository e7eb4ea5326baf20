// The search for a group's scale (and minimum) that GGUF's K types are written with: weighted least squares over
// several starting scales.
#pragma once

#include <cstdint>

namespace penstock {

struct ScaleSearchArgs {
    const float* x;       // [groups, size]
    const float* weight;  // [groups, size]: how much the error of each value counts
    float* scale;         // [groups]
    float* minimum;       // [groups]; of affine only
    int64_t groups;
    int size;  // 16 or 32
    int top;   // codes are 0 to top; symmetric: -top to top - 1
    int num_threads;
};

struct ScaleSearchKernels {
    void (*affine)(const ScaleSearchArgs&);     // x = scale * code - minimum, minimum >= 0
    void (*symmetric)(const ScaleSearchArgs&);  // x = scale * code
};

}  // namespace penstock
