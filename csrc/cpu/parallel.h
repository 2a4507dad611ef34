// Threads, and the memory that they work in.
//
// Sums over the batch are formed in blocks of rows that do not depend on the number of threads, and added up in the
// order of the blocks: results are the same bits for any number of threads.
#pragma once
#include <cstdint>
#include <cstdlib>

namespace bcl {
namespace {

constexpr int64_t BLOCK_ROWS = 64, MAX_BLOCKS = 64;  // sums of blocks take at most 64 * 2 * D numbers
constexpr double GRAIN = 50e3;         // nanoseconds of work for each thread: a team is not worth less
constexpr int64_t LANES = 16;          // of the widest vector

inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

inline bool countable(int64_t n) { return n >= 0 && n <= INT32_MAX; }

// Memory for one call, 64-byte aligned; null where there is none.
template <class T>
struct Buffer {
    T* data;
    explicit Buffer(int64_t n) : data((T*)aligned_alloc(64, (n * int64_t(sizeof(T)) + 127) / 64 * 64)) {}
    ~Buffer() { free(data); }
    Buffer(const Buffer&) = delete;
};

// f(i, scratch) for i in [0, n), which take one thread `work` nanoseconds or so in all, on at most `threads` threads,
// each with `bytes` of its own. False where memory ran out.
template <class F>
bool parallel(int threads, double work, int64_t n, int64_t bytes, F f) {
    int failed = 0;
    if (work < threads * GRAIN) threads = int(work / GRAIN);
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
    int64_t B, rows, count;
    explicit Blocks(int64_t B) : B(B) {
        rows = (B + MAX_BLOCKS - 1) / MAX_BLOCKS;
        rows = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS;
        count = B > 0 ? (B + rows - 1) / rows : 0;
    }
    int64_t first(int64_t i) const { return i * rows; }
    int64_t last(int64_t i) const { return (i + 1) * rows < B ? (i + 1) * rows : B; }
};

}  // namespace
}  // namespace bcl
