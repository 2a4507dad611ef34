// Competition (steps 2 to 8) for many features: tiles of a few samples, whose strengths of all features lie in shared
// memory, in that of a cluster of blocks, or where no cluster holds them in global memory. A neighbor's strengths are
// one vector. Blocks stay and take tile after tile, so that neighbors may stay in registers, and sums over the batch
// in shared memory; the next tile is on its way while what needs no strengths is done.
#pragma once
#include "common.cuh"

namespace bcl {

struct Competition {
    const float* activation;  // [B, D]
    int64_t stride_b, stride_d, B, D;
    const int64_t* neighbors;  // [D, k]
    int64_t k;
    float temperature;
    const float* x;  // [B, N]
    int64_t x_stride_b, x_stride_n, N;
    float* rank_score;      // [B, D]
    float* coverage;        // [B]
    int64_t* winner;        // [B]
    int64_t* pair_feature;  // [B, k]
    float* pair_pull;       // [B, k]
    float *x_inverse_norm, *need;  // [B]
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

// WHERE the strengths lie. OWN: most features of a thread, whose neighbors (at most HELD) are in registers; 0: they
// are read for every tile, Eight at once or one by one.
template <int WHERE, int ROWS, int THREADS, int OWN, class Ids>
__global__ void __launch_bounds__(THREADS, 1) competition_kernel(const Competition c) {
    SHARED(memory);
    constexpr int WARPS = THREADS / 32;
    // Registers are short: a missing row is left out, though behind a branch each row waits for the one before.
#if __CUDA_ARCH__ >= 1000
    constexpr bool SHORT = OWN > 0 || THREADS > READING_THREADS;
#else
    constexpr bool SHORT = OWN > 0;
#endif
    static_assert(sizeof(Head<ROWS, WARPS>) <= HEAD, "the strengths follow the head");
    Head<ROWS, WARPS>& head = *reinterpret_cast<Head<ROWS, WARPS>*>(memory);
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const unsigned blocks = 1u << c.cluster_log, block = WHERE == CLUSTER ? cluster_rank() : 0;
    const int D = int(c.D), k = int(c.k), group = blockIdx.x >> c.cluster_log, groups = gridDim.x >> c.cluster_log;
    Row<ROWS>* strength = reinterpret_cast<Row<ROWS>*>(memory + HEAD);
    if constexpr (WHERE == MEMORY) strength = reinterpret_cast<Row<ROWS>*>(c.strengths) + group * c.D;
    const Ids* ids = static_cast<const Ids*>(c.ids);
    float* sums = reinterpret_cast<float*>(memory + HEAD + c.slice * int64_t(sizeof(Row<ROWS>)));  // where sums_shared
    auto partial = [&] { return c.partial + int64_t(opaque(group)) * 2 * D; };

    auto barrier = [] {
        if constexpr (WHERE == CLUSTER) cluster_barrier();
        else __syncthreads();
    };
    // Features lie in a cluster in chunks of 32, dealt out in turn.
    auto strength_of = [&](uint32_t j) {
        if constexpr (WHERE != CLUSTER) return strength[j];
        const uint32_t chunk = j >> 5;
        return *of_peer(strength + (chunk >> c.cluster_log << 5 | (j & 31)), chunk & (blocks - 1));
    };
    // Calls visit(feature, its place in this block, its number in this thread) for every feature of this thread.
    const int first = int((warp << c.cluster_log) + block) << 5 | lane, step = THREADS << c.cluster_log;
    auto in_turn = [&](auto visit) {
        int d = opaque(first);
#pragma unroll 1
        for (int place = thread; d < D; place += THREADS, d += step) visit(d, place, 0);
    };
    auto each = [&](auto visit) {
        if constexpr (OWN > 0) {
            int d = opaque(first);
#pragma unroll
            for (int f = 0; f < OWN; f++, d += step)
                if (d < D) visit(d, thread + f * THREADS, f);
        } else {
            in_turn(visit);
        }
    };

    uint32_t near[OWN > 0 ? OWN : 1][HELD / 2];  // two neighbors each; the first fills up what is missing of HELD
    if constexpr (OWN > 0)
        each([&](int d, int, int f) {
#pragma unroll
            for (int i = 0; i < HELD; i += 2) {
                const int64_t one = feature(c.neighbors[int64_t(d) * k + (i < k ? i : 0)], D);
                const int64_t other = feature(c.neighbors[int64_t(d) * k + (i + 1 < k ? i + 1 : 0)], D);
                near[f][i / 2] = uint32_t(one) | uint32_t(other) << 16;
            }
        });

    auto fetch = [&](int64_t tile) {  // a missing row is the last again
        const int64_t b = tile * ROWS, last = least(c.B - b, ROWS) - 1;
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
    };
    if (group * ROWS < c.B) fetch(group);
    for (int64_t tile = group; tile * ROWS < c.B; tile += groups) {
        const int64_t b = tile * ROWS;
        const int rows = int(least(c.B - b, ROWS));
        copies_arrived();
        barrier();

        float covered[ROWS] = {};
        uint64_t best[ROWS] = {};
        each([&](int d, int place, int f) {  // steps 2 and 3
            float rival[ROWS] = {};
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
            const Row<ROWS> own = strength[place];
            float* score_of = c.rank_score + b * D + d;
            for (int i = 0; i < ROWS; i++) {
                if (SHORT && i >= rows) continue;
                const float margin = fabsf(own.of[i]) - rival[i];
                const float score = sigmoid(c.temperature * margin);
                if constexpr (SHORT) {
                    c.rank_score[(b + i) * D + d] = score;
                } else {  // a missing row is the last again
                    *score_of = score;
                    if (i + 1 < rows) score_of += D;
                }
                covered[i] += score;
                const uint64_t here = packed(margin, d);  // NaN wins, as argmax has it
                best[i] = here > best[i] ? here : best[i];
            }
        });
        for (int i = 0; i < ROWS; i++) {  // steps 4 and 8
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
        if constexpr (WHERE == CLUSTER) cluster_barrier();  // also: all strengths have been read, all scores written
        if ((tile + groups) * ROWS < c.B) fetch(tile + groups);
        if (thread < ROWS) {
            float coverage = 0;
            uint64_t largest = 0;
            for (unsigned peer = 0; peer < blocks; peer++) {
                const Head<ROWS, WARPS>& other = WHERE == CLUSTER ? *of_peer(&head, peer) : head;
                coverage += other.block_part[thread];
                largest = other.block_best[thread] > largest ? other.block_best[thread] : largest;
            }
            head.coverage[thread] = coverage;
            head.winner[thread] = index_of(largest);
        }
        __syncthreads();

        float claim[ROWS];
        for (int i = 0; i < ROWS; i++) claim[i] = 1 / (head.coverage[i] + EPS);
        each([&](int d, int place, int) {  // the sums over the batch of steps 5 and 7
            float t = 0, n = 0;
            for (int i = 0; i < ROWS; i++) {
                if (i >= rows) continue;
                const float score = c.rank_score[(b + i) * D + d];
                t += score;
                n += score * claim[i];
            }
            float *total = c.sums_shared ? sums + place : partial() + d, *novel = total + (c.sums_shared ? c.slice : D);
            *total = tile == group ? t : *total + t;
            *novel = tile == group ? n : *novel + n;
        });
        // Step 6, a warp for each pair.
        for (int task = warp * blocks + block; task < rows * k; task += WARPS * blocks) {
            const int i = task / k, q = task % k;
            const int64_t f = feature(c.neighbors[head.winner[i] * k + q], D);
            const float* row = c.rank_score + (b + i) * D;
            float claimed = 0;
            for (int j = lane; j < k; j += 32) claimed += row[feature(c.neighbors[f * k + j], D)];
            claimed = sum_of_warp(claimed);
            if (lane == 0) {
                c.pair_feature[(b + i) * k + q] = f;
                c.pair_pull[(b + i) * k + q] = row[f] / (1 + claimed);
            }
        }
        if (block == 0 && thread < rows) {
            c.coverage[b + thread] = head.coverage[thread];
            c.need[b + thread] = 1 / (head.coverage[thread] + 1);
            c.winner[b + thread] = head.winner[thread];
        }
    }
    if (c.sums_shared)
        each([&](int d, int place, int) {
            partial()[d] = sums[place];
            partial()[D + d] = sums[c.slice + place];
        });
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
