"""How many threads a network is trained on: torch's own number is made for networks that are larger than these."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Multiply-adds of one product of a step for each thread: below, another thread waits longer than it works, and where
# others use the machine it waits for its turn, a thousand times longer.
PER_THREAD = 1 << 23


def threads_for(rows: int, features: int, inputs: int) -> int:
    """The threads for a layer of so many features and inputs on batches of so many rows: torch's number at most."""
    return max(1, min(torch.get_num_threads(), rows * features * inputs // PER_THREAD))


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Within this block torch, and this package with it, computes on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
