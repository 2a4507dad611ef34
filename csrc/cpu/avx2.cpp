// The stages for AVX2.
#if defined(__x86_64__) && !defined(__clang__)  // Clang has no such pragma: it takes the baseline
#pragma GCC target("avx2,fma")
#define BYTES 32
#define ISA avx2
#include "stages.h"
#endif
