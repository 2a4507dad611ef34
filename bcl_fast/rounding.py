"""Adding small increments to low-precision weights without losing them: stochastic rounding (SPEC section 5)."""

from __future__ import annotations

import torch
from torch import Tensor

# The bits of a normal number's fraction, and the exponent (as frexp gives it) of the smallest normal number.
_FRACTION_BITS = {torch.float16: 10, torch.bfloat16: 7}
_MIN_EXPONENT = {torch.float16: -13, torch.bfloat16: -125}


def _noise(shape: torch.Size, seed: Tensor) -> Tensor:
    """Multiples of 2**-16 in [0, 1), a function of the seed and the element's index alone (the splitmix64 mixer).

    A counter, not torch's generator: a resumed run repeats it, and the program's other random numbers do not change.
    """
    z = torch.arange(shape.numel(), dtype=torch.int64, device=seed.device).reshape(shape)
    z = (z + seed * 0x2545F4914F6CDD1D) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return ((z >> 40) & 0xFFFF).to(torch.float32) * 2.0**-16


def stochastic_round(value: Tensor, dtype: torch.dtype, seed: Tensor) -> Tensor:
    """value float32, any shape -> dtype (float16 or bfloat16), rounded up or down so that the mean is `value`.

    seed is an int64 scalar tensor: the same seed and value give the same bits.
    """
    exponent = torch.frexp(value).exponent.clamp(min=_MIN_EXPONENT[dtype])
    ulp = torch.ldexp(torch.ones_like(value), exponent - (_FRACTION_BITS[dtype] + 1))
    steps = value / ulp  # exact: ulp is a power of two
    rounded = torch.floor(steps + _noise(value.shape, seed)) * ulp
    return torch.where(value.isfinite(), rounded, value).to(dtype)


def add_rounded_(destination: Tensor, increment: Tensor, seed: Tensor) -> None:
    """destination += increment (same shape) in place; float16 and bfloat16 destinations are rounded stochastically."""
    if destination.dtype in _FRACTION_BITS:
        destination.copy_(stochastic_round(destination.float() + increment, destination.dtype, seed))
    else:
        destination.add_(increment)
