// The stable rank of every element within its column (step 9b): counted for few samples, by the sort of one block for
// more, by sorting whole columns in memory beyond.
#pragma once
#include "common.cuh"

namespace bcl {

struct Rank : RankCall {
    int64_t first;  // column at which a chunk begins
    __device__ void store(int64_t at, int place) const {
        if (kind == 0) static_cast<int64_t*>(rank)[at] = place;
        else if (kind == 1) static_cast<int32_t*>(rank)[at] = place;
        else static_cast<float*>(rank)[at] = float(place);
    }
};

constexpr int COUNTING_THREADS = 256, TILE = 32;

// A lane is a column: every sample is compared with every other in shared memory.
__global__ void __launch_bounds__(COUNTING_THREADS) rank_counting_kernel(const Rank r) {
    SHARED(memory);
    uint32_t* key = reinterpret_cast<uint32_t*>(memory);  // [B, 32]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = COUNTING_THREADS / 32;
    const int64_t d = int64_t(blockIdx.x) * COLUMNS + lane;
    const int B = int(r.B);
    for (int b = warp; b < B; b += warps)
        key[b * COLUMNS + lane] = d < r.D ? ordered(r.key[b * r.stride_b + d * r.stride_d]) : 0;
    __syncthreads();
    if (d >= r.D) return;
    for (int b = warp; b < B; b += warps) {
        const uint32_t own = key[b * COLUMNS + lane];
        int below = 0;
        for (int other = 0; other < b; other++) below += key[other * COLUMNS + lane] <= own;
        for (int other = b + 1; other < B; other++) below += key[other * COLUMNS + lane] < own;
        r.store(b * r.D + d, below);
    }
}

// A block is a column; neighboring blocks read and write the same lines while the level-2 cache holds them.
template <int THREADS, int ITEMS>
__global__ void __launch_bounds__(THREADS) rank_block_kernel(const Rank r) {
    SHARED(memory);
    const int64_t d = blockIdx.x;
    uint32_t key[ITEMS];
    uint16_t sample[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int64_t b = threadIdx.x * ITEMS + i;
        key[i] = b < r.B ? ordered(r.key[b * r.stride_b + d * r.stride_d]) : 0xFFFFFFFFu;
        sample[i] = uint16_t(b);
    }
    BlockSort<THREADS, ITEMS>::sort(memory, key, sample);
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
        if (sample[i] < r.B) r.store(sample[i] * r.D + d, int(threadIdx.x * ITEMS + i));
}

// The columns of a chunk as runs of keys with their samples: [B, D] -> [columns, B], in tiles through shared memory.
__global__ void __launch_bounds__(TILE * 8)
rank_pack_kernel(const Rank r, int64_t columns, uint32_t* key, int32_t* sample) {
    SHARED(memory);
    uint32_t* tile = reinterpret_cast<uint32_t*>(memory);  // [TILE, TILE + 1]
    const int lane = threadIdx.x % TILE, row = threadIdx.x / TILE;
    const int64_t wide = ceil_div(columns, TILE), d = blockIdx.x % wide * TILE, b = blockIdx.x / wide * TILE;
    for (int i = row; i < TILE; i += 8)
        if (b + i < r.B && d + lane < columns)
            tile[i * (TILE + 1) + lane] = ordered(r.key[(b + i) * r.stride_b + (r.first + d + lane) * r.stride_d]);
    __syncthreads();
    for (int i = row; i < TILE; i += 8)
        if (d + i < columns && b + lane < r.B) {
            key[(d + i) * r.B + b + lane] = tile[lane * (TILE + 1) + i];
            sample[(d + i) * r.B + b + lane] = int32_t(b + lane);
        }
}

// The place of each sample in its sorted run is its rank: [columns, B] -> [B, D]. Eight columns side by side fill the
// sectors that they are scattered to.
__global__ void __launch_bounds__(TILE * 8) rank_scatter_kernel(const Rank r, int64_t columns, const int32_t* sample) {
    const int64_t high = ceil_div(r.B, TILE);
    const int64_t d = blockIdx.x / high * 8 + threadIdx.x / TILE, place = blockIdx.x % high * TILE + threadIdx.x % TILE;
    if (d < columns && place < r.B) r.store(sample[d * r.B + place] * r.D + r.first + d, int(place));
}

}  // namespace bcl
