// The C interface of the CUDA stages: a struct of interface.h, scratch memory, the device and its stream. It knows
// nothing of torch. BCL_HOST names a file that stands in for gpu.h where the same kernels run on the host, for tests.
//
// A stage works in scratch memory of *bytes that the caller provides: called without, it only says how many it wants,
// always the same for the same sizes, device and form. Where two forms of a kernel compete, the caller says which.
// Nothing waits for the device, and no launch depends on what lies in its memory. Every function returns 0 or a number
// that bcl_cuda_error explains.
#ifdef BCL_HOST
#include BCL_HOST
#else
#include "gpu.h"
#endif

#include "competition.cuh"
#include "rank.cuh"
#include "selection.cuh"
#include "selection_open.cuh"
#include "selection_order.cuh"

#define API extern "C" __attribute__((visibility("default")))
#include "layout.h"

namespace bcl {
namespace {

constexpr int NOT_COMPILED = -1, TOO_LITTLE = -2, NOT_SERVED = -3;  // CUDA's errors are positive

// What a kernel takes, of which a call says a part.
template <class Task, class Call>
Task task_of(const Call& call) {
    Task task = {};
    static_cast<Call&>(task) = call;
    return task;
}

// Whether a call is over, for there is an error or it only asked.
bool over(int* error, const Device& device, int64_t wanted, const char* memory, size_t* bytes) {
    *error = device.error;
    if (!memory) *bytes = size_t(wanted);
    else if (!*error && int64_t(*bytes) < wanted) *error = TOO_LITTLE;
    return *error || !memory;
}

template <int THREADS>
auto reading_eight(int rows) {
    return rows == 4   ? competition_kernel<ONE_BLOCK, 4, THREADS, 0, Eight>
           : rows == 2 ? competition_kernel<ONE_BLOCK, 2, THREADS, 0, Eight>
                       : competition_kernel<ONE_BLOCK, 1, THREADS, 0, Eight>;
}

void (*competition_kernel_of(const CompetitionPlan& plan))(Competition) {
    if (plan.near == IN_REGISTERS)
        return plan.where == CLUSTER ? competition_kernel<CLUSTER, 4, HOLDING_THREADS, OWNED, Eight>
               : plan.owned == OWNED ? competition_kernel<ONE_BLOCK, 4, HOLDING_THREADS, OWNED, Eight>
                                     : competition_kernel<ONE_BLOCK, 4, HOLDING_THREADS, OWNED / 2, Eight>;
    if (plan.near == EIGHT_AT_ONCE)
        return plan.where == CLUSTER  ? competition_kernel<CLUSTER, 4, READING_THREADS, 0, Eight>
               : plan.threads == 1024 ? reading_eight<1024>(plan.rows)
                                      : reading_eight<768>(plan.rows);
    return plan.where == MEMORY    ? competition_kernel<MEMORY, 4, READING_THREADS, 0, uint32_t>
           : plan.where == CLUSTER ? competition_kernel<CLUSTER, 4, READING_THREADS, 0, uint32_t>
           : plan.rows == 4        ? competition_kernel<ONE_BLOCK, 4, READING_THREADS, 0, uint16_t>
           : plan.rows == 2        ? competition_kernel<ONE_BLOCK, 2, READING_THREADS, 0, uint16_t>
                                   : competition_kernel<ONE_BLOCK, 1, READING_THREADS, 0, uint16_t>;
}

bool compiled(const CompetitionForm& form) {
    if (form.cluster != 0 && form.cluster != 1) return false;
    if (form.near == IN_REGISTERS) return form.threads == HOLDING_THREADS;
    return form.near == EIGHT_AT_ONCE && (form.threads == 768 || form.threads == 1024);
}

int competition(Competition c, CompetitionForm form, char* memory, size_t* bytes, int device_number, void* stream) {
    if (!compiled(form)) return NOT_COMPILED;
    if (c.B < 0 || c.D < 1 || c.k < 1) return NOT_SERVED;
    Device device(device_number);
    auto plan_for = [&](int64_t clusters) {
        return competition_plan(c.B, c.D, c.k, device.multiprocessors(), device.shared_bytes(), clusters, form);
    };
    auto grid_of = [](const CompetitionPlan& plan) {
        return Grid{plan.groups * plan.cluster, plan.threads, plan.shared, int(plan.cluster)};
    };
    CompetitionPlan plan = plan_for(device.clusters() ? ANY : 0);
    if (plan.where == CLUSTER) plan = plan_for(device.clusters_at_once(grid_of(plan), competition_kernel_of(plan)));
    int error;
    if (over(&error, device, plan.scratch(), memory, bytes)) return error;
    c.coverage = reinterpret_cast<float*>(memory);
    Forces f = {};
    f.B = c.B, f.D = c.D, f.coupled = c.coupled;
    f.rescue_onset = c.rescue_onset, f.pull_onset = c.pull_onset;
    f.winner_share = c.winner_share, f.som_strength = c.som_strength;
    f.novelty = c.coverage + c.B;
    f.win_rate = f.novelty + c.D;
    c.x_inverse_norm = f.win_rate + c.D;
    c.need = c.x_inverse_norm + c.B;
    memory += plan.results;
    c.partial = reinterpret_cast<float*>(memory);
    c.strengths = memory + plan.partial;
    void* ids = memory + plan.partial + plan.strengths;
    c.ids = ids;
    c.slice = plan.slice;
    c.sums_shared = plan.sums_shared;
    while (1 << c.cluster_log < plan.cluster) c.cluster_log++;
    error = launch({least(ceil_div(c.B, 8), 4096), 256, 0}, stream, norm_kernel, c);
    if (error) return error;
    const Grid packing = {least(ceil_div(c.D * c.k, 256), 1024), 256, 0};
    if (plan.near == EIGHT_AT_ONCE) {
        error = launch(packing, stream, pack_eight_kernel, c.neighbors, c.D, c.k, static_cast<Eight*>(ids));
    } else if (plan.near == ONE_BY_ONE) {
        auto* narrow = static_cast<uint16_t*>(ids);
        auto* wide = static_cast<uint32_t*>(ids);
        error = plan.where == ONE_BLOCK ? launch(packing, stream, pack_kernel<uint16_t>, c.neighbors, c.D, c.k, narrow)
                                        : launch(packing, stream, pack_kernel<uint32_t>, c.neighbors, c.D, c.k, wide);
    }
    if (!error) error = launch(grid_of(plan), stream, competition_kernel_of(plan), c);
    f.partial = c.partial;
    f.groups = plan.groups;
    const Grid last = {ceil_div(c.D, 32), FORCES_WARPS * 32, FORCES_WARPS * 2 * 32 * 4};
    return error ? error : launch(last, stream, forces_kernel, f);
}

struct SelectionKernels {
    SelectionForm form;
    void (*narrow)(Selection), (*wide)(Selection);
};

template <int AHEAD, int BINS, int WARPS, int ROUND>
constexpr SelectionKernels selection_kernels = {{AHEAD, BINS, WARPS, ROUND},
                                                selection_kernel<BINS, true, AHEAD, WARPS, ROUND>,
                                                selection_kernel<BINS / 2, false, AHEAD, WARPS, ROUND>};

constexpr SelectionKernels SELECTIONS[] = {
    selection_kernels<8, 1024, 16, 128>, selection_kernels<16, 1024, 16, 128>, selection_kernels<8, 512, 16, 128>,
    selection_kernels<8, 1024, 16, 256>, selection_kernels<16, 512, 8, 128>};

int selection(Selection s, SelectionForm form, char* memory, size_t* bytes, int device_number, void* stream) {
    const SelectionKernels* found = nullptr;
    for (const SelectionKernels& each : SELECTIONS) {
        const SelectionForm& one = each.form;
        if (one.ahead == form.ahead && one.bins == form.bins && one.warps == form.warps && one.round == form.round)
            found = &each;
    }
    if (!found) return NOT_COMPILED;
    if (s.D < 1 || s.r < 1 || s.r > s.B || s.r > SURVIVORS) return NOT_SERVED;
    Device device(device_number);
    const SelectionPlan plan = selection_plan(s.B, s.D, s.r, device.multiprocessors(), form);
    int error;
    if (over(&error, device, plan.scratch(), memory, bytes)) return error;
    s.column_bins = int(plan.bins);
    s.open = reinterpret_cast<Open*>(memory);
    s.stripes = reinterpret_cast<int32_t*>(memory + 32);
    s.columns = s.stripes + plan.blocks;
    s.survivors = s.columns + s.D;
    s.limits = reinterpret_cast<Limits*>(memory + plan.lists - aligned(8 * s.D));
    s.survivor = reinterpret_cast<int32_t*>(memory + plan.lists);
    s.below = s.survivor + plan.blocks * SURVIVORS * COLUMNS;
    s.key = reinterpret_cast<float*>(s.below + plan.blocks * SURVIVORS * COLUMNS);
    s.visits = reinterpret_cast<Visit*>(memory + plan.lists + plan.survivors);
    s.memory = reinterpret_cast<uint32_t*>(memory + plan.lists + plan.survivors + plan.visits);
    error = launch({1, ORDER_THREADS, plan.order}, stream, selection_order_kernel, s);
    const Grid whole = {plan.blocks, form.warps * 32, plan.shared};
    if (!error) error = launch(whole, stream, s.B < NARROW ? found->narrow : found->wide, s);
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
    if (error || over(&error, device, 4 * plan.keys + int64_t(sorting), memory, bytes)) return error;
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

// The number changes with any signature below, and with any struct of interface.h.
API int bcl_cuda_abi() { return 3; }

#define TEXT(words) #words
#define TEXT_OF(words) TEXT(words)
#ifndef BCL_BUILD
#define BCL_BUILD unknown
#endif

// What setup.py knows the library of the same sources by, whatever became of its file's times.
API const char* bcl_cuda_build() { return "bcl_cuda_build " TEXT_OF(BCL_BUILD); }

API int bcl_cuda_on_host() {
#ifdef BCL_HOST
    return 1;
#else
    return 0;
#endif
}

API const char* bcl_cuda_error(int error) {
    if (error == bcl::NOT_COMPILED) return "this combination of the launch table is not compiled";
    if (error == bcl::NOT_SERVED) return "sizes that it does not take";
    return error == bcl::TOO_LITTLE ? "too little scratch memory" : bcl::explain(error);
}

// The scratch memory begins with results: coverage [B], novelty [D], win_rate [D], 1 / |X_b| [B], need [B].
API int bcl_cuda_competition(const bcl::CompetitionCall* call, void* memory, size_t* bytes, int device, void* stream) {
    const bcl::CompetitionForm form = {call->near, call->threads, call->cluster};
    const auto task = bcl::task_of<bcl::Competition>(*call);
    return bcl::competition(task, form, static_cast<char*>(memory), bytes, device, stream);
}

API int bcl_cuda_selection(const bcl::SelectionCall* call, void* memory, size_t* bytes, int device, void* stream) {
    const bcl::SelectionForm form = {call->ahead, call->bins, call->warps, call->round};
    const auto task = bcl::task_of<bcl::Selection>(*call);
    return bcl::selection(task, form, static_cast<char*>(memory), bytes, device, stream);
}

API int bcl_cuda_rank(const bcl::RankCall* call, void* memory, size_t* bytes, int device, void* stream) {
    return bcl::rank(bcl::task_of<bcl::Rank>(*call), static_cast<char*>(memory), bytes, device, stream);
}

API int bcl_cuda_sort(const bcl::SortCall* call, void* memory, size_t* bytes, int device, void* stream) {
    bcl::Device on(device);
    uint32_t* const keys[2] = {call->key, call->other_key};
    int32_t* const samples[2] = {call->sample, call->other_sample};
    int at = 0;
    if (on.error) return on.error;
    return bcl::sort_segments(static_cast<char*>(memory), bytes, keys, samples, call->segments, call->length, &at,
                              stream);
}
