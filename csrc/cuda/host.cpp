// The library on the host, for tests: the same interface, and the arithmetic of its launches.
#define BCL_HOST
#include "library.cu"

API void bcl_host_device(int64_t multiprocessors, int64_t shared_bytes, int clusters) {
    bcl::host_multiprocessors = multiprocessors;
    bcl::host_shared_bytes = shared_bytes;
    bcl::host_clusters = clusters != 0;
}

API bcl::CompetitionPlan bcl_host_competition_plan(int64_t B, int64_t D, int64_t k, int64_t multiprocessors,
                                                   int64_t shared, int clusters) {
    return bcl::competition_plan(B, D, k, multiprocessors, shared, clusters != 0);
}

API bcl::SelectionPlan bcl_host_selection_plan(int64_t B, int64_t D, int64_t r, int64_t multiprocessors) {
    return bcl::selection_plan(B, D, r, multiprocessors);
}

API bcl::RankPlan bcl_host_rank_plan(int64_t B, int64_t D) { return bcl::rank_plan(B, D); }
