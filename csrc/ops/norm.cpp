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
    for (; i + kLanes <= size; i += kLanes) store(out + i, load(x + i) * scale * load(weight + i));
    const int rest = int(size - i);
    if (rest > 0) store_n(out + i, load_n(x + i, rest) * scale * load_n(weight + i, rest), rest);
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

// The mean of f(i) over [0, size), where f gives lanes i to i + n (the others zero), in one order of summation.
template <class Lanes>
float mean_of(int64_t size, Lanes lanes) {
    constexpr int kChains = 4;
    Vec sums[kChains] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + kChains * kLanes <= size; i += kChains * kLanes)
        for (int chain = 0; chain < kChains; ++chain)
            sums[chain] = sums[chain] + lanes(i + chain * kLanes, kLanes);
    for (; i < size; i += kLanes) sums[0] = sums[0] + lanes(i, size - i < kLanes ? int(size - i) : kLanes);
    return reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / float(size);
}

template <class Storage>
Vec load_up_to(const Storage* p, int n) {
    return n == kLanes ? load(p) : load_n(p, n);
}

template <class Storage>
void store_up_to(Storage* p, Vec x, int n) {
    n == kLanes ? store(p, x) : store_n(p, x, n);
}

template <class Elem>
void layer_norm_rows(const LayerNormArgs& args, Range rows) {
    using Storage = typename Elem::Storage;
    const int64_t size = args.size;
    const Storage* weight = static_cast<const Storage*>(args.weight);
    const Storage* bias = static_cast<const Storage*>(args.bias);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        const Storage* x = static_cast<const Storage*>(args.x) + row * size;
        Storage* out = static_cast<Storage*>(args.out) + row * size;
        if (args.residual != nullptr) {
            const Storage* residual = static_cast<const Storage*>(args.residual) + row * size;
            for (int64_t i = 0; i < size; i += kLanes) {
                const int n = size - i < kLanes ? int(size - i) : kLanes;
                store_up_to(out + i, load_up_to(x + i, n) + load_up_to(residual + i, n), n);
            }
            x = out;  // read before it is overwritten, lane by lane
        }
        const Vec mean = splat(mean_of(size, [&](int64_t i, int n) { return load_up_to(x + i, n); }));
        const float variance = mean_of(size, [&](int64_t i, int n) {
            const Vec apart = select_lanes(load_up_to(x + i, n) - mean, 0, n, 0.0f);
            return apart * apart;
        });
        const Vec scale = splat(1.0f / std::sqrt(variance + args.eps));
        for (int64_t i = 0; i < size; i += kLanes) {
            const int n = size - i < kLanes ? int(size - i) : kLanes;
            const Vec normed = (load_up_to(x + i, n) - mean) * scale;
            store_up_to(out + i, fma(normed, load_up_to(weight + i, n), load_up_to(bias + i, n)), n);
        }
    }
}

void layer_norm(const LayerNormArgs& args) {
    const auto run = args.dtype == DType::bf16 ? layer_norm_rows<Bf16> : layer_norm_rows<F32>;
    const int threads = threads_for(args.tokens * args.size, kMinThreadWork, args.num_threads);
    if (threads == 1) return run(args, {0, args.tokens});
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; ++thread) run(args, split(args.tokens, threads, thread));
}

}  // namespace

extern const NormKernels norm_kernels = {rms_norm, layer_norm};

}  // namespace penstock::PENSTOCK_ISA
