// Where every field of the interface's structs lies, as compiled, for the test of what mirrors them.
#include <cstddef>

#include "interface.h"

namespace {

struct Field {
    const char* name;  // null behind the last, where offset is the size of the struct
    int64_t offset, size;
};

}  // namespace

#define AT(field) {#field, offsetof(S, field), sizeof(S::field)}
#define LAYOUT(Struct, ...)                                                                           \
    extern "C" __attribute__((visibility("default"))) const Field* bcl_cpu_layout_##Struct() {        \
        typedef bcl::Struct<float> S;                                                                 \
        static_assert(sizeof(S) == sizeof(bcl::Struct<double>), "one layout for both dtypes");        \
        static const Field fields[] = {__VA_ARGS__, {nullptr, sizeof(S), 0}};                         \
        return fields;                                                                                \
    }

LAYOUT(Neighbors, AT(similarity), AT(row_near), AT(row_best), AT(column_near), AT(column_best), AT(stride), AT(rows),
       AT(columns), AT(first_row), AT(first_column), AT(k))
LAYOUT(Competition, AT(activation), AT(neighbors), AT(x), AT(rank_score), AT(novelty), AT(win_rate), AT(winner),
       AT(pair_feature), AT(pair_pull), AT(x_inverse_norm), AT(need), AT(winner_share), AT(som_strength),
       AT(activation_stride), AT(x_stride), AT(B), AT(D), AT(N), AT(k), AT(temperature), AT(rescue_onset),
       AT(pull_onset), AT(coupled))
LAYOUT(InverseNorm, AT(rows), AT(inverse), AT(stride), AT(R), AT(N))
LAYOUT(Selection, AT(activation), AT(bias), AT(x_inverse_norm), AT(weight_inverse_norm), AT(need), AT(rows), AT(shares),
       AT(stride), AT(B), AT(D), AT(r), AT(rule), AT(soft))
LAYOUT(Targets, AT(x), AT(pair_feature), AT(pair_pull), AT(rescue_rows), AT(rescue_weight), AT(winner_share),
       AT(som_strength), AT(weight), AT(offset), AT(destination), AT(x_stride), AT(B), AT(D), AT(N), AT(k), AT(r),
       AT(som_lr))
LAYOUT(Forward, AT(activation), AT(neighbors), AT(x), AT(bias), AT(weight), AT(mask), AT(packed), AT(x_stride),
       AT(weight_stride), AT(B), AT(D), AT(N), AT(k), AT(r), AT(temperature), AT(rescue_onset), AT(pull_onset),
       AT(coupled), AT(need), AT(rule), AT(soft))
LAYOUT(Pull, AT(x), AT(packed), AT(weight), AT(offset), AT(destination), AT(som_lr), AT(step), AT(x_stride), AT(B), AT(D),
       AT(N), AT(k), AT(r))
LAYOUT(Gradient, AT(gradient), AT(mask), AT(masked), AT(sum), AT(stride), AT(B), AT(D))
LAYOUT(Rank, AT(key), AT(rank), AT(stride), AT(B), AT(D))
