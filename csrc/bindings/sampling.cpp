#include "bindings/bindings.h"

namespace penstock {

namespace {

// Logits below which a call keeps the GIL (a few microseconds of work).
constexpr int64_t kSmall = 20'000;

void sample(const KernelTable& table, Address logits, Address temperature, Address top_k, Address top_p, Address min_p,
            Address uniform, Address ids, int64_t rows, int64_t vocab, int num_threads) {
    GilReleaseIf guard(rows * vocab > kSmall);
    table.sampling.sample({pointer<float>(logits), pointer<float>(temperature), pointer<int32_t>(top_k),
                           pointer<float>(top_p), pointer<float>(min_p), pointer<double>(uniform),
                           pointer<int64_t>(ids), rows, vocab, num_threads});
}

void logprobs(const KernelTable& table, Address logits, Address ids, Address logprobs, Address ranks, Address top_ids,
              Address top_logprobs, int64_t rows, int64_t vocab, int64_t top, int num_threads) {
    GilReleaseIf guard(rows * vocab > kSmall);
    table.sampling.logprobs({pointer<float>(logits), pointer<int64_t>(ids), pointer<float>(logprobs),
                             pointer<int32_t>(ranks), pointer<int64_t>(top_ids), pointer<float>(top_logprobs), rows,
                             vocab, top, num_threads});
}

void mask_logits(const KernelTable& table, Address logits, Address row_ids, Address masks, int64_t rows, int64_t vocab,
                 int num_threads) {
    GilReleaseIf guard(rows * vocab > 4 * kSmall);
    table.sampling.mask_logits({pointer<float>(logits), pointer<int64_t>(row_ids), pointer<uint32_t>(masks), rows,
                                vocab, num_threads});
}

}  // namespace

void bind_sampling(KernelsClass& kernels) {
    kernels.def("sample", &sample);
    kernels.def("logprobs", &logprobs);
    kernels.def("mask_logits", &mask_logits);
}

}  // namespace penstock
