"""Small layers trained for real, with what a monitor keeps of their steps, and pages that show them."""

from pathlib import Path

import torch
from torch.nn import functional as F

from bcl_fast.diagnostics import force_norms, forces, step_metrics
from bcl_fast.experiments import report
from bcl_fast.glance import glance
from bcl_fast.layer import BCLLayer

TEMPLATES = Path(report.__file__).parent


class Layer:
    """What was measured of one layer: its records, and lines and glances of the same steps."""

    def __init__(self, N, D, batches, shape=None, optimizer=True, broken=(), scale=1.0, **options):
        torch.manual_seed(0)
        layer = BCLLayer(N, D, som_lr=0.05, **options)
        adam = torch.optim.Adam(layer.parameters(), 0.01) if optimizer else None
        self.records, self.lines, self.glances = [], [], []
        for step, B in enumerate(batches):
            if step in broken:
                layer.weight.data.fill_(torch.nan)
            self._step(layer, adam, 10 * step, scale * (torch.rand(B, N, dtype=layer.weight.dtype) - 0.3), shape)

    def _step(self, layer, adam, step, x, shape):
        before = layer.weight.detach().clone()
        layer.weight.grad = None
        with layer.observe(self.records.append):
            layer(x).square().mean().backward()
        pulled, gradient, norms = layer.weight.detach().clone(), layer.weight.grad.clone(), {}
        if adam:
            adam.step()
            norms = force_norms(gradient, before, pulled, layer.weight.detach())
        record = self.records[-1]
        cosine = F.cosine_similarity(before[:, None], before, dim=2).fill_diagonal_(-1)
        metrics = step_metrics(record)
        counts = {"dead": len(before) - metrics["alive"], "redundant": 0}
        line = {"layer": "encoder.0", "step": step, **metrics, **counts, **(forces(norms) if norms else {})}
        self.lines.append({key: None if value != value else value for key, value in line.items()})
        nearest = {"nearest": cosine.max(dim=1).values} if norms else {}
        self.glances.append({**glance(record, shape), **norms, **nearest})


MAKERS = {
    "images": lambda: Layer(30, 9, (12, 12, 12, 7), (1, 6, 5)),  # and a smaller last batch
    "vectors": lambda: Layer(10, 100, (120, 120, 120), optimizer=False),  # more than is kept
    "color": lambda: Layer(3 * 36 * 20, 4, (6, 6), (3, 36, 20)),  # more pixels than are drawn
    "smallest": lambda: Layer(3, 2, (1,), rescue_k=1),
    "diverged": lambda: Layer(16, 5, (6, 6), (1, 4, 4), broken=(1,)),
    "always diverged": lambda: Layer(16, 5, (6, 6), (1, 4, 4), broken=(0,)),
    "wide": lambda: Layer(4097, 3, (4, 4)),  # more inputs than vectors are kept of
    "beyond float32": lambda: Layer(16, 5, (6, 6), (1, 4, 4), scale=1e60, rescue_k=0, dtype=torch.float64),
    "channels": lambda: Layer(2 * 5 * 7, 6, (8, 8), (2, 5, 7)),
}


def page(blocks):
    """The HTML of a page with one section of these blocks."""
    template = report.Environment(loader=report.FileSystemLoader(TEMPLATES), autoescape=True)
    return template.get_template("report.html").render(sections=[{"title": "Monitor", "blocks": blocks}])
