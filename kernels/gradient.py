"""Gradient (step 12 before its products): the loss gradient each feature has won, and its sum over the batch."""

import torch
import triton
import triton.language as tl

TILE = 2048  # elements that a program takes at a time
PROGRAMS = 1024  # enough to fill a GPU several times over
MIN_TILES = 4  # a program with fewer is not worth the second launch


@triton.jit(do_not_specialize=["B", "rows"])
def _gradient_kernel(
    grad_output_ptr,
    mask_ptr,
    winner_ptr,
    masked_ptr,
    total_ptr,
    B,
    D,
    rows,
    stride_b,
    stride_d,
    HAS_MASK: tl.constexpr,
    HAS_WINNER: tl.constexpr,
    HAS_MASKED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
    split = tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for start in range(0, rows, BLOCK_B):  # rows is a multiple of BLOCK_B: splits do not overlap
        b = split * rows + start + tl.arange(0, BLOCK_B)[:, None]  # [BLOCK_B, 1]
        inside = (b < B) & (d < D)
        masked = tl.load(grad_output_ptr + b * stride_b + d * stride_d, inside, other=0.0).to(tl.float32)
        if HAS_MASK:
            masked *= tl.load(mask_ptr + b * D + d, inside, other=0.0)
        if HAS_WINNER:
            masked *= (tl.load(winner_ptr + b, b < B, other=-1) == d).to(tl.float32)
        if HAS_MASKED:  # may be the mask's storage: every element is read here before it is written
            tl.store(masked_ptr + b * D + d, masked.to(masked_ptr.dtype.element_ty), inside)
        total += masked
    tl.store(total_ptr + split * D + d, tl.sum(total, 0, keep_dims=True), d < D)


def _splits(B: int, column_tiles: int, BLOCK_B: int) -> tuple[int, int]:
    """How many programs share a column tile, and the rows of each, a multiple of BLOCK_B."""
    row_tiles = -(-B // BLOCK_B)  # triton.cdiv takes microseconds on the host
    wanted = min(-(-PROGRAMS // column_tiles), -(-row_tiles // MIN_TILES))
    tiles = -(-row_tiles // wanted)
    return -(-row_tiles // tiles), tiles * BLOCK_B


def gradient(
    grad_output: torch.Tensor,
    mask: torch.Tensor | None,
    winner: torch.Tensor | None,
    out: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """grad_output [B, D] any strides; mask [B, D] float32 or winner [B] int64 or neither -> masked [B, D], sum [D].

    Computed and summed in float32. masked is rounded to `dtype` (None: float32) and written to `out`, which is of that
    dtype and may be the mask, or to storage of its own.
    """
    (B, D), device = grad_output.shape, grad_output.device
    mask, winner = (None if given is None else given.contiguous() for given in (mask, winner))
    packed = out is not None and out.is_contiguous()
    masked = out if packed else torch.empty(B, D, dtype=dtype or torch.float32, device=device)
    total = torch.empty(D, dtype=torch.float32, device=device)
    BLOCK_D = min(128, 1 << (D - 1).bit_length())
    BLOCK_B = TILE // BLOCK_D
    columns = -(-D // BLOCK_D)
    S, rows = _splits(B, columns, BLOCK_B)
    partial = total if S == 1 else torch.empty(S, D, dtype=torch.float32, device=device)
    _gradient_kernel[columns, S](
        grad_output,
        mask,
        winner,
        masked,
        partial,
        B,
        D,
        rows,
        *grad_output.stride(),
        mask is not None,
        winner is not None,
        True,
        BLOCK_B,
        BLOCK_D,
    )
    if S > 1:  # the sum of the partial sums, in one fixed order
        _gradient_kernel[columns, 1](
            partial,
            None,
            None,
            None,
            total,
            S,
            D,
            -(-S // BLOCK_B) * BLOCK_B,
            D,
            1,
            False,
            False,
            False,
            BLOCK_B,
            BLOCK_D,
        )
    return masked if out is None or packed else out.copy_(masked), total
