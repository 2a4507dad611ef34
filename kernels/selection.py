"""Selection (step 9b): the samples each feature is rescued to and their shares; and `rank`, the order that decides it.

A program takes a few columns. It sorts runs of each, short enough for registers; the rank of a key is its place in its
own run and, by binary search, in every other. Keys and scores are packed with their sample into integers that are all
distinct, so that ties need no care. Only samples that could still be chosen are looked up.
"""

import torch
import triton
import triton.language as tl

from .bits import EPS, pack, unpack

MAX_CHOSEN = 32  # samples of a feature chosen in registers; more are chosen by sorting
PROGRAMS = 264  # each holds the sorted runs of its columns, in twice their memory: together less than one large [B, D]
COLUMNS = 4  # half a sector of float32 of every row: more would spill where a run is sorted
SHORT, RUN = 128, 1024  # elements of a run: SHORT where a single one holds the batch
BLOCK = 128  # elements of a run, or samples, that are read together
WARPS = 8
# Beyond so many runs torch sorts whole columns. Of the samples that could be chosen a fraction of one run is looked up,
# however many there are (0.16 for each element at 8 runs, 0.30 at 64), but the runs of 65,536 samples take half a
# gigabyte; where all ranks are asked for, every run is a search for every element.
MAX_RUNS, MAX_RUNS_OF_RANK = 64, 8
SORTED = 1 << 23  # elements sorted at once: half a gigabyte with its copies, places and torch's own scratch memory
# Without a limit ptxas spills a few bytes to fit one more program; the AMD compiler does not know the option.
REGISTERS = {} if torch.version.hip else {"maxnreg": 255}

SAMPLE = tl.constexpr(0x7FFFFFFF)  # the bits of a packed integer that name its sample
LAST = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # above every key
UNKNOWN = tl.constexpr(0x7FFFFFFF00000000)  # keys that are NaN start here
NOTHING = tl.constexpr(-0x8000000000000000)  # below every score, as are the few integers that follow it


@triton.jit
def _keys(
    activation_ptr,
    bias_ptr,
    x_inverse_norm_ptr,
    b,
    d,
    B,
    stride_b,
    stride_d,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """(A - c) / |x| of the samples b [1, P] and the columns d [COLUMNS, 1], which are columns there are."""
    key = tl.load(activation_ptr + b.to(tl.int64) * stride_b + d * stride_d, b < B, other=0.0).to(tl.float32)
    if HAS_BIAS:
        key -= tl.load(bias_ptr + d).to(tl.float32)
    if HAS_NORM:
        key *= tl.load(x_inverse_norm_ptr + b, b < B, other=0.0)
    return key


@triton.jit
def _promising(most, need, b, worst, HAS_NEED: tl.constexpr):
    """Whether samples of at most this rank could still be chosen; a negative need does best at rank 0."""
    reach = most.to(tl.float32)
    if HAS_NEED:
        reach = tl.where(need > 0, reach * need, 0.0)
    return pack(reach, b ^ SAMPLE) > worst


@triton.jit
def _rank(
    packed,
    able,
    place,
    own,
    most,
    need,
    b,
    worst,
    run_ptr,
    B,
    runs,
    HAS_NEED: tl.constexpr,
    RANKS: tl.constexpr,
    RUN: tl.constexpr,
):
    """How many elements of all runs are smaller than these, which stand at `place` in the run `own`; and who is `able`.

    `most`, the largest rank still possible, falls with every run that is searched: an element that can no longer be
    chosen is not looked up further and has no rank.
    """
    rank = place + tl.zeros_like(packed).to(tl.int32)
    most += tl.zeros_like(rank)
    run, going = 0, tl.max(able.to(tl.int32))
    while (run < runs) & (going > 0):
        if run != own:
            below, step = tl.zeros_like(rank), RUN // 2
            while step > 0:  # bit by bit
                probe = tl.load(run_ptr + run * RUN + below + step - 1, able, other=LAST)
                below += tl.where(probe < packed, step, 0)
                step //= 2
            below += (tl.load(run_ptr + run * RUN + below, able, other=LAST) < packed).to(tl.int32)
            rank += below
            if not RANKS:
                most -= tl.minimum(RUN, B - run * RUN) - below
                able = able & _promising(most, need, b, worst, HAS_NEED)
                going = tl.max(able.to(tl.int32))
        run += 1
    return rank, able


@triton.jit
def _keep(new, kept):
    """Merge scores [COLUMNS, P] into the unordered list [COLUMNS, KEPT] of the largest of each column."""
    best, worst = tl.max(new, 1, keep_dims=True), tl.min(kept, 1, keep_dims=True)
    while tl.max((best > worst).to(tl.int32)) > 0:
        kept = tl.where((kept == worst) & (best > worst), best, kept)
        new = tl.where(new == best, NOTHING, new)
        best, worst = tl.max(new, 1, keep_dims=True), tl.min(kept, 1, keep_dims=True)
    return kept


@triton.jit
def _write(row_ptr, share_ptr, kept, scale, d, there, r, SOFT: tl.constexpr):
    """The r largest of each list [COLUMNS, KEPT] and their shares, all alike or by score."""
    total = tl.zeros([kept.shape[0], 1], tl.float32)
    left = kept
    for i in range(r):
        best = tl.max(left, 1, keep_dims=True)
        tl.store(row_ptr + d * r + i, (best & SAMPLE) ^ SAMPLE, there)
        total += tl.maximum(unpack(best), 0.0) * scale
        left = tl.where(left == best, NOTHING, left)
    for i in range(r):
        best = tl.max(kept, 1, keep_dims=True)
        share = tl.maximum(unpack(best), 0.0) * scale / (total + EPS) if SOFT else tl.zeros_like(total) + scale
        tl.store(share_ptr + d * r + i, share, there)
        kept = tl.where(kept == best, NOTHING, kept)


@triton.jit
def _scores(affinity, need_ptr, key, b, B, inside, HAS_NEED: tl.constexpr):
    """affinity * need, packed; a NaN key or score counts as -inf, and of equal scores the smaller sample is larger."""
    if HAS_NEED:
        affinity *= tl.load(need_ptr + b, b < B, other=0.0)
    known = (key == key) & (affinity == affinity)
    return tl.where(inside, pack(tl.where(known, affinity, float("-inf")), b ^ SAMPLE), NOTHING)


@triton.jit(do_not_specialize=["B", "r", "runs", "stride_b", "stride_d"])
def _selection_kernel(
    activation_ptr,
    bias_ptr,
    x_inverse_norm_ptr,
    weight_inverse_norm_ptr,
    need_ptr,
    run_ptr,
    row_ptr,
    share_ptr,
    rank_ptr,
    B,
    D,
    r,
    runs,
    stride_b,
    stride_d,
    scale,
    RULE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_NEED: tl.constexpr,
    SOFT: tl.constexpr,
    RANKS: tl.constexpr,
    KEPT: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    run_ptr += (tl.program_id(0).to(tl.int64) * COLUMNS + column) * runs * RUN
    for group in range(tl.program_id(0), tl.cdiv(D, COLUMNS), tl.num_programs(0)):
        there = group * COLUMNS + column < D
        d = tl.minimum(group * COLUMNS + column, D - 1).to(tl.int64)  # a copy of the last column beyond it
        kept = tl.full([COLUMNS, KEPT], NOTHING, tl.int64) + tl.arange(0, KEPT)[None, :]
        if RULE == "rank":
            tl.debug_barrier()  # the runs of the columns before have been read
            for run in range(runs):
                b = run * RUN + tl.arange(0, RUN)[None, :]
                key = _keys(
                    activation_ptr, bias_ptr, x_inverse_norm_ptr, b, d, B, stride_b, stride_d, HAS_BIAS, HAS_NORM
                )
                tl.store(run_ptr + b, tl.sort(tl.where(b < B, pack(key, b), LAST), 1))
            tl.debug_barrier()
        for block in range(0, tl.cdiv(B, BLOCK) if RULE != "rank" else runs * (RUN // BLOCK)):
            if RULE == "rank":  # from the top of every run: what comes later is less likely to be chosen
                own, place = block % runs, RUN - BLOCK * (1 + block // runs) + lane
                packed = tl.load(run_ptr + own * RUN + place)
                inside = packed != LAST
                b = tl.where(inside, (packed & SAMPLE).to(tl.int32), 0)
                need = packed
                if HAS_NEED:
                    need = tl.load(need_ptr + b, inside, other=0.0)
                most = B - tl.minimum(RUN, B - own * RUN) + place  # the rank if all elements of other runs are smaller
                worst = tl.min(kept, 1, keep_dims=True)
                able = inside if RANKS else inside & _promising(most, need, b, worst, HAS_NEED)
                if tl.max(able.to(tl.int32)) > 0:
                    rank, able = _rank(
                        packed, able, place, own, most, need, b, worst, run_ptr, B, runs, HAS_NEED, RANKS, RUN
                    )
                    if RANKS:
                        tl.store(rank_ptr + b.to(tl.int64) * D + d, rank.to(tl.int64), able & there)
                    else:
                        affinity = tl.where(B > 1, rank.to(tl.float32), 1.0)  # a single sample's is 1
                        key = tl.where(packed < UNKNOWN, 0.0, float("nan"))
                        kept = _keep(_scores(affinity, need_ptr, key, b, B, able, HAS_NEED), kept)
            else:
                b = block * BLOCK + lane
                key = _keys(
                    activation_ptr, bias_ptr, x_inverse_norm_ptr, b, d, B, stride_b, stride_d, HAS_BIAS, HAS_NORM
                )
                cosine = key * tl.load(weight_inverse_norm_ptr + d)
                if RULE == "clamped_cosine":
                    cosine = tl.where(cosine < 0, 0.0, cosine)
                kept = _keep(_scores(cosine, need_ptr, key, b, B, b < B, HAS_NEED), kept)
        if not RANKS:
            _write(row_ptr, share_ptr, kept, scale, d, there, r, SOFT)


def _launch(activation, bias, x_inverse_norm, weight_inverse_norm, need, rows, shares, ranks, rule, r, soft, scale):
    B, D = activation.shape
    run_length = SHORT if B <= SHORT else RUN
    runs, programs = -(-B // run_length), min(-(-D // COLUMNS), PROGRAMS)
    places = programs * COLUMNS * runs * run_length if rule == "rank" else 0
    run = activation.new_empty(places, dtype=torch.int64)
    _selection_kernel[(programs,)](
        activation,
        bias,
        x_inverse_norm,
        weight_inverse_norm,
        need,
        run,
        rows,
        shares,
        ranks,
        B,
        D,
        r,
        runs,
        *activation.stride(),
        scale,
        rule,
        bias is not None,
        x_inverse_norm is not None,
        need is not None,
        soft,
        ranks is not None,
        1 << max(r - 1, 1).bit_length(),
        run_length,
        min(BLOCK, run_length),
        COLUMNS,
        num_warps=WARPS,
        **REGISTERS,
    )


def _parts(B: int, D: int) -> list[slice]:
    """The columns in parts of at most SORTED elements, or of one column."""
    columns = max(SORTED // B, 1)
    return [slice(first, first + columns) for first in range(0, D, columns)]


def rank(key: torch.Tensor) -> torch.Tensor:
    """key [B, D] any strides -> stable rank of each element within its column [B, D] int64; NaN last, -0 equals +0."""
    B, D = key.shape
    ranks = key.new_empty(B, D, dtype=torch.int64)
    if B <= MAX_RUNS_OF_RANK * RUN:
        _launch(key, None, None, None, None, None, None, ranks, "rank", 1, False, 1.0)
        return ranks
    place = torch.arange(B, device=key.device)[:, None]
    for columns in _parts(B, D):
        part = key[:, columns]
        part = torch.where(part == part, part + 0.0, torch.nan)  # one zero and one NaN: a radix sort looks at signs
        order = part.sort(dim=0, stable=True).indices
        ranks[:, columns].scatter_(0, order, place.expand_as(order))
    return ranks


def _by_sorting(
    activation, bias, x_inverse_norm, weight_inverse_norm, need, rows, shares, affinity_rule, r, soft, scale
):
    """Any number of samples, and of runs, by parts of the columns: writes rescue_rows and shares [D, r]."""
    for columns in _parts(*activation.shape):
        key = activation[:, columns] if bias is None else activation[:, columns] - bias[columns]
        key = key * x_inverse_norm[:, None]
        if affinity_rule == "rank":
            affinity = rank(key).to(torch.float32)
        else:
            affinity = key * weight_inverse_norm[columns]
            affinity = affinity.clamp_(min=0) if affinity_rule == "clamped_cosine" else affinity
        affinity.masked_fill_(key.isnan(), torch.nan)
        if r <= MAX_CHOSEN:  # the ranks as cosines of features of norm 1
            one = torch.ones_like(affinity[0])
            given = affinity, None, None, one, need, rows[columns], shares[columns]
            _launch(*given, None, "cosine", r, soft, scale)
            continue
        score = affinity if need is None else affinity * need[:, None]
        score = score.masked_fill(score.isnan(), -torch.inf)
        rows[columns] = score.sort(dim=0, descending=True, stable=True).indices[:r].T
        shares[columns] = scale
        if soft:
            value = score.T.gather(1, rows[columns]).clamp_(min=0) * scale
            shares[columns] = value / (value.sum(dim=1, keepdim=True) + EPS.value)


def selection(
    activation: torch.Tensor,
    bias: torch.Tensor | None,
    x_inverse_norm: torch.Tensor,
    weight_inverse_norm: torch.Tensor | None,
    need: torch.Tensor | None,
    affinity_rule: str,
    rescue_weighting: str,
    rescue_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """activation [B, D] any strides, bias [D], inverse norms [B] and [D], need [B] float32 or None.

    -> rescue_rows [D, r] int64, r = min(rescue_k or B, B), and their shares [D, r] float32.
    """
    B, D = activation.shape
    r, ranked, soft = min(rescue_k or B, B), affinity_rule == "rank", rescue_weighting == "soft"
    rows, shares = activation.new_empty(D, r, dtype=torch.int64), activation.new_empty(D, r)
    scale = 1 / max(r, 1) if not soft else 1 / max(B - 1, 1) if ranked else 1.0
    arguments = activation, bias, x_inverse_norm, weight_inverse_norm, need, rows, shares
    if r > MAX_CHOSEN or (ranked and B > MAX_RUNS * RUN):
        _by_sorting(*arguments, affinity_rule, r, soft, scale)
    else:
        _launch(*arguments, None, affinity_rule, r, soft, scale)
    return rows, shares
