"""Stages one by one: held to the exactness contract at any size, and timed against the roof."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcl_fast import backends
from bcl_fast.measure.floor import Ceilings, work
from bcl_fast.measure.implementations import CONFIG, Size, batch, build, reasons, serving_stages
from bcl_fast.measure.rows import Row, absent, row
from bcl_fast.measure.timing import compared, ratio
from bcl_fast.structures import Pull
from bcl_fast.testing import check_stage, expected

STAGES = ("neighbors", "competition", "inverse_norm", "selection", "targets_pull_", "gradient", "rank")
ONE_FUNCTION = "compiled as one function of the step"  # why there is no stage of `compiled`


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
    neighbors = _drawn(size, device) if drawn else backends.stage("neighbors", like)(weight, CONFIG.neighborhood_k)
    competing = activation, neighbors, CONFIG.temperature, x, CONFIG.forces, 0.0, 0.0
    won = backends.stage("competition", like)(*competing)
    chosen = activation, bias, won.x_inverse_norm, None, won.need, "rank", "hard", CONFIG.rescue_k
    rescue, forces = backends.stage("selection", like)(*chosen), (won.winner_share, won.som_strength)
    pull = Pull(x, won.pair_feature, won.pair_pull, *rescue, *forces)
    return {
        "neighbors": (weight, CONFIG.neighborhood_k),
        "competition": competing,
        "inverse_norm": (x,),
        "selection": chosen,
        "targets_pull_": (weight.clone(), None, weight.new_tensor(1.0), pull),
        "gradient": (grad_output, won.rank_score, None),
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
    like = "reference" if set(stages) - {"neighbors", "rank"} else "portable"
    calls = stage_calls(size, device, like, weight, drawn)
    for stage in (stage for stage in stages if not drawn or stage != "neighbors"):
        right = expected(stage, calls[stage])  # one at a time: two at once may not fit the memory
        for backend in names:
            try:
                errors[backend] |= check_stage(backends.stage(stage, backend), stage, calls[stage], right)
            except AssertionError as error:
                raise AssertionError(f"{backend} at {size}: {error}") from None
        del right
    return errors


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

    Each stage is timed in rounds of its own, of an `nn.Linear` step and every backend with its own code for the call,
    without which a row says why; `ratio_to_linear` and
    `ratio_to_reference` are `timing.ratio`. The row of `linear`, over all rounds, is the stage `products`. `gbs` counts
    the bytes that the stage cannot do without, `fraction_of_roof` says which share of its floor's speed it reaches.
    `amount` goes to `timing.compared`.
    """
    serving = serving_stages(device)
    check_stages(size, serving[1:], device, stages)
    given, linear = stage_calls(size, device), build("linear", size, device=device).step
    needed, floor = work(size), roof.floor_ms(size)

    def timed(stage: str, name: str, windows: list[float], captured: bool, **ratios: float) -> Row:
        ms = statistics.median(windows)
        values = dict(device=device, ms=ms, **ratios, stage=stage, rounds=len(windows))
        values["gbs"] = (needed[stage].moved + needed[stage].gathered) / ms / 1e6 or None
        values["tflops"] = needed[stage].operations / ms / 1e9 or None
        values["captured"] = captured if device == "cuda" else None
        return row(question, name, size, **values, fraction_of_roof=floor[stage] / ms)

    rows, of_linear = [], []
    for stage in stages:
        others = {name: why for name in serving if (why := backends.why_not_stage(stage, name, given[stage]))}
        calls = {name: partial(backends.stage(stage, name), *given[stage]) for name in serving if name not in others}
        windows, captured = compared({"linear": linear, **calls}, device, **amount)
        of_linear += windows["linear"]
        rows += absent(question, size, others, device=device, stage=stage)
        for name in calls:
            ratios = ratio("ratio_to_linear", windows[name], windows["linear"])
            ratios |= ratio("ratio_to_reference", windows[name], windows["reference"])
            rows.append(timed(stage, name, windows[name], captured[name], **ratios))
    rows.append(timed("products", "linear", of_linear, captured["linear"], ratio_to_linear=1.0))
    return rows + absent(question, size, reasons(device, compiled=ONE_FUNCTION), device=device)
