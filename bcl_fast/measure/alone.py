"""One implementation in a process of its own: its peak memory, its time, and what it runs out of.

`python -m bcl_fast.measure.alone WHAT CONTESTANT B D N THREADS DEVICE` prints what it found as a line of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from .implementations import Size, build
from .rows import OK, OUT_OF_MEMORY, TIMED_OUT
from .steps import begin, race
from .timing import keep_memory

SHARE = 0.9  # of the free memory that the process may take: beyond, the system would end whatever it likes
# What is freed goes back at once: else the peak would depend on how malloc cuts its heap.
RETURNING = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18), "MALLOC_TRIM_THRESHOLD_": str(1 << 18)}


def alone(
    what: str, implementation: str, size: Size, threads: int = 1, device: str = "cpu", limit: float = 600.0
) -> dict[str, Any]:
    """`status`, and where that is OK what a process of its own found within `limit` seconds.

    `what` is "memory" (`peak_mb`: MB that a refresh and two steps need beyond weights and batch; Linux or CUDA) or
    "time" (`ms` of a step with its share of the refresh, `refresh_ms`, `ratio_to_linear`). Other ends than memory and
    time have the last line of their traceback as status.
    """
    words = [sys.executable, "-m", __name__, what, implementation, *map(str, astuple(size)), str(threads), device]
    environment = os.environ | (RETURNING if what == "memory" else {})
    root = Path(__file__).parents[2]
    try:
        done = subprocess.run(words, capture_output=True, text=True, cwd=root, env=environment, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"status": TIMED_OUT}
    if done.returncode == 0:
        return {"status": OK, **json.loads(done.stdout.splitlines()[-1])}
    message = done.stderr.rstrip().rpartition("\n")[2]
    if done.returncode == -signal.SIGKILL or _is_out_of_memory(message):
        return {"status": OUT_OF_MEMORY}
    return {"status": f"failed: {message or f'exit {done.returncode}'}"}


def _is_out_of_memory(message: str) -> bool:
    """Whether the last line of a traceback tells of memory."""
    return any(word in message for word in ("can't allocate memory", "OutOfMemoryError", "MemoryError", "bad_alloc"))


# --- In the process ---------------------------------------------------------------------------------------------------


def _limit_memory() -> None:
    import resource

    free = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    resource.setrlimit(resource.RLIMIT_DATA, (int(SHARE * 1024 * int(free.split()[1])),) * 2)


def _resident(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def _memory(name: str, size: Size, device: str) -> dict[str, float]:
    _run(name, Size(4, 4, 4), device)()  # what is loaded on first use
    call = _run(name, size, device)
    if name == "compiled":
        call()  # the compiler's memory is not the step's
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return {"peak_mb": (torch.cuda.max_memory_allocated() - before) / 2**20}
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    call()
    return {"peak_mb": _resident("VmHWM") - before}


def _run(name: str, size: Size, device: str) -> Callable[[], None]:
    """A function that refreshes the neighbors and trains two steps."""
    implementation = build(name, size, device=device)

    def call() -> None:
        if implementation.refresh is not None:
            implementation.refresh()
        implementation.step()
        implementation.step()

    return call


def _time(name: str, size: Size, device: str) -> dict[str, float]:
    keep_memory()
    running = {who: build(who, size, device=device) for who in dict.fromkeys(("linear", name))}
    refreshes, _ = begin(running, device)
    return race(running, refreshes, device, max_seconds=3.0)[name]


if __name__ == "__main__":
    _what, _name, *_sizes, _threads, _device = sys.argv[1:]
    torch.set_num_threads(int(_threads))
    if _device == "cpu" and sys.platform == "linux":
        _limit_memory()
    print(json.dumps({"time": _time, "memory": _memory}[_what](_name, Size(*map(int, _sizes)), _device)))
