"""What measures: floors by formula, the contract noticed broken, ratios within rounds, processes of their own."""

import itertools
import platform
import statistics
import subprocess
import sys

import peers
import pytest
import stages
import steps
import torch
from choices import check_choices
from stages import check_stages

from bcl_fast import backends, portable
from bcl_fast.measure import alone as processes
from bcl_fast.measure import implementations, precisions, rows, scaling, timing
from bcl_fast.measure.floor import STEP, Ceilings
from bcl_fast.measure.implementations import Implementation, Size, build
from bcl_fast.measure.steps import Refresh, begin, race
from bcl_fast.structures import Competition

SIZE = Size(61, 17, 23)
ROOF = Ceilings(1, 1, 1)  # milliseconds are megabytes and GFLOP
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


# --- The floor --------------------------------------------------------------------------------------------------------


def test_floor_is_bytes_over_bandwidth():
    B, D, N, k, r = 100, 50, 20, 8, 5
    floor = ROOF.floor_ms(Size(B, D, N))
    assert floor == pytest.approx(
        {
            "neighbors": (4 * D * N + 8 * D * k) / 1e6 + 2 * D * D * N / 1e9,
            "competition": (8 * B * D + 4 * B * N) / 1e6,
            "inverse_norm": 4 * B * N / 1e6,
            "selection": 4 * B * D / 1e6,
            "targets_pull_": (4 * (B * k + D * r) * N + 8 * D * N) / 1e6,
            "gradient": 12 * B * D / 1e6,
            "rank": 12 * B * D / 1e6,
            "products": 6 * B * D * N / 1e9,
        }
    )
    assert ROOF.step_ms(Size(B, D, N)) == pytest.approx(sum(floor[s] for s in STEP) + floor["neighbors"] / 50)
    assert floor.keys() == {*stages.STAGES, "products"}


def test_products_alone_know_a_precision():
    roof = Ceilings(1, 1, 1, tf32_tflops=4, bf16_tflops=8)
    size = Size(100, 50, 20)
    products = 6 * 100 * 50 * 20 / 1e9
    for precision, rate in (("fp32", 1), ("tf32", 4), ("bf16", 8)):
        floor = roof.floor_ms(size, precision)
        assert floor["products"] == pytest.approx(products / rate)
        assert floor["neighbors"] == roof.floor_ms(size)["neighbors"]
        assert roof.step_ms(size, precision) == pytest.approx(roof.step_ms(size) - products + products / rate)
    with pytest.raises(ValueError, match="the rate of tf32 products was not measured"):
        ROOF.step_ms(size, "tf32")


# --- The contract -----------------------------------------------------------------------------------------------------


def test_stages_are_held_to_the_contract():
    errors = check_stages(SIZE, ["portable"])["portable"]
    assert {name.split()[0] for name in errors} >= {"neighbors", "competition", "targets_pull_", "gradient"}
    assert max(errors.values()) <= 1e-5


OWN_STAGE = backends.stage


def spoil_stage(monkeypatch, stage, spoil):
    right = getattr(portable, stage)

    def wrong(*arguments):
        result = right(*arguments)
        return spoil(*result) if isinstance(result, tuple) else spoil(result)

    def found(name, backend):
        return wrong if (name, backend) == (stage, "portable") else OWN_STAGE(name, backend)

    monkeypatch.setattr(backends, "stage", found)


@pytest.mark.parametrize(
    "stage, spoil, message",
    [
        ("selection", lambda rows, shares: (rows.roll(1, 0), shares), "selection rescue_rows differs in"),
        ("competition", lambda R, *rest: (R * 1.001, *rest), "competition rank_score is off by"),
        ("gradient", lambda masked, total: (masked + 1e-9, total), "gradient masked differs in"),
        ("neighbors", lambda near: near.flip(0), "neighbors are less similar by"),
    ],
)
def test_the_contract_is_noticed_broken(stage, spoil, message, monkeypatch):
    spoil_stage(monkeypatch, stage, spoil)
    with pytest.raises(AssertionError, match=message):
        check_stages(SIZE, ["portable"])


def test_nothing_wrong_is_timed(monkeypatch):
    spoil_stage(monkeypatch, "selection", lambda rows, shares: (rows.roll(1, 0), shares))
    monkeypatch.setattr(steps, "serving", lambda device: ["linear", "reference", "portable"])
    monkeypatch.setattr(steps, "race", lambda *arguments: pytest.fail("timed"))
    with pytest.raises(AssertionError, match="portable at .*: the first pull differs from the reference's by"):
        steps.step_times(SIZE, ROOF)
    with pytest.raises(AssertionError, match="selection rescue_rows differs in"):
        steps.step_times(SIZE, ROOF, implementations.trained_weight(SIZE, 2))


@pytest.mark.parametrize(
    "times, stage, spoil, message",
    [
        (peers.selection_times, "selection", lambda rows, shares: (rows.roll(1, 0), shares), "chooses other samples"),
        (peers.rank_times, "rank", lambda ranks: ranks.roll(1, 0), "ranks differ"),
    ],
)
def test_a_peer_that_is_wrong_is_not_timed(times, stage, spoil, message, monkeypatch):
    found = times(SIZE, rounds=1, seconds=0)
    assert {row["contestant"] for row in found if row["ms"]} >= {"reference", "portable"}
    spoil_stage(monkeypatch, stage, spoil)
    with pytest.raises(AssertionError, match=f"portable at .*{message}"):
        times(SIZE, rounds=1, seconds=0)


def test_drawn_neighbors_are_neighbors():
    for size in (Size(3, 161, 9), Size(1, 16384, 1), Size(1, 50000, 1), Size(1, 65536, 1)):
        near = stages.stage_calls(size, drawn=True)["competition"][1]
        assert near.shape == (size.D, 8) and int(near.min()) >= 0 and int(near.max()) < size.D
        assert (near.sort(dim=1).values.diff(dim=1) > 0).all() and not (near == torch.arange(size.D)[:, None]).any()
    errors = check_stages(Size(3, 161, 9), ["portable"], drawn=True)["portable"]
    assert errors and not any(name.startswith("neighbors") for name in errors)


def test_a_few_features_may_choose_as_well(monkeypatch):
    """One in a thousand, if what it chose scores as well as the best."""
    size = Size(64, 2000, 16)
    running = {name: build(name, size) for name in ("linear", "reference", "portable")}
    _, moved = begin(running)
    steps.check_equal(moved, size)
    asked = []
    monkeypatch.setattr(steps, "check_choices", lambda *arguments, **options: asked.append(arguments))
    moved["portable"][[3, 1999]] = 0
    steps.check_equal(moved, size)
    assert asked == [("portable", size)]
    moved["portable"][5] = torch.nan
    with pytest.raises(AssertionError, match="the first pull differs .* in 3 features"):
        steps.check_equal(moved, size)


def test_choices_end_to_end(monkeypatch):
    size = Size(200, 40, 64)
    right = check_choices("portable", size)
    assert right.features == 0 and right.regret == 0
    rounded = check_choices("portable", size, "bf16")
    assert 0 < rounded.regret <= 1e-2 and rounded.features > 0
    spoil_stage(monkeypatch, "selection", lambda rows, shares: (rows.roll(1, 0), shares))
    with pytest.raises(AssertionError, match="portable at .*, bf16: the samples chosen end to end score .* less"):
        check_choices("portable", size, "bf16")


def test_winners_end_to_end(monkeypatch):
    """Another winner may be one whose margin roundings can make the largest, and no other."""
    size = Size(2000, 400, 64)
    assert check_choices("portable", size).margin_lost <= 0.01
    rounded = check_choices("portable", size, "bf16")
    assert rounded.samples > 0 and 0 < rounded.margin_lost < 1

    def next_one(*results):
        found = Competition(*results)
        return found._replace(winner=(found.winner + 1) % size.D)

    spoil_stage(monkeypatch, "competition", next_one)
    with pytest.raises(AssertionError, match="portable at .*, bf16: a winner's margin is .* times as far"):
        check_choices("portable", size, "bf16")


# --- Implementations and timing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "reference", "portable"])
def test_an_implementation_refreshes_when_asked_and_never_by_itself(name, monkeypatch):
    calls = []
    own = OWN_STAGE

    def counted(stage, backend):
        if stage == "neighbors":
            calls.append(backend)
        return own(stage, backend)

    monkeypatch.setattr(backends, "stage", counted)
    implementation = build(name, SIZE)
    assert (implementation.refresh is None) == (name == "linear")
    if implementation.refresh is not None:
        implementation.refresh()
    asked, start = len(calls), implementation.weight.detach().clone()
    for _ in range(101):
        implementation.step()
    assert len(calls) == asked == (name != "linear")
    assert implementation.weight.equal(start) == (name == "linear")  # the pull moved it


def test_every_implementation_has_a_row_or_a_reason():
    found = steps.step_times(SIZE, ROOF, rounds=2, seconds=0)
    assert [row["contestant"] for row in found if row["ms"]] == implementations.serving()
    assert {row["contestant"] for row in found} == set(implementations.NAMES)
    for row in found:
        assert (row["status"] == rows.OK) == (row["ms"] is not None) == (row["ratio_to_linear"] is not None)
        assert row["ms"] is None or row["ratio_to_linear_low"] <= row["ratio_to_linear"] <= row["ratio_to_linear_high"]
    linear, reference = found[:2]
    assert linear["ratio_to_linear"] == 1 and linear["refresh_ms"] == 0 and reference["refresh_ms"] > 0
    assert linear["rounds"] == reference["rounds"] == 2


def test_stage_rows_have_ratios_and_a_roof():
    found = stages.stage_times(SIZE, ROOF, ("competition", "rank"), rounds=1, seconds=0)
    timed = [row for row in found if row["ms"]]
    assert {row["stage"] for row in timed} == {"competition", "rank", "products"}
    floor = ROOF.floor_ms(SIZE)
    for row in timed:
        assert row["fraction_of_roof"] == pytest.approx(floor[row["stage"]] / row["ms"])
        if row["contestant"] == "reference":
            assert row["ratio_to_reference"] == 1


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

    assert timing.median_ms(call, repeats=3, max_seconds=8) == 9000
    assert timing.median_ms(call, repeats=2, max_seconds=60) == 2500  # of 2 and 3: the first is left out


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


def test_precisions_are_undone():
    before = torch.get_float32_matmul_precision()
    with precisions.multiplying("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
    for precision in precisions.PRECISIONS:
        step = build("portable", SIZE, precision=precision).step
        step()
        with precisions.forward(precision, "cpu"):
            assert torch.is_autocast_enabled("cpu") == (precision == "bf16")


# --- Processes of their own, scaling ----------------------------------------------------------------------------------


@LINUX
def test_memory_alone_is_what_a_step_allocates():
    size = Size(512, 2048, 32)
    linear = processes.alone("memory", "linear", size)
    matrix = 4 * size.B * size.D / 2**20
    assert linear["status"] == rows.OK and matrix <= linear["peak_mb"] <= 3 * matrix
    assert processes.alone("memory", "portable", size)["peak_mb"] > linear["peak_mb"]


@LINUX
def test_out_of_memory_and_time_out_are_statuses():
    assert processes.alone("time", "reference", Size(1 << 20, 1 << 16, 4)) == {"status": rows.OUT_OF_MEMORY}
    assert processes.alone("time", "linear", Size(4, 4, 4), limit=0.01) == {"status": rows.TIMED_OUT}
    assert processes.alone("time", "nobody", Size(4, 4, 4))["status"].startswith("failed: ValueError: backend must be")


def test_scaling_goes_on_after_failures_and_says_so(monkeypatch):
    def alone(what, name, size, threads, device, limit):
        if name == "reference" and size.D > 8:
            return {"status": rows.TIMED_OUT}
        return (
            {"status": rows.OK, "ms": size.D**2.0} if what == "time" else {"status": rows.OK, "peak_mb": size.D * 3.0}
        )

    monkeypatch.setattr(scaling, "alone", alone)
    names = ["linear", "reference", "cuda"]
    found = list(scaling.scale("D", [32, 8, 16], Size(4, 2, 4), names, ROOF, threads=1))
    by_name = {name: [row for row in found if row["contestant"] == name] for name in names}
    assert [row["D"] for row in by_name["linear"]] == [8, 16, 32] and all(row["floor_ms"] > 0 for row in found)
    assert [row["status"] for row in by_name["reference"]] == ["ok", "time-out", "not tried: time-out at D = 16"]
    assert "GPU" in by_name["cuda"][0]["status"] and by_name["cuda"][0]["ms"] is None
    assert scaling.exponents(found, "D")["linear"]["ms"] == pytest.approx(2)
    assert "reference" not in scaling.exponents(found, "D")
    if sys.platform == "linux":
        assert scaling.exponents(found, "D")["linear"]["peak_mb"] == pytest.approx(1)


# --- Peers ------------------------------------------------------------------------------------------------------------


def test_peers_say_when_they_are_not_installed(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    images = torch.rand(256, 30, generator=torch.Generator().manual_seed(0))
    images[:, 20:] = 0
    for rows_ in (peers.som_epoch(images, images, 3, 32), peers.revival(images, images, 3, 32)):
        for row in rows_:
            installed = row["contestant"] not in peers.PACKAGES
            assert (row["ms"] is not None) == installed == (row["status"] == rows.OK)


def test_quality_of_units():
    held_out = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 3.0]])
    found = peers.quality(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-9.0, 0.0]]), held_out)
    assert found == {"quantization_error": 1.0, "best_cosine": 1.0, "units_in_use": 2}


def test_dead_units_come_alive():
    """Two clusters, one of them served by nobody: BCL's pull brings a feature there."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2048, 40, generator=generator)
    images[:, 30:] = 0
    row = next(row for row in peers.revival(images, images[:200], 3, 16) if row["contestant"] == "bcl")
    assert row["dead"] == 4 and row["revived"] > 0
