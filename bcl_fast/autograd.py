"""The masked backward of the layer's product (step 12)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import operators, owners, private
from .backends import GENERAL
from .structures import UNOBSERVED, Observed, PendingPull, Statistics


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


class MaskedLinear(torch.autograd.Function):
    """The output of a linear layer, already computed, with the backward that gives each feature what it won.

    x [B, N], weight [D, N], bias [D] or None receive gradients. shifted is W + O [D, N] in offset space, else None;
    activation [B, D] is the product, dtype is that of the output and of the gradients' products, moves is how often the
    weight had moved. What follows are the fields of `Statistics`, one by one: autograd saves tensors.
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
        moves: int,
        observed: Observed,
        *statistics: Tensor,
    ) -> Tensor:
        # The weight is needed for dX alone; without it a second backward works after the pull changed it.
        kept = (weight if shifted is None else shifted) if x.requires_grad else None
        ctx.save_for_backward(x, kept, *statistics)
        # Not saved: a checkpoint compares what is with what a recomputation saves, which may fall into another step.
        ctx.observed = observed
        ctx.dtype, ctx.gradient_mask, ctx.backend = dtype, gradient_mask, backend
        ctx.weight_dtype, ctx.compiled = weight.dtype, torch.compiler.is_compiling()
        # What is saved may come back copied (save_on_cpu) or made anew (checkpoint); this forward's own ticket may not.
        ticket = Statistics(*statistics).ticket
        ctx.ticket, ctx.moves, ctx.weight = (None, 0, None) if ctx.compiled else (ticket, moves, weight)
        return activation.to(dtype) if activation.dtype != dtype else activation.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *statistics = ctx.saved_tensors  # once: checkpoint gives them away
        saved = x, weight, Statistics(*statistics)
        if ctx.compiled or not torch.is_grad_enabled():
            return MaskedLinear._gradients(ctx, grad_output, *saved)
        with torch.no_grad():
            gradients = MaskedLinear._gradients(ctx, grad_output, *saved)
        origins = grad_output, x, ctx.weight
        return tuple(None if gradient is None else _Once.apply(gradient, *origins) for gradient in gradients)

    @staticmethod
    def _gradients(
        ctx: Any,
        grad_output: Tensor,
        x: Tensor,
        weight: Tensor | None,
        statistics: Statistics,
    ) -> tuple[Tensor | None, ...]:
        ticket = statistics.ticket
        if ctx.ticket is not None and ticket is not ctx.ticket:
            owners.require_still(ticket, ctx.ticket, ctx.moves)
            ticket = ctx.ticket
        bypass = not ctx.compiled and operators.can_bypass_dispatcher(grad_output)
        batched = bypass and private.is_batched_gradient(grad_output)
        reuse = bypass and not batched and not private.keeps_graph()  # else the mask is read again
        masked, bias_gradient = operators.call(
            "masked_gradient",
            grad_output,
            statistics.mask,
            statistics.winner,
            ctx.gradient_mask,
            ctx.dtype,
            ctx.compiled,
            reuse,
            GENERAL if batched else ctx.backend,
            PendingPull(ticket, ctx.observed, statistics.pull(x)),
        )
        if bypass and ctx.observed is not UNOBSERVED and not private.keeps_graph():
            ctx.observed = UNOBSERVED
        with operators.no_autocast(x.device.type):
            x_gradient = (masked @ weight.to(ctx.dtype)).to(x.dtype) if weight is not None else None
            weight_gradient = (masked.T @ x.to(ctx.dtype)).to(ctx.weight_dtype)
        _, _, needs_bias, *others = ctx.needs_input_grad
        bias_gradient = bias_gradient.to(ctx.weight_dtype) if needs_bias else None
        return x_gradient, weight_gradient, bias_gradient, *[None] * len(others)
