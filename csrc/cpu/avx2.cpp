// The kernels for AVX2.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define BYTES 32
#define ISA avx2
#include "kernels.inc"
#endif
