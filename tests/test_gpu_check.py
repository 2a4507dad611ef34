"""The check for a GPU (bench/gpu_check.py, bench/prebuild.py) where there is none: how it works, what it would ask."""

import faulthandler
import json
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from gpu import parts, plans, prebuilt, tools, variants, verdicts
from gpu.units import Record, Refused, Unit, run, run_all
from helpers.backends import INTERPRETED

from bcl_fast import cuda
from bcl_fast.measure.floor import Ceilings
from bcl_fast.measure.implementations import Size

ROOT = Path(__file__).resolve().parents[1]
TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
REHEARSED = pytest.mark.skipif(not INTERPRETED, reason="rehearsed in Triton's interpreter")


def python(*words, **environment):
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


# --- Units ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path)


def unit(call, name="it", seconds=1.0):
    return Unit("part", name, seconds, call)


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_unit_that_takes_too_long_ends_with_all_its_children(record, monkeypatch):
    monkeypatch.setattr("gpu.units.MIN_SECONDS", 0.5)

    def call():
        child = subprocess.Popen(["sleep", "100"])
        yield {"pid": child.pid}
        time.sleep(100)

    end = run(unit(call, seconds=0.1), record)
    assert end["status"] == "timeout" and 0.5 <= end["seconds"] < 10
    (first, _) = record.rows()
    assert first["status"] == "ok"  # what it found before is kept
    until = time.monotonic() + 10
    while lives(first["pid"]) and time.monotonic() < until:
        time.sleep(0.05)
    assert not lives(first["pid"])


def test_a_crash_is_a_row_and_the_rest_goes_on(record):
    def refused():
        raise Refused("not on this device")

    def crash():
        faulthandler.disable()  # of this process alone: it is pytest's, and would tell all
        os.abort()

    def wrong():
        yield {"found": float("nan")}
        raise ValueError("of this kind")

    calls = {"crash": crash, "wrong": wrong, "refused": refused}
    calls |= {"row": lambda: [{"status": "failed"}], "right": lambda: [{"found": 1}]}
    run_all([unit(call, name) for name, call in calls.items()], record, time.monotonic() + 100, say=lambda line: None)
    found = {name: row["status"] for (_, name), row in record.outcomes().items()}
    assert found == {"crash": "failed", "wrong": "failed", "refused": "refused", "row": "failed", "right": "ok"}
    assert record.outcomes()["part", "crash"]["message"] == "ended by SIGABRT"
    rows = record.rows()
    assert [row["message"] for row in rows if "of this kind" in row.get("message", "")] == ["ValueError: of this kind"]
    assert all({"part", "unit", "status", "seconds"} <= row.keys() for row in rows)
    assert "in wrong" in record.log.read_text()  # the traceback


def test_what_the_time_ends_was_skipped(record):
    def slow():
        time.sleep(100)
        return []

    run_all([unit(slow, "cut", 0.5), unit(slow, "never", 0.5)], record, time.monotonic() + 1, say=lambda line: None)
    rows = record.rows()
    assert [(row["unit"], row["status"]) for row in rows] == [("cut", "skipped"), ("never", "skipped")]
    assert rows[0]["seconds"] >= 0.5 and rows[1]["seconds"] == 0


def test_what_is_done_is_not_repeated(tmp_path):
    first = Record(tmp_path)
    run(unit(lambda: [{"found": 1}], "right"), first)
    run(unit(lambda: [{"status": "failed"}], "wrong"), first)
    second = Record(tmp_path, resume=True)
    done = {key for key, row in second.outcomes().items() if row["status"] == "ok"}
    again = [unit(lambda: [{"status": "failed"}], "right"), unit(lambda: [], "wrong")]
    run_all(again, second, time.monotonic() + 100, done, say=lambda line: None)
    assert {row["status"] for row in second.outcomes().values()} == {"ok"}
    assert Record(tmp_path).rows() == []  # without `resume` it begins again


# --- The command ------------------------------------------------------------------------------------------------------


# The children could not use a GPU that their parent has begun with.
FORBIDDING = """
import os, runpy, sys, torch
parent = os.getpid()
def forbidden(name, own):
    def asked(*arguments, **options):
        assert os.getpid() != parent, f"the parent asks for {name}"
        return own(*arguments, **options)
    return asked
for owner, names in (
    (torch.cuda, ["is_available", "device_count", "init", "_lazy_init", "current_device", "get_device_properties"]),
    (torch._C, ["_cuda_getDeviceCount"]),
    (torch.accelerator, ["is_available", "device_count", "current_accelerator"]),
):
    for name in names:
        if hasattr(owner, name):
            setattr(owner, name, forbidden(name, getattr(owner, name)))
"""
RUN = """
sys.argv[0] = "bench/gpu_check.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def check(folder, *words, before=""):
    return python("-c", FORBIDDING + before + RUN, "--out", folder, "--rehearse", *words)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "check.jsonl").read_text(encoding="utf-8").splitlines()]


@REHEARSED
def test_only_skip_and_resume(tmp_path):
    done = check(tmp_path, "--only", "versions,ceilings,ncu,sanitizer", "--skip", "sanitizer")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path)
    assert {row["part"] for row in rows} == {"versions", "ceilings", "ncu"}
    assert {row["status"] for row in rows if row["part"] == "ncu"} == {"refused"}
    assert next(row for row in rows if "triton_key" in row)["triton_key"] == prebuilt.triton_key()
    assert check(tmp_path, "--only", "versions,ncu", "--resume").returncode == 0
    closing = [row for row in rows_of(tmp_path) if "closing" in row]
    assert sum(row["part"] == "versions" for row in closing) == 1
    assert sum(row["part"] == "ncu" for row in closing) == 2 * len(parts.units(plans.REHEARSAL, ["ncu"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["check.jsonl", "check.log"]
    done = check(tmp_path, "--only", "nothing")
    assert done.returncode == 2 and "parts are versions, ceilings" in done.stderr


@REHEARSED
def test_without_minutes_everything_is_skipped(tmp_path):
    done = check(tmp_path, "--minutes", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path)
    assert {row["part"] for row in rows} == set(parts.PARTS)
    assert {row["status"] for row in rows} == {"skipped"}


@REHEARSED
def test_a_missing_backend_is_a_failure(tmp_path):
    missing = "lambda backend, *rest: 'not built' if backend == 'cuda' else None"
    done = check(tmp_path, "--only", "versions", before=f"from bcl_fast import backends; backends.why_not = {missing}")
    assert done.returncode == 1
    (row,) = (row for row in rows_of(tmp_path) if "message" in row)
    assert row["status"] == "failed" and "'cuda' cannot serve: not built" in row["message"]


# --- What it would ask ------------------------------------------------------------------------------------------------


def test_every_unit_has_a_name_of_its_own():
    for plan in (plans.GPU, plans.REHEARSAL):
        found = [(unit.part, unit.name) for unit in parts.units(plan, parts.PARTS)]
        assert len(found) == len(set(found)) and {part for part, _ in found} == set(parts.PARTS)


def test_the_kernels_that_are_counted_are_there():
    triton = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kernels").glob("*.py"))
    cuda = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "csrc" / "cuda").glob("*.cuh"))
    assert set(parts.COUNTED["triton"]) <= set(re.findall(r"def (\w+_kernel)\(", triton))
    assert set(parts.COUNTED["cuda"]) <= set(re.findall(r"\b(\w+_kernel)\(", cuda))


def collected(*words):
    """The tests that pytest would run, by node id."""
    done = python("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


@REHEARSED
def test_what_is_sanitized_is_there_and_little():
    nodes = collected("tests/test_stages.py")
    for backend, stages in parts.SANITIZED.items():
        for stage in stages:
            words = parts.sanitized_words(backend, stage)
            own = [node for node in nodes if all(word in node for word in words)]
            assert own and all(backend in node for node in own) and len(own) <= 3, (words, own)


def test_the_benches_it_runs_are_there():
    nodes = [words[0] for words in plans.GPU.benches.values()]
    assert len(collected(*nodes)) == len(nodes)


def test_the_tests_it_runs_are_there():
    for words in plans.GPU.tests.values():
        assert (ROOT / words[0]).is_file()
        for excluded in re.findall(r"not (\w+)", " ".join(words)):
            found = re.search(rf"def \w*{excluded}\w*\(", (ROOT / words[0]).read_text(encoding="utf-8"))
            assert found, f"{words[0]} has nothing called {excluded}"


@pytest.mark.skipif(not INTERPRETED, reason="imports Triton's kernels")
def test_every_rival_has_a_place_and_leaves_none_behind():
    for stage, constants in variants.RIVALS.items():
        table = variants.sizes("triton", stage)
        before = {name: table[name] for name in constants}
        for name, values in constants.items():
            assert before[name] not in values
        first, *others = variants.variants("triton", stage)
        assert not first.changes and len(others) == sum(map(len, constants.values()))
        for variant in others:
            with variants.applied(variant):
                ((name, value),) = variant.changes.items()
                assert table[name] == value
            assert {name: table[name] for name in constants} == before


def test_forms_of_cuda_are_tables_too(monkeypatch):
    monkeypatch.setattr(cuda, "LAUNCH", {"rank": {"threads": 1, "ahead": 8}}, raising=False)
    forms = {"threads": 1, "ahead": 8}, {"threads": 2, "ahead": 8}
    monkeypatch.setattr(cuda, "FORMS", {"rank": forms}, raising=False)
    used, other = variants.variants("cuda", "rank")
    assert variants.stages("cuda") == ("rank",)
    assert (str(used), str(other)) == ("in use", "threads 2, ahead 8")
    with variants.applied(other):
        assert cuda.LAUNCH["rank"] == forms[1]
    assert cuda.LAUNCH["rank"] == forms[0]


def test_what_ncu_prints_is_read():
    printed = """==PROF== Connected to process 1
"ID","Kernel Name","gpu__time_duration.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed","launch__grid_size"
"","","ns","%",""
"0","_competition_kernel","1,234","56.7","132"
"""
    found = {"gpu__time_duration.sum": 1234.0, "dram__throughput.avg.pct_of_peak_sustained_elapsed": 56.7}
    assert tools.metrics(printed) == found
    assert tools.metrics("==ERROR== Failed to initialize the profiler: LibraryNotLoaded\n") == {}


def test_what_a_sanitizer_says_is_judged():
    clean = "1 passed\n========= ERROR SUMMARY: 0 errors\n"
    assert tools.judged(0, clean) == {"status": "ok", "exit": 0, "message": "========= ERROR SUMMARY: 0 errors"}
    found = tools.judged(9, "========= Invalid __global__ write of size 4 bytes\n========= ERROR SUMMARY: 1 error\n")
    assert found["status"] == "failed" and "Invalid __global__ write" in found["message"]
    assert tools.judged(5, "no tests ran")["status"] == "failed"
    with pytest.raises(Refused, match="Device not supported"):
        tools.judged(1, "========= Error: Device not supported. Please refer to the supported devices\n")


def test_failing_tests_are_rows(tmp_path):
    path = tmp_path / "test_it.py"
    path.write_text("def test_right(): pass\ndef test_wrong(): assert 1 == 2\n", encoding="utf-8")
    wrong, all_ = tools.pytest([str(path)])
    assert wrong["status"] == all_["status"] == "failed" and wrong["test"].endswith("test_wrong")
    assert "assert 1 == 2" in wrong["message"] and (all_["passed"], all_["failed"]) == (1, 1)
    (all_,) = tools.pytest([str(path), "-k", "right"])
    assert all_["status"] == "ok"


# --- What it comes to -------------------------------------------------------------------------------------------------


def made_rows():
    """Rows of a device that moves 1 GB/s and makes 1 TFLOP/s; the step takes twice its floor."""
    size = Size(1024, 4096, 784)
    about = {"contestant": "cuda", "B": 1024, "D": 4096, "N": 784, "weights": "init"}
    floor = Ceilings(1, 1, 1).step_ms(size)
    found = [
        ("ceilings", {"copy_gbs": 1.0, "cache_gbs": 1.0, "tflops": 1.0, "tf32_tflops": None, "bf16_tflops": None}),
        ("kernels", about | {"stage": "selection", "ms": 4 * 1024 * 4096 / 1e6}),
        ("steps", about | {"precision": "fp32", "mode": "eager", "ms": 2 * floor, "ratio_to_linear": 1.7}),
        ("steps", about | {"precision": "tf32", "mode": "eager", "ms": 2 * floor, "ratio_to_linear": 1.7}),
        (
            "steps",
            about | {"B": 128, "D": 64, "precision": "fp32", "mode": "captured", "ms": 1, "ratio_to_linear": 2.0},
        ),
        ("ranks", {"contestant": "argsort of argsort", "B": 4096, "D": 4096, "N": 1, "ms": 12, "gkeys_per_s": 1}),
        ("ranks", {"contestant": "cuda", "B": 4096, "D": 4096, "N": 1, "ms": 2, "gkeys_per_s": 6}),
    ]
    return [{"part": part, "unit": str(i), "status": "ok", "seconds": 1} | row for i, (part, row) in enumerate(found)]


def test_goals():
    sizes = Size(128, 64, 784), Size(1024, 4096, 784)
    found = {goal: (value, verdicts.reached(value, limit)) for goal, value, limit in verdicts.goals(made_rows(), sizes)}
    assert found == {
        "captured step (128, 64, 784) init / captured nn.Linear": (2.0, True),
        "step (1024, 4096, 784) init fp32 / floor": (pytest.approx(2), False),
        "selection cuda (1024, 4096, 784) init / one read": (pytest.approx(1), True),
        "ranks (4096, 4096, 1): argsort of argsort / ours": (6, True),
    }
    text = verdicts.summary(made_rows(), sizes)
    assert "MISSED   step (1024, 4096, 784) init fp32 / floor: 2.00 (<= 1.5)" in text
    assert "tf32 eager" in text and "/ floor -, / linear 1.70" in text  # no floor where no rate was measured


def test_every_failure_is_told_once():
    common = {"part": "contract", "seconds": 1}
    rows = [common | {"unit": name, "status": "failed", "message": "no driver"} for name in "abc"]
    rows += [common | {"unit": "d", "status": "refused", "message": "not here"}]
    rows += [common | {"unit": "e", "status": "timeout", "closing": True, "message": "ended after 40 s"}]
    told = [line for line in verdicts.summary(rows, ()).splitlines() if line.startswith("failed")]
    assert told == [
        "failed contract, a and 2 others: 'no driver'",
        "failed contract, e: 'ended after 40 s'",
    ]


def test_the_last_run_of_a_unit_counts():
    def row(**values):
        return {"part": "ranks", "unit": "one", "status": "ok"} | values

    rows = [row(ms=1), row(closing=True), row(ms=2), row(ms=3), row(closing=True)]
    assert [one["ms"] for one in verdicts.of(rows, "ranks", "ms")] == [2, 3]


# --- What is built before ---------------------------------------------------------------------------------------------


@TRITON
def test_a_second_process_finds_every_kernel_in_the_cache(tmp_path):
    """Also where the folder has moved, as it does to another machine."""
    made, moved = tmp_path / "made", tmp_path / "moved"
    done = python("bench/prebuild.py", made, "--quick")
    assert done.returncode == 0, done.stderr
    said = json.loads((made / "prebuilt.json").read_text(encoding="utf-8"))
    assert said["compiled"] > 10 and "found" not in said and said["triton_key"] == prebuilt.triton_key()
    made.rename(moved)
    cache = prebuilt.relocated(moved / "triton")
    assert not list(cache.glob("*/*.ttir")) and list(cache.glob("*/*.cubin"))
    again = python("bench/prebuild.py", moved, "--quick", "--warm", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(cache))
    assert json.loads(again.stdout.splitlines()[-1]) == {"found": said["compiled"]}
