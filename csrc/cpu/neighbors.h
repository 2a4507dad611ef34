// Neighbors (step 1): the most similar others of each feature.
#pragma once
#include "sort.h"

namespace bcl {
namespace {

// NaN is less similar than any cosine, infinities are the largest numbers: as in the reference.
template <class Real>
INLINE Real known(Real x) {
    constexpr Real most = largest<Real>;
    return x != x ? Real(-2) : x > most ? most : x < -most ? -most : x;
}

// Of feature `own`, from its row of similarities [D]. kept: memory for k values.
template <class Real>
KERNEL void neighbors_of(const Real* similarity, int64_t D, int64_t own, int64_t k, int64_t* near, Real* kept) {
    typedef Simd<Real> S;
    constexpr int L = S::L;
    int64_t have = 0;
    auto offer = [&](int64_t j) {
        if (j == own) return;
        const Real value = known(similarity[j]);
        if (have == k && !(value > kept[k - 1])) return;
        insert(value, j, k, have, kept, near);
    };
    int64_t j = 0;
    for (; j < D && have < k; j++) offer(j);
    for (; j + L <= D; j += L) {
        const typename S::V v = S::load(similarity + j);
        if (S::any(!(v <= kept[k - 1])))  // NaN too: it may count for more than -2 does
            for (int i = 0; i < L; i++) offer(j + i);
    }
    for (; j < D; j++) offer(j);
}

template <class Real>
int neighbors(const Neighbors<Real>& s, int threads) {
    if (s.k < 0 || s.k >= s.D) return BAD_SIZE;
    if (s.k == 0) return DONE;
    const bool done = parallel(threads, s.rows * s.D, s.rows, s.k * sizeof(Real), [&](int64_t i, char* scratch) {
        neighbors_of(s.similarity + i * s.stride, s.D, s.first + i, s.k, s.near + i * s.k, (Real*)scratch);
    });
    return done ? DONE : NO_MEMORY;
}

}  // namespace
}  // namespace bcl
