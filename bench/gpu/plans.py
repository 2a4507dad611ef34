"""Plans: what bench/gpu_check.py checks and measures on a GPU, and in a rehearsal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bcl_fast import backends
from bcl_fast.measure.implementations import Size


@dataclass(frozen=True)
class Plan:
    """What is checked and measured, and where."""

    device: str
    sizes: tuple[Size, ...]  # timed
    odd: tuple[Size, ...]  # checked too
    deep: tuple[Size, ...]  # so many features that the competition goes other ways; neighbors are drawn
    ranked: tuple[Size, ...]
    large: tuple[Size, ...]
    growing: dict[str, tuple[Size, ...]]  # axis -> larger and larger, until the memory ends
    training: int  # steps that make a weight a trained one
    seconds: float  # of a timed window
    rounds: int  # of windows; on a CPU also how often a stage is timed
    weights: tuple[str, ...]  # of stages
    tests: dict[str, tuple[str, ...]]  # what pytest gets
    benches: dict[str, tuple[str, ...]]  # part -> one of its benches
    backends: tuple[str, ...] = backends.ON_GPU
    prebuilt: Path | None = None

    @property
    def amount(self) -> dict[str, Any]:
        """What every comparison of this plan may take: without it, rounds go on until a ratio is known."""
        return dict(rounds=self.rounds, seconds=self.seconds, max_seconds=3.0)


def _growing(B: int, D: int, N: int, times: int) -> dict[str, tuple[Size, ...]]:
    return {
        "D": tuple(Size(1024, D << i, N) for i in range(times)),
        "B": tuple(Size(B << i, 1024, N) for i in range(times)),
    }


GPU = Plan(
    device="cuda",
    sizes=(Size(128, 64, 784), Size(1024, 4096, 784), Size(8192, 8192, 784)),
    odd=(Size(1000, 777, 501),),
    deep=(Size(600, 16384, 64), Size(300, 50000, 32), Size(300, 65536, 32), Size(40, 1 << 20, 16)),
    ranked=(Size(128, 8192, 1), Size(4096, 4096, 1), Size(65536, 1024, 1)),
    large=(Size(65536, 16384, 784), Size(16384, 65536, 1024)),
    growing=_growing(1 << 17, 1 << 17, 784, 6),
    training=60,
    seconds=0.2,
    rounds=3,
    weights=("init", "trained"),
    tests={
        "layer": ("tests/test_gpu.py", "-k", "not contract"),  # which has a part of its own
        "stages": ("tests/test_stages.py", "-k", "triton or cuda"),
        # Without those that compile it again and look at what came of it, for which nobody needs a GPU.
        "cuda": ("tests/test_cuda.py", "tests/test_cuda_selection.py"),
    },
    benches={
        "steps": ("bench/bench_step.py::test_step[(1024, 4096, 784)]",),
        "ranks": ("bench/bench_rank.py::test_rank[(4096, 1024, 16)]",),
        "large": ("bench/bench_memory.py::test_memory[(2048, 8192, 784)]",),
    },
)
TINY = Size(16, 8, 12)
REHEARSAL = Plan(
    device="cpu",
    sizes=(TINY,),
    odd=(),
    deep=(Size(5, 40, 9),),
    ranked=(Size(16, 8, 1),),
    large=(),
    growing={"D": (TINY, TINY)},
    training=2,
    seconds=0,
    rounds=1,
    weights=("trained",),
    tests={"layer": ("tests/test_gpu.py",), "stages": ("tests/test_stages.py", "-k", "equal_margins or zero_rows")},
    benches={"ranks": ("bench/bench_rank.py", "--quick"), "large": ("bench/bench_memory.py", "--quick")},
)
