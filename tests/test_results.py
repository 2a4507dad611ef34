"""The README's results: every question's table and pictures from records, the newest of each machine."""

import json

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs the extra [demo]")

from bcl_fast.environment import environment
from bcl_fast.experiments import plots
from bcl_fast.measure import results
from bcl_fast.measure.implementations import Size
from bcl_fast.measure.rows import OUT_OF_MEMORY, TIMED_OUT, row

SIZE = Size(16, 8, 12)
CURVES = {"step": [0, 1, 9], "loss": [[0.5, 0.6], [0.4, 0.5], [0.1, 0.2]], "wt_sim": [[0.0, 0.1]] * 3}


def write(folder, rows, name="cpu.json", **record):
    (folder / name).write_text(json.dumps({"environment": environment(), "rows": rows, **record}))
    return results.section(folder, folder)


def test_stages_have_the_largest_size_and_the_fastest_gbs(tmp_path):
    def stage(name, size, ms, stage="rank", question="stages"):
        labels = dict(stage=stage, gbs=10 / ms, tflops=None, fraction_of_roof=0.5 / ms, ratio_to_linear=ms / 4)
        return row(question, name, size, ms=ms, **labels)

    rows = [
        stage(name, size, ms) for size in (SIZE, Size(16, 32, 12)) for name, ms in (("reference", 8.0), ("cpu", 1.0))
    ]
    rows += [stage("linear", SIZE, 4.0, "products"), stage("cpu", SIZE, 2.0, "neighbors", "neighbors")]
    rows += [stage("reference", SIZE, 2.0, "neighbors", "neighbors"), row("stages", "cuda", SIZE, status="no GPU")]
    text = write(tmp_path, rows)
    assert "| `rank` | (16, 32, 12) | 2.00 | 0.25 | 10.00 GB/s | 50% |" in text
    assert "| `neighbors` | (16, 8, 12) | 0.50 | 0.50 | 5.00 GB/s | 25% |" in text
    assert "| (16, 8, 12) |" not in text.replace("| `neighbors` | (16, 8, 12) |", "") and "products" not in text


def test_memory_shows_what_ran_out(tmp_path):
    def peak(name, size, beyond):
        return row("memory", name, size, peak_mb=10 + beyond, mb_beyond_linear=beyond, one_bd_and_one_dn_mb=3.0)

    small = Size(1, 8, 12)
    rows = [peak("linear", SIZE, 0.0), peak("portable", SIZE, 4.4),
            row("memory", "reference", SIZE, status=OUT_OF_MEMORY),
            peak("linear", small, 0.0), peak("portable", small, 2.0), peak("reference", small, 8.0)]  # fmt: skip
    text = write(tmp_path, rows)
    assert "| (16, 8, 12) | 3 | out of memory | 4 |" in text and "| (1, 8, 12) | 3 | 8 | 2 |" in text


def test_training_shows_time_and_distance_beside_the_spread(tmp_path):
    labels = dict(data="digits", steps=2000, seeds=2, seconds=4.0, curves=CURVES)
    gaps = dict(loss_distance=0.01, loss_spread=0.1, wt_sim_distance=0.02, wt_sim_spread=0.2)
    rows = [row("training", "linear", SIZE, ms=2.0, ratio_to_linear=1.0, **labels),
            row("training", "reference", SIZE, ms=6.0, ratio_to_linear=3.0, **labels, **gaps),
            row("training", "cpu", SIZE, ms=3.0, ratio_to_linear=1.5, **labels, **gaps),
            row("epoch", "linear", SIZE, ms=500.0, ratio_to_linear=1.0, data="digits", batches=11)]  # fmt: skip
    with pytest.raises(ValueError, match="no picture .*cpu-training.png"):
        write(tmp_path, rows)
    plots.save(plots.curves_picture(rows), tmp_path / "cpu-training.png")
    text = write(tmp_path, rows)
    assert "| 2,000 steps | cpu | digits | 6.0 | 1.50 | 0.0100 / 0.1000 | 0.0200 / 0.2000 |" in text
    assert "| 2,000 steps | reference | digits | 12.0 | 3.00 |  |  |" in text
    assert "| one epoch | linear | digits | 0.5 | 1.00 |  |  |" in text and "](cpu-training.png)" in text


def test_scaling_shows_exponents_and_how_it_ended(tmp_path):
    def at(D, name, ms=None, **values):
        labels = dict(floor_ms=0.1 * D, refresh_ms=None, ratio_to_linear=ms and ms / D, peak_mb=ms)
        return row("scale-d", name, Size(16, D, 12), ms=ms, **labels | values)

    rows = [at(8, "linear", 8.0), at(16, "linear", 16.0), at(32, "linear", 32.0), at(8, "reference", 80.0)]
    rows += [at(16, "reference", status=TIMED_OUT), at(32, "reference", status="not tried: time-out at D = 16")]
    rows += [at(8, "portable", 16.0), at(16, "portable", status=OUT_OF_MEMORY), at(8, "cuda", status="no GPU")]
    exponents = {"linear": {"ms": 1.0, "peak_mb": 1.5}}
    plots.save(plots.scaling_picture("a machine", "D", rows, exponents), tmp_path / "scale-d.png")
    text = write(tmp_path, rows, "scale-d.json", exponents=exponents)
    assert "| D | linear | 1.00 | 1.50 | D = 32 | 1.00 |  |" in text
    assert "| D | reference |  |  | D = 8 | 10.00 | time-out at D = 16 |" in text
    assert "| D | portable |  |  | D = 8 | 2.00 | out of memory at D = 16 |" in text
    assert "](scale-d.png)" in text and "cuda" not in text


def test_peers_say_what_differs_or_why_they_are_absent(tmp_path):
    found = dict(quantization_error=1.5, best_cosine=0.75, units_in_use=7, difference="no grid")
    rows = [row("som-epoch", "bcl", SIZE, ms=1500.0, **found),
            row("som-epoch", "MiniSom", SIZE, status="not installed"),
            row("revival", "bcl", SIZE, ms=2.0, dead=4, revived=3, half_revived_after=None, **found),
            row("selection", "sort, scatter, topk", SIZE, ms=1.0, ratio_to_reference=0.5),
            row("selection", "reference", SIZE, ms=2.0, ratio_to_reference=1.0)]  # fmt: skip
    text = write(tmp_path, rows)
    assert (
        "| bcl | 1.5 | 1.50 | 0.75 | 7 of 8 | no grid |" in text and "| MiniSom |  |  |  |  | not installed |" in text
    )
    assert "| bcl | 2.00 | 3 of 4 |  | 1.50 | no grid |" in text
    assert "| (B, D, N) | reference | sort, scatter, topk |" in text and "| (16, 8, 12) | 1.00 | 0.50 |" in text


def test_machines_and_versions_stand_apart(tmp_path):
    step = [row("step", "linear", SIZE, ms=1.0, ratio_to_linear=1.0, floor_ms=0.5),
            row("step", "cpu", SIZE, ms=2.0, ratio_to_linear=2.0, floor_ms=0.5)]  # fmt: skip
    for name, version in (("a.json", "2.11"), ("b.json", "2.12")):
        text = write(tmp_path, step, name, environment=environment() | {"torch": version})
    assert text.count("Measured on") == 2 and "torch 2.11" in text and "torch 2.12" in text
    assert torch.__version__ not in text
