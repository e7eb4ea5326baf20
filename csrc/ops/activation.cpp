#include "ops/activation.h"

#include "division.h"
#include "ops/silu.h"
#include "threads.h"

namespace penstock::PENSTOCK_ISA {

namespace {

// Elements below which another thread does not pay.
constexpr int64_t kMinThreadWork = 20'000;
// Columns that one task takes of a row, so that a single wide row can be shared.
constexpr int64_t kTaskColumns = 1024;

template <class Elem>
void run_tasks(const SiluAndMulArgs& args, Range tasks) {
    using Storage = typename Elem::Storage;
    const int64_t tasks_per_row = ceil_div(args.size, kTaskColumns);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
        const int64_t row = task / tasks_per_row, first = task % tasks_per_row * kTaskColumns;
        const int64_t end = min_of(first + kTaskColumns, args.size);
        const Storage* gate = static_cast<const Storage*>(args.gate_up) + row * 2 * args.size;
        const Storage* up = gate + args.size;
        Storage* out = static_cast<Storage*>(args.out) + row * args.size;
        int64_t i = first;
        for (; i + kLanes <= end; i += kLanes) store(out + i, silu_times<Elem>(load(gate + i), load(up + i)));
        const int rest = int(end - i);
        if (rest > 0) store_n(out + i, silu_times<Elem>(load_n(gate + i, rest), load_n(up + i, rest)), rest);
    }
}

// x * Phi(x) = max(x, 0) - |x| Q(|x|), where the tail Q is half of erfc(|x| / sqrt 2): Abramowitz and Stegun 7.1.26,
// absolute error of erfc below 1.5e-7.
Vec gelu_of(Vec x) {
    const Vec one = splat(1.0f);
    const Vec size = max(zero() - x, x);
    const Vec t = one / fma(size, splat(0.3275911f * 0.70710678118654752f), one);
    Vec p = splat(1.061405429f * 0.5f);
    p = fma(p, t, splat(-1.453152027f * 0.5f));
    p = fma(p, t, splat(1.421413741f * 0.5f));
    p = fma(p, t, splat(-0.284496736f * 0.5f));
    p = fma(p, t, splat(0.254829592f * 0.5f));
    const Vec tail = p * t * exp(splat(-0.5f) * x * x);
    return max(zero(), x) - size * tail;
}

template <class Elem>
void gelu_range(const GeluArgs& args, Range range) {
    using Storage = typename Elem::Storage;
    const Storage* x = static_cast<const Storage*>(args.x);
    Storage* out = static_cast<Storage*>(args.out);
    int64_t i = range.begin;
    for (; i + kLanes <= range.end; i += kLanes) store(out + i, gelu_of(load(x + i)));
    const int rest = int(range.end - i);
    if (rest > 0) store_n(out + i, gelu_of(load_n(x + i, rest)), rest);
}

void gelu(const GeluArgs& args) {
    const auto run = args.dtype == DType::bf16 ? gelu_range<Bf16> : gelu_range<F32>;
    const int threads = threads_for(args.count, kMinThreadWork, args.num_threads);
    if (threads == 1) return run(args, {0, args.count});
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; ++thread) run(args, split(args.count, threads, thread));
}

void silu_and_mul(const SiluAndMulArgs& args) {
    const auto run = args.dtype == DType::bf16 ? run_tasks<Bf16> : run_tasks<F32>;
    const int64_t tasks = args.tokens * ceil_div(args.size, kTaskColumns);
    const int threads = threads_for(args.tokens * args.size, kMinThreadWork, args.num_threads);
    if (threads == 1) return run(args, {0, tasks});
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; ++thread) run(args, split(tasks, threads, thread));
}

}  // namespace

extern const ActivationKernels activation_kernels = {silu_and_mul, gelu};

}  // namespace penstock::PENSTOCK_ISA
