"""Diversity as a term of the loss (SPEC section 3, fix C): gradient descent itself then keeps features apart."""

from __future__ import annotations

import torch
from torch import Tensor

from .norms import power_of_two


def _check(name: str, tensor: Tensor, at_least: int) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if tensor.dim() < at_least:
        dimensions = "1 dimension" if at_least == 1 else f"{at_least} dimensions"
        raise ValueError(f"{name} must have at least {dimensions}, got shape {list(tensor.shape)}")


def weight_similarity_loss(weight: Tensor) -> Tensor:
    """Mean off-diagonal cosine of the rows of weight [D, N], D >= 2: a differentiable scalar.

    1 where all rows are parallel, least (-1 / (D - 1)) where unit rows sum to zero. A zero row has cosine 0 with
    everything and gets no gradient. Raises TypeError or ValueError for a tensor that is no such matrix.
    """
    _check("weight", weight, 2)
    if weight.dim() != 2 or weight.shape[0] < 2:
        raise ValueError(f"weight must have shape [D, N] with D >= 2, got {list(weight.shape)}")
    D = weight.shape[0]
    some = (weight != 0).any(dim=1, keepdim=True)
    # The norm of a zero row has no gradient: its unit is computed from a row of ones and then set to zero.
    rows = torch.where(some, weight / power_of_two(weight), 1.0)
    unit = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True) * some
    return (unit.sum(dim=0).square().sum() - unit.square().sum()) / (D * (D - 1))


def activation_entropy_loss(activation: Tensor) -> Tensor:
    """Negative entropy (nats) of how a batch's activity spreads over features, activation [..., D]: a scalar.

    p[d] = mean over samples of |activation[., d]|, normalized to sum 1. Least (-log D) where all features are equally
    active, 0 where one is. A feature without activity counts 0 and gets no gradient; so does an all-zero batch.
    """
    _check("activation", activation, 1)
    activity = activation.abs().reshape(-1, activation.shape[-1]).sum(dim=0)
    total = activity.sum()
    share = activity / torch.where(total > 0, total, 1.0)
    some = share > 0
    # torch.where differentiates both branches: the log of 0 in the one not taken would make the gradient NaN.
    return (share * torch.where(some, share, 1.0).log()).sum()
