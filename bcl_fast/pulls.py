"""When a layer's pulls happen: what a forward left is consumed once, by its backward or by the optimizer's step."""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import backends, counters, operators, owners
from .rounding import add_rounded_
from .structures import PendingPull, Pull

LOW_PRECISION = (torch.bfloat16, torch.float16)
PATIENCE = 20  # times in a row that something may happen before a warning: a scaler skips steps at first


class _Backward:
    """A backward of autograd while it runs: autograd alone keeps it, so that one that raised leaves nothing behind."""

    def __init__(self) -> None:
        self.arrived: list[PendingPull] = []  # of the forwards whose turn came, until the weight gets its gradient
        self.waiting: list[PendingPull] = []  # until its end: a later recomputation inside it may read the weight
        self.pulled = False


class _Kept(NamedTuple):
    """The mean increment of the backwards since the bound optimizer's last step."""

    mean: Tensor  # [D, N]
    samples: int  # that it is of
    captured: bool  # in a CUDA graph


def _mark(weight: Tensor) -> tuple[int, int]:
    """Which object a weight is, and in which version: to see later whether it is as it was."""
    return id(weight), weight._version


class Pulls:
    """The pulls of one layer, between its forwards and its weight."""

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = weakref.ref(layer)
        self.ticket = owners.register_owner(self)
        self.moves = 0  # how often a pull has moved the weight or its offset
        self._running: dict[int, weakref.ref[_Backward]] = {}
        # Of reentrant checkpointing, since the last move: first passes, pulls of their recomputation, and the versions
        # of `step` at those first passes.
        self._first_passes, self._recomputed, self._steps = 0.0, 0, set()
        self._hook: tuple[nn.Parameter, Any] | None = None  # the weight that is hooked, and its hook
        self.received = False  # whether a forward ever took part in a backward
        self._warned: set[str] = set()
        # Of the bound optimizer: it and its hooks; what waits for its step, and what tells whether that step will come.
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._optimizer_hooks: tuple[Any, ...] = ()
        self.kept: _Kept | None = None
        self._arrived = False  # since it was bound, any pull
        self._holding = False  # in a step, where gradients are the optimizer's own affair
        self._has_gradient = False  # at the end of the last backward that kept something
        self._weight: tuple[int, int] | None = None  # when something was kept
        # In a row, without what should come between: steps without any pull, gradients thrown away, other changes.
        self._without, self._dropped, self._changed = 0, 0, 0

    @property
    def idle(self) -> bool:
        """Whether no pull is on its way."""
        alive = (reference() for reference in self._running.values())
        return self.kept is None and not any(b and (b.arrived or b.waiting) for b in alive)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)

    # --- Backwards ---------------------------------------------------------------------------------------------------

    def _alive(self, task: int) -> _Backward | None:
        reference = self._running.get(task)
        return None if reference is None else reference()

    def _around(self, task: int) -> _Backward | None:
        """The innermost of the other backwards that run: the one in which this one does."""
        if len(self._running) == (task in self._running):  # nothing else runs
            return None
        others = [reference() for number, reference in self._running.items() if number != task]
        return next((backward for backward in reversed(others) if backward is not None), None)

    def _backward(self, task: int, weight: Tensor) -> _Backward:
        """The record of the running backward of this number, made where there is none."""
        backward = self._alive(task)
        if backward is None:
            if self._running:
                self._running = {t: reference for t, reference in self._running.items() if reference() is not None}
            backward = _Backward()
            self._running[task] = weakref.ref(backward)
            end = functools.partial(self._end, task, backward, counters.capturing(weight.device))
            torch.autograd.Variable._execution_engine.queue_callback(end)
        return backward

    def receive(self, pending: PendingPull, compiled: bool) -> None:
        """Called by the backward of each forward (see `operators.masked_gradient`)."""
        layer = self._layer()
        if layer is None:
            return
        weight = layer._parameters["weight"]  # past nn.Module's slow look-up, as below
        if self.kept is not None:
            self._look_after_kept(weight)
        if layer._observers and counters.capturing(weight.device):
            raise RuntimeError("observe() cannot look into a CUDA graph: leave its block before the capture")
        backward = self._backward(owners.running_backward(), weight)
        if compiled:
            if backward.arrived or backward.pulled:
                raise RuntimeError(
                    "under torch.compile one forward of a BCLLayer per backward is supported, got a second"
                )
            # The compiled backward reuses its buffers for other values after this call.
            pending = pending._replace(pull=Pull(*(tensor.clone() for tensor in pending.pull)))
        backward.arrived.append(pending)
        self.received = True
        self.attach(weight)

    def first_pass(self, weight: Tensor, step: Tensor) -> None:
        """Called by a training forward without autograd, which may be the first pass of reentrant checkpointing.

        It is where a forward of an autograd function, by whatever library, has called it.
        """
        task = owners.running_backward()
        if task != owners.NO_BACKWARD:  # a checkpoint inside another, of which the recomputation runs
            self._backward(task, weight)
            return
        frame = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            if code.co_name == "forward" and code.co_varnames[:1] == ("ctx",):
                self._first_passes += 1
                self._steps.add(step._version)
                return
            frame = frame.f_back

    def called_by_compiled_code(self, *state: Tensor) -> None:
        """Called by a training forward inside compiled code, which does not count its first passes.

        `state` is neighbors, step and refreshed_at as it sees them.
        """
        self._first_passes = torch.inf
        layer = self._layer()
        if layer is not None:
            layer._check_objects(*state)

    def recompute(self, task: int) -> bool:
        """Called by a forward inside the running backward `task`, which recomputes one for activation checkpointing.

        Returns whether it may refresh the neighbors: only a first pass of this step has left that to it.
        """
        layer = self._layer()
        if layer is None:
            return True
        if self._backward(task, layer.weight).pulled:
            raise RuntimeError(
                "a BCLLayer is recomputed after a pull of the same backward moved its weight: one that is used both "
                "inside and outside of reentrant checkpoints needs torch.utils.checkpoint(..., use_reentrant=False)"
            )
        return self._first_passes == torch.inf or layer.step._version in self._steps

    def require_still(self, moves: int) -> None:
        """Raise where the weight has moved since the forward that saw `moves` of them and is now recomputed."""
        if moves != self.moves:
            raise RuntimeError(
                "a BCLLayer's forward is recomputed for activation checkpointing after a pull has moved the weight it "
                "was computed with: bind_optimizer() keeps the weight still until the optimizer's step"
            )

    def attach(self, weight: Tensor) -> None:
        """Consume pulls after each accumulation into `weight`, the Parameter of this moment.

        Whatever replaces it (deepcopy, torch.save, to_empty, load_state_dict(assign=True)), or its contents
        (torch.__future__.set_swap_module_params_on_conversion), comes without the hook.
        """
        if self._hook is not None:
            hooked, handle = self._hook
            if hooked is weight and handle.id in (weight._post_accumulate_grad_hooks or ()):
                return
        if not (isinstance(weight, nn.Parameter) and weight.is_leaf and weight.requires_grad):
            return
        if self._hook is not None:
            handle.remove()
        pulls = weakref.ref(self)

        @torch._disable_dynamo
        def consume(weight: Tensor) -> None:
            owner = pulls()
            if owner is not None:
                try:
                    owner._consume(weight)
                except BaseException:  # whose traceback may live on, and with it the record of this backward
                    owner._running.pop(owners.running_backward(), None)
                    raise

        handle = weight.register_post_accumulate_grad_hook(consume)
        # Before hooks that take the gradient away, or step an optimizer: autograd goes by the order of insertion.
        hooks = weight._post_accumulate_grad_hooks
        for number in [number for number in hooks if number != handle.id]:
            hooks[number] = hooks.pop(number)
        self._hook = weight, handle

    @property
    def hooked(self) -> nn.Parameter | None:
        """The weight whose gradient is waited for."""
        return None if self._hook is None else self._hook[0]

    def detach(self) -> None:
        """Take the hook off, before torch may swap the contents of the weight for another tensor's."""
        if self._hook is not None:
            weight, handle = self._hook
            handle.remove()
            self._hook = None
            if not weight._post_accumulate_grad_hooks:
                # After a swap autograd would not look at hooks in a dict that was set before.
                weight._post_accumulate_grad_hooks = None

    def _consume(self, weight: Tensor) -> None:
        """Pull once with what the running backward brought, or keep it for the bound optimizer's step."""
        layer, task = self._layer(), owners.running_backward()
        if layer is None or layer._parameters["weight"] is not weight:
            return
        backward = self._alive(task)
        if backward is None or not backward.arrived:
            if layer.training and not self.received:
                self._warn_once(
                    "the weight of a BCLLayer got a gradient, but no forward of the layer took part: if it is never "
                    "called, as nn.MultiheadAttention only reads the `weight` of its out_proj, there is no competition "
                    "and no pull"
                )
            return
        arrived, backward.arrived = backward.arrived, []
        for pull in arrived:
            pull.ticket.data.zero_()  # a second backward over the graph finds no owner; .data: no version to check
        outer = self._around(task)
        if outer is not None:
            self._recomputed += len(arrived)
            if self._recomputed > self._first_passes:
                raise RuntimeError(
                    "a BCLLayer is recomputed for a reentrant checkpoint of which an earlier backward has pulled, so "
                    "that its weight or its step are no longer those of the forward: use bind_optimizer() with one "
                    "backward per forward, or torch.utils.checkpoint(..., use_reentrant=False)"
                )
            outer.waiting += arrived
        elif backward.waiting:
            backward.waiting += arrived
        else:
            backward.pulled = True
            self._pull(layer, weight, arrived)

    @torch._disable_dynamo
    def _end(self, task: int, backward: _Backward, captured: bool) -> None:
        """At the end of a backward: one that never accumulates into the weight (autograd.grad) leaves nothing behind.

        A CUDA graph of such a backward, which is what torch.cuda.make_graphed_callables makes, would train without any
        pull in all of its replays.
        """
        self._running.pop(task, None)
        layer = self._layer()
        if layer is None:
            return
        outer = self._around(task)
        if backward.arrived:
            if outer is not None:  # an autograd.grad inside a backward, which accumulates what that has found
                outer.arrived += backward.arrived
            elif captured:
                raise RuntimeError(
                    "a CUDA graph captured a backward of BCLLayer that does not accumulate into its weight: its "
                    "replays would never pull (torch.cuda.make_graphed_callables does so): capture whole training "
                    "steps with bcl_fast.graphed, or loss.backward(); for gradients alone use eval()"
                )
        if backward.waiting:
            if outer is None:
                self._pull(layer, layer.weight, backward.waiting)
            else:
                outer.waiting += backward.waiting
        if self.kept is not None:
            self._has_gradient = layer.weight.grad is not None

    def _pull(self, layer: nn.Linear, weight: Tensor, pulls: list[PendingPull]) -> None:
        """Step 13, now or kept for the bound optimizer, unless nothing is to be pulled; `step` advances."""
        if torch.is_grad_enabled():  # a backward with create_graph=True
            with torch.no_grad():
                return self._pull(layer, weight, pulls)
        offset, step, last = layer._buffers["som_offset"], layer._buffers["step"], pulls[-1]
        observers, record = layer._observers, None
        if observers and last.observed.activation is not None:
            state = weight, offset, layer.bias, *last.observed, layer.config
            record = backends.record(counters.read_counter(step), last.pull.x, *state)
        self._arrived, pulls_now = True, layer._pulls_now
        if pulls_now and ranks() > 1:
            self._warn_once("BCLLayer(sync='local'): statistics and pulls are per rank, replicas drift")
        if pulls_now and self._optimizer is None and len(pulls) == 1 and weight.dtype not in LOW_PRECISION:
            options = layer._som_lr_cell, layer._config.target_projection, layer._backend
            operators.operator("targets_pull_", weight)(weight, offset, step, *options, *last.pull)
            self._moved()
        else:
            if pulls_now:
                for pending in pulls:
                    self._average(layer, pending.pull)
                if self._optimizer is None:
                    self._apply_average(layer, found_inf=None)
            counters.advance_(step, layer._backend)
        layer._written.step_version = step._version
        if record is not None:
            for observer in observers:
                observer(record)

    def _moved(self) -> None:
        self.moves += 1
        self._first_passes = self._recomputed = 0
        self._steps.clear()

    def _average(self, layer: nn.Linear, pull: Pull) -> None:
        """Merge the increment of a pull into the kept mean, by numbers of samples."""
        weight = layer.weight
        options = layer._config.target_projection, layer._backend
        increment = operators.operator("som_increment", weight)(weight, layer.som_offset, *options, *pull)
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

    def _apply_average(self, layer: nn.Linear, found_inf: Tensor | None) -> None:
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
        self._moved()

    # --- A bound optimizer -------------------------------------------------------------------------------------------

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        return None if self._optimizer is None else self._optimizer()

    @property
    def _bound_to(self) -> str:
        return "an optimizer that is gone" if self.optimizer is None else type(self.optimizer).__name__

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        """Pull in the steps of this optimizer, and no other's, from now on."""
        self._unbind()
        pulls = weakref.ref(self)

        @torch._disable_dynamo
        def before_step(optimizer, args, kwargs):
            owner = pulls()
            return None if owner is None else owner._before_step(optimizer, args, kwargs)

        @torch._disable_dynamo
        def after_step(optimizer, args, kwargs) -> None:
            owner = pulls()
            if owner is not None:
                owner._after_step(optimizer)

        self._optimizer = weakref.ref(optimizer)
        self._optimizer_hooks = (
            optimizer.register_step_pre_hook(before_step),
            optimizer.register_step_post_hook(after_step),
        )
        _listeners(optimizer).add(self)
        self._arrived, self._without = False, 0

    def _unbind(self) -> None:
        for handle in self._optimizer_hooks:
            handle.remove()
        if (optimizer := self.optimizer) is not None:
            _listeners(optimizer).discard(self)
        self._optimizer, self._optimizer_hooks = None, ()

    def release(self) -> None:
        """Leave the weight and the optimizer alone from now on."""
        self._unbind()
        self.detach()

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
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
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

        if "closure" in kwargs:
            return args, {**kwargs, "closure": evaluate}
        return (args[0], evaluate, *args[2:]), kwargs

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._holding, layer = False, self._layer()
        if layer is not None and self.kept is not None:  # LBFGS; or its closure was a trial, or never evaluated
            self._step(layer, optimizer)

    @torch.no_grad()
    def _step(self, layer: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        if not self._arrived and layer.training and layer.weight.grad is not None:
            self._without += 1
            if self._without == PATIENCE:
                self._warn_once(
                    f"{type(optimizer).__name__} has stepped the weight of a BCLLayer bound to it {PATIENCE} times, "
                    "but no backward has ever brought a pull: pulls come with backwards that accumulate into the "
                    "weight in train()"
                )
        self._dropped = self._changed = 0
        self._apply_average(layer, getattr(optimizer, "found_inf", None))

    def gradients_dropped(self) -> None:
        """Called where gradients are thrown away: what waits for their step goes along, as where it is skipped."""
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

    def _look_after_kept(self, weight: Tensor) -> None:
        """Before another backward: drop what is kept with its gradient, warn where its step may never come."""
        # Gradients that had left before the end of their backward, to be summed up elsewhere, say nothing.
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


def _listeners(optimizer: torch.optim.Optimizer) -> weakref.WeakSet[Pulls]:
    """The pulls that this optimizer tells when its `zero_grad` is called: torch has hooks for its steps alone."""
    listeners = optimizer.__dict__.get("_bcl_listeners")
    if listeners is None:
        listeners, itself = weakref.WeakSet(), weakref.ref(optimizer)  # it must not keep itself alive
        kind, patched = type(optimizer), optimizer.__dict__.get("zero_grad")

        @functools.wraps(kind.zero_grad)
        @torch._disable_dynamo
        def told(*args: Any, **kwargs: Any) -> None:
            for pulls in listeners:
                pulls.gradients_dropped()
            kind.zero_grad(itself(), *args, **kwargs) if patched is None else patched(*args, **kwargs)

        optimizer._bcl_listeners, optimizer.zero_grad = listeners, told
    return listeners


def ranks() -> int:
    """How many ranks the process group has; 1 without one."""
    group = torch.distributed
    return group.get_world_size() if group.is_available() and group.is_initialized() else 1
