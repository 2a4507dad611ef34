// The library on the host, for tests: the same interface, and the arithmetic of its launches.
#define BCL_HOST "host.h"
#include "library.cu"

API void bcl_host_device(int64_t multiprocessors, int64_t shared_bytes, int clusters, int64_t clusters_at_once) {
    bcl::host_multiprocessors = multiprocessors;
    bcl::host_shared_bytes = shared_bytes;
    bcl::host_clusters = clusters != 0;
    bcl::host_clusters_at_once = clusters_at_once;
}

API bcl::CompetitionPlan bcl_host_competition_plan(int64_t B, int64_t D, int64_t k, int64_t multiprocessors,
                                                   int64_t shared, int64_t clusters, int near, int threads,
                                                   int cluster) {
    return bcl::competition_plan(B, D, k, multiprocessors, shared, clusters, {near, threads, cluster});
}

API bcl::SelectionPlan bcl_host_selection_plan(int64_t B, int64_t D, int64_t r, int64_t multiprocessors, int ahead,
                                               int bins, int warps, int round) {
    return bcl::selection_plan(B, D, r, multiprocessors, {ahead, bins, warps, round});
}

API bcl::RankPlan bcl_host_rank_plan(int64_t B, int64_t D) { return bcl::rank_plan(B, D); }
