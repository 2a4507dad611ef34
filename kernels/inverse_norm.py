"""Inverse norm (step 9b: rinv, winv): 1 / (|row| + eps) of every row."""

import torch
import triton
import triton.language as tl

from .bits import EPS, LARGEST, SCALE

BLOCK_R, BLOCK_N = 8, 256


@triton.jit
def _square(row_ptr, r, R, N, stride_n, scale: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """|scale row|² of BLOCK_R rows."""
    square = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
        value = tl.load(row_ptr + n.to(tl.int64) * stride_n, (r[:, None] < R) & (n < N), other=0.0).to(tl.float32)
        value *= scale
        square += value * value
    return tl.sum(square, 1)


@triton.jit(do_not_specialize=["R"])
def _inverse_norm_kernel(
    rows_ptr, inverse_norm_ptr, R, N, stride_r, stride_n, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    row_ptr = rows_ptr + r[:, None] * stride_r
    square = _square(row_ptr, r, R, N, stride_n, 1.0, BLOCK_R, BLOCK_N)
    inverse = 1 / (tl.sqrt(square) + EPS)
    huge = ~(square <= LARGEST)
    if tl.max(huge.to(tl.int32)) > 0:  # eps is nothing beside such a norm
        square = _square(row_ptr, r, R, N, stride_n, SCALE, BLOCK_R, BLOCK_N)
        inverse = tl.where(huge, SCALE / tl.sqrt(square), inverse)
    tl.store(inverse_norm_ptr + r, inverse, r < R)


def inverse_norm(rows: torch.Tensor) -> torch.Tensor:
    """rows [R, N] any strides -> [R] float32."""
    R, N = rows.shape
    inverse_norm = rows.new_empty(R, dtype=torch.float32)
    _inverse_norm_kernel[(-(-R // BLOCK_R),)](rows, inverse_norm, R, N, *rows.stride(), BLOCK_R, BLOCK_N)
    return inverse_norm
