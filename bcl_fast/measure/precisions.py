"""Precisions: what an `nn.Linear` multiplies in, and how far a BCL layer may then stray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

# Name -> float64 regret of the samples chosen end to end, at most: another rounding makes other choices.
PRECISIONS = {"fp32": 1e-5, "tf32": 1e-3, "bf16": 1e-2}
ROUNDING = {"fp32": 0.0, "tf32": 2.0**-11, "bf16": 2.0**-8}  # of an operand, relative; float32 takes it as it is


@contextmanager
def multiplying(precision: str) -> Iterator[None]:
    """Within this block float32 products may be tf32 where that is the precision; on a CPU they stay float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def forward(precision: str, device_type: str) -> AbstractContextManager[None]:
    """Around each forward: bf16 is autocast's, entered again for every step as training does."""
    return torch.autocast(device_type, torch.bfloat16) if precision == "bf16" else nullcontext()
