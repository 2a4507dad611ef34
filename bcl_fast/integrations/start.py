"""What both callbacks do as a training starts."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ..attach import bind_optimizer
from ..bound import holders, optimizers_of
from ..layer import BCLLayer
from ..meter import bcl_layers
from ..spec import check_number, listed


def check_arguments(every: int, out: str | Path | None) -> None:
    """Those of a callback, before a training starts."""
    check_number("every", every, low=0, integer=True)
    if every == 0 and out is not None:
        raise ValueError(f"out needs steps that are measured, every >= 1, got {out!r} with every=0")


def bind_layers(model: Any, optimizer: Any) -> dict[str, BCLLayer]:
    """Bind every BCLLayer to the optimizer that holds its weight; returns those that none holds yet.

    Frozen layers may join an optimizer later. Others without one are pulled by every backward: a warning names them.
    What somebody has written into a layer's state past its versions, as averaging callbacks do, is looked at.

    Raises as `attach.bind_optimizer` does, where no layer is bound that is trained.
    """
    layers = bcl_layers(model)
    held = holders(layers, optimizers_of(optimizer))
    without = {name: layer for name, layer in layers.items() if name not in held}
    pulled = [name for name, layer in without.items() if layer.weight.requires_grad]
    if held or pulled or not layers:
        bind_optimizer(model, optimizer)
    if pulled:
        warnings.warn(
            f"no optimizer holds the weights of {listed(pulled)}: every backward pulls them all the "
            "same; requires_grad_(False) makes a layer an nn.Linear, frozen=True stops its pull",
            stacklevel=2,
        )
    for layer in layers.values():
        layer._look_at_state(layer.weight)
    return without
