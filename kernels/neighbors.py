"""Neighbors (step 1): the k features most similar to each by cosine; the device decides whether they are due."""

import torch
import triton
import triton.language as tl

from .bits import EPS, LARGEST, SCALE, pack

LOW = tl.constexpr(2**31 - 1)  # the bits of a key that hold the column, falling
EMPTY = tl.constexpr(-(2**63))  # a key below every candidate's
ARRIVAL = tl.constexpr(2**40)  # refreshed_at counts finished programs above the bits of a step

# Three tensor-core products of rounded parts are as accurate as float32, and one alone is not; the AMD compiler does
# not know them.
PRODUCT = "ieee" if torch.version.hip else "tf32x3"
# BLOCK_R, BLOCK_C, BLOCK_N and warps, below FROM features and from there on. Every program reads every feature: a few
# rows each keep a GPU busy while there are few features; later, more rows each read less. Larger tiles spill somewhere.
FEW, MANY, FROM = (16, 128, 16, 8), (64, 64, 16, 8), 8192
NEAREST = 16, 64  # BLOCK_R and BLOCK_C where the similarities are given
MAX_KEPT = 32  # neighbors that a pass finds: a longer list spills registers
# Without a limit ptxas spills a few bytes to fit one more program; the AMD compiler does not know the option.
REGISTERS = {} if torch.version.hip else {"maxnreg": 255}


@triton.jit
def _keys(similarity, row, column, D, last):
    """Similarities as distinct int64 keys [R, C]: the larger is more similar, or as similar at a smaller column.

    EMPTY for the feature itself, for columns beyond D, and for what earlier passes found, down to the key `last`.
    """
    value = tl.where(similarity != similarity, -2.0, similarity)
    value = tl.minimum(tl.maximum(value, -LARGEST), LARGEST)  # as torch.nan_to_num: an infinity ties with LARGEST
    key = pack(value, column ^ LOW)
    return tl.where((column < D) & (column != row) & (key < last), key, EMPTY)


@triton.jit
def _keep(key, kept):
    """Merge a tile of keys [R, C] into the unordered list [R, KEPT] of the largest of each row."""
    best, worst = tl.max(key, 1, keep_dims=True), tl.min(kept, 1, keep_dims=True)
    while tl.max((best > worst).to(tl.int32)) > 0:
        kept = tl.where(kept == worst, tl.maximum(best, worst), kept)
        worst = tl.min(kept, 1, keep_dims=True)
        best = tl.max(tl.where(key < best, key, EMPTY), 1, keep_dims=True)
    return kept


@triton.jit
def _write(neighbors_ptr, kept, row, R, place, K):
    """Store the columns of a list in order, to the places of its rows that start at `place`."""
    first_ptr = neighbors_ptr + row.to(tl.int64) * K + place
    for i in range(kept.shape[1]):  # not tl.sort, whose registers spill
        best = tl.max(kept, 1, keep_dims=True)
        tl.store(first_ptr + i, (best & LOW) ^ LOW, (row < R) & (place + i < K))
        kept = tl.where(kept == best, EMPTY, kept)


@triton.jit
def _products(
    row_ptr,
    column_ptr,
    row_scale,
    column_scale,
    N,
    stride_n,
    R: tl.constexpr,
    C: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """The products of R rows with C columns [R, C], and the squares of both [R] and [C]."""
    dot = tl.zeros([R, C], tl.float32)
    row_square, column_square = tl.zeros([R, BLOCK_N], tl.float32), tl.zeros([C, BLOCK_N], tl.float32)
    STAGES: tl.constexpr = 1 if SCALED else None  # seldom run; loads in flight take registers and would spill
    for start in tl.range(0, N, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)[None, :]
        offset = n.to(tl.int64) * stride_n
        of_row = tl.load(row_ptr + offset, n < N, other=0.0).to(tl.float32)
        of_column = tl.load(column_ptr + offset, n < N, other=0.0).to(tl.float32)
        if SCALED:
            of_row *= row_scale[:, None]
            of_column *= column_scale[:, None]
        dot = tl.dot(of_row, tl.trans(of_column), dot, input_precision=PRODUCT)
        row_square += of_row * of_row
        column_square += of_column * of_column
    return dot, tl.sum(row_square, 1), tl.sum(column_square, 1)


@triton.jit
def _scale(square):
    """The factor of a feature: 1, except where its square leaves the range of float32."""
    return tl.where(square <= LARGEST, 1.0, SCALE)


@triton.jit
def _cosine(weight_ptr, row, column, D, N, stride_d, stride_n, BLOCK_N: tl.constexpr, PRODUCT: tl.constexpr):
    """Cosines of the features `row` [R, 1] with `column` [1, C], as accurate as float32: [R, C]; a zero row gives 0."""
    column = tl.trans(column)
    row_ptr = weight_ptr + tl.minimum(row, D - 1).to(tl.int64) * stride_d  # beyond D: the last, unused
    column_ptr = weight_ptr + tl.minimum(column, D - 1).to(tl.int64) * stride_d
    R: tl.constexpr = row.shape[0]
    C: tl.constexpr = column.shape[0]
    dot, row_square, column_square = _products(
        row_ptr, column_ptr, None, None, N, stride_n, R, C, False, BLOCK_N, PRODUCT
    )
    row_scale, column_scale = _scale(row_square), _scale(column_square)
    if tl.minimum(tl.min(row_scale), tl.min(column_scale)) < 1:
        dot, row_square, column_square = _products(
            row_ptr, column_ptr, row_scale, column_scale, N, stride_n, R, C, True, BLOCK_N, PRODUCT
        )
    row_inverse = 1 / (tl.sqrt(row_square) + EPS * row_scale)
    column_inverse = 1 / (tl.sqrt(column_square) + EPS * column_scale)
    return dot * row_inverse[:, None] * column_inverse[None, :]


@triton.jit(do_not_specialize=["K", "recompute_every"])
def _neighbors_kernel(
    weight_ptr,
    neighbors_ptr,
    step_ptr,
    refreshed_at_ptr,
    D,
    N,
    K,
    stride_d,
    stride_n,
    recompute_every,
    REFRESH: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    if REFRESH:
        step = tl.load(step_ptr)
        # The low bits stay as they were until the last program has decided; those of -1 (never) equal no step.
        refreshed_at = tl.load(refreshed_at_ptr) & (ARRIVAL - 1)
        if (step % recompute_every != 0) | (refreshed_at == step):
            return
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]  # [BLOCK_R, 1]
    last = tl.full([BLOCK_R, 1], 2**63 - 1, tl.int64)
    for place in range(0, K, KEPT):  # each pass finds the next KEPT after those of the pass before
        kept = tl.full([BLOCK_R, KEPT], EMPTY, tl.int64) + tl.arange(0, KEPT)[None, :]  # distinct: one leaves at a time
        for start in range(0, D, BLOCK_C):
            column = start + tl.arange(0, BLOCK_C)[None, :]  # [1, BLOCK_C]
            similarity = _cosine(weight_ptr, row, column, D, N, stride_d, stride_n, BLOCK_N, PRODUCT)
            kept = _keep(_keys(similarity, row, column, D, last), kept)
        _write(neighbors_ptr, kept, row, D, place, K)
        last = tl.min(kept, 1, keep_dims=True)
    if REFRESH:
        arrived = (tl.atomic_add(refreshed_at_ptr, ARRIVAL) + 1) // ARRIVAL  # before this program; + 1 because of -1
        if arrived == tl.num_programs(0) - 1:
            tl.store(refreshed_at_ptr, tl.load(step_ptr))  # read again, not kept in a register


@triton.jit(do_not_specialize=["first", "R", "K"])
def _nearest_kernel(
    similarity_ptr,
    neighbors_ptr,
    first,
    R,
    D,
    K,
    stride_r,
    stride_d,
    KEPT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]  # [BLOCK_R, 1]
    row_ptr = similarity_ptr + row.to(tl.int64) * stride_r
    last = tl.full([BLOCK_R, 1], 2**63 - 1, tl.int64)
    for place in range(0, K, KEPT):
        kept = tl.full([BLOCK_R, KEPT], EMPTY, tl.int64) + tl.arange(0, KEPT)[None, :]
        for start in range(0, D, BLOCK_C):
            column = start + tl.arange(0, BLOCK_C)[None, :]  # [1, BLOCK_C]
            similarity = tl.load(row_ptr + column.to(tl.int64) * stride_d, (row < R) & (column < D), other=0.0)
            kept = _keep(_keys(similarity.to(tl.float32), first + row, column, D, last), kept)
        _write(neighbors_ptr, kept, row, R, place, K)
        last = tl.min(kept, 1, keep_dims=True)


def _kept(K: int) -> int:
    """How many neighbors a pass finds: less than 8 gains nothing."""
    return min(max(1 << (K - 1).bit_length(), 8), MAX_KEPT)


def _launch(
    weight: torch.Tensor,
    neighbors: torch.Tensor,
    step: torch.Tensor | None,
    refreshed_at: torch.Tensor | None,
    recompute_every: int,
) -> None:
    (D, N), K = weight.shape, neighbors.shape[1]
    BLOCK_R, BLOCK_C, BLOCK_N, num_warps = FEW if D < FROM else MANY
    _neighbors_kernel[(-(-D // BLOCK_R),)](
        weight,
        neighbors,
        step,
        refreshed_at,
        D,
        N,
        K,
        *weight.stride(),
        recompute_every,
        step is not None,
        _kept(K),
        BLOCK_R,
        BLOCK_C,
        BLOCK_N,
        PRODUCT,
        num_warps=num_warps,
        **REGISTERS,
    )


def neighbors(weight: torch.Tensor, neighborhood_k: int) -> torch.Tensor:
    """weight [D, N] any strides -> the features most similar to each [D, min(neighborhood_k, D - 1)] int64."""
    D = weight.shape[0]
    neighbors = weight.new_empty(D, min(neighborhood_k, D - 1), dtype=torch.int64)
    _launch(weight, neighbors, None, None, 1)
    return neighbors


def refresh_(
    weight: torch.Tensor,
    neighbors: torch.Tensor,
    step: torch.Tensor,
    refreshed_at: torch.Tensor,
    recompute_every: int,
) -> None:
    """weight [D, N] any strides; rewrites neighbors [D, k] and refreshed_at where they are due at `step`.

    step and refreshed_at are int64 scalars on the device, read and written there; step < 2^40 - 1.
    """
    packed = neighbors.contiguous()
    _launch(weight, packed, step, refreshed_at, recompute_every)
    if packed is not neighbors:
        neighbors.copy_(packed)


def nearest(similarity: torch.Tensor, first: int, neighborhood_k: int) -> torch.Tensor:
    """similarity [R, D] of the features first .. first + R - 1, any strides -> their nearest others [R, k] int64."""
    (R, D), K = similarity.shape, min(neighborhood_k, similarity.shape[1] - 1)
    neighbors = similarity.new_empty(R, K, dtype=torch.int64)
    BLOCK_R, BLOCK_C = NEAREST
    _nearest_kernel[(-(-R // BLOCK_R),)](
        similarity, neighbors, first, R, D, K, *similarity.stride(), _kept(K), BLOCK_R, BLOCK_C, **REGISTERS
    )
    return neighbors
