"""The layer's product with its masked backward (SPEC step 12)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops  # noqa: F401  (registers torch.ops.bcl_fast)
from .spec import BCLConfig


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype `nn.Linear` would multiply in: that of the weight, or of the autocast that is on."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class CompetitiveLinear(torch.autograd.Function):
    """x [B, N] -> x Wᵀ + c [B, D]; its backward gives each feature the gradient of the samples it won.

    Forward computes SPEC steps 2 to 11 beside the product. Backward computes step 12 with the weight of this forward
    and hands what the pull needs to the layer registered as `owner`. Multiplied in `dtype`; below float32 the
    statistics come from the float32 product of the rounded inputs, of which the output is the rounding.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        som_offset: Tensor | None,
        neighbors: Tensor,
        config: BCLConfig,
        dtype: torch.dtype,
        owner: int,
        observed: bool,
        backend: str,
    ) -> Tensor:
        stands = weight if som_offset is None else weight + som_offset
        exact = _statistics_dtype(dtype)
        activation = F.linear(
            x.to(dtype).to(exact), stands.to(dtype).to(exact), None if bias is None else bias.to(dtype).to(exact)
        )
        mask, spent, winner, *choices = torch.ops.bcl_fast.statistics(
            x,
            stands,
            bias,
            activation,
            neighbors,
            config.temperature,
            config.affinity,
            config.need_weighting,
            config.rescue_weighting,
            config.rescue_k,
            config.forces,
            config.gradient_mask,
            config.rescue_onset,
            config.pull_onset,
            config.check_finite,
            backend,
        )
        output = activation.to(dtype)
        seen = (activation, neighbors.clone()) if observed else ()
        # The weight is needed for dX alone; without it a second backward works after the pull changed it.
        kept = stands if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(kept, mask, winner, spent, x, *choices, *seen)
        ctx.config, ctx.dtype, ctx.owner, ctx.backend = config, dtype, owner, backend
        ctx.weight_dtype, ctx.compiled = weight.dtype, torch.compiler.is_compiling()
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        weight, mask, winner, spent, x, *rest = ctx.saved_tensors
        masked, bias_gradient = torch.ops.bcl_fast.masked_gradient(
            grad_output, mask, winner, ctx.config.gradient_mask, [spent, x, *rest], ctx.owner, ctx.compiled, ctx.backend
        )
        masked = masked.to(ctx.dtype)
        with torch.autocast(x.device.type, enabled=False):
            x_gradient = (masked @ weight.to(ctx.dtype)).to(x.dtype) if weight is not None else None
            weight_gradient = (masked.T @ x.to(ctx.dtype)).to(ctx.weight_dtype)
        bias_gradient = bias_gradient.to(ctx.weight_dtype) if ctx.needs_input_grad[2] else None
        return x_gradient, weight_gradient, bias_gradient, None, None, None, None, None, None, None
