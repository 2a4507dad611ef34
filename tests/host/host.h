// The kernels on the host, for tests: every CUDA thread is a fiber of one host thread that runs until it waits, blocks
// come one after the other, those of a cluster together. ThreadSanitizer is told what barriers order and takes the rest
// of a block for concurrent: a missing barrier is a race it reports.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#else
#define __tsan_create_fiber(flags) nullptr
#define __tsan_get_current_fiber() nullptr
#define __tsan_switch_to_fiber(fiber, flags) (void)(fiber)
#define __tsan_acquire(place)
#define __tsan_release(place)
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // in kernels without clusters, whose blocks run one at a time
#define SHARED(name) char* const name = bcl::fiber.load(bcl::RELAXED)->block->shared.get()

namespace bcl {

constexpr auto RELAXED = std::memory_order_relaxed;  // orders nothing: only barriers do

struct Barrier {
    int members;
    std::atomic<int> arrived{0}, turn{0};
    explicit Barrier(int members) : members(members) {}
};

struct Block {
    unsigned number, rank;
    std::unique_ptr<char[]> shared;
    Barrier barrier;
};

struct Warp {
    Barrier barrier;
    uint64_t slots[32];  // what its lanes exchange
    explicit Warp(int lanes) : barrier(lanes) {}
};

struct Fiber {
    unsigned thread;
    Block* block;
    Warp* warp;
    const std::function<void()>* body;
    ucontext_t context{};
    void* known = nullptr;  // to ThreadSanitizer
    std::atomic<Barrier*> waits{nullptr};
    std::atomic<int> turn{0};
    std::atomic<bool> done{false};
};

inline std::atomic<Fiber*> fiber;  // the one that runs
inline ucontext_t scheduler;
inline std::atomic<void*> scheduler_known;
inline std::atomic<Barrier*> cluster;  // of the blocks that run together
inline std::vector<std::unique_ptr<Block>> peers;
inline unsigned threads_of_block, blocks_of_grid;

// What runs next is another thread to ThreadSanitizer (1: the switch orders nothing), so that nothing may be read here.
inline void change(ucontext_t* from, ucontext_t* to, void* known) {
    __tsan_switch_to_fiber(known, 1);
    swapcontext(from, to);
}

inline void leave(Fiber* self) { change(&self->context, &scheduler, scheduler_known.load(RELAXED)); }

inline void wait(Barrier& barrier) {
    Fiber* self = fiber.load(RELAXED);
    __tsan_release(&barrier);
    self->turn.store(barrier.turn.load(RELAXED), RELAXED);
    if (barrier.arrived.fetch_add(1, RELAXED) + 1 == barrier.members) {
        barrier.arrived.store(0, RELAXED);
        barrier.turn.fetch_add(1, RELAXED);
    } else {
        self->waits.store(&barrier, RELAXED);
        leave(self);
        self->waits.store(nullptr, RELAXED);
    }
    __tsan_acquire(&barrier);
}

inline void begin() {
    Fiber* self = fiber.load(RELAXED);
    __tsan_acquire(cluster.load(RELAXED));  // what stood before the launch, and the blocks before
    (*self->body)();
    __tsan_release(cluster.load(RELAXED));
    self->done.store(true, RELAXED);
    leave(self);
}

inline void prepare(Fiber& one, size_t number) {
    constexpr size_t STACK = 64 << 10;
    static std::vector<std::unique_ptr<char[]>> stacks;
    static std::vector<void*> known;
    while (stacks.size() <= number) {
        stacks.emplace_back(new char[STACK]);
        known.push_back(__tsan_create_fiber(0));
    }
    getcontext(&one.context);
    one.context.uc_stack.ss_sp = stacks[number].get();
    one.context.uc_stack.ss_size = STACK;
    one.context.uc_link = nullptr;
    makecontext(&one.context, begin, 0);
    one.known = known[number];
}

template <class T>
T exchange(T value, unsigned from) {
    static_assert(sizeof(T) <= 8, "a slot has eight bytes");
    const Fiber* self = fiber.load(RELAXED);
    std::memcpy(&self->warp->slots[self->thread % 32], &value, sizeof(T));
    wait(self->warp->barrier);
    std::memcpy(&value, &self->warp->slots[from], sizeof(T));
    wait(self->warp->barrier);
    return value;
}

struct Index {
    unsigned (*read)();
    operator unsigned() const { return read(); }
};

struct Axis {
    Index x;
};

}  // namespace bcl

inline const bcl::Axis threadIdx{{[] { return bcl::fiber.load(bcl::RELAXED)->thread; }}};
inline const bcl::Axis blockIdx{{[] { return bcl::fiber.load(bcl::RELAXED)->block->number; }}};
inline const bcl::Axis blockDim{{[] { return bcl::threads_of_block; }}};
inline const bcl::Axis gridDim{{[] { return bcl::blocks_of_grid; }}};

inline void __syncthreads() {
#ifndef BCL_WITHOUT_BARRIERS  // a test that ThreadSanitizer would find out
    bcl::wait(bcl::fiber.load(bcl::RELAXED)->block->barrier);
#endif
}
inline void __syncwarp() { bcl::wait(bcl::fiber.load(bcl::RELAXED)->warp->barrier); }
template <class T> T __shfl_sync(unsigned, T value, int lane) { return bcl::exchange(value, unsigned(lane)); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return bcl::exchange(value, threadIdx.x % 32 ^ unsigned(mask));
}
inline bool __all_sync(unsigned all, bool value) {
    for (int mask = 16; mask > 0; mask /= 2) value &= __shfl_xor_sync(all, value, mask);
    return value;
}
inline unsigned __match_any_sync(unsigned, int value) {
    const bcl::Fiber* self = bcl::fiber.load(bcl::RELAXED);
    uint64_t alike = 0;
    self->warp->slots[self->thread % 32] = uint64_t(value);
    bcl::wait(self->warp->barrier);
    for (int lane = 0; lane < 32; lane++) alike |= uint64_t(self->warp->slots[lane] == uint64_t(value)) << lane;
    bcl::wait(self->warp->barrier);
    return unsigned(alike);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline uint32_t atomicOr(uint32_t* place, uint32_t value) { return __atomic_fetch_or(place, value, __ATOMIC_RELAXED); }
template <class T> T atomicAdd(T* place, T value) { return __atomic_fetch_add(place, value, __ATOMIC_RELAXED); }
inline uint32_t __float_as_uint(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }
inline float __uint_as_float(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }

namespace bcl {

inline unsigned cluster_rank() { return fiber.load(RELAXED)->block->rank; }
inline void cluster_barrier() { wait(*cluster.load(RELAXED)); }
template <class T>
T* of_peer(T* shared, unsigned rank) {
    const char* own = fiber.load(RELAXED)->block->shared.get();
    return reinterpret_cast<T*>(peers[rank]->shared.get() + (reinterpret_cast<const char*>(shared) - own));
}

inline void copy_async(float* shared, const float* global) { *shared = *global; }
inline void copies_arrived() {}
inline float larger_magnitude(float x, float most) {
    return !(std::fabs(x) <= most) && most == most ? std::fabs(x) : most;
}
inline float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

template <int THREADS, int ITEMS>
struct BlockSort {  // in the place of CUB's
    static constexpr int64_t SHARED_BYTES = THREADS * ITEMS * 8;
    static void sort(char* shared, uint32_t (&key)[ITEMS], uint16_t (&sample)[ITEMS]) {
        uint64_t* all = reinterpret_cast<uint64_t*>(shared);
        for (int i = 0; i < ITEMS; i++) all[threadIdx.x * ITEMS + i] = uint64_t(key[i]) << 32 | sample[i];
        __syncthreads();
        if (threadIdx.x == 0)
            std::stable_sort(all, all + THREADS * ITEMS, [](uint64_t a, uint64_t b) { return a >> 32 < b >> 32; });
        __syncthreads();
        for (int i = 0; i < ITEMS; i++) {
            key[i] = uint32_t(all[threadIdx.x * ITEMS + i] >> 32);
            sample[i] = uint16_t(all[threadIdx.x * ITEMS + i]);
        }
    }
};

inline int sort_segments(char* memory, size_t* bytes, uint32_t* const key[2], int32_t* const sample[2],
                         int64_t segments, int64_t length, int* at, void*) {  // in the place of CUB's
    *bytes = 1;
    *at = 1;
    if (!memory) return 0;
    std::vector<int32_t> order(length);
    for (int64_t segment = 0; segment < segments; segment++) {
        const uint32_t* keys = key[0] + segment * length;
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return keys[a] < keys[b]; });
        for (int64_t i = 0; i < length; i++) sample[1][segment * length + i] = sample[0][segment * length + order[i]];
    }
    return 0;
}

inline const char* explain(int error) { return error ? "unknown" : "no error"; }

struct Grid {
    int64_t blocks;
    int threads;
    int64_t shared;
    int cluster = 1;
};

// The blocks from `first` on that form a cluster, until all their threads are done.
inline void run(const Grid& grid, int64_t first, const std::function<void()>& body) {
    Barrier together(grid.threads * grid.cluster);
    std::vector<std::unique_ptr<Warp>> warps;
    std::vector<std::unique_ptr<Fiber>> fibers;
    cluster.store(&together, RELAXED);
    scheduler_known.store(__tsan_get_current_fiber(), RELAXED);
    peers.clear();
    for (int rank = 0; rank < grid.cluster; rank++) {
        auto shared = std::unique_ptr<char[]>(new char[grid.shared]);
        std::memset(shared.get(), 0xA5, grid.shared);  // nothing is zero by itself
        peers.emplace_back(new Block{unsigned(first + rank), unsigned(rank), std::move(shared), Barrier(grid.threads)});
        for (int thread = 0; thread < grid.threads; thread++) {
            if (thread % 32 == 0) warps.emplace_back(new Warp(std::min(32, grid.threads - thread)));
            fibers.emplace_back(new Fiber{unsigned(thread), peers.back().get(), warps.back().get(), &body});
            prepare(*fibers.back(), fibers.size() - 1);
        }
    }
    __tsan_release(&together);
    for (size_t left = fibers.size(); left > 0;)
        for (auto& one : fibers) {
            const Barrier* waits = one->waits.load(RELAXED);
            if (one->done.load(RELAXED) || (waits && waits->turn.load(RELAXED) == one->turn.load(RELAXED))) continue;
            fiber.store(one.get(), RELAXED);
            change(&scheduler, &one->context, one->known);
            left -= one->done.load(RELAXED);
        }
    __tsan_acquire(&together);
}

template <class... P>
int launch(const Grid& grid, void*, void (*kernel)(P...), std::common_type_t<P>... arguments) {
    threads_of_block = unsigned(grid.threads);
    blocks_of_grid = unsigned(grid.blocks);
    const std::function<void()> body = [&] { kernel(arguments...); };
    for (int64_t first = 0; first < grid.blocks; first += grid.cluster) run(grid, first, body);
    return 0;
}

// What stands for the device: tests give it little, so that small sizes take the ways of large ones.
inline int64_t host_multiprocessors = 3, host_shared_bytes = 227 << 10;
inline bool host_clusters = true;
inline int64_t host_clusters_at_once = 1 << 30;

struct Device {
    int error = 0;
    explicit Device(int) {}
    int64_t multiprocessors() { return host_multiprocessors; }
    int64_t shared_bytes() { return host_shared_bytes; }
    bool clusters() { return host_clusters; }
    template <class Kernel>
    int64_t clusters_at_once(const Grid&, Kernel) {
        return host_clusters_at_once;
    }
};

}  // namespace bcl
