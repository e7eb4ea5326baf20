#include "bindings/bindings.h"

namespace penstock {

namespace {

void copy_blocks(const KernelTable& table, Address cache, int64_t block_bytes, Address sources, Address destinations,
                 int64_t count) {
    table.copy.copy_blocks(
        {pointer<void>(cache), block_bytes, pointer<int64_t>(sources), pointer<int64_t>(destinations), count});
}

}  // namespace

void bind_copy(KernelsClass& kernels) { kernels.def("copy_blocks", &copy_blocks); }

}  // namespace penstock
