"""Timing: ratios within rounds, windows, kept memory, ceilings, by a clock that moves when a call takes time."""

import itertools
import platform
import statistics
import subprocess
import sys

import pytest
import torch

from bcl_fast.measure import timing
from bcl_fast.measure.implementations import Implementation
from bcl_fast.measure.steps import Refresh, begin, race


@pytest.fixture
def now(monkeypatch):
    """The time of a clock that moves only when a call takes time."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def test_a_machine_that_drifts_leaves_ratios_as_they_are(now, monkeypatch):
    """Each round is 30 % slower than the one before, and what is slow leaves before the others."""
    speed, seen = {"a": 0.25, "b": 0.5, "slow": 5.0, "refresh": 1.0}, []

    def call(name):
        def step():
            if name == "a":
                seen.append(1.3 ** len(seen))
            now[0] += speed[name] * seen[-1]

        return step

    calls = {name: call(name) for name in ("a", "b", "slow")}
    windows = timing.interleaved(calls, 14, 0, 60)
    medians = {name: timing.statistics.median(own) for name, own in windows.items()}
    assert len(windows["a"]) == 14 and 5 <= len(windows["slow"]) < 14
    assert medians["slow"] / medians["a"] < 15  # where it is 20
    for name, right in (("a", 1.0), ("b", 2.0), ("slow", 20.0)):
        found = timing.ratio("over", windows[name], windows["a"])
        assert found == pytest.approx({"over": right, "over_low": right, "over_high": right})

    seen.clear()
    linear = Implementation(torch.zeros(1), call("a"), None)
    running = {"linear": linear, "slow": Implementation(torch.zeros(1), call("slow"), call("refresh"))}
    refreshes, _ = begin(running)
    assert refreshes["linear"] == Refresh() and refreshes["slow"].ratio == pytest.approx(4)
    row = race(running, refreshes, rounds=14, seconds=0)["slow"]
    assert row["ratio_to_linear"] == pytest.approx(20 + 4 / 50)


def test_windows_are_interleaved_and_the_slow_leave_early(now):
    order = []

    def call(name, seconds):
        def step():
            order.append(name)
            now[0] += seconds

        return step

    calls = {"first": call("first", 0.25), "quick": call("quick", 0.5), "slow": call("slow", 4.0)}
    windows = timing.interleaved(calls, 7, 0.5, 2.9)  # three times that before the fifth round
    assert windows == {"first": [250] * 6, "quick": [500] * 6, "slow": [4000] * 3}  # not of a round of its own
    assert "".join(name[0] for name in order) == 3 * "ffqs" + 3 * "ffq"


def test_rounds_go_on_until_a_ratio_is_known(now):
    """What jumps by a tenth takes more rounds than what is steady, what jumps by half takes all."""

    def call(jump):
        turns = itertools.cycle([1 - jump / 2, 1 + jump / 2])

        def step():
            now[0] += next(turns)

        return step

    jumps = {"first": 0, "steady": 0.01, "moves": 0.1, "jumps": 0.5}
    windows = timing.interleaved({name: call(jump) for name, jump in jumps.items()}, 40, 0, 60)
    rounds = {name: len(own) for name, own in windows.items()}
    assert rounds["steady"] == 15 < rounds["moves"] < 30 and rounds["jumps"] == rounds["first"] == 40


def test_the_standard_error_is_that_of_a_median():
    rounds = torch.exp(0.1 * torch.randn(2000, 25, generator=torch.Generator().manual_seed(0))).tolist()
    medians = [timing.ratio("r", own, [1.0] * 25)["r"] for own in rounds]
    told = [timing.standard_error(own, [1.0] * 25) for own in rounds]
    assert statistics.fmean(told) == pytest.approx(statistics.pstdev(medians), rel=0.1)


PAGES_OF_CLONES = """
import resource, torch
from bcl_fast.measure.timing import keep_memory

def pages():
    cleared = []
    for _ in range(40):
        tensor.clone()
        cleared.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return cleared[-1] - cleared[-11]

tensor = torch.ones(1 << 24)  # 64 MB, which malloc gives back to the system when it is freed
print(pages(), keep_memory(), pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its malloc alone can be told")
def test_memory_that_is_kept_is_not_cleared_again():
    """The last ten clones of forty, in a process of its own: malloc can be told once."""
    told = subprocess.run([sys.executable, "-c", PAGES_OF_CLONES], capture_output=True, text=True, check=True)
    before, kept, after = told.stdout.split()
    assert int(before) >= 10 * 32 and kept == "True" and int(after) < 32  # of 2 MB each, at least


def test_another_malloc_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(timing.ctypes, "CDLL", lambda name: object())
    assert timing.keep_memory() is False


@pytest.mark.parametrize(
    "windows, quartiles", [([2.0], (2, 2, 2)), ([1.0, 3.0], (1.5, 2, 2.5)), ([5.0, 1.0, 2.0, 4.0, 3.0], (2, 3, 4))]
)
def test_a_ratio_has_its_quartiles(windows, quartiles):
    assert tuple(timing.ratio("r", windows, [1.0] * 9).values()) == (quartiles[1], quartiles[0], quartiles[2])


def test_a_single_call_is_its_own_median_only_where_it_took_all_the_time(now):
    durations = iter([9.0, 1.0, 2.0, 3.0, 5.0])

    def call():
        now[0] += next(durations)

    assert timing.taken(call, repeats=3, max_seconds=8).ms == 9000
    assert timing.taken(call, repeats=2, max_seconds=60).ms == 2500  # of 2 and 3: the first is left out


def test_a_ceiling_is_what_nothing_disturbed(now):
    durations = itertools.chain([0.125, 0.5, 0.25], itertools.repeat(0.75))

    def call():
        now[0] += next(durations)

    assert timing.fastest_ms(call) == 250  # the first, which loads what is loaded on first use, is left out


@pytest.mark.parametrize("ms, most", [(0.02, 60_000), (100, 12), (30_000, 1)])
def test_a_window_on_a_gpu_is_as_long_as_it_was_asked_for(monkeypatch, ms, most):
    """A call returns before the device has begun: without waiting a second's window queues all that a second can."""
    queued, now = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            queued.append(self)

        def synchronize(self):
            for one in queued:
                if isinstance(one, Event):
                    one.at = now[0]
                else:
                    now[0] += one
            queued.clear()

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = []
    found = timing.window(lambda: (calls.append(1), queued.append(ms)), 1.0, "cuda")
    assert found == pytest.approx(ms) and 1 <= len(calls) <= most
    assert now[0] <= max(1100, ms + 1)  # a tenth more than was asked for
