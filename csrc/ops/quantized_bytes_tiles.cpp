// Quantised linears whose activations are rounded to 8 bits, through matrix tiles.
#include "ops/quantized_tiles.h"

#include "ops/quantized_driver.h"
#include "ops/quantized_parts.h"

namespace penstock::PENSTOCK_ISA {

namespace {

template <class Tiles, class Elem>
void run(const QuantizedLinearArgs& args) {
    using Rows = BytesOfRows<Elem>;
    if (args.layout.group_size == 0)
        run_quantized<RowTileKernel<Tiles>, Rows>(args);
    else if (args.layout.minimums == MinimumKind::none)
        run_quantized<GroupTileKernel<Tiles, Scaling::group>, Rows>(args);
    else if (has_whole_minimums(args.layout))
        run_quantized<GroupTileKernel<Tiles, Scaling::whole_minimum>, Rows>(args);
    else
        run_quantized<GroupTileKernel<Tiles, Scaling::minimum>, Rows>(args);
}

template <class Tiles>
void run_any(const QuantizedLinearArgs& args) {
    args.dtype == DType::f32 ? run<Tiles, F32>(args) : run<Tiles, Bf16>(args);
}

}  // namespace

#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AMX
void linear_of_bytes_tiles(const QuantizedLinearArgs& args) { run_any<AmxTiles>(args); }
#endif

void linear_of_bytes_emulated_tiles(const QuantizedLinearArgs& args) { run_any<EmulatedTiles>(args); }

}  // namespace penstock::PENSTOCK_ISA
