"""The stages in CUDA C++ for which Triton does not reach the hardware (csrc/cuda): float32, any shape, any strides.

The functions, their arguments and their results are those of the stages in `reference`; `why_not` says which
calls do not come here. Nothing waits for the device.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from . import native, private, triton
from .cuda_structs import STRUCTS
from .structures import Competition, leading

KINDS = {torch.int64: 0, torch.int32: 1, torch.float32: 2}  # of ranks

# Where forms of a stage compete: which is taken, read at every call (csrc/cuda/plan.h explains the numbers).
LAUNCH: dict[str, dict[str, int]] = {
    # near: 0, a feature's neighbors in registers, 1, read eight at once; cluster: 1, four rows in a cluster of blocks
    # where one block holds fewer.
    "competition": {"near": 1, "threads": 1024, "cluster": 0},
    # Samples a warp has on their way, bins of a column's keys, warps of a block, samples visited in a round.
    "selection": {"ahead": 8, "bins": 1024, "warps": 16, "round": 128},
    "rank": {},
    "sort": {},
}
# Every combination that is compiled, to go through: LAUNCH[stage] = FORMS[stage][i].
FORMS: dict[str, tuple[dict[str, int], ...]] = {
    "competition": tuple(
        {"near": near, "threads": threads, "cluster": cluster}
        for (near, threads), cluster in product(((1, 1024), (1, 768), (0, 384)), (0, 1))
    ),
    "selection": tuple(
        dict(zip(("ahead", "bins", "warps", "round"), form, strict=True))
        for form in ((8, 1024, 16, 128), (16, 1024, 16, 128), (8, 512, 16, 128), (8, 1024, 16, 256), (16, 512, 8, 128))
    ),
    "rank": ({},),
    "sort": ({},),
}


def missing(device_type: str, dtype: torch.dtype = torch.float32) -> str | None:
    """None where this backend serves weights of this dtype on this type of device, else the reason.

    It needs Triton, which has the other stages.
    """
    return triton.missing(device_type, dtype) or library(device_type)


def library(device_type: str) -> str | None:
    """None where there is a library for tensors of this type of device, else why there is none."""
    if device_type == "cuda" and torch.version.hip is not None:
        return "its CUDA C++ library is for NVIDIA's GPUs, and this torch for AMD's"
    try:
        on_host = bool(native.cuda().bcl_cuda_on_host())
    except ImportError as error:
        return str(error)
    if on_host == (device_type == "cpu"):
        return None
    return "its CUDA C++ library runs " + ("on the host, for tests" if on_host else "on GPUs only")


# Stage -> the fewest samples and features from which on this library serves it; below, Triton does. Not yet measured:
# by arithmetic (bench/LOG.md) the library is ahead at every size.
MIN_SIZE = {"competition": (1, 2), "selection": (1, 2), "rank": (1, 2)}
MAX_RESCUE_K = 32  # samples of a feature that the selection's kernels keep at hand


def why_not(stage: str, arguments: Sequence[Any]) -> str | None:
    """None where this library serves a call of a stage with these arguments, else the reason; then Triton does."""
    if stage not in DECLINES:
        return "the stage is Triton's"
    first = leading(arguments)
    if first.dtype != torch.float32:
        return f"it computes in float32, not in {first.dtype}"
    return missing(first.device.type) or DECLINES[stage](*arguments)


def _too_small(stage: str, matrix: Tensor) -> str | None:
    (B, D), (samples, features) = matrix.shape, MIN_SIZE[stage]
    return (
        None if B >= samples and D >= features else f"Triton is faster below {samples} samples or {features} features"
    )


def _declines_competition(activation: Tensor, *_: Any) -> str | None:
    return _too_small("competition", activation)


def _declines_selection(
    activation: Tensor,
    bias: Tensor | None,
    x_inverse_norm: Tensor,
    weight_inverse_norm: Tensor | None,
    need: Tensor | None,
    affinity_rule: str,
    rescue_weighting: str,
    rescue_k: int,
) -> str | None:
    if affinity_rule != "rank":
        return f"it selects by rank alone, not by {affinity_rule}"
    if not 0 < rescue_k <= MAX_RESCUE_K:
        return f"it selects 1 to {MAX_RESCUE_K} samples a feature, not {rescue_k or 'all'}"
    return _too_small("selection", activation)


def _declines_rank(key: Tensor, *_: Any) -> str | None:
    return _too_small("rank", key)


# Stage -> why its C++ leaves a call to Triton, or None; asked at every call, by its arguments.
DECLINES: dict[str, Callable[..., str | None]] = {
    "competition": _declines_competition,
    "selection": _declines_selection,
    "rank": _declines_rank,
}


@functools.lru_cache(maxsize=4096)
def _bytes(stage: str, index: int | None, sizes: tuple[int, ...], form: tuple[int, ...]) -> ctypes.c_size_t:
    """The scratch memory of a stage for these sizes, device and form; 0 until the library was asked."""
    return ctypes.c_size_t()


def call(stage: str, like: Tensor, sizes: tuple[int, ...], *fields: int | float | None) -> Tensor:
    """Run a stage on the device of `like`, in its current stream; returns its scratch memory, float32.

    fields: those of its struct in cuda_structs but for the form. How much memory depends on `sizes` alone: only the
    first call for them asks.
    """
    library, form, index = native.cuda(), tuple(map(LAUNCH[stage].__getitem__, FORMS[stage][0])), like.device.index
    function, stream = getattr(library, f"bcl_cuda_{stage}"), None
    struct = STRUCTS[stage](*fields, *form)
    if like.is_cuda:
        stream = private.current_stream(index)
    wanted = _bytes(stage, index, sizes, form)
    error = 0
    if not wanted.value:
        error = function(struct, None, wanted, index or 0, stream)
        wanted.value += -wanted.value % 4 or 4 * (wanted.value == 0)
    if not error:
        scratch = torch.empty(wanted.value // 4, dtype=torch.float32, device=like.device)
        error = function(struct, scratch.data_ptr(), wanted, index or 0, stream)
    if error:
        _bytes.cache_clear()
        raise RuntimeError(f"the CUDA stage {stage} failed: {library.bcl_cuda_error(error).decode()} ({error})")
    return scratch


def competition(
    activation: Tensor,
    neighbors: Tensor,
    temperature: float,
    x: Tensor,
    forces: str,
    rescue_onset: float,
    pull_onset: float,
) -> Competition:
    """Stage `competition` (steps 2 to 8, and what follows from them for a sample or for a feature).

    What no operator returns, such as coverage and need, lies where the scratch memory begins.
    """
    x, neighbors = x.float(), neighbors.contiguous()
    (B, D), (features, k) = activation.shape, neighbors.shape
    if not 1 <= D == features or k < 1 or neighbors.dtype != torch.int64:
        raise native.bad_neighbors(neighbors, D)
    floats, indices = activation.new_empty, neighbors.new_empty
    rank_score, winner, pair_feature, pair_pull = floats(B, D), indices(B), indices(B, k), floats(B, k)
    winner_share, som_strength = floats(D), floats(D)
    inputs, results = (activation, neighbors, x), (rank_score, winner, pair_feature, pair_pull)
    pointers = [tensor.data_ptr() for tensor in (*inputs, *results, winner_share, som_strength)]
    strides, numbers = (*activation.stride(), *x.stride()), (temperature, rescue_onset, pull_onset)
    N, coupled = x.shape[1], forces == "coupled"
    scratch = call("competition", activation, (B, D, k), *pointers, *strides, B, D, N, k, *numbers, coupled)
    rest = scratch.numel() - 3 * B - 2 * D
    _, novelty, win_rate, x_inverse_norm, need, _ = scratch.split_with_sizes((B, D, D, B, B, rest))
    pairs = pair_feature, pair_pull
    return Competition(rank_score, novelty, win_rate, winner, *pairs, x_inverse_norm, need, winner_share, som_strength)


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
    """Stage `selection` (step 9b) for the rule `rank` and 1 to MAX_RESCUE_K samples a feature."""
    (B, D), r = activation.shape, min(rescue_k, activation.shape[0])
    rows, shares = activation.new_empty(D, r, dtype=torch.int64), activation.new_empty(D, r)
    vectors = [None if vector is None else vector.contiguous() for vector in (bias, x_inverse_norm, need)]
    pointers = [native.pointer(tensor) for tensor in (activation, *vectors, rows, shares)]
    call("selection", activation, (B, D), *pointers, *activation.stride(), B, D, r, rescue_weighting == "soft")
    return rows, shares


def rank(key: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """Stage `rank` (step 9b): key [B, D] -> stable rank within its column [B, D] int64, int32 or float32; NaN last."""
    B, D = key.shape
    ranks = torch.empty(B, D, dtype=dtype, device=key.device)
    call("rank", key, (B, D), key.data_ptr(), ranks.data_ptr(), *key.stride(), B, D, KINDS[dtype])
    return ranks
