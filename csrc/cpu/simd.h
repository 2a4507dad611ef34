// Vectors of BYTES, in GCC's and Clang's vector extensions, and what they need beyond arithmetic. Whether any lane of a
// mask is set is asked in each processor's own way.
//
// Nothing of the standard library's templates: the linker may merge copies of them across instruction sets.
#pragma once
#include "interface.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define KERNEL __attribute__((noinline))  // one copy, with one thread and with many

namespace bcl {
namespace {

template <class Real> struct Bits;
template <> struct Bits<float> { typedef int32_t Signed; typedef uint32_t Unsigned; };
template <> struct Bits<double> { typedef int64_t Signed; typedef uint64_t Unsigned; };

template <class Real>
struct Simd {
    static constexpr int L = BYTES / sizeof(Real);
    typedef typename Bits<Real>::Signed Int;
    typedef Real V __attribute__((vector_size(BYTES)));
    typedef Int I __attribute__((vector_size(BYTES)));

    static INLINE V load(const Real* p) { V v; __builtin_memcpy(&v, p, BYTES); return v; }
    static INLINE void store(Real* p, V v) { __builtin_memcpy(p, &v, BYTES); }
    static INLINE I load_int(const void* p) { I v; __builtin_memcpy(&v, p, BYTES); return v; }
    static INLINE V all(Real value) { return V{} + value; }
    static INLINE I all_int(Int value) { return I{} + value; }
    static INLINE bool any(I mask) {
#if defined(__x86_64__) && BYTES == 64
        return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__x86_64__) && BYTES == 32
        return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#elif defined(__x86_64__)
        return _mm_movemask_epi8((__m128i)mask) != 0;
#else
        uint64_t words[BYTES / 8], some = 0;
        __builtin_memcpy(words, &mask, BYTES);
        for (int i = 0; i < BYTES / 8; i++) some |= words[i];
        return some != 0;
#endif
    }
    // The elements of two vectors in turn, from the first half of each, or from the second.
#if defined(__clang__)  // its shuffle takes constants alone
    template <class, int... i> struct Turns {
        static INLINE V low(V a, V b) { return __builtin_shufflevector(a, b, (i / 2 + i % 2 * L)...); }
        static INLINE V high(V a, V b) { return __builtin_shufflevector(a, b, (L / 2 + i / 2 + i % 2 * L)...); }
    };
    typedef __make_integer_seq<Turns, int, L> Turn;
#else
    struct Turn {
        static INLINE V low(V a, V b) { return shuffle(a, b, 0); }
        static INLINE V high(V a, V b) { return shuffle(a, b, L / 2); }
        static INLINE V shuffle(V a, V b, int first) {
            I places;
            for (int i = 0; i < L; i++) places[i] = first + i / 2 + i % 2 * L;
            return __builtin_shuffle(a, b, places);
        }
    };
#endif
    // Rows <-> columns of an L x L tile, by log2(L) perfect shuffles.
    static INLINE void transpose(V (&row)[L]) {
        V next[L];
#pragma GCC unroll 4
        for (int s = 1; s < L; s *= 2) {
#pragma GCC unroll 8
            for (int i = 0; i < L / 2; i++) {
                next[2 * i] = Turn::low(row[i], row[i + L / 2]);
                next[2 * i + 1] = Turn::high(row[i], row[i + L / 2]);
            }
#pragma GCC unroll 16
            for (int i = 0; i < L; i++) row[i] = next[i];
        }
    }
};

// e^x for |x| <= 87, within 1 ulp or so: x = n log 2 + f, a polynomial in f (the coefficients are Cephes's expf), 2^n.
INLINE Simd<float>::V exponential(Simd<float>::V x) {
    typedef Simd<float> S;
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    S::V shifted = x * 1.44269504088896341f + round;
    S::I n = (S::I)shifted - (S::I)S::all(round);
    S::V whole = shifted - round;
    S::V f = x - whole * 0.693359375f + whole * 2.12194440e-4f;  // log 2 in two parts
    S::V p = S::all(1.9875691500e-4f);
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * (f * f) + f + 1.0f;
    return p * (S::V)((n + 127) << 23);
}

INLINE Simd<double>::V exponential(Simd<double>::V x) {
    for (int i = 0; i < Simd<double>::L; i++) x[i] = __builtin_exp(x[i]);
    return x;
}

template <class Real>
INLINE typename Simd<Real>::V sigmoid(typename Simd<Real>::V x) {
    typedef Simd<Real> S;
    const Real most = sizeof(Real) == 4 ? 87 : 708;  // beyond, e^x leaves the normal numbers; NaN passes through
    const typename S::I lost = x < -most;
    x = x > most ? S::all(most) : x;
    x = lost ? S::all(-most) : x;
    const typename S::V y = Real(1) / (Real(1) + exponential(-x));
    // Not e^-87: its product with a gradient is subnormal, and some processors take 100 cycles for such operands.
    return lost ? S::all(0) : y;
}

template <class Real> constexpr Real largest = sizeof(Real) == 4 ? Real(__FLT_MAX__) : Real(__DBL_MAX__);

}  // namespace
}  // namespace bcl
