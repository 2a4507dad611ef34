// Where the library has each field of the interface's structs, for who mirrors them: rows up to one without a name,
// whose offset is the size of the struct.
#pragma once
#include "interface.h"

struct Field {
    const char* name;
    int64_t offset, size;
};

#define FIELD(name) {#name, int64_t(offsetof(Struct, name)), int64_t(sizeof(Struct::name))}
#define LAYOUT(Name, ...)                                                   \
    API const Field* bcl_cuda_layout_##Name() {                             \
        typedef bcl::Name##Call Struct;                                     \
        static const Field fields[] = {__VA_ARGS__, {nullptr, sizeof(Struct), 0}}; \
        return fields;                                                      \
    }

LAYOUT(Competition, FIELD(activation), FIELD(neighbors), FIELD(x), FIELD(rank_score), FIELD(winner),
       FIELD(pair_feature), FIELD(pair_pull), FIELD(winner_share), FIELD(som_strength), FIELD(stride_b),
       FIELD(stride_d), FIELD(x_stride_b), FIELD(x_stride_n), FIELD(B), FIELD(D), FIELD(N), FIELD(k),
       FIELD(temperature), FIELD(rescue_onset), FIELD(pull_onset), FIELD(coupled), FIELD(near), FIELD(threads),
       FIELD(cluster))
LAYOUT(Selection, FIELD(activation), FIELD(bias), FIELD(x_inverse_norm), FIELD(need), FIELD(rows), FIELD(shares),
       FIELD(stride_b), FIELD(stride_d), FIELD(B), FIELD(D), FIELD(r), FIELD(soft), FIELD(ahead), FIELD(bins),
       FIELD(warps), FIELD(round))
LAYOUT(Rank, FIELD(key), FIELD(rank), FIELD(stride_b), FIELD(stride_d), FIELD(B), FIELD(D), FIELD(kind))
LAYOUT(Sort, FIELD(key), FIELD(other_key), FIELD(sample), FIELD(other_sample), FIELD(segments), FIELD(length))
