#include "ops/linear.h"

#include "ops/linear_driver.h"
#include "ops/linear_pack.h"
#include "ops/linear_tiles.h"

namespace penstock::PENSTOCK_ISA {

namespace {

// x in whole pairs: rows of an odd number of bf16 are copied and padded with a zero.
const void* whole_pairs(const LinearArgs& args) {
    if (args.k % 2 == 0) return args.x;
    static thread_local Scratch<bf16_t> scratch;
    bf16_t* padded = scratch.at_least(args.m * (args.k + 1));
    for (int64_t row = 0; row < args.m; ++row) {
        memcpy(padded + row * (args.k + 1), static_cast<const bf16_t*>(args.x) + row * args.k, size_t(args.k) * 2);
        padded[row * (args.k + 1) + args.k] = 0;
    }
    return padded;
}

void linear_of_bf16(const LinearArgs& args, const void* x) {
#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AMX
    run_linear<TileKernel<AmxTiles>>(args, x);
#else
#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_BF16
    if (!tuning().halves_vectors) return run_linear<VectorKernel<Bf16, kTallShape>>(args, x);
#endif
    run_linear<VectorKernel<Bf16>>(args, x);
#endif
}

void linear(const LinearArgs& args) {
    if (args.m == 0) return;
    if (args.dtype == DType::f32)
        run_linear<VectorKernel<F32>>(args, args.x);
    else
        linear_of_bf16(args, whole_pairs(args));
}

void linear_emulated_tiles(const LinearArgs& args) {
    if (args.m > 0) run_linear<TileKernel<EmulatedTiles>>(args, whole_pairs(args));
}

}  // namespace

extern const LinearKernels linear_kernels = {linear, linear_emulated_tiles, pack, embedding};

}  // namespace penstock::PENSTOCK_ISA
