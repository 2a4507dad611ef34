// Neighbors (step 1): the most similar others of each feature, from tiles of similarities.
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

// The list of a feature: the k most similar others so far, the more similar first, then the smaller index.
template <class Real>
struct Nearest {
    Real* similarity;  // [k]
    int64_t* feature;  // [k]
    int64_t k;

    // Whatever order others come in, the list is the same.
    INLINE void offer(Real value, int64_t other) {
        value = known(value);
        auto beats = [&](int64_t i) {
            return value > similarity[i] || (value == similarity[i] && other < feature[i]);
        };
        int64_t at = k - 1;
        if (!beats(at)) return;
        for (; at > 0 && beats(at - 1); at--) {
            similarity[at] = similarity[at - 1];
            feature[at] = feature[at - 1];
        }
        similarity[at] = value;
        feature[at] = other;
    }
};

// Row r of the tile goes to the list of its feature.
template <class Real>
KERNEL void search_row(const Neighbors<Real>& s, int64_t r) {
    typedef Simd<Real> S;
    constexpr int L = S::L;
    const Real* row = s.similarity + r * s.stride;
    Nearest<Real> list = {s.row_best + r * s.k, s.row_near + r * s.k, s.k};
    const int64_t own = s.first_row + r - s.first_column;  // the column that is the feature itself, if it is here
    auto offer = [&](int64_t j) { if (j != own) list.offer(row[j], s.first_column + j); };
    int64_t j = 0;
    for (; j + L <= s.columns; j += L)
        if (S::any(!(S::load(row + j) < list.similarity[s.k - 1])))  // NaN too: it may count for more than -2 does
            for (int i = 0; i < L; i++) offer(j + i);
    for (; j < s.columns; j++) offer(j);
}

constexpr int64_t COLUMNS = 64;  // so many at a time: 4 vectors of the widest kind

// Columns [first, last) of the tile, at most COLUMNS, go to the lists of theirs.
template <class Real>
KERNEL void search_columns(const Neighbors<Real>& s, int64_t first, int64_t last) {
    typedef Simd<Real> S;
    constexpr int L = S::L;
    Real worst[COLUMNS];  // in each list
    for (int64_t j = first; j < last; j++) worst[j - first] = s.column_best[j * s.k + s.k - 1];
    for (int64_t r = 0; r < s.rows; r++) {
        const Real* row = s.similarity + r * s.stride + first;
        auto offer = [&](int64_t j) {
            const int64_t column = first + j;
            Nearest<Real> list = {s.column_best + column * s.k, s.column_near + column * s.k, s.k};
            list.offer(row[j], s.first_row + r);
            worst[j] = list.similarity[s.k - 1];
        };
        int64_t j = 0;
        for (; first + j + L <= last; j += L)
            if (S::any(!(S::load(row + j) < S::load(worst + j))))
                for (int i = 0; i < L; i++) offer(j + i);
        for (; first + j < last; j++) offer(j);
    }
}

template <class Real>
int neighbors(const Neighbors<Real>& s, int threads) {
    if (s.k < 0 || s.rows < 0 || s.columns < 0) return BAD_SIZE;
    if (s.k == 0) return DONE;
    const double work = 1.0 * s.rows * s.columns;
    const int64_t chunks = s.column_near ? (s.columns + COLUMNS - 1) / COLUMNS : 0;
    parallel(threads, work, s.rows, 0, [&](int64_t r, char*) { search_row(s, r); });
    parallel(threads, work, chunks, 0, [&](int64_t i, char*) {
        const int64_t first = i * COLUMNS;
        search_columns(s, first, first + COLUMNS < s.columns ? first + COLUMNS : s.columns);
    });
    return DONE;
}

}  // namespace
}  // namespace bcl
