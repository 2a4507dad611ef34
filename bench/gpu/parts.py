"""The parts of bench/gpu_check.py: each is units of one backend and size, and a unit yields rows."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, astuple, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import peers
import torch
from choices import check_choices
from stages import check_stages, stage_calls
from torch import nn

from bcl_fast import BCLLayer, backends, graphed, native
from bcl_fast.environment import environment
from bcl_fast.measure.floor import ceilings
from bcl_fast.measure.implementations import Implementation, Size, batch, build, trained_weight
from bcl_fast.measure.precisions import PRECISIONS, multiplying
from bcl_fast.measure.rows import OUT_OF_MEMORY, Row
from bcl_fast.measure.steps import begin, race
from bcl_fast.measure.timing import captured, interleaved, ratio, taken, window
from bcl_fast.testing import check_stage, expected

from . import prebuilt, tools, variants, verdicts
from .launches import kernels
from .plans import Plan
from .tools import ROOT
from .units import FAILED, REFUSED, Refused, Unit


def require(backend: str, plan: Plan) -> None:
    if reason := backends.why_not(backend, plan.device) if backend in backends.NAMES else None:
        raise RuntimeError(f"{backend!r} cannot serve: {reason}")


def weight_of(weights: str, size: Size, plan: Plan) -> torch.Tensor | None:
    """None for fresh weights; trained ones are the same for every backend."""
    if weights == "init":
        return None
    return trained_weight(size, plan.training, plan.device, "triton" if plan.device == "cuda" else None)


def about(name: str, size: Size, **labels: Any) -> Row:
    """What a row is about."""
    return {"contestant": name, **asdict(size), **labels}


def alone(plan: Plan, backend: str, stage: str, given: tuple[Any, ...]) -> Row:
    """What a stage takes, and whether captured; one that works in place does so on a copy of what others want too."""
    first, *rest = given
    first = first.clone() if stage.endswith("_") else first
    return taken(partial(backends.stage(stage, backend), first, *rest), plan.device, plan.rounds)._asdict()


def planned(size: Size) -> float:
    """Seconds for a unit at this size: to begin, and to check or time it."""
    return 6 + size.B * size.D / 1e7


# --- What is here -----------------------------------------------------------------------------------------------------


def versions(plan: Plan) -> Iterator[Unit]:
    yield Unit("versions", "all", 10, partial(_versions, plan))


def _versions(plan: Plan) -> Iterator[Row]:
    def said(*command: str) -> str | None:
        if shutil.which(command[0]) is None:
            return None
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()

    card = said("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    nvcc = said("nvcc", "--version")
    names = {key: value for key, value in environment().items() if isinstance(value, (str, int))}
    yield names | {
        "card": card,
        "cuda": torch.version.cuda,
        "nvcc": nvcc and nvcc.splitlines()[-1],
        "commit": said("git", "rev-parse", "HEAD"),
        "triton_key": prebuilt.triton_key(),
        "prebuilt_key": plan.prebuilt and prebuilt.described(plan.prebuilt)["triton_key"],  # where it differs: no use
    }
    if plan.device == "cuda":
        for name, found in (("nvidia-smi", card), ("nvcc", nvcc)):
            if not found:
                yield {"status": FAILED, "message": f"{name} is missing"}
    if "cuda" in plan.backends:
        require("cuda", plan)
        yield _library(plan)


def _library(plan: Plan) -> Row:
    """Where the CUDA library is, for which GPUs, and whether it is of the sources that lie here."""
    path = Path(native.cuda()._name)
    row = {"library": str(path)}
    if plan.device == "cpu":
        return row
    os.chdir(ROOT)  # for setup.py, in a process of its own
    with mock.patch("setuptools.setup"):
        script = runpy.run_path("setup.py")
    name = re.search(rb"bcl_cuda_build \w+_for_(\w+)\0", path.read_bytes())
    row |= {"architectures": name and name[1].decode(), "fresh": script["is_fresh"](path, script["CUDA"])}
    return row if row["fresh"] else row | {"status": FAILED, "message": "the CUDA library is of other sources"}


def ceilings_(plan: Plan) -> Iterator[Unit]:
    yield Unit("ceilings", "all", 15, lambda: [asdict(ceilings(plan.device))])


# --- What is right ----------------------------------------------------------------------------------------------------


def contract(plan: Plan) -> Iterator[Unit]:
    for size in (*plan.sizes, *plan.odd, *plan.deep):
        for backend in plan.backends:
            yield Unit("contract", f"{backend} {size}", planned(size), partial(_held, plan, backend, size, "init"))
    for backend in plan.backends:
        size = plan.sizes[min(1, len(plan.sizes) - 1)]
        yield Unit(
            "contract", f"{backend} {size} trained", planned(size), partial(_held, plan, backend, size, "trained")
        )


def _held(plan: Plan, backend: str, size: Size, weights: str) -> Iterator[Row]:
    require(backend, plan)
    counts = prebuilt.counted()
    weight, drawn = weight_of(weights, size, plan), size in plan.deep
    errors = check_stages(size, [backend], plan.device, weight=weight, drawn=drawn)[backend]
    worst = max(errors, key=errors.__getitem__)
    found = {"worst": worst, "error": errors[worst], "compiled": counts["compiled"]}
    yield about(backend, size, weights=weights) | found


def tests(plan: Plan) -> Iterator[Unit]:
    for name, words in plan.tests.items():
        yield Unit("tests", name, 60, partial(tools.pytest, words, 8 if plan.device == "cuda" else 0))


def _bench(plan: Plan, words: tuple[str, ...]) -> Iterator[Row]:
    """The rows that a bench saves."""
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder, "rows.json")
        yield from tools.pytest((*words, "--device", plan.device, "--save", str(saved)))
        if saved.exists():
            yield from verdicts.saved(saved)


# --- What it takes ----------------------------------------------------------------------------------------------------


def kernels_(plan: Plan) -> Iterator[Unit]:
    for size in plan.sizes:
        for name in ("linear", *plan.backends):
            for weights in ("init",) if name == "linear" else plan.weights:
                call = partial(_kernels, plan, name, size, weights)
                yield Unit("kernels", f"{name} {size} {weights}", planned(size), call)


def _kernels(plan: Plan, name: str, size: Size, weights: str) -> Iterator[Row]:
    """Every stage alone, with a cold cache, then every kernel of a step."""
    require(name, plan)
    labels = about(name, size, weights=weights)
    weight = weight_of(weights, size, plan)
    implementation = build(name, size, weight, plan.device)
    if implementation.refresh is not None:
        implementation.refresh()
        for stage, given in stage_calls(size, plan.device, name, weight).items():
            yield labels | {"stage": stage} | alone(plan, name, stage, given)
    for kernel, (ms, launches) in kernels(implementation.step, plan.device).items():
        yield labels | {"kernel": kernel[:120], "ms": ms, "launches": launches}


def steps(plan: Plan) -> Iterator[Unit]:
    for size in plan.sizes:
        for backend in plan.backends:
            for precision in PRECISIONS:
                call = partial(_steps, plan, backend, size, precision)
                yield Unit("steps", f"{backend} {size} {precision}", planned(size), call)
            yield Unit("steps", f"{backend} {size} graphed", planned(size), partial(_graphed, plan, backend, size))
    if "steps" in plan.benches:
        yield Unit("steps", "bench", 60, partial(_bench, plan, plan.benches["steps"]))


def _steps(plan: Plan, backend: str, size: Size, precision: str) -> Iterator[Row]:
    """Eager and captured steps over those of `nn.Linear`, after what they choose was found right."""
    require(backend, plan)
    for weights in ("init", "trained") if precision == "fp32" else ("init",):
        weight = weight_of(weights, size, plan)
        labels = about(backend, size, weights=weights, precision=precision)
        yield labels | asdict(check_choices(backend, size, precision, plan.device, weight))
        with multiplying(precision):
            running = {name: build(name, size, weight, plan.device, precision) for name in ("linear", backend)}
            refreshes, _ = begin(running, plan.device)
            found = race(running, refreshes, plan.device, **plan.amount)
            yield labels | {"mode": "eager", "linear_ms": found["linear"]["ms"]} | found[backend]
            running = _captured(plan, running)
            refreshes, _ = begin(running, plan.device)  # over a captured step of `nn.Linear`
            found = race(running, refreshes, plan.device, **plan.amount)
            mode = "captured" if plan.device == "cuda" else "eager (no graphs on a CPU)"
            yield labels | {"mode": mode, "linear_ms": found["linear"]["ms"]} | found[backend]


def _captured(plan: Plan, running: dict[str, Implementation]) -> dict[str, Implementation]:
    if plan.device == "cpu":
        return running
    return {
        name: replace(implementation, step=captured(implementation.step)) for name, implementation in running.items()
    }


def _graphed(plan: Plan, backend: str, size: Size) -> Iterator[Row]:
    """What a user gets from bcl_fast.graphed, for a loss and SGD, the copied batch and the refresh included."""
    require(backend, plan)
    x, grad_output = batch(size, plan.device)
    layers = {
        "linear": nn.Linear(size.N, size.D, device=plan.device),
        backend: BCLLayer(size.N, size.D, backend=backend, device=plan.device),
    }
    steps = {name: _user_step(plan, layer, grad_output, x) for name, layer in layers.items()}
    calls = {name: partial(step, x) for name, step in steps.items()}
    windows = interleaved(calls, device=plan.device, **plan.amount)
    labels = about(backend, size, weights="init", precision="fp32", mode=verdicts.GRAPHED)
    ms = {"ms": statistics.median(windows[backend]), "linear_ms": statistics.median(windows["linear"])}
    yield labels | ms | ratio("ratio_to_linear", windows[backend], windows["linear"])


def _user_step(plan: Plan, layer: nn.Linear, grad_output: torch.Tensor, x: torch.Tensor) -> Callable[..., Any]:
    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return (model(x) * grad_output).sum()

    def eager(x: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss(layer, x).backward()
        optimizer.step()

    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    return eager if plan.device == "cpu" else graphed(layer, loss, optimizer, x)


def variants_(plan: Plan) -> Iterator[Unit]:
    for size in plan.sizes[-2:]:  # a small one is a matter of launches
        for backend in plan.backends:
            for stage in variants.stages(backend):
                call = partial(_variants, plan, backend, stage, size)
                yield Unit("variants", f"{backend} {stage} {size}", planned(size), call)


def _variants(plan: Plan, backend: str, stage: str, size: Size) -> Iterator[Row]:
    """The launch sizes in use and every rival of them, held to the contract and then timed."""
    require(backend, plan)
    for weights in plan.weights:
        given = stage_calls(size, plan.device, "reference", weight_of(weights, size, plan))[stage]
        right = expected(stage, given)
        for variant in variants.variants(backend, stage):
            row = about(backend, size, weights=weights, stage=stage, variant=str(variant))
            with variants.applied(variant):
                try:
                    check_stage(backends.stage(stage, backend), stage, given, right)
                    found = alone(plan, backend, stage, given)
                except AssertionError as error:
                    yield row | {"status": FAILED, "message": str(error)}
                except Exception as error:
                    if type(error).__name__ != "OutOfResources" and "too many resources" not in str(error):
                        raise  # those are Triton's and CUDA's, of a rival that does not fit
                    yield row | {"status": REFUSED, "message": str(error)}
                else:
                    yield row | found


def ranks(plan: Plan) -> Iterator[Unit]:
    for size in plan.ranked:
        yield Unit("ranks", str(size), 10, partial(_ranks, plan, size))
    yield Unit("ranks", "bench", 40, partial(_bench, plan, plan.benches["ranks"]))


def _ranks(plan: Plan, size: Size) -> Iterable[Row]:
    for backend in plan.backends:
        require(backend, plan)
    return peers.rank_times(size, plan.device, plan.backends, **plan.amount)


SLOW = 2000.0  # ms of a step: a larger one would take what time there is


def large(plan: Plan) -> Iterator[Unit]:
    for size in plan.large:
        for name in ("linear", *plan.backends):
            yield Unit("large", f"{name} {size}", 15, partial(_large, plan, name, (size,)))
    for axis, sizes in plan.growing.items():
        for name in ("linear", *plan.backends):
            yield Unit("large", f"{name} growing {axis}", 15, partial(_large, plan, name, sizes, refresh=False))
    yield Unit("large", "bench", 40, partial(_bench, plan, plan.benches["large"]))


def _large(plan: Plan, name: str, sizes: tuple[Size, ...], refresh: bool = True) -> Iterator[Row]:
    """Time and peak memory of a step at one size after the other, until it does not fit or is SLOW."""
    require(name, plan)
    on_gpu = plan.device == "cuda"
    for size in sizes:
        row = about(name, size)
        try:
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            implementation = build(name, size, device=plan.device)
            if refresh and implementation.refresh is not None:
                implementation.refresh()
            implementation.step()
            ms = window(implementation.step, plan.seconds, plan.device)
        except torch.OutOfMemoryError:
            yield row | {"status": REFUSED, "message": OUT_OF_MEMORY}
            return
        yield row | {"ms": ms, "peak_mb": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None}
        if ms > SLOW:
            return
        implementation = None


# --- What the tools say -----------------------------------------------------------------------------------------------

COUNTED = {
    "triton": ("_competition_kernel", "_selection_kernel", "_pull_kernel", "_gradient_kernel"),
    "cuda": ("competition_kernel", "selection_kernel", "selection_counting_kernel"),
}


def ncu(plan: Plan) -> Iterator[Unit]:
    for backend in plan.backends:
        for kernel in COUNTED[backend]:
            yield Unit("ncu", f"{backend} {kernel}", 25, partial(_ncu, plan, backend, kernel, plan.sizes[-1]))


def _ncu(plan: Plan, backend: str, kernel: str, size: Size) -> Iterator[Row]:
    if plan.device == "cpu":
        raise Refused("there is no GPU")
    require(backend, plan)
    program = sys.executable, str(Path(__file__).with_name("one_step.py")), backend, *map(str, astuple(size))
    yield about(backend, size, kernel=kernel) | tools.ncu(kernel, program)


# Tests of a stage at a small size, for the sanitizers are a hundred times slower, and of one kind of numbers.
SMALL, KIND = "37-64", "quantized"
SANITIZED = {
    "triton": ("competition", "selection_is", "rank_is", "gradient", "targets_and", "neighbors_by"),
    "cuda": ("competition", "selection_is", "rank_is"),
}
OF_ONE_KIND = ("gradient", "targets_and", "neighbors_by")
TOOLS = {"triton": ("memcheck",), "cuda": ("memcheck", "racecheck")}


def sanitizer(plan: Plan) -> Iterator[Unit]:
    for backend in plan.backends:
        for tool in TOOLS[backend]:
            for stage in SANITIZED[backend]:
                yield Unit(
                    "sanitizer", f"{tool} {backend} {stage}", 40, partial(_sanitized, plan, backend, tool, stage)
                )


def sanitized_words(backend: str, stage: str) -> list[str]:
    """What the names of those tests contain."""
    return [f"test_{stage}", backend, SMALL] + [KIND] * (stage not in OF_ONE_KIND)


def _sanitized(plan: Plan, backend: str, tool: str, stage: str) -> Iterator[Row]:
    if plan.device == "cpu":
        raise Refused("there is no GPU")
    require(backend, plan)
    tests = "tests/test_stages.py", "-k", " and ".join(sanitized_words(backend, stage))
    yield {"contestant": backend, "tool": tool, "stage": stage} | tools.sanitizer(tool, tests)


# --- All of it --------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Plan], Iterator[Unit]]] = {
    "versions": versions,
    "ceilings": ceilings_,
    "contract": contract,
    "tests": tests,
    "kernels": kernels_,
    "steps": steps,
    "variants": variants_,
    "ranks": ranks,
    "large": large,
    "ncu": ncu,
    "sanitizer": sanitizer,
}


def units(plan: Plan, parts: Iterable[str]) -> list[Unit]:
    return [unit for part in parts for unit in PARTS[part](plan)]
