"""Whole training steps: every implementation in turn, refresh included, against `nn.Linear` and the floor."""

from __future__ import annotations

import statistics
from typing import Any

from torch import Tensor

from .. import backends
from .choices import check_choices
from .floor import Ceilings
from .implementations import CONFIG, Implementation, Size, build, reasons, serving, serving_stages
from .rows import Row, absent, row
from .stages import check_stages
from .timing import interleaved, median_ms


def begin(running: dict[str, Implementation], device: str = "cpu") -> tuple[dict[str, float], dict[str, Tensor]]:
    """Find the neighbors of every implementation and take its first step, which compiles.

    Returns the milliseconds of a refresh (0 without BCL), and how far each weight [D, N] moved.
    """
    refresh_ms, moved = {}, {}
    for name, implementation in running.items():
        refresh_ms[name] = median_ms(implementation.refresh, device, 3, 1.0) if implementation.refresh else 0.0
        start = implementation.weight.detach().clone()
        implementation.step()
        moved[name] = implementation.weight.detach() - start
    return refresh_ms, moved


def check_equal(moved: dict[str, Tensor], size: Size, device: str = "cpu") -> None:
    """AssertionError unless the first pull of every implementation is the reference's.

    Only for features that are not alike: a choice between almost equal ones is decided by the last bit of a sum. One
    feature in a thousand may still choose otherwise, if its choice is as good.
    """
    scale = moved["reference"].abs().max()
    for name, move in moved.items():
        if name == "linear":
            continue
        errors = (move - moved["reference"]).abs().amax(dim=1) / scale
        others = int((~(errors <= 1e-4)).sum())  # NaN too
        assert others <= size.D // 1000, (
            f"{name} at {size}: the first pull differs from the reference's by {float(errors.max()):.1e}, in {others} "
            "features by more than 1e-4"
        )
        if others and name in backends.NAMES:
            check_choices(name, size, device=device)


def race(
    running: dict[str, Implementation],
    refresh_ms: dict[str, float],
    device: str = "cpu",
    rounds: int = 5,
    seconds: float = 0.5,
    max_seconds: float = 10.0,
) -> dict[str, dict[str, float]]:
    """Time the steps of those that have begun, in turn, `linear` first: what a row of each has beside its labels.

    `ms` is the median window plus the refresh, which was timed apart, shared out over CONFIG.recompute_every steps;
    `ratio_to_linear` is the median over rounds of that over the round's `nn.Linear`. Rounds and seconds are those of
    `timing.interleaved`.
    """
    taken = interleaved({name: c.step for name, c in running.items()}, rounds, seconds, max_seconds, device)
    measured = {}
    for name, windows in taken.items():
        whole = [ms + refresh_ms[name] / CONFIG.recompute_every for ms in windows]
        ratios = [ms / linear for ms, linear in zip(whole, taken["linear"], strict=False)]
        measured[name] = {
            "ms": statistics.median(whole),
            "ratio_to_linear": statistics.median(ratios),
            "refresh_ms": refresh_ms[name],
        }
    return measured


def step_times(
    size: Size, roof: Ceilings, weight: Tensor | None = None, device: str = "cpu", question: str = "step", **amount: Any
) -> list[Row]:
    """Check what every implementation computes, then `race` them: a row for each. `amount` goes to `race`."""
    running = {name: build(name, size, weight, device) for name in serving(device)}
    refresh_ms, moved = begin(running, device)
    if weight is None:
        check_equal(moved, size, device)
    else:
        check_stages(size, serving_stages(device)[1:], device, weight=weight)
    labels = {"device": device, "weights": "init" if weight is None else "trained"}
    rows = [
        row(question, name, size, **labels, **measured, floor_ms=roof.step_ms(size))
        for name, measured in race(running, refresh_ms, device, **amount).items()
    ]
    return rows + absent(question, size, reasons(device), **labels)
