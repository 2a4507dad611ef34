"""Measuring training steps: contestants, interleaved clocks, peak memory. `bench/` is a thin caller of it."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops, reference
from .layer import BCLLayer
from .spec import BCLConfig
from .testing import relative_error

Step = Callable[[], None]
SLOW = ("reference", "compiled")  # many times slower than the others: they get few steps
CONFIG = BCLConfig()


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
    weights: str  # init, trained
    threads: int
    device: str
    ms: float  # median over windows of the mean over a window, refresh included
    ratio_to_linear: float  # median over rounds of its window over the Linear window of that round
    windows: int
    steps: int  # in a window; a slow contestant's refresh is measured apart and shared out over 50


# --- Contestants ------------------------------------------------------------------------------------------------------


def trained_weight(size: Size, seed: int = 0, steps: int = 60) -> Tensor:
    """A weight [D, N] after strong pulls on random data: features have become alike, and few win."""
    torch.manual_seed(seed)
    layer = BCLLayer(size.N, size.D, som_lr=0.05)
    step = training_step(layer, size, seed)
    for _ in range(steps):
        step()
    return layer.weight.detach().clone()


def training_step(layer: nn.Linear, size: Size, seed: int = 0) -> Step:
    """A function that runs one training step on a fixed random batch whose gradient is needed too."""
    x, grad_output = _batch(size, seed)
    x.requires_grad_()

    def step() -> None:
        layer(x).backward(grad_output)
        x.grad = layer.weight.grad = layer.bias.grad = None

    return step


def _batch(size: Size, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(size.B, size.N, generator=generator)
    return x, torch.randn(size.B, size.D, generator=generator) / size.B


def whole_step(x: Tensor, weight: Tensor, bias: Tensor, neighbors: Tensor, grad_output: Tensor) -> tuple[Tensor, ...]:
    """The literal algorithm with its three products, the pull included, as one function of the reference's stages."""
    activation = F.linear(x, weight, bias)
    R, _, _, _, _, *pairs, rinv, need, winner_share, som_strength = reference.competition(
        activation, neighbors, CONFIG.temperature, x, CONFIG.forces, 0.0, 0.0
    )
    rescue = reference.selection(activation, bias, rinv, None, need, CONFIG.affinity, "hard", CONFIG.rescue_k)
    masked, bias_gradient = reference.gradient(grad_output, R, None)
    gradients = masked @ weight, masked.T @ x, bias_gradient
    target = reference.targets(x, *pairs, *rescue, winner_share, "none")
    return *gradients, weight + CONFIG.som_lr * reference.som_increment(weight, target, som_strength)


def compiled_step(layer: nn.Linear, size: Size, seed: int = 0) -> Step:
    """`whole_step` through torch.compile, without autograd: the best that a compiler makes of the reference."""
    (x, grad_output), weight = _batch(size, seed), layer.weight.detach()
    function, done = torch.compile(whole_step, dynamic=False), 0
    neighbors = reference.neighbours(weight, CONFIG.neighborhood_k)

    def step() -> None:
        nonlocal done, neighbors
        if done and done % CONFIG.recompute_every == 0:
            neighbors = reference.neighbours(weight, CONFIG.neighborhood_k)
        weight.copy_(function(x, weight, layer.bias.detach(), neighbors, grad_output)[-1])
        done += 1

    return step


def contestants() -> dict[str, Callable[[Size, Tensor | None], tuple[nn.Linear, Step]]]:
    """Name -> builder of a layer and its step, from size and weight (None: random); `nn.Linear`, the floor, first."""

    def build(name: str) -> Callable[[Size, Tensor | None], tuple[nn.Linear, Step]]:
        def built(size: Size, weight: Tensor | None) -> tuple[nn.Linear, Step]:
            torch.manual_seed(0)
            plain = name in ("linear", "compiled")
            layer = nn.Linear(size.N, size.D) if plain else BCLLayer(size.N, size.D, backend=name)
            if weight is not None:
                layer.weight.data.copy_(weight)
            return layer, (compiled_step if name == "compiled" else training_step)(layer, size)

        return built

    serving = [name for name in ops.BACKENDS if ops.why_not(name, "cpu") is None]
    return {name: build(name) for name in ("linear", "compiled", *serving)}


def check_equal(size: Size, weight: Tensor | None = None) -> None:
    """Raise AssertionError unless every backend makes the same first step as the reference: nothing wrong is timed."""
    moved = {}
    for name, build in contestants().items():
        layer, step = build(size, weight)
        start = layer.weight.detach().clone()
        step()
        moved[name] = layer.weight.detach() - start
    for name, move in moved.items():
        if name != "linear":
            error = relative_error(move, moved["reference"])
            assert error <= 1e-4, f"{name} at {size}: the first pull differs from the reference's by {error:.1e}"


# --- Time -------------------------------------------------------------------------------------------------------------


def _window(step: Step, steps: int) -> float:
    """Mean milliseconds of a step over a window."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps * 1e3


def step_times(
    size: Size, weight: Tensor | None = None, *, steps: int = 50, rounds: int = 5, slow_steps: int = 3
) -> list[StepTime]:
    """Time every contestant in turn, window by window: L A B L A B ...

    A window is `steps` consecutive steps (50 hold exactly one neighbour refresh). The contestants of SLOW take part in
    the first round alone, with `slow_steps`; their refresh is what the first step took longer. CPU only: a GPU needs
    its own clock.
    """
    running = {name: build(size, weight)[1] for name, build in contestants().items()}
    first = {}
    for name, step in running.items():
        if name == "compiled":
            step()  # compiles
        first[name] = _window(step, 1)
    taken: dict[str, list[float]] = {name: [] for name in running}
    ratios: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(rounds):
        for name, step in running.items():
            if name in SLOW and turn == 0:
                mean = _window(step, slow_steps)
                taken[name].append(mean + max(0.0, first[name] - mean) / CONFIG.recompute_every)
            elif name not in SLOW:
                taken[name].append(_window(step, steps))
            else:
                continue
            ratios[name].append(taken[name][-1] / taken["linear"][-1])
    return [
        StepTime(
            contestant=name,
            **dataclasses.asdict(size),
            weights="init" if weight is None else "trained",
            threads=torch.get_num_threads(),
            device="cpu",
            ms=statistics.median(taken[name]),
            ratio_to_linear=statistics.median(ratios[name]),
            windows=len(taken[name]),
            steps=slow_steps if name in SLOW else steps,
        )
        for name in running
    ]


def stage_times(size: Size, repeats: int = 5) -> list[dict[str, Any]]:
    """Median milliseconds of every stage on every backend, on the numbers of one training step: a row for each."""
    x, grad_output = _batch(size, 0)
    torch.manual_seed(0)
    linear = nn.Linear(size.N, size.D)
    weight, bias = linear.weight.detach(), linear.bias.detach()
    activation, neighbors = (
        F.linear(x, weight, bias),
        ops.stage("neighbours", "portable")(weight, CONFIG.neighborhood_k),
    )
    competing = activation, neighbors, CONFIG.temperature, x, CONFIG.forces, 0.0, 0.0
    R, _, _, _, _, *pairs, rinv, need, winner_share, som_strength = ops.stage("competition", "portable")(*competing)
    chosen = activation, bias, rinv, None, need, "rank", "hard", CONFIG.rescue_k
    choices = x, *pairs, *ops.stage("selection", "portable")(*chosen), winner_share, "none"
    arguments = {
        "neighbours": (weight, CONFIG.neighborhood_k),
        "competition": competing,
        "inverse_norm": (x,),
        "selection": chosen,
        "targets_pull_": (weight.clone(), None, som_strength, 1e-3, *choices),
        "gradient": (grad_output, R, None),
        "rank": (activation,),
    }
    rows = []
    for name, taken in arguments.items():
        ms = {}
        for backend in contestants():
            if backend in ops.BACKENDS:
                function = partial(ops.stage(name, backend), *taken)
                function()
                ms[backend] = statistics.median(_window(function, 1) for _ in range(repeats))
        rows += [
            {
                "contestant": backend,
                "stage": name,
                **dataclasses.asdict(size),
                "threads": torch.get_num_threads(),
                "ms": time,
                "ns_per_element": time * 1e6 / (size.B * size.D),
                "times_faster_than_reference": ms["reference"] / time,
            }
            for backend, time in ms.items()
        ]
    return rows


# --- Memory -----------------------------------------------------------------------------------------------------------


def peak_memory(contestant: str, size: Size, threads: int = 1) -> float:
    """MB that two training steps need beyond what is there before the first, in a process of its own (Linux only)."""
    words = [sys.executable, "-m", __name__, contestant, *map(str, dataclasses.astuple(size)), str(threads)]
    # What is freed goes back at once: else the peak would depend on how malloc cuts its heap.
    fixed = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 18), "MALLOC_TRIM_THRESHOLD_": str(1 << 18)}
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=fixed, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _resident(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def _peak_memory_here(contestant: str, size: Size) -> float:
    contestants()[contestant](Size(4, 4, 4), None)[1]()  # what is loaded on first use
    layer, step = contestants()[contestant](size, None)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    step()
    step()
    return _resident("VmHWM") - before


if __name__ == "__main__":
    _name, *_sizes, _threads = sys.argv[1:]
    torch.set_num_threads(int(_threads))
    print(json.dumps(_peak_memory_here(_name, Size(*map(int, _sizes)))))
