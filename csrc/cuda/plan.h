// The arithmetic of launches, in plain C++: how a stage is cut for a size and a device. Tested on the host.
#pragma once
#include <cstdint>

namespace bcl {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t aligned(int64_t bytes) { return ceil_div(bytes, 256) * 256; }  // parts of one scratch

// --- Competition -----------------------------------------------------------------------------------------------------

constexpr int COMPETITION_THREADS = 384;  // with more, a thread's registers would not do
constexpr int OWNED = 22;                 // most features of a thread whose neighbours stay in registers: 8,448 a block
constexpr int64_t HELD = 8;               // most neighbours of each that do
constexpr int64_t HEAD = 2048;            // bytes of shared memory before the strengths
constexpr int64_t MOST_CLUSTER = 8;       // blocks; more are not portable

enum Where { ONE_BLOCK, CLUSTER, MEMORY };  // where the strengths of a tile of samples lie

struct CompetitionPlan {
    int where, rows, owned;  // rows: samples of a tile; owned: features of a thread with neighbours in registers, or 0
    int64_t cluster;         // blocks that share a tile
    int64_t slice;           // features of a block
    bool sums_shared;        // the sums over the batch fit beside the strengths
    int64_t groups;          // clusters, each of which takes every groups-th tile
    int64_t shared;          // bytes of a block
    int64_t partial, strengths, ids;  // bytes of scratch: sums of the groups; tiles, where MEMORY; packed neighbours
    int64_t scratch() const { return partial + strengths + ids; }
};

// Features go to the blocks of a cluster in chunks of 32, so that every block reads whole cache lines.
constexpr int64_t slice_of(int64_t D, int64_t cluster) { return ceil_div(D, 32 * cluster) * 32; }

inline CompetitionPlan competition_plan(int64_t B, int64_t D, int64_t k, int64_t multiprocessors, int64_t shared,
                                        bool clusters) {
    CompetitionPlan plan = {MEMORY, 4, 0, 1, 0, false, 0, HEAD, 0, 0, 0};
    const bool few = D <= 1 << 16;  // a feature's number takes two bytes
    auto fits = [&](int64_t rows, int64_t cluster) { return HEAD + slice_of(D, cluster) * rows * 4 <= shared; };
    for (int rows : {1, 2, 4})
        if (few && fits(rows, 1)) plan.where = ONE_BLOCK, plan.rows = rows;
    if (plan.where == MEMORY && clusters)
        for (int64_t cluster = MOST_CLUSTER; cluster > 1 && fits(4, cluster); cluster /= 2)
            plan.where = CLUSTER, plan.cluster = cluster;
    plan.slice = slice_of(D, plan.cluster);
    if (plan.where != MEMORY) plan.shared += plan.slice * plan.rows * 4;
    plan.sums_shared = plan.where != MEMORY && plan.shared + plan.slice * 8 <= shared;
    if (plan.sums_shared) plan.shared += plan.slice * 8;
    const int64_t features = ceil_div(plan.slice, COMPETITION_THREADS);
    if (k <= HELD && plan.rows == 4 && few && features <= OWNED && plan.where != MEMORY)
        plan.owned = features <= OWNED / 2 && plan.where == ONE_BLOCK ? OWNED / 2 : OWNED;
    plan.groups = least(ceil_div(B, plan.rows), most(multiprocessors / plan.cluster, 1));
    plan.partial = plan.groups * 2 * D * 4;
    if (plan.where == MEMORY) plan.strengths = plan.groups * D * plan.rows * 4;
    if (!plan.owned) plan.ids = D * k * (plan.where == ONE_BLOCK ? 2 : 4);
    for (int64_t* bytes : {&plan.partial, &plan.strengths, &plan.ids}) *bytes = aligned(*bytes);
    return plan;
}

// --- Selection -------------------------------------------------------------------------------------------------------

constexpr int COLUMNS = 32;  // of a block: a lane each
constexpr int SELECTION_WARPS = 16, FIX_THREADS = 256;
constexpr int BINS = 512;       // of the histogram of a column
constexpr int ROUND = 128;      // at most so many samples are visited between two looks at the threshold
constexpr int SURVIVORS = 64;   // so many of a column are kept; beyond, the column is sorted; at least r

struct SelectionPlan {
    int64_t blocks, shared;          // of the kernel that reads everything
    int64_t counting, sorting;       // blocks that count ranks, and that sort columns
    int64_t lists, survivors, sorts;  // bytes of scratch
    int64_t scratch() const { return lists + survivors + sorts; }
};

inline SelectionPlan selection_plan(int64_t B, int64_t D, int64_t r, int64_t multiprocessors) {
    SelectionPlan plan = {};
    plan.blocks = ceil_div(D, COLUMNS);
    // Histogram, thresholds and limits of the keys, the best lower bounds, and what a round found.
    plan.shared = 4 * COLUMNS * (BINS + 1 + 4 + SELECTION_WARPS + r + ROUND);
    plan.counting = least(D, 2 * multiprocessors);
    plan.sorting = most(1, least(multiprocessors, D / 16));  // their scratch is a quarter of the activation
    plan.lists = aligned(4 * (2 + 3 * D));
    plan.survivors = aligned(4 * D * SURVIVORS);
    plan.sorts = plan.sorting * B * 16;
    return plan;
}

// --- Rank ------------------------------------------------------------------------------------------------------------

constexpr int64_t COUNTED = 128, BLOCK_SORTED = 8192;  // most samples whose ranks are counted; that one block sorts
constexpr int64_t CHUNK = 1 << 26;                     // elements that are sorted at once beyond

struct RankPlan {
    int64_t columns;  // sorted at once
    int64_t keys;     // bytes of each of the two sets of keys, and of samples
};

inline RankPlan rank_plan(int64_t B, int64_t D) {
    if (B <= BLOCK_SORTED) return {D, 0};
    const int64_t columns = most(1, least(D, CHUNK / B));
    return {columns, aligned(columns * B * 4)};
}

}  // namespace bcl
