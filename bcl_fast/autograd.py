"""Training forwards as autograd knows them, and their masked backward (step 12)."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import operators, owners, private
from .backends import GENERAL
from .owners import Owner
from .spec import BCLConfig
from .structures import UNOBSERVED, Observed, PackedStatistics, PendingPull, Statistics, made_of, unpacked


class Competed(NamedTuple):
    """What a training forward found."""

    activation: Tensor  # [B, D], in the dtype of the statistics
    shifted: Tensor | None  # W + O [D, N] in offset space
    statistics: Statistics | PackedStatistics


class TrainedLayer(Protocol):
    """A layer as its forwards outside compilers see it."""

    neighbors: Tensor
    _config: BCLConfig
    _backend: str

    @property
    def _pulls(self) -> Owner: ...
    @property
    def _observed_now(self) -> bool: ...
    def _compete(self, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Competed: ...


class _Once(torch.autograd.Function):
    """A gradient, tied to what it was made of, whose own derivative is an error and not a zero."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *origins: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "BCLLayer has no second derivative in training, where its mask is a choice: call eval() for gradients of "
            "gradients"
        )


def _products(
    masked: Tensor, x: Tensor, weight: Tensor | None, dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[Tensor | None, Tensor]:
    """The gradients of x, unless weight is None, and of weight, from the masked one [B, D]; dtypes: product, weight."""
    dtype, weight_dtype = dtypes
    with operators.no_autocast(x.device.type):
        x_gradient = None if weight is None else _to(masked @ _to(weight, dtype), x.dtype)
        return x_gradient, _to(masked.T @ _to(x, dtype), weight_dtype)


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in a dtype: small steps feel a call of `to` that changes nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


class Training(torch.autograd.Function):
    """A training forward outside compilers: product, competition and choices, and the backward that follows from them.

    x [B, N], weight [D, N], bias [D] or None receive gradients; the output [B, D] and the products of the backward have
    `dtype`. A compiler that runs the layer as it is, after a graph break, must not look into either.
    """

    @staticmethod
    @private.skipped_by_compilers
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: TrainedLayer, dtype: torch.dtype
    ) -> Tensor:
        with operators.no_autocast(x.device.type):
            activation, shifted, statistics = layer._compete(x, weight, bias, dtype)
        # The weight is needed for dX alone; without it a second backward works after the pull changed it.
        kept = (weight if shifted is None else shifted) if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(x, kept, *statistics.tensors)
        # Not saved: a checkpoint compares what is with what a recomputation saves, which may fall into another step.
        ctx.observed = Observed(activation.clone(), layer.neighbors.clone()) if layer._observed_now else UNOBSERVED
        ctx.moves, ctx.weight, ctx.sizes = layer._pulls.moves, weight, statistics.sizes
        ctx.dtype, ctx.gradient_mask, ctx.backend = dtype, layer._config.gradient_mask, layer._backend
        # What is saved may come back copied (save_on_cpu) or made anew (checkpoint); this forward's own ticket may not.
        ctx.ticket = statistics.ticket
        return _to(activation, dtype)

    @staticmethod
    @private.skipped_by_compilers
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpoint gives them away
        if not torch.is_grad_enabled():
            return Training._gradients(ctx, grad_output, *saved)
        with torch.no_grad():
            gradients = Training._gradients(ctx, grad_output, *saved)
        origins = grad_output, saved[0], ctx.weight
        return tuple(None if gradient is None else _Once.apply(gradient, *origins) for gradient in gradients)

    @staticmethod
    def _gradients(
        ctx: Any, grad_output: Tensor, x: Tensor, weight: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        statistics, ticket, gradient_mask = made_of(tensors, ctx.sizes), ctx.ticket, ctx.gradient_mask
        if statistics.ticket is not ticket:
            owners.require_still(statistics.ticket, ticket, ctx.moves)
        pending = PendingPull(ticket, ctx.observed, statistics.pull(x))
        winner = statistics.winner if gradient_mask == "winner_take_all" else ticket  # which nobody looks at
        found = grad_output, statistics.mask, winner, gradient_mask, ctx.dtype
        if not operators.can_bypass_dispatcher(grad_output):
            pending = pending._replace(pull=unpacked(pending.pull))
            masked, bias_gradient = operators.call("masked_gradient", *found, False, ctx.backend, pending)
        else:
            owners.hand_over(pending, ctx.dtype, compiled=False)
            batched = private.is_batched_gradient(grad_output)
            last = not batched and not private.keeps_graph()  # nothing of this forward is read again
            backend = GENERAL if batched else ctx.backend
            masked, bias_gradient = operators.run(operators.masked, *found, backend, last)
            if last:
                ctx.observed = UNOBSERVED
        weight_dtype = ctx.weight.dtype
        x_gradient, weight_gradient = _products(masked, x, weight, (ctx.dtype, weight_dtype))
        bias_gradient = _to(bias_gradient, weight_dtype) if ctx.needs_input_grad[2] else None
        return x_gradient, weight_gradient, bias_gradient, None, None


class MaskedLinear(torch.autograd.Function):
    """The output of a linear layer, already computed, with the masked backward, for torch.compile.

    x [B, N], weight [D, N], bias [D] or None receive gradients. shifted is W + O [D, N] in offset space, else None;
    activation [B, D] is the product, dtype is that of the output and of the gradients' products. What follows are the
    fields of `Statistics`, one by one: autograd saves tensors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shifted: Tensor | None,
        activation: Tensor,
        dtype: torch.dtype,
        gradient_mask: str,
        backend: str,
        *statistics: Tensor,
    ) -> Tensor:
        kept = (weight if shifted is None else shifted) if x.requires_grad else None
        ctx.save_for_backward(x, kept, *statistics)
        ctx.dtype, ctx.gradient_mask, ctx.backend, ctx.weight_dtype = dtype, gradient_mask, backend, weight.dtype
        return activation.to(dtype) if activation.dtype != dtype else activation.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *tensors = ctx.saved_tensors
        found = Statistics(*tensors)
        pending = PendingPull(found.ticket, UNOBSERVED, found.pull(x))
        options = ctx.gradient_mask, ctx.dtype, True, ctx.backend
        masked, bias_gradient = operators.call(
            "masked_gradient", grad_output, found.mask, found.winner, *options, pending
        )
        gradients = _products(masked, x, weight, (ctx.dtype, ctx.weight_dtype))
        _, _, needs_bias, *others = ctx.needs_input_grad
        bias_gradient = bias_gradient.to(ctx.weight_dtype) if needs_bias else None
        return *gradients, bias_gradient, *[None] * len(others)
