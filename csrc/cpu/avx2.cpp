// The stages for AVX2.
#if defined(__x86_64__)
#if defined(__clang__)  // what it makes of parallel regions stays plain, and holds no vectors
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define BYTES 32
#define ISA avx2
#include "stages.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
