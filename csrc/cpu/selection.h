// Selection (step 9b): the samples that rescue each feature, and their shares.
#pragma once
#include <cstring>

#include "bounds.h"

namespace bcl {
namespace {

// Memory of one column.
template <class Real>
struct Column {
    Real *key, *score, *rank;  // [padded B]
    SortMemory<Real> sort;

    Column(char*& memory, int64_t B)
        : key(take<Real>(memory, padded(B))),
          score(take<Real>(memory, padded(B))),
          rank(take<Real>(memory, padded(B))),
          sort(memory, B) {}

    static int64_t bytes(int64_t B) { return 3 * padded(B) * int64_t(sizeof(Real)) + SortMemory<Real>::bytes(B); }
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

// The r best of the samples that may be among them -> rows, and their ranks -> affinity, if asked for. place [kept]:
// where they stand by falling need; key [B, L] of this feature, likewise.
template <class Real>
void select_survivors(const Selection<Real>& s, const ByNeed<Real>& by_need, const Real* key, int32_t* place,
                      int64_t kept, int64_t* rows, Real* affinity, Column<Real>& column) {
    constexpr int L = Simd<Real>::L;
    const int32_t* sample = by_need.sample;
    Real *rank = column.rank, *score = column.score;
    if (kept > s.r || affinity) {
        for (int64_t p = 0; p < s.B; p++) column.key[p] = key[p * L];
        for (int64_t i = 0; i < kept; i++) {
            const int32_t p = place[i];
            rank[i] = counted_rank(column.key, sample, s.B, column.key[p], sample[p]);
            score[i] = rank[i] * by_need.need[p];
        }
    }
    for (int64_t o = 0; o < s.r; o++) {
        int64_t best = o;
        if (kept > s.r)
            for (int64_t i = o + 1; i < kept; i++)
                if (score[i] > score[best] || (score[i] == score[best] && sample[place[i]] < sample[place[best]]))
                    best = i;
        rows[o] = sample[place[best]];
        if (affinity) affinity[o] = rank[best];
        place[best] = place[o];
        rank[best] = rank[o];
        score[best] = score[o];
    }
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

// Keys [B, L] of `features` columns from d on, samples in this order (null: that of the batch) with these norms.
template <class Real>
INLINE Extremes<Real> form_keys(const Selection<Real>& s, int64_t d, int features, const int32_t* order,
                                const Real* norm, Real* key) {
    typedef Simd<Real> S;
    constexpr int L = S::L;
    const bool whole = features == L;
    Real bias[L] = {}, values[L] = {};  // of columns that are not there: 0
    if (s.bias) memcpy(bias, s.bias + d, features * sizeof(Real));
    const typename S::V shift = S::load(bias);
    Extremes<Real> found;
    for (int64_t p = 0; p < s.B; p++) {
        const Real* row = s.activation + (order ? order[p] : p) * s.stride + d;
        if (!whole) row = (const Real*)memcpy(values, row, features * sizeof(Real));
        const typename S::V v = (S::load(row) - shift) * norm[p];
        S::store(key + p * L, v);
        found.take(v);
    }
    return found;
}

template <class Real>
int64_t selection_scratch(int64_t B) {
    return (padded(B) * int64_t(sizeof(Real)) + SURVIVORS * 4) * Simd<Real>::L + Bounds<Real>::bytes(B) +
           Column<Real>::bytes(B);
}

// L features from d on. by_need: null where no bounds apply.
template <class Real>
KERNEL void select_tile(const Selection<Real>& s, const ByNeed<Real>* by_need, int64_t d, char* memory) {
    typedef Simd<Real> S;
    constexpr int L = S::L;
    const int64_t B = s.B;
    const int features = int(s.D - d < L ? s.D - d : L);
    Real* key = take<Real>(memory, padded(B) * L);
    int32_t* survivor = take<int32_t>(memory, SURVIVORS * L);
    Bounds<Real> bounds(memory, key, B, s.r);
    Column<Real> column(memory, B);
    const int32_t* order = by_need ? by_need->sample : nullptr;
    const Extremes<Real> found = form_keys(s, d, features, order, by_need ? by_need->norm : s.x_inverse_norm, key);
    int64_t kept[L];
    if (by_need) {
        bounds.bin_keys(found);
        bounds.bound_ranks();
        typename S::V T;
        const int64_t visited = bounds.search(by_need->need, T);
        bounds.collect(by_need->need, T, visited, SURVIVORS, survivor, kept);
    }
    for (int i = 0; i < features; i++) {
        int64_t* rows = s.rows + (d + i) * s.r;
        Real* affinity = s.soft ? s.shares + (d + i) * s.r : nullptr;
        if (by_need && !bounds.open[i] && kept[i] <= SURVIVORS) {
            select_survivors(s, *by_need, key + i, survivor + i * SURVIVORS, kept[i], rows, affinity, column);
            continue;
        }
        for (int64_t p = 0; p < B; p++) column.key[order ? order[p] : p] = key[p * L + i];
        if (s.rule == RANK)
            select_sorted(s, column.key, rows, affinity, column);
        else
            select_cosine(s, column.key, s.weight_inverse_norm[d + i], rows, affinity, column);
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
    const int64_t tiles = (s.D + L - 1) / L, bytes = selection_scratch<Real>(B);
    const bool done = parallel(threads, 2.5 * B * s.D, tiles, bytes, [&](int64_t i, char* scratch) {
        const int64_t first = i * L, last = first + L < s.D ? first + L : s.D;
        select_tile(s, bounded ? &by_need : nullptr, first, scratch);
        for (int64_t d = first; d < last; d++) share(s, d);
    });
    return done ? DONE : NO_MEMORY;
}

}  // namespace
}  // namespace bcl
