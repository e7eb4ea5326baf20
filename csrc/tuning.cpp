#include "tuning.h"

#include <cstdint>
#include <utility>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace penstock {

namespace {

bool is_zen4() {
#if defined(__x86_64__)
    constexpr uint32_t kBaseFamily = 0xf, kZen3And4 = 0x19;  // Zen 3 has no 512-bit vectors
    uint32_t eax, ebx, ecx, edx;
    if (!__get_cpuid(0, &eax, &ebx, &ecx, &edx)) return false;
    if (ebx != signature_AMD_ebx || ecx != signature_AMD_ecx || edx != signature_AMD_edx) return false;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
    return (eax >> 8 & 0xf) == kBaseFamily && kBaseFamily + (eax >> 20 & 0xff) == kZen3And4;
#else
    return false;
#endif
}

Tuning& current() {
    static Tuning tuning = {is_zen4()};
    return tuning;
}

}  // namespace

const Tuning& tuning() { return current(); }
Tuning tune(Tuning wanted) { return std::exchange(current(), wanted); }

}  // namespace penstock
