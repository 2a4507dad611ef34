"""Does a fast backend train as the reference does? Loss and similarity over 2,000 steps, and the time they took."""

import statistics
import time

from bcl_fast.experiments import plots
from bcl_fast.experiments.run import Condition, Training, row_steps
from bcl_fast.measure.contestants import NAMES, Size, serving, why_not
from bcl_fast.measure.rows import absent, row
from bcl_fast.spec import BCLConfig

STEPS, SEEDS = 2000, 3
CURVES = ("loss", "wt_sim")


def trained(images, backend, seed, steps, device):
    condition = Condition(
        images.name, BCLConfig.preset("decoupled", som_lr=0.001), steps, seed, backend=backend, device=device
    )
    training = Training(condition if backend != "linear" else condition.control(), images, row_steps(steps))
    start = time.perf_counter()
    for _ in range(steps):
        training.step()
    return time.perf_counter() - start, training.record()


def train(images, names, seeds, steps, device):
    """A row for each contestant, with the range of its curves over seeds.

    `distance` is how far the median curve lies from the reference's, `spread` how far apart the reference's seeds do:
    both means over the measured steps, by curve. Chaos makes runs differ; a wrong backend differs by more than seeds.
    """
    runs = {name: [] for name in names}
    for seed in range(seeds):
        for name in names:
            runs[name].append(trained(images, name, seed, steps, device))
    places = runs["reference"][0][1]["rows"]
    curves = {
        name: {curve: [[one["rows"][i][curve] for _, one in own] for i in range(len(places))] for curve in CURVES}
        for name, own in runs.items()
    }  # [steps][seeds]
    size = Size(128, 64, images.train.shape[1])
    labels = {"device": device, "data": images.name, "steps": steps, "seeds": seeds}
    rows = []
    for name, own in runs.items():
        seconds = statistics.median(taken for taken, _ in own)
        linear = statistics.median(taken for taken, _ in runs["linear"])
        found = {"ms": seconds * 1e3 / steps, "ratio_to_linear": seconds / linear, "seconds": seconds}
        if name != "linear":
            for curve in CURVES:
                ours, oracle = curves[name][curve], curves["reference"][curve]
                gaps = [abs(statistics.median(a) - statistics.median(b)) for a, b in zip(ours, oracle, strict=True)]
                found[f"{curve}_distance"] = statistics.fmean(gaps)
                found[f"{curve}_spread"] = statistics.fmean(max(seeds) - min(seeds) for seeds in oracle)
        found["curves"] = {"step": [one["step"] for one in places], **curves[name]}
        rows.append(row("training", name, size, **labels, **found))
    reasons = {"compiled": "a step as one function, without autograd: no loss can train with it"}
    reasons |= {name: why_not(name, device) for name in NAMES if name != "compiled"}
    return rows + absent("training", size, reasons, **labels)


def test_training(measured, images, device, quick, pytestconfig):
    names = [name for name in serving(device) if name != "compiled"]
    rows = measured(train, images, names, *((1, 3) if quick else (SEEDS, STEPS)), device)
    if not quick:
        for one in (one for one in rows if one["contestant"] not in ("linear", "reference") and one["ms"]):
            for curve in CURVES:
                assert one[f"{curve}_distance"] <= one[f"{curve}_spread"], f"{one['contestant']}: {curve} differs"
    target = pytestconfig.getoption("--save")
    if target is not None:
        plots.save(plots.curves_picture(rows), target.with_name(f"{target.stem}-training.png"))
