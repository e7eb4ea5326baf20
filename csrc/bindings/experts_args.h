// A mixture's matrices as Python passes them.
#pragma once

#include "bindings/quantized_layout.h"

namespace penstock {

// numbers: of a quantised layout, or empty. addresses: of the experts' weights.
inline ExpertMatrices matrices_of(const LayoutNumbers& numbers, Address addresses) {
    const bool is_quantized = nb::len(numbers) > 0;
    return {pointer<const void*>(addresses), is_quantized, is_quantized ? layout_of(numbers) : WeightLayout{}};
}

}  // namespace penstock
