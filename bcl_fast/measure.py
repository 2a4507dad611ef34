"""Measuring training steps: contestants and interleaved clocks. `bench/` is a thin caller of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn

from . import ops
from .layer import BCLLayer
from .testing import relative_error

Step = Callable[[], None]


@dataclass(frozen=True)
class Size:
    """One layer and its batch: B samples, D features, N inputs."""

    B: int
    D: int
    N: int

    def __str__(self) -> str:
        return f"({self.B}, {self.D}, {self.N})"


@dataclass(frozen=True)
class StepTime:
    """What one contestant took for a training step: forward, backward with dX, and for BCL the pull and its refresh."""

    contestant: str
    B: int
    D: int
    N: int
    threads: int
    device: str
    ms: float  # median over windows of the mean over a window of `steps` steps
    ratio_to_linear: float  # median over rounds of its window over the Linear window of that round
    windows: int
    steps: int


def contestants() -> dict[str, Callable[[int, int], nn.Linear]]:
    """Name -> builder of a layer from N and D: `nn.Linear` first, the floor, then every backend."""

    def layer(backend: str) -> Callable[[int, int], nn.Linear]:
        return lambda N, D: BCLLayer(N, D, backend=backend)

    return {"linear": nn.Linear, **{backend: layer(backend) for backend in ops.BACKENDS}}


def training_step(layer: nn.Linear, size: Size, seed: int = 0) -> Step:
    """A function that runs one training step on a fixed random batch whose gradient is needed too."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(size.B, size.N, generator=generator).to(layer.weight.device).requires_grad_()
    grad_output = torch.randn(size.B, size.D, generator=generator).to(layer.weight.device) / size.B

    def step() -> None:
        layer(x).backward(grad_output)
        x.grad = layer.weight.grad = layer.bias.grad = None

    return step


def check_equal(size: Size, seed: int = 0) -> None:
    """Raise AssertionError unless every backend makes the same first step as the reference: nothing wrong is timed."""
    weights = {}
    for name, build in contestants().items():
        torch.manual_seed(seed)
        layer = build(size.N, size.D)
        start = layer.weight.detach().clone()
        training_step(layer, size, seed)()
        weights[name] = layer.weight.detach() - start
    for backend in ops.BACKENDS:
        error = relative_error(weights[backend], weights["reference"])
        assert error <= 1e-4, f"{backend} at {size}: the first pull differs from the reference's by {error:.1e}"


def _window(step: Step, steps: int) -> float:
    """Mean milliseconds of a step over a window."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps * 1e3


def step_times(size: Size, *, steps: int = 50, rounds: int = 5, slow_rounds: int = 1) -> list[StepTime]:
    """Time every contestant in turn, window by window: L A B L A B ...

    A window is `steps` consecutive steps (50 hold exactly one neighbour refresh); the reference, many times slower,
    takes part in `slow_rounds` of the `rounds`. CPU only: a GPU needs its own clock.
    """
    torch.manual_seed(0)
    running = {name: training_step(build(size.N, size.D), size) for name, build in contestants().items()}
    for step in running.values():
        step()
    taken: dict[str, list[float]] = {name: [] for name in running}
    ratios: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(rounds):
        for name, step in running.items():
            if name != "reference" or turn < slow_rounds:
                taken[name].append(_window(step, steps))
                ratios[name].append(taken[name][-1] / taken["linear"][-1])
    return [
        StepTime(
            contestant=name,
            **asdict(size),
            threads=torch.get_num_threads(),
            device="cpu",
            ms=statistics.median(taken[name]),
            ratio_to_linear=statistics.median(ratios[name]),
            windows=len(taken[name]),
            steps=steps,
        )
        for name in running
    ]
