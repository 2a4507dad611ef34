// The C interface of the CUDA stages: device pointers, sizes and strides in elements, the device and its stream. It
// knows nothing of torch. host.cpp makes a library of it that runs the same kernels on the host, for tests.
//
// A stage works in scratch memory that the caller provides: called without, it only says in *bytes how much it wants.
// Every function returns 0 or a number that bcl_cuda_error explains.
#ifdef BCL_HOST
#include "host.h"
#else
#include "gpu.h"
#endif

#include "competition.cuh"
#include "rank.cuh"
#include "selection.cuh"

#define API extern "C" __attribute__((visibility("default")))

namespace bcl {
namespace {

int competition(Competition c, Forces f, char* memory, size_t* bytes, int device_number, void* stream) {
    Device device(device_number);
    const CompetitionPlan plan =
        competition_plan(c.B, c.D, c.k, device.multiprocessors(), device.shared_bytes(), device.clusters());
    if (device.error || !memory) return *bytes = size_t(plan.scratch()), device.error;
    c.partial = reinterpret_cast<float*>(memory);
    c.strengths = memory + plan.partial;
    void* ids = memory + plan.partial + plan.strengths;
    c.ids = ids;
    c.slice = plan.slice;
    c.sums_shared = plan.sums_shared;
    while (1 << c.cluster_log < plan.cluster) c.cluster_log++;
    int error = launch({least(ceil_div(c.B, 8), 4096), 256, 0}, stream, norm_kernel, c);
    if (!error && !plan.owned) {
        const Grid packing = {least(ceil_div(c.D * c.k, 256), 1024), 256, 0};
        auto* narrow = static_cast<uint16_t*>(ids);
        auto* wide = static_cast<uint32_t*>(ids);
        error = plan.where == ONE_BLOCK ? launch(packing, stream, pack_kernel<uint16_t>, c.neighbors, c.D, c.k, narrow)
                                        : launch(packing, stream, pack_kernel<uint32_t>, c.neighbors, c.D, c.k, wide);
    }
    void (*kernel)(Competition) = competition_kernel<MEMORY, 4, 0, uint32_t>;
    if (plan.where == CLUSTER)
        kernel = plan.owned ? competition_kernel<CLUSTER, 4, OWNED, uint16_t>
                            : competition_kernel<CLUSTER, 4, 0, uint32_t>;
    else if (plan.where == ONE_BLOCK)
        kernel = plan.owned == OWNED ? competition_kernel<ONE_BLOCK, 4, OWNED, uint16_t>
                 : plan.owned        ? competition_kernel<ONE_BLOCK, 4, OWNED / 2, uint16_t>
                 : plan.rows == 4    ? competition_kernel<ONE_BLOCK, 4, 0, uint16_t>
                 : plan.rows == 2    ? competition_kernel<ONE_BLOCK, 2, 0, uint16_t>
                                     : competition_kernel<ONE_BLOCK, 1, 0, uint16_t>;
    const Grid grid = {plan.groups * plan.cluster, COMPETITION_THREADS, plan.shared, int(plan.cluster)};
    if (!error) error = launch(grid, stream, kernel, c);
    f.partial = c.partial;
    f.groups = plan.groups;
    const Grid last = {ceil_div(c.D, 32), COMPETITION_THREADS, COMPETITION_WARPS * 2 * 32 * 4};
    return error ? error : launch(last, stream, forces_kernel, f);
}

int selection(Selection s, char* memory, size_t* bytes, int device_number, void* stream) {
    Device device(device_number);
    const SelectionPlan plan = selection_plan(s.B, s.D, s.r, device.multiprocessors());
    if (device.error || !memory) return *bytes = size_t(plan.scratch()), device.error;
    s.open = reinterpret_cast<int32_t*>(memory);
    s.counted = s.open + 2;
    s.sorted = s.counted + s.D;
    s.survivors = s.sorted + s.D;
    s.survivor = reinterpret_cast<int32_t*>(memory + plan.lists);
    s.memory = reinterpret_cast<uint32_t*>(memory + plan.lists + plan.survivors);
    int error = clear(s.open, 2 * sizeof(int32_t), stream);
    if (!error) error = launch({plan.blocks, SELECTION_THREADS, plan.shared}, stream, selection_kernel, s);
    if (!error) error = launch({plan.counting, FIX_THREADS, 0}, stream, selection_counting_kernel, s);
    return error ? error : launch({plan.sorting, FIX_THREADS, 0}, stream, selection_sorting_kernel, s);
}

template <int THREADS, int ITEMS>
int rank_in_blocks(const Rank& r, void* stream) {
    const Grid grid = {r.D, THREADS, BlockSort<THREADS, ITEMS>::SHARED_BYTES};
    return launch(grid, stream, rank_block_kernel<THREADS, ITEMS>, r);
}

int rank(Rank r, char* memory, size_t* bytes, int device_number, void* stream) {
    Device device(device_number);
    const RankPlan plan = rank_plan(r.B, r.D);
    uint32_t* key[2];
    int32_t* sample[2];
    for (int i = 0; i < 2; i++) {
        key[i] = reinterpret_cast<uint32_t*>(memory + i * plan.keys);
        sample[i] = reinterpret_cast<int32_t*>(memory + (2 + i) * plan.keys);
    }
    size_t sorting = 0;
    int at = 0, error = device.error;
    if (plan.keys && !error) error = sort_segments(nullptr, &sorting, key, sample, plan.columns, r.B, &at, stream);
    if (error || !memory) return *bytes = size_t(4 * plan.keys) + sorting, error;
    if (r.B <= COUNTED)
        return launch({ceil_div(r.D, COLUMNS), COUNTING_THREADS, r.B * COLUMNS * 4}, stream, rank_counting_kernel, r);
    if (r.B <= 512) return rank_in_blocks<128, 4>(r, stream);
    if (r.B <= 2048) return rank_in_blocks<256, 8>(r, stream);
    if (r.B <= BLOCK_SORTED) return rank_in_blocks<512, 16>(r, stream);
    for (; r.first < r.D && !error; r.first += plan.columns) {
        const int64_t columns = least(plan.columns, r.D - r.first), high = ceil_div(r.B, TILE);
        const Grid pack = {ceil_div(columns, TILE) * high, TILE * 8, TILE * (TILE + 1) * 4};
        error = launch(pack, stream, rank_pack_kernel, r, columns, key[0], sample[0]);
        if (!error) error = sort_segments(memory + 4 * plan.keys, &sorting, key, sample, columns, r.B, &at, stream);
        const Grid scatter = {ceil_div(columns, 8) * high, TILE * 8, 0};
        if (!error) error = launch(scatter, stream, rank_scatter_kernel, r, columns, sample[at]);
    }
    return error;
}

}  // namespace
}  // namespace bcl

// The number changes with any signature below.
API int bcl_cuda_abi() { return 1; }

API int bcl_cuda_on_host() {
#ifdef BCL_HOST
    return 1;
#else
    return 0;
#endif
}

API const char* bcl_cuda_error(int error) { return bcl::explain(error); }

API int bcl_cuda_competition(const float* activation, int64_t stride_b, int64_t stride_d, int64_t B, int64_t D,
                             const int64_t* neighbors, int64_t k, float temperature, const float* x, int64_t x_stride_b,
                             int64_t x_stride_n, int64_t N, int coupled, float rescue_onset, float pull_onset,
                             float* rank_score, float* coverage, float* novelty, float* win_rate, int64_t* winner,
                             int64_t* pair_feature, float* pair_pull, float* x_inverse_norm, float* need,
                             float* winner_share, float* som_strength, void* memory, size_t* bytes, int device,
                             void* stream) {
    return bcl::competition({activation, stride_b, stride_d, B, D, neighbors, k, temperature, x, x_stride_b, x_stride_n,
                             N, rank_score, coverage, winner, pair_feature, pair_pull, x_inverse_norm, need, nullptr,
                             nullptr, nullptr, 0, 0, 0},
                            {nullptr, 0, B, D, coupled, rescue_onset, pull_onset, novelty, win_rate, winner_share,
                             som_strength},
                            static_cast<char*>(memory), bytes, device, stream);
}

API int bcl_cuda_selection(const float* activation, int64_t stride_b, int64_t stride_d, int64_t B, int64_t D,
                           const float* bias, const float* x_inverse_norm, const float* need, const float* order_need,
                           const int64_t* order, int64_t r, int soft, int64_t* rows, float* shares, void* memory,
                           size_t* bytes, int device, void* stream) {
    return bcl::selection({activation, stride_b, stride_d, B, D, bias, x_inverse_norm, need, order_need, order, r, soft,
                           rows, shares, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr},
                          static_cast<char*>(memory), bytes, device, stream);
}

// kind: 0 for int64, 1 for int32, 2 for float32 ranks.
API int bcl_cuda_rank(const float* key, int64_t stride_b, int64_t stride_d, int64_t B, int64_t D, void* rank, int kind,
                      void* memory, size_t* bytes, int device, void* stream) {
    const bcl::Rank task = {key, stride_b, stride_d, B, D, {rank, kind}, 0};
    return bcl::rank(task, static_cast<char*>(memory), bytes, device, stream);
}

// CUB's sort of runs [segments, length] alone, to measure ranks against.
API int bcl_cuda_sort(uint32_t* key, uint32_t* other_key, int32_t* sample, int32_t* other_sample, int64_t segments,
                      int64_t length, void* memory, size_t* bytes, int device, void* stream) {
    bcl::Device on(device);
    uint32_t* const keys[2] = {key, other_key};
    int32_t* const samples[2] = {sample, other_sample};
    int at = 0;
    if (on.error) return on.error;
    return bcl::sort_segments(static_cast<char*>(memory), bytes, keys, samples, segments, length, &at, stream);
}
