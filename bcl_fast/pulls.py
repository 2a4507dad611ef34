"""When a layer's pulls happen: what a forward left is consumed once, by its backward or by the optimizer's step."""

from __future__ import annotations

import functools
import sys
import weakref
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, counters, eager, operators, owners, private
from .bound import Bound, Moves, PulledLayer, WarnOnce
from .checks import ranks
from .observers import call_all
from .structures import Observed, PendingPull, Pull, unpacked

LOW_PRECISION = (torch.bfloat16, torch.float16)


class _Backward:
    """A backward of autograd while it runs: autograd alone keeps it, so that one that raised leaves nothing behind."""

    def __init__(self) -> None:
        self.arrived: list[PendingPull] = []  # of the forwards whose turn came, until the weight gets its gradient
        self.waiting: list[PendingPull] = []  # until its end: a later recomputation inside it may read the weight
        self.pulled = False


class Pulls:
    """The pulls of one layer, between its forwards and its weight."""

    def __init__(self, layer: PulledLayer) -> None:
        self._layer = weakref.ref(layer)
        self.ticket = owners.register_owner(self)
        self._moves = Moves()
        self._running: dict[int, weakref.ref[_Backward]] = {}
        self._hook: tuple[nn.Parameter, Any] | None = None  # the weight that is hooked, and its hook
        self.received = False  # whether a forward ever took part in a backward
        self._warn_once = WarnOnce()
        self.bound = Bound(self._layer, self._warn_once, self._moves)

    @property
    def moves(self) -> int:
        """How often a pull has moved the weight or its offset."""
        return self._moves.count

    @property
    def idle(self) -> bool:
        """Whether no pull is pending in a backward or kept for a step."""
        alive = (reference() for reference in self._running.values())
        return self.bound.kept is None and not any(b and (b.arrived or b.waiting) for b in alive)

    # --- Backwards ---------------------------------------------------------------------------------------------------

    def _alive(self, task: int) -> _Backward | None:
        reference = self._running.get(task)
        return None if reference is None else reference()

    def _around(self, task: int) -> _Backward | None:
        """The innermost of the other running backwards: the one that this one runs in."""
        if len(self._running) == (task in self._running):  # nothing else runs
            return None
        others = [reference() for number, reference in self._running.items() if number != task]
        return next((backward for backward in reversed(others) if backward is not None), None)

    def _backward(self, task: int, weight: Tensor) -> _Backward:
        """The record of the running backward of this number; a new one where there is none."""
        backward = self._alive(task)
        if backward is None:
            if self._running:
                self._running = {t: reference for t, reference in self._running.items() if reference() is not None}
            backward = _Backward()
            self._running[task] = weakref.ref(backward)
            end = functools.partial(self._end, task, backward, counters.capturing(weight.device))
            private.at_end_of_backward(end)
        return backward

    def receive(self, pending: PendingPull, dtype: torch.dtype, compiled: bool) -> None:
        """Called by the backward of each forward (see `operators.masked_gradient`); `dtype` is that of its product."""
        layer = self._layer()
        if layer is None:
            return
        weight = layer._parameters["weight"]  # without nn.Module's slow look-up, as below
        if self.bound.kept is not None:
            self.bound.look_after_kept(weight)
        if layer._observers and counters.capturing(weight.device):
            raise RuntimeError("observe() cannot look into a CUDA graph: leave its block before the capture")
        backward = self._backward(private.running_backward(), weight)
        if compiled:
            if backward.arrived or backward.pulled:
                raise RuntimeError(
                    "under torch.compile one forward of a BCLLayer per backward is supported, got a second"
                )
            # The compiled backward reuses its buffers for other values after this call.
            pending = pending._replace(pull=Pull(*(tensor.clone() for tensor in unpacked(pending.pull))))
            if layer._observed_now:  # compiled code knows no observers: nobody comes or goes by a new compilation
                product = pending.pull.x, layer.effective_weight, layer.bias, dtype
                observed = Observed(operators.call("product", *product), layer.neighbors.clone())
                pending = pending._replace(observed=observed)
        backward.arrived.append(pending)
        self.received = True
        self.attach(weight)

    def first_pass(self, weight: Tensor, step: Tensor) -> None:
        """Called by a training forward without autograd, which may be the first pass of reentrant checkpointing.

        It is where a forward of an autograd function, by whatever library, has called it.
        """
        task = private.running_backward()
        if task != private.NO_BACKWARD:  # a checkpoint inside another, of which the recomputation runs
            self._backward(task, weight)
            return
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            if code.co_name == "forward" and code.co_varnames[:1] == ("ctx",):
                self._moves.first_passes += 1
                self._moves.steps.add(step._version)
                return
            frame = frame.f_back

    def called_by_compiled_code(self, *state: Tensor) -> None:
        """Called by a training forward inside compiled code, which does not count its first passes.

        `state` is neighbors, step and refreshed_at as it sees them.
        """
        self._moves.first_passes = torch.inf
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
        return self._moves.first_passes == torch.inf or layer.step._version in self._moves.steps

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
            if hooked is weight and handle.id in private.accumulation_hooks(weight):
                return
        if not (isinstance(weight, nn.Parameter) and weight.is_leaf and weight.requires_grad):
            return
        if self._hook is not None:
            handle.remove()
        pulls = weakref.ref(self)

        @private.skipped_by_compilers
        def consume(weight: Tensor) -> None:
            owner = pulls()
            if owner is not None:
                try:
                    owner._consume(weight)
                except BaseException:  # whose traceback may live on, and with it the record of this backward
                    owner._running.pop(private.running_backward(), None)
                    raise

        handle = weight.register_post_accumulate_grad_hook(consume)
        # Before hooks that take the gradient away, or step an optimizer: autograd goes by the order of insertion.
        hooks = private.accumulation_hooks(weight)
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
            private.forget_accumulation_hooks(weight)

    def _consume(self, weight: Tensor) -> None:
        """Pull once with what the running backward brought, or keep it for the bound optimizer's step."""
        layer, task = self._layer(), private.running_backward()
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
            self._moves.recomputed += len(arrived)
            if self._moves.recomputed > self._moves.first_passes:
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

    @private.skipped_by_compilers
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
        self.bound.backward_ended()

    def _pull(self, layer: PulledLayer, weight: Tensor, pulls: list[PendingPull]) -> None:
        """Step 13, now or kept for the bound optimizer, unless nothing is to be pulled; `step` advances."""
        if torch.is_grad_enabled():  # a backward with create_graph=True
            with torch.no_grad():
                return self._pull(layer, weight, pulls)
        offset, step, last = layer._buffers["som_offset"], layer._buffers["step"], pulls[-1]
        observers, record, (activation, neighbors) = layer._observers, None, last.observed
        if activation is not None and neighbors is not None and layer._observed_now:
            state = weight, offset, layer.bias, activation, neighbors, layer.config
            record = backends.record(counters.read_counter(step), last.pull.x, *state)
        self.bound.arrived, pulls_now = True, layer._pulls_now
        if pulls_now and layer._config.sync == "local" and ranks() > 1:
            self._warn_once("BCLLayer(sync='local'): statistics and pulls are per rank, replicas drift")
        if pulls_now and not self.bound.active and len(pulls) == 1 and weight.dtype not in LOW_PRECISION:
            options = layer._som_lr_cell, layer._config.target_projection, layer._backend
            eager.pull_(weight, offset, step, *options, last.pull)
            self._moves.add()
        else:
            if pulls_now:
                for pending in pulls:
                    self.bound.keep(layer, unpacked(pending.pull))
                if not self.bound.active:
                    self.bound.apply(layer, found_inf=None)
            counters.advance_(step, layer._backend)
        layer._written.step_version = step._version
        if observers:
            call_all(functools.partial(observer.consumed, record) for observer in observers)

    def release(self) -> None:
        """Leave the weight and the optimizer alone from now on."""
        self.bound.unbind()
        self.detach()
