"""The stages in Triton (kernels/): what of them can be asked without importing it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch

from .structures import leading


def missing(device_type: str, dtype: torch.dtype = torch.float32) -> str | None:
    """None where this backend serves weights of this dtype on this type of device, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not (device_type == "cpu" and interpreted):
        return "it serves CUDA tensors only (with TRITON_INTERPRET=1 Triton's interpreter runs it on the CPU, slowly)"
    return "it computes in float32, and a float64 weight asks for float64" if dtype == torch.float64 else None


def why_not(stage: str, arguments: Sequence[Any]) -> str | None:
    """None where this backend serves a call of a stage with these arguments, else the reason."""
    first = leading(arguments)
    return missing(first.device.type, first.dtype)
