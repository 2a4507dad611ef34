// Competition (steps 2 to 8), and of steps 9b to 11 what follows for a sample or a feature.
#pragma once
#include <cstring>

#include "inverse_norm.h"

namespace bcl {
namespace {

// The strengths of L samples, feature-major: a neighbor's are one vector. The last of `rows` samples stands in for
// those beyond.
template <class Real>
INLINE void load_strengths(const Competition<Real>& c, int64_t b, int rows, Real* strength) {
    typedef Simd<Real> S;
    constexpr int L = S::L;
    const Real* row[L];
    for (int i = 0; i < L; i++) row[i] = c.activation + (b + (i < rows ? i : rows - 1)) * c.activation_stride;
    const typename S::I magnitude = S::all_int(~(typename S::Int(1) << (sizeof(Real) * 8 - 1)));
    int64_t d = 0;
    for (; d + L <= c.D; d += L) {
        typename S::V v[L];
        for (int i = 0; i < L; i++) v[i] = (typename S::V)((typename S::I)S::load(row[i] + d) & magnitude);
        S::transpose(v);
        for (int i = 0; i < L; i++) S::store(strength + (d + i) * L, v[i]);
    }
    for (; d < c.D; d++)
        for (int i = 0; i < L; i++) strength[d * L + i] = Real(__builtin_fabs(row[i][d]));
}

template <class Real>
struct Outcome {  // of L samples
    typename Simd<Real>::V coverage;
    typename Simd<Real>::I winner;
};

// Steps 3, 4 and 8 from the strengths of L samples; their rank scores [D, L] go to `score`.
template <class Real>
INLINE Outcome<Real> compete(const Real* strength, const int32_t* neighbors, int64_t D, int64_t k, Real temperature,
                             Real* score) {
    typedef Simd<Real> S;
    constexpr int L = S::L;
    typename S::V coverage = S::all(0), part = S::all(0), best = S::all(-__builtin_inff());
    typename S::I winner = S::all_int(0);
    for (int64_t d = 0; d < D; d++) {
        const int32_t* near = neighbors + d * k;
        // Magnitudes order like their bits, NaN last.
        typename S::I rival = S::load_int(strength + int64_t(near[0]) * L);
        for (int64_t j = 1; j < k; j++) {
            typename S::I other = S::load_int(strength + int64_t(near[j]) * L);
            rival = rival > other ? rival : other;
        }
        typename S::V margin = S::load(strength + d * L) - (typename S::V)rival;
        typename S::V r = sigmoid<Real>(margin * temperature);
        S::store(score + d * L, r);
        part += r;
        if ((d & 255) == 255) { coverage += part; part = S::all(0); }  // short sums keep their digits
        // The first NaN wins, else the first of the largest: as argmax.
        typename S::I beats = (margin > best) | ((margin != margin) & (best == best));
        best = beats ? margin : best;
        winner = beats ? S::all_int(typename S::Int(d)) : winner;
    }
    return {coverage + part, winner};
}

// Step 6 where step 9a asks for it: sample b pulls the neighbors of its winner. score [D] has a stride of L.
template <class Real>
INLINE void pull_neighbors(const Competition<Real>& c, const int32_t* neighbors, int64_t b, int64_t winner,
                           const Real* score) {
    constexpr int L = Simd<Real>::L, TOGETHER = 8;  // sums side by side: none waits for its own last addition
    c.winner[b] = winner;
    const int32_t* near = neighbors + winner * c.k;
    for (int64_t from = 0; from < c.k; from += TOGETHER) {
        const int64_t count = c.k - from < TOGETHER ? c.k - from : TOGETHER;
        const int32_t* nearest[TOGETHER];
        Real claimed[TOGETHER] = {};
        for (int i = 0; i < TOGETHER; i++) nearest[i] = neighbors + near[from + (i < count ? i : 0)] * c.k;
        for (int64_t q = 0; q < c.k; q++)
#pragma GCC unroll 8
            for (int i = 0; i < TOGETHER; i++) claimed[i] += score[int64_t(nearest[i][q]) * L];
        for (int64_t i = 0; i < count; i++) {
            const int64_t f = near[from + i];
            c.pair_feature[b * c.k + from + i] = f;
            c.pair_pull[b * c.k + from + i] = score[f * L] / (1 + claimed[i]);
        }
    }
}

// Rank scores [D, L] of `rows` samples go where they belong; adds them to total [D], and their claims to novel [D].
template <class Real>
INLINE void store_scores(const Competition<Real>& c, int64_t b, int rows, const Real* score,
                         typename Simd<Real>::V claim, Real* total, Real* novel) {
    typedef Simd<Real> S;
    constexpr int L = S::L;
    const int64_t D = c.D;
    int64_t d = 0;
    for (; d + L <= D; d += L) {
        typename S::V v[L];
        for (int i = 0; i < L; i++) v[i] = S::load(score + (d + i) * L);
        S::transpose(v);
        typename S::V t = S::load(total + d), n = S::load(novel + d);
        for (int i = 0; i < rows; i++) {
            S::store(c.rank_score + (b + i) * D + d, v[i]);
            t += v[i];
            n += v[i] * claim[i];
        }
        S::store(total + d, t);
        S::store(novel + d, n);
    }
    for (; d < D; d++)
        for (int i = 0; i < rows; i++) {
            const Real r = score[d * L + i];
            c.rank_score[(b + i) * D + d] = r;
            total[d] += r;
            novel[d] += r * claim[i];
        }
}

template <class Real>
int64_t competition_scratch(int64_t D) { return (2 * D * Simd<Real>::L + 2 * padded(D)) * sizeof(Real); }

// Rows [first, last) of the batch; adds to sums [2, D]: rank_score, and rank_score / coverage.
template <class Real>
KERNEL void compete_rows(const Competition<Real>& c, const int32_t* neighbors, int64_t first, int64_t last,
                         Real* scratch, double* sums) {
    constexpr int L = Simd<Real>::L;
    const int64_t D = c.D;
    Real *strength = scratch, *score = strength + D * L, *total = score + D * L, *novel = total + padded(D);
    for (int64_t d = 0; d < D; d++) total[d] = novel[d] = 0;
    int64_t summed = 0;
    for (int64_t b = first; b < last; b += L) {
        const int rows = int(last - b < L ? last - b : L);
        load_strengths(c, b, rows, strength);
        const Outcome<Real> outcome = compete(strength, neighbors, D, c.k, Real(c.temperature), score);
        for (int i = 0; i < rows; i++) {
            c.need[b + i] = Real(1) / (outcome.coverage[i] + Real(1));
            c.x_inverse_norm[b + i] = inverse_norm_of(c.x + (b + i) * c.x_stride, c.N);
            pull_neighbors(c, neighbors, b + i, outcome.winner[i], score + i);
        }
        store_scores(c, b, rows, score, Real(1) / (outcome.coverage + Real(EPS)), total, novel);
        summed += rows;
        if (summed >= 256 || b + L >= last) {
            for (int64_t d = 0; d < D; d++) {
                sums[d] += total[d];
                sums[D + d] += novel[d];
                total[d] = novel[d] = 0;
            }
            summed = 0;
        }
    }
}

// Steps 5 and 7, and the shares and strengths of steps 10 and 11 that follow, from sums [blocks, 2, D].
template <class Real>
void per_feature(const Competition<Real>& c, const double* sums, int64_t blocks) {
    const Real rescue_onset = Real(c.rescue_onset), pull_onset = Real(c.pull_onset);
    for (int64_t d = 0; d < c.D; d++) {
        double total = 0, claimed = 0;
        for (int64_t i = 0; i < blocks; i++) {
            total += sums[i * 2 * c.D + d];
            claimed += sums[i * 2 * c.D + c.D + d];
        }
        const Real novelty = Real(claimed / (total + EPS)), rate = Real(total / double(c.B));
        c.novelty[d] = novelty;
        c.win_rate[d] = rate;
        c.winner_share[d] = rescue_onset > 0 && !(rate < rescue_onset) ? Real(1) : c.coupled ? rate * novelty : rate;
        c.som_strength[d] = pull_onset > 0 && !(rate < pull_onset) ? Real(0) : c.coupled ? Real(1) : 1 - novelty;
    }
}

// A neighbor that is no feature counts as the nearest that is: neighbors [D, k] is state that a user loads.
template <class Real>
int competition(const Competition<Real>& c, int threads) {
    const int64_t D = c.D;
    if (c.B < 0 || D < 1 || !countable(D) || c.k < 1 || c.N < 0) return BAD_SIZE;
    const Blocks blocks(c.B);
    Buffer<double> sums(blocks.count * 2 * D);
    Buffer<int32_t> neighbors(D * c.k);
    if (!sums.data || !neighbors.data) return NO_MEMORY;
    for (int64_t i = 0; i < D * c.k; i++) {
        const int64_t j = c.neighbors[i];
        neighbors.data[i] = uint64_t(j) < uint64_t(D) ? int32_t(j) : j < 0 ? 0 : int32_t(D - 1);
    }
    memset(sums.data, 0, blocks.count * 2 * D * sizeof(double));
    const int64_t bytes = competition_scratch<Real>(D);
    const double work = c.B * (1.5 * D + 0.05 * c.N);
    const bool done = parallel(threads, work, blocks.count, bytes, [&](int64_t i, char* scratch) {
        double* own = sums.data + i * 2 * D;
        compete_rows(c, neighbors.data, blocks.first(i), blocks.last(i), (Real*)scratch, own);
    });
    if (!done) return NO_MEMORY;
    per_feature(c, sums.data, blocks.count);
    return DONE;
}

}  // namespace
}  // namespace bcl
