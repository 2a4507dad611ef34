"""What travels between the stages, by name: one order from the operators to the C structs (SPEC section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Competition(NamedTuple):
    """What the stage `competition` returns: steps 2 to 8, and what follows from them for a sample or a feature."""

    rank_score: Tensor  # [B, D], R of step 3
    novelty: Tensor  # [D], step 5
    win_rate: Tensor  # [D], step 7
    winner: Tensor  # [B] int64, step 8
    pair_feature: Tensor  # [B, k] int64, the neighbors of each sample's winner
    pair_pull: Tensor  # [B, k], their rank_score * local_novelty (step 9a)
    x_inverse_norm: Tensor  # [B], step 9b
    need: Tensor  # [B], step 9b
    winner_share: Tensor  # [D], u of step 10
    som_strength: Tensor  # [D], v of step 11


class Pull(NamedTuple):
    """What steps 9a to 13 need of a forward to move its features."""

    x: Tensor  # [B, N]
    pair_feature: Tensor  # [B, k] int64
    pair_pull: Tensor  # [B, k]
    rescue_rows: Tensor  # [D, r] int64
    rescue_weight: Tensor  # [D, r]
    winner_share: Tensor  # [D]
    som_strength: Tensor  # [D]


class Statistics(NamedTuple):
    """What the operator `statistics_` returns: the mask of step 11, and a pull without its x, which is an input."""

    mask: Tensor  # [B, D] for gradient_mask `soft`, else empty
    winner: Tensor  # [B] int64
    ticket: Tensor  # int64 scalar on the host: see owners.register_owner
    pair_feature: Tensor
    pair_pull: Tensor
    rescue_rows: Tensor
    rescue_weight: Tensor
    winner_share: Tensor
    som_strength: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What autograd saves of it."""
        return self

    @property
    def sizes(self) -> PackedSizes | None:
        """None: nothing is packed."""
        return None

    def pull(self, x: Tensor) -> Pull:
        """The pull of the forward whose input was x [B, N]."""
        rescue = self.rescue_rows, self.rescue_weight
        return Pull(x, self.pair_feature, self.pair_pull, *rescue, self.winner_share, self.som_strength)


class PackedSizes(NamedTuple):
    """What decides where everything lies in `packed`: int64, as csrc/cpu/interface.h orders it."""

    B: int
    D: int
    N: int
    k: int
    r: int
    dtype: torch.dtype  # of what is not an index

    @property
    def words(self) -> int:
        """How many elements `packed` has."""
        reals = self.B * self.k + self.D * self.r + 2 * self.D
        return self.B + self.B * self.k + self.D * self.r + -(-reals * self.dtype.itemsize // 8)


class PackedPull(NamedTuple):
    """A pull whose tensors but x lie in one, `packed`."""

    x: Tensor
    packed: Tensor
    sizes: PackedSizes

    def unpacked(self) -> Pull:
        """The same, a view of it for each tensor."""
        B, D, _, k, r, dtype = self.sizes
        integers = B + B * k + D * r
        _, pair_feature, rescue_rows = self.packed[:integers].split((B, B * k, D * r))
        reals = self.packed[integers:].view(dtype)[: B * k + D * r + 2 * D]
        pair_pull, rescue_weight, winner_share, som_strength = reals.split((B * k, D * r, D, D))
        pairs, rescue = (
            (pair_feature.view(B, k), pair_pull.view(B, k)),
            (rescue_rows.view(D, r), rescue_weight.view(D, r)),
        )
        return Pull(self.x, *pairs, *rescue, winner_share, som_strength)


def unpacked(pull: Pull | PackedPull) -> Pull:
    """A pull as the stages take it."""
    return pull.unpacked() if isinstance(pull, PackedPull) else pull


class PackedStatistics(NamedTuple):
    """`Statistics` whose tensors but the mask lie in one, `packed`: int64, see `PackedSizes`."""

    mask: Tensor
    ticket: Tensor
    packed: Tensor
    sizes: PackedSizes

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What autograd saves of it."""
        return self.mask, self.ticket, self.packed

    @property
    def winner(self) -> Tensor:
        return self.packed[: self.sizes.B]

    def pull(self, x: Tensor) -> PackedPull:
        """The pull of the forward whose input was x [B, N]."""
        return PackedPull(x, self.packed, self.sizes)


def made_of(tensors: Sequence[Tensor], sizes: PackedSizes | None) -> Statistics | PackedStatistics:
    """The statistics whose `tensors` and `sizes` these are."""
    if sizes is None:
        return Statistics(*tensors)
    mask, ticket, packed = tensors
    return PackedStatistics(mask, ticket, packed, sizes)


def leading(arguments: Sequence[Any]) -> Tensor:
    """The first tensor of a stage's arguments: its device and dtype say who can serve the call."""
    return arguments[0].x if isinstance(arguments[0], Pull) else arguments[0]


class Observed(NamedTuple):
    """What observers are shown of a forward besides its pull; None where nobody observes."""

    activation: Tensor | None = None  # [B, D]
    neighbors: Tensor | None = None  # [D, k]


UNOBSERVED = Observed()


class PendingPull(NamedTuple):
    """A pull that waits for its backward, and for the optimizer's step where one is bound."""

    ticket: Tensor
    observed: Observed
    pull: Pull | PackedPull

    @classmethod
    def of(cls, ticket: Tensor, activation: Tensor | None, neighbors: Tensor | None, *pull: Tensor) -> PendingPull:
        """That of these fields, one by one."""
        return cls(ticket, Observed(activation, neighbors), Pull(*pull))
