// The C interface of the CPU backend: pointers, sizes and strides in elements. It knows nothing of torch.
//
// Sums over the batch are formed in blocks of rows that do not depend on the number of threads, and added up in the
// order of the blocks: results are the same bits for any number of threads.
//
// Indices may hold anything: no function reads or writes outside of what its sizes span. What it refuses it leaves
// unwritten, and returns a Status.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "kernels.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

#define API extern "C" __attribute__((visibility("default")))

namespace bcl {
namespace {

constexpr int64_t BLOCK_ROWS = 64, MAX_BLOCKS = 64;  // sums of blocks take at most 64 * 2 * D numbers
constexpr int64_t MIN_WORK = 1 << 18;  // elements below which a second thread costs more than it helps
constexpr double EPS = 1e-8;

const char* isa = "baseline";

template <class Real> const Kernels<Real>& baseline();
template <> const Kernels<float>& baseline<float>() { return baseline_float; }
template <> const Kernels<double>& baseline<double>() { return baseline_double; }
#if defined(__x86_64__) && !defined(__clang__)
template <class Real> const Kernels<Real>& avx2();
template <> const Kernels<float>& avx2<float>() { return avx2_float; }
template <> const Kernels<double>& avx2<double>() { return avx2_double; }
template <class Real> const Kernels<Real>& avx512();
template <> const Kernels<float>& avx512<float>() { return avx512_float; }
template <> const Kernels<double>& avx512<double>() { return avx512_double; }
#endif

// The widest that this processor has; BCL_FAST_ISA=avx2 or baseline takes a narrower one, for tests.
template <class Real>
const Kernels<Real>& choose() {
#if defined(__x86_64__) && !defined(__clang__)
    const char* asked = getenv("BCL_FAST_ISA");
    const bool any = !asked || !*asked;
    __builtin_cpu_init();
    if ((any || !strcmp(asked, "avx512")) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
        isa = "avx512";
        return avx512<Real>();
    }
    if ((any || !strcmp(asked, "avx2")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        isa = "avx2";
        return avx2<Real>();
    }
#endif
    return baseline<Real>();
}

const Kernels<float>& kernels_float = choose<float>();
const Kernels<double>& kernels_double = choose<double>();
template <class Real> const Kernels<Real>& kernels();
template <> const Kernels<float>& kernels<float>() { return kernels_float; }
template <> const Kernels<double>& kernels<double>() { return kernels_double; }

// Memory for one call, 64-byte aligned; null where there is none.
template <class T>
struct Buffer {
    T* data;
    explicit Buffer(int64_t n) : data((T*)std::aligned_alloc(64, (n * int64_t(sizeof(T)) + 127) / 64 * 64)) {}
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
};

// f(i, scratch) for i in [0, n), `work` elements in all, on at most `threads` threads, each with `bytes` of its own.
// False where memory ran out.
template <class F>
bool parallel(int threads, int64_t work, int64_t n, int64_t bytes, F f) {
    int failed = 0;
    if (work < MIN_WORK) threads = 1;
    if (threads > n) threads = int(n);
#if defined(_OPENMP)
    if (threads > 1) {
#pragma omp parallel num_threads(threads) reduction(| : failed)
        {
            Buffer<char> scratch(bytes);
            failed |= !scratch.data;
#pragma omp for schedule(static)
            for (int64_t i = 0; i < n; i++)
                if (scratch.data) f(i, scratch.data);
        }
        return !failed;
    }
#endif
    Buffer<char> scratch(bytes);
    if (!scratch.data) return false;
    for (int64_t i = 0; i < n; i++) f(i, scratch.data);
    return !failed;
}

struct Blocks {
    int64_t rows, count;
    explicit Blocks(int64_t B) {
        rows = (B + MAX_BLOCKS - 1) / MAX_BLOCKS;
        rows = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS;
        count = B > 0 ? (B + rows - 1) / rows : 0;
    }
};

// Refused: sizes that no input has, or an index outside of 0 .. D - 1 or of 0 .. B - 1.
enum Status { DONE = 0, NO_MEMORY = 1, BAD_SIZE = 2, BAD_PAIR_FEATURE = 3, BAD_RESCUE_ROW = 4 };

bool countable(int64_t n) { return n >= 0 && n <= INT32_MAX; }

// Per feature: steps 5 and 7, the shares and strengths of steps 10 and 11 that follow from them, and their options.
template <class Real>
struct Forces {
    bool coupled;
    Real rescue_onset, pull_onset;  // 0: none
    Real *novelty, *win_rate, *winner_share, *som_strength;  // [D]

    void operator()(int64_t d, Real novel, Real rate) const {
        novelty[d] = novel;
        win_rate[d] = rate;
        winner_share[d] = rescue_onset > 0 && !(rate < rescue_onset) ? Real(1) : coupled ? rate * novel : rate;
        som_strength[d] = pull_onset > 0 && !(rate < pull_onset) ? Real(0) : coupled ? Real(1) : 1 - novel;
    }
};

// A neighbor that is no feature counts as the nearest that is: neighbors [D, k] is state that a user loads.
template <class Real>
int competition(Competition<Real> c, const int64_t* neighbors, const Forces<Real>& forces, int threads) {
    if (c.B < 0 || c.D < 1 || !countable(c.D) || c.k < 1 || c.N < 0) return BAD_SIZE;
    const Blocks blocks(c.B);
    Buffer<double> sums(blocks.count * 2 * c.D);
    Buffer<int32_t> near(c.D * c.k);
    if (!sums.data || !near.data) return NO_MEMORY;
    for (int64_t i = 0; i < c.D * c.k; i++) {
        const int64_t j = neighbors[i];
        near.data[i] = uint64_t(j) < uint64_t(c.D) ? int32_t(j) : j < 0 ? 0 : int32_t(c.D - 1);
    }
    c.neighbors = near.data;
    memset(sums.data, 0, blocks.count * 2 * c.D * sizeof(double));
    const int64_t bytes = competition_scratch(c.D) * sizeof(Real);
    const bool done = parallel(threads, c.B * (c.D + c.N), blocks.count, bytes, [&](int64_t i, char* scratch) {
        const int64_t first = i * blocks.rows, last = first + blocks.rows < c.B ? first + blocks.rows : c.B;
        kernels<Real>().competition(c, first, last, (Real*)scratch, sums.data + i * 2 * c.D);
    });
    for (int64_t d = 0; d < c.D; d++) {
        double total = 0, novel = 0;
        for (int64_t i = 0; i < blocks.count; i++) {
            total += sums.data[i * 2 * c.D + d];
            novel += sums.data[i * 2 * c.D + c.D + d];
        }
        forces(d, Real(novel / (total + EPS)), Real(total / double(c.B)));
    }
    return done ? DONE : NO_MEMORY;
}

// Samples by falling need, equal ones in order: a stable radix sort, the same for all columns.
template <class Real, class Bits>
void order_by_need(const Real* need, int64_t B, int32_t* order, int32_t* spare) {
    for (int64_t b = 0; b < B; b++) order[b] = int32_t(b);
    int32_t *from = order, *to = spare;
    for (unsigned shift = 0; shift < sizeof(Real) * 8; shift += 8) {
        int64_t start[256] = {0};
        auto digit = [&](int64_t b) {
            Bits bits;
            memcpy(&bits, need + b, sizeof bits);  // numbers that are not negative order like their bits
            return ~bits >> shift & 255;
        };
        for (int64_t b = 0; b < B; b++) start[digit(b)]++;
        int64_t sum = 0;
        bool one = false;
        for (int h = 0; h < 256; h++) {
            const int64_t count = start[h];
            one |= count == B;
            start[h] = sum;
            sum += count;
        }
        if (one) continue;
        for (int64_t i = 0; i < B; i++) to[start[digit(from[i])]++] = from[i];
        int32_t* other = from;
        from = to;
        to = other;
    }
    if (from != order) memcpy(order, from, B * sizeof *order);
}

// The chosen samples of one feature weigh alike, or by affinity * need, where shares hold their affinities (step 9b).
template <class Real>
void share(const Selection<Real>& s, int64_t d) {
    Real* shares = s.shares + d * s.r;
    const int64_t* rows = s.rows + d * s.r;
    double sum = 0;
    for (int64_t i = 0; i < s.r; i++) {
        Real value = shares[i];
        if (s.soft && s.rule == RANK) value = s.B > 1 ? value / Real(s.B - 1) : Real(1);
        if (s.soft && s.need) value *= s.need[rows[i]];
        shares[i] = s.soft ? (value < 0 ? Real(0) : value) : Real(1) / Real(s.r);
        sum += shares[i];
    }
    if (s.soft)
        for (int64_t i = 0; i < s.r; i++) shares[i] /= Real(sum + EPS);
}

template <class Real, class Bits>
int selection(Selection<Real> s, int threads) {
    const int64_t B = s.B, P = padded(B);
    if (!countable(B) || s.D < 0 || s.r < 0 || s.r > B) return BAD_SIZE;
    if (s.r == 0) return DONE;
    Buffer<int32_t> order(2 * P);
    Buffer<Real> sorted(3 * P);
    if (!order.data || !sorted.data) return NO_MEMORY;
    Real *flat = sorted.data + 2 * P, sum = 0;
    const Real* need = s.need;
    s.bounded = s.rule == RANK;
    if (s.bounded && !need) {
        for (int64_t b = 0; b < B; b++) flat[b] = 1;  // rank * 1 is the rank
        need = flat;
    }
    if (s.bounded)
        for (int64_t b = 0; b < B; b++) {
            sum += need[b] - need[b];  // 0, or NaN where a need is not finite
            s.bounded &= need[b] >= 0;
        }
    s.bounded &= sum == 0;
    if (s.bounded) {
        for (int64_t b = 0; b < B; b++) flat[b] = need[b] + Real(0);  // -0 would sort below all others
        order_by_need<Real, Bits>(flat, B, order.data, order.data + P);
        for (int64_t p = 0; p < B; p++) {
            sorted.data[p] = flat[order.data[p]];
            sorted.data[P + p] = s.x_inverse_norm[order.data[p]];
        }
        s.order = order.data;
        s.order_need = sorted.data;
        s.order_norm = sorted.data + P;
    }
    const int64_t L = kernels<Real>().lanes, tiles = (s.D + L - 1) / L;
    const bool done = parallel(threads, B * s.D, tiles, selection_scratch<Real>(B), [&](int64_t i, char* scratch) {
        const int64_t first = i * L, last = first + L < s.D ? first + L : s.D;
        kernels<Real>().selection(s, first, last, scratch);
        for (int64_t d = first; d < last; d++) share(s, d);
    });
    return done ? DONE : NO_MEMORY;
}

// Every feature's list: its winner pairs in the order of the batch, weighed u / their sum, then its rescue rows at 1 - u.
template <class Real>
int targets(const Targets<Real>& t, int64_t B, int64_t D, const int64_t* pair_feature, const Real* pair_pull, int64_t k,
            const int64_t* rescue_rows, const Real* rescue_weight, int64_t r, const Real* winner_share, int threads) {
    if (!countable(B) || D < 0 || k < 0 || r < 0 || t.N < 0) return BAD_SIZE;
    bool outside = false;
    for (int64_t i = 0; i < D * r; i++) outside |= uint64_t(rescue_rows[i]) >= uint64_t(B);
    if (outside) return BAD_RESCUE_ROW;
    for (int64_t i = 0; i < B * k; i++) outside |= uint64_t(pair_feature[i]) >= uint64_t(D);
    if (outside) return BAD_PAIR_FEATURE;
    Buffer<int64_t> start(D + 1), end(D);
    Buffer<int32_t> samples(B * k + D * r);
    Buffer<Real> shares(B * k + D * r);
    if (!start.data || !end.data || !samples.data || !shares.data) return NO_MEMORY;
    memset(end.data, 0, D * sizeof(int64_t));
    for (int64_t i = 0; i < B * k; i++) end.data[pair_feature[i]]++;
    start.data[0] = 0;
    for (int64_t d = 0; d < D; d++) start.data[d + 1] = start.data[d] + end.data[d] + r;
    memcpy(end.data, start.data, D * sizeof(int64_t));
    for (int64_t b = 0; b < B; b++)
        for (int64_t j = 0; j < k; j++) {
            const int64_t at = end.data[pair_feature[b * k + j]]++;
            samples.data[at] = int32_t(b);
            shares.data[at] = pair_pull[b * k + j];
        }
    const int64_t chunk = 64, chunks = (D + chunk - 1) / chunk;  // of features: they share the stretches of x in cache
    parallel(threads, (B * k + D * r) * t.N, chunks, 0, [&](int64_t i, char*) {
        const int64_t begin = i * chunk, stop = begin + chunk < D ? begin + chunk : D;
        for (int64_t d = begin; d < stop; d++) {
            const int64_t first = start.data[d], pairs = end.data[d];
            double sum = 0;
            for (int64_t q = first; q < pairs; q++) sum += shares.data[q];
            const Real u = winner_share[d], each = u / Real(sum + EPS);
            for (int64_t q = first; q < pairs; q++) shares.data[q] *= each;
            for (int64_t i = 0; i < r; i++) {
                samples.data[pairs + i] = int32_t(rescue_rows[d * r + i]);
                shares.data[pairs + i] = (1 - u) * rescue_weight[d * r + i];
            }
        }
        kernels<Real>().targets(t, begin, stop, start.data, samples.data, shares.data);
    });
    return DONE;
}

template <class Real>
int gradient(const Real* gradient, int64_t stride, const Real* mask, int64_t B, int64_t D, Real* masked, Real* sum,
             int threads) {
    const Blocks blocks(B);
    Buffer<double> sums(blocks.count * D);
    if (!sums.data) return NO_MEMORY;
    memset(sums.data, 0, blocks.count * D * sizeof(double));
    const bool done = parallel(threads, B * D, blocks.count, padded(D) * sizeof(Real), [&](int64_t i, char* scratch) {
        const int64_t first = i * blocks.rows, last = first + blocks.rows < B ? first + blocks.rows : B;
        kernels<Real>().gradient(gradient, stride, mask, masked, D, first, last, (Real*)scratch, sums.data + i * D);
    });
    for (int64_t d = 0; d < D; d++) {
        double total = 0;
        for (int64_t i = 0; i < blocks.count; i++) total += sums.data[i * D + d];
        sum[d] = Real(total);
    }
    return done ? DONE : NO_MEMORY;
}

template <class Real>
int nearest(const Real* similarity, int64_t stride, int64_t rows, int64_t D, int64_t first, int64_t k, int64_t* near,
            int threads) {
    if (k < 0 || k >= D) return BAD_SIZE;
    if (k == 0) return DONE;
    const bool done = parallel(threads, rows * D, rows, k * sizeof(Real), [&](int64_t i, char* scratch) {
        kernels<Real>().nearest(similarity + i * stride, D, first + i, k, near + i * k, (Real*)scratch);
    });
    return done ? DONE : NO_MEMORY;
}

template <class Real>
int inverse_norm(const Real* rows, int64_t stride, int64_t R, int64_t N, Real* inverse, int threads) {
    parallel(threads, R * N, R, 0, [&](int64_t i, char*) {
        inverse[i] = kernels<Real>().inverse_norm(rows + i * stride, N);
    });
    return DONE;
}

template <class Real>
int rank(const Real* key, int64_t stride, int64_t B, int64_t D, int64_t* rank, int threads) {
    constexpr int64_t COLUMNS = 16;  // a cache line of float32
    const int64_t tiles = (D + COLUMNS - 1) / COLUMNS;
    const bool done = parallel(threads, B * D, tiles, selection_scratch<Real>(B), [&](int64_t i, char* scratch) {
        const int64_t first = i * COLUMNS, last = first + COLUMNS < D ? first + COLUMNS : D;
        kernels<Real>().rank(key, stride, B, D, first, last, rank, scratch);
    });
    return done ? DONE : NO_MEMORY;
}

}  // namespace
}  // namespace bcl

// The number changes with any signature below, and with what a Status means.
API int bcl_cpu_abi() { return 5; }
API const char* bcl_cpu_isa() { return bcl::isa; }

#define INTERFACE(Real, Bits, suffix)                                                                                  \
    API int bcl_cpu_competition_##suffix(                                                                              \
        const Real* activation, int64_t stride, int64_t B, int64_t D, const int64_t* neighbors, int64_t k,             \
        double temperature, const Real* x, int64_t x_stride, int64_t N, int coupled, double rescue_onset,              \
        double pull_onset, Real* rank_score, Real* coverage, Real* novelty, Real* win_rate, int64_t* winner,           \
        int64_t* pair_feature, Real* pair_pull, Real* x_inverse_norm, Real* need, Real* winner_share,                  \
        Real* som_strength, int threads) {                                                                             \
        return bcl::competition<Real>({activation, stride, B, D, nullptr, k, Real(temperature), x, x_stride, N,        \
                                       rank_score, coverage, winner, pair_feature, pair_pull, x_inverse_norm, need},   \
                                      neighbors, {coupled != 0, Real(rescue_onset), Real(pull_onset), novelty,         \
                                                  win_rate, winner_share, som_strength}, threads);                     \
    }                                                                                                                  \
    API int bcl_cpu_selection_##suffix(const Real* activation, int64_t stride, int64_t B, int64_t D, const Real* bias, \
                                       const Real* x_inverse_norm, const Real* weight_inverse_norm, const Real* need,  \
                                       int rule, int soft, int64_t r, int64_t* rows, Real* shares, int threads) {      \
        return bcl::selection<Real, Bits>({activation, stride, B, D, bias, x_inverse_norm, weight_inverse_norm, need,  \
                                           rule, r, soft != 0, false, nullptr, nullptr, nullptr, rows, shares},        \
                                          threads);                                                                    \
    }                                                                                                                  \
    API int bcl_cpu_targets_##suffix(const Real* x, int64_t x_stride, int64_t B, int64_t N, int64_t D,                 \
                                     const int64_t* pair_feature, const Real* pair_pull, int64_t k,                    \
                                     const int64_t* rescue_rows, const Real* rescue_weight, int64_t r,                 \
                                     const Real* winner_share, const Real* weight, const Real* offset,                 \
                                     Real* destination, int64_t stride, const Real* som_strength, double som_lr,       \
                                     int threads) {                                                                    \
        return bcl::targets<Real>({x, x_stride, N, weight, offset, destination, stride, som_strength, Real(som_lr)}, B, \
                                  D, pair_feature, pair_pull, k, rescue_rows, rescue_weight, r, winner_share, threads); \
    }                                                                                                                  \
    API int bcl_cpu_gradient_##suffix(const Real* gradient, int64_t stride, const Real* mask, int64_t B, int64_t D,    \
                                      Real* masked, Real* sum, int threads) {                                          \
        return bcl::gradient<Real>(gradient, stride, mask, B, D, masked, sum, threads);                                \
    }                                                                                                                  \
    API int bcl_cpu_nearest_##suffix(const Real* similarity, int64_t stride, int64_t rows, int64_t D, int64_t first,   \
                                     int64_t k, int64_t* near, int threads) {                                          \
        return bcl::nearest<Real>(similarity, stride, rows, D, first, k, near, threads);                               \
    }                                                                                                                  \
    API int bcl_cpu_inverse_norm_##suffix(const Real* rows, int64_t stride, int64_t R, int64_t N, Real* inverse,       \
                                          int threads) {                                                               \
        return bcl::inverse_norm<Real>(rows, stride, R, N, inverse, threads);                                          \
    }                                                                                                                  \
    API int bcl_cpu_rank_##suffix(const Real* key, int64_t stride, int64_t B, int64_t D, int64_t* rank, int threads) { \
        return bcl::rank<Real>(key, stride, B, D, rank, threads);                                                      \
    }

INTERFACE(float, uint32_t, f32)
INTERFACE(double, uint64_t, f64)
