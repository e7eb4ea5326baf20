// Copies whole blocks inside a cache.
#pragma once

#include <cstdint>

namespace penstock {

struct CopyBlocksArgs {
    void* cache;  // [num_blocks, block_bytes]
    int64_t block_bytes;
    const int64_t* sources;       // [count] block ids
    const int64_t* destinations;  // [count] block ids, none of them a source
    int64_t count;
};

struct CopyKernels {
    void (*copy_blocks)(const CopyBlocksArgs&);
};

}  // namespace penstock
