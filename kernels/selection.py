"""Selection (SPEC 9b): the samples each feature is rescued to and their shares, exact without sorting a column.

Keys and scores are packed into integers that are all distinct and stand in the order of the contract: (key, sample)
rising, so that a rank is the number of smaller ones, and (score, sample) with the smaller sample the larger integer.
For `rank` with needs, a few probes of known rank bound every rank of their column, hence every score, by the same
rounded product as the score itself. Samples whose upper bound reaches the r-th best lower bound survive; they are the
next probes, and where few survive, the r best of them by exact rank are the choice.
"""

import torch
import triton
import triton.language as tl

EPS = tl.constexpr(1e-8)
MOST = 32  # so many samples are chosen by the kernel; beyond, columns are sorted
EXACT = 1 << 24  # beyond so many samples float32(rank) rounds, and the order of keys is not the order of scores
BLOCK_D = 8  # 32 bytes, a whole sector, of every row of float32

PROBES = tl.constexpr(64)  # of a column at a time
CHUNK = tl.constexpr(16)  # are counted at a time
PIVOTS = tl.constexpr(16)  # the first probes
DRAWN = tl.constexpr(256)  # samples whose quantiles they are: PIVOTS squared
ROUNDS = tl.constexpr(4)  # of bounds; then every sample of these columns becomes a probe

SAMPLE = tl.constexpr(0x7FFFFFFF)  # the bits of a packed integer that name the sample
UNKNOWN = tl.constexpr(0x7FFFFFFF << 31)  # NaN keys start here
LAST = tl.constexpr((1 << 62) - 1)  # no key: above all
NOTHING = tl.constexpr(-(1 << 62))  # no score: below all


# --- Keys and scores as integers --------------------------------------------------------------------------------------


@triton.jit
def _packed(x, low):
    """(x, low) in the order of both: -0 equals +0, NaN is above all numbers."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    ordered = tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 31) | low  # 63 bits: differences do not overflow


@triton.jit
def _packed_score(score, b, known):
    """What is not known, or NaN, counts as -inf."""
    return _packed(tl.where(known & (score == score), score, float("-inf")), b ^ SAMPLE)


@triton.jit
def _of_samples(vector_ptr, b, B):
    return tl.load(vector_ptr + b, b < B, other=0.0)


@triton.jit
def _key(source, b, x_inverse_norm):
    """Keys of the samples b, both [rows, 1] or [rows, BLOCK_D] -> [rows, BLOCK_D]."""
    activation_ptr, x_inverse_norm_ptr, need_ptr, B, stride_b, column, bias, inside = source
    a = tl.load(activation_ptr + b.to(tl.int64) * stride_b + column, (b < B) & inside, other=0.0).to(tl.float32)
    return (a - bias) * x_inverse_norm


@triton.jit
def _packed_key(source, b, x_inverse_norm):
    return tl.where((b < source[3]) & source[7], _packed(_key(source, b, x_inverse_norm), b), LAST)


@triton.jit
def _row_keys(source, b):
    """Packed keys of the samples b [...] -> [..., BLOCK_D]."""
    x_inverse_norm = _of_samples(source[1], b, source[3])
    return _packed_key(source, tl.expand_dims(b, -1), tl.expand_dims(x_inverse_norm, -1))


@triton.jit
def _best(best, scores, r):
    """The r largest of best [PROBES, BLOCK_D] and scores [rows, BLOCK_D], falling: [PROBES, BLOCK_D]."""
    slot = tl.arange(0, PROBES)[:, None]
    merged = tl.full(best.shape, NOTHING, tl.int64)
    for i in range(r):
        top = tl.maximum(tl.max(best, 0), tl.max(scores, 0))[None, :]
        merged = tl.where(slot == i, top, merged)
        best = tl.where(best == top, NOTHING, best)
        scores = tl.where(scores == top, NOTHING, scores)
    return merged


@triton.jit
def _worst(best, r):
    """The r-th of what `_best` returned: [1, BLOCK_D]."""
    return tl.min(tl.where(tl.arange(0, PROBES)[:, None] < r, best, LAST), 0)[None, :]


# --- Rank with needs: bounds --------------------------------------------------------------------------------------


@triton.jit
def _publish(probe_ptr, probes, BLOCK_D: tl.constexpr):
    """Probes [PROBES, BLOCK_D] to where the whole program reads them."""
    tl.debug_barrier()
    tl.store(probe_ptr + tl.arange(0, PROBES)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :], probes)
    tl.debug_barrier()


@triton.jit
def _count(source, probe_ptr, rank_ptr, n, BLOCK_B: tl.constexpr, THREADS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rank of each of the first n probes: how many keys of its column stand below it."""
    B = source[3]
    column = tl.arange(0, BLOCK_D)[None, :]
    step = tl.arange(0, BLOCK_B // THREADS)[:, None] * THREADS + tl.arange(0, THREADS)[None, :]
    for some in range(0, n, CHUNK):
        below = tl.zeros([CHUNK, THREADS, BLOCK_D], tl.int32)  # each thread counts alone
        for first in range(0, B, BLOCK_B):
            keys = _row_keys(source, first + step)
            for i in tl.static_range(CHUNK):
                probe = tl.load(probe_ptr + (some + i) * BLOCK_D + column)[None, :, :]
                here = tl.sum(((keys - probe).to(tl.uint64) >> 63).to(tl.int32), 0)[None, :, :]
                below += tl.where(tl.arange(0, CHUNK)[:, None, None] == i, here, 0)
        rank = tl.sum(below, 1).to(tl.int64)
        tl.store(rank_ptr + (some + tl.arange(0, CHUNK)[:, None]) * BLOCK_D + column, rank)
    tl.debug_barrier()


@triton.jit
def _score_bounds(source, known_ptr, n, b, LANES: tl.constexpr, BLOCK_D: tl.constexpr):
    """Keys of the samples b [LANES], and what their scores are at least and at most: [LANES, BLOCK_D]."""
    keys = _row_keys(source, b)
    lower = tl.zeros([LANES, BLOCK_D], tl.int32)
    upper = lower + (source[3] - 1)
    at = known_ptr + tl.arange(0, BLOCK_D)[None, :]
    for i in range(n):
        above = tl.load(at + i * BLOCK_D) < keys
        rank = tl.load(at + (PROBES + i) * BLOCK_D).to(tl.int32)
        lower = tl.where(above, tl.maximum(lower, rank + 1), lower)
        upper = tl.where(above, upper, tl.minimum(upper, rank))
    known, need = keys < UNKNOWN, _of_samples(source[2], b, source[3])[:, None]
    one = _packed_score(lower.to(tl.float32) * need, b[:, None], known)
    two = _packed_score(upper.to(tl.float32) * need, b[:, None], known)
    some = keys != LAST  # a negative need turns the bounds round
    return keys, tl.where(some, tl.minimum(one, two), NOTHING), tl.where(some, tl.maximum(one, two), NOTHING)


@triton.jit
def _reach(source, b):
    """The best score of the samples b at any rank."""
    B, need = source[3], _of_samples(source[2], b, source[3])
    most = tl.maximum(_packed_score(need * 0, b, b < B), _packed_score(need * (B - 1).to(tl.float32), b, b < B))
    return tl.where(b < B, most, NOTHING)


@triton.jit
def _draw(source, probe_ptr, BLOCK_D: tl.constexpr):
    """The first probes: of the keys of DRAWN samples the largest, and those 1, 4, 9 ... places below."""
    b = (tl.arange(0, DRAWN).to(tl.int64) * source[3] // DRAWN).to(tl.int32)
    keys = tl.sort(tl.trans(_row_keys(source, b)), 1)  # [BLOCK_D, DRAWN]
    down = DRAWN - 1 - tl.arange(0, DRAWN)[None, :]
    slot = (tl.sqrt(down.to(tl.float32)) + 0.5).to(tl.int32)
    tl.store(probe_ptr + slot * BLOCK_D + tl.arange(0, BLOCK_D)[:, None], keys, slot * slot == down)


@triton.jit
def _neediest(source, LANES: tl.constexpr):
    """Of the samples equal modulo LANES the one that could score best, B where there is none: [LANES]."""
    B = source[3]
    best = tl.full([LANES], NOTHING, tl.int64)
    for first in range(0, B, 8 * LANES):
        b = first + tl.arange(0, 8)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        best = tl.maximum(best, tl.max(_reach(source, b), 0))
    return tl.where(best == NOTHING, B, (best & SAMPLE).to(tl.int32) ^ SAMPLE)


@triton.jit
def _list_active(source, active_ptr, least, LANES: tl.constexpr):
    """List the samples that could reach `least` in some column; how many they are."""
    B = source[3]
    bar, active = tl.min(least), 0
    tl.debug_barrier()
    for first in range(0, B, 8 * LANES):
        b = first + tl.arange(0, 8 * LANES)
        able = ((_reach(source, b) >= bar) & (b < B)).to(tl.int32)
        tl.store(active_ptr + active + tl.cumsum(able, 0) - 1, b, able > 0)
        active += tl.sum(able)
    tl.debug_barrier()
    return active


@triton.jit
def _active(active_ptr, i, active, B):
    return tl.load(active_ptr + i, i < active, other=B)


@triton.jit
def _survivors(
    source, probe_ptr, active_ptr, r, BLOCK_B: tl.constexpr, LANES: tl.constexpr, THREADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Leave as probes the keys of all samples that may be among the r best; how many they are in the fullest column.

    Where that is more than PROBES, some are missing.
    """
    B, inside = source[3], source[7]
    column, slot = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, PROBES)[:, None]
    at = slot * BLOCK_D + column
    none = tl.full([PROBES, BLOCK_D], NOTHING, tl.int64)
    least = tl.where(inside, NOTHING, LAST)  # a lower bound of the r-th best score [1, BLOCK_D]
    lane = tl.arange(0, LANES)
    tl.store(active_ptr + lane, _neediest(source, LANES), lane < B)
    _draw(source, probe_ptr, BLOCK_D)
    tl.debug_barrier()
    known_ptr = probe_ptr + PROBES * BLOCK_D  # probes and their ranks, while new ones are found
    n, active, rounds, found = PIVOTS + 0, tl.minimum(B, LANES), 0, PROBES + 1
    while (found > PROBES) & (rounds < ROUNDS):
        _count(source, probe_ptr, known_ptr + PROBES * BLOCK_D, n, BLOCK_B, THREADS, BLOCK_D)
        tl.store(known_ptr + at, tl.load(probe_ptr + at))
        _publish(probe_ptr, tl.full([PROBES, BLOCK_D], LAST, tl.int64), BLOCK_D)

        passes = 2
        while passes > 0:
            lanes = tl.full([LANES, BLOCK_D], NOTHING, tl.int64)
            for first in range(0, active, LANES):
                b = _active(active_ptr, first + lane, active, B)
                _, low, _ = _score_bounds(source, known_ptr, n, b, LANES, BLOCK_D)
                lanes = tl.maximum(lanes, low)
            least = tl.maximum(least, _worst(_best(none, lanes, r), r))
            active = _list_active(source, active_ptr, least, LANES)
            passes = tl.where(active > LANES, passes - 1, 0)  # then others than the neediest may raise it

        count = tl.zeros([1, BLOCK_D], tl.int32)
        for first in range(0, active, LANES):
            b = _active(active_ptr, first + lane, active, B)
            keys, _, high = _score_bounds(source, known_ptr, n, b, LANES, BLOCK_D)
            alive = ((high >= least) & (keys != LAST)).to(tl.int32)
            place = count + tl.cumsum(alive, 0) - 1
            tl.store(probe_ptr + place * BLOCK_D + column, keys, (alive > 0) & (place < PROBES))
            count += tl.sum(alive, 0)[None, :]
        tl.debug_barrier()
        found = tl.max(count)
        n = tl.minimum(found, PROBES)
        rounds += 1
    return found


@triton.jit
def _best_by_bounds(
    source, probe_ptr, active_ptr, r, BLOCK_B: tl.constexpr, LANES: tl.constexpr, THREADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The r best scores rank * need: [PROBES, BLOCK_D]."""
    B = source[3]
    slot = tl.arange(0, PROBES)
    at = slot[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    rank_ptr = probe_ptr + 2 * PROBES * BLOCK_D
    best = tl.full([PROBES, BLOCK_D], NOTHING, tl.int64)
    found = PROBES + 1
    if B > PROBES:
        found = _survivors(source, probe_ptr, active_ptr, r, BLOCK_B, LANES, THREADS, BLOCK_D)
    decided = found <= PROBES
    for first in range(0, tl.where(decided, 1, B), PROBES):
        n = tl.where(found == r, 0, found)  # if just r survive they are chosen, whatever their ranks
        if not decided:
            _publish(probe_ptr, _row_keys(source, first + slot), BLOCK_D)
            n = tl.minimum(B - first, PROBES)
        _count(source, probe_ptr, rank_ptr, n, BLOCK_B, THREADS, BLOCK_D)
        probes, rank = tl.load(probe_ptr + at), tl.load(rank_ptr + at)
        b = (probes & SAMPLE).to(tl.int32)
        scores = _packed_score(rank.to(tl.float32) * _of_samples(source[2], b, B), b, probes < UNKNOWN)
        best = _best(best, tl.where(probes == LAST, NOTHING, scores), r)
    return best


# --- The other rules: scores known at once ----------------------------------------------------------------------------


@triton.jit
def _cosine(key, weight_inverse_norm, RULE: tl.constexpr):
    cosine = key * weight_inverse_norm
    return tl.where(cosine < 0, 0.0, cosine) if RULE == "clamped_cosine" else cosine


@triton.jit
def _best_of_stream(
    source, weight_inverse_norm, r,
    RULE: tl.constexpr, HAS_NEED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The r best scores that need no rank, or the r highest ranks: [PROBES, BLOCK_D]."""
    B, inside = source[3], source[7]
    best = tl.full([PROBES, BLOCK_D], NOTHING, tl.int64)
    for first in range(0, B, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        key, need = _key(source, b[:, None], _of_samples(source[1], b, B)[:, None]), 1.0
        if HAS_NEED:
            need = _of_samples(source[2], b, B)[:, None]
        b = b[:, None]
        if RULE == "rank":  # of equal keys the larger sample has the higher rank
            scores = tl.where(key == key, _packed(key, b), (b ^ SAMPLE).to(tl.int64) | NOTHING)
        else:
            scores = _packed_score(_cosine(key, weight_inverse_norm, RULE) * need, b, key == key)
        scores = tl.where((b < B) & inside, scores, NOTHING)
        if tl.max((scores > _worst(best, r)).to(tl.int32)) > 0:
            best = _best(best, scores, r)
    return best


@triton.jit(do_not_specialize=["B", "r", "stride_b", "stride_d"])
def _selection_kernel(
    activation_ptr, bias_ptr, x_inverse_norm_ptr, weight_inverse_norm_ptr, need_ptr, row_ptr, share_ptr,
    probe_ptr, active_ptr, B, D, r, stride_b, stride_d, equal_share,
    RULE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NEED: tl.constexpr, SOFT: tl.constexpr,
    BLOCK_B: tl.constexpr, LANES: tl.constexpr, THREADS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    d = program * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
    inside = d < D
    bias = tl.load(bias_ptr + d, inside, other=0.0).to(tl.float32) if HAS_BIAS else tl.zeros([1, BLOCK_D], tl.float32)
    source = activation_ptr, x_inverse_norm_ptr, need_ptr, B, stride_b, d * stride_d, bias, inside
    winv = 0.0 if RULE == "rank" else tl.load(weight_inverse_norm_ptr + d, inside, other=0.0)
    probe_ptr += program * 3 * PROBES * BLOCK_D

    if RULE == "rank" and HAS_NEED:
        best = _best_by_bounds(source, probe_ptr, active_ptr + program * B, r, BLOCK_B, LANES, THREADS, BLOCK_D)
    else:
        best = _best_of_stream(source, winv, r, RULE, HAS_NEED, BLOCK_B, BLOCK_D)
    low = (best & SAMPLE).to(tl.int32)
    b = low ^ SAMPLE
    if RULE == "rank" and not HAS_NEED:
        b = tl.where(best <= NOTHING + SAMPLE, b, low)
    slot = tl.arange(0, PROBES)[:, None]
    chosen = (slot < r) & inside
    tl.store(row_ptr + d * r + slot, b.to(tl.int64), chosen)

    if SOFT:
        x_inverse_norm = _of_samples(x_inverse_norm_ptr, b, B)
        if RULE == "rank":
            _publish(probe_ptr, tl.where(chosen, _packed_key(source, b, x_inverse_norm), LAST), BLOCK_D)
            rank_ptr = probe_ptr + 2 * PROBES * BLOCK_D
            _count(source, probe_ptr, rank_ptr, r, BLOCK_B, THREADS, BLOCK_D)
            rank = tl.load(rank_ptr + slot * BLOCK_D + tl.arange(0, BLOCK_D)[None, :])
            value = tl.where(B > 1, rank.to(tl.float32) / tl.maximum(B - 1, 1), 1.0)
        else:
            value = _cosine(_key(source, b, x_inverse_norm), winv, RULE)
        value = value * _of_samples(need_ptr, b, B) if HAS_NEED else value
        value = tl.where((value < 0) | (slot >= r), 0.0, value)
        share = value / (tl.sum(value, 0)[None, :] + EPS)
    else:
        share = tl.full([PROBES, BLOCK_D], 0.0, tl.float32) + equal_share
    tl.store(share_ptr + d * r + slot, share, chosen)


# --- Launchers ----------------------------------------------------------------------------------------------------


def _place(values: torch.Tensor) -> torch.Tensor:
    """Stable position of every element in its column [B, D] by one sort of integers: -0 equals +0, NaN last."""
    bits = torch.where(values == 0, 0.0, values).view(torch.int32)
    ordered = torch.where(values.isnan(), 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    order = ordered.sort(dim=0, stable=True).indices
    place = torch.arange(len(values), device=values.device)[:, None].expand_as(order)
    return torch.empty_like(order).scatter_(0, order, place)


def _select_by_sorting(key, weight_inverse_norm, need, affinity_rule, soft, r):
    """Any number of samples: key [B, D] float32 -> rescue_rows, shares [D, r]."""
    B, D = key.shape
    if affinity_rule == "rank":
        affinity = _place(key).to(torch.float32)
    else:
        affinity = key * weight_inverse_norm
        affinity = affinity.clamp_(min=0) if affinity_rule == "clamped_cosine" else affinity
    score = affinity if need is None else affinity * need[:, None]
    known = ~(key.isnan() | score.isnan())
    rows = _place(torch.where(known, -score, torch.inf)).argsort(dim=0)[:r].T.contiguous()
    if not soft:
        return rows, torch.full(rows.shape, 1 / r, device=key.device)
    value = score.T.gather(1, rows).clamp_(min=0)
    if affinity_rule == "rank":
        value = value / (B - 1)
    return rows, value / (value.sum(dim=1, keepdim=True) + EPS.value)


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
    (B, D), device = activation.shape, activation.device
    r, soft = min(rescue_k or B, B), rescue_weighting == "soft"
    rows = torch.empty(D, r, dtype=torch.int64, device=device)
    shares = torch.empty(D, r, dtype=torch.float32, device=device)
    programs = triton.cdiv(D, BLOCK_D)
    bounded = affinity_rule == "rank" and need is not None
    probes = torch.empty(programs, 3, PROBES.value, BLOCK_D, dtype=torch.int64, device=device)
    active = torch.empty(programs if bounded else 0, B, dtype=torch.int32, device=device)
    BLOCK_B, LANES, warps = (128, 128, 4) if B <= 128 else (512, 256, 8)
    _selection_kernel[programs,](
        activation, bias, x_inverse_norm, weight_inverse_norm, need, rows, shares, probes, active,
        B, D, r, *activation.stride(), 1 / r,
        affinity_rule, bias is not None, need is not None, soft, BLOCK_B, LANES, warps * 4, BLOCK_D, num_warps=warps,
    )  # fmt: skip
    return rows, shares
