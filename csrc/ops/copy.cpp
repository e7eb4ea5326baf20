#include "ops/copy.h"

#include <cstring>

#include "isa.h"

namespace penstock::PENSTOCK_ISA {

namespace {

void copy_blocks(const CopyBlocksArgs& args) {
    char* cache = static_cast<char*>(args.cache);
    for (int64_t i = 0; i < args.count; ++i)
        memcpy(cache + args.destinations[i] * args.block_bytes, cache + args.sources[i] * args.block_bytes,
               size_t(args.block_bytes));
}

}  // namespace

extern const CopyKernels copy_kernels = {copy_blocks};

}  // namespace penstock::PENSTOCK_ISA
