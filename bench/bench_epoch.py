"""What does an epoch of training the autoencoder take, with each contestant as its encoder?"""

import statistics

import torch

from bcl_fast.experiments.run import Condition, Training
from bcl_fast.measure.clocks import interleaved
from bcl_fast.measure.contestants import NAMES, Size, serving, why_not
from bcl_fast.measure.rows import absent, row
from bcl_fast.spec import BCLConfig
from bcl_fast.testing import relative_error

BATCH, FEATURES = 128, 64


def epochs(images, names, device, rounds):
    trainings = {}
    for name in names:
        config, backend = (None, None) if name == "linear" else (BCLConfig(), name)
        condition = Condition(images.name, config, 10**9, 0, FEATURES, BATCH, backend=backend, device=device)
        trainings[name] = Training(condition, images, ())
    for training in trainings.values():
        training.step()
    weights = {name: training.model.encoder_weight for name, training in trainings.items()}
    for name in set(names) - {"linear"}:
        error = relative_error(weights[name], weights["reference"])
        assert error <= 1e-4, f"{name}: the first step of training differs from the reference's by {error:.1e}"

    def epoch(training):
        return lambda: [training.step() for _ in range(len(images.train) // BATCH)]

    taken = interleaved({name: epoch(training) for name, training in trainings.items()}, rounds, 0, 30, device)
    size, labels = Size(BATCH, FEATURES, images.train.shape[1]), {"device": device, "data": images.name}
    rows = []
    for name, ms in taken.items():
        ratio = statistics.median(a / b for a, b in zip(ms, taken["linear"], strict=False))
        found = dict(ms=statistics.median(ms), ratio_to_linear=ratio, batches=len(images.train) // BATCH)
        rows.append(row("epoch", name, size, **labels, **found))
    reasons = {"compiled": "a step as one function, without autograd: no loss can train with it"}
    reasons |= {name: why_not(name, device) for name in NAMES if name != "compiled"}
    return rows + absent("epoch", size, reasons, **labels)


def test_epoch(measured, images, device, quick):
    names = [name for name in serving(device) if name != "compiled"]
    torch.manual_seed(0)
    measured(epochs, images, names, device, 1 if quick else 3)
