"""Clocks: medians of interleaved windows. On a GPU the device's own time, by CUDA events."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Call = Callable[[], Any]


def window(call: Call, seconds: float, device: str = "cpu") -> float:
    """Mean milliseconds of a call over as many as `seconds` hold, at least one."""
    if device == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize()
        events[0].record()
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < seconds:
        call()
        calls += 1
    if device != "cuda":
        return (time.perf_counter() - start) / calls * 1e3
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / calls


def interleaved(
    calls: Mapping[str, Call], rounds: int, seconds: float, most_seconds: float, device: str = "cpu"
) -> dict[str, list[float]]:
    """Milliseconds of every call in windows of about `seconds`, one of each in turn: A B C A B C ...

    What has taken more than `most_seconds` leaves out the later rounds.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    for _ in range(rounds):
        for name, call in calls.items():
            if spent[name] <= most_seconds:
                start = time.perf_counter()
                taken[name].append(window(call, seconds, device))
                spent[name] += time.perf_counter() - start
    return taken


def median_ms(call: Call, device: str = "cpu", repeats: int = 5, most_seconds: float = 3.0) -> float:
    """Median milliseconds of one call; on a GPU with nothing of it left in the cache.

    Repeats end where they have taken more than `most_seconds`. The first is left out unless it is the only one.
    """
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(call, return_mode="median")
    taken: list[float] = []
    while len(taken) <= repeats and sum(taken) <= most_seconds * 1e3:
        taken.append(window(call, 0))
    return statistics.median(taken[1:] or taken)


def medians(calls: Mapping[Any, Call], device: str = "cpu", rounds: int = 5, seconds: float = 0.05) -> dict[Any, float]:
    """Median milliseconds of every call, after one untimed: interleaved on a CPU, on a GPU each with a cold cache."""
    if device == "cuda":
        return {name: median_ms(call, device) for name, call in calls.items()}
    for call in calls.values():
        call()
    taken = interleaved(calls, rounds, seconds, most_seconds=3.0)
    return {name: statistics.median(times) for name, times in taken.items()}
