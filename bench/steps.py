"""Training steps: every implementation in turn, refresh included, against `nn.Linear` and the floor."""

from __future__ import annotations

from typing import Any

from choices import check_choices
from stages import check_stages
from torch import Tensor

from bcl_fast import backends
from bcl_fast.measure.floor import Ceilings
from bcl_fast.measure.implementations import Size, build, reasons, serving, serving_stages
from bcl_fast.measure.rows import Row, absent, row
from bcl_fast.measure.steps import begin, race


def check_equal(moved: dict[str, Tensor], size: Size, device: str = "cpu") -> None:
    """AssertionError unless the first pull of every implementation is the reference's.

    Only for features that are not alike: a choice between almost equal ones is decided by the last bit of a sum. One
    feature in a thousand may still choose another sample, if that is as good.
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


def step_times(
    size: Size, roof: Ceilings, weight: Tensor | None = None, device: str = "cpu", question: str = "step", **amount: Any
) -> list[Row]:
    """Check what every implementation computes, then `race` them: a row for each. `amount` goes to `race`."""
    running = {name: build(name, size, weight, device) for name in serving(device)}
    refreshes, moved = begin(running, device)
    if weight is None:
        check_equal(moved, size, device)
    else:
        check_stages(size, serving_stages(device)[1:], device, weight=weight)
    labels = {"device": device, "weights": "init" if weight is None else "trained"}
    rows = [
        row(question, name, size, **labels, **measured, floor_ms=roof.step_ms(size))
        for name, measured in race(running, refreshes, device, **amount).items()
    ]
    return rows + absent(question, size, reasons(device), **labels)
