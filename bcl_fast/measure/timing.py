"""Timing: windows in rounds, and ratios formed within a round. On a GPU the device's own time, by CUDA events.

A machine changes its speed from minute to minute, but hardly between two windows that follow each other: what is
compared is timed in the same round, a ratio is the median over rounds, and there are rounds until it is known.
"""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..capture import aside, record

Call = Callable[[], Any]
LAUNCH_BOUND = 1.0  # ms: a shorter call may have waited for its launches, so it is timed as a CUDA graph
MAX_QUEUED = 1000  # launches of a window that the host may run ahead of the device
ROUNDS, SECONDS = 40, 0.2  # of a comparison at most, and of each window
ENOUGH = 15  # rounds, if they agree
PRECISION = 0.02  # the standard error at which they do
MIN_ROUNDS = 5  # a median of fewer says so
PATIENCE = 3  # times the seconds that a call may take, until it has MIN_ROUNDS
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_memory() -> bool:
    """From now on this process keeps what it frees; False where malloc is not glibc's, and nothing changes.

    Else a large tensor is mapped anew at every call, and the kernel clears it page by page: a clone of 64 MB takes 44
    ms instead of 6. Whether that happens to tensors of up to 32 MB depends on what the process has freed before, so
    that two processes disagree on the same call. Kept memory may have gaps that fit no tensor, until about ten calls
    have been made.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, -1) == 1


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
    """Milliseconds of every call in windows of about `seconds`, one of each in a round: A B C A B C ...

    The first call is what the others are compared with, and takes part as long as one of them does. They leave when
    the median of their ratios to it is known to PRECISION, from ENOUGH rounds or more, and when they have taken more
    than `max_seconds`, or PATIENCE times that before they have MIN_ROUNDS.
    """
    return _rounds(calls, rounds, max_seconds, lambda call: window(call, seconds, device))


def _rounds(
    calls: Mapping[str, Call], rounds: int, max_seconds: float, timed: Callable[[Call], float]
) -> dict[str, list[float]]:
    windows: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    first, *others = calls

    def goes_on(name: str) -> bool:
        taken = len(windows[name])
        if spent[name] > max_seconds * (1 if taken >= MIN_ROUNDS else PATIENCE):
            return False
        return taken < ENOUGH or standard_error(windows[name], windows[first]) > PRECISION

    for _ in range(rounds):
        running = [name for name in others or [first] if goes_on(name)]
        for name in dict.fromkeys([first, *running]) if running else ():
            start = time.perf_counter()
            windows[name].append(timed(calls[name]))
            spent[name] += time.perf_counter() - start
    return windows


def ratio(name: str, windows: Sequence[float], base: Sequence[float], more: float = 0.0) -> dict[str, float]:
    """Three keys of a row: the median over rounds of a window over the base's in the same round, and its quartiles.

    `more` is added to every ratio.
    """
    low, middle, high = _quartiles(windows, base, more)
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


def standard_error(windows: Sequence[float], base: Sequence[float]) -> float:
    """Of the median of `ratio`, as a share of it: sqrt(pi / 2 n) deviations, of which quartiles are 1.349 apart."""
    low, middle, high = _quartiles(windows, base)
    return math.sqrt(math.pi / 2 / len(windows)) * (high - low) / 1.349 / middle


def _quartiles(windows: Sequence[float], base: Sequence[float], more: float = 0.0) -> list[float]:
    paired = [ms / other + more for ms, other in zip(windows, base, strict=False)]
    return statistics.quantiles(paired * 2 if len(paired) == 1 else paired, method="inclusive")


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
        call, is_captured = _launched(call)
        return Taken(_cold(call), is_captured)
    windows: list[float] = []
    while len(windows) <= repeats and sum(windows) <= max_seconds * 1e3:
        windows.append(window(call, 0))
    return Taken(statistics.median(windows[1:] or windows), False)


def _launched(call: Call) -> tuple[Call, bool]:
    """A call as it is timed on a GPU, and whether that is its CUDA graph, as where it is short and has one."""
    if _cold(call) <= LAUNCH_BOUND:
        try:
            return captured(call), True
        except RuntimeError:
            pass
    return call, False


def _cold(call: Call, seconds: float = 0.1) -> float:
    """The median milliseconds of a call on a GPU that has nothing of it in its cache, from about `seconds` of calls."""
    from triton.testing import do_bench

    return do_bench(call, rep=max(1, int(1000 * seconds)), return_mode="median")


def fastest_ms(call: Call, seconds: float = 1.0) -> float:
    """The milliseconds of the fastest of the calls that fill `seconds` on a CPU, after one: the least disturbed."""
    call()
    windows: list[float] = []
    while sum(windows) < seconds * 1e3:
        windows.append(window(call, 0))
    return min(windows)


def compared(
    calls: Mapping[str, Call],
    device: str = "cpu",
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    max_seconds: float = 30.0,
) -> tuple[dict[str, list[float]], dict[str, bool]]:
    """The windows of `interleaved` after a call of each that is not timed, on a GPU with a cold cache; and of each
    whether it was captured.
    """
    if device == "cuda":
        launched = {name: _launched(call) for name, call in calls.items()}
        ready = {name: call for name, (call, _) in launched.items()}
        windows = _rounds(ready, rounds, max_seconds, lambda call: _cold(call, seconds))
        return windows, {name: is_captured for name, (_, is_captured) in launched.items()}
    for call in calls.values():
        call()
    return interleaved(calls, rounds, seconds, max_seconds), dict.fromkeys(calls, False)
