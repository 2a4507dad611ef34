// The arithmetic of launches, in plain C++: how a stage is cut for a size and a device. Tested on the host.
#pragma once
#include <cstdint>

namespace bcl {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t aligned(int64_t bytes) { return ceil_div(bytes, 256) * 256; }  // parts of one scratch

// --- Competition -----------------------------------------------------------------------------------------------------

constexpr int HOLDING_THREADS = 384;   // of a block whose neighbors are in registers: with more they would not do
constexpr int READING_THREADS = 768;   // of one that reads them one by one, or of a cluster that reads them at all
constexpr int FORCES_WARPS = 12;
constexpr int OWNED = 22;              // most features of a thread whose neighbors stay in registers: 8,448 a block
constexpr int64_t HELD = 8;            // most neighbors of each that do, or are read at once
constexpr int64_t HEAD = 2048;         // bytes of shared memory before the strengths
constexpr int64_t MAX_CLUSTER = 8;    // blocks; more are not portable
constexpr int64_t ANY = 1 << 30;       // clusters at once: not yet asked

enum Where { ONE_BLOCK, CLUSTER, MEMORY };  // where the strengths of a tile of samples lie
enum Near { IN_REGISTERS, EIGHT_AT_ONCE, ONE_BY_ONE };  // how a feature's neighbors are read

struct CompetitionForm {
    int near;     // IN_REGISTERS where they fit, else EIGHT_AT_ONCE where there are no more
    int threads;  // of a block: HOLDING_THREADS where IN_REGISTERS, else 768 or 1,024
    int cluster;  // a cluster of blocks for four rows, where one block holds fewer
};

struct CompetitionPlan {
    int where, rows, near, threads, owned;  // rows: samples of a tile; owned: most features of a thread IN_REGISTERS
    int64_t cluster;         // blocks that share a tile
    int64_t slice;           // features of a block
    bool sums_shared;        // the sums over the batch fit beside the strengths
    int64_t groups;          // clusters, each of which takes every groups-th tile
    int64_t shared;          // bytes of a block
    // Bytes of scratch: results; sums of the groups; tiles, where MEMORY; packed neighbors.
    int64_t results, partial, strengths, ids;
    int64_t scratch() const { return results + partial + strengths + ids; }
};

// Features go to the blocks of a cluster in chunks of 32, so that every block reads whole cache lines.
constexpr int64_t slice_of(int64_t D, int64_t cluster) { return ceil_div(D, 32 * cluster) * 32; }

// clusters: how many the device runs at once, ANY before it was asked, 0 where it knows none.
inline CompetitionPlan competition_plan(int64_t B, int64_t D, int64_t k, int64_t multiprocessors, int64_t shared,
                                        int64_t clusters, CompetitionForm form) {
    CompetitionPlan plan = {MEMORY, 4, ONE_BY_ONE, READING_THREADS, 0, 1, 0, false, 0, HEAD, 0, 0, 0, 0};
    const bool few = D <= 1 << 16;  // a feature's number takes two bytes
    auto fits = [&](int64_t rows, int64_t cluster) { return HEAD + slice_of(D, cluster) * rows * 4 <= shared; };
    for (int rows : {1, 2, 4})
        if (few && fits(rows, 1)) plan.where = ONE_BLOCK, plan.rows = rows;
    if (clusters > 0 && (plan.where == MEMORY || (plan.rows < 4 && form.cluster)))
        for (int64_t cluster = MAX_CLUSTER; cluster > 1 && fits(4, cluster); cluster /= 2)
            plan.where = CLUSTER, plan.rows = 4, plan.cluster = cluster;
    plan.slice = slice_of(D, plan.cluster);
    if (plan.where != MEMORY) plan.shared += plan.slice * plan.rows * 4;
    plan.sums_shared = plan.where != MEMORY && plan.shared + plan.slice * 8 <= shared;
    if (plan.sums_shared) plan.shared += plan.slice * 8;
    if (k <= HELD && few && plan.where != MEMORY) {
        const int64_t features = ceil_div(plan.slice, HOLDING_THREADS);
        plan.near = form.near == IN_REGISTERS && plan.rows == 4 && features <= OWNED ? IN_REGISTERS : EIGHT_AT_ONCE;
        if (plan.near == IN_REGISTERS)
            plan.owned = features <= OWNED / 2 && plan.where == ONE_BLOCK ? OWNED / 2 : OWNED;
        if (plan.near == IN_REGISTERS || (form.near == EIGHT_AT_ONCE && plan.where == ONE_BLOCK))
            plan.threads = form.threads;
    }
    const int64_t at_once = plan.where == CLUSTER ? least(clusters, multiprocessors / plan.cluster) : multiprocessors;
    plan.groups = least(ceil_div(B, plan.rows), most(at_once, 1));
    plan.results = (3 * B + 2 * D) * 4;
    plan.partial = plan.groups * 2 * D * 4;
    if (plan.where == MEMORY) plan.strengths = plan.groups * D * plan.rows * 4;
    if (plan.near == EIGHT_AT_ONCE) plan.ids = D * HELD * 2;
    if (plan.near == ONE_BY_ONE) plan.ids = D * k * (plan.where == ONE_BLOCK ? 2 : 4);
    for (int64_t* bytes : {&plan.results, &plan.partial, &plan.strengths, &plan.ids}) *bytes = aligned(*bytes);
    return plan;
}

// --- Selection -------------------------------------------------------------------------------------------------------

constexpr int COLUMNS = 32;  // of a block: a lane each
constexpr int FIX_THREADS = 256, ORDER_THREADS = 1024;
constexpr int ORDER_BINS = 512;      // of the needs
constexpr int MAX_BINS = 1024;      // of the keys of a column
constexpr int64_t NARROW = 1 << 16;  // fewer samples than this are counted in 16 bits, in twice the bins
constexpr int SURVIVORS = 64;        // so many of a column are kept; beyond, the column is sorted; at least r
constexpr int SEGMENT = 1024;        // samples of a task that counts

struct SelectionForm {
    int ahead, bins, warps, round;  // samples a warp has on their way; bins of narrow counts; samples of a round
};

struct SelectionPlan {
    int64_t blocks, shared;       // of the kernel that reads everything
    int64_t bins;                 // of a column
    int64_t order;                // bytes of shared memory of the kernel that orders the samples
    int64_t counting, sorting;    // blocks that count ranks, and that sort columns
    int64_t lists, survivors, visits, sorts;  // bytes of scratch
    int64_t scratch() const { return lists + survivors + visits + sorts; }
};

inline SelectionPlan selection_plan(int64_t B, int64_t D, int64_t r, int64_t multiprocessors, SelectionForm form) {
    SelectionPlan plan = {};
    plan.blocks = ceil_div(D, COLUMNS);
    plan.bins = B < NARROW ? form.bins : form.bins / 2;
    // Histogram, what was found, limits of the keys, the best lower bounds, and what a round found.
    plan.shared = 4 * COLUMNS * (form.bins / 2 + 1 + 5 + form.warps + r + form.round);
    plan.order = 4 * (ORDER_BINS * (ORDER_THREADS / 32 + 1) + 3 * ORDER_THREADS / 32);
    plan.counting = least(plan.blocks * ceil_div(B, SEGMENT), 4 * multiprocessors);
    plan.sorting = most(1, least(multiprocessors, D / 16));  // their scratch is a quarter of the activation
    plan.lists = aligned(32 + 4 * (plan.blocks + 2 * D)) + aligned(8 * D);
    plan.survivors = 3 * plan.blocks * SURVIVORS * COLUMNS * 4;
    plan.visits = aligned(8 * B);
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
