#include "ops/rope.h"

#include "ops/attention.h"
#include "ops/kv_codes.h"
#include "ops/norm_row.h"
#include "simd.h"
#include "threads.h"

namespace penstock::PENSTOCK_ISA {

namespace {

// Elements of qkv below which another thread does not pay.
constexpr int64_t kMinThreadWork = 50'000;

// `weight` is the head's norm, or null; `to` may be `head`. Dimension d is rotated with d + dim / 2.
template <class Elem>
void rotate_head(const typename Elem::Storage* head, const typename Elem::Storage* weight, float eps, const float* cos,
                 const float* sin, typename Elem::Storage* to, int64_t dim) {
    const int64_t half = dim / 2;
    const Vec scale = splat(weight != nullptr ? inverse_rms(head, dim, eps) : 1.0f);
    for (int64_t d = 0; d < half; d += kLanes) {
        const int lanes = int(half - d < kLanes ? half - d : kLanes);
        Vec first = load_n(head + d, lanes), second = load_n(head + half + d, lanes);
        if (weight != nullptr) {
            first = round_to(Elem{}, first * scale * load_n(weight + d, lanes));
            second = round_to(Elem{}, second * scale * load_n(weight + half + d, lanes));
        }
        const Vec c = load_n(cos + d, lanes), s = load_n(sin + d, lanes);
        store_n(to + d, first * c - second * s, lanes);
        store_n(to + half + d, second * c + first * s, lanes);
    }
}

// Writes a head's key: one unit per 16-slot group of the block.
template <class Elem>
void write_key(const typename Elem::Storage* key, uint32_t* block, int64_t offset, int64_t dim) {
    for (int64_t unit = 0; unit < dim / Elem::kPerUnit; ++unit)
        memcpy(block + unit * kBlockSlots + offset, key + unit * Elem::kPerUnit, sizeof(uint32_t));
}

// Only this slot's bytes are written: the other slot of a bf16 pair may be another thread's.
void write_value(const float* value, uint32_t* block, int64_t offset, int64_t dim) {
    memcpy(block + offset * dim, value, size_t(dim) * sizeof(float));
}
void write_value(const bf16_t* value, uint32_t* block, int64_t offset, int64_t dim) {
    bf16_t* pairs = reinterpret_cast<bf16_t*>(block) + offset / 2 * dim * 2 + offset % 2;
    for (int64_t d = 0; d < dim; ++d) pairs[d * 2] = value[d];
}

// Writes a head's codes and scale, in the order of the bf16 layouts.
void write_codes(const uint8_t* codes, float scale, char* block, int64_t slot, int64_t dim, bool is_key) {
    auto* to = reinterpret_cast<uint8_t*>(block) + (is_key ? slot * 2 : slot / 2 * dim * 2 + slot % 2);
    for (int64_t d = 0; d < dim; ++d) to[is_key ? d / 2 * kBlockSlots * 2 + d % 2 : d * 2] = codes[d];
    reinterpret_cast<float*>(block + kBlockSlots * dim)[slot] = scale;
}

template <class Elem>
void run_token(const RopeArgs& args, int64_t token) {
    using Storage = typename Elem::Storage;
    const int64_t dim = args.head_dim;
    Storage* head = static_cast<Storage*>(args.qkv) + token * (args.num_heads + 2 * args.num_kv_heads) * dim;
    const float* cos = args.cos + token * (dim / 2);
    const float* sin = args.sin + token * (dim / 2);
    const Storage* q_norm = static_cast<const Storage*>(args.q_norm);
    const Storage* k_norm = static_cast<const Storage*>(args.k_norm);
    for (int64_t i = 0; i < args.num_heads; ++i, head += dim)
        rotate_head<Elem>(head, q_norm, args.eps, cos, sin, head, dim);

    const int64_t slot = args.slot_mapping[token];
    if (slot < 0) return;
    const int64_t block_bytes = kv_block_bytes(args.cache_dtype, dim), offset = slot % kBlockSlots;
    const int64_t first = slot / kBlockSlots * args.num_kv_heads * block_bytes;
    char* keys = static_cast<char*>(args.key_cache) + first;
    char* values = static_cast<char*>(args.value_cache) + first;
    for (int64_t i = 0; i < args.num_kv_heads; ++i, head += dim, keys += block_bytes, values += block_bytes) {
        alignas(64) Storage rotated[kMaxHeadDim];
        rotate_head<Elem>(head, k_norm, args.eps, cos, sin, rotated, dim);
        const Storage* value = head + args.num_kv_heads * dim;
        if (is_quantized(args.cache_dtype)) {
            uint8_t codes[kMaxHeadDim];
            const float key_scale = round_kv(args.cache_dtype, rotated, dim, codes);
            write_codes(codes, key_scale, keys, offset, dim, true);
            const float value_scale = round_kv(args.cache_dtype, value, dim, codes);
            write_codes(codes, value_scale, values, offset, dim, false);
            continue;
        }
        write_key<Elem>(rotated, reinterpret_cast<uint32_t*>(keys), offset, dim);
        write_value(value, reinterpret_cast<uint32_t*>(values), offset, dim);
    }
}

template <class Elem>
void run_tokens(const RopeArgs& args, Range tokens) {
    for (int64_t token = tokens.begin; token < tokens.end; ++token) run_token<Elem>(args, token);
}

void rope_and_cache(const RopeArgs& args) {
    const auto run = args.dtype == DType::bf16 ? run_tokens<Bf16> : run_tokens<F32>;
    const int64_t elements = args.tokens * (args.num_heads + 2 * args.num_kv_heads) * args.head_dim;
    const int threads = threads_for(elements, kMinThreadWork, args.num_threads);
    if (threads == 1) return run(args, {0, args.tokens});
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; ++thread) run(args, split(args.tokens, threads, thread));
}

}  // namespace

extern const RopeKernels rope_kernels = {rope_and_cache};

}  // namespace penstock::PENSTOCK_ISA
