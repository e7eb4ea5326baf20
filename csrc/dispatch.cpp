// Probing trusts nothing alone: cpuid says what the processor has, xgetbv what the system saves, the kernel (for AMX)
// what this process may use, and still some virtual machines trap on an instruction whose flag they show. So a set
// counts as working only when its self-test, run under a SIGILL handler, gave the right numbers.
#include "dispatch.h"

#include <setjmp.h>
#include <signal.h>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace penstock {

#define PENSTOCK_DECLARE(family, Type) extern const Type family##_kernels;
#define PENSTOCK_ENTRY(family, Type) family##_kernels,
#define PENSTOCK_DEFINE_TABLE(isa)                                                                      \
    namespace isa {                                                                                     \
    PENSTOCK_FOR_EACH_FAMILY(PENSTOCK_DECLARE)                                                          \
    static const KernelTable& table() {                                                                 \
        static const KernelTable instance = {#isa, PENSTOCK_FOR_EACH_FAMILY(PENSTOCK_ENTRY)};           \
        return instance;                                                                                \
    }                                                                                                   \
    }
PENSTOCK_FOR_EACH_ISA(PENSTOCK_DEFINE_TABLE)

namespace {

#if defined(__x86_64__)

struct CpuFeatures {
    uint32_t leaf1_ecx = 0, leaf7_ebx = 0, leaf7_ecx = 0, leaf7_edx = 0, leaf7_1_eax = 0;
    uint64_t xcr0 = 0;
};

CpuFeatures read_cpu_features() {
    CpuFeatures features;
    uint32_t eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return features;
    features.leaf1_ecx = ecx;
    if (ecx & bit_OSXSAVE) {
        uint32_t low, high;
        __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        features.xcr0 = (uint64_t(high) << 32) | low;
    }
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
        features.leaf7_ebx = ebx;
        features.leaf7_ecx = ecx;
        features.leaf7_edx = edx;
        if (eax >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) features.leaf7_1_eax = eax;
    }
    return features;
}

constexpr uint64_t kXcr0Avx = 0x6, kXcr0Avx512 = 0xe6, kXcr0Amx = 0x60000;
constexpr uint32_t kAvxVnni = 1u << 4, kAvx512Bf16 = 1u << 5;  // leaf 7.1 eax
constexpr uint32_t kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;  // leaf 7.0 edx

bool has_all(uint64_t value, uint64_t wanted) { return (value & wanted) == wanted; }

// Empty if the flags promise the set, else what is missing.
std::string missing_flags(int level, const CpuFeatures& cpu) {
    if (level >= PENSTOCK_LEVEL_AVX2) {
        if (!has_all(cpu.leaf1_ecx, bit_FMA | bit_F16C | bit_AVX) || !has_all(cpu.leaf7_ebx, bit_AVX2))
            return "the processor has no AVX2, FMA and F16C";
        if (!has_all(cpu.xcr0, kXcr0Avx)) return "the system does not save AVX registers";
    }
#ifndef PENSTOCK_HAS_FOREIGN_INSTRUCTIONS
    if (level == PENSTOCK_LEVEL_AVX_VNNI && !has_all(cpu.leaf7_1_eax, kAvxVnni)) return "the processor has no AVX-VNNI";
#endif
    if (level >= PENSTOCK_LEVEL_AVX512) {
        if (!has_all(cpu.leaf7_ebx, bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL))
            return "the processor has no AVX-512 F, BW, DQ and VL";
        if (!has_all(cpu.leaf7_ecx, bit_AVX512VNNI)) return "the processor has no AVX-512 VNNI";
        if (!has_all(cpu.xcr0, kXcr0Avx512)) return "the system does not save AVX-512 registers";
    }
    if (level >= PENSTOCK_LEVEL_BF16 && !has_all(cpu.leaf7_1_eax, kAvx512Bf16)) return "the processor has no AVX-512 BF16";
    if (level >= PENSTOCK_LEVEL_AMX) {
        if (!has_all(cpu.leaf7_edx, kAmxTile | kAmxBf16 | kAmxInt8)) return "the processor has no AMX tile, bf16 and int8";
        if (!has_all(cpu.xcr0, kXcr0Amx)) return "the system does not save AMX tiles";
    }
    return "";
}

// Linux hands out the 8 KB of tile state only on request (for all threads of the process at once).
bool request_amx_permission() {
    constexpr int kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
    return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
}

#endif

sigjmp_buf trap_exit;

void leave_on_trap(int) { siglongjmp(trap_exit, 1); }

IsaStatus probe_isa(int level, const KernelTable& table) {
    std::string reason;
#ifdef PENSTOCK_HAS_FOREIGN_INSTRUCTIONS  // tools/foreign_instructions, whose signal the guard would take
    if (level == PENSTOCK_LEVEL_AMX) return {table.isa, &table, table.probe.self_test(), "its self-test gave wrong results"};
#endif
#if defined(__x86_64__)
    static const CpuFeatures cpu = read_cpu_features();
    reason = missing_flags(level, cpu);
    if (reason.empty() && level >= PENSTOCK_LEVEL_AMX && !request_amx_permission())
        reason = "the system refuses this process the use of AMX";
#else
    (void)level;
#endif
    if (reason.empty()) reason = run_guarded(table.probe.self_test);
    return {table.isa, &table, reason.empty(), reason};
}

}  // namespace

std::string run_guarded(bool (*self_test)()) {
    struct sigaction guard = {}, previous = {};
    guard.sa_handler = leave_on_trap;
    sigemptyset(&guard.sa_mask);
    sigaction(SIGILL, &guard, &previous);
    const char* reason = "its instructions trap (SIGILL) although the processor's flags show them";
    if (sigsetjmp(trap_exit, 1) == 0) reason = self_test() ? "" : "its self-test gave wrong results";
    sigaction(SIGILL, &previous, nullptr);
    return reason;
}

const std::vector<IsaStatus>& isa_statuses() {
    static const std::vector<IsaStatus> statuses = [] {
        std::vector<IsaStatus> probed;
        int level = 0;
#define PENSTOCK_PROBE(isa) probed.push_back(probe_isa(level++, isa::table()));
        PENSTOCK_FOR_EACH_ISA(PENSTOCK_PROBE)
#undef PENSTOCK_PROBE
        return probed;
    }();
    return statuses;
}

const KernelTable& select_table(const std::string& name) {
    const auto& statuses = isa_statuses();
    std::string known;
    for (auto status = statuses.rbegin(); status != statuses.rend(); ++status) {
        if (name.empty() && status->works) return *status->table;
        if (name == status->name) {
            if (status->works) return *status->table;
            throw std::runtime_error("instruction set '" + name + "' does not work on this machine: " + status->reason);
        }
        known = std::string(status->name) + (known.empty() ? "" : ", ") + known;
    }
    if (name.empty()) throw std::runtime_error("no instruction set passed its self-test, not even the portable one");
    throw std::invalid_argument("instruction set '" + name + "' is not one of: " + known);
}

}  // namespace penstock
