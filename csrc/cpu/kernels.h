// What the vector kernels take, and the table of them that every instruction set fills. All matrices are row-major with
// unit column stride; a `stride` is the distance of rows in elements. The stages are those of SPEC section 2.
#pragma once
#include <cstdint>

// Any of these changes keys, ranks or NaN; setup.py switches them off behind what the environment asks for.
#if defined(__FAST_MATH__) || __FINITE_MATH_ONLY__ || defined(__ASSOCIATIVE_MATH__) || \
    defined(__RECIPROCAL_MATH__) || defined(__NO_SIGNED_ZEROS__)
#error "bcl_fast is exact: build it without -ffast-math and its parts"
#endif
#if __FLT_EVAL_METHOD__ == 1 || __FLT_EVAL_METHOD__ == 2
#error "bcl_fast is exact: build it for arithmetic of no more precision than its types have, such as SSE's"
#endif
static_assert(0.1 != 0.1f, "bcl_fast is exact: build it without -fsingle-precision-constant");

namespace bcl {

template <class Real>
struct Competition {  // steps 2 to 8; of step 9b what belongs to a sample
    const Real* activation;  // [B, D]
    int64_t stride, B, D;
    const int32_t* neighbors;  // [D, k], each 0 .. D - 1
    int64_t k;
    Real temperature;
    const Real* x;  // [B, N]
    int64_t x_stride, N;
    Real* rank_score;       // [B, D]
    Real* coverage;         // [B]
    int64_t* winner;        // [B]
    int64_t* pair_feature;  // [B, k]
    Real* pair_pull;        // [B, k]
    Real *x_inverse_norm, *need;  // [B]
};

enum Rule { RANK, CLAMPED_COSINE, COSINE };

template <class Real>
struct Selection {  // step 9b
    const Real* activation;  // [B, D]
    int64_t stride, B, D;
    const Real *bias, *x_inverse_norm, *weight_inverse_norm, *need;  // [D] or null, [B], [D], [B] or null
    int rule;
    int64_t r;        // samples to choose, 1 .. B
    bool soft;        // their shares are not all alike
    bool bounded;     // every need is finite and not negative: bounds of ranks bound scores
    const int32_t* order;     // [B] samples by falling need, where bounded
    const Real* order_need;   // [B] their needs
    const Real* order_norm;   // [B] their x_inverse_norm
    int64_t* rows;  // [D, r] the chosen samples
    Real* shares;   // [D, r]; the kernels leave there, where soft, their ranks (not divided by B - 1) or cosines
};

template <class Real>
struct Targets {  // steps 9a, 10 and 13
    const Real* x;  // [B, N]
    int64_t x_stride, N;
    const Real* weight;        // [D, N] what stands there, without its offset
    const Real* offset;        // [D, N] or null
    Real* destination;         // [D, N] the tensor that is pulled, or the target itself
    int64_t stride;            // of weight, offset and destination
    const Real* som_strength;  // [D], or null to store the target
    Real som_lr;
};

template <class Real>
struct Kernels {
    int64_t lanes;
    // Rows [first, last) of the batch; adds to sums [2, D]: rank_score, and rank_score / coverage. scratch: see
    // competition_scratch.
    void (*competition)(const Competition<Real>&, int64_t first, int64_t last, Real* scratch, double* sums);
    // 1 / (the Euclidean norm of one row [N] + eps), in the whole range of Real.
    Real (*inverse_norm)(const Real* row, int64_t N);
    // Features [first, last). scratch: see selection_scratch, in bytes.
    void (*selection)(const Selection<Real>&, int64_t first, int64_t last, char* scratch);
    // Features [first, last): that of d from its samples and their shares, which lie at start[d] up to start[d + 1].
    void (*targets)(const Targets<Real>&, int64_t first, int64_t last, const int64_t* start, const int32_t* samples,
                    const Real* shares);
    // masked = gradient * mask for rows [first, last); adds their sum to sums [D].
    void (*gradient)(const Real* gradient, int64_t stride, const Real* mask, Real* masked, int64_t D, int64_t first,
                     int64_t last, Real* partial, double* sums);
    // The k most similar others of feature `own` from its row of similarities [D]. scratch: k values.
    void (*nearest)(const Real* similarity, int64_t D, int64_t own, int64_t k, int64_t* near, Real* scratch);
    // Stable ranks of columns [first, last) of key [B, D] -> [B, D].
    void (*rank)(const Real* key, int64_t stride, int64_t B, int64_t D, int64_t first, int64_t last, int64_t* rank,
                 char* scratch);
};

constexpr int64_t MAX_LANES = 16;
constexpr int64_t MAX_BINS = 1024;

inline int64_t padded(int64_t n) { return (n + MAX_LANES - 1) / MAX_LANES * MAX_LANES; }
inline int64_t competition_scratch(int64_t D) { return 2 * D * MAX_LANES + 2 * padded(D); }
// In bytes: a tile of keys; then of one column scores, ranks, keys, two sets of sort keys and samples, bins, counts, bounds.
template <class Real>
int64_t selection_scratch(int64_t B) {
    return (MAX_LANES + 5) * padded(B) * sizeof(Real) + 3 * padded(B) * 4 + MAX_BINS * (4 * 4 + 2 * sizeof(Real)) + 1024;
}

extern const Kernels<float> baseline_float, avx2_float, avx512_float;
extern const Kernels<double> baseline_double, avx2_double, avx512_double;

}  // namespace bcl
