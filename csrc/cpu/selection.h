// Selection (step 9b): the samples that rescue each feature, and their shares.
#pragma once
#include <cstring>

#include "sort.h"

namespace bcl {
namespace {

constexpr int64_t FEW = 32;        // up to so many samples are kept in order by insertion
constexpr int64_t SURVIVORS = 96;  // up to so many ranks are counted; beyond, sorting the column is cheaper
constexpr int64_t MAX_BINS = 1024;

// The samples by falling need, where bounds of ranks bound scores: every need is finite and not negative.
template <class Real>
struct ByNeed {
    const int32_t* sample;    // [B]
    const Real *need, *norm;  // [B] their needs and x_inverse_norm
};

// Memory of one tile of L columns, and of one column.
template <class Real>
struct Column {
    Real* tile;                  // [L, padded B] keys, column by column
    Real *score, *rank, *batch;  // [B]; batch: keys in the order of the batch
    SortMemory<Real> sort;
    int32_t* bin;                // [padded B]
    int32_t* count;              // [4 * MAX_BINS]
    Real *lower, *upper;         // [MAX_BINS]

    Column(char* memory, int64_t B)
        : tile(take<Real>(memory, Simd<Real>::L * padded(B))),
          score(take<Real>(memory, padded(B))),
          rank(take<Real>(memory, padded(B))),
          batch(take<Real>(memory, padded(B))),
          sort(memory, B),
          bin(take<int32_t>(memory, padded(B))),
          count(take<int32_t>(memory, 4 * MAX_BINS)),
          lower(take<Real>(memory, MAX_BINS)),
          upper(take<Real>(memory, MAX_BINS)) {}

    static int64_t bytes(int64_t B) {
        return ((Simd<Real>::L + 3) * padded(B) + 2 * MAX_BINS) * int64_t(sizeof(Real)) + SortMemory<Real>::bytes(B) +
               (padded(B) + 4 * MAX_BINS) * 4;
    }
};

// The r best of n scores, larger first, then smaller index -> rows. NaN counts as -inf.
template <class Real>
void best_scores(Real* score, int64_t n, int64_t r, int64_t* rows, Column<Real>& column) {
    typedef Simd<Real> S;
    constexpr int L = S::L;
    if (r <= FEW) {
        Real kept[FEW];
        int64_t have = 0;
        const Real least = -__builtin_inff();
        int64_t b = 0;
        for (; b < n && have < r; b++) insert(score[b] != score[b] ? least : score[b], b, r, have, kept, rows);
        for (; b + L <= n; b += L)
            if (S::any(S::load(score + b) > kept[r - 1]))
                for (int i = 0; i < L; i++)
                    if (score[b + i] > kept[r - 1]) insert(score[b + i], b + i, r, have, kept, rows);
        for (; b < n; b++)
            if (score[b] > kept[r - 1]) insert(score[b], b, r, have, kept, rows);
        return;
    }
    for (int64_t b = 0; b < n; b++) {
        column.sort.key[0][b] = score[b] != score[b] ? ~ordered<Real>(-__builtin_inff()) : ~ordered(score[b]);
        column.sort.sample[0][b] = int32_t(b);
    }
    const int at = radix_sort(column.sort.key, column.sort.sample, n);
    for (int64_t i = 0; i < r; i++) rows[i] = column.sort.sample[at][i];
}

// Ranks by one sort: key [B] in the order of the batch -> score[b] = rank, as a number.
template <class Real>
void sorted_ranks(const Real* key, int64_t B, Real* rank, Column<Real>& column) {
    for (int64_t b = 0; b < B; b++) {
        column.sort.key[0][b] = ordered(key[b]);
        column.sort.sample[0][b] = int32_t(b);
    }
    const int at = radix_sort(column.sort.key, column.sort.sample, B);
    for (int64_t i = 0; i < B; i++) rank[column.sort.sample[at][i]] = Real(i);
}

// rank * need, by one sort: right for any keys and needs. key [B] in the order of the batch.
template <class Real>
void select_sorted(const Selection<Real>& s, const Real* key, int64_t* rows, Real* affinity, Column<Real>& column) {
    sorted_ranks(key, s.B, column.rank, column);
    for (int64_t b = 0; b < s.B; b++) {
        const Real value = s.need ? column.rank[b] * s.need[b] : column.rank[b];
        column.score[b] = key[b] != key[b] ? Real(-__builtin_inff()) : value;
    }
    best_scores(column.score, s.B, s.r, rows, column);
    if (affinity)
        for (int64_t i = 0; i < s.r; i++) affinity[i] = column.rank[rows[i]];
}

// The rank of sample b, whose key is `value`, by counting: key and order [B] by falling need.
template <class Real>
INLINE Real counted_rank(const Real* key, const int32_t* order, int64_t B, Real value, int32_t b) {
    int32_t below = 0;
    for (int64_t p = 0; p < B; p++) below += (key[p] < value) | ((key[p] == value) & (order[p] < b));
    return Real(below);
}

// The bin [B] of every key [B] of a column, one of H; monotone in the key, roundings included. False where keys defeat
// bins of equal width.
template <class Real>
INLINE bool bin_keys(const Real* key, int64_t B, int64_t H, int32_t* bin) {
    typedef Simd<Real> S;
    constexpr int L = S::L;
    typename S::V low = S::all(key[0]), high = low;
    typename S::I unknown = S::all_int(0);
    for (int64_t p = 0; p + L <= B; p += L) {
        const typename S::V v = S::load(key + p);
        low = v < low ? v : low;
        high = v > high ? v : high;
        unknown |= v != v;
    }
    Real least = low[0], most = high[0];
    bool nan = S::any(unknown);
    for (int i = 1; i < L; i++) {
        least = low[i] < least ? low[i] : least;
        most = high[i] > most ? high[i] : most;
    }
    for (int64_t p = B / L * L; p < B; p++) {
        least = key[p] < least ? key[p] : least;
        most = key[p] > most ? key[p] : most;
        nan |= key[p] != key[p];
    }
    const Real scale = Real(H) / (most - least) * Real(0.99999), limit = Real(3e38);
    if (nan || !(scale > 0 && scale < limit && most - least < limit)) return false;
    for (int64_t p = 0; p < B; p++) {
        Real f = (key[p] - least) * scale;
        f = f < Real(H - 1) ? f : Real(H - 1);
        bin[p] = int32_t(f);
    }
    return true;
}

// The lowest and highest rank of the keys in each of H bins.
template <class Real>
INLINE void bound_ranks(const int32_t* bin, int64_t B, int64_t H, int32_t* count, Real* lower, Real* upper) {
    const int64_t copies = B >= 512 ? 4 : 1;  // of the histogram: equal neighbors do not wait for each other
    for (int64_t h = 0; h < copies * H; h++) count[h] = 0;
    int64_t p = 0;
    if (copies == 4)
        for (; p + 4 <= B; p += 4)
            for (int i = 0; i < 4; i++) count[i * H + bin[p + i]]++;
    for (; p < B; p++) count[bin[p]]++;
    if (copies == 4)
        for (int64_t h = 0; h < H; h++) count[h] += count[H + h] + count[2 * H + h] + count[3 * H + h];
    for (int64_t h = 0, sum = 0; h < H; h++) {
        lower[h] = Real(sum);
        sum += count[h];
        upper[h] = Real(sum - (count[h] > 0));
    }
}

// Which samples' scores may be among the r best -> how many, and their places in the order of `need` [B], which falls.
template <class Real>
INLINE int64_t survivors_of(const Real* need, int64_t B, int64_t r, const Column<Real>& column, int32_t* survivor) {
    typedef Simd<Real> S;
    constexpr int L = S::L;
    const int32_t* bin = column.bin;
    const Real *lower = column.lower, *upper = column.upper, top = Real(B - 1);
    Real bound[FEW], T = -1;  // the r best lower bounds, falling; bounds of true scores are >= 0
    for (int64_t i = 0; i < r; i++) bound[i] = -1;
    int64_t survivors = 0;
    for (int64_t p = 0; p < B && !(need[p] * top < T); p += L) {
        const int here = int(B - p < L ? B - p : L);
        Real reach[L];
        for (int i = 0; i < L; i++) reach[i] = i < here ? upper[bin[p + i]] * need[p + i] : Real(-2);
        if (!S::any(S::load(reach) >= T)) continue;
        for (int i = 0; i < here; i++) {
            if (!(reach[i] >= T)) continue;
            survivor[survivors++] = int32_t(p + i);
            const Real sure = lower[bin[p + i]] * need[p + i];
            if (sure > T) {
                int64_t at = r - 1;
                for (; at > 0 && bound[at - 1] < sure; at--) bound[at] = bound[at - 1];
                bound[at] = sure;
                T = bound[r - 1];
            }
        }
    }
    int64_t kept = 0;
    for (int64_t i = 0; i < survivors; i++)
        if (upper[bin[survivor[i]]] * need[survivor[i]] >= T) survivor[kept++] = survivor[i];
    return kept;
}

// rank * need without a sort: a histogram of the keys bounds every rank, hence every score, by the same rounded product
// as the score itself. Samples come by falling need until need cannot beat T, the r-th best lower bound so far; those
// whose upper bound reaches T survive. If just r do, no rank is needed. key [B] by falling need, one column.
// False where too many survive, or keys defeat the histogram: then nothing was chosen.
template <class Real>
bool select_bounded(const Selection<Real>& s, const ByNeed<Real>& by_need, const Real* key, int64_t* rows,
                    Real* affinity, Column<Real>& column) {
    const int64_t B = s.B, r = s.r, quarter = B / 4 < 64 ? 64 : B / 4 > MAX_BINS ? MAX_BINS : B / 4;
    const int64_t H = quarter / 16 * 16;
    if (!bin_keys(key, B, H, column.bin)) return false;
    bound_ranks(column.bin, B, H, column.count, column.lower, column.upper);
    int32_t* survivor = column.sort.sample[0];
    const int64_t kept = survivors_of(by_need.need, B, r, column, survivor);
    if (kept > SURVIVORS && kept > r) return false;

    const int32_t* sample = by_need.sample;
    Real *rank = column.rank, *score = column.score;
    if (kept > r || affinity)
        for (int64_t i = 0; i < kept; i++) {
            const int32_t p = survivor[i];
            const int64_t h = column.bin[p];
            rank[i] = column.lower[h] == column.upper[h] ? column.lower[h]
                                                         : counted_rank(key, sample, B, key[p], sample[p]);
            score[i] = rank[i] * by_need.need[p];
        }
    for (int64_t o = 0; o < r; o++) {
        int64_t best = o;
        if (kept > r)
            for (int64_t i = o + 1; i < kept; i++)
                if (score[i] > score[best] || (score[i] == score[best] && sample[survivor[i]] < sample[survivor[best]]))
                    best = i;
        rows[o] = sample[survivor[best]];
        if (affinity) affinity[o] = rank[best];
        survivor[best] = survivor[o];
        rank[best] = rank[o];
        score[best] = score[o];
    }
    return true;
}

// The cosine rules: the score is the affinity times the need. key [B] in the order of the batch, one column.
template <class Real>
void select_cosine(const Selection<Real>& s, const Real* key, Real winv, int64_t* rows, Real* affinity,
                   Column<Real>& column) {
    const bool clamp = s.rule == CLAMPED_COSINE;
    auto cosine = [&](int64_t b) {
        const Real value = key[b] * winv;
        return clamp && value < 0 ? Real(0) : value;
    };
    Real* score = column.score;
    if (s.need)
        for (int64_t b = 0; b < s.B; b++) score[b] = cosine(b) * s.need[b];
    else
        for (int64_t b = 0; b < s.B; b++) score[b] = cosine(b);
    best_scores(score, s.B, s.r, rows, column);
    if (affinity)
        for (int64_t i = 0; i < s.r; i++) affinity[i] = cosine(rows[i]);
}

// Features [first, last), L columns at a time: their keys are formed once, column by column. by_need: null where no
// bounds apply.
template <class Real>
KERNEL void select_columns(const Selection<Real>& s, const ByNeed<Real>* by_need, int64_t first, int64_t last,
                           char* scratch) {
    typedef Simd<Real> S;
    constexpr int L = S::L;
    const int64_t B = s.B, P = padded(B);
    Column<Real> column(scratch, B);
    const int32_t* order = by_need ? by_need->sample : nullptr;
    const Real* norm = by_need ? by_need->norm : s.x_inverse_norm;
    for (int64_t d = first; d < last; d += L) {
        const int features = int(last - d < L ? last - d : L);
        auto row_of = [&](int64_t p) { return s.activation + (order ? order[p] : p) * s.stride + d; };
        int64_t p = 0;
        if (features == L) {
            const typename S::V bias = s.bias ? S::load(s.bias + d) : S::all(0);
            for (; p + L <= B; p += L) {
                typename S::V v[L];
                for (int i = 0; i < L; i++) v[i] = (S::load(row_of(p + i)) - bias) * norm[p + i];
                S::transpose(v);
                for (int i = 0; i < L; i++) S::store(column.tile + i * P + p, v[i]);
            }
        }
        for (; p < B; p++)
            for (int i = 0; i < features; i++) {
                const Real value = row_of(p)[i];
                column.tile[i * P + p] = (s.bias ? value - s.bias[d + i] : value) * norm[p];
            }
        for (int i = 0; i < features; i++) {
            const Real* key = column.tile + i * P;
            int64_t* rows = s.rows + (d + i) * s.r;
            Real* affinity = s.soft ? s.shares + (d + i) * s.r : nullptr;
            if (s.rule != RANK) {
                select_cosine(s, key, s.weight_inverse_norm[d + i], rows, affinity, column);
            } else if (!by_need) {
                select_sorted(s, key, rows, affinity, column);
            } else if (!select_bounded(s, *by_need, key, rows, affinity, column)) {
                for (int64_t q = 0; q < B; q++) column.batch[order[q]] = key[q];
                select_sorted(s, column.batch, rows, affinity, column);
            }
        }
    }
}

// Samples by falling need, equal ones in order: a stable radix sort, the same for all columns.
template <class Real>
void order_by_need(const Real* need, int64_t B, int32_t* order, int32_t* spare) {
    typedef typename Bits<Real>::Unsigned U;
    for (int64_t b = 0; b < B; b++) order[b] = int32_t(b);
    int32_t *from = order, *to = spare;
    for (unsigned shift = 0; shift < sizeof(Real) * 8; shift += 8) {
        int64_t start[256] = {0};
        auto digit = [&](int64_t b) {
            U bits;
            memcpy(&bits, need + b, sizeof bits);  // numbers that are not negative order like their bits
            return ~bits >> shift & 255;
        };
        for (int64_t b = 0; b < B; b++) start[digit(b)]++;
        int64_t sum = 0;
        bool one = false;
        for (int h = 0; h < 256; h++) {
            const int64_t count = start[h];
            one |= count == B;
            start[h] = sum;
            sum += count;
        }
        if (one) continue;
        for (int64_t i = 0; i < B; i++) to[start[digit(from[i])]++] = from[i];
        int32_t* other = from;
        from = to;
        to = other;
    }
    if (from != order) memcpy(order, from, B * sizeof *order);
}

// Whether every need [B] is finite and not negative.
template <class Real>
bool bounds_scores(const Real* need, int64_t B) {
    Real sum = 0;
    bool bounded = true;
    for (int64_t b = 0; b < B; b++) {
        sum += need[b] - need[b];  // 0, or NaN where a need is not finite
        bounded &= need[b] >= 0;
    }
    return bounded && sum == 0;
}

// The chosen samples of feature d weigh alike, or by affinity * need, where shares hold their affinities: cosines, or
// ranks, not divided by B - 1.
template <class Real>
void share(const Selection<Real>& s, int64_t d) {
    Real* shares = s.shares + d * s.r;
    const int64_t* rows = s.rows + d * s.r;
    if (!s.soft) {
        for (int64_t i = 0; i < s.r; i++) shares[i] = Real(1) / Real(s.r);
        return;
    }
    for (int64_t i = 0; i < s.r; i++) {
        Real value = shares[i];
        if (s.rule == RANK) value = s.B > 1 ? value / Real(s.B - 1) : Real(1);
        if (s.need) value *= s.need[rows[i]];
        shares[i] = value < 0 ? Real(0) : value;
    }
    double sum = 0;
    for (int64_t i = 0; i < s.r; i++) sum += shares[i];
    for (int64_t i = 0; i < s.r; i++) shares[i] /= Real(sum + EPS);
}

template <class Real>
int selection(const Selection<Real>& s, int threads) {
    const int64_t B = s.B, P = padded(B);
    if (!countable(B) || s.D < 0 || s.r < 0 || s.r > B) return BAD_SIZE;
    if (s.r == 0) return DONE;
    Buffer<int32_t> order(2 * P);
    Buffer<Real> sorted(3 * P);
    if (!order.data || !sorted.data) return NO_MEMORY;
    Real *need = sorted.data, *norm = need + P, *flat = norm + P;
    const bool bounded = s.rule == RANK && s.r <= FEW && (!s.need || bounds_scores(s.need, B));
    if (bounded) {
        for (int64_t b = 0; b < B; b++) flat[b] = s.need ? s.need[b] + Real(0) : Real(1);  // -0 would sort below all
        order_by_need(flat, B, order.data, order.data + P);
        for (int64_t p = 0; p < B; p++) {
            need[p] = flat[order.data[p]];
            norm[p] = s.x_inverse_norm[order.data[p]];
        }
    }
    const ByNeed<Real> by_need = {order.data, need, norm};
    constexpr int64_t L = Simd<Real>::L;
    const int64_t tiles = (s.D + L - 1) / L, bytes = Column<Real>::bytes(B);
    const bool done = parallel(threads, B * s.D, tiles, bytes, [&](int64_t i, char* scratch) {
        const int64_t first = i * L, last = first + L < s.D ? first + L : s.D;
        select_columns(s, bounded ? &by_need : nullptr, first, last, scratch);
        for (int64_t d = first; d < last; d++) share(s, d);
    });
    return done ? DONE : NO_MEMORY;
}

}  // namespace
}  // namespace bcl
