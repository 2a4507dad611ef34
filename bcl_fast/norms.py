"""Norms in all of a dtype's range: a square leaves it at the root of its largest number, and so would a norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .spec import EPS


def power_of_two(rows: Tensor) -> Tensor:
    """A power of two near the largest magnitude of each row of [R, N] -> [R, 1].

    A row divided by it has the same digits, and squares that are in range; infinities and NaN stay what they are.
    """
    if rows.shape[1] == 0:
        return rows.new_ones(rows.shape[0], 1)
    half, limits = rows.detach().abs().amax(dim=1, keepdim=True) / 2, torch.finfo(rows.dtype)
    return half.clamp(limits.tiny, limits.max / 2).log2().floor().exp2()


def with_norms(rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """rows [R, N] -> rows and |row| + EPS [R, 1], both divided by powers of two, and these [R, 1] (None: all are 1)."""
    if rows.device.type == "cpu":  # on another device the look at the sum would wait for it
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        if math.isfinite(norm.sum()):  # then every square is in range
            return rows, norm.add_(EPS), None
    power = power_of_two(rows)
    rows = rows / power
    return rows, torch.linalg.vector_norm(rows, dim=1, keepdim=True) + EPS / power, power


def shortened(vector: Tensor) -> Tensor:
    """vector [N] times a power of two that makes it so short that no sum of products with it leaves the range."""
    return vector / power_of_two(vector[None])[0] * 2.0**-20
