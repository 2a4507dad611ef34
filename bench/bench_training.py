"""Training the autoencoder: what a step and an epoch take with each as encoder, and are the curves the same?"""

import itertools
import statistics
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bcl_fast import BCLLayer
from bcl_fast.experiments import charts, plots
from bcl_fast.experiments.run import Condition, Training, row_steps
from bcl_fast.measure.implementations import Size, reasons, serving
from bcl_fast.measure.rows import absent, row
from bcl_fast.measure.timing import MIN_ROUNDS, compared, interleaved, ratio
from bcl_fast.spec import BCLConfig
from bcl_fast.testing import relative_error

BATCH, FEATURES = 128, 64
STEPS, SEEDS = 2000, 3
CURVES = ("loss", "wt_sim")
NO_AUTOGRAD = "a step as one function, without autograd: no loss can train with it"


@pytest.fixture
def encoders(device):
    """Who can train: everybody but `compiled`."""
    return [name for name in serving(device) if name != "compiled"]


def training(images, name, seed, steps, device, rows=()):
    bcl = BCLConfig.preset("decoupled", som_lr=0.001) if name != "linear" else None
    backend = name if bcl else None
    condition = Condition(images.name, bcl, steps, seed, FEATURES, BATCH, backend=backend, device=device)
    return Training(condition, images, rows)


def absentees(question, size, labels):
    return absent(question, size, reasons(labels["device"], compiled=NO_AUTOGRAD), **labels)


# --- A step ----------------------------------------------------------------------------------------------------------

COMPILED = ("linear", "portable", "cpu", "triton", "cuda")  # as encoders of a model under torch.compile


def autoencoder(name, size, device, mode):
    """A call that takes a whole step: L1, and Adam fused. The caches hold other things than the layer's meanwhile."""
    torch.manual_seed(0)
    encoder = nn.Linear(size.N, size.D) if name == "linear" else BCLLayer(size.N, size.D, backend=name, som_lr=0.001)
    model = nn.Sequential(encoder, nn.ReLU(), nn.Linear(size.D, size.N)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    forward = torch.compile(model) if mode == "compiled" else model
    batches = itertools.cycle(torch.rand(64, size.B, size.N, device=device))

    def step():
        x = next(batches)
        optimizer.zero_grad()
        F.l1_loss(forward(x), x).backward()
        optimizer.step()

    return step


def autoencoder_steps(names, mode, device, **amount):
    """A row for each encoder; refreshes come in their turn, one in 50 steps.

    Numbers too small to be normal count as zero meanwhile: Adam's means of features that died are such, which some
    processors take long for, and plain training has more of them.
    """
    torch.compiler.reset()
    size = Size(BATCH, FEATURES, 784)
    torch.set_flush_denormal(True)
    try:
        windows, _ = compared({name: autoencoder(name, size, device, mode) for name in names}, device, **amount)
    finally:
        torch.set_flush_denormal(False)
    rows = []
    for name, ms in windows.items():
        found = dict(ms=statistics.median(ms), mode=mode, rounds=len(ms))
        found |= ratio("ratio_to_linear", ms, windows["linear"])
        rows.append(row("autoencoder", name, size, device=device, **found))
    return rows


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_autoencoder(measured, encoders, mode, device, amount):
    names = encoders if mode == "eager" else [name for name in COMPILED if name in encoders]
    measured(autoencoder_steps, names, mode, device, **amount)


# --- An epoch ---------------------------------------------------------------------------------------------------------


def epochs(images, names, device, rounds):
    """A row for each encoder: `ms` of a whole epoch, after a first step that was the reference's."""
    batches = len(images.train) // BATCH
    running = {name: training(images, name, 0, batches * (rounds + 2), device) for name in names}
    for one in running.values():
        one.step()
    weights = {name: one.model.encoder_weight for name, one in running.items()}
    for name in set(names) - {"linear"}:
        error = relative_error(weights[name], weights["reference"])
        assert error <= 1e-4, f"{name}: the first step of training differs from the reference's by {error:.1e}"

    def epoch(one):
        return lambda: [one.step() for _ in range(batches)]

    windows = interleaved({name: epoch(one) for name, one in running.items()}, rounds, 0, 30, device)
    size, labels = Size(BATCH, FEATURES, images.train.shape[1]), {"device": device, "data": images.name}
    rows = []
    for name, ms in windows.items():
        found = dict(ms=statistics.median(ms), batches=batches, rounds=len(ms))
        found |= ratio("ratio_to_linear", ms, windows["linear"])
        rows.append(row("epoch", name, size, **labels, **found))
    return rows + absentees("epoch", size, labels)


def test_epoch(measured, images, encoders, device, quick):
    measured(epochs, images, encoders, device, 1 if quick else MIN_ROUNDS)


# --- The same curves --------------------------------------------------------------------------------------------------


def trained(images, name, seed, steps, device):
    one = training(images, name, seed, steps, device, row_steps(steps))
    start = time.perf_counter()
    for _ in range(steps):
        one.step()
    return time.perf_counter() - start, one.rows


def curves_of(images, names, seeds, steps, device):
    """A row for each encoder, with its curves [measured steps][seeds].

    `distance` is how far the median curve lies from the reference's, `spread` how far apart the reference's seeds do:
    both means over the measured steps. Chaos makes runs differ; a wrong backend differs by more than seeds do.
    """
    runs = {name: [] for name in names}
    for seed in range(seeds):
        for name in names:
            runs[name].append(trained(images, name, seed, steps, device))

    def curve_of(name, curve):
        return [[row[curve] for row in at] for at in zip(*(rows for _, rows in runs[name]), strict=True)]

    curves = {name: {curve: curve_of(name, curve) for curve in CURVES} for name in names}
    size = Size(BATCH, FEATURES, images.train.shape[1])
    labels = {"device": device, "data": images.name, "steps": steps, "seeds": seeds}
    seconds = {name: [taken for taken, _ in own] for name, own in runs.items()}  # of each seed, which is a round
    rows = []
    for name in names:
        middle = statistics.median(seconds[name])
        found = {"ms": middle * 1e3 / steps, "seconds": middle, "rounds": seeds}
        found |= ratio("ratio_to_linear", seconds[name], seconds["linear"])
        for curve in CURVES if name != "linear" else ():
            pairs = zip(curves[name][curve], curves["reference"][curve], strict=True)
            gaps = (abs(statistics.median(ours) - statistics.median(oracle)) for ours, oracle in pairs)
            found[f"{curve}_distance"] = statistics.fmean(gaps)
            found[f"{curve}_spread"] = statistics.fmean(max(at) - min(at) for at in curves["reference"][curve])
        found["curves"] = {"step": list(row_steps(steps)), **curves[name]}
        rows.append(row("training", name, size, **labels, **found))
    return rows + absentees("training", size, labels)


def test_curves(measured, images, encoders, device, quick, pytestconfig):
    rows = measured(curves_of, images, encoders, *((1, 3) if quick else (SEEDS, STEPS)), device)
    target = pytestconfig.getoption("--save")
    if target is not None:
        plots.save(charts.curves_picture(rows), target.with_name(f"{target.stem}-training.png"))
    for one in (one for one in rows if one["contestant"] != "linear" and one["ms"] and not quick):
        for curve in CURVES:
            assert one[f"{curve}_distance"] <= one[f"{curve}_spread"], f"{one['contestant']}: {curve} differs"
