#include "bindings/bindings.h"

namespace penstock {

namespace {

void search_affine_scales(const KernelTable& table, Address x, Address weight, Address scale, Address minimum,
                          int64_t groups, int size, int top, int num_threads) {
    nb::gil_scoped_release released;
    table.scale_search.affine({pointer<const float>(x), pointer<const float>(weight), pointer<float>(scale),
                               pointer<float>(minimum), groups, size, top, num_threads});
}

void search_symmetric_scales(const KernelTable& table, Address x, Address weight, Address scale, int64_t groups,
                             int size, int top, int num_threads) {
    nb::gil_scoped_release released;
    table.scale_search.symmetric({pointer<const float>(x), pointer<const float>(weight), pointer<float>(scale),
                                  nullptr, groups, size, top, num_threads});
}

}  // namespace

void bind_scale_search(KernelsClass& kernels) {
    kernels.def("search_affine_scales", &search_affine_scales);
    kernels.def("search_symmetric_scales", &search_symmetric_scales);
}

}  // namespace penstock
