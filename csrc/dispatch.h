// Picks the kernels that this machine really runs.
#pragma once

#include <string>
#include <vector>

#include "kernel_table.h"

namespace penstock {

struct IsaStatus {
    const char* name;
    const KernelTable* table;
    bool works;
    std::string reason;  // why it does not work; empty if it does
};

// Every instruction set compiled in, lowest first, each probed once per process (the first call probes).
const std::vector<IsaStatus>& isa_statuses();

// The table of `name`, or of the best that works if `name` is empty. Throws std::invalid_argument for a name that is
// not compiled in and std::runtime_error, saying why, for one that does not work here.
const KernelTable& select_table(const std::string& name);

// Runs a self-test under a SIGILL handler: empty if it passed, else why not. It must not start threads: the handler
// covers the calling one only.
std::string run_guarded(bool (*self_test)());

}  // namespace penstock
