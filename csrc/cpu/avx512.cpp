// The stages for AVX-512.
#if defined(__x86_64__) && !defined(__clang__)  // Clang has no such pragma: it takes the baseline
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,prefer-vector-width=512")
#define BYTES 64
#define ISA avx512
#include "stages.h"
#endif
