"""Measuring training steps: contestants, interleaved clocks, peak memory. `bench/` is a thin caller of it."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
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
from .testing import budget, relative_error

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
    x, grad_output = _batch(size, seed, layer.weight.device)
    x.requires_grad_()

    def step() -> None:
        layer(x).backward(grad_output)
        x.grad = layer.weight.grad = layer.bias.grad = None

    return step


def _batch(size: Size, seed: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(size.B, size.N, generator=generator)
    return x.to(device), (torch.randn(size.B, size.D, generator=generator) / size.B).to(device)


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
    weight = layer.weight.detach()
    x, grad_output = _batch(size, seed, weight.device)
    function, done = torch.compile(whole_step, dynamic=False), 0
    neighbors = reference.neighbours(weight, CONFIG.neighborhood_k)

    def step() -> None:
        nonlocal done, neighbors
        if done and done % CONFIG.recompute_every == 0:
            neighbors = reference.neighbours(weight, CONFIG.neighborhood_k)
        weight.copy_(function(x, weight, layer.bias.detach(), neighbors, grad_output)[-1])
        done += 1

    return step


def contestants(device: str = "cpu") -> dict[str, Callable[[Size, Tensor | None], tuple[nn.Linear, Step]]]:
    """Name -> builder of a layer and its step, from size and weight (None: random); `nn.Linear`, the floor, first.

    Those that can serve on this device ("cpu", "cuda"); not what would only run in Triton's interpreter.
    """

    def build(name: str) -> Callable[[Size, Tensor | None], tuple[nn.Linear, Step]]:
        def built(size: Size, weight: Tensor | None) -> tuple[nn.Linear, Step]:
            torch.manual_seed(0)
            kinds = {} if name in ("linear", "compiled") else {"backend": name}
            layer = (BCLLayer if kinds else nn.Linear)(size.N, size.D, device=device, **kinds)
            if weight is not None:
                layer.weight.data.copy_(weight)
            return layer, (compiled_step if name == "compiled" else training_step)(layer, size)

        return built

    serving = [name for name in ops.BACKENDS if ops.why_not(name, device) is None]
    interpreted = ops.ON_GPU if device == "cpu" else ()
    return {name: build(name) for name in ("linear", "compiled", *serving) if name not in interpreted}


def check_equal(size: Size, weight: Tensor | None = None, device: str = "cpu") -> None:
    """Raise AssertionError unless every backend makes the same first step as the reference: nothing wrong is timed."""
    moved = {}
    for name, build in contestants(device).items():
        layer, step = build(size, weight)
        start = layer.weight.detach().clone()
        step()
        moved[name] = layer.weight.detach() - start
    for name, move in moved.items():
        if name != "linear":
            error = relative_error(move, moved["reference"])
            assert error <= 1e-4, f"{name} at {size}: the first pull differs from the reference's by {error:.1e}"


def check_stages(size: Size, backend: str, device: str = "cpu") -> dict[str, float]:
    """Raise AssertionError unless every stage keeps the exactness contract at this size, given the reference's inputs.

    Choices are equal bit by bit; returns, by stage and result, the relative error of everything else, judged by float64
    and held to the larger of 1e-5 and twice the reference's own. Neighbours are held to a float64 regret of 1e-6.
    """
    errors = {}
    for name, taken in stage_calls(size, device, "reference").items():
        in_place = name.endswith("_")
        results = []
        for server, cast in ((backend, torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
            given = [t.to(cast, copy=in_place) if _is_real(t) else t for t in taken]
            result = ops.stage(name, server)(*given)
            results.append((given[0] - taken[0].to(cast),) if in_place else _as_tuple(result))
        if name == "neighbours":
            errors[name] = _regret(taken[0].double(), *(result[0] for result in results[::2]))
            assert errors[name] <= 1e-6, f"{backend} at {size}: neighbours are less similar by {errors[name]:.1e}"
            continue
        for i, (got, own, truth) in enumerate(zip(*results, strict=True)):
            place = f"{name} {reference.COMPETITION[i]}" if name == "competition" else f"{name} {i}"
            if name == "selection":
                got, own = got.sort(dim=1).values, own.sort(dim=1).values
            if not own.is_floating_point() or place == "gradient 0":
                assert got.equal(own), f"{backend} at {size}: {place} differs in {int((got != own).sum())} elements"
            elif place != "competition pair_pull" or results[1][4].equal(results[2][4]):
                errors[place] = relative_error(got, truth)
                allowed = budget(own, truth)
                assert errors[place] <= allowed, f"{backend} at {size}: {place} is off by {errors[place]:.1e}"
    return errors


def _is_real(value: Any) -> bool:
    return torch.is_tensor(value) and value.is_floating_point()


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _regret(weight: Tensor, chosen: Tensor, best: Tensor) -> float:
    """By how much, at most, the cosine of a chosen neighbour [D, k] falls behind that of the best at its place."""
    unit = weight * reference.inverse_norm(weight)[:, None]
    regret = 0.0
    for place in range(chosen.shape[1]):  # a [D, N] at a time
        gap = ((unit[best[:, place]] - unit[chosen[:, place]]) * unit).sum(dim=1)
        regret = max(regret, float(gap.max()))
    return regret


# --- The floor --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """What this device reached in this process: nothing that moves or multiplies as much can be faster."""

    copy_gbs: float  # GB/s read and written, of a copy that no cache holds
    cache_gbs: float  # the same of one that a cache holds
    tflops: float  # of a float32 product, in the precision torch's settings allow it

    def floor_ms(self, size: Size) -> dict[str, float]:
        """The least milliseconds of every stage of a step, and of an nn.Linear step (`products`): bytes over bandwidth.

        Each [B, D] matrix moves once: the competition reads the activation and writes rank_score, the selection reads
        the activation, the gradient reads two and writes one. Targets gather B * k + D * r rows of x through the cache
        and read and write the weight. Three products of 2 B D N operations each.
        """
        B, D, N = size.B, size.D, size.N
        k, r = min(CONFIG.neighborhood_k, D - 1), min(CONFIG.rescue_k, B)
        matrix, gathered, weight = 4 * B * D, 4 * (B * k + D * r) * N, 4 * D * N
        copy, cache = self.copy_gbs * 1e6, self.cache_gbs * 1e6  # bytes per ms
        return {
            "competition": (2 * matrix + 4 * B * N) / copy,
            "selection": matrix / copy,
            "targets_pull_": gathered / cache + 2 * weight / copy,
            "gradient": 3 * matrix / copy,
            "products": 6 * B * D * N / (self.tflops * 1e9),
        }


def ceilings(device: str = "cpu") -> Ceilings:
    """Measure the two bandwidths and the product rate of a device."""
    large, small, side = (1 << 28, 1 << 21, 8192) if device == "cuda" else (1 << 26, 1 << 14, 1024)
    source = torch.rand(large, device=device)
    target, a, b = torch.empty_like(source), *torch.rand(2, side, side, device=device)
    rates = []
    for count in (large, small):
        one, other = source[:count], target[:count]
        repeats = max(1, (1 << 22) // count)  # a call takes longer than it takes to launch
        ms = median_ms(lambda one=one, other=other, n=repeats: [other.copy_(one) for _ in range(n)], device)
        rates.append(8 * count * repeats / ms / 1e6)
    return Ceilings(*rates, 2 * side**3 / median_ms(lambda: a @ b, device) / 1e9)


# --- Time -------------------------------------------------------------------------------------------------------------


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def window(step: Step, steps: int, device: str = "cpu") -> float:
    """Mean milliseconds of a step over a window."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    _synchronize(device)
    return (time.perf_counter() - start) / steps * 1e3


def median_ms(function: Callable[[], Any], device: str, repeats: int = 5) -> float:
    """Median milliseconds of one call; on a GPU of the device's own time, with nothing of it left in the cache."""
    function()
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(function, return_mode="median")
    return statistics.median(window(function, 1) for _ in range(repeats))


def step_times(
    size: Size,
    weight: Tensor | None = None,
    *,
    steps: int = 50,
    rounds: int = 5,
    slow_steps: int = 3,
    device: str = "cpu",
) -> list[StepTime]:
    """Time every contestant in turn, window by window: L A B L A B ...

    A window is `steps` consecutive steps (50 hold exactly one neighbour refresh) between two synchronisations. The
    contestants of SLOW take part in the first round alone, with `slow_steps`; their refresh is what the first step
    took longer.
    """
    running = {name: build(size, weight)[1] for name, build in contestants(device).items()}
    first = {}
    for name, step in running.items():
        if name in ("compiled", *ops.ON_GPU):
            step()  # compiles
        first[name] = window(step, 1, device)
    taken: dict[str, list[float]] = {name: [] for name in running}
    ratios: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(rounds):
        for name, step in running.items():
            if name in SLOW and turn == 0:
                mean = window(step, slow_steps, device)
                taken[name].append(mean + max(0.0, first[name] - mean) / CONFIG.recompute_every)
            elif name not in SLOW:
                taken[name].append(window(step, steps, device))
            else:
                continue
            ratios[name].append(taken[name][-1] / taken["linear"][-1])
    return [
        StepTime(
            contestant=name,
            **dataclasses.asdict(size),
            weights="init" if weight is None else "trained",
            threads=torch.get_num_threads(),
            device=device,
            ms=statistics.median(taken[name]),
            ratio_to_linear=statistics.median(ratios[name]),
            windows=len(taken[name]),
            steps=slow_steps if name in SLOW else steps,
        )
        for name in running
    ]


def stage_calls(size: Size, device: str = "cpu", like: str = "portable") -> dict[str, tuple[Any, ...]]:
    """Stage -> its arguments in one training step on random numbers, formed by the backend `like`."""
    x, grad_output = _batch(size, 0, device)
    torch.manual_seed(0)
    linear = nn.Linear(size.N, size.D)
    weight, bias = linear.weight.detach().to(device), linear.bias.detach().to(device)
    activation = F.linear(x, weight, bias)
    neighbors = ops.stage("neighbours", like)(weight, CONFIG.neighborhood_k)
    competing = activation, neighbors, CONFIG.temperature, x, CONFIG.forces, 0.0, 0.0
    R, _, _, _, _, *pairs, rinv, need, winner_share, som_strength = ops.stage("competition", like)(*competing)
    chosen = activation, bias, rinv, None, need, "rank", "hard", CONFIG.rescue_k
    choices = x, *pairs, *ops.stage("selection", like)(*chosen), winner_share, "none"
    return {
        "neighbours": (weight, CONFIG.neighborhood_k),
        "competition": competing,
        "inverse_norm": (x,),
        "selection": chosen,
        "targets_pull_": (weight.clone(), None, som_strength, 1.0, *choices),
        "gradient": (grad_output, R, None),
        "rank": (activation,),
    }


def stage_times(
    size: Size, repeats: int = 5, device: str = "cpu", roof: Ceilings | None = None
) -> list[dict[str, Any]]:
    """Median milliseconds of every stage on every backend, on the numbers of one training step: a row for each.

    With the ceilings of the device each row also says which fraction of its floor's speed the stage reaches.
    """
    floor = roof.floor_ms(size) if roof else {}
    rows = []
    for name, taken in stage_calls(size, device).items():
        ms = {
            backend: median_ms(partial(ops.stage(name, backend), *taken), device, repeats)
            for backend in contestants(device)
            if backend in ops.BACKENDS
        }
        rows += [
            {
                "contestant": backend,
                "stage": name,
                **dataclasses.asdict(size),
                "device": device,
                "threads": torch.get_num_threads(),
                "ms": time,
                "ns_per_element": time * 1e6 / (size.B * size.D),
                "times_faster_than_reference": ms["reference"] / time,
                "fraction_of_roof": floor[name] / time if name in floor else None,
            }
            for backend, time in ms.items()
        ]
    return rows


# --- Records ---------------------------------------------------------------------------------------------------------

MEASURED = ("question", "device", "contestant", "B", "D", "N", "weights", "threads")  # what a row is about
WORSE = 1.1  # times its old ratio: what lies within is noise


def compare(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ratios to nn.Linear of two records' rows, side by side, where both have them; `worse` by more than WORSE.

    Raises ValueError where the records have no row in common.
    """
    before, after = (
        {tuple(row.get(key) for key in MEASURED): row["ratio_to_linear"] for row in rows if "ratio_to_linear" in row}
        for rows in (old, new)
    )
    common = [key for key in after if key in before]
    if not common:
        raise ValueError(f"the records must have rows in common (the same {', '.join(MEASURED)}), got none")
    return [
        dict(zip(MEASURED, key, strict=True))
        | {"old": before[key], "new": after[key], "worse": after[key] > WORSE * before[key]}
        for key in common
    ]


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
