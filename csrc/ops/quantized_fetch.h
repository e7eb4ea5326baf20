// What the block kernels of quantised linears fetch before it is read: the block after theirs, or what is near.
#pragma once

#include <cstdint>

#include "ops/quantized_codes.h"

namespace penstock::PENSTOCK_ISA {

// Up to so many rows of x wait for the memory: bytes are best read as one stream.
constexpr int64_t kRowsOfOneStream = 2;
// Up to so many, where what they read as it is is best fetched shortly before.
constexpr int64_t kRowsFetchedNear = 4;

// What a call fetches into the second-level cache: of each tile from `at` on, `pace` bytes with each four units of its own,
// a line in every `step` bytes, and not beyond `end`, where another thread's tiles may begin. Or, if is_near, what the call
// itself reads a while later, into the first level.
struct Ahead {
    const char *at, *end;
    int64_t tile_stride, step, pace;
    bool is_near;
};

// Fetches what is ahead as evenly as it will be read. In whole lines with each four units, of which Q8_0 has 4.25, the
// memory had nothing to do at the end of each block (Zen 5, 8 rows: 0.82 of the rate of a plain sum, as it is 0.85).
template <int kTiles>
class Fetcher {
public:
    explicit Fetcher(const Ahead& ahead) : ahead_(ahead), due_(ahead.at) {}
    void turn() {
        due_ = due_ + ahead_.pace < ahead_.end ? due_ + ahead_.pace : ahead_.end;
        for (; ahead_.at < due_; ahead_.at += ahead_.step)
            for (int t = 0; t < kTiles; ++t) __builtin_prefetch(ahead_.at + t * ahead_.tile_stride, 0, 2);
    }

private:
    Ahead ahead_;
    const char* due_;
};

// Fetches what will be read of each tile a while after the `bytes` at `at`: a page later, which on Zen 5 is as good as two
// or four, or better (8192 x 2048 and 2048 x 8192 from memory). Headers as well as codes: without them, with one line of
// Q8_0 in seventeen left out, one row took up to 1.2 times as long, one of Q4_K 1.12.
[[gnu::always_inline]] static inline void fetch_near(const char* at, int bytes, int tiles, int64_t tile_stride) {
    constexpr int kDistance = 4096;
    for (int t = 0; t < tiles; ++t)
        for (int line = 0; line < bytes; line += kVectorBytes)
            __builtin_prefetch(at + t * tile_stride + kDistance + line, 0, 3);
    asm volatile("");  // GCC 12 drops calls of what does nothing but fetch
}

}  // namespace penstock::PENSTOCK_ISA
