"""Owners: who receives a backward's pending pull.

Operators pass tensors alone, and a compiled backward knows no Python object: each forward therefore leaves a ticket, by
which the operator of its backward finds the layer's pulls. This is the one step upward, from the backward to the layer.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

import torch
from torch import Tensor

from .structures import PendingPull


class Owner(Protocol):
    """The pulls of a layer, as the operators see them."""

    @property
    def moves(self) -> int: ...
    def receive(self, pending: PendingPull, dtype: torch.dtype, compiled: bool) -> None: ...
    def recompute(self, task: int) -> bool: ...
    def require_still(self, moves: int) -> None: ...
    def called_by_compiled_code(self, *state: Tensor) -> None: ...


# importlib.reload must keep the registry of the layers that are alive.
_owners: weakref.WeakValueDictionary[int, Owner] = globals().get("_owners") or weakref.WeakValueDictionary()
_owner_numbers = globals().get("_owner_numbers") or itertools.count(1)


def register_owner(owner: Owner) -> Tensor:
    """The ticket of `owner`, the number by which operators find it as long as it lives; it is never used again.

    An int64 scalar on the host: as a tensor it is data to torch.compile, so that layers share compiled code. Every
    forward copies it for its pull: negative where it runs inside a backward, as the recomputations of activation
    checkpointing do, and 0 once the pull is consumed.
    """
    number = next(_owner_numbers)
    _owners[number] = owner
    return torch.tensor(number, device="cpu")


def owner_of(ticket: Tensor) -> Owner | None:
    """The owner that a ticket names; None where its pull is consumed or its layer is gone."""
    return _owners.get(abs(int(ticket)))


def hand_over(pending: PendingPull, dtype: torch.dtype, compiled: bool) -> None:
    """Give a pull to its owner, whose forward had a product of this dtype, unless it is consumed or nobody's."""
    owner = owner_of(pending.ticket)
    if owner is not None:
        owner.receive(pending, dtype, compiled)


def require_still(found: Tensor, own: Tensor, moves: int) -> None:
    """Raise where the forward of ticket `own` was recomputed at another weight, as the ticket found instead tells."""
    if int(found) < 0 <= int(own) and (owner := owner_of(found)) is not None:
        owner.require_still(moves)
