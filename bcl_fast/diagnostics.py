"""The collapse in numbers: how alike columns, targets and weights are, who is alive, and how strong the forces are.

Each metric is a function of tensors and returns a float; `step_metrics` takes them all from one step's Record. "Mean
off-diagonal" is the mean over ordered pairs of different columns or rows; a zero one has cosine 0 with everything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .norms import power_of_two
from .reference import Record

ALIVE_ABOVE = 0.01  # the win rate above which a feature counts as alive
REDUNDANT_ABOVE = 0.95  # the cosine with another feature above which one counts as redundant


def _unit_rows(rows: Tensor) -> Tensor:
    rows = rows / power_of_two(rows)
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(norm > 0, norm, 1.0)


def _norm(rows: Tensor) -> Tensor:
    power = power_of_two(rows)
    return (torch.linalg.vector_norm(rows / power, dim=1, keepdim=True) * power).squeeze(1)


def row_cosine(rows: Tensor) -> float:
    """Mean off-diagonal cosine of the rows of [R, C] (wt_sim, tgt_sim); NaN for fewer than two rows.

    |sum of units|² counts every pair: no [R, R] matrix is formed. Antiparallel pairs cancel: see `row_abs_cosine`.
    """
    unit, R = _unit_rows(rows), rows.shape[0]
    pairs = unit.sum(dim=0).square().sum() - unit.square().sum()
    return float(pairs) / (R * (R - 1)) if R > 1 else math.nan


def row_abs_cosine(rows: Tensor) -> float:
    """Mean off-diagonal |cosine| of the rows of [R, C] (wt_abscos); NaN for fewer than two rows."""
    unit, R = _unit_rows(rows), rows.shape[0]
    cosine = (unit @ unit.T).abs()
    return float(cosine.sum() - cosine.diagonal().sum()) / (R * (R - 1)) if R > 1 else math.nan


def column_cosine(matrix: Tensor) -> float:
    """Mean off-diagonal cosine of the columns of [B, D] (aff_sim, wa_sim, rp_sim)."""
    return row_cosine(matrix.T)


def column_correlation(matrix: Tensor) -> float:
    """Mean off-diagonal Pearson correlation of the columns of [B, D] (aff_corr, rp_corr): the cosine when centered."""
    return column_cosine(matrix - matrix.mean(dim=0))


def effective_rank(rows: Tensor) -> float:
    """exp of the entropy of the singular values of [R, C], normalized to sum 1; 0 for a zero matrix.

    NaN where an entry is not finite.
    """
    if not bool(rows.isfinite().all()):
        return math.nan
    values = torch.linalg.svdvals(rows.double())
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total > 0 else 0.0


def unique_targets(weighted_affinity: Tensor) -> int:
    """How many samples are the top choice of some feature (unique_tgt): weighted_affinity [B, D]."""
    return weighted_affinity.argmax(dim=0).unique().numel()


def alive(win_rate: Tensor, above: float = ALIVE_ABOVE) -> int:
    """How many features have a win rate above a threshold: win_rate [D]."""
    return int((win_rate > above).sum())


def nearest_cosine(weight: Tensor, neighbors: Tensor) -> Tensor:
    """The cosine of each feature of weight [D, N] with the most alike of its neighbors [D, k]: [D]."""
    unit = _unit_rows(weight)
    each = [(unit * unit[neighbors[:, i]]).sum(dim=1) for i in range(neighbors.shape[1])]
    return torch.stack(each).amax(dim=0)


def redundant(nearest: Tensor, above: float = REDUNDANT_ABOVE) -> int:
    """How many features have a `nearest_cosine` [D] above a threshold."""
    return int((nearest > above).sum())


def zero_fraction(matrix: Tensor) -> float:
    """The share of exact zeros; of the clamped affinity it is the clamped fraction."""
    return float((matrix == 0).double().mean())


def variation(values: Tensor) -> float:
    """Coefficient of variation of [n]: standard deviation (over n) by mean."""
    return float(values.std(correction=0) / values.mean())


def step_metrics(record: Record) -> dict[str, float]:
    """Everything a training table shows of one step, for the state before its update."""
    need = record.image_need
    return {
        "aff_sim": column_cosine(record.affinity),
        "wa_sim": column_cosine(record.weighted_affinity),
        "rp_sim": column_cosine(record.rescue_pull),
        "aff_corr": column_correlation(record.affinity),
        "rp_corr": column_correlation(record.rescue_pull),
        **weight_metrics(record.weight),
        "tgt_sim": row_cosine(record.rescue_target),
        "unique_tgt": unique_targets(record.weighted_affinity),
        "alive": alive(record.win_rate),
        "ever_winning": alive(record.win_rate, above=0.0),
        "novelty": float(record.novelty.mean()),
        "novelty_min": float(record.novelty.min()),
        "novelty_max": float(record.novelty.max()),
        "effective_win": float((record.win_rate * record.novelty).mean()),
        "affinity_zeros": zero_fraction(record.affinity),
        "coverage_cv": variation(record.image_coverage),
        "need_min": float(need.min()),
        "need_max": float(need.max()),
    }


def weight_metrics(weight: Tensor) -> dict[str, float]:
    """How alike the features of weight [D, N] are: wt_sim, wt_abscos, effective_rank."""
    return {
        "wt_sim": row_cosine(weight),
        "wt_abscos": row_abs_cosine(weight),
        "effective_rank": effective_rank(weight),
    }


def force_norms(gradient: Tensor, before: Tensor, pulled: Tensor, after: Tensor) -> dict[str, Tensor]:
    """The forces of one step on each feature, as norms [D]; all arguments [D, N].

    gradient is dW as the backward left it; before, pulled and after are the weight before the step, after the pull, and
    after the optimizer.
    """
    moves = {"gradient": gradient, "pull": pulled - before, "adam": after - pulled}
    return {name: _norm(move) for name, move in moves.items()}


def forces(norms: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean over features of each of `force_norms`, and their ratios, NaN where nothing was pulled."""
    force = {name: float(norm.mean()) for name, norm in norms.items()}
    pull = force["pull"] or math.nan
    return {**force, "adam_over_pull": force["adam"] / pull, "gradient_over_pull": force["gradient"] / pull}
