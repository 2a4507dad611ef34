"""A captured training step: forward, backward, pull and optimizer as one CUDA graph that is replayed."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import backends, operators
from .checks import ranks
from .layer import BCLLayer
from .spec import check_number

Loss = Callable[..., Tensor]
DEVICE_TYPE = "cuda"

AGAIN = (
    "call bcl_fast.graphed again (a learning rate that is to change must be a tensor on the device, as "
    "Adam(capturable=True) and SGD(fused=True) take it)"
)
EVERY_STEP = "a step changes it on the host, which no replay would repeat: a CUDA graph cannot hold such a step"


def graphed(
    model: nn.Module, loss_function: Loss, optimizer: torch.optim.Optimizer, *examples: Tensor, warmup: int = 3
) -> GraphedStep:
    """Capture whole training steps of a model with BCLLayers in a CUDA graph: one launch instead of dozens.

    Args:
        model: on one CUDA device; its BCLLayers served by `triton` or `cuda`, and unbound or bound to `optimizer`.
        loss_function: `loss_function(model, *inputs)` returns the loss, a scalar. No replay runs its Python; autocast
            belongs inside it. What it trains is in `model` or in `optimizer`.
        optimizer: one that a CUDA graph can replay, such as SGD or Adam(capturable=True).
        examples: tensors on that device like those of every later call, whose shapes and dtypes are then fixed.
        warmup: eager steps before the capture (>= 1), which compile what there is to compile.

    Returns `step`: `step(*inputs) -> loss` does what `optimizer.zero_grad()`, `loss_function`, `backward()` and
    `optimizer.step()` would do. Inputs, from any device, are copied to where the graph reads them; the loss is a copy.
    Warm-up and capture leave parameters, buffers, the optimizer and torch's random numbers as they were: n calls train
    like n eager steps (the first is one, where the optimizer has no state yet). Before the call drop earlier losses and
    outputs of the model: as long as one lives, its graph ties the parameters to another stream. Every replay reads the
    layers' `som_lr`, and a learning rate that is a tensor on the device.

    Raises TypeError or ValueError that names the argument, and RuntimeError for what no graph can hold: several ranks,
    observers, an optimizer that counts on the host or replaces its tensors. A later step raises RuntimeError where
    something has changed that the graph does not see: `train()` or `eval()`, `frozen`, observers, a number of the
    optimizer, a parameter, buffer or optimizer state that another tensor has replaced.
    """
    return GraphedStep(model, loss_function, optimizer, examples, warmup)


class GraphedStep:
    """What `graphed` returns: call it with the inputs of a step."""

    def __init__(
        self,
        model: nn.Module,
        loss_function: Loss,
        optimizer: torch.optim.Optimizer,
        examples: tuple[Tensor, ...],
        warmup: int,
    ) -> None:
        device = _checked(model, loss_function, optimizer, examples, warmup)
        self._model, self._loss_function, self._optimizer, self._device = model, loss_function, optimizer, device
        self._inputs = [example.clone() for example in examples]
        before, snapshot = self._host_side(), _Snapshot(model, optimizer)
        try:
            self._warm_up(True)
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                aside(device, lambda: [self._train() for _ in range(warmup)])
                optimizer.zero_grad(set_to_none=True)  # the graph's gradients need memory of its own
                self._expected = self._host_side()
                self._replay, self._loss = record(device, self._train)
            self._require(self._expected, EVERY_STEP)
            self._gradients = [(p, p.grad) for p in snapshot.parameters if p.grad is not None]
            self._adding = [(p, p.grad) for p, _ in snapshot.gradients if p.grad is not None]
            self._written = [*snapshot.parameters, *model.buffers()]
            # Only its own first step knows how an optimizer's state begins. Where there is none yet, that step is taken
            # eagerly, and its state is copied to the tensors on which the graph works.
            self._begun = not (self._expected.keys() - before.keys())
            self._state = {p: dict(state) for p, state in optimizer.state.items()}
        finally:
            self._warm_up(False)
            snapshot.restore()
        self._before = before

    def __call__(self, *inputs: Tensor) -> Tensor:
        self._check_inputs(inputs)
        self._require(self._expected if self._begun else self._before, AGAIN)
        for place, given in zip(self._inputs, inputs, strict=True):
            place.copy_(given)
        if not self._begun:
            return self._begin()
        with torch.no_grad():
            for parameter, gradient in self._adding:  # what the optimizer does not know adds up, from what it is
                if parameter.grad is not gradient:
                    gradient.zero_() if parameter.grad is None else gradient.copy_(parameter.grad)
        self._replay()
        torch.autograd.graph.increment_version(self._written)  # autograd, and counters read on the host, must see it
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._loss.clone()

    def _warm_up(self, begins: bool) -> None:
        for module in self._model.modules():
            if isinstance(module, BCLLayer):
                module._warming_up = begins

    @torch.enable_grad()
    def _train(self) -> Tensor:
        """One step on the inputs as copied, with gradients enabled whatever the caller's mode."""
        self._optimizer.zero_grad(set_to_none=True)
        torch.clear_autocast_cache()  # an autocast around the call keeps the casts of the step before
        with operators.no_autocast(self._device.type):
            loss = self._loss_function(self._model, *self._inputs)
        torch.clear_autocast_cache()
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            got = f"{list(loss.shape)} without a gradient" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"loss_function must return a scalar tensor that needs a gradient, got {got}")
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def _begin(self) -> Tensor:
        """The first step of an optimizer without a state; its results are then moved to the graph's own tensors."""
        loss = self._train().clone()
        with torch.no_grad():
            for parameter, made in self._optimizer.state.items():
                for key, value in made.items():
                    if isinstance(value, Tensor):
                        made[key] = self._state[parameter][key].copy_(value)
            for parameter, gradient in self._gradients:
                if parameter.grad is not gradient:
                    parameter.grad = gradient.copy_(parameter.grad)
        self._begun = True
        return loss

    def _check_inputs(self, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs) != len(self._inputs):
            raise TypeError(f"inputs must be {len(self._inputs)} tensors as the examples are, got {len(inputs)}")
        for i, (place, given) in enumerate(zip(self._inputs, inputs, strict=True)):
            _check_tensor(f"inputs[{i}]", given)
            if given.shape != place.shape or given.dtype != place.dtype:
                raise ValueError(
                    f"inputs[{i}] must have shape {list(place.shape)} and dtype {place.dtype} as its example has, "
                    f"got {list(given.shape)} and {given.dtype}"
                )

    def _require(self, expected: dict[str, Any], otherwise: str) -> None:
        """Raise a RuntimeError that names what has changed."""
        now = self._host_side()
        if now == expected:
            return
        for name in (*now, *expected):
            is_now, was = (each.get(name, "missing") for each in (now, expected))
            if is_now != was:
                another = isinstance(is_now, _Place) and isinstance(was, _Place) and is_now.pointer != was.pointer
                change = "is another tensor" if another else f"is {is_now!r} and was {was!r}"
                raise RuntimeError(f"{name} {change}: {otherwise}")

    def _host_side(self) -> dict[str, Any]:
        """What a graph takes from the host at its capture, by name: numbers, and where the device's tensors lie."""
        found: dict[str, Any] = {}
        for path, module in self._model.named_modules():
            name = f"model.{path}" if path else "model"
            found[f"{name}.training"] = module.training
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                found[f"{name}.{key}"] = self._seen(tensor)
            if isinstance(module, BCLLayer):
                found[f"{name}.frozen"] = module.frozen
                found[f"{name}.som_lr's place"] = self._seen(module._som_lr_cell)
                found[f"{name}'s number of observers"] = len(module._observers)
                found[f"{name}'s being bound to the optimizer"] = module.bound_optimizer is self._optimizer
        for g, group in enumerate(self._optimizer.param_groups):
            name = f"optimizer.param_groups[{g}]"
            for key, value in group.items():
                if key not in ("params", "initial_lr"):  # the latter is a scheduler's own
                    found[f"{name}[{key!r}]"] = self._seen(value)
            for i, parameter in enumerate(group["params"]):
                found[f"{name}['params'][{i}]"] = self._seen(parameter)
                for key, value in self._optimizer.state.get(parameter, {}).items():
                    found[f"optimizer.state of {name}['params'][{i}], {key!r},"] = self._seen(value)
        return found

    def _seen(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        on_device = value.device == self._device
        if not on_device:
            return value.tolist()
        return _Place(value.data_ptr(), value.requires_grad, value.dtype, value.shape, value.stride())


class _Place(NamedTuple):
    """Where a tensor on the device lies, which is all that a graph knows of it."""

    pointer: int
    requires_grad: bool
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]


class _Snapshot:
    """The numbers of a model and of its optimizer, to be restored in place."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        self.parameters = list(dict.fromkeys([*model.parameters(), *trained]))
        self._tensors = [(t, t.detach().clone()) for t in (*self.parameters, *model.buffers())]
        # Those that the optimizer does not know keep adding up their gradients.
        rest = set(self.parameters) - set(trained)
        self.gradients = [(p, None if p.grad is None else p.grad.clone()) for p in self.parameters if p in rest]
        self._numbers = [
            {key: copy(value) for key, value in group.items() if key != "params" and not isinstance(value, Tensor)}
            for group in optimizer.param_groups
        ]
        self._states = {
            p: {key: (value, value.clone() if isinstance(value, Tensor) else copy(value)) for key, value in s.items()}
            for p, s in optimizer.state.items()
        }

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, value in self._tensors:
            tensor.copy_(value)
        for parameter, gradient in self.gradients:
            if parameter.grad is not None:
                parameter.grad.zero_() if gradient is None else parameter.grad.copy_(gradient)
        for group, numbers in zip(self._optimizer.param_groups, self._numbers, strict=True):
            group.update(numbers)
        self._optimizer.state.clear()
        for parameter, state in self._states.items():
            self._optimizer.state[parameter] = {
                key: place.copy_(value) if isinstance(place, Tensor) else value for key, (place, value) in state.items()
            }


# --- The arguments ---------------------------------------------------------------------------------------------------


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a tensor (anything else would be captured as it is), got {type(value).__name__}"
        )
    if value.requires_grad:
        raise ValueError(f"{name} must not need a gradient: inputs are data; got requires_grad=True")


def _checked(model: Any, loss_function: Any, optimizer: Any, examples: tuple[Any, ...], warmup: Any) -> torch.device:
    """The device of the training step, or an error that names the argument."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(loss_function):
        raise TypeError(f"loss_function must be callable, got {loss_function!r}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    check_number("warmup", warmup, low=1, integer=True)
    for i, example in enumerate(examples):
        _check_tensor(f"examples[{i}]", example)
    if ranks() > 1:
        raise RuntimeError(f"graphed() captures the steps of one rank, and this process group has {ranks()}")
    named = [(f"model.{name}", tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())]
    named += [(f"examples[{i}]", example) for i, example in enumerate(examples)]
    if not named:
        raise ValueError("model must have parameters, got none")
    device = named[0][1].device
    for name, tensor in named:
        if tensor.device.type != DEVICE_TYPE or tensor.device != device:
            raise ValueError(f"{name} must be on one CUDA device with all of the model, got {tensor.device}")
    for path, layer in model.named_modules():
        if isinstance(layer, BCLLayer):
            _check_layer(path, layer, optimizer)
    return device


def _check_layer(path: str, layer: BCLLayer, optimizer: torch.optim.Optimizer) -> None:
    name = f"model.{path}" if path else "model"
    if layer.backend not in backends.REFRESH:
        allowed = " or ".join(map(repr, backends.REFRESH))
        raise ValueError(f"{name} must have the backend {allowed}, which count on the device, got {layer.backend!r}")
    if layer.bound_optimizer not in (None, optimizer):
        got = type(layer.bound_optimizer).__name__
        raise ValueError(f"optimizer must be the one that {name} is bound to, got another than its {got}")
    if layer._observers:
        raise RuntimeError(f"{name} is being observed, and observe() cannot look into a CUDA graph")


# --- The graph -------------------------------------------------------------------------------------------------------


def aside(device: torch.device, function: Callable[[], Any]) -> None:
    """Run a function in a stream of its own: libraries must be used once in one before a capture."""
    own, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    own.wait_stream(current)
    with torch.cuda.stream(own):
        function()
    current.wait_stream(own)


def record(device: torch.device, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A function that replays `function`, and the result, whose tensors every replay writes anew."""
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    with torch.cuda.device(device):
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
                result = function()
        finally:
            torch.cuda.set_stream(current)  # a failed capture leaves its own stream current
    return graph.replay, result
