// Selection (step 9b) by rank without a sort where bounds decide: a histogram of each column's keys bounds every rank,
// hence every score, by the same rounded product as the score itself. Samples come by falling need, in a coarse order,
// until need cannot beat T, the r-th best lower bound so far; those whose upper bound reaches T survive. If just r do,
// no rank is needed. What remains open is listed for two more kernels: one counts, within the bins of the survivors,
// what lies below them; one settles those and sorts whole columns where neither serves.
#pragma once
#include "common.cuh"

namespace bcl {

struct alignas(8) Visit {
    uint32_t sample;
    float need;
};

struct Open {
    int32_t stripes, columns;  // lists: stripes of 32 columns with some to be counted, columns to be sorted
    uint32_t highest;          // of the needs, as bits
    int32_t shift;             // of a need's bits below it: the bin of its sample in the order
    int32_t bounded;           // no need is negative, infinite or NaN
};

struct alignas(8) Limits {
    float low, scale;
};

struct Selection {
    const float* activation;  // [B, D]
    int64_t stride_b, stride_d, B, D;
    const float *bias, *x_inverse_norm, *need;  // [D] or null, [B], [B] or null
    int64_t r;      // samples to choose, 1 .. min(B, SURVIVORS)
    int soft;       // their shares are not all alike
    int64_t* rows;  // [D, r] the chosen samples
    float* shares;  // [D, r]
    int bins;       // of a column's keys
    Open* open;
    int32_t *stripes, *columns;  // what is listed: [D / 32], [D]
    int32_t* survivors;  // [D] of a column to be counted, else 0
    Limits* limits;      // [D] of its keys
    // [D / 32, SURVIVORS, 32] the survivors' samples, keys, and how many keys lie below
    int32_t *survivor, *below;
    float* key;
    Visit* visits;     // [B] by falling bin of need, of one bin by sample
    uint32_t* memory;  // [blocks, 4, B] of the sort
};

__device__ inline float bias_of(const Selection& s, int64_t d) { return s.bias ? s.bias[d] : 0; }  // x - 0 is x

__device__ inline float key_of(const Selection& s, int64_t b, int64_t d) {
    return (s.activation[b * s.stride_b + d * s.stride_d] - bias_of(s, d)) * s.x_inverse_norm[b];
}

// No need from this one on in the order is larger: all that its bin may hold.
__device__ inline float most_need(const Open& open, float need) {
    const uint32_t behind = open.highest - __float_as_uint(need + 0.0f);
    return __uint_as_float(open.highest - (behind >> open.shift << open.shift));
}

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

// The samples by falling need, roughly: one block counts the bins of the needs, each warp those of a stretch of the
// batch, and puts every sample where its bin's begin. The bits of positive numbers are in their order.
__global__ void __launch_bounds__(ORDER_THREADS) selection_order_kernel(const Selection s) {
    SHARED(memory);
    constexpr int WARPS = ORDER_THREADS / 32, PITCH = WARPS + 1, AHEAD = 8;
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
    // A thread sums half a bin, of all warps; then each learns what lies before.
    static_assert(2 * ORDER_BINS == ORDER_THREADS && WARPS == 32, "");
    uint32_t* half = count + thread / 2 * PITCH + thread % 2 * 16;
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

// A weakly monotone map of keys to bins, roundings included; NaN has none.
struct Bins {
    Limits limits;
    int last;
    __device__ int operator()(float key) const {
        const float place = (key - limits.low) * limits.scale;
        return !(place > 0) ? 0 : place < last ? int(place) : last;
    }
};

// How many keys of a column each bin holds, then how many lie below it; a column is a lane. NARROW: in 16 bits, two
// bins to a word, for fewer than 65,536 samples.
template <int BINS, bool NARROW>
struct Histogram {
    static constexpr int WORDS = NARROW ? BINS / 2 : BINS;
    uint32_t (*word)[COLUMNS];  // [WORDS + 1]
    __device__ void add(int bin, int lane) const {
        if (NARROW) atomicAdd(&word[bin / 2][lane], bin % 2 ? 1u << 16 : 1u);
        else atomicAdd(&word[bin][lane], 1u);
    }
    __device__ uint32_t below(int bin, int lane) const {
        return NARROW ? word[bin / 2][lane] >> bin % 2 * 16 & 0xFFFF : word[bin][lane];
    }
    __device__ static uint32_t sum(uint32_t word) { return NARROW ? (word & 0xFFFF) + (word >> 16) : word; }
    __device__ static uint32_t running(uint32_t word, uint32_t below) {
        return NARROW ? below | (below + (word & 0xFFFF)) << 16 : below;
    }
};

// A block takes 32 columns, a lane each, so that it reads whole cache lines and no two lanes share a bank. AHEAD
// samples of a warp are on their way at a time, VISITS where it visits: beyond the end it reads one of them again, for
// a branch would wait for each. At most ROUND samples are visited between two looks at the threshold.
template <int BINS, bool NARROW, int AHEAD, int WARPS, int ROUND>
__global__ void __launch_bounds__(WARPS * 32, 32 / WARPS) selection_kernel(const Selection s) {
    SHARED(memory);
    typedef uint32_t Words[COLUMNS];
    typedef float Floats[COLUMNS];
    constexpr int VISITS = 8;
    typedef Histogram<BINS, NARROW> Counts;
    const Counts bins = {reinterpret_cast<Words*>(memory)};
    Words *found = bins.word + Counts::WORDS + 1, *opened = found + 1;  // [1] each: entries of the list; columns left
    Floats *low = reinterpret_cast<Floats*>(opened + 1), *scale = low + 1, *threshold = scale + 1;  // [1] each
    Floats* part = threshold + 1;  // [WARPS]
    Floats* best = part + WARPS;   // [r] the best lower bounds, falling
    Floats* list = best + s.r;     // [ROUND]
    Words* survivor = reinterpret_cast<Words*>(list);  // [2, SURVIVORS] samples and their bins: takes the list's place
    static_assert(2 * SURVIVORS <= ROUND && WARPS <= ROUND && BINS % (2 * WARPS) == 0, "");

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t B = s.B, d = least(int64_t(blockIdx.x) * COLUMNS + lane, s.D - 1);  // beyond: the last column again
    const float bias = bias_of(s, d);
    const float* column = s.activation + d * s.stride_d;
    const float* norm = s.x_inverse_norm;

    // Where keys lie, from some of them: a map of keys to bins need be monotone, not tight.
    float smallest = INFINITY, largest = -INFINITY;
    constexpr int SAMPLED = 512;
    const int sampled = int(least(B, SAMPLED));
    for (int first = warp; first < sampled; first += WARPS * AHEAD) {
        float value[AHEAD], scaled[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int number = first + i * WARPS < sampled ? first + i * WARPS : first;
            const int64_t b = B < SAMPLED ? number : number * B / SAMPLED;
            value[i] = column[b * s.stride_b];
            scaled[i] = norm[b];
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const float key = (value[i] - bias) * scaled[i];
            const bool finite = fabsf(key) < INFINITY;
            smallest = fminf(smallest, finite ? key : INFINITY);
            largest = fmaxf(largest, finite ? key : -INFINITY);
        }
    }
    part[warp][lane] = smallest;
    list[warp][lane] = largest;
    for (int i = warp; i <= Counts::WORDS; i += WARPS) bins.word[i][lane] = 0;
    __syncthreads();
    if (warp == 0) {
        for (int w = 1; w < WARPS; w++) {
            smallest = fminf(smallest, part[w][lane]);
            largest = fmaxf(largest, list[w][lane]);
        }
        const float margin = (largest - smallest) / 4, width = BINS / (largest - smallest + 2 * margin);
        const bool useful = width > 0 && width < INFINITY;  // else all keys share one bin
        low[0][lane] = useful ? smallest - margin : 0;
        scale[0][lane] = useful ? width : 0;
        threshold[0][lane] = -1;  // bounds of samples are >= 0
        found[0][lane] = opened[0][lane] = 0;
        for (int64_t i = 0; i < s.r; i++) best[i][lane] = -1;
    }
    __syncthreads();
    const Bins bin_of = {{low[0][lane], scale[0][lane]}, BINS - 1};

    for (int64_t first = warp; first < B; first += WARPS * AHEAD) {
        const int left = int(least(B - first, WARPS * AHEAD));
        float value[AHEAD], scaled[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int64_t b = first + (i * WARPS < left ? i * WARPS : 0);
            value[i] = column[b * s.stride_b];
            scaled[i] = norm[b];
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const float key = (value[i] - bias) * scaled[i];
            if (i * WARPS < left && key == key) bins.add(bin_of(key), lane);  // NaN ranks above all that are counted
        }
    }
    __syncthreads();
    constexpr int STRETCH = Counts::WORDS / WARPS;
    uint32_t below = 0;
    for (int i = 0; i < STRETCH; i++) below += Counts::sum(bins.word[warp * STRETCH + i][lane]);
    part[warp][lane] = __uint_as_float(below);
    __syncthreads();
    below = 0;
    for (int w = 0; w < warp; w++) below += __float_as_uint(part[w][lane]);
    for (int i = 0; i < STRETCH; i++) {
        uint32_t& word = bins.word[warp * STRETCH + i][lane];
        const uint32_t here = word;
        word = Counts::running(here, below);
        below += Counts::sum(here);
    }
    if (warp == WARPS - 1) bins.word[Counts::WORDS][lane] = below;
    __syncthreads();

    // Calls look(sample, need, key) for the samples of this warp among the places from `from` to `to`; not for NaN.
    auto visit = [&](const Visit (&there)[VISITS], int64_t from, int64_t to, auto look) {
        float value[VISITS], scaled[VISITS];
#pragma unroll
        for (int i = 0; i < VISITS; i++) {
            value[i] = column[there[i].sample * s.stride_b];
            scaled[i] = norm[there[i].sample];
        }
#pragma unroll
        for (int i = 0; i < VISITS; i++) {
            const float key = (value[i] - bias) * scaled[i];
            if (from + warp + i * WARPS < to && key == key) look(there[i].sample, there[i].need, key);
        }
    };
    auto fetch = [&](Visit (&there)[VISITS], int64_t from, int64_t to) {
#pragma unroll
        for (int i = 0; i < VISITS; i++) {
            const int64_t place = from + warp + i * WARPS;
            there[i] = s.visits[place < to ? place : from];
        }
        __syncwarp();  // else compilers wait for the first before they send for the last
    };
    // T, the r-th best lower bound of those visited; first few samples, for T rises fast.
    const Open open = *s.open;
    int64_t visited = 0;
    while (open.bounded && visited < B) {
        const int64_t end = least(B, visited + (visited == 0 ? WARPS : least(visited, ROUND)));
        const float reach = most_need(open, s.visits[visited].need) * float(B - 1);
        if (__all_sync(0xFFFFFFFFu, reach < threshold[0][lane])) break;
        for (; visited < end; visited += WARPS * VISITS) {
            Visit there[VISITS];
            fetch(there, visited, end);
            visit(there, visited, end, [&](uint32_t, float need, float key) {
                const float sure = float(bins.below(bin_of(key), lane)) * need;
                if (sure > threshold[0][lane]) list[atomicAdd(&found[0][lane], 1u)][lane] = sure;
            });
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
    for (int64_t first = 0; first < visited; first += WARPS * VISITS) {
        Visit there[VISITS];
        fetch(there, first, visited);
        visit(there, first, visited, [&](uint32_t b, float need, float key) {
            const int bin = bin_of(key);
            if (!(float(bins.below(bin + 1, lane) - 1) * need >= threshold[0][lane])) return;
            const uint32_t at = atomicAdd(&found[0][lane], 1u);
            if (at >= SURVIVORS) return;
            survivor[at][lane] = b;
            survivor[SURVIVORS + at][lane] = uint32_t(bin);
        });
    }
    __syncthreads();

    for (int column = warp; column < COLUMNS; column += WARPS) {  // a warp for each
        const int64_t own = int64_t(blockIdx.x) * COLUMNS + column;
        const uint32_t n = found[0][column];
        if (own >= s.D) continue;
        if (lane == 0) s.survivors[own] = 0;
        if (!open.bounded || n < s.r || n > SURVIVORS) {
            if (lane == 0) s.columns[atomicAdd(&s.open->columns, 1)] = int32_t(own);
            continue;
        }
        const bool settled = n == s.r && !s.soft;  // in any order: take that of the batch
        bool exact = true;
        uint64_t mine[2] = {0, 0};
        float rank[2] = {0, 0};
        for (int half = 0; half < 2; half++) {
            const uint32_t i = lane + 32 * half;
            if (i >= n) continue;
            const uint32_t b = survivor[i][column], bin = survivor[SURVIVORS + i][column];
            const uint32_t lower = bins.below(int(bin), column);
            exact &= bins.below(int(bin) + 1, column) - 1 == lower;
            rank[half] = float(lower);
            mine[half] = settled ? packed(0, b) : standing(s, rank[half], b);
        }
        if (settled || __all_sync(0xFFFFFFFFu, exact)) {
            settle(s, own, int(n), mine, rank);
            continue;
        }
        for (uint32_t i = lane; i < n; i += 32) {
            const uint32_t b = survivor[i][column];
            const int64_t at = (int64_t(blockIdx.x) * SURVIVORS + i) * COLUMNS + column;
            s.survivor[at] = int32_t(b);
            s.key[at] = key_of(s, b, own);
            s.below[at] = int32_t(bins.below(int(survivor[SURVIVORS + i][column]), column));
        }
        if (lane > 0) continue;
        s.survivors[own] = int32_t(n);
        s.limits[own] = {low[0][column], scale[0][column]};
        if (atomicAdd(&opened[0][0], 1u) == 0) s.stripes[atomicAdd(&s.open->stripes, 1)] = int32_t(blockIdx.x);
    }
}

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
        const Bins bin_of = {s.limits[d], s.bins - 1};
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
