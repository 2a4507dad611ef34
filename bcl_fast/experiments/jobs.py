"""Many runs at once: every job is a file, so that what is finished is never computed again."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..records import read_record, trusting, write_record
from .baselines import Baseline, measure
from .data import Images, load
from .run import Condition, check_record, check_snapshot, read_snapshots, row_steps, trained, write_snapshots

Job = Condition | Baseline
DENSE_ROWS = 31  # the first steps, all of which are measured
AGAIN = "delete it and the file of that name next to it, and the same command computes them again"
MAX_WORKERS = 8  # each holds the data set and a torch of its own, about 1 GB


def rows_of(steps: int) -> tuple[int, ...]:
    """The steps a job of `steps` measures: those of `row_steps`, and the first ones without a gap."""
    return tuple(sorted({*row_steps(steps), *range(min(DENSE_ROWS, steps))}))


def workers_here(threads: int = 1) -> int:
    """As many processes as the cores that this one may use have threads for, within reason."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // threads, MAX_WORKERS))


def path_of(job: Job, folder: Path) -> Path:
    """Where the record of `job` lies: a name to read, and a digest of all it depends on."""
    depends_on = [dataclasses.asdict(job), __version__, torch.__version__, DENSE_ROWS]
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:12]
    kind = job.kind if isinstance(job, Baseline) else "plain" if job.config is None else "bcl"
    return folder / f"{job.data}-{kind}-{job.steps}-seed{job.seed}-{digest}.json"


def read(job: Job, folder: Path) -> dict[str, Any] | None:
    """The finished record of `job`, or None."""
    path = path_of(job, folder)
    if not path.exists():
        return None
    record = read_record(path, AGAIN)
    with trusting(path, AGAIN):
        check_record(record)
    return record


def read_snapshot(job: Job, folder: Path) -> dict[str, Tensor]:
    """The tensors of a training run, next to its record: see `Training.snapshot`."""
    path = path_of(job, folder).with_suffix(".pt")
    return check_snapshot(read_snapshots(path, AGAIN), path, AGAIN)


def compute(job: Job, images: Images, folder: Path) -> None:
    """Do one job and write its record; a KeyboardInterrupt leaves no file."""
    path = path_of(job, folder)
    if isinstance(job, Baseline):
        return write_record(path, measure(job, images))
    training = trained(job, images, rows_of(job.steps))
    record = training.record()
    if record["interrupted"]:
        raise KeyboardInterrupt
    write_snapshots(path.with_suffix(".pt"), training.snapshot())
    write_record(path, record)  # last: where there is a record, the job is done


def run_jobs(
    jobs: Iterable[Job],
    folder: Path,
    data_dir: Path,
    workers: int = 1,
    on_done: Callable[[Job], None] = lambda job: None,
    threads: int = 1,
) -> None:
    """Do all jobs that have no record in `folder` yet, `workers` at a time in processes of so many threads each.

    `on_done` is called for every job, also for those found done. A KeyboardInterrupt, or an error of one job, ends the
    others at once; finished records are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = []
    for job in dict.fromkeys(jobs):
        if read(job, folder) is not None:  # what is damaged is said before hours of work
            on_done(job)
        else:
            missing.append(job)
    # The longest first: no core then waits for a long one that began last.
    missing.sort(key=lambda job: -job.steps)
    if missing:
        for job in _in_processes(missing, folder, data_dir, min(workers, len(missing)), threads):
            on_done(job)


def pool(workers: int, threads: int = 1) -> ProcessPoolExecutor:
    """Processes of so many threads each that leave Ctrl-C to this one."""
    context = multiprocessing.get_context("spawn")  # a forked torch hangs with more than one thread
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(threads,))


def _in_processes(jobs: list[Job], folder: Path, data_dir: Path, workers: int, threads: int) -> Iterator[Job]:
    with pool(workers, threads) as processes:
        try:
            waiting, running = iter(jobs), {}
            while True:
                # No more than there are workers: what the pool has queued could not be called back.
                for job in waiting:
                    running[processes.submit(_work, job, folder, data_dir)] = job
                    if len(running) == workers:
                        break
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    yield running.pop(future)
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _start_worker(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to everybody; the parent decides
    torch.set_num_threads(threads)


@functools.lru_cache(maxsize=1)
def _images(data: str, data_dir: Path) -> Images:
    return load(data, data_dir)


def _work(job: Job, folder: Path, data_dir: Path) -> None:
    compute(job, _images(job.data, data_dir), folder)
