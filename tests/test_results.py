"""The pages of results and the comparison of two records: bench/results.py and bench/compare.py."""

import json
import sys

import compare
import pytest
import results
import torch

pytest.importorskip("matplotlib", reason="needs the extra [demo]")

from bcl_fast.environment import environment
from bcl_fast.experiments import charts, plots
from bcl_fast.measure.implementations import Size
from bcl_fast.measure.rows import OUT_OF_MEMORY, TIMED_OUT, row

SIZE = Size(16, 8, 12)
CURVES = {"step": [0, 1, 9], "loss": [[0.5, 0.6], [0.4, 0.5], [0.1, 0.2]], "wt_sim": [[0.0, 0.1]] * 3}


def write(folder, rows, name="cpu.json", **record):
    (folder / name).write_text(json.dumps({"environment": environment(), "rows": rows, **record}))
    return results.section(folder)


def run(module, monkeypatch, *words):
    """The exit code of a command of bench/."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    try:
        return module.main()
    except SystemExit as ended:
        return ended.code


# --- Tables -----------------------------------------------------------------------------------------------------------


def test_stages_have_the_largest_size_and_the_fastest_gbs(tmp_path):
    def stage(name, size, ms, stage="rank", question="stages"):
        labels = dict(stage=stage, gbs=10 / ms, tflops=None, fraction_of_roof=0.5 / ms, ratio_to_linear=ms / 4)
        return row(question, name, size, ms=ms, **labels)

    rows = [
        stage(name, size, ms) for size in (SIZE, Size(16, 32, 12)) for name, ms in (("reference", 8.0), ("cpu", 1.0))
    ]
    rows += [stage("linear", SIZE, 4.0, "products"), stage("cpu", SIZE, 2.0, "neighbors", "neighbors")]
    rows += [stage("reference", SIZE, 2.0, "neighbors", "neighbors"), row("stages", "cuda", SIZE, status="no GPU")]
    largest = Size(16, 32, 12)
    rows += [stage("reference", largest, 4.0, "gradient"), row("stages", "cpu", largest, stage="gradient", status="no")]
    text = write(tmp_path, rows)
    assert "| `gradient` | (16, 32, 12) | 1.00 |  | 2.50 GB/s | 12% |" in text
    assert "| `rank` | (16, 32, 12) | 2.00 | 0.25 | 10.00 GB/s | 50% |" in text
    assert "| `neighbors` | (16, 8, 12) | 0.50 | 0.50 | 5.00 GB/s | 25% |" in text
    assert "| (16, 8, 12) |" not in text.replace("| `neighbors` | (16, 8, 12) |", "") and "products" not in text


def test_memory_shows_what_ran_out(tmp_path):
    def peak(name, size, beyond):
        return row("memory", name, size, peak_mb=10 + beyond, mb_beyond_linear=beyond, one_bd_and_one_dn_mb=3.0)

    small = Size(1, 8, 12)
    rows = [
        peak("linear", SIZE, 0.0),
        peak("portable", SIZE, 4.4),
        row("memory", "reference", SIZE, status=OUT_OF_MEMORY),
        peak("linear", small, 0.0),
        peak("portable", small, 2.0),
        peak("reference", small, 8.0),
    ]
    text = write(tmp_path, rows)
    assert "| (16, 8, 12) | 3 | out of memory | 4 |" in text and "| (1, 8, 12) | 3 | 8 | 2 |" in text


def test_a_monitor_costs_what_is_told(tmp_path):
    rows = [
        row("monitor", name, SIZE, ms=ms, ratio_to_unmonitored=ms / 2, rounds=9)
        for name, ms in (("unmonitored", 2.0), ("between", 2.1), ("measured", 40.0))
    ]
    assert "| (16, 8, 12) | 2.00 | 1.05 | 40.00 |" in write(tmp_path, rows)


def test_training_shows_time_and_distance_beside_the_spread(tmp_path):
    labels = dict(data="digits", steps=2000, seeds=2, seconds=4.0, curves=CURVES)
    gaps = dict(loss_distance=0.01, loss_spread=0.1, wt_sim_distance=0.02, wt_sim_spread=0.2)
    rows = [
        row("training", "linear", SIZE, ms=2.0, ratio_to_linear=1.0, **labels),
        row("training", "reference", SIZE, ms=6.0, ratio_to_linear=3.0, **labels, **gaps),
        row("training", "cpu", SIZE, ms=3.0, ratio_to_linear=1.5, **labels, **gaps),
        row("epoch", "linear", SIZE, ms=500.0, ratio_to_linear=1.0, data="digits", batches=11),
    ]
    with pytest.raises(ValueError, match="no picture .*cpu-training.png"):
        write(tmp_path, rows)
    plots.save(charts.curves_picture(rows), tmp_path / "cpu-training.png")
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
    plots.save(charts.scaling_picture("a machine", "D", rows, exponents), tmp_path / "scale-d.png")
    text = write(tmp_path, rows, "scale-d.json", exponents=exponents)
    assert "| D | linear | 1.00 | 1.50 | D = 32 | 1.00 |  |" in text
    assert "| D | reference |  |  | D = 8 | 10.00 | time-out at D = 16 |" in text
    assert "| D | portable |  |  | D = 8 | 2.00 | out of memory at D = 16 |" in text
    assert "](scale-d.png)" in text and "cuda" not in text


def test_peers_say_what_differs_or_why_they_are_absent(tmp_path):
    found = dict(quantization_error=1.5, best_cosine=0.75, units_in_use=7, difference="no grid")
    rows = [
        row("som-epoch", "bcl", SIZE, ms=1500.0, **found),
        row("som-epoch", "MiniSom", SIZE, status="not installed"),
        row("revival", "bcl", SIZE, ms=2.0, dead=4, revived=3, half_revived_after=None, **found),
        row("selection", "sort, scatter, topk", SIZE, ms=1.0, ratio_to_reference=0.5),
        row("selection", "reference", SIZE, ms=2.0, ratio_to_reference=1.0),
    ]
    text = write(tmp_path, rows)
    assert (
        "| bcl | 1.5 | 1.50 | 0.75 | 7 of 8 | no grid |" in text and "| MiniSom |  |  |  |  | not installed |" in text
    )
    assert "| bcl | 2.00 | 3 of 4 |  | 1.50 | no grid |" in text
    assert "| (B, D, N) | reference | sort, scatter, topk |" in text and "| (16, 8, 12) | 1.00 | 0.50 |" in text


def steps(**kinds):
    """A record's rows: `nn.Linear`, and `cpu` at 1.25 over 3 rounds and `portable` at 9 over 5."""
    about = dict(floor_ms=0.5, ms=1.0, **kinds)
    return [
        row("step", "linear", SIZE, ratio_to_linear=1.0, **about),
        row("step", "portable", SIZE, ratio_to_linear=9.0, rounds=5, **about),
        row("step", "cpu", SIZE, ratio_to_linear=1.25, rounds=3, **about),
        row("step", "triton", SIZE, status="no GPU here", **kinds),
    ]


def test_few_rounds_are_told(tmp_path):
    assert "| (16, 8, 12) | init | 1 | 9.00 | 1.25 (3) | 0.50 |" in write(tmp_path, steps())
    assert results.face(tmp_path).endswith("| (16, 8, 12) | 9.00 | 1.25 (3) |")


def test_machines_and_versions_are_apart(tmp_path):
    for name, version in (("a.json", "2.11"), ("b.json", "2.12")):
        text = write(tmp_path, steps(), name, environment=environment() | {"torch": version})
    assert text.count("Measured on") == 2 and "torch 2.11" in text and "torch 2.12" in text
    assert torch.__version__ not in text and "`triton` (no GPU here)" in text


def test_the_newest_of_each_device_counts_and_the_face_is_the_cpus(tmp_path):
    (tmp_path / "tables.json").write_text(json.dumps({"rows": [{"table": "trace"}]}))  # another kind of record
    with pytest.raises(ValueError, match="no record of a bench"):
        results.section(tmp_path)
    here = environment() | {"devices": {"cpu": "a machine", "cuda:0": "an H100"}}
    for name, date, rows in (
        ("old", "2026-01-01", steps()),
        ("new", "2026-01-02", steps()),
        ("gpu", "2026-01-03", steps(device="cuda", threads=1)),
        ("two", "2026-01-03", steps(threads=2)),
    ):
        for one in rows:
            one["ratio_to_linear"] = None if one["ms"] is None else float(len(name + date) + "ongptw".index(name[0]))
        text = write(tmp_path, rows, f"{name}.json", environment=here | {"date": date})
    assert "Measured on a machine" in text and "Measured on an H100" in text and "old.json" not in text
    assert "| (16, 8, 12) | init | 1 | 14.00 | 14.00 (3) |" in text and "| 13.00 |" not in text
    face = results.face(tmp_path)
    assert face.endswith("| (16, 8, 12) | 14.00 | 14.00 (3) |")
    assert "on one thread; " in face and "on a machine (" in face
    elsewhere = here | {"devices": {"cpu": "another"}, "date": "2026-01-04"}
    other = [one | {"B": 17} for one in steps(threads=4)]
    assert "Measured on another" in write(tmp_path, other, "other.json", environment=elsewhere)
    assert "on another (" in (face := results.face(tmp_path)) and "on 4 threads;" in face and "(16, 8" not in face
    latest = here | {"devices": {"cpu": "a third"}, "date": "2026-01-05"}  # which has no row of the face
    assert "Measured on a third" in write(tmp_path, steps(weights="trained"), "third.json", environment=latest)
    assert results.face(tmp_path) == face


# --- The commands -----------------------------------------------------------------------------------------------------


def test_the_page_is_that_of_the_records():
    """`python bench/results.py` brings it up to date."""
    assert (results.FOLDER / "README.md").read_text(encoding="utf-8") == results.page(results.FOLDER)


def test_pages_are_written_and_checked(tmp_path, monkeypatch, capsys):
    readme, page = tmp_path / "readme.md", tmp_path / "README.md"
    readme.write_text(f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n")
    write(tmp_path, steps())
    words = "--folder", tmp_path, "--readme", readme
    assert run(results, monkeypatch, *words, "--check") == 1 and not page.exists() and "old" in readme.read_text()
    assert run(results, monkeypatch, *words) == 0 and page.read_text() == results.page(tmp_path)
    text = readme.read_text()
    assert text == f"before\n{results.BEGIN}\n\n{results.face(tmp_path)}\n\n{results.END}\nafter\n"
    assert run(results, monkeypatch, *words, "--check") == 0
    readme.write_text(f"{results.END}\n{results.BEGIN}\n")
    assert run(results, monkeypatch, *words) == 2 and "there must be one line" in capsys.readouterr().err
    readme.write_text("no markers\n")
    assert run(results, monkeypatch, *words) == 0 and readme.read_text() == "no markers\n"


@pytest.mark.parametrize(
    "text",
    ["no json", "[]", '{"rows": [1], "environment": {}}', "{}"],
)
def test_a_damaged_record_is_named_and_nothing_written(text, tmp_path, monkeypatch, capsys):
    write(tmp_path, steps(), "good.json")
    (tmp_path / "bad.json").write_text(text)
    if text != "{}":  # the record of something else, which the pages leave out
        assert run(results, monkeypatch, "--folder", tmp_path) == 2 and "bad.json" in capsys.readouterr().err
        assert not (tmp_path / "README.md").exists()
    assert run(compare, monkeypatch, tmp_path / "good.json", tmp_path / "bad.json") == 2
    assert "bad.json" in capsys.readouterr().err


@pytest.mark.parametrize("key, value", [("ms", "text"), ("ms", 0), ("floor_ms", None), ("contestant", 3), ("B", "8")])
def test_wrong_rows_are_told_of_their_record(key, value, tmp_path):
    with pytest.raises(ValueError, match="cpu.json is damaged"):
        write(tmp_path, [one | {key: value} for one in steps()[:3]])


def test_compare_sees_worse_better_and_lost_ratios(tmp_path, monkeypatch, capsys):
    def one(name, **values):
        return row("step", name, SIZE, **values)

    old = [
        one("cpu", ratio_to_linear=1.0),
        one("portable", ratio_to_linear=2.0),
        one("compiled", ratio_to_linear=3.0),
        one("reference", ratio_to_linear=9.0),
    ]
    new = [
        one("cpu", ratio_to_linear=1.2),
        one("portable", ratio_to_linear=2.1),
        one("compiled", ratio_to_linear=2.0),
        one("reference", status="time-out"),
    ]
    found = {row["contestant"]: row["verdict"] for row in compare.compare(old, new)}
    assert found == {"cpu": "worse", "portable": "", "compiled": "better", "reference": "worse"}
    with pytest.raises(ValueError, match="rows in common"):
        compare.compare(old, [one("cpu", weights="trained", ratio_to_linear=1.0)])

    paths = [tmp_path / "old.json", tmp_path / "new.json", tmp_path / "other.json"]
    for path, rows in zip(paths, (old, new, old[1:2] + new[2:3]), strict=True):
        path.write_text(json.dumps({"environment": environment(), "rows": rows}))
    assert run(compare, monkeypatch, *paths[:2]) == 1
    told = capsys.readouterr().out
    assert [line.split()[2] for line in told.splitlines() if line.endswith("worse")] == ["cpu", "reference"]
    assert run(compare, monkeypatch, paths[0], paths[2]) == 0
    assert run(compare, monkeypatch, paths[0], paths[2], "--either") == 1
