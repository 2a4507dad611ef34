// Sorting one column: integers in the order of its numbers, and a stable sort of them.
#pragma once
#include "parallel.h"
#include "simd.h"

namespace bcl {
namespace {

// Unsigned integers in the order of the numbers: -0 equals +0, NaN last.
template <class Real>
INLINE typename Bits<Real>::Unsigned ordered(Real x) {
    typedef typename Bits<Real>::Unsigned U;
    if (x != x) return ~U(0);
    x += Real(0);
    U u;
    __builtin_memcpy(&u, &x, sizeof u);
    const U sign = U(1) << (sizeof(U) * 8 - 1);
    return u & sign ? ~u : u | sign;
}

// Puts a value and its index among the best `most` so far, of which there are `have`: larger first, equal ones as they
// came. Where all places are taken, the last one goes.
template <class Real>
INLINE void insert(Real value, int64_t index, int64_t most, int64_t& have, Real* kept, int64_t* indices) {
    int64_t at = have < most ? have++ : most - 1;
    for (; at > 0 && kept[at - 1] < value; at--) {
        kept[at] = kept[at - 1];
        indices[at] = indices[at - 1];
    }
    kept[at] = value;
    indices[at] = index;
}

// Stable radix sort of n keys with their samples, ascending. The result lies where the returned flag says: 0 or 1.
template <class U>
int radix_sort(U* (&key)[2], int32_t* (&sample)[2], int64_t n) {
    int at = 0;
    for (unsigned shift = 0; shift < sizeof(U) * 8; shift += 8) {
        int64_t start[256] = {0};
        for (int64_t i = 0; i < n; i++) start[key[at][i] >> shift & 255]++;
        int64_t sum = 0;
        bool one = false;  // all share this byte: nothing moves
        for (int h = 0; h < 256; h++) {
            const int64_t count = start[h];
            one |= count == n;
            start[h] = sum;
            sum += count;
        }
        if (one) continue;
        for (int64_t i = 0; i < n; i++) {
            const int64_t to = start[key[at][i] >> shift & 255]++;
            key[1 - at][to] = key[at][i];
            sample[1 - at][to] = sample[at][i];
        }
        at = 1 - at;
    }
    return at;
}

// The next n values of some memory; a multiple of LANES keeps what follows aligned.
template <class T>
T* take(char*& memory, int64_t n) {
    T* taken = (T*)memory;
    memory += n * int64_t(sizeof(T));
    return taken;
}

// What sorting one column takes: two sets of keys and samples, [B] each.
template <class Real>
struct SortMemory {
    typedef typename Bits<Real>::Unsigned U;
    U* key[2];
    int32_t* sample[2];

    SortMemory(char*& memory, int64_t B) {
        for (auto& one : key) one = take<U>(memory, padded(B));
        for (auto& one : sample) one = take<int32_t>(memory, padded(B));
    }
    static int64_t bytes(int64_t B) { return 2 * padded(B) * int64_t(sizeof(U) + 4); }
};

}  // namespace
}  // namespace bcl
