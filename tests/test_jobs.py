"""Many runs at once: files, resuming, processes, and what an interrupt or an error leaves behind."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="needs the extra [demo]")

from bcl_fast.experiments import jobs
from bcl_fast.experiments.baselines import Baseline
from bcl_fast.experiments.data import digits
from bcl_fast.experiments.jobs import path_of, read, read_snapshot, rows_of, run_jobs
from bcl_fast.experiments.run import Condition, Training, trained
from bcl_fast.experiments.sweep import METRICS, numbers, sweep_conditions, sweep_rows, write_csv
from bcl_fast.spec import BCLConfig

ROOT = Path(__file__).resolve().parents[1]
NOWHERE = Path("nowhere")  # digits need no folder


def condition(**changes):
    return Condition(**{"data": "digits", "config": BCLConfig(), "steps": 8, **changes})


def test_first_steps_are_measured_without_a_gap():
    assert rows_of(8) == tuple(range(8))
    steps = rows_of(10_000)
    assert (
        steps[:31] == tuple(range(31))
        and {49, 50, 299, 300, 4999, 9999} <= set(steps)
        and len(set(steps)) == len(steps)
    )


def test_different_jobs_have_different_files():
    changes = dict(steps=9), dict(seed=1), dict(config=None), dict(config=BCLConfig(rescue_k=4)), dict(loss="mse")
    jobs_here = [condition(), *(condition(**change) for change in changes), Baseline("digits", "pca")]
    assert len({path_of(job, NOWHERE) for job in jobs_here}) == 7
    assert path_of(condition(), NOWHERE) == path_of(condition(), NOWHERE)


def test_a_record_of_another_version_is_not_taken(tmp_path, monkeypatch):
    before = path_of(condition(), tmp_path)
    monkeypatch.setattr(jobs, "__version__", "99")
    assert path_of(condition(), tmp_path) != before


def test_processes_write_what_one_run_here_gives(tmp_path):
    some = [condition(), condition(seed=1), condition(config=None), Baseline("digits", "pca")]
    done = []
    run_jobs(some + some[:1], tmp_path, NOWHERE, workers=2, on_done=done.append)
    assert sorted(map(str, done)) == sorted(map(str, some))  # each once
    for job in some[:3]:
        record = read(job, tmp_path)
        here = trained(job, digits(), rows_of(8)).record()
        assert record == json.loads(json.dumps(here, default=str).replace("NaN", "null"))
        assert read_snapshot(job, tmp_path)["win_rate"].shape == (8, 64)
    assert read(some[3], tmp_path)["rows"] == []
    assert not list(tmp_path.glob("*.part"))


def test_finished_jobs_are_not_done_again(tmp_path, monkeypatch):
    jobs.compute(condition(), digits(), tmp_path)
    path = path_of(condition(), tmp_path)
    stamp, done = path.stat().st_mtime_ns, []
    monkeypatch.setattr(jobs, "_in_processes", None)  # would be an error if it were called
    run_jobs([condition(), condition()], tmp_path, NOWHERE, on_done=done.append)
    assert done == [condition()] and path.stat().st_mtime_ns == stamp


def test_a_job_that_fails_ends_the_others_and_leaves_what_is_done(tmp_path):
    good, bad = condition(), condition(batch_size=5000, steps=4)  # more images than there are
    with pytest.raises(ValueError, match="batch_size must be at most 1527"):
        run_jobs([good, bad], tmp_path, NOWHERE, workers=1)
    assert read(good, tmp_path) is not None and read(bad, tmp_path) is None


def test_an_interrupted_job_leaves_no_file(tmp_path, monkeypatch):
    step = Training.step

    def interrupted(training):
        if training.done == 3:
            raise KeyboardInterrupt
        return step(training)

    monkeypatch.setattr(Training, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        jobs.compute(condition(), digits(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_interrupt_ends_a_sweep_at_once_and_the_same_command_goes_on(tmp_path):
    """Ctrl-C as a terminal sends it, to the group of processes: one cell is done, the others are for later."""
    words = ["sweep", "--som-lr", "0.01", "--rescue-k", "1", "--seeds", "2", "--steps", "1000", "--workers", "1"]
    command = [sys.executable, "-m", "bcl_fast", *words, "--out", str(tmp_path)]
    # What a shell starts in the background ignores Ctrl-C, and so would its children: not this one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    signal.signal(signal.SIGINT, before)
    runs, deadline = tmp_path / "runs", time.monotonic() + 120
    while not list(runs.glob("*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "the same command goes on" in output and "Traceback" not in errors
    finished = {path: path.stat().st_mtime_ns for path in runs.glob("*.json")}
    assert 1 <= len(finished) < 4 and not (tmp_path / "sweep.csv").exists()

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert len(list(runs.glob("*.json"))) == 4 and (tmp_path / "sweep.csv").exists()
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in finished.items())


# --- The grid ---------------------------------------------------------------------------------------------------------


def test_sweep_has_every_cell_and_a_control_per_seed():
    grid = sweep_conditions("hard-rank", [0.1, 0.2], [1, 3], 2, data="digits", steps=5, backend="reference")
    cells = [c for c in grid if c.config is not None]
    assert {(c.config.som_lr, c.config.rescue_k, c.seed) for c in cells} == {
        (som_lr, k, seed) for som_lr in (0.1, 0.2) for k in (1, 3) for seed in (0, 1)
    }
    assert all(
        c.config == BCLConfig.preset("hard-rank", som_lr=c.config.som_lr, rescue_k=c.config.rescue_k) for c in cells
    )
    assert [c for c in grid if c.config is None] == [
        dataclasses.replace(c, config=None, backend=None) for c in cells[:2]
    ]


def test_rows_of_a_sweep_and_their_csv(tmp_path):
    import csv

    grid = sweep_conditions("decoupled", [0.1], [3], 2, data="digits", steps=4)
    for one in grid[:3]:
        jobs.compute(one, digits(), tmp_path)
    rows = sweep_rows(grid, tmp_path)
    assert [(row["som_lr"], row["rescue_k"], row["seed"]) for row in rows] == [
        (0.1, 3, 0),
        (0.1, 3, 1),
        (None, None, 0),
    ]
    record = read(grid[1], tmp_path)
    assert rows[1]["held_out_l1"] == record["held_out"]["l1"] and rows[1]["wt_sim"] == record["rows"][-1]["wt_sim"]
    write_csv(tmp_path / "sweep.csv", rows)
    with (tmp_path / "sweep.csv").open(newline="") as file:
        back = list(csv.DictReader(file))
    assert list(back[0]) == ["som_lr", "rescue_k", "seed", "steps", *METRICS]
    assert float(back[1]["wt_sim"]) == rows[1]["wt_sim"] and back[2]["som_lr"] == ""


def test_a_list_of_numbers():
    for text in ("", "0.1,", "a", "1;2", "nan", "0.1,inf"):
        with pytest.raises(ValueError, match=f"som_lr must be numbers separated by commas, got {text!r}"):
            numbers("som_lr", text)
    assert numbers("som_lr", "0.1, 1e-3,0.1") == [0.1, 0.001]
    assert numbers("rescue_k", "5,0", int) == [5, 0]
    with pytest.raises(ValueError, match="rescue_k must be integers"):
        numbers("rescue_k", "1.5", int)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_worker_has_the_threads_it_is_given(threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # what a process starts with
    with jobs.pool(1, threads) as workers:
        assert workers.submit(torch.get_num_threads).result() == threads


@pytest.mark.parametrize("cores, threads, workers", [(8, 1, 8), (64, 1, 8), (8, 3, 2), (2, 4, 1)])
def test_workers_share_the_cores(cores, threads, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores), raising=False)
    assert jobs.workers_here(threads) == workers
