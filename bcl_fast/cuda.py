"""The stages in CUDA C++ for which Triton does not reach the hardware (csrc/cuda): float32, any shape, any strides.

The functions, their arguments and their results are those of the stages in `reference`; `ops.CUDA_SERVES` says which
calls come here. Nothing waits for the device.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import native

KINDS = {torch.int64: 0, torch.int32: 1, torch.float32: 2}  # of ranks


def missing(device_type: str) -> str | None:
    """None where the library serves tensors of this type of device, else why it does not."""
    try:
        on_host = bool(native.cuda().bcl_cuda_on_host())
    except ImportError as error:
        return str(error)
    if on_host == (device_type == "cpu"):
        return None
    return "its CUDA C++ library runs " + ("on the host, for tests" if on_host else "on GPUs only")


def _call(stage: str, like: Tensor, *arguments: int | float | None) -> None:
    """Run a stage on the device of `like`, in its current stream, with the scratch memory it asks for."""
    library, wanted = native.cuda(), ctypes.c_size_t()
    function, place = getattr(library, f"bcl_cuda_{stage}"), (0, None)
    if like.device.type == "cuda":
        place = like.device.index, torch.cuda.current_stream(like.device).cuda_stream
    error = function(*arguments, None, ctypes.byref(wanted), *place)
    if not error:
        scratch = torch.empty(max(wanted.value, 1), dtype=torch.uint8, device=like.device)
        error = function(*arguments, scratch.data_ptr(), ctypes.byref(wanted), *place)
    if error:
        raise RuntimeError(f"the CUDA stage {stage} failed: {library.bcl_cuda_error(error).decode()} ({error})")


def competition(
    activation: Tensor,
    neighbors: Tensor,
    temperature: float,
    x: Tensor,
    forces: str,
    rescue_onset: float,
    pull_onset: float,
) -> tuple[Tensor, ...]:
    """Stage `competition` (steps 2 to 8, and what follows from them for a whole sample or a whole feature)."""
    x, neighbors = x.float(), neighbors.contiguous()
    (B, D), k = activation.shape, neighbors.shape[1]
    real, whole = activation.new_empty, neighbors.new_empty
    results = (
        real(B, D), real(B), real(D), real(D), whole(B), whole(B, k), real(B, k), real(B), real(B), real(D), real(D)
    )  # fmt: skip
    _call("competition", activation, activation.data_ptr(), *activation.stride(), B, D, neighbors.data_ptr(), k,
          temperature, x.data_ptr(), *x.stride(), x.shape[1], forces == "coupled", rescue_onset, pull_onset,
          *(tensor.data_ptr() for tensor in results))  # fmt: skip
    return results


def selection(
    activation: Tensor,
    bias: Tensor | None,
    x_inverse_norm: Tensor,
    weight_inverse_norm: Tensor | None,
    need: Tensor | None,
    affinity_rule: str,
    rescue_weighting: str,
    rescue_k: int,
) -> tuple[Tensor, Tensor]:
    """Stage `selection` (step 9b) for the rule `rank` and at most 64 samples a feature."""
    (B, D), r = activation.shape, min(rescue_k, activation.shape[0])
    rows, shares = activation.new_empty(D, r, dtype=torch.int64), activation.new_empty(D, r)
    order_need, order = (None, None) if need is None else need.sort(descending=True)
    vectors = [None if vector is None else vector.contiguous() for vector in (bias, x_inverse_norm, need)]
    _call("selection", activation, activation.data_ptr(), *activation.stride(), B, D,
          *map(native.pointer, (*vectors, order_need, order)), r, rescue_weighting == "soft", rows.data_ptr(),
          shares.data_ptr())  # fmt: skip
    return rows, shares


def rank(key: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """Stage `rank` (step 9b): key [B, D] -> stable rank within its column [B, D] int64, int32 or float32; NaN last."""
    B, D = key.shape
    ranks = torch.empty(B, D, dtype=dtype, device=key.device)
    _call("rank", key, key.data_ptr(), *key.stride(), B, D, ranks.data_ptr(), KINDS[dtype])
    return ranks


def sort_segments(key: Tensor) -> None:
    """Sort each row of key [D, B] int32 by CUB alone, to measure `rank` against; the result is dropped."""
    other, sample, other_sample = (torch.empty_like(key) for _ in range(3))
    _call("sort", key, *(tensor.data_ptr() for tensor in (key, other, sample, other_sample)), *key.shape)
