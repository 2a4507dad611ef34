"""`attach_bcl`: a layer of an existing model made to compete, and back (SPEC section 5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .layer import BCLLayer
from .transforms import called_not_read

# The dicts in which a module keeps its hooks. Handles refer to the dicts, so that another module may take them over.
_HOOKS = """
    _forward_hooks _forward_hooks_with_kwargs _forward_hooks_always_called _forward_pre_hooks
    _forward_pre_hooks_with_kwargs _backward_hooks _backward_pre_hooks _is_full_backward_hook
    _state_dict_hooks _state_dict_pre_hooks _load_state_dict_pre_hooks _load_state_dict_post_hooks
""".split()
# Modules of torch and torchvision that read the weights of their own linear layers and never call them, by name.
_READERS = """
    MultiheadAttention LinearCrossEntropyLoss ShiftedWindowAttention ShiftedWindowAttentionV2
    ShiftedWindowAttention3d
""".split()
_Place = tuple[nn.Module, str]  # a module, and the name of one of its children


class AttachedBCL:
    """What `attach_bcl` returns: `.layer`, the BCLLayer in the model, and `.remove()`."""

    def __init__(self, places: list[_Place], linear: nn.Linear, layer: BCLLayer) -> None:
        self._places, self._linear = places, linear
        self.layer = layer
        _exchange(places, linear, layer)

    @torch.no_grad()
    def remove(self) -> None:
        """Put the plain `nn.Linear` back, with the trained weight (plus the SOM offset). A second call does nothing."""
        layer, linear = self.layer, self._linear
        places = [(parent, name) for parent, name in self._places if parent._modules.get(name) is layer]
        if not places:
            return
        linear.weight, linear.bias = layer.weight, layer.bias
        if layer.som_offset is not None:
            linear.weight.add_(layer.som_offset)
        layer._pulls.release()
        for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is called_not_read]:
            del layer._forward_pre_hooks[key]
        _exchange(places, layer, linear.train(layer.training))


def _exchange(places: list[_Place], old: nn.Module, new: nn.Module) -> None:
    """Put `new` in all places of `old`, with the hooks that users have put on it."""
    for name in _HOOKS:
        hooks, own = getattr(old, name), getattr(new, name)
        if isinstance(own, dict):
            mine = {key: hook for key, hook in own.items() if key not in hooks}
            setattr(new, name, hooks)
            setattr(old, name, type(own)())
            hooks.update(mine)
        else:
            setattr(new, name, hooks)
    for parent, name in places:
        setattr(parent, name, new)


def attach_bcl(model: nn.Module, name: str, **arguments: Any) -> AttachedBCL:
    """Replace the `nn.Linear` called `name` in `model`, such as "encoder.0", by a BCLLayer on the same parameters.

    `arguments` are those of `BCLLayer.from_linear`. The model's optimizer stays valid, every place that holds the layer
    gets the new one, and hooks go along. Raises ValueError for a name that is not an `nn.Linear` inside `model`, and
    lists those that are; and for what is no plain product, or is never called: a BCLLayer, a class with a forward of
    its own, a parametrized, pruned or lazy weight, the layers that nn.MultiheadAttention and its like read.
    """
    linears = {n: m for n, m in model.named_modules(remove_duplicate=False) if n and isinstance(m, nn.Linear)}
    if name not in linears:
        raise ValueError(f"name must be an nn.Linear inside the model, one of {list(linears)}, got {name!r}")
    linear = linears[name]
    places = [(parent, key) for parent in model.modules() for key, child in parent._modules.items() if child is linear]
    if (reason := _why_not(linear, places)) is not None:
        raise ValueError(f"name must be a plain nn.Linear that is called, but {name!r} {reason}")
    return AttachedBCL(places, linear, BCLLayer.from_linear(linear, **arguments))


def _why_not(linear: nn.Linear, places: list[_Place]) -> str | None:
    """Why a BCLLayer in these places would not compute what `linear` does, or None."""
    kind = type(linear)
    if isinstance(linear, BCLLayer):
        return "is a BCLLayer already"
    if isinstance(linear, nn.modules.lazy.LazyModuleMixin):
        return f"is a {kind.__name__} without a weight yet: run the model once before"
    if not {"weight", "bias"} <= linear._parameters.keys():
        return "is parametrized (weight_norm, spectral_norm, prune, ...): make that permanent, or remove it, before"
    if kind.forward is not nn.Linear.forward or "forward" in linear.__dict__:
        return f"is a {kind.__name__} with a forward of its own"
    readers = [c.__name__ for parent, _ in places for c in type(parent).__mro__ if c.__name__ in _READERS]
    return f"belongs to a {readers[0]}, which reads its weight and never calls it" if readers else None
