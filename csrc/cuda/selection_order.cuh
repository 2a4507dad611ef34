// Selection (step 9b): the samples by falling need, in a coarse order, before anything else.
#pragma once
#include "selection.cuh"

namespace bcl {

constexpr int ORDER_WARPS = ORDER_THREADS / 32, ORDER_PITCH = ORDER_WARPS + 1;

// From the counts of every bin and warp, where the samples of each begin: a thread sums half a bin, of all warps; then
// each learns what lies before.
__device__ __forceinline__ void starts_of_bins(uint32_t* count, uint32_t* part) {
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    static_assert(2 * ORDER_BINS == ORDER_THREADS && ORDER_WARPS == 32, "");
    uint32_t* half = count + thread / 2 * ORDER_PITCH + thread % 2 * 16;
    uint32_t sum = 0;
    for (int i = 0; i < 16; i++) sum += half[i];
    uint32_t before = sum;
    for (int step = 1; step < 32; step *= 2) {
        const uint32_t other = __shfl_sync(0xFFFFFFFFu, before, lane < step ? 0 : lane - step);
        before += lane < step ? 0 : other;
    }
    if (lane == 31) part[warp] = before;
    before -= sum;
    __syncthreads();
    for (int w = 0; w < warp; w++) before += part[w];
    for (int i = 0; i < 16; i++) {
        const uint32_t here = half[i];
        half[i] = before;
        before += here;
    }
}

// The samples by falling need, roughly: one block counts the bins of the needs, each warp those of a stretch of the
// batch, and puts every sample where its bin's begin. The bits of positive numbers are in their order.
__global__ void __launch_bounds__(ORDER_THREADS) selection_order_kernel(const Selection s) {
    SHARED(memory);
    constexpr int WARPS = ORDER_WARPS, PITCH = ORDER_PITCH, AHEAD = 8;
    uint32_t* count = reinterpret_cast<uint32_t*>(memory);  // [ORDER_BINS, PITCH]: no two bins of a warp share a bank
    uint32_t* part = count + ORDER_BINS * PITCH;            // [3, WARPS]
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int64_t B = s.B, stretch = ceil_div(ceil_div(B, WARPS), 32) * 32, from = least(warp * stretch, B),
                  to = least(from + stretch, B);
    auto need_of = [&](int64_t b) { return s.need ? s.need[b] + 0.0f : 1.0f; };

    uint32_t highest = 0, lowest = 0xFFFFFFFFu, odd = 0;
    for (int64_t first = thread; first < B; first += ORDER_THREADS * AHEAD) {
        float need[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int64_t b = first + i * ORDER_THREADS;
            need[i] = need_of(b < B ? b : first);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const uint32_t bits = __float_as_uint(need[i]);
            odd |= !(need[i] >= 0 && need[i] < INFINITY);
            highest = bits > highest ? bits : highest;
            lowest = bits < lowest ? bits : lowest;
        }
    }
    for (int step = 16; step > 0; step /= 2) {
        const uint32_t higher = __shfl_xor_sync(0xFFFFFFFFu, highest, step);
        const uint32_t lower = __shfl_xor_sync(0xFFFFFFFFu, lowest, step);
        highest = higher > highest ? higher : highest;
        lowest = lower < lowest ? lower : lowest;
        odd |= __shfl_xor_sync(0xFFFFFFFFu, odd, step);
    }
    if (lane == 0) part[warp] = highest, part[WARPS + warp] = lowest, part[2 * WARPS + warp] = odd;
    for (int i = thread; i < ORDER_BINS * PITCH; i += ORDER_THREADS) count[i] = 0;
    __syncthreads();
    for (int w = 0; w < WARPS; w++) {
        highest = part[w] > highest ? part[w] : highest;
        lowest = part[WARPS + w] < lowest ? part[WARPS + w] : lowest;
        odd |= part[2 * WARPS + w];
    }
    int shift = 0;
    while ((highest - lowest) >> shift >= ORDER_BINS) shift++;
    if (thread == 0) *s.open = {0, 0, highest, shift, !odd};
    if (odd) return;  // every column will be sorted

    auto each = [&](auto visit) {  // of this warp's stretch, in order; all lanes take part
        for (int64_t first = from; first < to; first += 32 * AHEAD) {
            float need[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const int64_t b = first + i * 32 + lane;
                need[i] = need_of(b < to ? b : from);
            }
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const int64_t b = first + i * 32 + lane;
                if (first + i * 32 < to) visit(b, need[i], int((highest - __float_as_uint(need[i])) >> shift), b < to);
            }
        }
    };
    each([&](int64_t, float, int bin, bool real) {
        if (real) atomicAdd(&count[bin * PITCH + warp], 1u);
    });
    __syncthreads();
    starts_of_bins(count, part);
    __syncthreads();
    each([&](int64_t b, float need, int bin, bool real) {
        const uint32_t alike = __match_any_sync(0xFFFFFFFFu, real ? bin : -1), less = alike & ((1u << lane) - 1);
        uint32_t* next = &count[(real ? bin : 0) * PITCH + warp];
        const uint32_t at = *next + __popc(less);
        __syncwarp();
        if (real && less == 0) *next = at + __popc(alike);
        __syncwarp();
        if (real) s.visits[at] = {uint32_t(b), need};
    });
}

}  // namespace bcl
