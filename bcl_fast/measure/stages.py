"""Stages one by one: held to the exactness contract at any size, and timed beside the roof."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops, reference
from ..testing import budget, relative_error
from .floor import Ceilings, work
from .implementations import CONFIG, Size, backends, batch, build, reasons
from .rows import Row, absent, row
from .timing import medians

STAGES = ("neighbors", "competition", "inverse_norm", "selection", "targets_pull_", "gradient", "rank")
WHOLE = "compiled as a whole step alone"  # why there is no stage of `compiled`


class Expected(NamedTuple):
    """A stage, its arguments, and what the reference makes of them."""

    stage: str
    arguments: tuple[Any, ...]
    own: tuple[Tensor, ...]  # in float32
    truth: tuple[Tensor, ...]  # in float64


def stage_calls(
    size: Size, device: str = "cpu", like: str = "portable", weight: Tensor | None = None, drawn: bool = False
) -> dict[str, tuple[Any, ...]]:
    """Stage -> its arguments in one training step on random numbers, formed by the backend `like`.

    weight [D, N] is that of a layer, None: one drawn by `nn.Linear`. The neighbors are found, or `drawn` where there
    are too many features for that.
    """
    x, grad_output = batch(size, device)
    torch.manual_seed(0)
    linear = nn.Linear(size.N, size.D, device=device)
    weight = linear.weight.detach() if weight is None else weight.to(device)
    bias = linear.bias.detach()
    activation = F.linear(x, weight, bias)
    neighbors = _drawn(size, device) if drawn else ops.stage("neighbors", like)(weight, CONFIG.neighborhood_k)
    competing = activation, neighbors, CONFIG.temperature, x, CONFIG.forces, 0.0, 0.0
    R, _, _, _, _, *pairs, rinv, need, winner_share, som_strength = ops.stage("competition", like)(*competing)
    chosen = activation, bias, rinv, None, need, "rank", "hard", CONFIG.rescue_k
    choices = x, *pairs, *ops.stage("selection", like)(*chosen), winner_share, "none"
    return {
        "neighbors": (weight, CONFIG.neighborhood_k),
        "competition": competing,
        "inverse_norm": (x,),
        "selection": chosen,
        "targets_pull_": (weight.clone(), None, som_strength, weight.new_tensor(1.0), *choices),
        "gradient": (grad_output, R, None),
        "rank": (activation,),
    }


def _drawn(size: Size, device: str) -> Tensor:
    """Neighbors [D, k] near and far, none of them the feature itself."""
    away = torch.arange(min(CONFIG.neighborhood_k, size.D - 1), device=device) ** 5 % (size.D - 1)
    return (torch.arange(size.D, device=device)[:, None] + 1 + away) % size.D


# --- Equality ---------------------------------------------------------------------------------------------------------


def check_stages(
    size: Size,
    names: Sequence[str],
    device: str = "cpu",
    stages: Sequence[str] = STAGES,
    weight: Tensor | None = None,
    drawn: bool = False,
) -> dict[str, dict[str, float]]:
    """Raise AssertionError unless every stage keeps the exactness contract at this size, given the reference's inputs.

    Choices are equal bit by bit; returns, by backend, stage and result, the relative error of everything else, judged
    by float64 and held to the larger of 1e-5 and twice the reference's own. Neighbors are held to a float64 regret of
    1e-6; `drawn` ones are not looked for.
    """
    errors: dict[str, dict[str, float]] = {backend: {} for backend in names}
    for one in expected(size, device, [stage for stage in stages if not drawn or stage != "neighbors"], weight, drawn):
        for backend in names:
            errors[backend] |= check_stage(one, backend, size)
    return errors


def expected(
    size: Size,
    device: str = "cpu",
    stages: Sequence[str] = STAGES,
    weight: Tensor | None = None,
    drawn: bool = False,
) -> Iterator[Expected]:
    """What the reference makes of every stage, one at a time: two at once may not fit the memory."""
    like = "reference" if set(stages) - {"neighbors", "rank"} else "portable"
    calls = stage_calls(size, device, like, weight, drawn)
    for stage in stages:
        own, truth = (_results(stage, "reference", calls[stage], dtype) for dtype in (torch.float32, torch.float64))
        yield Expected(stage, calls[stage], own, truth)
        del own, truth


def check_stage(one: Expected, backend: str, size: Size) -> dict[str, float]:
    """The errors of a stage of a backend; AssertionError where they break the contract."""
    got = _results(one.stage, backend, one.arguments, torch.float32)
    try:
        return _errors(one.stage, one.arguments, got, one.own, one.truth)
    except AssertionError as error:
        raise AssertionError(f"{backend} at {size}: {error}") from None


def _results(stage: str, backend: str, taken: tuple[Any, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What a stage returns for arguments cast to this dtype; of one that works in place, the change."""
    in_place = stage.endswith("_")
    given = [t.to(dtype, copy=in_place) if _is_real(t) else t for t in taken]
    result = ops.stage(stage, backend)(*given)
    if in_place:
        return (given[0] - taken[0].to(dtype),)
    return result if isinstance(result, tuple) else (result,)


def _errors(
    stage: str, taken: tuple[Any, ...], got: tuple[Tensor, ...], own: tuple[Tensor, ...], truth: tuple[Tensor, ...]
) -> dict[str, float]:
    """The errors of one stage of one backend beside the reference's results in float32 and in float64."""
    if stage == "neighbors":
        regret = _regret(taken[0].double(), got[0], truth[0])
        assert regret <= 1e-6, f"neighbors are less similar by {regret:.1e}"
        return {stage: regret}
    errors = {}
    for i, (mine, reference32, reference64) in enumerate(zip(got, own, truth, strict=True)):
        place = f"{stage} {reference.COMPETITION[i]}" if stage == "competition" else f"{stage} {i}"
        if stage == "selection":
            mine, reference32 = mine.sort(dim=1).values, reference32.sort(dim=1).values
        if not reference32.is_floating_point() or place == "gradient 0":
            assert mine.equal(reference32), f"{place} differs in {int((mine != reference32).sum())} elements"
        elif place != "competition pair_pull" or own[4].equal(truth[4]):  # else of other winners
            errors[place] = relative_error(mine, reference64)
            assert errors[place] <= budget(reference32, reference64), f"{place} is off by {errors[place]:.1e}"
    return errors


def _is_real(value: Any) -> bool:
    return torch.is_tensor(value) and value.is_floating_point()


def _regret(weight: Tensor, chosen: Tensor, best: Tensor) -> float:
    """By how much, at most, the cosine of a chosen neighbor [D, k] falls behind that of the best at its place."""
    unit = weight * reference.inverse_norm(weight)[:, None]
    regret = 0.0
    for place in range(chosen.shape[1]):  # a [D, N] at a time
        gap = ((unit[best[:, place]] - unit[chosen[:, place]]) * unit).sum(dim=1)
        regret = max(regret, float(gap.max()))
    return regret


# --- Time -------------------------------------------------------------------------------------------------------------


def stage_times(
    size: Size,
    roof: Ceilings,
    stages: Sequence[str] = STAGES,
    device: str = "cpu",
    question: str = "stages",
    **amount: Any,
) -> list[Row]:
    """Check every backend, then time every stage of it on the numbers of one training step: a row for each.

    `ratio_to_linear` is over an `nn.Linear` step, whose own row is the stage `products`. `gbs` counts the bytes that
    the stage cannot do without, `fraction_of_roof` says which share of its floor's speed it reaches. `amount` goes to
    `timing.medians`.
    """
    serving = backends(device)
    check_stages(size, serving[1:], device, stages)
    given = stage_calls(size, device)
    calls = {
        (stage, backend): partial(ops.stage(stage, backend), *given[stage]) for stage in stages for backend in serving
    }
    calls["products", "linear"] = build("linear", size, device=device).step
    taken = medians(calls, device, **amount)
    needed, floor = work(size), roof.floor_ms(size)
    rows = [
        row(
            question,
            name,
            size,
            device=device,
            ms=ms,
            ratio_to_linear=ms / taken["products", "linear"].ms,
            stage=stage,
            ratio_to_reference=ms / taken[stage, "reference"].ms if name != "linear" else None,
            gbs=(needed[stage].moved + needed[stage].gathered) / ms / 1e6 or None,
            tflops=needed[stage].operations / ms / 1e9 or None,
            fraction_of_roof=floor[stage] / ms,
            captured=captured if device == "cuda" else None,
        )
        for (stage, name), (ms, captured) in taken.items()
    ]
    return rows + absent(question, size, reasons(device, compiled=WHOLE), device=device)
