"""Choices end to end: what a layer chose from its own products, judged by the float64 score of what it let go."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..layer import BCLLayer, PendingPull
from .contestants import CONFIG, Size, batch
from .precisions import PRECISIONS, forward, multiplying


@dataclass(frozen=True)
class Strayed:
    """How far the choices of one step lie from float64's."""

    features: int  # that are rescued to other samples
    samples: int  # that have another winner
    regret: float  # at most, of a feature's chosen scores, best with best; scores are within 0 and 1


def choices(
    backend: str, size: Size, precision: str = "fp32", device: str = "cpu", weight: Tensor | None = None
) -> Strayed:
    """What the first step of a layer of this backend and weight [D, N] (None: one drawn by `nn.Linear`) chose."""
    torch.manual_seed(0)
    layer = BCLLayer(size.N, size.D, backend=backend, device=device)
    if weight is not None:
        layer.weight.data.copy_(weight)
    received: list[PendingPull] = []
    layer.receive = lambda pending, compiled: received.append(PendingPull(*pending))
    x, grad_output = batch(size, device)
    with multiplying(precision), forward(precision, device):
        output = layer(x)
    output.backward(grad_output.to(output.dtype))
    return _judged(received[0], layer)


@torch.no_grad()
def _judged(pull: PendingPull, layer: BCLLayer) -> Strayed:
    x, weight, bias = (tensor.double() for tensor in (pull.x, layer.weight, layer.bias))
    activation, B = F.linear(x, weight, bias), x.shape[0]
    found = dict(
        zip(
            reference.COMPETITION,
            reference.competition(activation, layer.neighbors, CONFIG.temperature, x, CONFIG.forces, 0.0, 0.0),
            strict=True,
        )
    )
    score = (activation - bias).mul_(found["x_inverse_norm"][:, None])
    score = reference.rank(score).double().mul_(found["need"][:, None] / max(B - 1, 1))
    best, rows = score.topk(pull.rescue_rows.shape[1], dim=0)
    chosen = score.gather(0, pull.rescue_rows.T).sort(dim=0, descending=True).values
    others = (pull.rescue_rows.T.sort(dim=0).values != rows.sort(dim=0).values).any(dim=0)
    samples = (pull.pair_feature != found["pair_feature"]).any(dim=1)
    return Strayed(int(others.sum()), int(samples.sum()), float((best - chosen).max()))


def check_choices(
    backend: str, size: Size, precision: str = "fp32", device: str = "cpu", weight: Tensor | None = None
) -> Strayed:
    """The choices, or AssertionError where those of samples cost more than this precision may."""
    strayed = choices(backend, size, precision, device, weight)
    assert strayed.regret <= PRECISIONS[precision], (
        f"{backend} at {size}, {precision}: the samples chosen end to end score {strayed.regret:.1e} less than the best"
    )
    return strayed
