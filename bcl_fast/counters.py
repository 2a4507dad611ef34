"""Counters that live in tensors and are read on the host, and what of them a CUDA graph could replay."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends

NEAR = ("cpu",)  # devices whose memory the host reads at no cost: there a counter is read, not remembered
MAX_STEPS = 1 << 40  # of which `refresh_` on a device keeps count


def read_counter(counter: Tensor) -> int:
    """The value of an int64 scalar; another device is asked only where somebody else wrote the counter since.

    What the host knows hangs on the tensor itself, and goes with it wherever its object is moved to.
    """
    if counter.device.type in NEAR:
        return int(counter)
    version, value = counter.__dict__.get("_seen", (None, 0))
    return value if version == counter._version else _remember(counter, int(counter))


def _remember(counter: Tensor, value: int) -> int:
    counter.__dict__["_seen"] = counter._version, value
    return value


def write_counter_(counter: Tensor, value: int) -> None:
    """counter = value, and `read_counter` knows."""
    counter.fill_(value)
    if counter.device.type not in NEAR:
        _remember(counter, value)


def advance_(step: Tensor, backend: str) -> None:
    """step += 1 where this backend counts: on the device, or on the host, which then remembers it."""
    if backend in backends.REFRESH:
        step.add_(1)
    else:
        require_replayable(step, backend)
        write_counter_(step, read_counter(step) + 1)


def capturing(device: torch.device) -> bool:
    """Whether what is launched on this device now goes into a CUDA graph instead of being run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def require_replayable(step: Tensor, backend: str) -> None:
    """Raise where a graph would keep what the host knows of `step` at its capture, for all of its replays."""
    if capturing(step.device):
        raise RuntimeError(
            f"backend {backend!r} counts steps on the host, which no CUDA graph replays: to capture training, build "
            f"the layer with backend={' or '.join(map(repr, backends.REFRESH))}"
        )
