// Inverse norms (step 9b), in the whole range of a dtype.
#pragma once
#include "parallel.h"
#include "simd.h"

namespace bcl {
namespace {

// 1 / (norm + eps) of a row whose squares, or whose norm, leave the range of Real: eps is nothing beside it.
template <class Real>
__attribute__((noinline, cold)) Real inverse_norm_of_huge(const Real* row, int64_t N) {
    const double scale = sizeof(Real) == 4 ? 1 : 0x1p-768;  // as double the squares of any float are in range
    double total = 0;
    for (int64_t n = 0; n < N; n++) total += (row[n] * scale) * (row[n] * scale);
    return Real(scale / __builtin_sqrt(total));
}

// The same for any row; sums of 4096 squares keep their digits.
template <class Real>
Real inverse_norm_of(const Real* row, int64_t N) {
    typedef Simd<Real> S;
    constexpr int L = S::L;
    double total = 0;
    for (int64_t from = 0; from < N; from += 4096) {
        const int64_t to = from + 4096 < N ? from + 4096 : N;
        typename S::V sum[4] = {S::all(0), S::all(0), S::all(0), S::all(0)};
        int64_t n = from;
        for (; n + 4 * L <= to; n += 4 * L)
            for (int u = 0; u < 4; u++) {
                const typename S::V v = S::load(row + n + u * L);
                sum[u] += v * v;
            }
        for (; n + L <= to; n += L) sum[0] += S::load(row + n) * S::load(row + n);
        const typename S::V all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        double part = 0;
        for (int i = 0; i < L; i++) part += all[i];
        for (; n < to; n++) part += double(row[n]) * row[n];
        total += part;
    }
    const Real norm = Real(__builtin_sqrt(total));
    return norm <= largest<Real> ? Real(1) / (norm + Real(EPS)) : inverse_norm_of_huge(row, N);
}

template <class Real>
int inverse_norm(const InverseNorm<Real>& s, int threads) {
    parallel(threads, 0.05 * s.R * s.N, s.R, 0, [&](int64_t i, char*) {
        s.inverse[i] = inverse_norm_of(s.rows + i * s.stride, s.N);
    });
    return DONE;
}

}  // namespace
}  // namespace bcl
