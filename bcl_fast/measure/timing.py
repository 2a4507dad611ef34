"""Clocks: medians of interleaved windows. On a GPU the device's own time, by CUDA events."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ..capture import aside, record

Call = Callable[[], Any]
LAUNCH_BOUND = 1.0  # ms: a shorter call may have waited for its launches, so it is timed as a CUDA graph
MAX_QUEUED = 1000  # launches of a window that the host may run ahead of the device


class Taken(NamedTuple):
    """What a call took."""

    ms: float
    captured: bool  # as a CUDA graph: the device's own time, whatever its launches cost the host


def window(call: Call, seconds: float, device: str = "cpu") -> float:
    """Mean milliseconds of a call over as many as `seconds` hold, at least one."""
    if device == "cuda":
        return _device_window(call, seconds)
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < seconds:
        call()
        calls += 1
    return (time.perf_counter() - start) / calls * 1e3


def _device_window(call: Call, seconds: float) -> float:
    """In batches of about a tenth of the window, each waited for: calls are queued faster than they run."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    spent, calls, batch = 0.0, 0, 1
    torch.cuda.synchronize()
    while calls == 0 or spent < seconds * 1e3:
        start.record()
        for _ in range(batch):
            call()
        end.record()
        end.synchronize()
        ms = start.elapsed_time(end)
        spent, calls = spent + ms, calls + batch
        batch = batches(ms / batch, seconds)
    return spent / calls


def batches(ms: float, seconds: float) -> int:
    """How many calls of `ms` make up a tenth of a window of `seconds`."""
    return max(1, min(MAX_QUEUED, int(100 * seconds / max(ms, 1e-3))))


def interleaved(
    calls: Mapping[str, Call], rounds: int, seconds: float, max_seconds: float, device: str = "cpu"
) -> dict[str, list[float]]:
    """Milliseconds of every call in windows of about `seconds`, one of each in turn: A B C A B C ...

    What has taken more than `max_seconds` leaves out the later rounds.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    for _ in range(rounds):
        for name, call in calls.items():
            if spent[name] <= max_seconds:
                start = time.perf_counter()
                taken[name].append(window(call, seconds, device))
                spent[name] += time.perf_counter() - start
    return taken


def captured(call: Call, warm: int = 3) -> Call:
    """The replay of a CUDA graph of `call`, whose tensors stay where they were; RuntimeError where it has none.

    Nothing can be captured that waits for the device or asks it for a number.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    aside(device, lambda: [call() for _ in range(warm)])  # compiles, and allocates what lasts
    return record(device, call)[0]


def taken(call: Call, device: str = "cpu", repeats: int = 5, max_seconds: float = 3.0) -> Taken:
    """The median of one call; on a GPU with nothing of it left in the cache, and captured where it is short.

    On a CPU repeats end where they have taken more than `max_seconds`, and the first is left out unless it is the only
    one.
    """
    if device == "cuda":
        from triton.testing import do_bench

        ms = do_bench(call, return_mode="median")
        if ms > LAUNCH_BOUND:
            return Taken(ms, False)
        try:
            replay = captured(call)
        except RuntimeError:
            return Taken(ms, False)
        return Taken(do_bench(replay, return_mode="median"), True)
    windows: list[float] = []
    while len(windows) <= repeats and sum(windows) <= max_seconds * 1e3:
        windows.append(window(call, 0))
    return Taken(statistics.median(windows[1:] or windows), False)


def median_ms(call: Call, device: str = "cpu", repeats: int = 5, max_seconds: float = 3.0) -> float:
    """The milliseconds of `taken`."""
    return taken(call, device, repeats, max_seconds).ms


def medians(calls: Mapping[Any, Call], device: str = "cpu", rounds: int = 5, seconds: float = 0.05) -> dict[Any, Taken]:
    """The median of every call, after one untimed: interleaved on a CPU, on a GPU each with a cold cache."""
    if device == "cuda":
        return {name: taken(call, device) for name, call in calls.items()}
    for call in calls.values():
        call()
    windows = interleaved(calls, rounds, seconds, 3.0)
    return {name: Taken(statistics.median(times), False) for name, times in windows.items()}
