"""Rank (SPEC 9b, for diagnostics): the stable position of every key in its column.

Runs of a column are sorted; an element's rank is the number of smaller elements in each of its column's runs.
"""

import torch
import triton
import triton.language as tl

COLUMNS = 8  # of a program: 32 bytes, a whole sector, of every row of float32
BLOCK_B = 256  # elements of a run that look for their ranks together
LAST = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # stands beyond the batch
SAMPLE = tl.constexpr(0x7FFFFFFF)  # the bits of a packed element that name its sample


@triton.jit
def _ordered(x):
    """Signed integers in the order of the numbers: -0 equals +0, NaN last."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit(do_not_specialize=["B", "stride_b", "padded"])
def _runs_kernel(
    key_ptr, run_ptr, rank_ptr, B, D, stride_b, stride_d, padded,
    RUN: tl.constexpr, ONLY: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, RUN)[None, :]
    b = tl.program_id(0) * RUN + place  # [1, RUN]
    d = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[:, None]).to(tl.int64)  # [COLUMNS, 1]
    mask = (b < B) & (d < D)
    key = tl.load(key_ptr + b.to(tl.int64) * stride_b + d * stride_d, mask, other=0.0).to(tl.float32)
    # Equal keys stand in the order of their samples: the sort need not be stable.
    packed = tl.sort(tl.where(mask, (_ordered(key).to(tl.int64) << 32) | b, LAST), 1)
    if ONLY:
        tl.store(rank_ptr + (packed & SAMPLE) * D + d, place.to(tl.int64), packed != LAST)
    else:
        tl.store(run_ptr + d * padded + b, packed, d < D)


@triton.jit(do_not_specialize=["B", "padded"])
def _rank_kernel(
    run_ptr, rank_ptr, B, D, padded,
    RUN: tl.constexpr, BLOCK_B: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]
    d = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[:, None]).to(tl.int64)
    column_ptr = run_ptr + d * padded
    packed = tl.load(column_ptr + place, (place < padded) & (d < D), other=LAST)
    mask = packed != LAST
    rank = tl.zeros([COLUMNS, BLOCK_B], tl.int32)
    for first in range(0, B, RUN):
        below = tl.zeros([COLUMNS, BLOCK_B], tl.int32)  # of this run, found bit by bit
        step = RUN // 2
        while step > 0:
            below += tl.where(tl.load(column_ptr + first + below + step - 1, mask, other=LAST) < packed, step, 0)
            step //= 2
        rank += below + (tl.load(column_ptr + first + below, mask, other=LAST) < packed).to(tl.int32)
    tl.store(rank_ptr + (packed & SAMPLE) * D + d, rank.to(tl.int64), mask)


def rank(key: torch.Tensor) -> torch.Tensor:
    """key [B, D] any strides -> stable rank of each element within its column [B, D] int64; NaN last, -0 equals +0."""
    B, D = key.shape
    RUN, warps = (128, 4) if B <= 128 else (1024, 8)
    runs, groups = triton.cdiv(B, RUN), triton.cdiv(D, COLUMNS)
    rank = torch.empty(B, D, dtype=torch.int64, device=key.device)
    ordered = torch.empty(D, runs * RUN, dtype=torch.int64, device=key.device) if runs > 1 else rank
    _runs_kernel[runs, groups](
        key, ordered, rank, B, D, *key.stride(), runs * RUN, RUN, runs == 1, COLUMNS, num_warps=warps
    )
    if runs > 1:
        _rank_kernel[runs * (RUN // BLOCK_B), groups](ordered, rank, B, D, runs * RUN, RUN, BLOCK_B, COLUMNS)
    return rank
