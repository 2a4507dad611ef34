"""A training step outside compilers: its stages in one call each, where the backend has one, else by the operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, operators
from .structures import PackedPull, PackedStatistics, Pull, Statistics, unpacked


def statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Tensor, *state: Any
) -> Statistics | PackedStatistics:
    """What the operator `statistics_` makes of these arguments, which are its own; `state` from `neighbors` on."""
    neighbors, *_, backend, config = state
    if backend not in backends.WHOLE or not operators.can_bypass_dispatcher(x):
        return Statistics(*operators.call("statistics_", x, weight, bias, activation, *state))
    ticket = operators.begin_(x, weight, activation, *state)
    return backends.stage("forward", backend)(x, weight, bias, activation, neighbors, ticket, config)


def pull_(
    weight: Tensor,
    som_offset: Tensor | None,
    step: Tensor,
    som_lr: Tensor,
    target_projection: str,
    backend: str,
    pull: Pull | PackedPull,
) -> None:
    """What the operator `targets_pull_` does with these arguments."""
    one_call = isinstance(pull, PackedPull) and backend in backends.WHOLE and target_projection == "none"
    if one_call and backends.stage("pull_", backend)(weight, som_offset, step, som_lr, pull):
        torch.autograd.graph.increment_version((weight if som_offset is None else som_offset, step))
    else:
        arguments = weight, som_offset, step, som_lr, target_projection, backend, unpacked(pull)
        operators.call("targets_pull_", *arguments)
