// The thread policy. One OpenMP pool serves torch and these kernels (torch is imported first, so its libgomp is the one
// loaded); every kernel gets `num_threads` from its caller and opens its region with `num_threads(...)`, never more, so
// that the pool is neither grown nor shrunk between calls. OpenMP keeps a pool for each thread that calls it; while there
// are more threads than cores in all, they fall asleep sooner between calls (llm/llm.py).
#pragma once

#include <cstdint>

namespace penstock {

// Waking the pool costs about 1 to 3 microseconds; work below `min_work_per_thread` (in whatever unit the kernel
// counts: bytes, multiply-adds) is done by fewer threads, or by the caller alone.
static inline int threads_for(int64_t work, int64_t min_work_per_thread, int num_threads) {
    const int64_t useful = work / min_work_per_thread;
    return useful <= 1 ? 1 : useful < num_threads ? int(useful) : num_threads;
}

struct Range {
    int64_t begin, end;
};

// The `index`-th of `parts` nearly equal contiguous pieces of [0, count).
static inline Range split(int64_t count, int parts, int index) {
    return {count * index / parts, count * (index + 1) / parts};
}

}  // namespace penstock
