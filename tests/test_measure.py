"""What measures: floors by formula, the contract noticed broken, rows and reasons, processes of their own, peers."""

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
from bcl_fast.measure import implementations, precisions, rows, scaling
from bcl_fast.measure.floor import STEP, Ceilings
from bcl_fast.measure.implementations import Size, build
from bcl_fast.measure.steps import begin
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
            "neighbors": (4 * D * N + 8 * D * k) / 1e6 + D * (D - 1) * N / 1e9,
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


# --- Implementations --------------------------------------------------------------------------------------------------


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


def test_a_call_that_a_backend_hands_to_another_is_not_timed_twice(monkeypatch):
    monkeypatch.setattr(portable, "why_not", lambda stage, arguments: "another's" if stage == "rank" else None)
    found = stages.stage_times(SIZE, ROOF, ("inverse_norm", "rank"), rounds=1, seconds=0)
    (told,) = (row for row in found if row["contestant"] == "portable" and row["stage"] == "rank")
    assert told["ms"] is None and told["status"] == "another's"
    assert all(row["ms"] for row in found if row is not told and row.get("stage"))


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
