"""A layer as a plain `nn.Linear`, and under tools that rewrite programs: torch.fx records calls, torch.jit compiles."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def plain(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """An `nn.Linear` on these Parameters, [D, N] and [D]."""
    D, N = weight.shape
    linear = nn.Linear(N, D, bias is not None, device="meta")  # no random numbers are drawn there
    linear.weight = weight
    linear.register_parameter("bias", bias)
    return linear


def traced_by_fx(layer: nn.Linear, som_offset: Tensor | None, input: Any) -> Any:
    """A node that calls this layer, as for any module of torch.nn: the graph then trains and evaluates as here.

    Quantization, which knows no such module, gets the product itself in eval().
    """
    name = input.tracer.path_of_module(layer)
    quantizes = hasattr(input.tracer, "skipped_module_names")
    if name and (layer.training or not quantizes):
        return input.tracer.create_proxy("call_module", name, (input,), {})
    if layer.training:
        raise RuntimeError("torch.fx traces a BCLLayer in training as part of a model only: call eval() before")
    return F.linear(input, layer.weight if som_offset is None else layer.weight + som_offset, layer.bias)


def scriptable(layer: nn.Linear, som_offset: Tensor | None) -> nn.Linear:
    """What torch.jit.script compiles instead of this layer."""
    if layer.training:
        raise RuntimeError("torch.jit.script has no gradient mask and no pull: call eval() before")
    weight = layer.weight if som_offset is None else nn.Parameter(layer.weight.detach() + som_offset)
    return plain(weight, layer.bias).eval()


def called_not_read(module: nn.Module, input: tuple[Any, ...]) -> None:
    """A hook whose presence is all: nn.TransformerEncoderLayer then calls a layer, and does not read its weight."""
