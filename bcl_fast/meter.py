"""Measures the BCL layers of a model as somebody else's program trains it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from . import operators
from .bound import Optimizers, closure_of, holders, optimizers_of, with_closure
from .diagnostics import alive, force_norms, forces, nearest_cosine, redundant, step_metrics
from .layer import BCLLayer
from .observers import Observer
from .private import never_compiled
from .reference import Record
from .spec import check_number


class Measured(NamedTuple):
    """One training step of one layer."""

    layer: str  # its name in the model
    step: int  # backwards of the layer before this one, also those before a checkpoint was loaded
    metrics: dict[str, float]  # `diagnostics.step_metrics`, `forces` where measured, how many are dead and redundant
    features: dict[str, Tensor]  # [D] each: `nearest`, and the norms of the forces where measured
    record: Record

    def named(self, prefix: str = "") -> dict[str, float]:
        """The metrics under PREFIX LAYER/METRIC, for a logger of scalars."""
        return {f"{prefix}{self.layer}/{name}": value for name, value in self.metrics.items()}


class Meter:
    """Within a `with` block, measures every BCLLayer of a model at its first training step and every so many after it.

    A step is one of the optimizer that holds the layer's weight, else a backward of the layer. With gradient
    accumulation that of an optimizer is measured by its last backward, and its pulls are added up. Between measured
    steps nothing is kept and nothing computed. Under torch.compile the activation is computed once more for a measured
    step. With several ranks only the first measures. Layers that the model gets within the block are not seen.

    Args:
        model: holds at least one BCLLayer; may be wrapped by torch.compile or DistributedDataParallel.
        optimizer: one or several; forces are measured of the layers whose weight one of them holds, unless two layers
            share it.
        every: how many steps of a layer lie between two that are measured, >= 1.
        callback: is called with what was `Measured` during the backward, or in the step of the optimizer.

    Raises TypeError or ValueError that names the argument, its value and what is allowed.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizers | None, every: int, callback: Callable[[Measured], None]
    ) -> None:
        self.layers = bcl_layers(model)
        if not self.layers:
            raise ValueError(
                f"model must hold a BCLLayer, got a {type(model).__name__} without one: attach_bcl makes one of a layer"
            )
        self.optimizers = [] if optimizer is None else optimizers_of(optimizer)
        check_number("every", every, low=1, integer=True)
        self.every, self.callback = every, callback
        self._held = holders(self.layers, self.optimizers)
        if self.optimizers and not self._held:
            got = ", ".join(type(each).__name__ for each in self.optimizers)
            raise ValueError(f"optimizer must hold the weight of one of {list(self.layers)}, got {got} without any")
        self._watches: list[_Watch] = []
        self._entered = ExitStack()

    @property
    def measures(self) -> bool:
        """Whether this process does: of several ranks only the first."""
        group = torch.distributed
        return not (group.is_available() and group.is_initialized() and group.get_rank() != 0)

    @property
    def seen(self) -> bool:
        """Whether any backward of a layer came."""
        return any(watch.took_part or watch.steps for watch in self._watches)

    @property
    def idle(self) -> list[str]:
        """The layers of which no step was measured, though they are trained."""
        return [each.name for each in self._watches if each.steps == 0 and each.layer.weight.requires_grad]

    def __enter__(self) -> Meter:
        if self._watches:
            raise RuntimeError("a monitor that is entered already measures, and would count every pull twice")
        if self.measures:
            weights = Counter(id(layer.weight) for layer in self.layers.values())
            for name, layer in self.layers.items():
                alone = weights[id(layer.weight)] == 1
                watch = _Watch(name, layer, self._held.get(name), alone, self.every, self.callback)
                self._watches.append(watch)
                self._entered.enter_context(layer._observed_by(watch))
            for optimizer in self.optimizers:
                before, after = _around_step([watch for watch in self._watches if watch.optimizer is optimizer])
                self._entered.callback(optimizer.register_step_pre_hook(before).remove)
                self._entered.callback(optimizer.register_step_post_hook(after).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.close()
        self._watches = []  # with what was kept of a step that never came


class _Watch(Observer):
    """What is known of the step that one layer is in."""

    def __init__(
        self,
        name: str,
        layer: BCLLayer,
        optimizer: torch.optim.Optimizer | None,
        alone: bool,
        every: int,
        callback: Callable[[Measured], None],
    ) -> None:
        self.name, self.layer, self.optimizer, self.every, self.report = name, layer, optimizer, every, callback
        self.alone = alone  # no other layer has its weight, and pulls that too
        self.steps = 0  # of this layer that are over
        self.took_part = False
        self.late = False  # the optimizer has stepped, its pull is still to come: as LBFGS's, bound within the block
        self._forget()

    def _forget(self) -> None:
        self.record: Record | None = None  # of the last backward of this step
        self.before: Tensor | None = None  # the weight at its first backward
        self.pull: Tensor | None = None  # the sum of its pulls
        self.gradient: Tensor | None = None  # as the optimizer gets it

    def consumed(self, record: Record | None) -> None:
        self.took_part = True
        if self.due and record is not None:
            self.record = record
            if self.before is None:
                self.before = record.weight
            self.pulled(self.layer.effective_weight - record.weight)
        if self.optimizer is None:
            self.end_step()

    def pulled(self, move: Tensor) -> None:
        self.pull = move if self.pull is None else self.pull + move
        if self.late:
            self.end_step()

    def keep_gradient(self) -> None:
        """Before the update, in which some optimizers write into the gradient.

        A fused one whose scaler has handed it the scale divides by that in its update, and writes the quotient.
        """
        gradient = self.layer.weight.grad
        if gradient is not None and getattr(self.optimizer, "grad_scale", None) is None:
            self.gradient = gradient.clone()

    @torch.no_grad()
    def end_step(self) -> None:
        """Report the step if it was due and seen; one that was only half seen leaves its turn to the next."""
        bound = self.layer._pulls.bound
        self.late = self.due and bound.kept is not None and bound.optimizer is self.optimizer is not None
        if self.late or not self.took_part:
            return
        self.took_part = False
        if self.due:
            if self.record is None:
                return
            with operators.no_autocast(self.record.x.device.type):
                measured = self._measured(self.record)
            self._forget()
            self.report(measured)
        self.steps += 1
        self.due = self.steps % self.every == 0

    def _measured(self, record: Record) -> Measured:
        nearest = nearest_cosine(record.weight, record.neighbors)
        metrics = step_metrics(record)
        metrics |= {"dead": len(record.win_rate) - alive(record.win_rate), "redundant": redundant(nearest)}
        features = {"nearest": nearest}
        gradient = self.layer.weight.grad if self.gradient is None else self.gradient
        before, pull = self.before, self.pull
        told_apart = self.optimizer is not None and self.alone
        if told_apart and gradient is not None and before is not None and pull is not None:
            after = self.layer.effective_weight.to(before.dtype)
            norms = force_norms(gradient.to(before.dtype), before, before + pull, after)
            metrics |= forces(norms)
            features |= norms
        return Measured(self.name, record.step, metrics, features, record)


def _around_step(watches: list[_Watch]) -> tuple[Callable[..., Any], Callable[..., None]]:
    """The hooks before and after the step of the optimizer that holds the weights of these layers."""

    def keep_gradients() -> None:
        for watch in watches:
            if watch.due and watch.took_part:
                watch.keep_gradient()

    @never_compiled
    def before_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> Any:
        closure = closure_of(args, kwargs)
        if closure is None:
            keep_gradients()
            return None
        if not any(watch.due for watch in watches):
            return None

        def evaluate() -> Any:
            loss = closure()
            keep_gradients()
            return loss

        return with_closure(evaluate, args, kwargs)

    @never_compiled
    def after_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        for watch in watches:
            watch.end_step()

    return before_step, after_step


def bcl_layers(model: nn.Module) -> dict[str, BCLLayer]:
    """Every BCLLayer of a model by its name in there, without what torch.compile and DistributedDataParallel add."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    while hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
        model = cast(nn.Module, model._orig_mod if hasattr(model, "_orig_mod") else model.module)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, BCLLayer):
            found[".".join(part for part in name.split(".") if part != "_orig_mod") or "BCLLayer"] = module
    return found
