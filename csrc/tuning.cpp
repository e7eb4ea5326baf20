#include "tuning.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace penstock {

namespace {

bool is_zen4() {
#if defined(__x86_64__)
    constexpr uint32_t kBaseFamily = 0xf, kZen3And4 = 0x19;  // Zen 3 has no 512-bit vectors
    uint32_t eax, vendor[3], ecx, edx, ebx;
    if (!__get_cpuid(0, &eax, &vendor[0], &vendor[2], &vendor[1]) || memcmp(vendor, "AuthenticAMD", 12) != 0) return false;
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
void tune(const Tuning& wanted) { current() = wanted; }

}  // namespace penstock
