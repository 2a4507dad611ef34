// A whole forward, and the pull it leaves, each as one call: the stages on memory that travels as one piece.
#pragma once
#include "competition.h"
#include "selection.h"
#include "targets.h"

namespace bcl {
namespace {

// Where everything lies in the packed memory of a forward, as interface.h orders it.
template <class Real>
struct Packed {
    int64_t *winner, *pair_feature, *rescue_rows;
    Real *pair_pull, *rescue_weight, *winner_share, *som_strength;

    Packed(int64_t* packed, int64_t B, int64_t D, int64_t k, int64_t r)
        : winner(packed),
          pair_feature(winner + B),
          rescue_rows(pair_feature + B * k),
          pair_pull((Real*)(rescue_rows + D * r)),
          rescue_weight(pair_pull + B * k),
          winner_share(rescue_weight + D * r),
          som_strength(winner_share + D) {}
};

// Step 11 of coupled forces: a row of the mask [D], times what depends on the feature alone.
template <class Real>
KERNEL void couple_row(Real* mask, const Real* factor, int64_t D) {
    for (int64_t d = 0; d < D; d++) mask[d] *= factor[d];
}

template <class Real>
int forward(const Forward<Real>& f, int threads) {
    const int64_t B = f.B, D = f.D, N = f.N;
    if (f.r < 0 || f.r > B || B < 0 || D < 1 || N < 0) return BAD_SIZE;
    Buffer<Real> memory(2 * B + 3 * D);
    if (!memory.data) return NO_MEMORY;
    Real *x_inverse_norm = memory.data, *need = x_inverse_norm + B;
    Real *novelty = need + B, *win_rate = novelty + D, *weight_inverse_norm = win_rate + D;
    const Packed<Real> p(f.packed, B, D, f.k, f.r);

    const Competition<Real> competed = {
        f.activation, f.neighbors, f.x,  f.mask, novelty,        win_rate,       p.winner, p.pair_feature, p.pair_pull,
        x_inverse_norm, need, p.winner_share, p.som_strength, D, f.x_stride, B, D, N, f.k, f.temperature,
        f.rescue_onset, f.pull_onset, f.coupled};
    int status = competition(competed, threads);
    if (status == DONE && f.weight)
        status = inverse_norm<Real>({f.weight, weight_inverse_norm, f.weight_stride, D, N}, threads);
    if (status != DONE) return status;
    const Selection<Real> selected = {
        f.activation, f.bias, x_inverse_norm, f.weight ? weight_inverse_norm : nullptr, f.need ? need : nullptr,
        p.rescue_rows, p.rescue_weight, D, B, D, f.r, f.rule, f.soft};
    status = selection(selected, threads);
    if (status != DONE || !f.coupled) return status;
    Real* factor = win_rate;
    for (int64_t d = 0; d < D; d++) factor[d] = novelty[d] * (win_rate[d] * novelty[d]);
    parallel(threads, 0.5 * B * D, B, 0, [&](int64_t b, char*) { couple_row(f.mask + b * D, factor, D); });
    return DONE;
}

template <class Real>
int pull(const Pull<Real>& f, int threads) {
    const Packed<Real> p((int64_t*)f.packed, f.B, f.D, f.k, f.r);
    const int status = targets<Real>({f.x, p.pair_feature, p.pair_pull, p.rescue_rows, p.rescue_weight, p.winner_share,
                          p.som_strength, f.weight, f.offset, f.destination, f.x_stride, f.B, f.D, f.N, f.k, f.r,
                          *f.som_lr}, threads);
    if (status == DONE) ++*f.step;
    return status;
}

}  // namespace
}  // namespace bcl
