// Selection (step 9b): what bounds leave open is counted, settled and sorted.
#pragma once
#include "selection.cuh"

namespace bcl {

// Adds to what lies below the survivors' bins what lies below them within. A block takes a segment of 32 columns, a
// lane each, and looks closely only at keys in a bin with survivors. Lanes with nothing to count read what another
// reads: no sector without an open column is read, and none twice.
__global__ void __launch_bounds__(FIX_THREADS) selection_counting_kernel(const Selection s) {
    __shared__ uint32_t wanted[MAX_BINS / 32][COLUMNS];  // a bit for each bin
    __shared__ float key[SURVIVORS][COLUMNS];
    __shared__ int32_t sample[SURVIVORS][COLUMNS], below[SURVIVORS][COLUMNS];
    constexpr int WARPS = FIX_THREADS / 32, AHEAD = 8;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t B = s.B, segments = ceil_div(B, SEGMENT), tasks = segments * s.open->stripes;
    for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
        const int64_t stripe = s.stripes[task / segments], from = task % segments * SEGMENT,
                      to = least(from + SEGMENT, B), own = stripe * COLUMNS + lane;
        const int n = own < s.D ? s.survivors[own] : 0;
        int open = n > 0 ? lane : 0;
        for (int step = 16; step > 0; step /= 2) {
            const int other = __shfl_xor_sync(0xFFFFFFFFu, open, step);
            open = other > open ? other : open;
        }
        const int64_t d = n > 0 ? own : stripe * COLUMNS + open;
        const Bins bin_of = {s.limits[d], s.column_bins - 1};
        for (int i = warp; i < MAX_BINS / 32; i += WARPS) wanted[i][lane] = 0;
        __syncthreads();
        for (int i = warp; i < n; i += WARPS) {
            const int64_t at = (stripe * SURVIVORS + i) * COLUMNS + lane;
            const int bin = bin_of(s.key[at]);
            key[i][lane] = s.key[at];
            sample[i][lane] = s.survivor[at];
            below[i][lane] = 0;
            atomicOr(&wanted[bin / 32][lane], 1u << bin % 32);
        }
        __syncthreads();
        const float bias = bias_of(s, d);
        const float* column = s.activation + d * s.stride_d;
        for (int64_t first = from + warp; first < to; first += WARPS * AHEAD) {
            const int left = int(to - first);  // at most SEGMENT
            float value[AHEAD], norm[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const int64_t b = first + (i * WARPS < left ? i * WARPS : 0);
                value[i] = column[b * s.stride_b];
                norm[i] = s.x_inverse_norm[b];
            }
            uint32_t close = 0;  // a bit for each
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const float other = (value[i] - bias) * norm[i];
                const int bin = bin_of(other);
                const bool real = i * WARPS < left && other == other;
                close |= uint32_t(real && wanted[bin / 32][lane] >> bin % 32 & 1) << i;
            }
            for (; close; close &= close - 1) {
                const int64_t b = first + (__ffs(int(close)) - 1) * WARPS;
                const float other = key_of(s, b, d);  // again: few are
                const int bin = bin_of(other);
                for (int j = 0; j < n; j++) {
                    const float mine = key[j][lane];
                    if (bin_of(mine) == bin && (other < mine || (other == mine && b < sample[j][lane])))
                        atomicAdd(&below[j][lane], 1);
                }
            }
        }
        __syncthreads();
        for (int i = warp; i < n; i += WARPS)
            if (below[i][lane]) atomicAdd(&s.below[(stripe * SURVIVORS + i) * COLUMNS + lane], below[i][lane]);
    }
}

// The columns that were counted are settled, a warp each. Those that defeat the histogram, and all where needs defeat
// bounds, are sorted: a radix sort of the whole column by one block, each thread a stretch of it, four bits at a time;
// then the best, one after the other.
__global__ void __launch_bounds__(FIX_THREADS) selection_sorting_kernel(const Selection s) {
    __shared__ uint32_t count[16 * FIX_THREADS], sum[FIX_THREADS];
    __shared__ uint64_t best[FIX_THREADS / 32];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int B = int(s.B), stretch = int(ceil_div(B, FIX_THREADS)), from = int(least(int64_t(thread) * stretch, B)),
              to = int(least(int64_t(from) + stretch, B));
    const int64_t counted = int64_t(s.open->stripes) * COLUMNS, warps = int64_t(gridDim.x) * (FIX_THREADS / 32);
    for (int64_t entry = int64_t(blockIdx.x) * (FIX_THREADS / 32) + warp; entry < counted; entry += warps) {
        const int64_t stripe = s.stripes[entry / COLUMNS], column = entry % COLUMNS, d = stripe * COLUMNS + column;
        const int n = d < s.D ? s.survivors[d] : 0;
        uint64_t mine[2] = {0, 0};
        float rank[2] = {0, 0};
        for (int half = 0; half < 2; half++) {
            const int i = lane + 32 * half;
            if (i >= n) continue;
            const int64_t at = (stripe * SURVIVORS + i) * COLUMNS + column;
            rank[half] = float(s.below[at]);
            mine[half] = standing(s, rank[half], s.survivor[at]);
        }
        if (n > 0) settle(s, d, n, mine, rank);
    }
    uint32_t* memory = s.memory + int64_t(blockIdx.x) * 4 * B;
    for (int64_t entry = blockIdx.x; entry < s.open->columns; entry += gridDim.x) {
        const int64_t d = s.columns[entry];
        uint32_t *key = memory, *sample = key + B, *next_key = sample + B, *next_sample = next_key + B;
        for (int b = thread; b < B; b += FIX_THREADS) {
            key[b] = ordered(key_of(s, b, d));
            sample[b] = uint32_t(b);
        }
        __syncthreads();
        for (int shift = 0; shift < 32; shift += 4) {
            for (int digit = 0; digit < 16; digit++) count[digit * FIX_THREADS + thread] = 0;
            for (int i = from; i < to; i++) count[(key[i] >> shift & 15) * FIX_THREADS + thread]++;
            __syncthreads();
            uint32_t before = 0;  // where the elements of each digit and thread begin
            for (int i = 0; i < 16; i++) before += count[thread * 16 + i];
            sum[thread] = before;
            __syncthreads();
            before = 0;
            for (int t = 0; t < thread; t++) before += sum[t];
            for (int i = 0; i < 16; i++) {
                const uint32_t here = count[thread * 16 + i];
                count[thread * 16 + i] = before;
                before += here;
            }
            __syncthreads();
            for (int i = from; i < to; i++) {
                const uint32_t at = count[(key[i] >> shift & 15) * FIX_THREADS + thread]++;
                next_key[at] = key[i];
                next_sample[at] = sample[i];
            }
            __syncthreads();
            uint32_t* other = key;
            key = next_key, next_key = other;
            other = sample, sample = next_sample, next_sample = other;
        }
        uint64_t last = ~uint64_t(0);
        for (int place = 0; place < s.r; place++) {
            uint64_t mine = 0;
            int rank = 0;
            for (int i = thread; i < B; i += FIX_THREADS) {
                const bool nan = key[i] == 0xFFFFFFFFu;
                const uint64_t here = nan ? packed(-INFINITY, sample[i]) : standing(s, float(i), sample[i]);
                if (here < last && here > mine) mine = here, rank = i;
            }
            const uint64_t of_warp = largest_of_warp(mine);
            if (lane == 0) best[warp] = of_warp;
            __syncthreads();
            last = 0;
            for (int w = 0; w < FIX_THREADS / 32; w++) last = best[w] > last ? best[w] : last;
            if (mine == last) choose(s, d, place, last, float(rank));
            __syncthreads();
        }
        if (thread == 0) share_out(s, d);
        __syncthreads();
    }
}

}  // namespace bcl
