"""The algorithm as the specification states it: SPEC section 2, one function per step, in that order.

This is the oracle. It is written to be read, forms every tensor that SPEC.md names, and computes in the dtype it is
given, so that float64 works. The last section composes the steps into the stages every backend offers.
`B` samples, `D` features, `N` inputs, `K` neighbors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .norms import power_of_two, shortened
from .spec import EPS, BCLConfig
from .structures import Competition, Pull, leading


def missing(device_type: str, dtype: torch.dtype = torch.float32) -> str | None:
    """None where this backend serves weights of this dtype on this type of device, else the reason."""
    return "meta tensors hold no numbers" if device_type == "meta" else None


def why_not(stage: str, arguments: Sequence[Any]) -> str | None:
    """None where this backend serves a call of a stage with these arguments, else the reason."""
    return missing(leading(arguments).device.type)


def inverse_norm(rows: Tensor) -> Tensor:
    """1 / (|row| + eps) for each row of [R, N] -> [R] (step 9b: rinv, winv), also where |row|² is out of range."""
    power = power_of_two(rows)
    return (1 / (torch.linalg.vector_norm(rows / power, dim=1, keepdim=True) + EPS / power) / power).squeeze(1)


# --- Step 1: neighborhoods ------------------------------------------------------------------------------------------


def cosine_similarity(weight: Tensor) -> Tensor:
    """weight [D, N] -> cosine of every pair of rows [D, D]; a zero row has cosine 0 with everything."""
    power = power_of_two(weight)
    rows = weight / power
    unit = rows * (1 / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + EPS / power))
    return unit @ unit.T


def nearest(similarity: Tensor, neighborhood_k: int) -> Tensor:
    """similarity [D, D] -> the k = min(neighborhood_k, D - 1) most similar others of each feature [D, k] int64.

    Largest similarity first; of equal ones the smaller index first. NaN counts as less similar than any cosine.
    """
    k = min(neighborhood_k, similarity.shape[0] - 1)
    others = similarity.nan_to_num(nan=-2.0).fill_diagonal_(-torch.inf)
    return others.sort(dim=1, descending=True, stable=True).indices[:, :k].contiguous()


# --- Steps 2 to 8: competition ---------------------------------------------------------------------------------------


def features(neighbors: Tensor) -> Tensor:
    """neighbors [D, k] with every index outside of 0 .. D - 1 replaced by the nearest inside."""
    return neighbors.clamp(0, neighbors.shape[0] - 1)


def strength(activation: Tensor) -> Tensor:
    """S = |A| (step 2): [B, D] -> [B, D]."""
    return activation.abs()


def margin(strength: Tensor, neighbors: Tensor) -> Tensor:
    """By how much a feature beats its strongest neighbor (step 3): [B, D], [D, k] -> [B, D]."""
    return strength - strength[:, neighbors].amax(dim=2)


def rank_score(margin: Tensor, temperature: float) -> Tensor:
    """R, soft "I win this sample against my neighbors", in (0, 1) (step 3): [B, D] -> [B, D]."""
    return torch.sigmoid(temperature * margin)


def image_coverage(rank_score: Tensor) -> Tensor:
    """How many features claim each sample (step 4): [B, D] -> [B]."""
    return rank_score.sum(dim=1)


def feature_novelty(rank_score: Tensor, coverage: Tensor) -> Tensor:
    """How uncontested the samples are that a feature wins (step 5): [B, D], [B] -> [D]."""
    return (rank_score / (coverage[:, None] + EPS)).sum(dim=0) / (rank_score.sum(dim=0) + EPS)


def local_novelty(rank_score: Tensor, neighbors: Tensor) -> Tensor:
    """How little the neighbors claim a sample (step 6): [B, D], [D, k] -> [B, D]."""
    return 1 / (1 + rank_score[:, neighbors].sum(dim=2))


def win_rate(rank_score: Tensor) -> Tensor:
    """The mean rank_score of each feature (step 7): [B, D] -> [D]."""
    return rank_score.mean(dim=0)


def winner(margin: Tensor) -> Tensor:
    """The feature of largest margin per sample, the smallest index of equal ones (step 8): [B, D] -> [B] int64.

    Of the margin, not of rank_score: the sigmoid saturates to 1.0 in float32 and would tie.
    """
    return margin.argmax(dim=1)


def winner_mask(winner: Tensor, neighbors: Tensor) -> Tensor:
    """M: True where a feature is a neighbor of the sample's winner (step 8): [B], [D, k] -> [B, D] bool."""
    mask = torch.zeros(winner.shape[0], neighbors.shape[0], dtype=torch.bool, device=winner.device)
    return mask.scatter_(1, neighbors[winner], True)


# --- Step 9a: winner pull --------------------------------------------------------------------------------------------


def winner_pull(rank_score: Tensor, local_novelty: Tensor, winner_mask: Tensor) -> Tensor:
    """P: the weight with which each sample pulls its winner's neighbors (step 9a): [B, D]; columns sum to 1 or 0."""
    pull = rank_score * local_novelty * winner_mask
    return pull / (pull.sum(dim=0) + EPS)


def winner_target(winner_pull: Tensor, x: Tensor) -> Tensor:
    """Pᵀ X (step 9a): [B, D], [B, N] -> [D, N]."""
    return winner_pull.T @ x


# --- Step 9b: rescue -------------------------------------------------------------------------------------------------


def cosine_key(activation: Tensor, bias: Tensor | None, x_inverse_norm: Tensor) -> Tensor:
    """The raw cosine before its positive per-feature factor 1/|W_d| (step 9b): [B, D], [D], [B] -> [B, D]."""
    projection = activation if bias is None else activation - bias
    return projection * x_inverse_norm[:, None]


def column_rank(key: Tensor) -> Tensor:
    """Position of every element in the stable ascending order of its column: [B, D] -> [B, D] int64; NaN ranks last."""
    return key.argsort(dim=0, stable=True).argsort(dim=0, stable=True)


def affinity(key: Tensor, weight_inverse_norm: Tensor | None, affinity: str) -> Tensor:
    """How much each sample belongs to each feature (step 9b), by a rule of SPEC section 3: [B, D], [D] -> [B, D]."""
    if affinity == "rank":
        B = key.shape[0]
        return column_rank(key).to(key.dtype) / (B - 1) if B > 1 else torch.ones_like(key)
    assert weight_inverse_norm is not None  # only the ranks do without
    cosine = key * weight_inverse_norm
    return cosine.clamp(min=0) if affinity == "clamped_cosine" else cosine


def image_need(coverage: Tensor) -> Tensor:
    """How underserved each sample is (step 9b): [B] -> [B]."""
    return 1 / (coverage + 1)


def weighted_affinity(affinity: Tensor, need: Tensor | None) -> Tensor:
    """affinity * need (step 9b), or affinity alone without need weighting: [B, D], [B] -> [B, D]."""
    return affinity if need is None else affinity * need[:, None]


def selection_score(key: Tensor, weight_inverse_norm: Tensor | None, need: Tensor | None, rule: str) -> Tensor:
    """What the top-k compares: weighted_affinity, for `rank` without the division by B - 1 (SPEC section 4): [B, D].

    A NaN key, or a score that is NaN, counts as -inf: such a sample is chosen only where too few others exist.
    """
    value = column_rank(key).to(key.dtype) if rule == "rank" else affinity(key, weight_inverse_norm, rule)
    score = weighted_affinity(value, need)
    return score.masked_fill(key.isnan() | score.isnan(), -torch.inf)


def select(score: Tensor, rescue_k: int) -> Tensor:
    """score [B, D] -> the rescue_k samples of largest score of each feature [D, min(rescue_k, B)] int64.

    Largest first, of equal ones the smaller index first. rescue_k = 0 means all of the batch.
    """
    r = min(rescue_k or score.shape[0], score.shape[0])
    return score.sort(dim=0, descending=True, stable=True).indices[:r].T.contiguous()


def rescue_weight(weighted_affinity: Tensor, rows: Tensor, rescue_weighting: str) -> Tensor:
    """The share of every chosen sample in its feature's target (step 9b): [B, D], [D, r] -> [D, r]."""
    if rescue_weighting == "hard":
        return torch.full_like(rows, 1 / max(rows.shape[1], 1), dtype=weighted_affinity.dtype)
    value = weighted_affinity.T.gather(1, rows).clamp(min=0)
    return value / (value.sum(dim=1, keepdim=True) + EPS)


def rescue_pull(rows: Tensor, rescue_weight: Tensor, B: int) -> Tensor:
    """The chosen samples' shares as a dense matrix (step 9b): [D, r], [D, r] -> [B, D]."""
    dense = torch.zeros(B, rows.shape[0], dtype=rescue_weight.dtype, device=rows.device)
    return dense.scatter_(0, rows.T, rescue_weight.T)


def rescue_target(rescue_pull: Tensor, x: Tensor) -> Tensor:
    """rescue_pullᵀ X (step 9b): [B, D], [B, N] -> [D, N]."""
    return rescue_pull.T @ x


# --- Steps 10 to 13: forces ------------------------------------------------------------------------------------------


def winner_share(win_rate: Tensor, novelty: Tensor, forces: str, rescue_onset: float) -> Tensor:
    """u, the winner target's share of the blend (step 10; forces and rescue_onset of SPEC section 3): [D] -> [D]."""
    share = win_rate * novelty if forces == "coupled" else win_rate
    return torch.where(win_rate < rescue_onset, share, 1.0) if rescue_onset else share


def som_target(winner_target: Tensor, rescue_target: Tensor, winner_share: Tensor) -> Tensor:
    """Where each feature is pulled to (step 10): [D, N], [D, N], [D] -> [D, N]."""
    u = winner_share[:, None]
    return u * winner_target + (1 - u) * rescue_target


def project(som_target: Tensor, target_projection: str) -> Tensor:
    """Take from the targets what all of them share (`target_projection` of SPEC section 3): [D, N] -> [D, N]."""
    if target_projection == "none":
        return som_target
    mean = som_target.mean(dim=0)
    if target_projection == "centered":
        return som_target - mean
    mean = shortened(mean)  # its length does not matter
    square = mean @ mean
    along = som_target @ mean / torch.where(square > 0, square, 1.0)  # a zero mean changes nothing
    return som_target - along[:, None] * mean


def gradient_mask(
    rank_score: Tensor, novelty: Tensor, win_rate: Tensor, winner: Tensor, forces: str, gradient_mask: str
) -> Tensor:
    """G, the share of the loss gradient each feature gets per sample (step 11): [B, D]."""
    if gradient_mask == "winner_take_all":
        return torch.zeros_like(rank_score).scatter_(1, winner[:, None], 1.0)
    if gradient_mask == "none":
        return torch.ones_like(rank_score)
    return rank_score * (novelty * (win_rate * novelty)) if forces == "coupled" else rank_score


def som_strength(win_rate: Tensor, novelty: Tensor, forces: str, pull_onset: float) -> Tensor:
    """v, how strongly each feature is pulled (step 11; `coupled` and `pull_onset` of SPEC section 3): [D] -> [D]."""
    strength = torch.ones_like(novelty) if forces == "coupled" else 1 - novelty
    return torch.where(win_rate < pull_onset, strength, 0.0) if pull_onset else strength


def masked_gradients(grad_output: Tensor, mask: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (step 12): [B, D], [B, D], [B, N], [D, N] -> [B, N], [D, N], [D]."""
    masked = grad_output * mask
    return masked @ weight, masked.T @ x, masked.sum(dim=0)


def som_increment(weight: Tensor, som_target: Tensor, som_strength: Tensor) -> Tensor:
    """v (target - W), the pull before its step size (step 13): [D, N], [D, N], [D] -> [D, N]."""
    return som_strength[:, None] * (som_target - weight)


# --- The stages: what every backend offers under these names and signatures ------------------------------------------


def neighbors(weight: Tensor, neighborhood_k: int) -> Tensor:
    """Stage `neighbors` (step 1): weight [D, N] -> [D, min(neighborhood_k, D - 1)] int64."""
    return nearest(cosine_similarity(weight), neighborhood_k)


def competition(
    activation: Tensor,
    neighbors: Tensor,
    temperature: float,
    x: Tensor,
    forces: str,
    rescue_onset: float,
    pull_onset: float,
) -> Competition:
    """Stage `competition` (steps 2 to 8, and what follows from them for a sample or for a feature).

    activation [B, D], neighbors [D, k], x [B, N]; forces and onsets are the options of SPEC section 3. A neighbor that
    is no feature, as damaged state may hold it, counts as the nearest index that is one.
    """
    neighbors = features(neighbors)
    m = margin(strength(activation), neighbors)
    R = rank_score(m, temperature)
    coverage, rate, w = image_coverage(R), win_rate(R), winner(m)
    novelty, pair_feature = feature_novelty(R, coverage), neighbors[w]
    return Competition(
        rank_score=R,
        novelty=novelty,
        win_rate=rate,
        winner=w,
        pair_feature=pair_feature,
        pair_pull=(R * local_novelty(R, neighbors)).gather(1, pair_feature),
        x_inverse_norm=inverse_norm(x.to(activation.dtype)),
        need=image_need(coverage),
        winner_share=winner_share(rate, novelty, forces, rescue_onset),
        som_strength=som_strength(rate, novelty, forces, pull_onset),
    )


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
    """Stage `selection` (step 9b): activation [B, D], bias [D], inverse norms [B] and [D], need [B] or None.

    Returns the chosen samples rescue_rows [D, r] int64, r = min(rescue_k or B, B), and their shares [D, r].
    """
    key = cosine_key(activation, bias, x_inverse_norm)
    rows = select(selection_score(key, weight_inverse_norm, need, affinity_rule), rescue_k)
    weighted = weighted_affinity(affinity(key, weight_inverse_norm, affinity_rule), need)
    return rows, rescue_weight(weighted, rows, rescue_weighting)


def targets(pull: Pull) -> Tensor:
    """Stage `targets` (sums of step 9a, step 10): som_target [D, N], in the dtype of the statistics."""
    x, (B, D) = pull.x, (pull.x.shape[0], pull.winner_share.shape[0])
    pairs = torch.zeros(B, D, dtype=pull.pair_pull.dtype, device=x.device)
    pairs.scatter_(1, pull.pair_feature, pull.pair_pull)
    toward_won = winner_target(pairs / (pairs.sum(dim=0) + EPS), x)
    toward_rescued = rescue_target(rescue_pull(pull.rescue_rows, pull.rescue_weight, B), x)
    return som_target(toward_won, toward_rescued, pull.winner_share)


def targets_pull_(weight: Tensor, som_offset: Tensor | None, som_lr: Tensor, pull: Pull) -> None:
    """Stage `targets_pull_` (sums of step 9a, steps 10 and 13), in place on weight [D, N], or on som_offset, if any.

    som_lr is a scalar in the dtype of the weight; the targets are not projected.
    """
    effective_weight = weight if som_offset is None else weight + som_offset
    destination = weight if som_offset is None else som_offset
    destination.addcmul_(som_increment(effective_weight, targets(pull), pull.som_strength), som_lr)


def gradient(
    grad_output: Tensor,
    mask: Tensor | None,
    winner: Tensor | None,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Stage `gradient` (step 12): the masked gradient [B, D] and its sum over samples [D].

    mask [B, D] is G; winner [B] stands for the one-hot G of `winner_take_all`; neither means all ones. out, which may
    be the mask itself, is where the product with a mask goes. Computed in float32 or wider; the masked gradient is then
    rounded to `dtype`, the one its products want (None: as computed), its sum is not.
    """
    grad_output = grad_output.to(torch.promote_types(grad_output.dtype, torch.float32))
    if winner is not None:
        mask = torch.zeros_like(grad_output).scatter_(1, winner[:, None], 1.0)
    masked = grad_output if mask is None else torch.mul(grad_output, mask, out=out)
    return masked.to(dtype or masked.dtype), masked.sum(dim=0)


def rank(key: Tensor) -> Tensor:
    """Stage `rank` (step 9b, for diagnostics): key [B, D] -> stable rank within its column [B, D] int64."""
    return column_rank(key)


# --- Everything at once, for observers and experiments ---------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """Every tensor of one training step under its name in SPEC.md; see the function of that name for its meaning."""

    step: int
    x: Tensor  # [B, N]
    weight: Tensor  # [D, N], before the pull; W + O in offset space
    activation: Tensor  # [B, D]
    neighbors: Tensor  # [D, k]
    strength: Tensor  # [B, D]
    margin: Tensor  # [B, D]
    rank_score: Tensor  # [B, D]
    image_coverage: Tensor  # [B]
    novelty: Tensor  # [D]
    local_novelty: Tensor  # [B, D]
    win_rate: Tensor  # [D]
    winner: Tensor  # [B]
    winner_mask: Tensor  # [B, D]
    winner_pull: Tensor  # [B, D]
    winner_target: Tensor  # [D, N]
    affinity: Tensor  # [B, D]
    image_need: Tensor  # [B]
    weighted_affinity: Tensor  # [B, D]
    rescue_rows: Tensor  # [D, r]
    rescue_pull: Tensor  # [B, D]
    rescue_target: Tensor  # [D, N]
    winner_share: Tensor  # [D]
    som_target: Tensor  # [D, N]
    gradient_mask: Tensor  # [B, D]
    som_strength: Tensor  # [D]


def record(
    step: int, x: Tensor, weight: Tensor, bias: Tensor | None, activation: Tensor, neighbors: Tensor, config: BCLConfig
) -> Record:
    """All of steps 2 to 11 on one batch: x [B, N], weight [D, N], bias [D], activation [B, D], neighbors [D, k]."""
    B, neighbors = x.shape[0], features(neighbors)
    S = strength(activation)
    m = margin(S, neighbors)
    R = rank_score(m, config.temperature)
    coverage, rate, w = image_coverage(R), win_rate(R), winner(m)
    novelty, local, M = feature_novelty(R, coverage), local_novelty(R, neighbors), winner_mask(w, neighbors)
    P = winner_pull(R, local, M)
    toward_won = winner_target(P, x)

    winv, need = inverse_norm(weight), image_need(coverage)
    used_need = need if config.need_weighting else None
    key = cosine_key(activation, bias, inverse_norm(x))
    A = affinity(key, winv, config.affinity)
    weighted = weighted_affinity(A, used_need)
    rows = select(selection_score(key, winv, used_need, config.affinity), config.rescue_k)
    pull = rescue_pull(rows, rescue_weight(weighted, rows, config.rescue_weighting), B)
    toward_rescued = rescue_target(pull, x)

    u = winner_share(rate, novelty, config.forces, config.rescue_onset)
    return Record(
        step=step,
        x=x,
        weight=weight,
        activation=activation,
        neighbors=neighbors,
        strength=S,
        margin=m,
        rank_score=R,
        image_coverage=coverage,
        novelty=novelty,
        local_novelty=local,
        win_rate=rate,
        winner=w,
        winner_mask=M,
        winner_pull=P,
        winner_target=toward_won,
        affinity=A,
        image_need=need,
        weighted_affinity=weighted,
        rescue_rows=rows,
        rescue_pull=pull,
        rescue_target=toward_rescued,
        winner_share=u,
        som_target=project(som_target(toward_won, toward_rescued, u), config.target_projection),
        gradient_mask=gradient_mask(R, novelty, rate, w, config.forces, config.gradient_mask),
        som_strength=som_strength(rate, novelty, config.forces, config.pull_onset),
    )
