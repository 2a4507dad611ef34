"""What the saved buffers of a layer are at step 0, and what they may never be (step 1, SPEC section 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import counters, operators

WIDENED = (torch.int32, torch.int16, torch.int8, torch.uint8)  # the same numbers as in int64
Kind = tuple[tuple[int, ...], torch.dtype]


class StatefulLayer(Protocol):
    """A layer as its saved buffers see it."""

    weight: Tensor
    neighbors: Tensor
    step: Tensor
    som_offset: Tensor | None
    _refreshed_at: Tensor


@dataclass
class Written:
    """A layer's weight and buffers, and their versions, as the layer left them: these it need not check again."""

    weight: Tensor | None = None
    neighbors: Tensor | None = None
    neighbors_version: int = -1
    step: Tensor | None = None
    step_version: int = -1
    refreshed_at: Tensor | None = None
    som_offset: Tensor | None = None
    nobody: bool = False  # True: nobody has written the buffers, they hold what the memory held

    def still(self, neighbors: Tensor, step: Tensor, refreshed_at: Tensor) -> bool:
        """Whether the buffers are those, as they were left."""
        return (
            neighbors is self.neighbors
            and neighbors._version == self.neighbors_version
            and step is self.step
            and step._version == self.step_version
            and refreshed_at is self.refreshed_at
        )


def written_by(layer: StatefulLayer) -> Written:
    """The weight and the state of a layer that has just written them itself."""
    near, step = layer.neighbors, layer.step
    if near.is_inference() or step.is_inference():  # they have no versions
        return Written()
    versions = near, near._version, step, step._version
    return Written(layer.weight, *versions, layer._refreshed_at, layer.som_offset)


class Wrong(NamedTuple):
    """What is wrong with the numbers of a buffer."""

    buffer: str
    message: str  # as an error says it


def fresh(layer: StatefulLayer, device: torch.device) -> dict[str, Tensor]:
    """The saved buffers of a layer at step 0, of the shapes and dtypes that it has now."""
    D, k = layer.neighbors.shape
    place, feature = torch.arange(k, device=device), torch.arange(D, device=device)[:, None]
    neighbors = place + (place >= feature)  # valid indices, none of them the feature itself
    buffers = {"neighbors": neighbors, "step": torch.zeros((), dtype=torch.int64, device=device)}
    offset = layer.som_offset
    return buffers if offset is None else {**buffers, "som_offset": torch.zeros_like(offset, device=device)}


def complete(layer: StatefulLayer, weight: Tensor) -> None:
    """Make the buffers that are still on the meta device, once somebody has put in a weight with numbers."""
    if weight.is_meta:
        return
    if layer._refreshed_at.is_meta:
        layer._refreshed_at = torch.full((), -1, device=weight.device)
    if layer.neighbors.is_meta or layer.step.is_meta:
        for name, value in fresh(layer, weight.device).items():
            setattr(layer, name, value)


def prepare_loading(layer: StatefulLayer, state_dict: dict[str, Any], prefix: str) -> None:
    """Give the checkpoint of a plain `nn.Linear` the buffers of step 0; a ValueError for integers that are none."""
    if isinstance(weight := state_dict.get(prefix + "weight"), Tensor):
        buffers = {prefix + name: value for name, value in fresh(layer, weight.device).items()}
        if not buffers.keys() & state_dict.keys():
            state_dict.update(buffers)
    for name in ("neighbors", "step"):
        found = state_dict.get(prefix + name)
        if isinstance(found, Tensor) and (found.is_floating_point() or found.is_complex()):
            raise ValueError(f"{name} must be integers, got {found.dtype} in the state_dict")


def kinds(weight: Tensor, k: int, som_space: str) -> dict[str, Kind]:
    """The shape and dtype of every buffer of a layer with this weight [D, N] and k neighbors."""
    index = torch.int64
    found: dict[str, Kind] = {"neighbors": ((weight.shape[0], k), index), "step": ((), index)}
    found["_refreshed_at"] = (), index
    return found if som_space == "weight" else {**found, "som_offset": (tuple(weight.shape), weight.dtype)}


def check_kinds(layer: StatefulLayer, weight: Tensor, k: int, som_space: str) -> None:
    """Raise a ValueError for a buffer that is of another shape, dtype or device than this weight needs."""
    for name, kind in kinds(weight, k, som_space).items():
        buffer = getattr(layer, name)
        right = of_kind(name, buffer, kind, weight.device)
        if right is not buffer:
            setattr(layer, name, right)


def of_kind(name: str, buffer: Tensor | None, kind: Kind, device: torch.device) -> Tensor:
    """The buffer, integers widened to int64; a ValueError that names one of another kind or on another device."""
    shape, dtype = kind
    if isinstance(buffer, Tensor) and dtype == torch.int64 and buffer.dtype in WIDENED:
        buffer = buffer.long()
    if isinstance(buffer, Tensor) and (tuple(buffer.shape), buffer.dtype, buffer.device) == (shape, dtype, device):
        return buffer
    got = f"{list(buffer.shape)} {buffer.dtype} on {buffer.device}" if isinstance(buffer, Tensor) else repr(buffer)
    raise ValueError(f"{name} must be {list(shape)} {dtype} on {device}, got {got}")


def wrong(neighbors: Tensor, step: Tensor, som_offset: Tensor | None) -> Wrong | None:
    """What is wrong with the numbers of these buffers, if they have any, or None. One synchronization on a GPU."""
    if not has_numbers(neighbors):
        return None
    (D, k), own = neighbors.shape, torch.arange(neighbors.shape[0], device=neighbors.device)[:, None]
    doubled = (neighbors.sort(dim=1).values.diff(dim=1) == 0).any(dim=1)
    bad = ((neighbors < 0) | (neighbors >= D) | (neighbors == own)).any(dim=1) | doubled
    finite = torch.ones_like(step) if som_offset is None else som_offset.isfinite().all().to(step.dtype)
    some_bad, now, all_finite = torch.stack([bad.any().to(step.dtype), step, finite]).tolist()
    if some_bad:
        feature = int(bad.nonzero()[0])
        return Wrong(
            "neighbors",
            f"neighbors must be, for each feature, {k} different others of 0 .. {D - 1}, "
            f"got {neighbors[feature].tolist()} for feature {feature}",
        )
    if not 0 <= now < counters.MAX_STEPS:
        return Wrong("step", f"step must be >= 0 and < 2^40, got {now}")
    if som_offset is not None and not all_finite:
        place = (~som_offset.isfinite()).nonzero()[0].tolist()
        return Wrong("som_offset", f"som_offset must be finite, got {som_offset[tuple(place)]} at {place}")
    return None


def has_numbers(tensor: Tensor) -> bool:
    """Whether a tensor can be looked at: one of the meta device, or a fake, cannot."""
    return not tensor.is_meta and type(tensor) in operators.PLAIN


def same_numbers(before: Tensor, after: Tensor) -> bool:
    """Whether a move of its module has left the numbers of a buffer as they were."""
    if before is after or not has_numbers(after):
        return True
    return has_numbers(before) and bool(torch.equal(before.to(after.device), after))
