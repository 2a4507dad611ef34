// Selection by rank * need without a sort (step 9b), for L features at once: a lane of every vector is one of them.
//
// A histogram of a feature's keys bounds every rank, hence every score, by the same rounded product as the score
// itself. Samples come by falling need, until need cannot beat T, the r-th best lower bound so far; those whose upper
// bound reaches T in the end survive. If just r do, no rank is needed.
#pragma once
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

template <class Real>
struct Extremes {  // of the keys of L features
    typedef Simd<Real> S;
    typename S::V least, most;
    typename S::I unknown;  // whether a key is NaN

    INLINE Extremes()
        : least(S::all(__builtin_inff())), most(S::all(-__builtin_inff())), unknown(S::all_int(0)) {}
    INLINE void take(typename S::V key) {
        least = key < least ? key : least;
        most = key > most ? key : most;
        unknown |= key != key;
    }
};

template <class Real>
struct Bounds {
    typedef Simd<Real> S;
    typedef typename S::V V;
    typedef typename S::I I;
    typedef typename S::Int Int;
    static constexpr int L = S::L;

    int64_t B, r, H;      // H: bins, of equal width between the extremes of a feature's keys
    const Real* key;      // [B, L] by falling need
    Int* at;              // [B, L] bin * L + lane, where the bin's counts and bounds lie
    Int* count;           // [H, L] keys in each bin
    Real *lower, *upper;  // [H, L] the lowest and the highest rank in it
    int32_t* visited;     // [B] places of the samples that raised T, or might have
    I open;               // lanes whose keys defeat the bins: NaN, or extremes too close or too far

    static int64_t bins(int64_t B) {
        const int64_t quarter = B / 4 < 64 ? 64 : B / 4 > MAX_BINS ? MAX_BINS : B / 4;
        return quarter / 16 * 16;
    }
    static int64_t bytes(int64_t B) {
        return (padded(B) + bins(B)) * L * int64_t(sizeof(Int)) + 2 * bins(B) * BYTES + padded(B) * 4;
    }
    Bounds(char*& memory, const Real* key, int64_t B, int64_t r)
        : B(B), r(r), H(bins(B)), key(key),
          at(take<Int>(memory, padded(B) * L)),
          count(take<Int>(memory, H * L)),
          lower(take<Real>(memory, H * L)),
          upper(take<Real>(memory, H * L)),
          visited(take<int32_t>(memory, padded(B))) {}

    // Bins are monotone in the key, roundings included.
    INLINE void bin_keys(const Extremes<Real>& found) {
        const V least = found.least, most = found.most;
        open = found.unknown;
        const V width = most - least, scale = Real(H) / width * Real(0.99999);
        const Real limit = Real(3e38);
        open |= ~((scale > 0) & (scale < limit) & (width < limit));
        I lane;
        for (int i = 0; i < L; i++) lane[i] = Int(i);
        const V last = S::all(Real(H - 1));
        for (int64_t p = 0; p < B; p++) {
            V f = (S::load(key + p * L) - least) * scale;
            f = f < last ? f : last;
            f = open ? S::all(0) : f;
            const I bin = __builtin_convertvector(f, I) * L + lane;
            __builtin_memcpy(at + p * L, &bin, BYTES);
        }
    }

    INLINE void bound_ranks() {
        for (int64_t h = 0; h < H * L; h++) count[h] = 0;
        for (int64_t q = 0; q < B * L; q++) count[at[q]]++;  // features apart: no count waits for its neighbor's
        I below = S::all_int(0);
        for (int64_t h = 0; h < H * L; h += L) {
            const I here = S::load_int(count + h);
            S::store(lower + h, __builtin_convertvector(below, V));
            below += here;
            S::store(upper + h, __builtin_convertvector(below + (here > 0), V));  // a mask is -1
        }
    }

    INLINE V look_up(const Real* table, const Int* place) {
        Real found[L];
        for (int i = 0; i < L; i++) found[i] = table[place[i]];
        return S::load(found);
    }

    // Where in `at` those bins begin whose upper bound times `need` reaches T, by halving.
    INLINE I reaching(Real need, V T, I lane) {
        I first = lane;
        Int step = 1;
        while (2 * step < H) step *= 2;
        for (; step > 0; step /= 2) {
            I next = first + Int(step * L), end = lane + Int(H * L);
            next = next > end ? end : next;
            Int place[L];
            const I last = next - Int(L);
            __builtin_memcpy(place, &last, BYTES);
            first = look_up(upper, place) * need < T ? next : first;
        }
        return first;
    }

    // T of every feature, from the samples that can raise it: their number, and their places in `visited`. What
    // survives is among them, as T only rises and needs only fall.
    INLINE int64_t search(const Real* need, V& T) {
        V best[FEW];  // the r best lower bounds, falling; bounds of true scores are >= 0
        for (int64_t i = 0; i < r; i++) best[i] = S::all(-1);
        I lane;
        for (int i = 0; i < L; i++) lane[i] = Int(i);
        I reach = open ? S::all_int(Int(H * L)) : lane;  // bins from here on can raise T, or could a few samples ago
        T = S::all(-1);
        Real least = -1;
        int64_t found = 0;
        const Real top = Real(B - 1);
        for (int64_t p = 0; p < B && !(need[p] * top < least); p++) {
            const Int* place = at + p * L;
            if (!S::any(S::load_int(place) >= reach)) continue;
            visited[found++] = int32_t(p);
            V sure = look_up(lower, place) * need[p];
            if (S::any(sure > T)) {
                for (int64_t i = 0; i < r; i++) {
                    const V other = best[i];
                    best[i] = sure > other ? sure : other;
                    sure = sure > other ? other : sure;
                }
                T = best[r - 1];
            }
            if (found % 8) continue;
            reach = open ? reach : reaching(need[p], T, lane);
            least = largest<Real>;
            for (int i = 0; i < L; i++)
                if (!open[i]) least = T[i] < least ? T[i] : least;
        }
        return found;
    }

    // Which of the visited samples' scores may be among the r best of each feature: at most `most` of them [L, most],
    // and how many there are.
    INLINE void collect(const Real* need, V T, int64_t found, int64_t most, int32_t* survivor, int64_t* kept) {
        for (int i = 0; i < L; i++) kept[i] = 0;
        for (int64_t v = 0; v < found; v++) {
            const int32_t p = visited[v];
            const I reaches = look_up(upper, at + p * L) * need[p] >= T;
            if (!S::any(reaches)) continue;
            for (int i = 0; i < L; i++)
                if (reaches[i]) {
                    if (kept[i] < most) survivor[i * most + kept[i]] = p;
                    kept[i]++;
                }
        }
    }
};

}  // namespace
}  // namespace bcl
