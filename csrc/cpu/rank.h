// Ranks of whole columns (step 9b), for those who look at them.
#pragma once
#include "sort.h"

namespace bcl {
namespace {

// Columns [first, last).
template <class Real>
KERNEL void rank_columns(const Rank<Real>& s, int64_t first, int64_t last, char* scratch) {
    SortMemory<Real> memory(scratch, s.B);
    for (int64_t d = first; d < last; d++) {
        for (int64_t b = 0; b < s.B; b++) {
            memory.key[0][b] = ordered(s.key[b * s.stride + d]);
            memory.sample[0][b] = int32_t(b);
        }
        const int at = radix_sort(memory.key, memory.sample, s.B);
        for (int64_t i = 0; i < s.B; i++) s.rank[memory.sample[at][i] * s.D + d] = i;
    }
}

template <class Real>
int rank(const Rank<Real>& s, int threads) {
    constexpr int64_t COLUMNS = 16;  // a cache line of float32
    const int64_t tiles = (s.D + COLUMNS - 1) / COLUMNS, bytes = SortMemory<Real>::bytes(s.B);
    const bool done = parallel(threads, 20.0 * s.B * s.D, tiles, bytes, [&](int64_t i, char* scratch) {
        const int64_t first = i * COLUMNS, last = first + COLUMNS < s.D ? first + COLUMNS : s.D;
        rank_columns(s, first, last, scratch);
    });
    return done ? DONE : NO_MEMORY;
}

}  // namespace
}  // namespace bcl
