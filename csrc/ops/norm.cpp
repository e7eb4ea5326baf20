#include "ops/norm.h"

#include "ops/norm_row.h"
#include "simd.h"
#include "threads.h"

namespace penstock::PENSTOCK_ISA {

namespace {

// Elements below which another thread does not pay.
constexpr int64_t kMinThreadWork = 100'000;

template <class Elem>
void add_row(const typename Elem::Storage* x, typename Elem::Storage* residual, int64_t size) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(residual + i, load(residual + i) + load(x + i));
    const int rest = int(size - i);
    if (rest > 0) store_n(residual + i, load_n(residual + i, rest) + load_n(x + i, rest), rest);
}

template <class Elem>
void norm_row(const typename Elem::Storage* x, const typename Elem::Storage* weight, typename Elem::Storage* out,
              int64_t size, float eps) {
    const Vec scale = splat(inverse_rms(x, size, eps));
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(out + i, round_to(Elem{}, load(x + i) * scale) * load(weight + i));
    const int rest = int(size - i);
    if (rest > 0)
        store_n(out + i, round_to(Elem{}, load_n(x + i, rest) * scale) * load_n(weight + i, rest), rest);
}

template <class Elem>
void norm_rows(const RmsNormArgs& args, Range rows) {
    using Storage = typename Elem::Storage;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        const Storage* x = static_cast<const Storage*>(args.x) + row * args.size;
        Storage* out = static_cast<Storage*>(args.out) + row * args.size;
        if (args.residual != nullptr) {
            Storage* residual = static_cast<Storage*>(args.residual) + row * args.size;
            add_row<Elem>(x, residual, args.size);
            x = residual;
        }
        norm_row<Elem>(x, static_cast<const Storage*>(args.weight), out, args.size, args.eps);
    }
}

void rms_norm(const RmsNormArgs& args) {
    const auto run = args.dtype == DType::bf16 ? norm_rows<Bf16> : norm_rows<F32>;
    const int threads = threads_for(args.tokens * args.size, kMinThreadWork, args.num_threads);
    if (threads == 1) return run(args, {0, args.tokens});
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; ++thread) run(args, split(args.tokens, threads, thread));
}

}  // namespace

extern const NormKernels norm_kernels = {rms_norm};

}  // namespace penstock::PENSTOCK_ISA
