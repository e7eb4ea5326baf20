#include "ops/quantized.h"

#include "ops/quantized_parts.h"

namespace penstock::PENSTOCK_ISA {

namespace {

void linear(const QuantizedLinearArgs& args) {
    if (args.m == 0) return;
    args.layout.is_float ? linear_of_floats(args) : linear_of_bytes(args);
}

void linear_emulated_tiles(const QuantizedLinearArgs& args) {
    if (args.m > 0) linear_of_bytes_emulated_tiles(args);
}

}  // namespace

extern const QuantizedKernels quantized_kernels = {linear, linear_emulated_tiles, pack_quantized, read_quantized_rows};

}  // namespace penstock::PENSTOCK_ISA
