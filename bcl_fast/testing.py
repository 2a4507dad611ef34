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

COLUMNS = ("random", "duplicated", "equal", "signed_zeros", "huge", "denormal", "quantized", "octaves")


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
    if kind == "octaves":  # ranks, permuted in every column within the octaves of `octave_needs`
        octave, draw = _octaves(B)[:, None], torch.rand(B, D, generator=generator)
        return (octave + draw).argsort(dim=0).argsort(dim=0).to(dtype)
    raise ValueError(f"kind must be one of {', '.join(COLUMNS)}, got {kind!r}")


def octave_needs(B: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Needs [B] under which scores of the columns `octaves` tie exactly across samples of different needs.

    The need of rank r is 2^-floor(log2(r + 1)): the scores of every octave of ranks run through the same range, and
    products with powers of two are not rounded.
    """
    return 2.0 ** -_octaves(B).to(dtype)


def _octaves(B: int) -> Tensor:
    """floor(log2(rank + 1)) of each sample [B], whose rank within its octave is open; in an order of no kind."""
    place = torch.randperm(B, generator=torch.Generator().manual_seed(B))
    return (place + 1).double().log2().floor().long()


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

    own: dict[str, Tensor]  # in the dtype of the arguments
    truth: dict[str, Tensor]  # in float64


def expected(stage: str, arguments: Sequence[Any]) -> Expected:
    """What the reference makes of these arguments of a stage; of a stage that works in place, the change."""
    function = getattr(reference, stage)
    own, truth = (_results(function, stage, arguments, dtype) for dtype in (_dtype(arguments), torch.float64))
    return Expected(_by_sample(own), _by_sample(truth))


def check_stage(
    function: Callable[..., Any], stage: str, arguments: Sequence[Any], right: Expected | None = None
) -> dict[str, float]:
    """Raise an AssertionError unless `function`, anybody's implementation of a stage, keeps the exactness contract.

    `stage` is the name of a stage and `arguments` are its arguments as `reference` has them, in float32 or float64;
    `right` saves the reference's own work where it is known (see `expected`). Shapes and dtypes are the reference's.
    Choices must be equal bit by bit, given these arguments, and shares of the same samples to 1e-6; neighbors may fall
    behind by a float64 cosine of 1e-6; everything else is judged by float64 and may be off by the larger of 1e-5 and
    twice the reference's own error. Returns those errors by the name of the result.
    """
    right = right or expected(stage, arguments)
    results = _results(function, stage, arguments, _dtype(arguments))
    for name, own in right.own.items():
        found = f"{results[name].dtype} {list(results[name].shape)}"
        wanted = f"{own.dtype} {list(own.shape)}"
        assert found == wanted, f"{_place(stage, name)} is {found}, not {wanted}"
    if stage == "neighbors":
        return {stage: _check_neighbors(arguments[0].double(), results[stage], right.truth[stage])}
    errors = {}
    for name, mine in _by_sample(results).items():
        own, truth, place = right.own[name], right.truth[name], _place(stage, name)
        if not own.is_floating_point() or name == "masked":
            assert mine.equal(own), f"{place} differs in {int((mine != own).sum())} elements"
            continue
        if name == "pair_pull" and not right.own["winner"].equal(right.truth["winner"]):
            continue  # the pairs of other winners
        if name == "rescue_weight":  # float64 may choose other samples
            errors[place], allowed = relative_error(mine, own), 1e-6
        else:
            errors[place], allowed = relative_error(mine, truth), budget(own, truth)
        assert errors[place] <= allowed, f"{place} is off by {errors[place]:.1e}"
    return errors


def _place(stage: str, name: str) -> str:
    return stage if name == stage else f"{stage} {name}"


def _dtype(arguments: Sequence[Any]) -> torch.dtype:
    """float64 where the arguments are, else float32."""
    tensors = [tensor for argument in arguments for tensor in (argument if isinstance(argument, Pull) else (argument,))]
    double = any(isinstance(tensor, Tensor) and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def _results(
    function: Callable[..., Any], stage: str, arguments: Sequence[Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """What a function returns, by name, for arguments cast to this dtype; of one that works in place, the change."""
    in_place = stage.endswith("_")
    given = [_cast(argument, dtype, copy=in_place) for argument in arguments]
    result = function(*given)
    if in_place:
        changed = 0 if given[1] is None else 1  # som_offset, where there is one, else weight
        assert changed == 0 or given[0].equal(_cast(arguments[0], dtype)), f"{stage} changes the weight, not the offset"
        return {stage: given[changed] - _cast(arguments[changed], dtype)}
    results = result if isinstance(result, tuple) else (result,)
    return dict(zip(_NAMES.get(stage, (stage,)), results, strict=True))


def _by_sample(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """A selection's samples in rising order, each with its share: in which order they are listed is open."""
    if "rescue_rows" not in results:
        return results
    order = results["rescue_rows"].argsort(dim=1)
    return {name: result.gather(1, order) for name, result in results.items()}


def _cast(argument: Any, dtype: torch.dtype, copy: bool = False) -> Any:
    """A floating-point tensor in this dtype, also inside a structure; anything else as it is."""
    if isinstance(argument, Pull):
        return Pull(*(_cast(tensor, dtype) for tensor in argument))
    floating = isinstance(argument, Tensor) and argument.is_floating_point()
    return argument.to(dtype, copy=copy) if floating else argument


def _check_neighbors(weight: Tensor, chosen: Tensor, best: Tensor) -> float:
    """The regret of chosen neighbors [D, k], which must be different features, and others."""
    D = weight.shape[0]
    assert bool(((chosen >= 0) & (chosen < D)).all()), "neighbors are no features"
    regret = _regret(weight, chosen, best)
    assert regret <= 1e-6, f"neighbors are less similar by {regret:.1e}"
    assert not (chosen == torch.arange(D, device=chosen.device)[:, None]).any(), "a feature is its own neighbor"
    assert bool((chosen.sort(dim=1).values.diff(dim=1) > 0).all()), "a neighbor is named twice"
    return regret


def _regret(weight: Tensor, chosen: Tensor, best: Tensor) -> float:
    """By how much, at most, the cosine of a chosen neighbor [D, k] falls behind that of the best at its place."""
    unit = weight * reference.inverse_norm(weight)[:, None]
    regret = 0.0
    for place in range(chosen.shape[1]):  # a [D, N] at a time
        gap = ((unit[best[:, place]] - unit[chosen[:, place]]) * unit).sum(dim=1)
        regret = max(regret, float(gap.max()))
    return regret
