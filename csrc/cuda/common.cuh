// Small device functions that several stages need.
#pragma once
#include "interface.h"
#include "plan.h"

namespace bcl {

constexpr float EPS = 1e-8f;
constexpr float LARGEST = 3.402823466e38f;  // of the finite float32

// What a neighbor counts as: damaged state may hold anything, and what is no feature is the nearest that is.
__device__ inline int64_t feature(int64_t index, int64_t D) {
    const int64_t low = index < D ? index : D - 1;
    return low > 0 ? low : 0;
}

// The same number, but what follows from it is computed where it stands: else compilers compute it once before a loop
// and keep it, for every feature of a thread, in registers there are not.
template <class T>
__device__ inline T opaque(T x) {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(T) == 8) asm volatile("" : "+l"(x));
    else asm volatile("" : "+r"(x));
#endif
    return x;
}

// Unsigned integers in the order of the numbers: -0 equals +0, NaN last.
__device__ inline uint32_t ordered(float x) {
    if (x != x) return 0xFFFFFFFFu;
    const uint32_t bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// (x, index) as one integer: larger is larger x, of equal ones the smaller index; NaN is the largest.
__device__ inline uint64_t packed(float x, int64_t index) {
    return uint64_t(ordered(x)) << 32 | (0xFFFFFFFFu - uint32_t(index));
}

__device__ inline int64_t index_of(uint64_t packed) { return 0xFFFFFFFFu - uint32_t(packed); }

__device__ inline float sum_of_warp(float x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
    return x;
}

__device__ inline int sum_of_warp(int x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
    return x;
}

__device__ inline uint64_t largest_of_warp(uint64_t x) {
    for (int step = 16; step > 0; step /= 2) {
        const uint64_t other = __shfl_xor_sync(0xFFFFFFFFu, x, step);
        x = other > x ? other : x;
    }
    return x;
}

}  // namespace bcl
