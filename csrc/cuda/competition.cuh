// Competition (steps 2 to 8) for many features: tiles of a few samples, whose strengths of all features lie in shared
// memory, in that of a cluster of blocks, or where no cluster holds them in global memory. A neighbor's strengths are
// one vector. Blocks stay and take tile after tile, so that neighbors may stay in registers, and sums over the batch
// in shared memory; the next tile is on its way while what needs no strengths is done.
#pragma once
#include "common.cuh"

namespace bcl {

struct Competition : CompetitionCall {
    float *coverage, *x_inverse_norm, *need;  // [B]
    float* partial;    // [groups, 2, D] sums of rank_score and of rank_score / coverage
    char* strengths;   // [groups, D] rows of a tile, where no shared memory holds them
    const void* ids;   // [D] of Eight or [k, D]: the neighbors, packed, where registers do not hold them
    int64_t slice;     // features of a block
    int sums_shared;   // the sums lie behind the strengths in shared memory until the end
    int cluster_log;   // a cluster has 1 << cluster_log blocks
};

struct Forces {
    const float* partial;
    int64_t groups, B, D;
    int coupled;
    float rescue_onset, pull_onset;
    float *novelty, *win_rate, *winner_share, *som_strength;  // [D]
};

template <int ROWS>
struct alignas(4 * ROWS) Row {  // what a tile has of one feature
    float of[ROWS];
};

struct alignas(16) Eight {  // neighbors of one feature
    uint16_t of[HELD];
};

template <int ROWS, int WARPS>
struct Head {
    uint64_t best[WARPS][ROWS];  // (margin, feature) packed so that the largest is the winner
    float part[WARPS][ROWS];     // of the coverage
    uint64_t block_best[ROWS];
    float block_part[ROWS], coverage[ROWS];
    int64_t winner[ROWS];
};

// 1 / (|X_b| + eps) (step 9b), a warp for each sample.
__global__ void norm_kernel(const Competition c) {
    const int lane = threadIdx.x % 32;
    const int64_t warps = int64_t(gridDim.x) * blockDim.x / 32;
    for (int64_t b = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32; b < c.B; b += warps) {
        float square = 0;
#pragma unroll 8
        for (int64_t n = lane; n < c.N; n += 32) {
            const float value = c.x[b * c.x_stride_b + n * c.x_stride_n];
            square += value * value;
        }
        square = sum_of_warp(square);
        float inverse = 1 / (sqrtf(square) + EPS);
        if (!(square <= LARGEST)) {  // scaled into range; eps is nothing beside such a norm
            constexpr float SCALE = 0x1p-96f;
            square = 0;
#pragma unroll 1
            for (int64_t n = lane; n < c.N; n += 32) {
                const float value = c.x[b * c.x_stride_b + n * c.x_stride_n] * SCALE;
                square += value * value;
            }
            inverse = SCALE / sqrtf(sum_of_warp(square));
        }
        if (lane == 0) c.x_inverse_norm[b] = inverse;
    }
}

template <class Id>
__global__ void pack_kernel(const int64_t* neighbors, int64_t D, int64_t k, Id* ids) {
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < D * k; i += int64_t(gridDim.x) * blockDim.x)
        ids[i % k * D + i / k] = Id(feature(neighbors[i], D));
}

// The first neighbor fills up what is missing of eight.
__global__ void pack_eight_kernel(const int64_t* neighbors, int64_t D, int64_t k, Eight* ids) {
    for (int64_t d = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; d < D; d += int64_t(gridDim.x) * blockDim.x) {
        Eight eight;
#pragma unroll
        for (int i = 0; i < HELD; i++) eight.of[i] = uint16_t(feature(neighbors[d * k + (i < k ? i : 0)], D));
        ids[d] = eight;
    }
}

struct Tile {
    int64_t number, b;  // its first sample
    int rows;           // samples that there are
};

// What a thread of `competition_kernel` works on, and the phases of its work, in their order. WHERE the strengths lie.
// OWN: most features of a thread, whose neighbors (at most HELD) are in registers; 0: they are read for every tile,
// Eight at once or one by one.
template <int WHERE, int ROWS, int THREADS, int OWN, class Ids>
struct CompetitionThread {
    static constexpr int WARPS = THREADS / 32;
    typedef Head<ROWS, WARPS> BlockHead;
    static_assert(sizeof(BlockHead) <= HEAD, "the strengths follow the head");
    typedef uint32_t Held[OWN > 0 ? OWN : 1][HELD / 2];  // two neighbors each, of every own feature

    const Competition& c;
    BlockHead& head;
    Row<ROWS>* strength;
    float* sums;  // where sums_shared
    const int thread, warp, lane;
    const unsigned blocks, block;  // of the cluster
    const int D, k, group, groups;
    const int first, step;  // the thread's first feature, and how far it is to the next

    __device__ __forceinline__ CompetitionThread(const Competition& c, char* memory)
        : c(c), head(*reinterpret_cast<BlockHead*>(memory)), strength(reinterpret_cast<Row<ROWS>*>(memory + HEAD)),
          sums(reinterpret_cast<float*>(memory + HEAD + c.slice * int64_t(sizeof(Row<ROWS>)))), thread(threadIdx.x),
          warp(thread / 32), lane(thread % 32), blocks(1u << c.cluster_log),
          block(WHERE == CLUSTER ? cluster_rank() : 0), D(int(c.D)), k(int(c.k)), group(blockIdx.x >> c.cluster_log),
          groups(gridDim.x >> c.cluster_log), first(int((warp << c.cluster_log) + block) << 5 | lane),
          step(THREADS << c.cluster_log) {
        if constexpr (WHERE == MEMORY) strength = reinterpret_cast<Row<ROWS>*>(c.strengths) + group * c.D;
    }

    __device__ __forceinline__ float* partial() const { return c.partial + int64_t(opaque(group)) * 2 * D; }

    __device__ __forceinline__ void barrier() const {
        if constexpr (WHERE == CLUSTER) cluster_barrier();
        else __syncthreads();
    }

    // Features lie in a cluster in chunks of 32, dealt out in turn.
    __device__ __forceinline__ Row<ROWS> strength_of(uint32_t j) const {
        if constexpr (WHERE != CLUSTER) return strength[j];
        const uint32_t chunk = j >> 5;
        return *of_peer(strength + (chunk >> c.cluster_log << 5 | (j & 31)), chunk & (blocks - 1));
    }

    // Calls visit(feature, its place in this block, its number in this thread) for every feature of this thread.
    template <class Visit>
    __device__ __forceinline__ void each(Visit visit) const {
        if constexpr (OWN > 0) {
            int d = opaque(first);
#pragma unroll
            for (int f = 0; f < OWN; f++, d += step)
                if (d < D) visit(d, thread + f * THREADS, f);
        } else {
            in_turn(visit);
        }
    }

    template <class Visit>
    __device__ __forceinline__ void in_turn(Visit visit) const {
        int d = opaque(first);
#pragma unroll 1
        for (int place = thread; d < D; place += THREADS, d += step) visit(d, place, 0);
    }

    // The first neighbor fills up what is missing of HELD.
    __device__ __forceinline__ void hold_neighbors(Held& near) const {
        each([&](int d, int, int f) {
#pragma unroll
            for (int i = 0; i < HELD; i += 2) {
                const int64_t one = feature(c.neighbors[int64_t(d) * k + (i < k ? i : 0)], D);
                const int64_t other = feature(c.neighbors[int64_t(d) * k + (i + 1 < k ? i + 1 : 0)], D);
                near[f][i / 2] = uint32_t(one) | uint32_t(other) << 16;
            }
        });
    }

    // Sends for the strengths of a tile; a missing row is the last again.
    __device__ __forceinline__ void fetch(int64_t number) const {
        const int64_t b = number * ROWS, last = least(c.B - b, ROWS) - 1;
        in_turn([&](int d, int place, int) {
            const float* from = c.activation + b * c.stride_b + d * c.stride_d;
            if constexpr (WHERE == MEMORY) {
                Row<ROWS> row;
                for (int i = 0; i < ROWS; i++) row.of[i] = from[least(i, last) * c.stride_b];
                strength[place] = row;
            } else {
                for (int i = 0; i < ROWS; i++) copy_async(&strength[place].of[i], from + least(i, last) * c.stride_b);
            }
        });
    }

    // The largest strength among the neighbors of a feature, in every row.
    __device__ __forceinline__ void strongest_neighbor(const Held& near, int d, int f, float (&rival)[ROWS]) const {
        const Ids* ids = static_cast<const Ids*>(c.ids);
        auto meet = [&](uint32_t j) {
            const Row<ROWS> other = strength_of(j);
            for (int i = 0; i < ROWS; i++) rival[i] = larger_magnitude(other.of[i], rival[i]);
        };
        if constexpr (OWN > 0) {
#pragma unroll
            for (int i = 0; i < HELD / 2; i++) {
                const uint32_t two = opaque(near[f][i]);
                meet(two & 0xFFFF);
                meet(two >> 16);
            }
        } else if constexpr (std::is_same_v<Ids, Eight>) {
            const Eight eight = ids[d];
#pragma unroll
            for (int i = 0; i < HELD; i++) meet(eight.of[i]);
        } else {
#pragma unroll 4
            for (int64_t i = 0; i < k; i++) meet(ids[i * c.D + d]);
        }
    }

    // Steps 2 and 3: the thread's part of every row's coverage, and its best (margin, feature).
    __device__ __forceinline__ void compete(const Held& near, const Tile& tile, float (&covered)[ROWS],
                                            uint64_t (&best)[ROWS]) const {

        // Registers are short: a missing row is left out, though behind a branch each row waits for the one before.
#if __CUDA_ARCH__ >= 1000
        constexpr bool SHORT = OWN > 0 || THREADS > READING_THREADS;
#else
        constexpr bool SHORT = OWN > 0;
#endif
        each([&](int d, int place, int f) {
            float rival[ROWS] = {};
            strongest_neighbor(near, d, f, rival);
            const Row<ROWS> own = strength[place];
            float* score_of = c.rank_score + tile.b * D + d;
            for (int i = 0; i < ROWS; i++) {
                if (SHORT && i >= tile.rows) continue;
                const float margin = fabsf(own.of[i]) - rival[i];
                const float score = sigmoid(c.temperature * margin);
                if constexpr (SHORT) {
                    c.rank_score[(tile.b + i) * D + d] = score;
                } else {  // a missing row is the last again
                    *score_of = score;
                    if (i + 1 < tile.rows) score_of += D;
                }
                covered[i] += score;
                const uint64_t here = packed(margin, d);  // NaN wins, as argmax has it
                best[i] = here > best[i] ? here : best[i];
            }
        });
    }

    // Steps 4 and 8 of the features of this block.
    __device__ __forceinline__ void reduce_in_block(float (&covered)[ROWS], uint64_t (&best)[ROWS]) const {
        for (int i = 0; i < ROWS; i++) {
            covered[i] = sum_of_warp(covered[i]);
            best[i] = largest_of_warp(best[i]);
            if (lane == 0) {
                head.part[warp][i] = covered[i];
                head.best[warp][i] = best[i];
            }
        }
        __syncthreads();
        if (thread < ROWS) {
            float part = 0;
            uint64_t largest = 0;
            for (int w = 0; w < WARPS; w++) {
                part += head.part[w][thread];
                largest = head.best[w][thread] > largest ? head.best[w][thread] : largest;
            }
            head.block_part[thread] = part;
            head.block_best[thread] = largest;
        }
    }

    // Steps 4 and 8 of all features, from what the blocks of the cluster have found.
    __device__ __forceinline__ void reduce_in_cluster() const {
        if (thread < ROWS) {
            float coverage = 0;
            uint64_t largest = 0;
            for (unsigned peer = 0; peer < blocks; peer++) {
                const BlockHead& other = WHERE == CLUSTER ? *of_peer(&head, peer) : head;
                coverage += other.block_part[thread];
                largest = other.block_best[thread] > largest ? other.block_best[thread] : largest;
            }
            head.coverage[thread] = coverage;
            head.winner[thread] = index_of(largest);
        }
    }

    // What a tile adds to the sums over the batch of steps 5 and 7; they begin with the group's first tile.
    __device__ __forceinline__ void add_to_sums(const Tile& tile) const {
        float claim[ROWS];
        for (int i = 0; i < ROWS; i++) claim[i] = 1 / (head.coverage[i] + EPS);
        each([&](int d, int place, int) {
            float t = 0, n = 0;
            for (int i = 0; i < ROWS; i++) {
                if (i >= tile.rows) continue;
                const float score = c.rank_score[(tile.b + i) * D + d];
                t += score;
                n += score * claim[i];
            }
            float *total = c.sums_shared ? sums + place : partial() + d, *novel = total + (c.sums_shared ? c.slice : D);
            *total = tile.number == group ? t : *total + t;
            *novel = tile.number == group ? n : *novel + n;
        });
    }

    // Step 6, a warp for each pair of a sample and a neighbor of its winner.
    __device__ __forceinline__ void store_pairs(const Tile& tile) const {
        for (int task = warp * blocks + block; task < tile.rows * k; task += WARPS * blocks) {
            const int i = task / k, q = task % k;
            const int64_t f = feature(c.neighbors[head.winner[i] * k + q], D);
            const float* row = c.rank_score + (tile.b + i) * D;
            float claimed = 0;
            for (int j = lane; j < k; j += 32) claimed += row[feature(c.neighbors[f * k + j], D)];
            claimed = sum_of_warp(claimed);
            if (lane == 0) {
                c.pair_feature[(tile.b + i) * k + q] = f;
                c.pair_pull[(tile.b + i) * k + q] = row[f] / (1 + claimed);
            }
        }
    }

    __device__ __forceinline__ void store_samples(const Tile& tile) const {
        if (block == 0 && thread < tile.rows) {
            c.coverage[tile.b + thread] = head.coverage[thread];
            c.need[tile.b + thread] = 1 / (head.coverage[thread] + 1);
            c.winner[tile.b + thread] = head.winner[thread];
        }
    }

    __device__ __forceinline__ void store_sums() const {
        each([&](int d, int place, int) {
            partial()[d] = sums[place];
            partial()[D + d] = sums[c.slice + place];
        });
    }
};

template <int WHERE, int ROWS, int THREADS, int OWN, class Ids>
__global__ void __launch_bounds__(THREADS, 1) competition_kernel(const Competition c) {
    SHARED(memory);
    typedef CompetitionThread<WHERE, ROWS, THREADS, OWN, Ids> Thread;
    const Thread on(c, memory);
    typename Thread::Held near;
    if constexpr (OWN > 0) on.hold_neighbors(near);
    if (on.group * ROWS < c.B) on.fetch(on.group);
    for (Tile tile = {on.group, 0, 0}; tile.number * ROWS < c.B; tile.number += on.groups) {
        tile.b = tile.number * ROWS;
        tile.rows = int(least(c.B - tile.b, ROWS));
        copies_arrived();
        on.barrier();
        float covered[ROWS] = {};
        uint64_t best[ROWS] = {};
        on.compete(near, tile, covered, best);
        on.reduce_in_block(covered, best);
        if constexpr (WHERE == CLUSTER) cluster_barrier();  // also: all strengths have been read, all scores written
        if ((tile.number + on.groups) * ROWS < c.B) on.fetch(tile.number + on.groups);
        on.reduce_in_cluster();
        __syncthreads();
        on.add_to_sums(tile);
        on.store_pairs(tile);
        on.store_samples(tile);
    }
    if (c.sums_shared) on.store_sums();
    if constexpr (WHERE == CLUSTER) cluster_barrier();  // nobody leaves while others read its memory
}

// Steps 5, 7, 10 (u) and 11 (v) from the sums of all groups, added in their order.
__global__ void __launch_bounds__(FORCES_WARPS * 32) forces_kernel(const Forces f) {
    SHARED(memory);
    float(*part)[2][32] = reinterpret_cast<float(*)[2][32]>(memory);  // [FORCES_WARPS]
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t d = int64_t(blockIdx.x) * 32 + lane, D = f.D;
    float total = 0, novel = 0;
    if (d < D)
        for (int64_t group = warp; group < f.groups; group += FORCES_WARPS) {
            total += f.partial[group * 2 * D + d];
            novel += f.partial[group * 2 * D + D + d];
        }
    part[warp][0][lane] = total;
    part[warp][1][lane] = novel;
    __syncthreads();
    if (warp > 0 || d >= D) return;
    for (int w = 1; w < FORCES_WARPS; w++) {
        total += part[w][0][lane];
        novel += part[w][1][lane];
    }
    const float novelty = novel / (total + EPS), win_rate = total / float(f.B);
    float share = f.coupled ? win_rate * novelty : win_rate, strength = f.coupled ? 1 : 1 - novelty;
    if (f.rescue_onset > 0 && !(win_rate < f.rescue_onset)) share = 1;
    if (f.pull_onset > 0 && !(win_rate < f.pull_onset)) strength = 0;
    f.novelty[d] = novelty;
    f.win_rate[d] = win_rate;
    f.winner_share[d] = share;
    f.som_strength[d] = strength;
}

}  // namespace bcl
