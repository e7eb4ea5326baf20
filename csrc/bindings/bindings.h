// What the binding sources share. Python passes tensors as data_ptr() integers with sizes, checked on its side
// (src/penstock/kernels/native/): a call costs about 0.2 microseconds.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <optional>

#include "kernel_table.h"

namespace penstock {

namespace nb = nanobind;

using Address = uintptr_t;  // a tensor's data_ptr(); 0 stands for None

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// Releases the GIL if the call is worth it. A call of a few microseconds keeps it: taking it back can cost more, and
// where other threads want it, up to the interpreter's switch interval of 5 ms.
class GilReleaseIf {
public:
    explicit GilReleaseIf(bool release) {
        if (release) released_.emplace();
    }

private:
    std::optional<nb::gil_scoped_release> released_;
};

// The class of Python's `_native.Kernels`: the kernels of one instruction set. Families add their methods to it.
using KernelsClass = nb::class_<KernelTable>;

#define PENSTOCK_DECLARE_BIND(family, Type) void bind_##family(KernelsClass& kernels);
PENSTOCK_FOR_EACH_FAMILY(PENSTOCK_DECLARE_BIND)
#undef PENSTOCK_DECLARE_BIND

// `_native.Program`: calls of kernels that are remembered.
void bind_program(nb::module_& m);

}  // namespace penstock
