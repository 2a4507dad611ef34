"""Targets and pull (steps 9a, 10 and 13): where the samples draw each feature, and the step toward it."""

import torch
import triton
import triton.language as tl

from ..structures import Pull
from .bits import EPS, clamp

MAX_CHUNKS = 32  # programs that group the pairs; the pull reads one start of each per feature
CHUNK_ROWS = 16  # fewest samples of a chunk
STREAM = 4096  # features or pairs of a tile that is only streamed
TILE = 256  # pairs placed at once, each compared with all the others
COMPARE = 32  # of them at a time: all at once would not fit the registers
GATHER = 8  # rows of x gathered at once, of a common list of eight winner pairs and five rescued rows: 16 may spill
MAX_BLOCK_N = 128  # one warp's width: a narrow block of a large x stays in the level-2 cache while all features read it
# Without a limit ptxas spills a few bytes to fit one more program; the AMD compiler does not know the option.
REGISTERS = {} if torch.version.hip else {"maxnreg": 255}
DENSE_ROWS = 16  # all of a larger batch rescues by a product: a gather would read x once for every feature


@triton.jit(do_not_specialize=["pairs", "chunk", "chunks"])
def _pairs_kernel(
    pair_feature_ptr,
    pair_pull_ptr,
    cursor_ptr,
    start_ptr,
    row_ptr,
    pull_ptr,
    pairs,
    chunk,
    chunks,
    D,
    K: tl.constexpr,
    STREAM: tl.constexpr,
    TILE: tl.constexpr,
    COMPARE: tl.constexpr,
):
    """A stable counting sort of chunk t by feature: starts within the chunk [D + 1, chunks], and the grouped pairs.

    No other program touches its cursors, row t of [chunks, D]: barriers order all accesses, and sums by integer atomics
    do not depend on an order.
    """
    t = tl.program_id(0).to(tl.int64)
    first = t * chunk
    stop = tl.minimum(first + chunk, pairs)
    cursor_ptr += t * D
    wide, lane, few = tl.arange(0, STREAM), tl.arange(0, TILE), tl.arange(0, COMPARE)
    for d in range(0, D, STREAM):
        tl.store(cursor_ptr + d + wide, 0, d + wide < D)
    tl.debug_barrier()
    for p in range(first, stop, STREAM):
        feature = clamp(tl.load(pair_feature_ptr + p + wide, p + wide < stop, other=0), D)
        tl.atomic_add(cursor_ptr + feature, 1, p + wide < stop, sem="relaxed")
    tl.debug_barrier()
    before = 0
    for d in range(0, D, STREAM):
        count = tl.load(cursor_ptr + d + wide, d + wide < D, other=0)
        start = before + tl.cumsum(count) - count
        tl.store(cursor_ptr + d + wide, start, d + wide < D)
        tl.store(start_ptr + (d + wide).to(tl.int64) * chunks + t, start, d + wide < D)
        before += tl.sum(count)
    tl.store(start_ptr + D.to(tl.int64) * chunks + t, before)
    tl.debug_barrier()
    for p in range(first, stop, TILE):
        pair, mask = p + lane, p + lane < stop
        feature = clamp(tl.load(pair_feature_ptr + pair, mask, other=0), D).to(tl.int32)
        place = first + tl.load(cursor_ptr + feature, mask, other=0)
        for q in range(0, TILE, COMPARE):
            other = tl.load(pair_feature_ptr + p + q + few, p + q + few < stop, other=0)
            other = clamp(other, D).to(tl.int32)
            earlier = (other[:, None] == feature[None, :]) & (q + few[:, None] < lane[None, :])
            place += tl.sum(earlier.to(tl.int32), axis=0)
        tl.store(row_ptr + place, pair // K, mask)
        tl.store(pull_ptr + place, tl.load(pair_pull_ptr + pair, mask, other=0.0), mask)
        tl.debug_barrier()  # no cursor moves before all have read it
        tl.atomic_add(cursor_ptr + feature, 1, mask, sem="relaxed")
        tl.debug_barrier()


@triton.jit
def _listed(position, won, listed, end, jump, row_ptr, pull_ptr, rescue_rows_ptr, rescue_weight_ptr, B):
    """The samples at these positions of a feature's list, `won` pairs and then rescued rows, and their weights."""
    place = position + tl.sum(tl.where(position[None, :] >= end[:, None], jump[:, None], 0), axis=0)
    is_won, is_rescued = position < won, (position >= won) & (position < listed)
    row = tl.load(row_ptr + place, is_won, other=0) + tl.load(rescue_rows_ptr + position, is_rescued, other=0)
    pull = tl.load(pull_ptr + place, is_won, other=0.0)
    return clamp(row, B), pull + tl.load(rescue_weight_ptr + position, is_rescued, other=0.0)


@triton.jit(do_not_specialize=["B", "chunk", "chunks", "r"])
def _pull_kernel(
    destination_ptr,
    weight_ptr,
    som_strength_ptr,
    step_ptr,
    x_ptr,
    start_ptr,
    row_ptr,
    pull_ptr,
    rescue_rows_ptr,
    rescue_weight_ptr,
    winner_share_ptr,
    som_lr_ptr,
    B,
    N,
    chunk,
    chunks,
    r,
    stride_d,
    stride_n,
    weight_stride_d,
    weight_stride_n,
    x_stride_b,
    x_stride_n,
    MAX_CHUNKS: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    d = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    t, lane = tl.arange(0, MAX_CHUNKS), tl.arange(0, GATHER)
    start_ptr += d * chunks
    start = tl.load(start_ptr + t, t < chunks, other=0)
    stop = tl.load(start_ptr + chunks + t, t < chunks, other=0)
    end = tl.cumsum(stop - start)  # of chunk t's pairs in the feature's list
    jump = chunk.to(tl.int64) + tl.load(start_ptr + 1 + t, t + 1 < chunks, other=0) - stop  # on to the next chunk's
    head, won = tl.load(start_ptr), tl.sum(stop - start)
    listed = won + r
    row_ptr += head
    pull_ptr += head
    rescue_rows_ptr += d * r - won
    rescue_weight_ptr += d * r - won
    row, weight = _listed(lane, won, listed, end, jump, row_ptr, pull_ptr, rescue_rows_ptr, rescue_weight_ptr, B)
    toward_won = tl.zeros([BLOCK_N], tl.float32)
    toward_rescued = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([GATHER], tl.float32)
    for first in range(0, listed, GATHER):
        position = first + lane
        mask = (position < listed)[:, None] & (n < N)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride_b + n[None, :] * x_stride_n, mask, other=0.0).to(tl.float32)
        next_row, next_weight = _listed(  # while the loads of x are in flight
            position + GATHER, won, listed, end, jump, row_ptr, pull_ptr, rescue_rows_ptr, rescue_weight_ptr, B
        )
        pull = tl.where(position < won, weight, 0.0)
        toward_won += tl.sum(pull[:, None] * x, axis=0)
        toward_rescued += tl.sum((weight - pull)[:, None] * x, axis=0)
        total += pull
        row, weight = next_row, next_weight
    u = tl.load(winner_share_ptr + d)
    target = u * (toward_won / (tl.sum(total) + EPS)) + (1 - u) * toward_rescued
    place = d * stride_d + n * stride_n
    if som_strength_ptr is not None:
        effective_weight = tl.load(destination_ptr + place, n < N, other=0.0)
        gap = target - effective_weight
        if weight_ptr is not None:  # the destination is an offset of this weight
            gap -= tl.load(weight_ptr + d * weight_stride_d + n * weight_stride_n, n < N, other=0.0)
        target = effective_weight + tl.load(som_lr_ptr) * (tl.load(som_strength_ptr + d) * gap)
    tl.store(destination_ptr + place, target, n < N)
    if step_ptr is not None:
        if tl.program_id(0) + tl.program_id(1) == 0:
            tl.store(step_ptr, tl.load(step_ptr) + 1)


def _takes_whole_batch(x: torch.Tensor, rescue_rows: torch.Tensor) -> bool:
    return x.shape[0] == rescue_rows.shape[1] > DENSE_ROWS


def _pull(
    destination: torch.Tensor,
    weight: torch.Tensor | None,
    som_lr: torch.Tensor | None,
    step: torch.Tensor | None,
    pull: Pull,
) -> None:
    """Targets into destination [D, N], or, given som_lr, a step toward them.

    A large batch of which all samples are rescued is left out.
    """
    x, pair_feature, pair_pull, rescue_rows, rescue_weight, winner_share, som_strength = pull
    som_strength = None if som_lr is None else som_strength.contiguous()
    (B, N), D, k = x.shape, winner_share.shape[0], pair_feature.shape[1]
    r = 0 if B == 0 or _takes_whole_batch(x, rescue_rows) else rescue_rows.shape[1]
    chunk_rows = max(CHUNK_ROWS, -(-B // MAX_CHUNKS))  # triton.cdiv takes microseconds on the host
    chunk, chunks = chunk_rows * k, max(-(-B // chunk_rows), 1)
    if D == 0:
        return
    cursor = torch.empty(chunks, D, dtype=torch.int32, device=x.device)
    start = torch.empty(D + 1, chunks, dtype=torch.int32, device=x.device)
    row = torch.empty(B * k, dtype=torch.int64, device=x.device)
    weights = torch.empty(B * k, dtype=torch.float32, device=x.device)
    _pairs_kernel[(chunks,)](
        pair_feature.contiguous(),
        pair_pull.contiguous(),
        cursor,
        start,
        row,
        weights,
        B * k,
        chunk,
        chunks,
        D,
        k,
        STREAM,
        TILE,
        COMPARE,
        num_warps=8,
        num_stages=1,
        **REGISTERS,
    )
    BLOCK_N = min(MAX_BLOCK_N, 1 << (N - 1).bit_length())
    weight_stride = (0, 0) if weight is None else weight.stride()
    _pull_kernel[D, -(-N // BLOCK_N)](
        destination,
        weight,
        som_strength,
        step,
        x,
        start,
        row,
        weights,
        rescue_rows.contiguous(),
        rescue_weight.contiguous(),
        winner_share.contiguous(),
        som_lr,
        B,
        N,
        chunk,
        chunks,
        r,
        *destination.stride(),
        *weight_stride,
        *x.stride(),
        MAX_CHUNKS,
        GATHER,
        BLOCK_N,
        num_warps=1,
    )


def targets(pull: Pull) -> torch.Tensor:
    """Where each feature is pulled to: [D, N] float32."""
    x, rows, share = pull.x, pull.rescue_rows, pull.winner_share
    target = torch.empty(share.shape[0], x.shape[1], dtype=torch.float32, device=x.device)
    _pull(target, None, None, None, pull)
    if _takes_whole_batch(x, rows):
        dense = torch.empty_like(pull.rescue_weight).scatter_(1, rows, pull.rescue_weight * (1 - share)[:, None])
        target.addmm_(dense, x.float())
    return target


def targets_pull_(
    weight: torch.Tensor,
    som_offset: torch.Tensor | None,
    som_lr: torch.Tensor,
    pull: Pull,
    step: torch.Tensor | None = None,
) -> None:
    """One pull, in place on weight or, if there is one, on som_offset; step, if given, advances by one.

    weight and som_offset [D, N] float32 of any strides, som_lr a float32 and step an int64 scalar.
    """
    destination, other = (weight, None) if som_offset is None else (som_offset, weight)
    if not _takes_whole_batch(pull.x, pull.rescue_rows):
        _pull(destination, other, som_lr, step, pull)
        return
    gap = targets(pull).sub_(weight)
    if som_offset is not None:
        gap.sub_(som_offset)
    destination.addcmul_(gap.mul_(pull.som_strength[:, None]), som_lr)
    if step is not None:
        step.add_(1)
