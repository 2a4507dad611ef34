"""Numbers as text: how many decimals of a metric are worth reading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DECIMALS = {
    **dict.fromkeys(("unique_tgt", "alive", "ever_winning", "held_out_firing_features"), 0),
    "effective_rank": 1,
    **dict.fromkeys(("adam_over_pull", "need_ratio", "coverage_cv"), 2),
    "held_out_l1": 4,
    "held_out_mse": 4,
}
TINY = ("gradient", "gradient_over_pull", "pull_over_gradient")  # norms of which every order of magnitude counts


def decimals(metric: str) -> int:
    """How many decimals a metric is given with, in the ranges and wherever it is shown."""
    return 0 if ">=" in metric else DECIMALS.get(metric, 3)


def as_text(value: float | None, metric: str) -> str:
    """A value of a metric, rounded; None is empty."""
    if value is None:
        return ""
    if decimals(metric) == 0:
        return f"{value:.0f}"
    scientific = abs(value) >= 1e3 or (metric in TINY and 0 < abs(value) < 1e-3)
    return f"{value:.1e}" if scientific else f"{value:.{decimals(metric)}f}"


def spread(row: Mapping[str, Any]) -> str:
    """The least and largest over seeds of a row of `judging.measure_cell`; empty where nothing was measured."""
    low, high = (as_text(row[key], row["metric"]) for key in ("min", "max"))
    return f"{low}..{high}" if low else ""
