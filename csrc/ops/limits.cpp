#include "ops/limits.h"

#include "ops/quantized_simd.h"
#include "ops/tile_registers.h"
#include "simd.h"
#include "threads.h"

namespace penstock::PENSTOCK_ISA {

namespace {

// 32-bit lanes of the compiler's own vectors: it makes whatever the instruction set has of them.
typedef uint32_t Lanes __attribute__((vector_size(64)));

int64_t read_part(const char* data, int64_t bytes) {
    Lanes sums[4] = {};
    for (int64_t at = 0; at < bytes; at += 256)
        for (int i = 0; i < 4; ++i) sums[i] += *reinterpret_cast<const Lanes*>(data + at + i * 64);
    const Lanes sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    int64_t total = 0;
    for (int i = 0; i < 16; ++i) total += sum[i];
    return total;
}

int64_t read(const void* data, int64_t bytes, int num_threads) {
    if (num_threads == 1) return read_part(static_cast<const char*>(data), bytes);
    int64_t total = 0;
#pragma omp parallel for num_threads(num_threads) reduction(+ : total)
    for (int part = 0; part < num_threads; ++part) {
        const Range lines = split(bytes / 256, num_threads, part);
        total += read_part(static_cast<const char*>(data) + lines.begin * 256, (lines.end - lines.begin) * 256);
    }
    return total;
}

template <class Elem>
int64_t multiply_vectors(int64_t steps) {
    volatile uint32_t unknown = 0;  // to the compiler, which would multiply constants itself
    const uint32_t unit = unknown;
    const Units a = splat_unit(&unit), b = splat_unit(&unit);
    // Enough independent sums to hide the latency, few enough to stay in registers.
    constexpr int kSums = kAccumulators < 12 ? kAccumulators : 12;
    Vec sums[kSums];
    for (Vec& sum : sums) sum = zero();
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
        for (int i = 0; i < kSums; ++i) sums[i] = dot(Elem{}, sums[i], a, b);
        asm volatile("");  // keeps the two loops as they are
    }
    volatile float total = 0.f;  // keeps the loop from being optimised away
    for (const Vec& sum : sums) total = total + reduce_sum(sum);
    return steps * kSums * kLanes * Elem::kPerUnit * 2;
}

#if PENSTOCK_ISA_LEVEL >= PENSTOCK_LEVEL_AMX

template <class Operands>
int64_t multiply_tiles(int64_t steps) {
    ShapedTiles<AmxTiles> tiles;
    shape_whole_tiles(tiles, 2 * kTileRows);
    for (int64_t step = 0; step < steps; ++step) {
        tiles.multiply<0, 4, 6>(Operands{});
        tiles.multiply<1, 4, 7>(Operands{});
        tiles.multiply<2, 5, 6>(Operands{});
        tiles.multiply<3, 5, 7>(Operands{});
    }
    return steps * 4 * kTileRows * kLanes * kTileRows * 2;  // units
}

int64_t multiply_bf16(int64_t steps) { return multiply_tiles<Bf16>(steps) * 2; }
int64_t multiply_int8(int64_t steps) { return multiply_tiles<Codes<true>>(steps) * 4; }

#else

int64_t multiply_bf16(int64_t steps) { return multiply_vectors<Bf16>(steps); }
int64_t multiply_int8(int64_t steps) {
    volatile uint32_t unknown = 0;
    const uint32_t unit = unknown;
    const Units a = splat_unit(&unit), b = splat_unit(&unit);
    constexpr int kSums = kAccumulators < 12 ? kAccumulators : 12;
    Ints sums[kSums];
    for (Ints& sum : sums) sum = splat_int(0);
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
        for (int i = 0; i < kSums; ++i) sums[i] = dot_bytes(sums[i], a, b);
        asm volatile("");
    }
    volatile float total = 0.f;
    for (const Ints& sum : sums) total = total + reduce_sum(to_vec(sum));
    return steps * kSums * kLanes * 4 * 2;
}

#endif

int64_t multiply(DType dtype, int64_t steps, int num_threads) {
    int64_t operations = 0;
#pragma omp parallel for num_threads(num_threads) reduction(+ : operations)
    for (int thread = 0; thread < num_threads; ++thread)
        operations += dtype == DType::f32    ? multiply_vectors<F32>(steps)
                      : dtype == DType::int8 ? multiply_int8(steps)
                                             : multiply_bf16(steps);
    return operations;
}

}  // namespace

extern const LimitsKernels limits_kernels = {read, multiply};

}  // namespace penstock::PENSTOCK_ISA
