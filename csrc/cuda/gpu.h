// What the kernels use beyond plain C++. A file with the same names may stand in for it (see library.cu).
#pragma once
#include <cooperative_groups.h>
#include <cub/block/block_radix_sort.cuh>
#include <cub/device/device_segmented_radix_sort.cuh>
#include <cuda_runtime.h>
#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/transform_iterator.h>

#include <cstdint>
#include <type_traits>

#define SHARED(name) extern __shared__ __align__(16) char name[]

namespace bcl {

// Blocks of one cluster: they may read each other's shared memory (from sm_90 on; elsewhere a cluster is one block).
__device__ inline unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().block_rank();
#else
    return 0;
#endif
}

__device__ inline void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().sync();
#else
    __syncthreads();
#endif
}

template <class T>
__device__ T* of_peer(T* shared, unsigned rank) {
#if __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
#else
    return shared;
#endif
}

// Sends four bytes to shared memory; for the thread that does they are there after copies_arrived().
__device__ inline void copy_async(float* shared, const float* global) {
    const unsigned place = unsigned(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(place), "l"(global) : "memory");
}

__device__ inline void copies_arrived() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// max(|x|, most), NaN where either is.
__device__ inline float larger_magnitude(float x, float most) {
    float larger;
    asm("{ .reg .f32 magnitude; abs.f32 magnitude, %1; max.NaN.f32 %0, magnitude, %2; }"
        : "=f"(larger) : "f"(x), "f"(most));
    return larger;
}

// 1 / (1 + exp(-x)) to some 1e-6, where 1e-5 judges; 0 and 1 for -inf and inf, NaN for NaN.
__device__ inline float sigmoid(float x) { return __fdividef(1, 1 + __expf(-x)); }

// A stable sort of THREADS * ITEMS keys with their samples; thread t holds those from t * ITEMS on.
template <int THREADS, int ITEMS>
struct BlockSort {
    typedef cub::BlockRadixSort<uint32_t, THREADS, ITEMS, uint16_t> Sort;
    static constexpr int64_t SHARED_BYTES = sizeof(typename Sort::TempStorage);
    static __device__ void sort(char* shared, uint32_t (&key)[ITEMS], uint16_t (&sample)[ITEMS]) {
        Sort(*reinterpret_cast<typename Sort::TempStorage*>(shared)).Sort(key, sample);
    }
};

struct SegmentStart {
    int64_t length;
    __host__ __device__ int64_t operator()(int64_t segment) const { return segment * length; }
};

// A stable sort of each of `segments` runs of `length` keys [2][segments, length] with their samples; *at says which of
// the two holds the result. Without memory it only says how many bytes it wants.
inline int sort_segments(char* memory, size_t* bytes, uint32_t* const key[2], int32_t* const sample[2],
                         int64_t segments, int64_t length, int* at, void* stream) {
    cub::DoubleBuffer<uint32_t> keys(key[0], key[1]);
    cub::DoubleBuffer<int32_t> samples(sample[0], sample[1]);
    const auto segment = thrust::make_counting_iterator(int64_t(0));
    const auto start = thrust::make_transform_iterator(segment, SegmentStart{length});
    const int error = cub::DeviceSegmentedRadixSort::SortPairs(
        memory, *bytes, keys, samples, segments * length, segments, start, start + 1, 0, 32, cudaStream_t(stream));
    *at = samples.selector;
    return error;
}

// How a kernel is launched.
struct Grid {
    int64_t blocks;
    int threads;
    int64_t shared;   // bytes
    int cluster = 1;  // blocks that share their shared memory; blocks is a multiple of it
};

// What CUDA wants to know of a launch.
template <class Kernel>
struct Launch {
    cudaLaunchAttribute attribute;
    cudaLaunchConfig_t config = {};
    int error = cudaSuccess;
    Launch(const Grid& grid, void* stream, Kernel kernel) {
        if (grid.shared > 48 << 10)
            error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.shared));
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {unsigned(grid.cluster), 1, 1};
        config.gridDim = dim3(unsigned(grid.blocks));
        config.blockDim = dim3(unsigned(grid.threads));
        config.dynamicSmemBytes = size_t(grid.shared);
        config.stream = cudaStream_t(stream);
        config.attrs = &attribute;
        config.numAttrs = grid.cluster > 1;
    }
};

template <class... P>
int launch(const Grid& grid, void* stream, void (*kernel)(P...), std::common_type_t<P>... arguments) {
    if (grid.blocks == 0) return cudaSuccess;
    Launch<void (*)(P...)> launched(grid, stream, kernel);
    return launched.error ? launched.error : cudaLaunchKernelEx(&launched.config, kernel, arguments...);
}

inline const char* explain(int error) { return cudaGetErrorString(cudaError_t(error)); }

// The device of a call, for as long as it lasts.
class Device {
    int before = 0, now;

  public:
    int error;
    explicit Device(int device) : now(device) {
        error = cudaGetDevice(&before);
        if (!error && before != now) error = cudaSetDevice(now);
    }
    ~Device() {
        if (before != now) cudaSetDevice(before);
    }
    int64_t ask(cudaDeviceAttr attribute) {
        int value = 0;
        if (!error) error = cudaDeviceGetAttribute(&value, attribute, now);
        return value;
    }
    int64_t multiprocessors() { return ask(cudaDevAttrMultiProcessorCount); }
    int64_t shared_bytes() { return ask(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
    bool clusters() { return ask(cudaDevAttrClusterLaunch) != 0; }
    template <class Kernel>
    int64_t clusters_at_once(const Grid& grid, Kernel kernel) {
        int clusters = 0;
        Launch<Kernel> launched(grid, nullptr, kernel);
        if (!error) error = launched.error;
        if (!error) error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &launched.config);
        return clusters;
    }
};

}  // namespace bcl
