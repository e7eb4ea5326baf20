// What the block kernels of quantised linears fetch before it is read: the block after theirs, or what is near.
#pragma once

#include <cstdint>

#include "ops/quantized_codes.h"

namespace penstock::PENSTOCK_ISA {

// Up to so many rows of x wait for the memory: bytes are best read as one stream.
constexpr int64_t kRowsOfOneStream = 2;

// What a call fetches into the second-level cache: of each tile `lines` with each four units of its own, `step` bytes
// apart, from `at` on and not beyond `end`, where another thread's tiles may begin. Or, if is_near (kRowsOfOneStream), what
// the call itself reads a while later, into the first level.
struct Ahead {
    const char *at, *end;
    int64_t tile_stride, step;
    int lines;
    bool is_near;
};

// Fetches what is ahead, a few lines at a time.
template <int kTiles>
class Fetcher {
public:
    explicit Fetcher(const Ahead& ahead) : ahead_(ahead) {}
    void turn() {
        for (int line = 0; line < ahead_.lines && ahead_.at < ahead_.end; ++line, ahead_.at += ahead_.step)
            for (int t = 0; t < kTiles; ++t) __builtin_prefetch(ahead_.at + t * ahead_.tile_stride, 0, 2);
    }

private:
    Ahead ahead_;
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
