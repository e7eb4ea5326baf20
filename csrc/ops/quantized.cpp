#include "ops/quantized.h"

#include "ops/quantized_parts.h"

namespace penstock::PENSTOCK_ISA {

namespace {

void linear(const QuantizedLinearArgs& args) {
    if (args.m == 0) return;
    args.layout.is_float ? linear_of_floats(args) : linear_of_bytes(args);
}

}  // namespace

extern const QuantizedKernels quantized_kernels = {linear, pack_quantized, read_quantized_rows};

}  // namespace penstock::PENSTOCK_ISA
