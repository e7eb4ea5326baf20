// The parts that csrc/ops/quantized*.cpp make the family of.
#pragma once

#include "isa.h"
#include "ops/quantized.h"

namespace penstock::PENSTOCK_ISA {

void linear_of_bytes(const QuantizedLinearArgs& args);
void linear_of_bytes_emulated_tiles(const QuantizedLinearArgs& args);
#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AMX
void linear_of_bytes_tiles(const QuantizedLinearArgs& args);
#endif
void linear_of_floats(const QuantizedLinearArgs& args);
void pack_quantized(const QuantizedPackArgs& args);
void read_quantized_rows(const QuantizedRowsArgs& args);

}  // namespace penstock::PENSTOCK_ISA
