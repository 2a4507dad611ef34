// What every stage takes, and the table of stages that every instruction set fills. The stages are those of SPEC
// section 2; the structs are mirrored in bcl_fast/cpu_structs.py, and layout.cpp says where each field lies.
//
// All matrices are row-major with unit column stride; a stride is the distance of rows in elements, and what has none
// is contiguous. Indices may hold anything: no stage reads or writes outside of what its sizes span. What it refuses
// it leaves unwritten, and returns a Status.
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

constexpr double EPS = 1e-8;

// Refused: sizes that no input has, or an index outside of 0 .. D - 1 or of 0 .. B - 1.
enum Status { DONE = 0, NO_MEMORY = 1, BAD_SIZE = 2, BAD_PAIR_FEATURE = 3, BAD_RESCUE_ROW = 4 };
enum Rule { RANK = 0, CLAMPED_COSINE = 1, COSINE = 2 };

template <class Real>
struct Neighbors {  // step 1, of a tile: similarities of some features with some, which go to the lists of both
    const Real* similarity;    // [rows, columns] of features first_row, ... with features first_column, ...
    int64_t* row_near;         // [rows, k] the k most similar so far; at first any that are larger than every index
    Real* row_best;            // [rows, k] their similarities, falling; at first -inf
    int64_t* column_near;      // [columns, k] the same of the columns; or null: only the rows look
    Real* column_best;         // [columns, k]
    int64_t stride, rows, columns, first_row, first_column, k;
};

template <class Real>
struct Competition {  // steps 2 to 8; of steps 9b to 11 what belongs to a sample or to a feature
    const Real* activation;    // [B, D]
    const int64_t* neighbors;  // [D, k]; what is no feature counts as the nearest index that is one
    const Real* x;             // [B, N]
    Real* rank_score;          // [B, D]
    Real *novelty, *win_rate;  // [D]
    int64_t* winner;           // [B]
    int64_t* pair_feature;     // [B, k]
    Real* pair_pull;           // [B, k]
    Real *x_inverse_norm, *need;        // [B]
    Real *winner_share, *som_strength;  // [D]
    int64_t activation_stride, x_stride, B, D, N, k;
    double temperature, rescue_onset, pull_onset;  // onsets: 0 for none
    int coupled;
};

template <class Real>
struct InverseNorm {  // step 9b: 1 / (the Euclidean norm of a row + eps)
    const Real* rows;  // [R, N]
    Real* inverse;     // [R]
    int64_t stride, R, N;
};

template <class Real>
struct Selection {  // step 9b
    const Real* activation;           // [B, D]
    const Real* bias;                 // [D] or null
    const Real* x_inverse_norm;       // [B]
    const Real* weight_inverse_norm;  // [D], or null where the rule needs none
    const Real* need;                 // [B] or null
    int64_t* rows;                    // [D, r] the chosen samples
    Real* shares;                     // [D, r]
    int64_t stride, B, D, r;
    int rule, soft;  // a Rule; whether shares follow weighted affinities instead of being equal
};

template <class Real>
struct Targets {  // steps 9a, 10 and 13
    const Real* x;                // [B, N]
    const int64_t* pair_feature;  // [B, k]
    const Real* pair_pull;        // [B, k]
    const int64_t* rescue_rows;   // [D, r]
    const Real* rescue_weight;    // [D, r]
    const Real* winner_share;     // [D]
    const Real* som_strength;     // [D]
    const Real* weight;           // [D, N] what is pulled, without its offset; null: the target is stored
    const Real* offset;           // [D, N] or null
    Real* destination;            // [D, N] that of the two which takes the pull; or where the target goes
    int64_t x_stride, B, D, N, k, r;
    double som_lr;
};

// A forward outside compilers, as one call: competition, norms and selection, and with coupled forces step 11.
//
// What its pull needs lies in one piece of memory, `packed`, of 8-byte words: winner [B], pair_feature [B, k] and
// rescue_rows [D, r] as int64, then pair_pull [B, k], rescue_weight [D, r], winner_share [D] and som_strength [D] as
// Real, side by side.
template <class Real>
struct Forward {
    const Real* activation;    // [B, D]
    const int64_t* neighbors;  // [D, k], as in Competition
    const Real* x;             // [B, N]
    const Real* bias;          // [D] or null
    const Real* weight;        // [D, N], or null where the rule needs no norms of it
    Real* mask;                // [B, D] rank_score, or with coupled forces rank_score * novelty * win_rate * novelty
    int64_t* packed;
    int64_t x_stride, weight_stride, B, D, N, k, r;
    double temperature, rescue_onset, pull_onset;
    int coupled, need, rule, soft;
};

// The pull of such a forward: Targets on what lies in `packed`.
template <class Real>
struct Pull {
    const Real* x;          // [B, N]
    const int64_t* packed;
    const Real* weight;     // [D, N]
    const Real* offset;     // [D, N] or null
    Real* destination;      // [D, N]
    const Real* som_lr;     // scalar
    int64_t* step;          // scalar, advances by one
    int64_t x_stride, B, D, N, k, r;
};

template <class Real>
struct Gradient {  // step 12
    const Real *gradient, *mask;  // [B, D]
    Real* masked;                 // [B, D] their product
    Real* sum;                    // [D] its sum over samples
    int64_t stride, B, D;         // the stride is of gradient
};

template <class Real>
struct Rank {  // the ranks of step 9b
    const Real* key;  // [B, D]
    int64_t* rank;    // [B, D] stable, within its column
    int64_t stride, B, D;
};

template <class Real>
struct Stages {
    int (*neighbors)(const Neighbors<Real>&, int threads);
    int (*competition)(const Competition<Real>&, int threads);
    int (*inverse_norm)(const InverseNorm<Real>&, int threads);
    int (*selection)(const Selection<Real>&, int threads);
    int (*targets)(const Targets<Real>&, int threads);
    int (*forward)(const Forward<Real>&, int threads);
    int (*pull)(const Pull<Real>&, int threads);
    int (*gradient)(const Gradient<Real>&, int threads);
    int (*rank)(const Rank<Real>&, int threads);
};

extern const Stages<float> baseline_float, avx2_float, avx512_float;
extern const Stages<double> baseline_double, avx2_double, avx512_double;

}  // namespace bcl
