"""Choices end to end: what a layer chose from its own products, judged by the float64 score of what it let go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bcl_fast import BCLLayer, reference
from bcl_fast.autograd import Competed
from bcl_fast.measure.implementations import CONFIG, Size, batch
from bcl_fast.measure.precisions import PRECISIONS, ROUNDING, forward, multiplying
from bcl_fast.structures import PendingPull, Pull, unpacked


@dataclass(frozen=True)
class Strayed:
    """How far the choices of one step lie from float64's."""

    features: int  # that are rescued to other samples
    samples: int  # that have another winner
    regret: float  # at most, of a feature's chosen scores, best with best; scores are within 0 and 1
    margin_lost: float  # at most, by another winner, over what the roundings of the product can do to two margins


def choices(
    backend: str, size: Size, precision: str = "fp32", device: str = "cpu", weight: Tensor | None = None
) -> Strayed:
    """What the first step of a layer of this backend and weight [D, N] (None: one drawn by `nn.Linear`) chose."""
    torch.manual_seed(0)
    layer = BCLLayer(size.N, size.D, backend=backend, device=device)
    if weight is not None:
        layer.weight.data.copy_(weight)
    received: list[PendingPull] = []
    layer._pulls.receive = lambda pending, dtype, compiled: received.append(pending)
    found: list[Competed] = []
    compete = layer._compete

    def watched(*arguments: Any) -> Competed:
        found.append(compete(*arguments))
        return found[-1]

    layer._compete = watched
    x, grad_output = batch(size, device)
    with multiplying(precision), forward(precision, device):
        output = layer(x)
    output.backward(grad_output.to(output.dtype))
    return _judged(unpacked(received[0].pull), found[0].statistics.winner, layer, precision)


@torch.no_grad()
def _judged(pull: Pull, winner: Tensor, layer: BCLLayer, precision: str) -> Strayed:
    x, weight, bias = (tensor.double() for tensor in (pull.x, layer.weight, layer.bias))
    activation, B = F.linear(x, weight, bias), x.shape[0]
    competing = layer.neighbors, CONFIG.temperature, x, CONFIG.forces, 0.0, 0.0
    truth = reference.competition(activation, *competing)
    score = (activation - bias).mul_(truth.x_inverse_norm[:, None])
    score = reference.rank(score).double().mul_(truth.need[:, None] / max(B - 1, 1))
    best, rows = score.topk(pull.rescue_rows.shape[1], dim=0)
    chosen = score.gather(0, pull.rescue_rows.T).sort(dim=0, descending=True).values
    others = (pull.rescue_rows.T.sort(dim=0).values != rows.sort(dim=0).values).any(dim=0)
    samples = winner != truth.winner
    lost = _margin(activation, truth.winner, layer.neighbors) - _margin(activation, winner, layer.neighbors)
    # Of an activation: of both operands, and of a sum of N; two of each margin, and two margins are compared.
    rounding = 2 * ROUNDING[precision] + x.shape[1] * 2.0**-24
    error = rounding * (x.norm(dim=1) * weight.norm(dim=1).max() + bias.abs().max())
    return Strayed(
        int(others.sum()), int(samples.sum()), float((best - chosen).max()), float((lost / (4 * error)).max())
    )


def _margin(activation: Tensor, feature: Tensor, neighbors: Tensor) -> Tensor:
    """By how much this feature of each sample beats its strongest neighbor: [B, D], [B], [D, k] -> [B]."""
    strength = activation.abs()
    return strength.gather(1, feature[:, None])[:, 0] - strength.gather(1, neighbors[feature]).amax(dim=1)


def check_choices(
    backend: str, size: Size, precision: str = "fp32", device: str = "cpu", weight: Tensor | None = None
) -> Strayed:
    """The choices, or AssertionError where they cost more than this precision may."""
    strayed = choices(backend, size, precision, device, weight)
    assert strayed.regret <= PRECISIONS[precision], (
        f"{backend} at {size}, {precision}: the samples chosen end to end score {strayed.regret:.1e} less than the best"
    )
    assert strayed.margin_lost <= 1, (
        f"{backend} at {size}, {precision}: a winner's margin is {strayed.margin_lost:.1f} times as far from the "
        "largest as roundings can bring it"
    )
    return strayed
