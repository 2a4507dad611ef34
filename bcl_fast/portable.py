"""The stages in plain torch operations, for any device: one product, the rest sparse.

The functions, their arguments and their results are those of the stages in `reference`; here is why they are fast.
The cosine is read off the layer's own output, so no further [B, D] x N product is formed. Neighbors are looked up
in row tiles that stay in cache, never as a [B, D, k] tensor. Ranks come from one sort per column, and both targets
are sums of a few rows of X.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .norms import with_norms
from .spec import EPS
from .structures import Competition, Pull, leading

# Elements of one working tile: on a CPU half a level-2 cache of float32, on an accelerator enough to fill it.
CPU_TILE, DEVICE_TILE = 1 << 18, 1 << 25

# Features of a tile of the neighbor search on a CPU; columns of a group, of which the largest is looked at first.
NEAR_TILE, GROUP = 1024, 16

# Where torch is built with FBGEMM it sorts flat integers of at least this many elements by radix.
RADIX_SORT, RADIX_MIN = "fbgemm" in torch.backends.quantized.supported_engines, 1 << 15


def missing(device_type: str, dtype: torch.dtype = torch.float32) -> str | None:
    """None where this backend serves weights of this dtype on this type of device, else the reason."""
    return "meta tensors hold no numbers" if device_type == "meta" else None


def why_not(stage: str, arguments: Sequence[Any]) -> str | None:
    """None where this backend serves a call of a stage with these arguments, else the reason."""
    return missing(leading(arguments).device.type)


def _tiles(rows: int, columns: int, device: torch.device) -> list[tuple[int, int]]:
    """Bounds [start, stop) of consecutive row tiles of a [rows, columns] matrix; 16 rows fill a cache line."""
    step = max(16, (CPU_TILE if device.type == "cpu" else DEVICE_TILE) // max(columns, 1))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _largest(score: Tensor, index: Tensor | None, count: int) -> Tensor:
    """Positions of the `count` largest of each row, of equal ones those of larger index: [R, C] -> [R, count] int64.

    The order within a row is open. index [R, C] int64 names each element; None means its position. `torch.topk` alone
    leaves open which of equal elements it takes: a second one decides among those that equal the last value taken.
    """
    C = score.shape[1]
    last = score.topk(count, dim=1, sorted=True).values[:, -1:]
    index = torch.arange(C, device=score.device) if index is None else index
    preference = torch.where(score == last, index, -1)
    return preference.masked_fill_(score > last, C).topk(count, dim=1, sorted=False).indices


def _nearest_places(similarity: Tensor, k: int) -> Tensor:
    """Places of the k largest of each row of [R, C], the largest first, of equal ones the smaller place first: [R, k].

    Where there are many columns they come in groups, of which the k with the largest maxima hold all that is sought:
    what lies in another is beaten by each of these maxima, or equals one of a smaller place.
    """
    R, C = similarity.shape
    if C <= GROUP * 2 * k:
        backwards = _largest(similarity.flip(1), None, k)
        near = (C - 1 - backwards).sort(dim=1).values
        return near.gather(1, similarity.gather(1, near).argsort(dim=1, descending=True, stable=True))
    whole = C // GROUP * GROUP
    groups = similarity[:, :whole].unflatten(1, (-1, GROUP))
    chosen = _nearest_places(groups.amax(dim=2), k).sort(dim=1).values
    places = (chosen[:, :, None] * GROUP + torch.arange(GROUP, device=similarity.device)).flatten(1)
    places = torch.cat([places, torch.arange(whole, C, device=similarity.device).expand(R, -1)], dim=1)
    return places.gather(1, _nearest_places(similarity.gather(1, places), k))


def nearest(similarity: Tensor, first: int, neighborhood_k: int) -> Tensor:
    """The panel [R, D] of similarities of features first .. first + R - 1 -> their nearest others [R, k] int64."""
    R, D = similarity.shape
    similarity = similarity.nan_to_num(nan=-2.0)
    own = torch.arange(R, device=similarity.device)
    similarity[own, own + first] = -torch.inf
    return _nearest_places(similarity, min(neighborhood_k, D - 1))


def _merged(best: Tensor, near: Tensor, similarity: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The lists best, near [R, k] with what of similarity [R, C] belongs there; `first`: the first column's feature.

    Its features follow those in the lists, so that a stable order puts the smaller index first.
    """
    k = best.shape[1]
    places = _nearest_places(similarity, min(k, similarity.shape[1]))
    best, near = torch.cat([best, similarity.gather(1, places)], dim=1), torch.cat([near, places + first], dim=1)
    best, order = best.sort(dim=1, descending=True, stable=True)
    return best[:, :k], near.gather(1, order[:, :k])


def neighbors(weight: Tensor, neighborhood_k: int) -> Tensor:
    """Stage `neighbors` (step 1), by tiles above the diagonal alone: a similarity is one for both of its features.

    Holds a copy of the weight and one tile; no [D, D] matrix.
    """
    rows, norm, _ = with_norms(weight)
    unit = rows / norm
    D = weight.shape[0]
    k = min(neighborhood_k, D - 1)
    tile = NEAR_TILE if unit.device.type == "cpu" else math.isqrt(DEVICE_TILE)
    if D <= tile:
        return nearest(unit @ unit.T, 0, k)
    best, near = unit.new_full((D, k), -torch.inf), torch.zeros(D, k, dtype=torch.int64, device=unit.device)
    for i in range(0, D, tile):
        here = slice(i, i + tile)
        for j in range(i, D, tile):
            there = slice(j, j + tile)
            similarity = (unit[here] @ unit[there].T).nan_to_num_(nan=-2.0)
            if i == j:
                similarity.fill_diagonal_(-torch.inf)
            else:
                best[there], near[there] = _merged(best[there], near[there], similarity.T.contiguous(), i)
            best[here], near[here] = _merged(best[here], near[here], similarity, j)
    return near


def _margin(activation: Tensor, neighbors: Tensor) -> Tensor:
    """Steps 2 and 3: the only [B, D] buffer of the stage."""
    (B, D), by_place = activation.shape, neighbors.T.contiguous()
    margin = torch.empty_like(activation, memory_format=torch.contiguous_format)
    for a, b in _tiles(B, D, activation.device):
        strength = activation[a:b].abs().T.contiguous()  # a neighbor's strengths are one row
        rival = strength.index_select(0, by_place[0])
        other = torch.empty_like(rival)
        for place in by_place[1:]:
            torch.maximum(rival, torch.index_select(strength, 0, place, out=other), out=rival)
        torch.sub(strength, rival, out=rival)
        margin[a:b] = rival.T
    return margin


def _pair_pull(rank_score: Tensor, neighbors: Tensor, pair_feature: Tensor) -> Tensor:
    """rank_score * local_novelty (step 6) of the pairs alone: [B, D], [D, k], [B, k] -> [B, k]."""
    claimed = torch.zeros(pair_feature.shape, dtype=rank_score.dtype, device=rank_score.device)
    for place in neighbors.T:
        claimed += rank_score.gather(1, place[pair_feature])
    return rank_score.gather(1, pair_feature) / (1 + claimed)


def inverse_norm(rows: Tensor) -> Tensor:
    """Stage `inverse_norm` (step 9b): 1 / (norm + EPS) of each row of [R, N] -> [R]."""
    _, norm, power = with_norms(rows)
    inverse = norm.reciprocal_()
    return (inverse if power is None else inverse.div_(power)).squeeze(1)


def competition(
    activation: Tensor,
    neighbors: Tensor,
    temperature: float,
    x: Tensor,
    forces: str,
    rescue_onset: float,
    pull_onset: float,
) -> Competition:
    """Stage `competition` (steps 2 to 8, and what follows from them for a sample or for a feature)."""
    neighbors = neighbors.clamp(0, neighbors.shape[0] - 1)  # as the reference: damaged state may hold anything
    margin = _margin(activation, neighbors)
    winner = margin.argmax(dim=1)
    rank_score = margin.mul_(temperature).sigmoid_()
    coverage = rank_score.sum(dim=1)
    total = rank_score.sum(dim=0)
    novelty = rank_score.T.mv(1 / (coverage + EPS)) / (total + EPS)
    win_rate, pair_feature = total / rank_score.shape[0], neighbors[winner]
    pair_pull = _pair_pull(rank_score, neighbors, pair_feature)
    coupled = forces == "coupled"
    winner_share = win_rate * novelty if coupled else win_rate.clone()
    som_strength = torch.ones_like(novelty) if coupled else 1 - novelty
    if rescue_onset:
        winner_share.masked_fill_(~(win_rate < rescue_onset), 1.0)
    if pull_onset:
        som_strength.masked_fill_(~(win_rate < pull_onset), 0.0)
    x_inverse_norm, need = inverse_norm(x.to(activation.dtype)), (coverage + 1).reciprocal_()
    pairs = pair_feature, pair_pull
    return Competition(rank_score, novelty, win_rate, winner, *pairs, x_inverse_norm, need, winner_share, som_strength)


def _descending(key: Tensor) -> Tensor:
    """Stable order of each row from the largest down, NaN first: [R, C] -> [R, C] int64. -0 equals +0."""
    R, C = key.shape
    if not (RADIX_SORT and key.device.type == "cpu" and key.dtype == torch.float32 and key.numel() >= RADIX_MIN):
        return key.sort(dim=1, descending=True, stable=True).indices
    # One radix sort of all rows, 3.5 times as fast as a comparison sort of each: (row, falling bits of the key).
    bits = (key + 0.0).masked_fill_(key.isnan(), torch.nan).view(torch.int32)  # +0 and NaN with one sign each
    falling = (bits >> 31).bitwise_not_().bitwise_or_(-(1 << 31)).bitwise_xor_(bits).to(torch.int64)
    row = torch.arange(R, device=key.device)[:, None]
    order = falling.add_((row << 32) + (1 << 31)).flatten().sort(stable=True).indices
    return order.view(R, C).sub_(row * C)


def _select_tile(
    key: Tensor, weight_inverse_norm: Tensor | None, need: Tensor | None, rule: str, rescue_weighting: str, r: int
) -> tuple[Tensor, Tensor]:
    """`selection` for the key [R, B] of a tile of R features -> samples [R, r], shares [R, r]; samples run backwards.

    Backwards, because a stable descending order then puts equal keys in the order of descending rank; and scores that
    descend are the good case of `topk`, ascending ones its worst.
    """
    R, B = key.shape
    unknown = key.isnan()
    if rule == "rank":
        sample = _descending(key)
        place = torch.arange(B, device=key.device)
        affinity = (B - 1 - place).to(key.dtype).expand(R, B)
        unknown = place < unknown.sum(dim=1, keepdim=True)
    else:
        sample = None
        assert weight_inverse_norm is not None  # only the ranks do without
        affinity = key * weight_inverse_norm[:, None]
        affinity = affinity.clamp_(min=0) if rule == "clamped_cosine" else affinity
    if need is None:
        score = affinity.masked_fill(unknown, -torch.inf)
    else:
        score = affinity * (need if sample is None else need.expand(R, B).gather(1, sample))
        score.masked_fill_(unknown, -torch.inf)
    position = _largest(score.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf), sample, r)
    rows = position if sample is None else sample.gather(1, position)
    if rescue_weighting == "hard":
        return rows, torch.full(rows.shape, 1 / max(r, 1), dtype=key.dtype, device=key.device)
    value = affinity.gather(1, position)
    if rule == "rank":
        value = value / (B - 1) if B > 1 else torch.ones_like(value)
    if need is not None:
        value = value * need[rows]
    value = value.clamp_(min=0)
    return rows, value / (value.sum(dim=1, keepdim=True) + EPS)


def selection(
    activation: Tensor,
    bias: Tensor | None,
    x_inverse_norm: Tensor,
    weight_inverse_norm: Tensor | None,
    need: Tensor | None,
    affinity_rule: str,
    rescue_weighting: str,
    rescue_k: int,
) -> tuple[Tensor, Tensor]:
    """Stage `selection` (step 9b): rescue_rows and their shares, by tiles of features and one sort of each."""
    B, D = activation.shape
    r = min(rescue_k or B, B)
    need = None if need is None else need.flip(0)
    chosen = []
    for a, b in _tiles(D, B, activation.device):
        key = activation[:, a:b] if bias is None else activation[:, a:b] - bias[a:b]
        key = (key * x_inverse_norm[:, None]).flip(0).T.contiguous()
        winv = None if weight_inverse_norm is None else weight_inverse_norm[a:b]
        chosen.append(_select_tile(key, winv, need, affinity_rule, rescue_weighting, r))
    backwards, shares = zip(*chosen, strict=True)
    return torch.cat(backwards).neg_().add_(B - 1), torch.cat(shares)


def _winner_target(x: Tensor, pair_feature: Tensor, pair_pull: Tensor, D: int) -> Tensor:
    """Step 9a as a sum of the B * k winner pairs, grouped by feature in sample order: [D, N]."""
    k = pair_feature.shape[1]
    feature, order = pair_feature.flatten().sort(stable=True)
    start = torch.searchsorted(feature, torch.arange(D, device=x.device))
    pull, sample = pair_pull.flatten()[order], order // k
    ones = torch.ones(x.shape[0], 1, dtype=pull.dtype, device=x.device)
    total = F.embedding_bag(sample, ones, start, mode="sum", per_sample_weights=pull)  # [D, 1]
    return F.embedding_bag(sample, x, start, mode="sum", per_sample_weights=pull) / (total + EPS)


def _rescue_target(x: Tensor, rescue_rows: Tensor, rescue_weight: Tensor) -> Tensor:
    """rescue_pullᵀ X (step 9b) as a sum of few rows of X; with all of the batch chosen a product is faster: [D, N]."""
    D, r = rescue_rows.shape
    if r < x.shape[0]:
        return F.embedding_bag(rescue_rows, x, mode="sum", per_sample_weights=rescue_weight)
    return torch.empty_like(rescue_weight).scatter_(1, rescue_rows, rescue_weight) @ x


def targets(pull: Pull) -> Tensor:
    """Stage `targets` (sums of step 9a, step 10): som_target [D, N]."""
    x, share = pull.x.contiguous(), pull.winner_share
    target = _rescue_target(x, pull.rescue_rows, pull.rescue_weight)
    return target.lerp_(_winner_target(x, pull.pair_feature, pull.pair_pull, share.shape[0]), share[:, None])


def targets_pull_(weight: Tensor, som_offset: Tensor | None, som_lr: Tensor, pull: Pull) -> None:
    """Stage `targets_pull_` (sums of step 9a, steps 10 and 13), in place on weight or, if given, som_offset."""
    increment = targets(pull).sub_(weight)
    if som_offset is not None:
        increment.sub_(som_offset)
    destination = weight if som_offset is None else som_offset
    destination.addcmul_(increment.mul_(pull.som_strength[:, None]), som_lr)


def gradient(
    grad_output: Tensor,
    mask: Tensor | None,
    winner: Tensor | None,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Stage `gradient` (step 12): the masked gradient [B, D], into `out` if given, rounded to `dtype`; its sum [D]."""
    grad_output = grad_output.to(torch.promote_types(grad_output.dtype, torch.float32))
    if winner is not None:
        won = winner[:, None]
        masked = torch.zeros_like(grad_output).scatter_(1, won, grad_output.gather(1, won))
    else:
        masked = grad_output if mask is None else torch.mul(grad_output, mask, out=out)
    return masked.to(dtype or masked.dtype), masked.sum(dim=0)


def rank(key: Tensor) -> Tensor:
    """Stage `rank` (step 9b): key [B, D] -> stable rank within its column [B, D] int64, with one sort."""
    B = key.shape[0]
    sample = _descending(key.flip(0).T.contiguous())
    place = torch.arange(B, device=key.device).flip(0).expand_as(sample)
    return torch.empty_like(sample).scatter_(1, sample, place).flip(1).T.contiguous()
