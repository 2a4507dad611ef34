"""Stages one by one: held to the exactness contract at any size, and timed beside the roof."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops, reference
from ..testing import budget, relative_error
from .clocks import medians
from .contestants import CONFIG, Size, backends, batch, build, reasons
from .floor import Ceilings, work
from .rows import Row, absent, row

STAGES = ("neighbours", "competition", "inverse_norm", "selection", "targets_pull_", "gradient", "rank")


def stage_calls(
    size: Size, device: str = "cpu", like: str = "portable", weight: Tensor | None = None
) -> dict[str, tuple[Any, ...]]:
    """Stage -> its arguments in one training step on random numbers, formed by the backend `like`.

    weight [D, N] is that of a layer, None: one drawn by `nn.Linear`.
    """
    x, grad_output = batch(size, device)
    torch.manual_seed(0)
    linear = nn.Linear(size.N, size.D)
    weight = (linear.weight.detach() if weight is None else weight).to(device)
    bias = linear.bias.detach().to(device)
    activation = F.linear(x, weight, bias)
    neighbors = ops.stage("neighbours", like)(weight, CONFIG.neighborhood_k)
    competing = activation, neighbors, CONFIG.temperature, x, CONFIG.forces, 0.0, 0.0
    R, _, _, _, _, *pairs, rinv, need, winner_share, som_strength = ops.stage("competition", like)(*competing)
    chosen = activation, bias, rinv, None, need, "rank", "hard", CONFIG.rescue_k
    choices = x, *pairs, *ops.stage("selection", like)(*chosen), winner_share, "none"
    return {
        "neighbours": (weight, CONFIG.neighborhood_k),
        "competition": competing,
        "inverse_norm": (x,),
        "selection": chosen,
        "targets_pull_": (weight.clone(), None, som_strength, 1.0, *choices),
        "gradient": (grad_output, R, None),
        "rank": (activation,),
    }


# --- Equality ---------------------------------------------------------------------------------------------------------


def check_stages(
    size: Size, backend: str, device: str = "cpu", stages: Sequence[str] = STAGES, weight: Tensor | None = None
) -> dict[str, float]:
    """Raise AssertionError unless every stage keeps the exactness contract at this size, given the reference's inputs.

    Choices are equal bit by bit; returns, by stage and result, the relative error of everything else, judged by float64
    and held to the larger of 1e-5 and twice the reference's own. Neighbours are held to a float64 regret of 1e-6.
    """
    errors = {}
    calls = stage_calls(size, device, "reference" if set(stages) - {"neighbours", "rank"} else "portable", weight)
    for name in stages:
        taken, in_place = calls[name], name.endswith("_")
        results = []
        for server, cast in ((backend, torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
            given = [t.to(cast, copy=in_place) if _is_real(t) else t for t in taken]
            result = ops.stage(name, server)(*given)
            results.append((given[0] - taken[0].to(cast),) if in_place else _as_tuple(result))
        if name == "neighbours":
            errors[name] = _regret(taken[0].double(), *(result[0] for result in results[::2]))
            assert errors[name] <= 1e-6, f"{backend} at {size}: neighbours are less similar by {errors[name]:.1e}"
            continue
        for i, (got, own, truth) in enumerate(zip(*results, strict=True)):
            place = f"{name} {reference.COMPETITION[i]}" if name == "competition" else f"{name} {i}"
            if name == "selection":
                got, own = got.sort(dim=1).values, own.sort(dim=1).values
            if not own.is_floating_point() or place == "gradient 0":
                assert got.equal(own), f"{backend} at {size}: {place} differs in {int((got != own).sum())} elements"
            elif place != "competition pair_pull" or results[1][4].equal(results[2][4]):
                errors[place] = relative_error(got, truth)
                allowed = budget(own, truth)
                assert errors[place] <= allowed, f"{backend} at {size}: {place} is off by {errors[place]:.1e}"
    return errors


def _is_real(value: Any) -> bool:
    return torch.is_tensor(value) and value.is_floating_point()


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _regret(weight: Tensor, chosen: Tensor, best: Tensor) -> float:
    """By how much, at most, the cosine of a chosen neighbour [D, k] falls behind that of the best at its place."""
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
    `clocks.medians`.
    """
    serving = backends(device)
    for backend in serving[1:]:
        check_stages(size, backend, device, stages)
    taken = stage_calls(size, device)
    calls = {
        (stage, backend): partial(ops.stage(stage, backend), *taken[stage]) for stage in stages for backend in serving
    }
    calls["products", "linear"] = build("linear", size, device=device).step
    ms = medians(calls, device, **amount)
    needed, floor = work(size), roof.floor_ms(size)
    rows = [
        row(
            question,
            name,
            size,
            device=device,
            ms=taken_ms,
            ratio_to_linear=taken_ms / ms["products", "linear"],
            stage=stage,
            ratio_to_reference=taken_ms / ms[stage, "reference"] if name != "linear" else None,
            gbs=(needed[stage].moved + needed[stage].gathered) / taken_ms / 1e6 or None,
            tflops=needed[stage].operations / taken_ms / 1e9 or None,
            fraction_of_roof=floor[stage] / taken_ms,
        )
        for (stage, name), taken_ms in ms.items()
    ]
    why = reasons(device, compiled="compiled as a whole step alone")
    return rows + absent(question, size, why, device=device)
