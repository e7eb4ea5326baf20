// A layout of quantised weights as Python passes it.
#pragma once

#include "bindings/bindings.h"

namespace penstock {

// (bits, group_size, is_float, scales, minimums, offset, x_per_token, step, header_bytes, step_bytes, table)
using LayoutNumbers = nb::tuple;

inline WeightLayout layout_of(const LayoutNumbers& numbers) {
    const auto number = [&](int i) { return nb::cast<int>(numbers[i]); };
    return {number(0), number(1), number(2) != 0, ScaleKind(number(3)), MinimumKind(number(4)), number(5),
            number(6) != 0, number(7), number(8), number(9), pointer<void>(nb::cast<Address>(numbers[10]))};
}

}  // namespace penstock
