"""Inputs and error budgets shared by tests and benches: the exactness contract as code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from .spec import PRESETS

# Every option of SPEC section 3 away from its default at least once, by name.
VARIANTS: dict[str, dict[str, Any]] = {
    **PRESETS,
    "cosine": dict(affinity="cosine"),
    "cosine-soft": dict(affinity="cosine", rescue_weighting="soft", rescue_k=8),
    "clamped": dict(affinity="clamped_cosine"),
    "pure-affinity": dict(need_weighting=False),
    "pure-cosine": dict(affinity="cosine", need_weighting=False, rescue_k=1),
    "rank-soft": dict(rescue_weighting="soft"),
    "dense-soft": dict(affinity="clamped_cosine", rescue_weighting="soft", rescue_k=0),
    "dense-rank": dict(rescue_weighting="soft", rescue_k=0),
    "dense-hard": dict(rescue_k=0),
    "winner-take-all": dict(gradient_mask="winner_take_all"),
    "coupled-winner-take-all": dict(forces="coupled", gradient_mask="winner_take_all"),
    "unmasked": dict(gradient_mask="none"),
    "orthogonal": dict(target_projection="orthogonal"),
    "centered": dict(target_projection="centered"),
    "rescue-onset": dict(rescue_onset=0.3),
    "pull-onset": dict(pull_onset=0.3),
    "offset": dict(som_space="offset"),
    "offset-coupled": dict(som_space="offset", forces="coupled", target_projection="centered"),
    "one-neighbor": dict(neighborhood_k=1, temperature=0.5),
    "all-neighbors": dict(neighborhood_k=1000, recompute_every=2),
}

COLUMNS = ("random", "duplicated", "equal", "signed_zeros", "huge", "denormal", "quantized")


def columns(kind: str, B: int, D: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A [B, D] matrix whose columns are hard to rank in the way that `kind` (one of COLUMNS) says."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(B, D, generator=generator, dtype=dtype)
    if kind == "random":
        return normal
    if kind == "duplicated":
        return normal[torch.randint(max(1, B // 3), (B,), generator=generator)]
    if kind == "equal":
        return torch.full_like(normal, 0.3)
    if kind == "signed_zeros":
        return torch.where(normal < 0, -0.0, torch.where(normal < 1, 0.0, normal))
    if kind == "huge":
        return normal * 1e30
    if kind == "denormal":
        return normal * (1e-42 if dtype == torch.float32 else 1e-310)
    if kind == "quantized":
        return (normal * 2).round() / 2
    raise ValueError(f"kind must be one of {', '.join(COLUMNS)}, got {kind!r}")


def neighbors_of(D: int, neighborhood_k: int, seed: int = 0) -> Tensor:
    """Neighbors [D, k] of D random features."""
    weight = torch.randn(D, 16, generator=torch.Generator().manual_seed(seed))
    return reference.neighbors(weight, neighborhood_k)


def compete(
    competition: Callable[..., tuple[Tensor, ...]],
    activation: Tensor,
    neighbors: Tensor,
    temperature: float = 5.0,
    x: Tensor | None = None,
    forces: str = "decoupled",
    rescue_onset: float = 0.0,
    pull_onset: float = 0.0,
) -> dict[str, Tensor]:
    """What a backend's stage `competition` returns, by name; where x [B, N] does not matter it is all ones."""
    x = activation.new_ones(activation.shape[0], 1) if x is None else x
    results = competition(activation, neighbors, temperature, x, forces, rescue_onset, pull_onset)
    return dict(zip(reference.COMPETITION, results, strict=True))


def relative_error(value: Tensor, truth: Tensor) -> float:
    """max |value - truth| / max |truth| in float64, 0 for two empty or all-zero tensors."""
    value, truth = value.double(), truth.double()
    if truth.numel() == 0:
        return 0.0
    error, scale = float((value - truth).abs().max()), float(truth.abs().max())
    return error / scale if scale else error


def budget(reference32: Tensor, truth: Tensor) -> float:
    """The error allowed given the same activation: 1e-5, or twice the reference's own against float64."""
    return max(1e-5, 2 * relative_error(reference32, truth))
