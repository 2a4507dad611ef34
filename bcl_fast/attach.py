"""Layers of an existing model made to compete, bound to its optimizer, and made plain again (SPEC section 5)."""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .bound import Optimizers, holders, optimizers_of
from .layer import BCLLayer
from .pulls import Pulls
from .spec import listed
from .state import has_numbers
from .transforms import called_not_read

# The dicts in which a module keeps its hooks. Handles refer to the dicts, so that another module may take them over.
_HOOKS = """
    _forward_hooks _forward_hooks_with_kwargs _forward_hooks_always_called _forward_pre_hooks
    _forward_pre_hooks_with_kwargs _backward_hooks _backward_pre_hooks _is_full_backward_hook
    _state_dict_hooks _state_dict_pre_hooks _load_state_dict_pre_hooks _load_state_dict_post_hooks
""".split()
# Classes that read the weights of linear layers of theirs and never call them: package and class, names of the layers.
# By name, since neither torchvision nor transformers is imported here.
_READERS = {
    "torch MultiheadAttention": "out_proj",
    "torch LinearCrossEntropyLoss": "linear",
    "torchvision ShiftedWindowAttention": "qkv proj",
    "torchvision ShiftedWindowAttention3d": "qkv proj",
    "transformers ConditionalDetrMHAttentionMap": "k_proj",
    "transformers DabDetrMHAttentionMap": "k_linear",
    "transformers DetrMHAttentionMap": "k_proj",
    "transformers FalconMambaMixer": "dt_proj",
    "transformers JambaMambaMixer": "dt_proj",
    "transformers LayoutLMv2Encoder": "rel_pos_bias rel_pos_x_bias rel_pos_y_bias",
    "transformers LongcatFlashTopkRouter": "classifier",
    "transformers MambaMixer": "dt_proj",
    "transformers MaskFormerDetrMHAttentionMap": "k_proj",
    "transformers MobileBertLMPredictionHead": "dense decoder",
    "transformers NeoMMEForMaskedLM": "unembedding_projection",
    "transformers TDNNLayer": "kernel",
    "transformers WavLMAttention": "q_proj k_proj v_proj out_proj",
}
# What a class or an object may have of its own that no other layer would do.
_METHODS = """
    forward __call__ _call_impl get_extra_state set_extra_state _save_to_state_dict _load_from_state_dict
""".split()
_TENSORS = {"weight", "bias", "neighbors", "step", "_refreshed_at", "som_offset"}  # of both kinds of layers
_Place = tuple[nn.Module, str]  # a module, and the name of one of its children
Predicate = Callable[[str, nn.Linear], bool]


class _Swap(NamedTuple):
    """A plain layer and the BCLLayer that stands in for it."""

    name: str
    places: list[_Place]
    linear: nn.Linear
    layer: BCLLayer


class AttachedBCL:
    """What `attach_bcl` returns: the BCLLayers in the model, and the way back.

    Attributes:
        layers: name -> BCLLayer, in the order of the model; a layer that has several names has the first one chosen.
    """

    def __init__(self, model: nn.Module, swaps: list[_Swap]) -> None:
        self._model, self._swaps = model, swaps
        self.layers = {swap.name: swap.layer for swap in swaps}

    @property
    def layer(self) -> BCLLayer:
        """The attached layer, where it is one; a ValueError that names them where they are several."""
        if len(self.layers) > 1:
            raise ValueError(f"layer is for a single attached layer, got {listed(self.layers)}: use layers[name]")
        return self._swaps[0].layer

    def __repr__(self) -> str:
        return f"AttachedBCL({listed(self.layers)})"

    def bind_optimizer(self, optimizer: Optimizers) -> list[str]:
        """Bind all layers, as `BCLLayer.bind_optimizer` does, of several optimizers each to the one with its weight.

        Returns their names. Raises ValueError, and binds none, where the weight of a layer is held by none of them, or
        by two.
        """
        return _bind(self.layers, optimizer, every=True)

    def remove(self) -> None:
        """Put the plain layers back, with the trained weights (plus the SOM offset). A second call does nothing.

        What somebody has put in their places since then stays. Raises as `detach_bcl` does, with the model untouched.
        """
        left = []
        for swap in self._swaps:
            places = [(parent, name) for parent, name in swap.places if parent._modules.get(name) is swap.layer]
            left += [swap._replace(places=places)] if places else []
        _make_plain(self._model, left)


def attach_bcl(model: nn.Module, name: str | Iterable[str] | Predicate, **arguments: Any) -> AttachedBCL:
    """Replace `nn.Linear` layers in `model` by BCLLayers on the same parameters.

    `name` is the name of one, such as "encoder.0", several names, or a predicate `(name, linear) -> bool` that is
    asked about every `nn.Linear` inside the model. `arguments` are those of `BCLLayer.from_linear`. The model's
    optimizer stays valid, every place that holds a layer gets the new one, and hooks and attributes go along.

    Raises, and leaves the model as it was: TypeError or ValueError for an argument or option that is wrong; ValueError
    for names that are no `nn.Linear` inside the model (and lists those that are), are given twice or none at all; and
    for layers that no BCLLayer can stand in for, each with its reason (`GUIDE.md` lists them).
    """
    linears = {n: m for n, m in model.named_modules(remove_duplicate=False) if n and isinstance(m, nn.Linear)}
    names = _names(linears, name)
    BCLLayer.from_linear(nn.Linear(2, 2, device="meta"), **arguments)  # raises what is wrong for every layer
    chosen: dict[nn.Linear, str] = {}
    for each, linear in linears.items():
        if each in names:
            chosen.setdefault(linear, each)
    swaps, refused, places = [], {}, _places(model)
    try:
        for linear, key in chosen.items():
            reason = _why_not_attach(linear, places[linear])
            if reason is None:
                try:
                    swaps.append(_Swap(key, places[linear], linear, BCLLayer.from_linear(linear, **arguments)))
                except (TypeError, ValueError) as error:  # such as a single feature, or a dtype of no backend
                    reason = f"cannot compete: {error}"
            if reason is not None:
                refused[key] = reason
        unknown = [n for n in names if n not in linears]
        if unknown or refused:
            raise _refusal(linears, unknown, refused)
    except BaseException:
        for swap in swaps:
            swap.layer._pulls.release()
        raise
    for swap in swaps:
        _exchange(swap.places, swap.linear, swap.layer)
    return AttachedBCL(model, swaps)


def detach_bcl(model: nn.Module) -> list[str]:
    """Replace every BCLLayer inside `model`, attached or built so, by an `nn.Linear` on the same parameters.

    It computes what the layer did in `eval()`: a SOM offset is added to the weight, in place, so that the optimizer
    stays valid and continues as for an `nn.Linear` that never competed. Mode and users' hooks and attributes are kept,
    every place that holds a layer gets the new one, bindings end, and pulls that wait for a step are dropped. Modules
    that wrap others (DistributedDataParallel, torch.compile) are looked into.

    Returns the names of the layers replaced, of several names the first one, in the order of the model; none, where
    there is no BCLLayer. Raises ValueError, and leaves the model as it was, where `model` is a BCLLayer itself, and for
    layers whose place no `nn.Linear` can take, each with its reason: methods of its own, a parametrized weight, a
    module compiled by itself, an offset on a weight that another module has too.
    """
    if isinstance(model, BCLLayer):
        raise ValueError("model must hold BCLLayers inside, got a BCLLayer itself: its to_linear() is an nn.Linear")
    layers, places, swaps = layers_of(model), _places(model), []
    for name, layer in layers.items():
        linear = nn.Linear(layer.in_features, layer.out_features, device="meta")  # without parameters of its own
        swaps.append(_Swap(name, places[layer], linear, layer))
    _make_plain(model, swaps)
    return list(layers)


def bind_optimizer(model: nn.Module, optimizer: Optimizers) -> list[str]:
    """Bind every BCLLayer of `model` whose weight `optimizer` holds to it (see `BCLLayer.bind_optimizer`).

    `optimizer` may be several, such as `[generator_optimizer, discriminator_optimizer]`: each layer is bound to the one
    that holds its weight. Wrappers that hold their optimizer as `.optimizer` (accelerate, Lightning) may be given.

    Returns the names of the layers bound, in the order of the model. Raises ValueError, and binds none, where no weight
    of a BCLLayer is held, or one by two optimizers; TypeError for what is no optimizer.
    """
    return _bind(layers_of(model), optimizer, every=False)


# --- Names and places ------------------------------------------------------------------------------------------------


def layers_of(model: nn.Module) -> dict[str, BCLLayer]:
    """Every BCLLayer of a model, and the model itself if it is one, by its name in there."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    return {name: module for name, module in model.named_modules() if isinstance(module, BCLLayer)}


def _places(model: nn.Module) -> dict[nn.Module, list[_Place]]:
    """Every module inside `model`, with all places that hold it."""
    found: dict[nn.Module, list[_Place]] = defaultdict(list)
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is not None:
                found[child].append((parent, key))
    return found


def _names(linears: dict[str, nn.Linear], name: Any) -> list[str]:
    """The names that the argument `name` of `attach_bcl` stands for."""
    allowed = "name must be a str, several, or a predicate (name, linear) -> bool"
    if isinstance(name, str):
        return [name]
    if isinstance(name, (type, nn.Module)):  # which can be called, too
        raise TypeError(f"{allowed}, got {name!r}")
    if callable(name):
        names = []
        for each, linear in linears.items():
            answer = name(each, linear)
            if not isinstance(answer, bool):
                raise TypeError(f"name must be a predicate that returns True or False, got {answer!r} for {each!r}")
            names += [each] if answer else []
    elif isinstance(name, Iterable):
        names = list(name)
        for each in names:
            if not isinstance(each, str):
                raise TypeError(f"{allowed}, got {each!r} among them")
        if twice := [each for each in dict.fromkeys(names) if names.count(each) > 1]:
            raise ValueError(f"name must hold each name once, got {listed(twice)} several times")
    else:
        raise TypeError(f"{allowed}, got {name!r}")
    if not names:
        raise ValueError(f"name must choose an nn.Linear inside the model, of {list(linears)}, got {name!r}: none")
    return names


def _refusal(linears: dict[str, nn.Linear], unknown: list[str], refused: dict[str, str]) -> ValueError:
    found = []
    if unknown:
        found.append(f"be an nn.Linear inside the model, one of {list(linears)}, got {listed(unknown)}")
    if refused:
        reasons = "; ".join(f"{name!r} {reason}" for name, reason in refused.items())
        found.append(f"be a plain nn.Linear that is called, but {reasons}")
    return ValueError("name must " + ", and ".join(found))


# --- What cannot be exchanged ----------------------------------------------------------------------------------------


def _why_not_attach(linear: nn.Linear, places: list[_Place]) -> str | None:
    """Why a BCLLayer in these places would not compute what `linear` does, or None."""
    if isinstance(linear, BCLLayer):
        return "is a BCLLayer already"
    if isinstance(linear, nn.modules.lazy.LazyModuleMixin):
        return f"is a {type(linear).__name__} without a weight yet: run the model once before"
    for parent, key in places:
        for kind in type(parent).__mro__:
            if key in _READERS.get(f"{kind.__module__.partition('.')[0]} {kind.__name__}", "").split():
                return f"belongs to a {kind.__name__}, which reads its weight and never calls it"
    own = vars(linear).keys() - _usual(nn.Linear)
    if used := sorted(name for name in own if name in _usual(BCLLayer) or hasattr(BCLLayer, name)):
        return f"has attributes {listed(used)}, which mean something else on a BCLLayer"
    return _why_fixed(linear, places, nn.Linear)


def _why_fixed(module: nn.Linear, places: list[_Place], kind: type[nn.Linear]) -> str | None:
    """Why another layer in these places could not do all that `module` does, which is to be a `kind`; or None."""
    if not {"weight", "bias"} <= module._parameters.keys():
        return "is parametrized (weight_norm, spectral_norm, prune, ...): make that permanent, or remove it, before"
    for name in _METHODS:
        if getattr(type(module), name) is not getattr(kind, name) or name in module.__dict__:
            return f"is a {type(module).__name__} with a {name} of its own"
    if more := {*module._parameters, *module._buffers, *module._modules} - _TENSORS:
        return f"holds {listed(sorted(more))}, which would be lost"
    if hasattr(module.weight, "device_mesh"):
        return "has a weight that is spread over ranks (FSDP, DTensor, tensor parallelism)"
    if any(key == "_orig_mod" and type(parent).__name__ == "OptimizedModule" for parent, key in places):
        return "is compiled by itself, by a torch.compile that goes on calling it: exchange it first, then compile"
    return None


def _why_not_detach(model: nn.Module, swap: _Swap) -> str | None:
    """Why an `nn.Linear` in the places of a BCLLayer would not compute what that does, or would do more; or None."""
    reason, layer = _why_fixed(swap.layer, swap.places, BCLLayer), swap.layer
    if reason is None and layer.som_offset is not None:
        for name, module in model.named_modules():
            for key, parameter in module._parameters.items():
                if module is not layer and parameter is not None and _is_same(parameter, layer.weight):
                    other = f"{name}.{key}".lstrip(".")
                    return (
                        f"has an offset to add to its weight, which is that of {other!r} too and would change there: "
                        "give one of them a copy of its own before"
                    )
    return reason


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, or one piece of memory."""
    if one is other:
        return True
    if not (has_numbers(one) and has_numbers(other) and one.layout == other.layout == torch.strided):
        return False
    return one.device == other.device and one.is_set_to(other)


# --- The exchange ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _make_plain(model: nn.Module, swaps: list[_Swap]) -> None:
    """Put the plain layers in the places of the BCLLayers, on their weights and with their offsets; all, or none."""
    reasons = ((swap.name, _why_not_detach(model, swap)) for swap in swaps)
    refused = "; ".join(f"{name!r} {reason}" for name, reason in reasons if reason is not None)
    if refused:
        raise ValueError(f"model must hold BCLLayers whose places an nn.Linear can take, but {refused}")
    weights = [swap.layer.effective_weight for swap in swaps]  # all, since one whose offset is wrong raises
    for (_, places, linear, layer), weight in zip(swaps, weights, strict=True):
        linear.weight, linear.bias = layer.weight, layer.bias
        if layer.som_offset is not None:
            linear.weight.copy_(weight)
            layer.som_offset.zero_()  # the layer, if somebody keeps it, computes what it did
        layer._pulls.release()
        layer._pulls = Pulls(layer)  # unknown to backwards of forwards before, which then pull nothing
        for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is called_not_read]:
            del layer._forward_pre_hooks[key]
        _exchange(places, layer, linear.train(layer.training))
    for module in model.modules():  # the buffers that this knows of would be none only after a forward that fails
        if isinstance(module, nn.parallel.DistributedDataParallel):
            left = {id(buffer) for buffer in module.module.buffers()}
            module.modules_buffers = [buffer for buffer in module.modules_buffers if id(buffer) in left]


def _exchange(places: list[_Place], old: nn.Module, new: nn.Module) -> None:
    """Put `new` in all places of `old`, with the hooks and the attributes that users have put on it."""
    for name in _HOOKS:
        hooks, own = getattr(old, name), getattr(new, name)
        if isinstance(own, dict):
            mine = {key: hook for key, hook in own.items() if key not in hooks}
            setattr(new, name, hooks)
            setattr(old, name, type(own)())
            hooks.update(mine)
        else:
            setattr(new, name, hooks)
    hooks_of_loading: dict[int, Any] = new._load_state_dict_pre_hooks
    for hook in hooks_of_loading.values():
        if getattr(hook, "with_module", False) and hook.module() is old:  # torch's, the only kind that holds its module
            hook.module = weakref.ref(new)
    vars(new).update({name: vars(old)[name] for name in vars(old).keys() - _usual(BCLLayer)})
    for parent, name in places:
        parent._modules[name] = new  # a __setattr__ of its own might raise, and leave half of them exchanged


@functools.cache
def _usual(kind: type[nn.Linear]) -> frozenset[str]:
    """What is in the dict of a layer of this kind by itself, and what calls that very object."""
    return frozenset({*vars(kind(1, 2, device="meta")), *_METHODS, "_compiled_call_impl"})


# --- Optimizers ------------------------------------------------------------------------------------------------------


def _bind(layers: dict[str, BCLLayer], optimizer: Any, every: bool) -> list[str]:
    """Bind each layer to the optimizer that holds its weight; with `every`, it is an error where none does."""
    optimizers = optimizers_of(optimizer)
    if not layers:
        raise ValueError("model must have a BCLLayer to bind, got none")
    found = holders(layers, optimizers)
    without = [name for name in layers if name not in found]
    if not found or (every and without):
        needed = "the weights of all attached layers" if every else "the weight of a BCLLayer of the model"
        kinds = ", ".join(type(each).__name__ for each in optimizers) or "no optimizer"
        raise ValueError(f"optimizer must hold {needed}, got {kinds} without {listed(without)}")
    for name, each in found.items():
        layers[name].bind_optimizer(each)
    return list(found)
