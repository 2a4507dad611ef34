"""`target_projection` of SPEC section 3, in place: formed once after the stage `targets`, whoever serves that."""

from __future__ import annotations

import torch
from torch import Tensor

from .norms import shortened


def project_(som_target: Tensor, target_projection: str) -> Tensor:
    """som_target [D, N] without what all of its rows share, as `reference.project` has it."""
    if target_projection == "none":
        return som_target
    mean = som_target.mean(dim=0)
    if target_projection == "centered":
        return som_target.sub_(mean)
    mean = shortened(mean)  # its length does not matter
    square = mean @ mean
    return som_target.addr_(som_target @ mean / torch.where(square > 0, square, 1.0), mean, alpha=-1)
