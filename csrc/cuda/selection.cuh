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

struct Selection : SelectionCall {
    int column_bins;  // of a column's keys: `bins`, or half of them
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

// A block's shared memory.
template <int BINS, bool NARROW, int WARPS>
struct SelectionMemory {
    typedef uint32_t Words[COLUMNS];
    typedef float Floats[COLUMNS];
    typedef Histogram<BINS, NARROW> Counts;
    const Counts bins;
    Words *const found, *const opened;                  // [1] each: entries of the list; columns left
    Floats *const low, *const scale, *const threshold;  // [1] each
    Floats *const part, *const best;                    // [WARPS], and [r] the best lower bounds, falling
    Floats* const list;                                 // [ROUND]
    Words* const survivor;  // [2, SURVIVORS] samples and their bins: takes the list's place
    __device__ __forceinline__ SelectionMemory(char* memory, int64_t r)
        : bins{reinterpret_cast<Words*>(memory)}, found(bins.word + Counts::WORDS + 1), opened(found + 1),
          low(reinterpret_cast<Floats*>(opened + 1)), scale(low + 1), threshold(scale + 1), part(threshold + 1),
          best(part + WARPS), list(best + r), survivor(reinterpret_cast<Words*>(list)) {}
};

struct Column {  // of the activation
    float bias;
    const float *value, *norm;
};

// The smallest and the largest of some of the keys that a warp finds in a column.
template <int AHEAD, int WARPS>
__device__ __forceinline__ void limits_of_keys(const Selection& s, const Column& column, float& smallest,
                                               float& largest) {
    constexpr int SAMPLED = 512;
    const int warp = threadIdx.x / 32, sampled = int(least(s.B, SAMPLED));
    for (int first = warp; first < sampled; first += WARPS * AHEAD) {
        float value[AHEAD], scaled[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int number = first + i * WARPS < sampled ? first + i * WARPS : first;
            const int64_t b = s.B < SAMPLED ? number : number * s.B / SAMPLED;
            value[i] = column.value[b * s.stride_b];
            scaled[i] = column.norm[b];
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const float key = (value[i] - column.bias) * scaled[i];
            const bool finite = fabsf(key) < INFINITY;
            smallest = fminf(smallest, finite ? key : INFINITY);
            largest = fmaxf(largest, finite ? key : -INFINITY);
        }
    }
}

// One warp makes the map of keys to bins from the limits that all have found; nothing else is found yet.
template <int BINS, bool NARROW, int WARPS>
__device__ __forceinline__ void begin(const Selection& s, const SelectionMemory<BINS, NARROW, WARPS>& m, float smallest,
                                      float largest) {
    const int lane = threadIdx.x % 32;
    for (int w = 1; w < WARPS; w++) {
        smallest = fminf(smallest, m.part[w][lane]);
        largest = fmaxf(largest, m.list[w][lane]);
    }
    const float margin = (largest - smallest) / 4, width = BINS / (largest - smallest + 2 * margin);
    const bool useful = width > 0 && width < INFINITY;  // else all keys share one bin
    m.low[0][lane] = useful ? smallest - margin : 0;
    m.scale[0][lane] = useful ? width : 0;
    m.threshold[0][lane] = -1;  // bounds of samples are >= 0
    m.found[0][lane] = m.opened[0][lane] = 0;
    for (int64_t i = 0; i < s.r; i++) m.best[i][lane] = -1;
}

// How many keys each bin holds.
template <int AHEAD, int BINS, bool NARROW, int WARPS>
__device__ __forceinline__ void count_keys(const Selection& s, const SelectionMemory<BINS, NARROW, WARPS>& m,
                                           const Column& column, const Bins& bin_of) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int64_t first = warp; first < s.B; first += WARPS * AHEAD) {
        const int left = int(least(s.B - first, WARPS * AHEAD));
        float value[AHEAD], scaled[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int64_t b = first + (i * WARPS < left ? i * WARPS : 0);
            value[i] = column.value[b * s.stride_b];
            scaled[i] = column.norm[b];
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const float key = (value[i] - column.bias) * scaled[i];
            if (i * WARPS < left && key == key) m.bins.add(bin_of(key), lane);  // NaN ranks above all that are counted
        }
    }
}

// How many keys lie below each bin; a warp sums a stretch of the bins.
template <int BINS, bool NARROW, int WARPS>
__device__ __forceinline__ void sum_counts(const SelectionMemory<BINS, NARROW, WARPS>& m) {
    typedef Histogram<BINS, NARROW> Counts;
    constexpr int STRETCH = Counts::WORDS / WARPS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t below = 0;
    for (int i = 0; i < STRETCH; i++) below += Counts::sum(m.bins.word[warp * STRETCH + i][lane]);
    m.part[warp][lane] = __uint_as_float(below);
    __syncthreads();
    below = 0;
    for (int w = 0; w < warp; w++) below += __float_as_uint(m.part[w][lane]);
    for (int i = 0; i < STRETCH; i++) {
        uint32_t& word = m.bins.word[warp * STRETCH + i][lane];
        const uint32_t here = word;
        word = Counts::running(here, below);
        below += Counts::sum(here);
    }
    if (warp == WARPS - 1) m.bins.word[Counts::WORDS][lane] = below;
}

constexpr int VISITS = 8;

// The visits of a warp among the places from `from` to `to`.
template <int WARPS>
__device__ __forceinline__ void fetch(const Selection& s, Visit (&there)[VISITS], int64_t from, int64_t to) {
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < VISITS; i++) {
        const int64_t place = from + warp + i * WARPS;
        there[i] = s.visits[place < to ? place : from];
    }
    __syncwarp();  // else compilers wait for the first before they send for the last
}

// One warp puts what a round has found among the best lower bounds.
template <int BINS, bool NARROW, int WARPS>
__device__ __forceinline__ void merge_list(const Selection& s, const SelectionMemory<BINS, NARROW, WARPS>& m) {
    const int lane = threadIdx.x % 32;
    for (uint32_t i = 0; i < m.found[0][lane]; i++) {
        const float sure = m.list[i][lane];
        int64_t at = s.r;
        for (; at > 0 && m.best[at - 1][lane] < sure; at--)
            if (at < s.r) m.best[at][lane] = m.best[at - 1][lane];
        if (at < s.r) m.best[at][lane] = sure;
    }
    m.found[0][lane] = 0;
    m.threshold[0][lane] = m.best[s.r - 1][lane];
}

// A column is settled where its survivors' ranks are known or not needed; else they are left to be counted, or the
// column to be sorted. A warp for each.
template <int BINS, bool NARROW, int WARPS>
__device__ __forceinline__ void settle_or_leave(const Selection& s, const SelectionMemory<BINS, NARROW, WARPS>& m,
                                                const Open& open) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int column = warp; column < COLUMNS; column += WARPS) {
        const int64_t own = int64_t(blockIdx.x) * COLUMNS + column;
        const uint32_t n = m.found[0][column];
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
            const uint32_t b = m.survivor[i][column], bin = m.survivor[SURVIVORS + i][column];
            const uint32_t lower = m.bins.below(int(bin), column);
            exact &= m.bins.below(int(bin) + 1, column) - 1 == lower;
            rank[half] = float(lower);
            mine[half] = settled ? packed(0, b) : standing(s, rank[half], b);
        }
        if (settled || __all_sync(0xFFFFFFFFu, exact)) {
            settle(s, own, int(n), mine, rank);
            continue;
        }
        for (uint32_t i = lane; i < n; i += 32) {
            const uint32_t b = m.survivor[i][column];
            const int64_t at = (int64_t(blockIdx.x) * SURVIVORS + i) * COLUMNS + column;
            s.survivor[at] = int32_t(b);
            s.key[at] = key_of(s, b, own);
            s.below[at] = int32_t(m.bins.below(int(m.survivor[SURVIVORS + i][column]), column));
        }
        if (lane > 0) continue;
        s.survivors[own] = int32_t(n);
        s.limits[own] = {m.low[0][column], m.scale[0][column]};
        if (atomicAdd(&m.opened[0][0], 1u) == 0) s.stripes[atomicAdd(&s.open->stripes, 1)] = int32_t(blockIdx.x);
    }
}

// A block takes 32 columns, a lane each, so that it reads whole cache lines and no two lanes share a bank. AHEAD
// samples of a warp are on their way at a time, VISITS where it visits: beyond the end it reads one of them again, for
// a branch would wait for each. At most ROUND samples are visited between two looks at the threshold.
template <int BINS, bool NARROW, int AHEAD, int WARPS, int ROUND>
__global__ void __launch_bounds__(WARPS * 32, 32 / WARPS) selection_kernel(const Selection s) {
    SHARED(memory);
    static_assert(2 * SURVIVORS <= ROUND && WARPS <= ROUND && BINS % (2 * WARPS) == 0, "");
    const SelectionMemory<BINS, NARROW, WARPS> m(memory, s.r);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t B = s.B, d = least(int64_t(blockIdx.x) * COLUMNS + lane, s.D - 1);  // beyond: the last column again
    const Column column = {bias_of(s, d), s.activation + d * s.stride_d, s.x_inverse_norm};

    // Where keys lie, from some of them: a map of keys to bins need be monotone, not tight.
    float smallest = INFINITY, largest = -INFINITY;
    limits_of_keys<AHEAD, WARPS>(s, column, smallest, largest);
    m.part[warp][lane] = smallest;
    m.list[warp][lane] = largest;
    for (int i = warp; i <= Histogram<BINS, NARROW>::WORDS; i += WARPS) m.bins.word[i][lane] = 0;
    __syncthreads();
    if (warp == 0) begin(s, m, smallest, largest);
    __syncthreads();
    const Bins bin_of = {{m.low[0][lane], m.scale[0][lane]}, BINS - 1};
    count_keys<AHEAD>(s, m, column, bin_of);
    __syncthreads();
    sum_counts(m);
    __syncthreads();

    // Calls look(sample, need, key) for the samples of this warp among the places from `from` to `to`; not for NaN.
    auto visit = [&](const Visit (&there)[VISITS], int64_t from, int64_t to, auto look) {
        float value[VISITS], scaled[VISITS];
#pragma unroll
        for (int i = 0; i < VISITS; i++) {
            value[i] = column.value[there[i].sample * s.stride_b];
            scaled[i] = column.norm[there[i].sample];
        }
#pragma unroll
        for (int i = 0; i < VISITS; i++) {
            const float key = (value[i] - column.bias) * scaled[i];
            if (from + warp + i * WARPS < to && key == key) look(there[i].sample, there[i].need, key);
        }
    };
    // T, the r-th best lower bound of those visited; first few samples, for T rises fast.
    const Open open = *s.open;
    int64_t visited = 0;
    while (open.bounded && visited < B) {
        const int64_t end = least(B, visited + (visited == 0 ? WARPS : least(visited, ROUND)));
        const float reach = most_need(open, s.visits[visited].need) * float(B - 1);
        if (__all_sync(0xFFFFFFFFu, reach < m.threshold[0][lane])) break;
        for (; visited < end; visited += WARPS * VISITS) {
            Visit there[VISITS];
            fetch<WARPS>(s, there, visited, end);
            visit(there, visited, end, [&](uint32_t, float need, float key) {
                const float sure = float(m.bins.below(bin_of(key), lane)) * need;
                if (sure > m.threshold[0][lane]) m.list[atomicAdd(&m.found[0][lane], 1u)][lane] = sure;
            });
        }
        visited = end;
        __syncthreads();
        if (warp == 0) merge_list(s, m);
        __syncthreads();
    }
    for (int64_t first = 0; first < visited; first += WARPS * VISITS) {
        Visit there[VISITS];
        fetch<WARPS>(s, there, first, visited);
        visit(there, first, visited, [&](uint32_t b, float need, float key) {
            const int bin = bin_of(key);
            if (!(float(m.bins.below(bin + 1, lane) - 1) * need >= m.threshold[0][lane])) return;
            const uint32_t at = atomicAdd(&m.found[0][lane], 1u);
            if (at >= SURVIVORS) return;
            m.survivor[at][lane] = b;
            m.survivor[SURVIVORS + at][lane] = uint32_t(bin);
        });
    }
    __syncthreads();
    settle_or_leave(s, m, open);
}

}  // namespace bcl
