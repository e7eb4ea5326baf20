// The module penstock._native: `kernels(isa)` gives the kernels of one instruction set.
#include <omp.h>

#include "bindings/bindings.h"
#include "dispatch.h"
#include "tuning.h"

namespace penstock {

NB_MODULE(_native, m) {
    // Op tables live as long as the interpreter, which does not collect them at its end; nanobind would call that a leak.
    nb::set_leak_warnings(false);
    m.doc() = "Penstock's CPU kernels. Use them through penstock.kernels.ops.";

    KernelsClass kernels(m, "Kernels");
    kernels.def_prop_ro("isa", [](const KernelTable& table) { return table.isa; });
#define PENSTOCK_BIND(family, Type) bind_##family(kernels);
    PENSTOCK_FOR_EACH_FAMILY(PENSTOCK_BIND)
#undef PENSTOCK_BIND
    bind_program(m);

    m.def(
        "kernels", [](const std::string& isa) { return &select_table(isa); }, nb::arg("isa") = "",
        nb::rv_policy::reference);
    m.def("isa_statuses", [] {
        nb::list statuses;
        for (const IsaStatus& status : isa_statuses())
            statuses.append(nb::make_tuple(status.name, status.works, status.reason));
        return statuses;
    });
    // For tests: what the probe's guard makes of an illegal instruction.
    m.def("guarded_trap", [] {
        return run_guarded([]() -> bool { __builtin_trap(); });
    });
    m.def("tune", [](bool halves_vectors) { return tune({halves_vectors}).halves_vectors; });
    m.def("release_threads", [] { omp_pause_resource_all(omp_pause_soft); });
}

}  // namespace penstock
