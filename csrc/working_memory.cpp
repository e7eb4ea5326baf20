#include "working_memory.h"

#include <cstdlib>
#include <new>

#include <sys/mman.h>

namespace penstock {

namespace {

constexpr size_t kAlignment = 64, kHugePageBytes = size_t(2) << 20;

}  // namespace

void* allocate_working_memory(size_t bytes) {
    const size_t alignment = bytes > kHugePageBytes ? kHugePageBytes : kAlignment;
    const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    void* memory = aligned_alloc(alignment, rounded);
    if (memory == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (alignment == kHugePageBytes) madvise(memory, rounded, MADV_HUGEPAGE);
#endif
    return memory;
}

}  // namespace penstock
