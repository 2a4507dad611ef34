"""The CUDA library for the host (tests/host): the kernels that a GPU would run, tested on every machine."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda", ROOT / "tests" / "host"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
)
SANITIZED = ("-O1", "-g", "-fsanitize=thread")


def build(*flags: str) -> Path:
    """The library of these sources and flags, compiled unless it is there."""
    text = "".join(path.read_text(encoding="utf-8") for folder in SOURCES for path in sorted(folder.iterdir()))
    words = [COMPILER, *FLAGS, *flags, *(f"-I{folder}" for folder in SOURCES), str(SOURCES[1] / "host.cpp")]
    target = ROOT / "build" / f"cuda-host-{hashlib.sha256((text + repr(words)).encode()).hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*words, "-o", str(partial)], check=True)
        os.replace(partial, target)
    return target


def enable() -> None:
    """Let the backend `cuda` run on the host where no GPU runs it, in this process and those it starts."""
    import torch

    if COMPILER and not torch.cuda.is_available():
        os.environ.setdefault("BCL_FAST_CUDA", str(build("-O2")))


def device(
    multiprocessors: int = 3, shared_bytes: int = 227 << 10, clusters: bool = True, clusters_at_once: int = 1 << 30
) -> None:
    """What the kernels find on the host: little memory makes small sizes take the ways of large ones."""
    from bcl_fast import cuda

    set_device = ctypes.CDLL(os.environ["BCL_FAST_CUDA"]).bcl_host_device
    set_device.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_int64]
    set_device(multiprocessors, shared_bytes, clusters, clusters_at_once)
    cuda._bytes.cache_clear()  # of the device before


def _plan(name: str, *fields: tuple[str, type]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": fields})


INT, LONG = ctypes.c_int, ctypes.c_int64
PLANS = {
    "competition": _plan(
        "CompetitionPlan",
        ("where", INT),
        ("rows", INT),
        ("near", INT),
        ("threads", INT),
        ("owned", INT),
        ("cluster", LONG),
        ("slice", LONG),
        ("sums_shared", ctypes.c_bool),
        ("groups", LONG),
        ("shared", LONG),
        ("results", LONG),
        ("partial", LONG),
        ("strengths", LONG),
        ("ids", LONG),
    ),
    "selection": _plan(
        "SelectionPlan",
        ("blocks", LONG),
        ("shared", LONG),
        ("bins", LONG),
        ("order", LONG),
        ("counting", LONG),
        ("sorting", LONG),
        ("lists", LONG),
        ("survivors", LONG),
        ("visits", LONG),
        ("sorts", LONG),
    ),
    "rank": _plan("RankPlan", ("columns", LONG), ("keys", LONG)),
}


@functools.cache
def _planner(stage: str):
    function = getattr(ctypes.CDLL(os.environ["BCL_FAST_CUDA"]), f"bcl_host_{stage}_plan")
    function.argtypes = {
        "competition": [LONG] * 6 + [INT] * 3,
        "selection": [LONG] * 4 + [INT] * 4,
        "rank": [LONG] * 2,
    }[stage]
    function.restype = PLANS[stage]
    return function


def plan(stage: str, *sizes: int, **form: int) -> ctypes.Structure:
    """How a stage is launched for these sizes (csrc/cuda/plan.h), in the form of the launch table but for `form`."""
    from bcl_fast import cuda

    return _planner(stage)(*sizes, *(cuda.LAUNCH[stage] | form).values())
