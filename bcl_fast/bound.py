"""Pulls that wait for an optimizer: their mean, the hooks in its step, and when what waits is dropped."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import counters, operators
from .observers import Observer, call_all
from .private import never_compiled
from .rounding import add_rounded_
from .spec import BCLConfig
from .state import Written
from .structures import Pull

Optimizers = torch.optim.Optimizer | Iterable[torch.optim.Optimizer]
PATIENCE = 20  # times in a row that something happens before it is warned of: scalers skip their first steps


class PulledLayer(Protocol):
    """A layer as its pulls see it."""

    training: bool
    weight: Tensor
    neighbors: Tensor
    step: Tensor
    som_offset: Tensor | None
    _parameters: dict[str, Any]
    _buffers: dict[str, Any]
    _config: BCLConfig
    _backend: str
    _som_lr_cell: Tensor
    _observers: tuple[Observer, ...]
    _written: Written

    @property
    def bias(self) -> Tensor | None: ...
    @property
    def effective_weight(self) -> Tensor: ...
    @property
    def config(self) -> BCLConfig: ...
    @property
    def _observed_now(self) -> bool: ...
    @property
    def _pulls_now(self) -> bool: ...
    def _check_objects(self, *seen: Tensor) -> None: ...


class WarnOnce:
    """Warns of each thing once in the life of a layer."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, stacklevel=2)


class Moves:
    """How often a layer's weight has moved, and what is counted of reentrant checkpointing since the last time."""

    def __init__(self) -> None:
        self.count = 0
        self.first_passes = 0.0
        self.recomputed = 0  # pulls of their recomputation
        self.steps: set[int] = set()  # the versions of `step` at those first passes

    def add(self) -> None:
        self.count += 1
        self.first_passes = self.recomputed = 0
        self.steps.clear()


class _Kept(NamedTuple):
    """The mean increment of the backwards since the bound optimizer's last step."""

    mean: Tensor  # [D, N]
    samples: int  # that it is the mean of
    captured: bool  # in a CUDA graph


def _mark(weight: Tensor) -> tuple[int, int]:
    """The identity and the version of a weight, to see later whether it has changed."""
    return id(weight), weight._version


class Bound:
    """What a layer keeps for the step of the optimizer it is bound to, if it is."""

    def __init__(self, layer: weakref.ref[PulledLayer], warn_once: WarnOnce, moves: Moves) -> None:
        self._layer, self._warn_once, self._moves = layer, warn_once, moves
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._hooks: tuple[Any, ...] = ()
        self.kept: _Kept | None = None
        self.arrived = False  # whether any pull came since the layer was bound
        self._holding = False  # in a step, where gradients are the optimizer's own affair
        self._has_gradient = False  # at the end of the last backward that kept something
        self._weight: tuple[int, int] | None = None  # when something was kept
        # In a row, without what should come between: steps without any pull, gradients thrown away, other changes.
        self._without, self._dropped, self._changed = 0, 0, 0

    # --- The mean ----------------------------------------------------------------------------------------------------

    def keep(self, layer: PulledLayer, pull: Pull) -> None:
        """Merge the increment of a pull into the kept mean, by numbers of samples."""
        weight = layer.weight
        options = layer._config.target_projection, layer._backend
        increment = operators.call("som_increment", weight, layer.som_offset, *options, pull)
        captured = counters.capturing(weight.device)
        kept = self.kept or _Kept(torch.zeros_like(increment), 0, captured)
        self._require_same_side(kept, captured)
        total = kept.samples + pull.x.shape[0]
        kept.mean.mul_(kept.samples / total).add_(increment, alpha=pull.x.shape[0] / total)
        self.kept = kept._replace(samples=total)
        self._weight = _mark(weight)

    @staticmethod
    def _require_same_side(kept: _Kept, captured: bool) -> None:
        """Raise where one of a backward and the optimizer's step is in a CUDA graph and the other is not."""
        if kept.captured != captured:
            raise RuntimeError(
                "the backward of a BCLLayer with a bound optimizer and that optimizer's step must both be in one CUDA "
                "graph, or both outside: bcl_fast.graphed captures whole steps"
            )

    def apply(self, layer: PulledLayer, found_inf: Tensor | None) -> None:
        """Step 13 with the kept mean; nothing where a scaler reports found_inf = 1 (a tensor on the device)."""
        kept, self.kept = self.kept, None
        if kept is None or not layer._pulls_now:
            return
        self._require_same_side(kept, counters.capturing(layer.weight.device))
        increment = kept.mean.mul_(layer._som_lr_cell)
        if found_inf is not None:  # not a product: what overflowed may have made the increment NaN
            increment = torch.where(found_inf > 0, 0.0, increment)
        destination = layer.weight if layer.som_offset is None else layer.som_offset
        add_rounded_(destination, increment, layer.step)
        self._moves.add()

    # --- The optimizer -----------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether the layer is bound, even to an optimizer that is gone."""
        return self._optimizer is not None

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        return None if self._optimizer is None else self._optimizer()

    @property
    def _bound_to(self) -> str:
        return "an optimizer that is gone" if self.optimizer is None else type(self.optimizer).__name__

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        """Pull in the steps of this optimizer, or of the one it wraps, and no other's, from now on."""
        layer, optimizer = self._layer(), unwrapped(optimizer)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if layer is None or not holders({"": layer}, [optimizer]):
            raise ValueError(f"optimizer must hold the weight of this layer, got {type(optimizer).__name__} without it")
        self.unbind()
        itself = weakref.ref(self)

        @never_compiled
        def before_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> Any:
            bound = itself()
            return None if bound is None else bound._before_step(optimizer, args, kwargs)

        @never_compiled
        def after_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
            bound = itself()
            if bound is not None:
                bound._after_step(optimizer)

        self._optimizer = weakref.ref(optimizer)
        self._hooks = (
            optimizer.register_step_pre_hook(before_step),
            optimizer.register_step_post_hook(after_step),
        )
        _listeners(optimizer).add(self)
        self.arrived, self._without = False, 0

    def unbind(self) -> None:
        for handle in self._hooks:
            handle.remove()
        if (optimizer := self.optimizer) is not None:
            _listeners(optimizer).discard(self)
        self._optimizer, self._hooks = None, ()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Apply the kept mean now, or, where the step brings a closure, once that has run: its backward belongs here.

        LBFGS evaluates many times, and what it evaluates must not move under it: the mean of all comes after its step.
        Where another optimizer moves the weight before it evaluates, that is a trial at another point, whose pull is
        dropped.
        """
        layer = self._layer()
        if layer is None:
            return None
        self._holding = False
        closure = closure_of(args, kwargs)
        if closure is None:
            self._step(layer, optimizer)
            return None
        begin, search = _mark(layer.weight), isinstance(optimizer, torch.optim.LBFGS)
        self._holding, evaluated = True, False

        def evaluate() -> Any:
            nonlocal evaluated
            trial = not search and _mark(layer.weight) != begin
            before, self.kept = self.kept, None if trial else self.kept
            self._holding = trial or evaluated  # the first to run may find that the step before was skipped
            try:
                loss = closure()
            except BaseException:
                self._holding = False
                raise
            finally:
                if trial:
                    self.kept = before
            self._holding = evaluated = True
            if not (trial or search):
                self._step(layer, optimizer)
            return loss

        return with_closure(evaluate, args, kwargs)

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._holding, layer = False, self._layer()
        if layer is not None and self.kept is not None:  # LBFGS; or its closure was a trial, or never evaluated
            self._step(layer, optimizer)

    @torch.no_grad()
    def _step(self, layer: PulledLayer, optimizer: torch.optim.Optimizer) -> None:
        if not self.arrived and layer.training and layer.weight.grad is not None:
            self._without += 1
            if self._without == PATIENCE:
                self._warn_once(
                    f"{type(optimizer).__name__} has stepped the weight of a BCLLayer bound to it {PATIENCE} times, "
                    "but no backward has ever brought a pull: pulls come with backwards that accumulate into the "
                    "weight in train()"
                )
        self._dropped = self._changed = 0
        observers = [observer for observer in layer._observers if observer.due]
        before = layer.effective_weight.clone() if observers else None
        self.apply(layer, getattr(optimizer, "found_inf", None))
        if before is not None:
            move = layer.effective_weight - before
            call_all(functools.partial(observer.pulled, move) for observer in observers)

    def backward_ended(self) -> None:
        """Called at the end of a backward, once it has kept what it brought."""
        layer = self._layer()
        if self.kept is not None and layer is not None:
            self._has_gradient = layer.weight.grad is not None

    def gradients_dropped(self) -> None:
        """Called where gradients are thrown away: their step will not come, and what waits for it is dropped too."""
        if self.kept is None or self._holding:
            return
        self.kept = None
        self._dropped += 1
        if self._dropped == PATIENCE:
            self._warn_once(
                f"the gradients of a BCLLayer were thrown away {PATIENCE} times in a row, and its pulls with them, "
                f"without a step of {self._bound_to}, to which the layer is bound: bind the optimizer that steps, or "
                "call eval() where gradients alone are wanted"
            )

    def look_after_kept(self, weight: Tensor) -> None:
        """Before another backward: drop what is kept with its gradient, warn where its step may never come."""
        # A gradient that was taken away within its backward, to be summed up elsewhere, does not count as dropped.
        if weight.grad is None and self._has_gradient:
            self.gradients_dropped()
        elif not self._holding and self._weight != _mark(weight):
            self._changed += 1
            if self._changed == PATIENCE:
                self._warn_once(
                    f"the weight of a BCLLayer was changed {PATIENCE} times while pulls waited for a step of "
                    f"{self._bound_to}, to which the layer is bound: if another optimizer trains it, bind that one, "
                    "else no pull will ever happen"
                )


def _listeners(optimizer: torch.optim.Optimizer) -> weakref.WeakSet[Bound]:
    """Whom this optimizer tells that its `zero_grad` is called: torch has hooks for its steps alone."""
    listeners: weakref.WeakSet[Bound] | None = optimizer.__dict__.get("_bcl_listeners")
    if listeners is None:
        listeners, itself = weakref.WeakSet(), weakref.ref(optimizer)  # it must not keep itself alive
        kind, patched = type(optimizer), optimizer.__dict__.get("zero_grad")

        @functools.wraps(kind.zero_grad)
        @never_compiled
        def told(*args: Any, **kwargs: Any) -> None:
            for bound in listeners:
                bound.gradients_dropped()
            if patched is not None:
                patched(*args, **kwargs)
            elif (alive := itself()) is not None:
                kind.zero_grad(alive, *args, **kwargs)

        optimizer.__dict__.update(_bcl_listeners=listeners, zero_grad=told)
    return listeners


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside those that wrap one (`optimizer.optimizer`, as accelerate's and Lightning's do)."""
    inner = getattr(optimizer, "optimizer", None)
    return unwrapped(inner) if isinstance(inner, torch.optim.Optimizer) else optimizer


def closure_of(args: tuple, kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """The closure among what a hook before an optimizer's step is given, if there is one."""
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    return closure if callable(closure) else None


def with_closure(closure: Callable[[], Any], args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The same with another closure: what that hook returns."""
    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure}
    return (args[0], closure, *args[2:]), kwargs


def optimizers_of(given: Any) -> list[torch.optim.Optimizer]:
    """One optimizer or several as a list, each once and without what wraps it; a TypeError for anything else."""
    given = unwrapped(given)
    several = isinstance(given, Iterable) and not isinstance(given, torch.optim.Optimizer)
    found = list({id(each): each for each in map(unwrapped, given if several else [given])}.values())
    for each in found:
        if not isinstance(each, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, or several, got {type(each).__name__}")
    return found


def holders(
    layers: Mapping[str, PulledLayer], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, torch.optim.Optimizer]:
    """Which optimizer holds the weight of each layer, where one does; a ValueError where two do."""
    held = [{id(p) for group in each.param_groups for p in group["params"]} for each in optimizers]
    found = {}
    for name, layer in layers.items():
        holding = [each for each, ids in zip(optimizers, held, strict=True) if id(layer.weight) in ids]
        if len(holding) > 1:
            kinds = " and ".join(type(each).__name__ for each in holding)
            raise ValueError(f"optimizer must be one for the weight of each layer, got {kinds} for {name!r}")
        if holding:
            found[name] = holding[0]
    return found
