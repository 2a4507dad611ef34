// The stages for AVX-512.
#if defined(__x86_64__)
#if defined(__clang__)  // what it makes of parallel regions stays plain, and holds no vectors
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,prefer-vector-width=512")
#endif
#define BYTES 64
#define ISA avx512
#include "stages.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
