// The parts that csrc/ops/quantized*.cpp make the family of.
#pragma once

#include "ops/quantized.h"

namespace penstock::PENSTOCK_ISA {

void linear_of_bytes(const QuantizedLinearArgs& args);
void linear_of_floats(const QuantizedLinearArgs& args);
void pack_quantized(const QuantizedPackArgs& args);
void read_quantized_rows(const QuantizedRowsArgs& args);

}  // namespace penstock::PENSTOCK_ISA
