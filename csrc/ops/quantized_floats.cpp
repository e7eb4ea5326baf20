// Quantised linears whose activations stay as they are.
#include "ops/quantized_driver.h"
#include "ops/quantized_parts.h"

namespace penstock::PENSTOCK_ISA {

namespace {

template <class Elem, class Reader, Scaling kScaling, int kMostRows>
void run_scaled(const QuantizedLinearArgs& args) {
    run_quantized<QuantizedKernel<FloatFamily<Elem>, Reader, kScaling, kMostRows>, FloatRows<Elem>>(args);
}

template <class Elem, class Reader, int kMostRows = 8>
void run(const QuantizedLinearArgs& args) {
    if (args.layout.minimums == MinimumKind::none)
        run_scaled<Elem, Reader, Scaling::group, kMostRows>(args);
    else
        run_scaled<Elem, Reader, Scaling::minimum, kMostRows>(args);
}

}  // namespace

void linear_of_floats(const QuantizedLinearArgs& args) {
    if (args.dtype == DType::f32) return run<F32, WholeReader>(args);
#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX2
    // One or two rows wait for the memory, and read codes as they are; AVX-512 makes values of 4 bits in one instruction.
    const bool has_few_rows = rows_of_a_product(args) <= kRowsOfOneStream;
    if (args.layout.bits == 4 && PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX512) return run<Bf16, FloatNibbleReader>(args);
    if (args.layout.bits == 4 && has_few_rows) return run<Bf16, FloatNibbleReader, kRowsOfOneStream>(args);
    if (has_few_rows && is_fp8(args.layout))
        return run_scaled<Bf16, FloatByteReader<Fp8Codes>, Scaling::group, kRowsOfOneStream>(args);
    if (has_few_rows) return run<Bf16, FloatByteReader<IntegerCodes>, kRowsOfOneStream>(args);
#endif
    run<Bf16, WholeReader>(args);
}

}  // namespace penstock::PENSTOCK_ISA
