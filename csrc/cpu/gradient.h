// Gradient (step 12): the masked gradient and its sum over samples.
#pragma once
#include <cstring>

#include "parallel.h"
#include "simd.h"

namespace bcl {
namespace {

// Rows [first, last) of the batch; adds their sum to sums [D]. partial: memory for D values.
template <class Real>
KERNEL void mask_rows(const Gradient<Real>& s, int64_t first, int64_t last, Real* partial, double* sums) {
    typedef Simd<Real> S;
    constexpr int L = S::L;
    const int64_t D = s.D;
    for (int64_t from = first; from < last; from += 256) {  // short sums keep their digits
        for (int64_t d = 0; d < D; d++) partial[d] = 0;
        for (int64_t b = from; b < last && b < from + 256; b++) {
            const Real *g = s.gradient + b * s.stride, *m = s.mask + b * D;
            Real* out = s.masked + b * D;
            int64_t d = 0;
            for (; d + L <= D; d += L) {
                const typename S::V v = S::load(g + d) * S::load(m + d);
                S::store(out + d, v);
                S::store(partial + d, S::load(partial + d) + v);
            }
            for (; d < D; d++) partial[d] += out[d] = g[d] * m[d];
        }
        for (int64_t d = 0; d < D; d++) sums[d] += partial[d];
    }
}

template <class Real>
int gradient(const Gradient<Real>& s, int threads) {
    const int64_t D = s.D;
    const Blocks blocks(s.B);
    Buffer<double> sums(blocks.count * D);
    if (!sums.data) return NO_MEMORY;
    memset(sums.data, 0, blocks.count * D * sizeof(double));
    const int64_t bytes = padded(D) * sizeof(Real);
    const bool done = parallel(threads, 0.5 * s.B * D, blocks.count, bytes, [&](int64_t i, char* scratch) {
        mask_rows(s, blocks.first(i), blocks.last(i), (Real*)scratch, sums.data + i * D);
    });
    if (!done) return NO_MEMORY;
    for (int64_t d = 0; d < D; d++) {
        double total = 0;
        for (int64_t i = 0; i < blocks.count; i++) total += sums.data[i * D + d];
        s.sum[d] = Real(total);
    }
    return DONE;
}

}  // namespace
}  // namespace bcl
