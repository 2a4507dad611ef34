"""What does a `Monitor` cost: a training step between two that are measured, and one that is?"""

import statistics
import tempfile

import torch

from bcl_fast.layer import BCLLayer
from bcl_fast.measure.implementations import Size
from bcl_fast.measure.rows import row
from bcl_fast.measure.timing import compared, ratio
from bcl_fast.monitor import Monitor

SIZES = [Size(8, 8, 8), Size(128, 64, 784), Size(1024, 1024, 784)]
EVERY = {"unmonitored": None, "between": 10**9, "measured": 1}  # of the second only the first step is measured


def training(size, every, out, device):
    """A call that takes a whole step of Adam, under a monitor that stays."""
    torch.manual_seed(0)
    layer = BCLLayer(size.N, size.D, recompute_every=10**9, device=device)
    x = torch.rand(size.B, size.N, device=device)
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    if every is not None:
        Monitor(layer, optimizer, every, out).__enter__()

    def step():
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()

    return step


def costs(size, device, **amount):
    with tempfile.TemporaryDirectory() as folder:
        calls = {name: training(size, every, f"{folder}/{name}", device) for name, every in EVERY.items()}
        windows, _ = compared(calls, device, **amount)
    rows = []
    for name, own in windows.items():
        over = ratio("ratio_to_unmonitored", own, windows["unmonitored"])
        own = {"ms": statistics.median(own), **over, "rounds": len(own)}
        rows.append(row("monitor", name, size, device=device, **own))
    return rows


def test_monitor(size, measured, device, amount):
    measured(costs, size, device, **amount)
