// Quantised linears whose activations stay as they are.
#include "ops/quantized_driver.h"
#include "ops/quantized_parts.h"

namespace penstock::PENSTOCK_ISA {

namespace {

template <class Elem, class Reader>
void run(const QuantizedLinearArgs& args) {
    using Family = FloatFamily<Elem>;
    if (args.layout.minimums == MinimumKind::none)
        run_quantized<QuantizedKernel<Family, Reader, Scaling::group>, FloatRows<Elem>>(args);
    else
        run_quantized<QuantizedKernel<Family, Reader, Scaling::minimum>, FloatRows<Elem>>(args);
}

}  // namespace

void linear_of_floats(const QuantizedLinearArgs& args) {
    if (args.dtype == DType::f32) return run<F32, WholeReader>(args);
#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AVX512
    if (args.layout.bits == 4) return run<Bf16, FloatNibbleReader>(args);
#endif
    run<Bf16, WholeReader>(args);
}

}  // namespace penstock::PENSTOCK_ISA
