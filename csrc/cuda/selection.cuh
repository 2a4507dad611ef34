// Selection (SPEC 9b) by rank without a sort where bounds decide: a histogram of each column's keys bounds every rank,
// hence every score, by the same rounded product as the score itself. Samples come by falling need until need cannot
// beat T, the r-th best lower bound so far; those whose upper bound reaches T survive. If just r do, no rank is needed.
// What remains open is listed for two more kernels: one counts the ranks of the survivors, one sorts whole columns.
#pragma once
#include "common.cuh"

namespace bcl {

struct Selection {
    const float* activation;  // [B, D]
    int64_t stride_b, stride_d, B, D;
    const float *bias, *x_inverse_norm, *need;  // [D] or null, [B], [B] or null
    const float* order_need;  // [B] the needs, falling
    const int64_t* order;     // [B] their samples
    int64_t r;                // samples to choose, 1 .. min(B, SURVIVORS)
    int soft;                 // their shares are not all alike
    int64_t* rows;            // [D, r] the chosen samples
    float* shares;            // [D, r]
    int32_t* open;            // [2] how many columns are to be counted, and to be sorted
    int32_t *counted, *sorted;  // [D] which
    int32_t* survivors;       // [D] of each
    int32_t* survivor;        // [D, SURVIVORS] their samples
    uint32_t* memory;         // [blocks, 4, B] of the sort
};

__device__ inline float key_of(const Selection& s, int64_t b, int64_t d) {
    const float projection = s.activation[b * s.stride_b + d * s.stride_d];
    return (s.bias ? projection - s.bias[d] : projection) * s.x_inverse_norm[b];
}

__device__ inline float need_at(const Selection& s, int64_t place) { return s.need ? s.order_need[place] : 1; }
__device__ inline int64_t sample_at(const Selection& s, int64_t place) { return s.need ? s.order[place] : place; }

// The score of sample b at this rank, packed with it; NaN counts as -inf.
__device__ inline uint64_t standing(const Selection& s, float rank, int64_t b) {
    const float score = s.need ? rank * s.need[b] : rank;
    return packed(score == score ? score : -INFINITY, b);
}

// The weight of a chosen sample before its column's are divided by their sum; `rank` a number.
__device__ inline float weight_of(const Selection& s, float rank, int64_t b) {
    const float affinity = s.B > 1 ? rank / float(s.B - 1) : 1, weighted = s.need ? affinity * s.need[b] : affinity;
    return weighted < 0 ? 0 : weighted;
}

__device__ inline void choose(const Selection& s, int64_t d, int place, uint64_t standing, float rank) {
    const int64_t b = index_of(standing);
    s.rows[d * s.r + place] = b;
    s.shares[d * s.r + place] = weight_of(s, rank, b);
}

// Shares of the r samples chosen for a column; with `soft` they hold the weights before.
__device__ inline void share_out(const Selection& s, int64_t d) {
    float* share = s.shares + d * s.r;
    float sum = 0;
    for (int64_t i = 0; i < s.r; i++) sum += share[i];
    for (int64_t i = 0; i < s.r; i++) share[i] = s.soft ? share[i] / (sum + EPS) : 1 / float(s.r);
}

// One warp gives each of n <= SURVIVORS samples its place by `standing`; the first r are chosen. A lane holds those at
// its number and 32 further, with their ranks.
__device__ inline void settle(const Selection& s, int64_t d, int n, const uint64_t (&mine)[2], const float (&rank)[2]) {
    const int lane = threadIdx.x % 32;
    int place[2] = {0, 0};
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 32 && half * 32 + i < n; i++) {
            const uint64_t other = __shfl_sync(0xFFFFFFFFu, mine[half], i);
            place[0] += other > mine[0];
            place[1] += other > mine[1];
        }
    for (int half = 0; half < 2; half++)
        if (lane + half * 32 < n && place[half] < s.r) choose(s, d, place[half], mine[half], rank[half]);
    __syncwarp();
    if (lane == 0) share_out(s, d);
}

// A weakly monotone map of keys to bins, roundings included; NaN has none.
struct Bins {
    float low, scale;
    __device__ int operator()(float key) const {
        const float place = (key - low) * scale;
        return !(place > 0) ? 0 : place < BINS - 1 ? int(place) : BINS - 1;
    }
};

constexpr int SELECTION_THREADS = SELECTION_WARPS * 32, SAMPLED = 512;

// A block takes 32 columns, a lane each, so that it reads whole cache lines and no two lanes share a bank.
__global__ void __launch_bounds__(SELECTION_THREADS) selection_kernel(const Selection s) {
    SHARED(memory);
    typedef uint32_t Words[COLUMNS];
    typedef float Floats[COLUMNS];
    Words* bins = reinterpret_cast<Words*>(memory);  // [BINS + 1] counts, then how many keys lie below
    Words* found = bins + BINS + 1;                  // [1] how many entries the list has
    Floats *low = reinterpret_cast<Floats*>(found + 1), *scale = low + 1, *threshold = scale + 1;  // [1] each
    Floats* part = threshold + 1;         // [SELECTION_WARPS]
    Floats* best = part + SELECTION_WARPS;  // [r] the best lower bounds, falling
    Floats* list = best + s.r;              // [ROUND]
    Words* survivor = reinterpret_cast<Words*>(list);  // [2, SURVIVORS] samples and their bins: takes the list's place
    static_assert(2 * SURVIVORS <= ROUND && SELECTION_WARPS <= ROUND, "");

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t B = s.B, d = least(int64_t(blockIdx.x) * COLUMNS + lane, s.D - 1);  // beyond: the last column again
    constexpr int AHEAD = 8;  // samples on their way at a time

    // Where keys lie, from some of them: a map of keys to bins need be monotone, not tight.
    float smallest = INFINITY, largest = -INFINITY;
    const int64_t sampled = least(B, SAMPLED);
    for (int64_t i = warp; i < sampled; i += SELECTION_WARPS) {
        const float key = key_of(s, i * B / sampled, d);
        if (fabsf(key) < INFINITY) {
            smallest = fminf(smallest, key);
            largest = fmaxf(largest, key);
        }
    }
    part[warp][lane] = smallest;
    list[warp][lane] = largest;
    for (int bin = warp; bin <= BINS; bin += SELECTION_WARPS) bins[bin][lane] = 0;
    __syncthreads();
    if (warp == 0) {
        for (int w = 1; w < SELECTION_WARPS; w++) {
            smallest = fminf(smallest, part[w][lane]);
            largest = fmaxf(largest, list[w][lane]);
        }
        const float margin = (largest - smallest) / 4, width = BINS / (largest - smallest + 2 * margin);
        const bool useful = width > 0 && width < INFINITY;  // else all keys share one bin
        low[0][lane] = useful ? smallest - margin : 0;
        scale[0][lane] = useful ? width : 0;
        threshold[0][lane] = -1;  // bounds of samples are >= 0
        found[0][lane] = 0;
        for (int64_t i = 0; i < s.r; i++) best[i][lane] = -1;
    }
    __syncthreads();
    const Bins bin_of = {low[0][lane], scale[0][lane]};

    for (int64_t first = warp; first < B; first += SELECTION_WARPS * AHEAD) {
        float key[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int64_t b = first + i * SELECTION_WARPS;
            key[i] = b < B ? key_of(s, b, d) : NAN;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (key[i] == key[i]) atomicAdd(&bins[bin_of(key[i])][lane], 1u);  // NaN ranks above all that are counted
    }
    __syncthreads();
    constexpr int STRETCH = BINS / SELECTION_WARPS;
    uint32_t below = 0;
    for (int i = 0; i < STRETCH; i++) below += bins[warp * STRETCH + i][lane];
    part[warp][lane] = __uint_as_float(below);
    __syncthreads();
    below = 0;
    for (int w = 0; w < warp; w++) below += __float_as_uint(part[w][lane]);
    for (int i = 0; i < STRETCH; i++) {
        const uint32_t here = bins[warp * STRETCH + i][lane];
        bins[warp * STRETCH + i][lane] = below;
        below += here;
    }
    if (warp == SELECTION_WARPS - 1) bins[BINS][lane] = below;
    __syncthreads();

    // T, the r-th best lower bound of those visited; first few samples, for T rises fast.
    const bool bounded = !s.need || (s.order_need[0] < INFINITY && s.order_need[B - 1] >= 0);
    int64_t visited = 0;
    while (bounded && visited < B) {
        const float reach = need_at(s, visited) * float(B - 1);
        if (__all_sync(0xFFFFFFFFu, reach < threshold[0][lane])) break;
        const int64_t end = least(B, visited + (visited == 0 ? SELECTION_WARPS : least(visited, ROUND)));
        for (int64_t place = visited + warp; place < end; place += SELECTION_WARPS) {
            const float key = key_of(s, sample_at(s, place), d);
            if (key != key) continue;
            const float sure = float(bins[bin_of(key)][lane]) * need_at(s, place);
            if (sure > threshold[0][lane]) list[atomicAdd(&found[0][lane], 1u)][lane] = sure;
        }
        visited = end;
        __syncthreads();
        if (warp == 0) {
            for (uint32_t i = 0; i < found[0][lane]; i++) {
                const float sure = list[i][lane];
                int64_t at = s.r;
                for (; at > 0 && best[at - 1][lane] < sure; at--)
                    if (at < s.r) best[at][lane] = best[at - 1][lane];
                if (at < s.r) best[at][lane] = sure;
            }
            found[0][lane] = 0;
            threshold[0][lane] = best[s.r - 1][lane];
        }
        __syncthreads();
    }
    for (int64_t place = warp; place < visited; place += SELECTION_WARPS) {
        const int64_t b = sample_at(s, place);
        const float key = key_of(s, b, d);
        if (key != key) continue;
        const int bin = bin_of(key);
        if (!(float(bins[bin + 1][lane] - 1) * need_at(s, place) >= threshold[0][lane])) continue;
        const uint32_t at = atomicAdd(&found[0][lane], 1u);
        if (at >= SURVIVORS) continue;
        survivor[at][lane] = uint32_t(b);
        survivor[SURVIVORS + at][lane] = uint32_t(bin);
    }
    __syncthreads();

    for (int column = warp; column < COLUMNS; column += SELECTION_WARPS) {  // a warp for each
        const int64_t own = int64_t(blockIdx.x) * COLUMNS + column;
        const uint32_t n = found[0][column];
        if (own >= s.D) continue;
        if (!bounded || n < s.r || n > SURVIVORS) {
            if (lane == 0) s.sorted[atomicAdd(&s.open[1], 1)] = int32_t(own);
            continue;
        }
        const bool settled = n == s.r && !s.soft;  // in any order: take that of the batch
        bool exact = true;
        uint64_t mine[2] = {0, 0};
        float rank[2] = {0, 0};
        for (int half = 0; half < 2; half++) {
            const uint32_t i = lane + 32 * half;
            if (i >= n) continue;
            const uint32_t b = survivor[i][column], bin = survivor[SURVIVORS + i][column], lower = bins[bin][column];
            exact &= bins[bin + 1][column] - 1 == lower;
            rank[half] = float(lower);
            mine[half] = settled ? packed(0, b) : standing(s, rank[half], b);
        }
        if (settled || __all_sync(0xFFFFFFFFu, exact)) {
            settle(s, own, int(n), mine, rank);
            continue;
        }
        for (uint32_t i = lane; i < n; i += 32) s.survivor[own * SURVIVORS + i] = int32_t(survivor[i][column]);
        if (lane == 0) {
            s.survivors[own] = int32_t(n);
            s.counted[atomicAdd(&s.open[0], 1)] = int32_t(own);
        }
    }
}

// Columns whose survivors need their ranks: one pass over the column counts a few at a time.
__global__ void __launch_bounds__(FIX_THREADS) selection_counting_kernel(const Selection s) {
    __shared__ uint32_t key[SURVIVORS], sample[SURVIVORS];
    __shared__ int below[SURVIVORS];
    constexpr int AT_ONCE = 8;
    const int thread = threadIdx.x, lane = thread % 32;
    for (int64_t entry = blockIdx.x; entry < s.open[0]; entry += gridDim.x) {
        const int64_t d = s.counted[entry];
        const int n = s.survivors[d];
        if (thread < n) {
            sample[thread] = uint32_t(s.survivor[d * SURVIVORS + thread]);
            key[thread] = ordered(key_of(s, sample[thread], d));
            below[thread] = 0;
        }
        __syncthreads();
        for (int first = 0; first < n; first += AT_ONCE) {
            int count[AT_ONCE] = {};
            uint32_t own[AT_ONCE], at[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                own[i] = key[first + i < n ? first + i : n - 1];
                at[i] = sample[first + i < n ? first + i : n - 1];
            }
            for (int64_t b = thread; b < s.B; b += FIX_THREADS) {
                const uint32_t other = ordered(key_of(s, b, d));
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++) count[i] += other < own[i] || (other == own[i] && b < at[i]);
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int sum = sum_of_warp(count[i]);
                if (lane == 0 && first + i < n) atomicAdd(&below[first + i], sum);
            }
        }
        __syncthreads();
        if (thread < 32) {
            uint64_t mine[2] = {0, 0};
            float rank[2] = {0, 0};
            for (int half = 0; half < 2; half++) {
                const int i = lane + 32 * half;
                if (i >= n) continue;
                rank[half] = float(below[i]);
                mine[half] = standing(s, rank[half], sample[i]);
            }
            settle(s, d, n, mine, rank);
        }
        __syncthreads();
    }
}

// Columns that defeat the histogram, and needs that defeat bounds: a radix sort of the whole column by one block, each
// thread a stretch of it, four bits at a time; then the best, one after the other.
__global__ void __launch_bounds__(FIX_THREADS) selection_sorting_kernel(const Selection s) {
    __shared__ uint32_t count[16 * FIX_THREADS], sum[FIX_THREADS];
    __shared__ uint64_t best[FIX_THREADS / 32];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int B = int(s.B), stretch = int(ceil_div(B, FIX_THREADS)), from = int(least(int64_t(thread) * stretch, B)),
              to = int(least(int64_t(from) + stretch, B));
    uint32_t* memory = s.memory + int64_t(blockIdx.x) * 4 * B;
    for (int64_t entry = blockIdx.x; entry < s.open[1]; entry += gridDim.x) {
        const int64_t d = s.sorted[entry];
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
