"""Measures the BCL layers of a model as somebody else's program trains it."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from . import operators
from .attach import layers_of
from .bound import PATIENCE, Optimizers, closure_of, holders, optimizers_of, with_closure
from .diagnostics import alive, force_norms, forces, nearest_cosine, redundant, step_metrics
from .layer import BCLLayer
from .observers import Observer, call_all
from .private import NO_BACKWARD, never_compiled, running_backward
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
    step. With several ranks only the first measures. A layer may be unfrozen, and added to an optimizer, within the
    block; layers that the model gets there are not seen.

    Args:
        model: holds at least one BCLLayer; may be wrapped by torch.compile or DistributedDataParallel.
        optimizer: one or several; forces are measured of the layers whose weight one of them holds, where they can be
            told apart: not where two layers share it, or somebody else writes it between two backwards of a step.
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
        held = holders(self.layers, self.optimizers)
        frozen = not any(layer.weight.requires_grad for layer in self.layers.values())  # and an optimizer's later
        if optimizer is not None and not held and not (frozen and self.optimizers):
            got = ", ".join(type(each).__name__ for each in self.optimizers) or "no optimizer"
            raise ValueError(f"optimizer must hold the weight of one of {list(self.layers)}, got {got} without any")
        self._watches: list[_Watch] = []
        self._entered = ExitStack()
        self._process: int | None = None  # that has entered the block
        self.backward = NO_BACKWARD  # the last in which any of the layers took part

    @property
    def measures(self) -> bool:
        """Whether this process does: of several ranks only the first, and none that was forked from it."""
        group = torch.distributed
        other = group.is_available() and group.is_initialized() and group.get_rank() != 0
        return not other and self._process in (None, os.getpid())

    @property
    def seen(self) -> bool:
        """Whether any backward of a layer came, if one can."""
        return self.backward != NO_BACKWARD or not any(each.layer.weight.requires_grad for each in self._watches)

    @property
    def just_measured(self) -> dict[str, int]:
        """The layers of which a step was measured since the last backward, with its number."""
        found = (watch for watch in self._watches if watch.measured_in == self.backward)
        return {watch.name: watch.measured for watch in found if watch.measured is not None}

    @property
    def measured(self) -> list[str]:
        """The layers of which any step was measured."""
        return [watch.name for watch in self._watches if watch.measured is not None]

    @property
    def idle(self) -> list[str]:
        """The layers of which no step was measured, though they are trained."""
        return [each.name for each in self._watches if each.measured is None and each.layer.weight.requires_grad]

    @property
    def deserted(self) -> list[str]:
        """The layers that go on though the optimizer given for them has ceased to step, and that said nothing of it."""
        found = (watch for watch in self._watches if watch.measured is not None and watch.changed < PATIENCE)
        return [watch.name for watch in found if watch.waiting > max(PATIENCE, 2 * watch.longest)]

    def __enter__(self) -> Meter:
        if self._watches:
            raise RuntimeError("a monitor that is entered already measures, and would count every pull twice")
        self._process, self.backward = os.getpid(), NO_BACKWARD
        if self.measures:
            weights = Counter(id(layer.weight) for layer in self.layers.values())
            self._watches = [_Watch(self, name, each, weights[id(each.weight)]) for name, each in self.layers.items()]
            for watch in self._watches:
                self._entered.enter_context(watch.layer._observed_by(watch))
            for optimizer in self.optimizers:
                self._entered.callback(optimizer.register_step_pre_hook(self._before_step).remove)
                self._entered.callback(optimizer.register_step_post_hook(self._after_step).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.close()
        self._watches, self._process = [], None  # with what was kept of a step that never came

    @never_compiled
    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> Any:
        due = [watch for watch in self._watches if watch.due and watch.optimizer is optimizer]
        if not due:
            return None
        closure = closure_of(args, kwargs)
        for watch in due:
            if watch.took_part or closure is not None:
                watch.begin_update()
        if closure is None:
            return None

        def evaluate() -> Any:
            loss = closure()
            for watch in due:
                watch.keep_gradient()
            return loss

        return with_closure(evaluate, args, kwargs)

    @never_compiled
    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        call_all(watch.end_step for watch in self._watches if watch.optimizer is optimizer)


class _Watch(Observer):
    """What is known of the step that one layer is in."""

    def __init__(self, meter: Meter, name: str, layer: BCLLayer, sharing: int) -> None:
        self.meter, self.name, self.layer = meter, name, layer
        self.alone = sharing == 1  # else other layers have its weight, and pull that too
        self.find_optimizer()
        self.steps = 0  # of this layer that are over
        self.measured: int | None = None  # the number of the last of them that was measured
        self.measured_in = NO_BACKWARD  # its last backward
        self.took_part = False
        self.late = False  # the optimizer has stepped, its pull is still to come: as LBFGS's, bound within the block
        self.changed = 0  # backwards in a row for which somebody had written the weight, without a step
        self.waiting = self.longest = 0  # backwards since the last step, and the most that a step had
        self._forget()

    def _forget(self) -> None:
        self.record: Record | None = None  # of the last backward of this step
        self.first: Tensor | None = None  # the weight before its first
        self.left: Tensor | None = None  # the weight after its last
        self.pull: Tensor | None = None  # the sum of its pulls
        self.apart = self.alone  # whether the forces can be told apart
        self.begin: Tensor | None = None  # the weight as the optimizer's update begins, and what is pulled within it
        self.gradient: Tensor | None = None  # as the optimizer gets it

    def find_optimizer(self) -> None:
        self.optimizer = holders({self.name: self.layer}, self.meter.optimizers).get(self.name)

    def weight(self) -> Tensor:
        weight = self.layer.effective_weight
        return weight.to(operators.exact(weight.dtype), copy=True)

    def consumed(self, record: Record | None) -> None:
        self.waiting += 1
        if self.due and not self.took_part:
            self.find_optimizer()
        self.took_part, self.meter.backward = True, running_backward()
        if self.due and record is not None:
            self.record = record
            self._look_at_writes(record.weight)
            self.left = self.weight()
            self.pulled(self.left - record.weight)
        if self.optimizer is None:
            self.end_step()

    def _look_at_writes(self, weight: Tensor) -> None:
        """What it means that somebody has written the weight between two backwards of a step."""
        if self.first is None or self.left is None:
            self.first = weight
        elif self.begin is None and not self.left.equal(weight):
            if self.first.equal(weight):  # another try: the pulls so far are undone
                self.pull = None
            else:
                self.apart = False
            self.changed += 1
            if self.changed == PATIENCE:
                self.due = False
                warnings.warn(
                    f"the weight of {self.name!r} was written {PATIENCE} times while Monitor waited for a step of "
                    f"{type(self.optimizer).__name__}, and is not measured: give it the optimizer that steps",
                    stacklevel=2,
                )

    def pulled(self, move: Tensor) -> None:
        self.pull = move if self.pull is None else self.pull + move
        if self.begin is not None:
            self.begin = self.begin + move
        if self.late:
            self.end_step()

    def begin_update(self) -> None:
        self.begin = self.weight()
        self.keep_gradient()

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
        if self.late:
            return
        took_part, measured = self.took_part and not (self.due and self._skipped()), None
        self.longest, self.waiting = max(self.longest, self.waiting), 0
        self.took_part, self.changed = False, 0
        if self.due:
            if took_part and self.record is not None:
                with operators.no_autocast(self.record.x.device.type):
                    measured = self._measured(self.record)
            self._forget()
        if not took_part or (self.due and measured is None):
            return
        self.steps += 1
        self.due = self.steps % self.meter.every == 0
        if measured is not None:
            self.meter.callback(measured)
            self.measured, self.measured_in = measured.step, self.meter.backward

    def _skipped(self) -> bool:
        """Whether a scaler has let a fused optimizer step over gradients that overflowed, which that then does not."""
        found_inf = getattr(self.optimizer, "found_inf", None)
        return found_inf is not None and bool(found_inf > 0)

    def _measured(self, record: Record) -> Measured:
        nearest = nearest_cosine(record.weight, record.neighbors)
        metrics = step_metrics(record)
        metrics |= {"dead": len(record.win_rate) - alive(record.win_rate), "redundant": redundant(nearest)}
        features = {"nearest": nearest}
        gradient = self.layer.weight.grad if self.gradient is None else self.gradient
        begin, pull = self.begin, self.pull
        if self.apart and gradient is not None and begin is not None and pull is not None:
            norms = force_norms(gradient.to(begin.dtype), begin - pull, begin, self.weight())
            metrics |= forces(norms)
            features |= norms
        return Measured(self.name, record.step, metrics, features, record)


def bcl_layers(model: nn.Module) -> dict[str, BCLLayer]:
    """Every BCLLayer of a model by its name in there, without what torch.compile and DistributedDataParallel add."""
    while hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
        model = cast(nn.Module, model._orig_mod if hasattr(model, "_orig_mod") else model.module)
    found = {}
    for name, layer in layers_of(model).items():
        found[".".join(part for part in name.split(".") if part != "_orig_mod") or "BCLLayer"] = layer
    return found
