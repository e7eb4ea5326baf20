// Linear layers of several weights of one shape: groups of rows, each with a weight of its own (a mixture's experts).
#pragma once

#include <cstdint>

namespace penstock {

// Rows [x_row, x_row + rows) of x, multiplied with `weight`, are rows [out_row, out_row + rows) of the output.
struct RowGroup {
    const void* weight;
    int64_t x_row, out_row, rows;
};

// Null: one weight, the arguments' own, for all rows.
struct RowGroups {
    const RowGroup* first = nullptr;
    int64_t count = 0;
};

}  // namespace penstock
