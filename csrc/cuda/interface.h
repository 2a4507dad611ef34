// What the C interface takes: a struct for each stage, mirrored in bcl_fast/cuda_structs.py; layout.h says where each
// field lies. Pointers are the device's; sizes and strides count elements.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bcl {

struct CompetitionCall {         // steps 2 to 8; of steps 9b to 11 what belongs to a sample or to a feature
    const float* activation;     // [B, D]
    const int64_t* neighbors;    // [D, k]
    const float* x;              // [B, N]
    float* rank_score;           // [B, D]
    int64_t *winner;             // [B]
    int64_t* pair_feature;       // [B, k]
    float* pair_pull;            // [B, k]
    float *winner_share, *som_strength;  // [D]
    int64_t stride_b, stride_d, x_stride_b, x_stride_n, B, D, N, k;
    float temperature, rescue_onset, pull_onset;
    int coupled;
    int near, threads, cluster;  // the form (CompetitionForm)
};

struct SelectionCall {          // step 9b
    const float* activation;    // [B, D]
    const float *bias, *x_inverse_norm, *need;  // [D] or null, [B], [B] or null
    int64_t* rows;              // [D, r] the chosen samples
    float* shares;              // [D, r]
    int64_t stride_b, stride_d, B, D;
    int64_t r;                  // samples to choose, 1 .. min(B, SURVIVORS)
    int soft;                   // their shares are not all alike
    int ahead, bins, warps, round;  // the form (SelectionForm)
};

struct RankCall {      // the ranks of step 9b
    const float* key;  // [B, D]
    void* rank;        // [B, D]
    int64_t stride_b, stride_d, B, D;
    int kind;          // of the ranks: 0 for int64, 1 for int32, 2 for float32
};

struct SortCall {               // CUB's sort of runs [segments, length] alone, to measure ranks against
    uint32_t *key, *other_key;  // of both pairs either may hold the result
    int32_t *sample, *other_sample;
    int64_t segments, length;
};

}  // namespace bcl
