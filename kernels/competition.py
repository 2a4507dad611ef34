"""Competition (steps 2 to 8): who wins each sample against its neighbors, and what follows per sample and per feature.

A program takes a few samples at a time. It lays their strengths out feature by feature, so that a neighbor is one full
sector of memory however far away it is. Per feature it leaves a partial sum; these are added up in a fixed order.
"""

import torch
import triton
import triton.language as tl

from ..structures import Competition
from .bits import EPS, LARGEST, SCALE, clamp, ordered

BLOCK_B = 8  # float32 are one sector of memory
# Programs, the features of a tile, and warps. Every program holds BLOCK_B strengths of every feature, and together they
# should stay in the level-2 cache, of which an H100 has 50 MB: where those of the usual programs take more than CACHE
# bytes, half as many of twice the warps keep as many loads in flight. An H100 has 132 multiprocessors.
PROGRAMS, BLOCK_D, WARPS = 264, 128, 8
WIDE = 132, 256, 16
CACHE = 32 << 20
STAGES = 3  # activations of two more tiles are in flight while one is laid out; the sums would spill
BLOCK_N, BLOCK_K = 64, 8  # inputs, and neighbors of a winner, that are read together
FORCES = 16, 64  # programs and features of a tile where their sums are added up
REGISTERS, MORE_REGISTERS = 128, 255  # 512 threads fit a multiprocessor; where 128 would spill


@triton.jit
def _strengths(
    activation_ptr,
    strength_ptr,
    b,
    B,
    D,
    stride_b,
    stride_d,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """|A| of BLOCK_B samples, feature by feature (step 2)."""
    s = tl.arange(0, BLOCK_B)[:, None]
    for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        d = (start + tl.arange(0, BLOCK_D)[None, :]).to(tl.int64)  # [1, BLOCK_D]
        inside = (b[:, None] < B) & (d < D)
        value = tl.load(activation_ptr + b[:, None] * stride_b + d * stride_d, inside, other=0.0).to(tl.float32)
        tl.store(strength_ptr + d * BLOCK_B + s, tl.abs(value), d < D)


@triton.jit
def _rank_scores(
    strength_ptr,
    neighbors_ptr,
    rank_score_ptr,
    b,
    temperature,
    B,
    D,
    K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Steps 3, 4 and 8 of BLOCK_B samples: stores rank_score, returns coverage and winner [BLOCK_B]."""
    s = tl.arange(0, BLOCK_B)[None, :]
    coverage = tl.zeros([BLOCK_B], tl.float32)
    best = tl.full([BLOCK_B], -0x80000000, tl.int32)
    winner = tl.zeros([BLOCK_B], tl.int64)
    for start in range(0, D, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D)[:, None]).to(tl.int64)  # [BLOCK_D, 1]
        inside = (d < D) & (b[None, :] < B)
        strength = tl.load(strength_ptr + d * BLOCK_B + s, d < D, other=0.0)
        rival = tl.zeros([BLOCK_D, BLOCK_B], tl.int32)  # magnitudes order like their bits, NaN last
        for i in range(K):
            j = clamp(tl.load(neighbors_ptr + d * K + i, d < D, other=0), D)
            rival = tl.maximum(
                rival, tl.load(strength_ptr + j * BLOCK_B + s, d < D, other=0.0).to(tl.int32, bitcast=True)
            )
        margin = strength - rival.to(tl.float32, bitcast=True)
        rank_score = tl.where(inside, tl.sigmoid(margin * temperature), 0.0)
        tl.store(rank_score_ptr + b[None, :] * D + d, rank_score, inside)
        coverage += tl.sum(rank_score, 0)
        order = tl.where(d < D, ordered(margin), -0x80000000)
        here = tl.max(order, 0)  # [BLOCK_B]
        first = tl.min(tl.where(order == here[None, :], d, D), 0)  # the smallest index of equal margins
        winner = tl.where(here > best, first, winner)
        best = tl.maximum(here, best)
    return coverage, winner


@triton.jit
def _column_sums(rank_score_ptr, partial_ptr, b, claim, started, B, D, BLOCK_D: tl.constexpr):
    """What BLOCK_B samples add to the sums over the batch of steps 5 and 7: partial [2, D] of this program."""
    for start in range(0, D, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        inside = (d[:, None] < D) & (b[None, :] < B)
        rank_score = tl.load(rank_score_ptr + b[None, :] * D + d[:, None], inside, other=0.0)
        before = tl.load(partial_ptr + d, (d < D) & started, other=0.0)
        tl.store(partial_ptr + d, before + tl.sum(rank_score, 1), d < D)
        before = tl.load(partial_ptr + D + d, (d < D) & started, other=0.0)
        tl.store(partial_ptr + D + d, before + tl.sum(rank_score * claim[None, :], 1), d < D)


@triton.jit
def _pairs(
    neighbors_ptr,
    rank_score_ptr,
    pair_feature_ptr,
    pair_pull_ptr,
    b,
    winner,
    B,
    D,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The winner's neighbors and their rank_score * local_novelty (step 6) for BLOCK_B samples."""
    row_ptr = rank_score_ptr + b[:, None] * D
    for i_start in range(0, K, BLOCK_K):
        i = i_start + tl.arange(0, BLOCK_K)[None, :]
        inside = (b[:, None] < B) & (i < K)
        feature = clamp(tl.load(neighbors_ptr + winner[:, None] * K + i, inside, other=0), D)  # [BLOCK_B, BLOCK_K]
        claimed = tl.zeros_like(feature).to(tl.float32)
        for q_start in range(0, K, BLOCK_K):
            q = q_start + tl.arange(0, BLOCK_K)[None, None, :]
            both = inside[:, :, None] & (q < K)
            j = clamp(tl.load(neighbors_ptr + feature[:, :, None] * K + q, both, other=0), D)
            claimed += tl.sum(tl.load(row_ptr[:, :, None] + j, both, other=0.0), 2)
        pull = tl.load(row_ptr + feature, inside, other=0.0) / (1 + claimed)
        tl.store(pair_feature_ptr + b[:, None] * K + i, feature, inside)
        tl.store(pair_pull_ptr + b[:, None] * K + i, pull, inside)


@triton.jit
def _square(x_ptr, b, B, N, stride_b, stride_n, scale: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """|scale X_b|²."""
    square = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)[None, :]).to(tl.int64)
        x = tl.load(x_ptr + b[:, None] * stride_b + n * stride_n, (b[:, None] < B) & (n < N), other=0.0).to(tl.float32)
        x *= scale
        square += x * x
    return tl.sum(square, 1)


@triton.jit
def _inverse_norm(x_ptr, b, B, N, stride_b, stride_n, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """1 / (|X_b| + eps) (step 9b)."""
    square = _square(x_ptr, b, B, N, stride_b, stride_n, 1.0, BLOCK_B, BLOCK_N)
    inverse = 1 / (tl.sqrt(square) + EPS)
    huge = ~(square <= LARGEST)
    if tl.max(huge.to(tl.int32)) > 0:  # eps is nothing beside such a norm
        square = _square(x_ptr, b, B, N, stride_b, stride_n, SCALE, BLOCK_B, BLOCK_N)
        inverse = tl.where(huge, SCALE / tl.sqrt(square), inverse)
    return inverse


@triton.jit(do_not_specialize=["B"])
def _competition_kernel(
    activation_ptr,
    neighbors_ptr,
    x_ptr,
    strength_ptr,
    partial_ptr,
    rank_score_ptr,
    coverage_ptr,
    winner_ptr,
    pair_feature_ptr,
    pair_pull_ptr,
    x_inverse_norm_ptr,
    need_ptr,
    temperature,
    B,
    D,
    N,
    stride_b,
    stride_d,
    x_stride_b,
    x_stride_n,
    K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    strength_ptr += program * D * BLOCK_B
    partial_ptr += program * D * 2
    tiles = tl.cdiv(tl.cdiv(B, BLOCK_B) - program, programs)
    for tile in range(tiles):
        b = (program + tile * programs) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B]
        tl.debug_barrier()  # the strengths of the last tile have been read
        _strengths(activation_ptr, strength_ptr, b, B, D, stride_b, stride_d, BLOCK_B, BLOCK_D, STAGES)
        tl.debug_barrier()
        coverage, winner = _rank_scores(
            strength_ptr, neighbors_ptr, rank_score_ptr, b, temperature, B, D, K, BLOCK_B, BLOCK_D
        )
        tl.debug_barrier()
        _column_sums(rank_score_ptr, partial_ptr, b, 1 / (coverage + EPS), tile > 0, B, D, BLOCK_D)
        _pairs(neighbors_ptr, rank_score_ptr, pair_feature_ptr, pair_pull_ptr, b, winner, B, D, K, BLOCK_K)
        tl.store(winner_ptr + b, winner, b < B)
        tl.store(coverage_ptr + b, coverage, b < B)
        tl.store(need_ptr + b, 1 / (coverage + 1), b < B)
        norm = _inverse_norm(x_ptr, b, B, N, x_stride_b, x_stride_n, BLOCK_B, BLOCK_N)
        tl.store(x_inverse_norm_ptr + b, norm, b < B)


@triton.jit(do_not_specialize=["B", "programs"])
def _forces_kernel(
    partial_ptr,
    novelty_ptr,
    win_rate_ptr,
    winner_share_ptr,
    som_strength_ptr,
    B,
    D,
    programs,
    rescue_onset,
    pull_onset,
    COUPLED: tl.constexpr,
    HAS_RESCUE_ONSET: tl.constexpr,
    HAS_PULL_ONSET: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Steps 5, 7, 10 (u) and 11 (v) of BLOCK_D features from the partial sums of all programs."""
    d = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    total, novel = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, programs, BLOCK_P):
        p = (start + tl.arange(0, BLOCK_P)[:, None]).to(tl.int64)
        inside = (p < programs) & (d[None, :] < D)
        total += tl.sum(tl.load(partial_ptr + p * (2 * D) + d[None, :], inside, other=0.0), 0)
        novel += tl.sum(tl.load(partial_ptr + p * (2 * D) + D + d[None, :], inside, other=0.0), 0)
    novelty, win_rate = novel / (total + EPS), total / B
    winner_share, som_strength = win_rate, 1 - novelty
    if COUPLED:
        winner_share, som_strength = win_rate * novelty, tl.full([BLOCK_D], 1.0, tl.float32)
    if HAS_RESCUE_ONSET:
        winner_share = tl.where(win_rate < rescue_onset, winner_share, 1.0)
    if HAS_PULL_ONSET:
        som_strength = tl.where(win_rate < pull_onset, som_strength, 0.0)
    tl.store(novelty_ptr + d, novelty, d < D)
    tl.store(win_rate_ptr + d, win_rate, d < D)
    tl.store(winner_share_ptr + d, winner_share, d < D)
    tl.store(som_strength_ptr + d, som_strength, d < D)


def competition(
    activation: torch.Tensor,
    neighbors: torch.Tensor,
    temperature: float,
    x: torch.Tensor,
    forces: str,
    rescue_onset: float,
    pull_onset: float,
) -> Competition:
    """activation [B, D], x [B, N] and neighbors [D, k] int64, any strides -> `Competition`, float32 and int64."""
    (B, D), N, (features, K) = activation.shape, x.shape[1], neighbors.shape
    if not 1 <= D == features or K < 1 or neighbors.dtype != torch.int64:  # state that users load
        given = f"{neighbors.dtype} {list(neighbors.shape)}"
        raise ValueError(f"neighbors must be torch.int64 [{D}, k] with D, k >= 1, got {given}")
    neighbors = neighbors.contiguous()
    floats, indices = activation.new_empty, neighbors.new_empty  # half the time of torch.empty
    rank_score, coverage, pair_pull, x_inverse_norm, need = floats(B, D), floats(B), floats(B, K), floats(B), floats(B)
    novelty, win_rate, winner_share, som_strength = floats(D), floats(D), floats(D), floats(D)
    winner, pair_feature = indices(B), indices(B, K)
    programs, features, warps = (PROGRAMS, BLOCK_D, WARPS) if PROGRAMS * D * BLOCK_B * 4 <= CACHE else WIDE
    programs = min(-(-B // BLOCK_B), programs)
    registers = REGISTERS if K <= BLOCK_K or warps > WARPS else MORE_REGISTERS
    limit = {} if torch.version.hip else {"maxnreg": registers}  # the AMD compiler does not know the option
    strength, partial = floats(programs, D, BLOCK_B), floats(programs, 2, D)
    _competition_kernel[(programs,)](
        activation,
        neighbors,
        x,
        strength,
        partial,
        rank_score,
        coverage,
        winner,
        pair_feature,
        pair_pull,
        x_inverse_norm,
        need,
        temperature,
        B,
        D,
        N,
        *activation.stride(),
        *x.stride(),
        K,
        BLOCK_B,
        features,
        BLOCK_N,
        min(BLOCK_K, 1 << (K - 1).bit_length()),
        STAGES,
        num_warps=warps,
        **limit,
    )
    BLOCK_P, features = FORCES
    _forces_kernel[(-(-D // features),)](
        partial,
        novelty,
        win_rate,
        winner_share,
        som_strength,
        B,
        D,
        programs,
        rescue_onset,
        pull_onset,
        forces == "coupled",
        rescue_onset > 0,
        pull_onset > 0,
        BLOCK_P,
        features,
    )
    pairs = pair_feature, pair_pull
    return Competition(rank_score, novelty, win_rate, winner, *pairs, x_inverse_norm, need, winner_share, som_strength)
