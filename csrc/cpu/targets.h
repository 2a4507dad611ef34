// Targets and pull (steps 9a, 10 and 13).
#pragma once
#include <cstring>

#include "parallel.h"
#include "simd.h"

namespace bcl {
namespace {

// One stretch of U vectors of a feature's target, kept in registers over its list; sums of 256 keep their digits.
template <class Real, int U>
INLINE void stretch(const Targets<Real>& t, int64_t d, int64_t n, const int32_t* samples, const Real* shares,
                    int64_t count) {
    typedef Simd<Real> S;
    constexpr int L = S::L;
    typename S::V sum[U];
    for (int u = 0; u < U; u++) sum[u] = S::all(0);
    for (int64_t from = 0; from < count; from += 256) {
        const int64_t to = from + 256 < count ? from + 256 : count;
        typename S::V part[U];
        for (int u = 0; u < U; u++) part[u] = S::all(0);
        for (int64_t q = from; q < to; q++) {
            const Real* x = t.x + samples[q] * t.x_stride + n;
            const Real share = shares[q];
#pragma GCC unroll 8
            for (int u = 0; u < U; u++) part[u] += share * S::load(x + u * L);
        }
        for (int u = 0; u < U; u++) sum[u] += part[u];
    }
    for (int u = 0; u < U; u++) {
        const int64_t at = d * t.N + n + u * L;
        if (t.weight) {
            typename S::V effective_weight = S::load(t.weight + at);
            if (t.offset) effective_weight += S::load(t.offset + at);
            const typename S::V increment = t.som_strength[d] * (sum[u] - effective_weight);
            sum[u] = S::load(t.destination + at) + Real(t.som_lr) * increment;
        }
        S::store(t.destination + at, sum[u]);
    }
}

// The same for one element.
template <class Real>
INLINE void element(const Targets<Real>& t, int64_t d, int64_t n, const int32_t* samples, const Real* shares,
                    int64_t count) {
    Real sum = 0;
    for (int64_t from = 0; from < count; from += 256) {
        const int64_t to = from + 256 < count ? from + 256 : count;
        Real part = 0;
        for (int64_t q = from; q < to; q++) part += shares[q] * t.x[samples[q] * t.x_stride + n];
        sum += part;
    }
    const int64_t at = d * t.N + n;
    if (t.weight) {
        const Real effective_weight = t.offset ? t.weight[at] + t.offset[at] : t.weight[at];
        const Real increment = t.som_strength[d] * (sum - effective_weight);
        sum = t.destination[at] + Real(t.som_lr) * increment;
    }
    t.destination[at] = sum;
}

// Every feature's samples and what each weighs, which lie at start[d] up to start[d + 1]: its winner pairs in the order
// of the batch, up to end[d], then its rescue rows.
template <class Real>
struct Lists {
    Buffer<int64_t> start, end;
    Buffer<int32_t> samples;
    Buffer<Real> shares;

    explicit Lists(const Targets<Real>& t)
        : start(t.D + 1), end(t.D), samples(t.B * t.k + t.D * t.r), shares(t.B * t.k + t.D * t.r) {}
    bool exist() const { return start.data && end.data && samples.data && shares.data; }

    // Winner pairs, not weighed yet, and room for the rescue rows.
    void fill_pairs(const Targets<Real>& t) {
        memset(end.data, 0, t.D * sizeof(int64_t));
        for (int64_t i = 0; i < t.B * t.k; i++) end.data[t.pair_feature[i]]++;
        start.data[0] = 0;
        for (int64_t d = 0; d < t.D; d++) start.data[d + 1] = start.data[d] + end.data[d] + t.r;
        memcpy(end.data, start.data, t.D * sizeof(int64_t));
        for (int64_t b = 0; b < t.B; b++)
            for (int64_t j = 0; j < t.k; j++) {
                const int64_t at = end.data[t.pair_feature[b * t.k + j]]++;
                samples.data[at] = int32_t(b);
                shares.data[at] = t.pair_pull[b * t.k + j];
            }
    }

    // Of feature d: winner pairs weigh u / their sum, rescue rows 1 - u.
    void weigh(const Targets<Real>& t, int64_t d) {
        const int64_t first = start.data[d], pairs = end.data[d];
        double sum = 0;
        for (int64_t q = first; q < pairs; q++) sum += shares.data[q];
        const Real u = t.winner_share[d], each = u / Real(sum + EPS);
        for (int64_t q = first; q < pairs; q++) shares.data[q] *= each;
        for (int64_t i = 0; i < t.r; i++) {
            samples.data[pairs + i] = int32_t(t.rescue_rows[d * t.r + i]);
            shares.data[pairs + i] = (1 - u) * t.rescue_weight[d * t.r + i];
        }
    }
};

// Features [first, last), stretch by stretch for all of them: the same few columns of x then stay in the first cache.
template <class Real>
KERNEL void target_rows(const Targets<Real>& t, const Lists<Real>& lists, int64_t first, int64_t last) {
    constexpr int L = Simd<Real>::L, U = 8;
    const int64_t* start = lists.start.data;
    const int32_t* samples = lists.samples.data;
    const Real* shares = lists.shares.data;
    int64_t n = 0;
    for (; n + U * L <= t.N; n += U * L)
        for (int64_t d = first; d < last; d++)
            stretch<Real, U>(t, d, n, samples + start[d], shares + start[d], start[d + 1] - start[d]);
    for (; n + L <= t.N; n += L)
        for (int64_t d = first; d < last; d++)
            stretch<Real, 1>(t, d, n, samples + start[d], shares + start[d], start[d + 1] - start[d]);
    for (; n < t.N; n++)
        for (int64_t d = first; d < last; d++)
            element(t, d, n, samples + start[d], shares + start[d], start[d + 1] - start[d]);
}

template <class Real>
int targets(const Targets<Real>& t, int threads) {
    const int64_t B = t.B, D = t.D, k = t.k, r = t.r;
    if (!countable(B) || D < 0 || k < 0 || r < 0 || t.N < 0) return BAD_SIZE;
    bool outside = false;
    for (int64_t i = 0; i < D * r; i++) outside |= uint64_t(t.rescue_rows[i]) >= uint64_t(B);
    if (outside) return BAD_RESCUE_ROW;
    for (int64_t i = 0; i < B * k; i++) outside |= uint64_t(t.pair_feature[i]) >= uint64_t(D);
    if (outside) return BAD_PAIR_FEATURE;
    Lists<Real> lists(t);
    if (!lists.exist()) return NO_MEMORY;
    lists.fill_pairs(t);
    const int64_t chunk = 64, chunks = (D + chunk - 1) / chunk;  // of features: they share the stretches of x in cache
    parallel(threads, 0.03 * (B * k + D * r) * t.N, chunks, 0, [&](int64_t i, char*) {
        const int64_t first = i * chunk, last = first + chunk < D ? first + chunk : D;
        for (int64_t d = first; d < last; d++) lists.weigh(t, d);
        target_rows(t, lists, first, last);
    });
    return DONE;
}

}  // namespace
}  // namespace bcl
