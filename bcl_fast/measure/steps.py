"""Training steps in turn, refresh included: what each implementation takes, over `nn.Linear`."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from torch import Tensor

from .implementations import CONFIG, Implementation
from .timing import ROUNDS, interleaved, ratio


class Refresh(NamedTuple):
    """What it takes to find the neighbors once."""

    ms: float = 0.0
    ratio: float = 0.0  # over a step of `nn.Linear` right before it


def begin(running: dict[str, Implementation], device: str = "cpu") -> tuple[dict[str, Refresh], dict[str, Tensor]]:
    """Find the neighbors of every implementation, `linear` among them, and take its first step, which compiles.

    Returns what a refresh took, and how far each weight [D, N] moved.
    """
    refreshes, moved = dict.fromkeys(running, Refresh()), {}
    for name, implementation in running.items():
        if implementation.refresh is not None:
            calls = {"linear": running["linear"].step, name: implementation.refresh}
            windows = interleaved(calls, 3, 0, 1.0, device)
            over_linear = ratio("ratio", windows[name], windows["linear"])["ratio"]
            refreshes[name] = Refresh(statistics.median(windows[name]), over_linear)
        start = implementation.weight.detach().clone()
        implementation.step()
        moved[name] = implementation.weight.detach() - start
    return refreshes, moved


def race(
    running: dict[str, Implementation],
    refreshes: dict[str, Refresh],
    device: str = "cpu",
    rounds: int = ROUNDS,
    seconds: float = 0.5,
    max_seconds: float = 200.0,
) -> dict[str, dict[str, Any]]:
    """Time the steps of those that have begun, in turn, `linear` first: the columns of a row of each.

    `ms` is the median window plus the refresh, which was timed apart, shared out over CONFIG.recompute_every steps;
    `ratio_to_linear` is `timing.ratio`, with that share. Rounds and seconds are those of `timing.interleaved`.
    """
    windows = interleaved({name: one.step for name, one in running.items()}, rounds, seconds, max_seconds, device)
    share = 1 / CONFIG.recompute_every
    return {
        name: {
            "ms": statistics.median(own) + share * refreshes[name].ms,
            **ratio("ratio_to_linear", own, windows["linear"], share * refreshes[name].ratio),
            "refresh_ms": refreshes[name].ms,
            "rounds": len(own),
        }
        for name, own in windows.items()
    }
