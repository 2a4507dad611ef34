"""Inputs and error budgets shared by tests and benches: the exactness contract as code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .spec import PRESETS
from .structures import Competition, Pull

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
    competition: Callable[..., Competition],
    activation: Tensor,
    neighbors: Tensor,
    temperature: float = 5.0,
    x: Tensor | None = None,
    forces: str = "decoupled",
    rescue_onset: float = 0.0,
    pull_onset: float = 0.0,
) -> Competition:
    """What a backend's stage `competition` returns; where x [B, N] does not matter it is all ones."""
    x = activation.new_ones(activation.shape[0], 1) if x is None else x
    return competition(activation, neighbors, temperature, x, forces, rescue_onset, pull_onset)


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


# --- The exactness contract, stage by stage (SPEC section 6) ----------------------------------------------------------


_NAMES = {  # of the results of stages that have several
    "competition": Competition._fields,
    "selection": ("rescue_rows", "rescue_weight"),
    "gradient": ("masked", "bias_gradient"),
}


class Expected(NamedTuple):
    """What the reference makes of the arguments of a stage, by the name of the result."""

    own: dict[str, Tensor]  # in float32
    truth: dict[str, Tensor]  # in float64


def expected(stage: str, arguments: Sequence[Any]) -> Expected:
    """What the reference makes of these arguments of a stage; of a stage that works in place, the change."""
    function = getattr(reference, stage)
    return Expected(*(_results(function, stage, arguments, dtype) for dtype in (torch.float32, torch.float64)))


def check_stage(
    function: Callable[..., Any], stage: str, arguments: Sequence[Any], right: Expected | None = None
) -> dict[str, float]:
    """Raise an AssertionError unless `function`, anybody's implementation of a stage, keeps the exactness contract.

    `stage` is the name of a stage and `arguments` are its arguments as `reference` has them; `right` saves the
    reference's own work where it is known (see `expected`). Choices must be equal bit by bit, given these arguments;
    neighbors may fall behind by a float64 cosine of 1e-6; everything else is judged by float64 and may be off by the
    larger of 1e-5 and twice the reference's own error. Returns those errors by the name of the result.
    """
    got, right = _results(function, stage, arguments, torch.float32), right or expected(stage, arguments)
    if stage == "neighbors":
        regret = _regret(arguments[0].double(), got[stage], right.truth[stage])
        assert regret <= 1e-6, f"neighbors are less similar by {regret:.1e}"
        return {stage: regret}
    errors = {}
    for name, reference32 in right.own.items():
        mine, place = got[name], stage if name == stage else f"{stage} {name}"
        if stage == "selection":
            mine, reference32 = mine.sort(dim=1).values, reference32.sort(dim=1).values
        if not reference32.is_floating_point() or name == "masked":
            assert mine.equal(reference32), f"{place} differs in {int((mine != reference32).sum())} elements"
        elif name != "pair_pull" or right.own["winner"].equal(right.truth["winner"]):  # else it is of other winners
            errors[place] = relative_error(mine, right.truth[name])
            assert errors[place] <= budget(reference32, right.truth[name]), f"{place} is off by {errors[place]:.1e}"
    return errors


def _results(
    function: Callable[..., Any], stage: str, arguments: Sequence[Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """What a function returns, by name, for arguments cast to this dtype; of one that works in place, the change."""
    in_place = stage.endswith("_")
    given = [_cast(argument, dtype, copy=in_place) for argument in arguments]
    result = function(*given)
    if in_place:
        changed = 0 if given[1] is None else 1  # som_offset, where there is one, else weight
        return {stage: given[changed] - _cast(arguments[changed], dtype)}
    results = result if isinstance(result, tuple) else (result,)
    return dict(zip(_NAMES.get(stage, (stage,)), results, strict=True))


def _cast(argument: Any, dtype: torch.dtype, copy: bool = False) -> Any:
    """A floating-point tensor in this dtype, also inside a structure; anything else as it is."""
    if isinstance(argument, Pull):
        return Pull(*(_cast(tensor, dtype) for tensor in argument))
    floating = isinstance(argument, Tensor) and argument.is_floating_point()
    return argument.to(dtype, copy=copy) if floating else argument


def _regret(weight: Tensor, chosen: Tensor, best: Tensor) -> float:
    """By how much, at most, the cosine of a chosen neighbor [D, k] falls behind that of the best at its place."""
    unit = weight * reference.inverse_norm(weight)[:, None]
    regret = 0.0
    for place in range(chosen.shape[1]):  # a [D, N] at a time
        gap = ((unit[best[:, place]] - unit[chosen[:, place]]) * unit).sum(dim=1)
        regret = max(regret, float(gap.max()))
    return regret
