// The scale of RMSNorm for one row, in one order of summation whoever asks.
#pragma once

#include "simd.h"

namespace penstock::PENSTOCK_ISA {

template <class Storage>
static inline float inverse_rms(const Storage* x, int64_t size, float eps) {
    constexpr int kChains = 4;
    Vec sums[kChains] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + kChains * kLanes <= size; i += kChains * kLanes)
        for (int chain = 0; chain < kChains; ++chain) {
            const Vec value = load(x + i + chain * kLanes);
            sums[chain] = fma(value, value, sums[chain]);
        }
    for (; i < size; i += kLanes) {
        const Vec value = size - i >= kLanes ? load(x + i) : load_n(x + i, int(size - i));
        sums[0] = fma(value, value, sums[0]);
    }
    const float sum = reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    return 1.0f / std::sqrt(sum / float(size) + eps);
}

}  // namespace penstock::PENSTOCK_ISA
