#include "ops/activation.h"

#include "simd.h"
#include "threads.h"

namespace penstock::PENSTOCK_ISA {

namespace {

// Elements below which another thread does not pay.
constexpr int64_t kMinThreadWork = 20'000;
// Columns that one task takes of a row, so that a single wide row can be shared.
constexpr int64_t kTaskColumns = 1024;

template <class Elem>
Vec silu_times(Vec gate, Vec up) {
    const Vec one = splat(1.0f);
    return round_to(Elem{}, gate / (one + exp(zero() - gate))) * up;
}

template <class Elem>
void run_tasks(const SiluAndMulArgs& args, Range tasks) {
    using Storage = typename Elem::Storage;
    const int64_t tasks_per_row = (args.size + kTaskColumns - 1) / kTaskColumns;
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
        const int64_t row = task / tasks_per_row, first = task % tasks_per_row * kTaskColumns;
        const int64_t end = first + kTaskColumns < args.size ? first + kTaskColumns : args.size;
        const Storage* gate = static_cast<const Storage*>(args.gate_up) + row * 2 * args.size;
        const Storage* up = gate + args.size;
        Storage* out = static_cast<Storage*>(args.out) + row * args.size;
        int64_t i = first;
        for (; i + kLanes <= end; i += kLanes) store(out + i, silu_times<Elem>(load(gate + i), load(up + i)));
        const int rest = int(end - i);
        if (rest > 0) store_n(out + i, silu_times<Elem>(load_n(gate + i, rest), load_n(up + i, rest)), rest);
    }
}

void silu_and_mul(const SiluAndMulArgs& args) {
    const auto run = args.dtype == DType::bf16 ? run_tasks<Bf16> : run_tasks<F32>;
    const int64_t tasks = args.tokens * ((args.size + kTaskColumns - 1) / kTaskColumns);
    const int threads = threads_for(args.tokens * args.size, kMinThreadWork, args.num_threads);
    if (threads == 1) return run(args, {0, tasks});
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; ++thread) run(args, split(tasks, threads, thread));
}

}  // namespace

extern const ActivationKernels activation_kernels = {silu_and_mul};

}  // namespace penstock::PENSTOCK_ISA
