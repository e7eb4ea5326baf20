// The instruction sets that kernels are compiled for, lowest first. A source under csrc/ops/ sees PENSTOCK_ISA (the
// name, used as its namespace) and PENSTOCK_ISA_LEVEL (the number, for #if).
#pragma once

#define PENSTOCK_LEVEL_PORTABLE 0
#define PENSTOCK_LEVEL_AVX2 1      // AVX2, FMA, F16C
#define PENSTOCK_LEVEL_AVX_VNNI 2  // as above, AVX-VNNI (Alder Lake and later, without AVX-512)
#define PENSTOCK_LEVEL_AVX512 3    // AVX-512 F, BW, DQ, VL, VNNI (Cascade Lake, Ice Lake); AVX-VNNI need not be there
#define PENSTOCK_LEVEL_BF16 4      // AVX-512 as above, BF16 (Cooper Lake, Zen 4)
#define PENSTOCK_LEVEL_AMX 5       // AVX-512 as above, AMX tile, bf16, int8

#if defined(__x86_64__)
#define PENSTOCK_FOR_EACH_ISA(X) X(portable) X(avx2) X(avx_vnni) X(avx512_vnni) X(avx512) X(amx)
#else
#define PENSTOCK_FOR_EACH_ISA(X) X(portable)
#endif
