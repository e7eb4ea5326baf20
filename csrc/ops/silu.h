// The gate of a gated feed-forward block.
#pragma once

#include "simd.h"

namespace penstock::PENSTOCK_ISA {

// silu(gate) rounded, times up; both are values of Elem.
template <class Elem>
static inline Vec silu_times(Vec gate, Vec up) {
    const Vec one = splat(1.0f);
    return round_to(Elem{}, gate / (one + exp(zero() - gate))) * up;
}

}  // namespace penstock::PENSTOCK_ISA
