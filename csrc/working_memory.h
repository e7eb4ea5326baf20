// Memory that kernels and programs write and read again and again.
#pragma once

#include <cstddef>

namespace penstock {

// Uninitialised, 64-byte aligned, given back by free(); more than a huge page lies in such pages, where the system gives
// them: a layer's results are rows far apart, each in a small page of its own. Raises std::bad_alloc.
void* allocate_working_memory(size_t bytes);

}  // namespace penstock
