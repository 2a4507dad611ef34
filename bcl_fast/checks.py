"""What a training forward refuses: inputs and weights that it could not train right, and the errors that say so."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def check_input(input: Tensor, weight: Tensor) -> None:
    """Raise a TypeError or ValueError unless input is dense floating point [..., N], for this weight [D, N]."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor, got {type(input).__name__}")
    if input.layout is not torch.strided or input.is_nested or not input.is_floating_point():
        raise TypeError(f"input must be dense floating point, got {_kind(input)}")
    if input.dim() == 0 or input.shape[-1] != weight.shape[-1]:
        raise ValueError(f"input must have shape [..., {weight.shape[-1]}], got {list(input.shape)}")
    if input.dtype != weight.dtype and not torch.is_autocast_enabled(input.device.type):
        raise TypeError(f"input must be {weight.dtype} like the weight (or use autocast), got {input.dtype}")


def check_weight(layer: nn.Linear, weight: Tensor, hooked: Tensor | None) -> None:
    """Raise where no pull could move this weight, in place and for good, and say why.

    `hooked` is the weight whose gradient the layer waits for already.
    """
    if "_is_replica" in layer.__dict__:
        raise RuntimeError(
            "nn.DataParallel trains copies of a BCLLayer, which are thrown away with their pulls: use "
            "nn.parallel.DistributedDataParallel with sync='local'"
        )
    if "_is_fsdp_managed_module" in layer.__dict__ and weight is not hooked:
        who = "fully_shard (FSDP2)" if weight.is_leaf else "FullyShardedDataParallel (FSDP)"
        raise RuntimeError(f"{who} shards the weight of a BCLLayer, which is pulled in one piece: leave it out")
    if hasattr(weight, "device_mesh"):
        raise RuntimeError("weight is a DTensor, spread over ranks: that of a BCLLayer is pulled in one piece")
    if not weight.is_leaf:
        raise RuntimeError(
            "weight must be a leaf: BCLLayer cannot train a parametrized weight (torch.nn.utils.parametrize, "
            "weight_norm, ...), because the pull writes it in place; remove the parametrization"
        )
    if not isinstance(weight, nn.Parameter):
        raise RuntimeError(
            "weight must be a Parameter of the layer: torch.func.functional_call with another tensor would train "
            "without a pull; call eval() before"
        )
    if weight.layout is not torch.strided or weight.is_nested or not weight.is_floating_point():
        raise TypeError(f"weight must be dense floating point, got {_kind(weight)}")


def ranks() -> int:
    """How many ranks the process group has; 1 without one."""
    group = torch.distributed
    return group.get_world_size() if group.is_available() and group.is_initialized() else 1


def no_global_sync() -> RuntimeError:
    """For a layer whose statistics would have to be those of all ranks."""
    return RuntimeError(
        f"sync='global' is not built yet and this process group has {ranks()} ranks; allowed: one rank, a layer that "
        "pulls nothing (frozen, or som_lr = 0, with decoupled forces), or sync='local' (every rank by itself: replicas "
        "drift)"
    )


def _kind(tensor: Tensor) -> str:
    """What keeps a tensor from being dense floating point."""
    if tensor.is_nested:
        return "a nested tensor"
    return str(tensor.dtype if tensor.layout is torch.strided else tensor.layout)
