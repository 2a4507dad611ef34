"""Which backends there are, which stages each serves, and which of them serves a layer.

Every stage of SPEC section 2 has one name and one signature in every backend. Backends are imported inside functions,
the first time that something asks for one.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .spec import BCLConfig, listed

# Stage -> the module under kernels/ that holds it for Triton; in every other backend its own module holds all stages.
STAGES = {
    "neighbors": "neighbors",
    "competition": "competition",
    "inverse_norm": "inverse_norm",
    "selection": "selection",
    "targets": "targets_pull",
    "targets_pull_": "targets_pull",
    "gradient": "gradient",
    "rank": "selection",
}
# Backends that decide on the device whether neighbors are due, and count steps there: nothing waits for the host.
REFRESH = ("triton", "cuda")
WHOLE = ("cpu",)  # backends whose `forward` makes all statistics of a forward in one call, packed into one tensor
ON_GPU = ("triton", "cuda")  # without a GPU they run in Triton's interpreter and on the host, slowly
NAMES = ("reference", "portable", "cpu", *ON_GPU)
# Type of device -> what `fused=True` means there, the first of these that serves; else, or where none does: GENERAL.
FASTEST: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
GENERAL = "portable"


@functools.cache
def stage(name: str, backend: str) -> Callable[..., Any]:
    """The function that serves a stage on a backend; `refresh_`, which only those of REFRESH have, is one too.

    `cuda` is Triton but for the calls that its C++ serves.
    """
    if backend in ON_GPU:
        triton = _function("kernels." + ("neighbors" if name == "refresh_" else STAGES[name]), name)
        if backend == "triton":
            return triton
        from . import cuda

        declines = cuda.DECLINES.get(name)
        if declines is None:
            return triton
        own = _function("cuda", name)
        return lambda *arguments: (triton if declines(*arguments) else own)(*arguments)
    return _function(backend, name)


def _function(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module("." + module, __package__), name)


def why_not_stage(name: str, backend: str, arguments: Sequence[Any]) -> str | None:
    """None where a backend's own code serves a call of a stage with these arguments, else the reason."""
    return _function(backend, "why_not")(name, arguments)


def why_not(backend: str, device_type: str, dtype: torch.dtype = torch.float32) -> str | None:
    """None where a backend can serve weights of this dtype on this type of device ("cpu", ...), else the reason."""
    return _function(backend, "missing")(device_type, dtype)


def cpu_library() -> str:
    """Which instructions and whose threads the C++ library of the backend `cpu` uses, or why there is none."""
    from . import cpu

    return cpu.missing() or f"{cpu.instruction_set()} instructions, {cpu.threading()}"


def cuda_library() -> str:
    """Whether the CUDA C++ library of the backend `cuda` is there, or why it is not."""
    from . import cuda

    return cuda.library("cuda") or "built"


def availability(device_type: str) -> dict[str, str | None]:
    """Every backend by name -> None where it can serve on this type of device, else why it cannot."""
    return {name: why_not(name, device_type) for name in NAMES}


def resolve_backend(
    fused: bool, backend: str | None, device_type: str = "cpu", dtype: torch.dtype = torch.float32
) -> str:
    """The backend that serves a layer: the one named, else the fastest of the device (`fused`), else the reference.

    Raises ValueError for an unknown name, for one that cannot serve here, and for `fused=False` with a backend other
    than the reference. Warns once where the fastest of this type of device is missing.
    """
    if not isinstance(fused, bool):
        raise TypeError(f"fused must be True or False, got {fused!r}")
    if backend is None:
        return _fastest(device_type, dtype) if fused else "reference"
    if backend not in NAMES:
        raise ValueError(f"backend must be None or one of {listed(NAMES)}, got {backend!r}")
    if not fused and backend != "reference":
        raise ValueError(f"backend={backend!r} needs fused=True; fused=False is the reference")
    reason = why_not(backend, device_type, dtype) if device_type != "meta" else None
    if reason:
        raise ValueError(f"backend={backend!r} cannot serve on {device_type!r}: {reason}")
    return backend


def fastest(device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """The backend that `fused=True` means for weights of this dtype on this type of device."""
    serving = (name for name in FASTEST.get(device_type, ()) if why_not(name, device_type, dtype) is None)
    return next(serving, GENERAL)


@functools.cache  # warns once
def _fastest(device_type: str, dtype: torch.dtype) -> str:
    name, faster = fastest(device_type, dtype), FASTEST.get(device_type)
    if name == GENERAL and faster:
        reason = why_not(faster[-1], device_type, dtype)
        warnings.warn(f"backend {GENERAL!r} serves, slower than {faster[-1]!r} would: {reason}", stacklevel=5)
    return name


def tried(device_type: str) -> str:
    """What has been done with this package on this type of device, or on a type that is not named here."""
    if device_type == "cpu":
        return "tested and measured"
    if device_type != "cuda":
        return "never run"
    return f"compiled for {'gfx942 (ROCm)' if torch.version.hip else 'sm_80, sm_90 and sm_100'}, never run"


# --- For observers ----------------------------------------------------------------------------------------------------


def record(
    step: int,
    x: Tensor,
    weight: Tensor,
    som_offset: Tensor | None,
    bias: Tensor | None,
    activation: Tensor,
    neighbors: Tensor,
    config: BCLConfig,
) -> Any:
    """One step's `reference.Record` with every tensor that SPEC.md names, each with storage of its own."""
    from . import reference

    dtype = activation.dtype
    effective_weight = weight.to(dtype, copy=True) if som_offset is None else (weight + som_offset).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return reference.record(step, x.to(dtype, copy=True), effective_weight, bias, activation, neighbors, config)
