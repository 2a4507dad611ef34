"""The stages in C++ for CPU tensors (csrc/cpu): float32 and float64, any shape.

The functions, their arguments and their results are those of the stages in `reference`. Threads are as many as torch
uses, one where the library was built without OpenMP; results do not depend on how many.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from ctypes import Structure
from os.path import basename
from typing import Any

import torch
from torch import Tensor

from . import cpu_structs, native
from .norms import with_norms
from .spec import StatisticsOptions
from .structures import Competition, PackedPull, PackedSizes, PackedStatistics, Pull, leading

TILE = 512  # features of a tile of the neighbor search, which holds TILE * TILE similarities at once
RULES = {"rank": 0, "clamped_cosine": 1, "cosine": 2}
NO_MEMORY, BAD_SIZE, BAD_PAIR_FEATURE, BAD_RESCUE_ROW = 1, 2, 3, 4  # what the library returns instead of 0
SUFFIX = {torch.float32: "f32", torch.float64: "f64"}


def missing(device_type: str = "cpu", dtype: torch.dtype = torch.float32) -> str | None:
    """None where this backend serves weights of this dtype on this type of device, else the reason."""
    if device_type != "cpu":
        return "it serves CPU tensors only"
    try:
        native.cpu()
    except ImportError as error:
        return str(error)
    return None


def why_not(stage: str, arguments: Sequence[Any]) -> str | None:
    """None where this backend serves a call of a stage with these arguments, else the reason."""
    first = leading(arguments)
    return _inexpressible(first.dtype) or missing(first.device.type)


def _inexpressible(dtype: torch.dtype) -> str | None:
    return None if dtype in SUFFIX else f"it computes in float32 and float64, not in {dtype}"


def instruction_set() -> str:
    """Which copy of the kernels this processor takes: avx512, avx2 or baseline."""
    return native.cpu().bcl_cpu_isa().decode()


def threading() -> str:
    """On whose threads the kernels run, in words: those of torch's OpenMP runtime, of another one, or on one alone."""
    address = native.cpu().bcl_cpu_openmp()
    if address is None:
        return "one thread: built without OpenMP"
    own, others = native.library_of(address), native.torch_openmp()
    if own is None:
        return "OpenMP, this system does not say whose"
    if own == others:
        return "OpenMP of torch"
    if others is None:
        return f"OpenMP runtime {basename(own)}, torch's is not known"
    if basename(own) != basename(others):
        own, others = basename(own), basename(others)
    return f"another OpenMP runtime ({own}) than torch's ({others})"


@functools.cache
def _function(stage: str, dtype: torch.dtype) -> Callable[[Structure, int], int]:
    if reason := _inexpressible(dtype):
        raise TypeError(f"backend='cpu' cannot run the stage {stage}: {reason}")
    return getattr(native.cpu(), f"bcl_cpu_{stage}_{SUFFIX[dtype]}")


def _call(stage: str, dtype: torch.dtype, arguments: Structure) -> int:
    """Run a stage: 0, or which of its indices the library refused."""
    status = _function(stage, dtype)(arguments, torch.get_num_threads())
    if status == NO_MEMORY:
        raise MemoryError(f"no memory for the stage {stage}")
    if status == BAD_SIZE:
        raise ValueError(f"the stage {stage} does not take inputs of these shapes")
    return status


def _outside(refused: int, pull: Pull, D: int) -> ValueError:
    """The error for an index of a pull that the library refused."""
    pairs = refused == BAD_PAIR_FEATURE
    name, index, size = (
        ("pair_feature", pull.pair_feature, D) if pairs else ("rescue_rows", pull.rescue_rows, len(pull.x))
    )
    value = int(index[(index < 0) | (index >= size)][0])
    return ValueError(f"{name} must hold indices 0 .. {size - 1}, got {value}")


def _rows(matrix: Tensor) -> Tensor:
    """The same matrix with columns side by side; rows may lie apart."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _rows_of(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in a dtype; small steps feel a call of `to` that changes nothing."""
    return _rows(matrix if matrix.dtype == dtype else matrix.to(dtype))


class _Lists:
    """The most similar others of each of D features so far, the most similar first: near [D, k], and how similar."""

    def __init__(self, D: int, k: int, dtype: torch.dtype) -> None:
        self.near = torch.full((D, k), torch.iinfo(torch.int64).max)
        self.best = torch.full((D, k), -torch.inf, dtype=dtype)

    def take(self, similarity: Tensor, first_row: int, first_column: int, rows: int, columns: int | None) -> None:
        """Take in the similarities of a tile, of features from first_row on with features from first_column on.

        The lists of its rows begin at the list `rows`, those of its columns at `columns`; None: only the rows look.
        """
        pointers = *self._pointers(rows), *((None, None) if columns is None else self._pointers(columns))
        sizes = similarity.stride(0), *similarity.shape, first_row, first_column, self.near.shape[1]
        _call("neighbors", similarity.dtype, cpu_structs.Neighbors(similarity.data_ptr(), *pointers, *sizes))

    def _pointers(self, first: int) -> tuple[int, int]:
        at = first * self.near.shape[1]
        return self.near.data_ptr() + at * self.near.itemsize, self.best.data_ptr() + at * self.best.itemsize


def nearest(similarity: Tensor, first: int, neighborhood_k: int) -> Tensor:
    """The panel [R, D] of similarities of features first .. first + R - 1 -> their nearest others [R, k] int64."""
    similarity = _rows(similarity)
    R, D = similarity.shape
    lists = _Lists(R, min(neighborhood_k, D - 1), similarity.dtype)
    lists.take(similarity, first, 0, rows=0, columns=None)
    return lists.near


def neighbors(weight: Tensor, neighborhood_k: int) -> Tensor:
    """Stage `neighbors` (step 1), by tiles above the diagonal alone: a similarity is one for both of its features.

    Holds a copy of the weight and one tile; no [D, D] matrix.
    """
    rows, norm, _ = with_norms(weight)
    unit = rows / norm
    D = weight.shape[0]
    lists = _Lists(D, min(neighborhood_k, D - 1), unit.dtype)
    memory = unit.new_empty(min(D, TILE) ** 2)
    for i in range(0, D, TILE):
        for j in range(i, D, TILE):
            one, other = unit[i : i + TILE], unit[j : j + TILE]
            tile = memory[: len(one) * len(other)].view(len(one), len(other))
            torch.mm(one, other.T, out=tile)
            lists.take(tile, i, j, rows=i, columns=None if i == j else j)
    return lists.near


def competition(
    activation: Tensor,
    neighbors: Tensor,
    temperature: float,
    x: Tensor,
    forces: str,
    rescue_onset: float,
    pull_onset: float,
) -> Competition:
    """Stage `competition` (steps 2 to 8, and what follows from them for a sample or for a feature)."""
    activation, neighbors, x = _rows(activation), neighbors.contiguous(), _rows(x.to(activation.dtype))
    (B, D), (features, k) = activation.shape, neighbors.shape
    if not 1 <= D == features or k < 1 or neighbors.dtype != torch.int64:
        raise native.bad_neighbors(neighbors, D)
    floats, indices = activation.new_empty, neighbors.new_empty
    rank_score, novelty, win_rate, winner = floats(B, D), floats(D), floats(D), indices(B)
    per_pair, per_sample, per_feature = (indices(B, k), floats(B, k)), (floats(B), floats(B)), (floats(D), floats(D))
    found = Competition(rank_score, novelty, win_rate, winner, *per_pair, *per_sample, *per_feature)
    pointers = [tensor.data_ptr() for tensor in (activation, neighbors, x, *found)]
    sizes = activation.stride(0), x.stride(0), B, D, x.shape[1], k
    options = temperature, rescue_onset, pull_onset, forces == "coupled"
    struct = cpu_structs.Competition(*pointers, *sizes, *options)
    _call("competition", activation.dtype, struct)
    return found


def inverse_norm(rows: Tensor) -> Tensor:
    """Stage `inverse_norm` (step 9b): 1 / (norm + eps) of each row of [R, N] -> [R]."""
    rows = _rows(rows)
    R, N = rows.shape
    inverse = rows.new_empty(R)
    struct = cpu_structs.InverseNorm(rows.data_ptr(), inverse.data_ptr(), rows.stride(0), R, N)
    _call("inverse_norm", rows.dtype, struct)
    return inverse


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
    """Stage `selection` (step 9b): rescue_rows and their shares; rank affinity without a sort where bounds decide."""
    activation = _rows(activation)
    B, D = activation.shape
    r = min(rescue_k or B, B)
    rows, shares = activation.new_empty(D, r, dtype=torch.int64), activation.new_empty(D, r)
    given = (bias, x_inverse_norm, weight_inverse_norm, need)
    vectors = [None if vector is None else vector.contiguous() for vector in given]
    pointers = activation.data_ptr(), *map(native.pointer, vectors), rows.data_ptr(), shares.data_ptr()
    sizes, options = (activation.stride(0), B, D, r), (RULES[affinity_rule], rescue_weighting == "soft")
    struct = cpu_structs.Selection(*pointers, *sizes, *options)
    _call("selection", activation.dtype, struct)
    return rows, shares


def _targets(
    destination: Tensor, pulled: tuple[Tensor, Tensor | None, float] | None, pull: Pull, rescued: bool = True
) -> None:
    """Targets into destination [D, N], of winners alone unless `rescued`; given (weight, offset, som_lr), a pull."""
    x = _rows(pull.x.to(destination.dtype))
    (B, N), D = x.shape, destination.shape[0]
    _, *others = pull
    others = [tensor.contiguous() for tensor in others]
    k, r = pull.pair_feature.shape[1], pull.rescue_rows.shape[1] if rescued else 0
    weight, offset, som_lr = pulled or (None, None, 0.0)
    pulling = native.pointer(weight), native.pointer(offset), destination.data_ptr()
    pointers = [tensor.data_ptr() for tensor in (x, *others)]
    struct = cpu_structs.Targets(*pointers, *pulling, x.stride(0), B, D, N, k, r, som_lr)
    if refused := _call("targets", x.dtype, struct):
        raise _outside(refused, pull, D)


def targets(pull: Pull) -> Tensor:
    """Stage `targets` (sums of step 9a, step 10): som_target [D, N]."""
    x, rows, share = pull.x, pull.rescue_rows, pull.winner_share
    target = x.new_empty(share.shape[0], x.shape[1], dtype=share.dtype)
    few = rows.shape[1] < x.shape[0]
    _targets(target, None, pull, rescued=few)
    if not few:  # all of the batch: a product is faster than a sum of rows
        dense = torch.empty_like(pull.rescue_weight).scatter_(1, rows, pull.rescue_weight * (1 - share)[:, None])
        target.addmm_(dense, x.to(target.dtype))
    return target


def targets_pull_(weight: Tensor, som_offset: Tensor | None, som_lr: Tensor, pull: Pull) -> None:
    """Stage `targets_pull_` (sums of step 9a, steps 10 and 13), in place on weight or, if given, som_offset."""
    destination = weight if som_offset is None else som_offset
    contiguous = weight.is_contiguous() and destination.is_contiguous()
    if contiguous and pull.rescue_rows.shape[1] < pull.x.shape[0]:
        return _targets(destination, (weight, som_offset, float(som_lr)), pull)
    increment = targets(pull).sub_(weight)
    if som_offset is not None:
        increment.sub_(som_offset)
    destination.addcmul_(increment.mul_(pull.som_strength[:, None]), som_lr)


class _Forward:
    """How the forwards of one shape are called: the struct of the interface, filled but for what differs."""

    def __init__(
        self, config: StatisticsOptions, activation: torch.Size, neighbors: torch.Size, N: int, dtype: torch.dtype
    ) -> None:
        (B, D), (features, k) = activation, neighbors
        self.valid = 1 <= D == features and k >= 1
        self.sizes = PackedSizes(B, D, N, k, min(config.rescue_k or B, B), dtype)
        self.words = self.sizes.words
        *sizes, _ = self.sizes
        pointers_and_strides = [None] * 7 + [0] * 2
        forces = config.temperature, config.rescue_onset, config.pull_onset, config.forces == "coupled"
        choices = config.need_weighting, RULES[config.affinity], config.rescue_weighting == "soft"
        self.struct = cpu_structs.Forward(*pointers_and_strides, *sizes, *forces, *choices)


_forward_of = functools.lru_cache(maxsize=256)(_Forward)
_pull_of = functools.lru_cache(maxsize=256)(lambda sizes: cpu_structs.Pull(*[None] * 7, 0, *sizes[:-1]))


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Tensor,
    neighbors: Tensor,
    ticket: Tensor,
    config: StatisticsOptions,
) -> PackedStatistics:
    """Steps 2 to 11 as one call of the library, for a forward outside compilers: `operators.statistics_` has shapes."""
    dtype = activation.dtype
    plan = _forward_of(config, activation.shape, neighbors.shape, x.shape[1], dtype)
    if not plan.valid or neighbors.dtype != torch.int64:
        raise native.bad_neighbors(neighbors, activation.shape[1])
    activation, neighbors, x = activation.contiguous(), neighbors.contiguous(), _rows_of(x, dtype)
    mask, packed = torch.empty_like(activation), neighbors.new_empty(plan.words)
    struct = cpu_structs.Forward.from_buffer_copy(plan.struct)  # its own: other threads run forwards meanwhile
    struct.activation, struct.neighbors, struct.x = activation.data_ptr(), neighbors.data_ptr(), x.data_ptr()
    struct.x_stride = x.stride(0)
    if bias is not None:
        bias = bias.to(dtype).contiguous()
        struct.bias = bias.data_ptr()
    if config.affinity != "rank":
        weight = _rows_of(weight, dtype)
        struct.weight, struct.weight_stride = weight.data_ptr(), weight.stride(0)
    struct.mask, struct.packed = mask.data_ptr(), packed.data_ptr()
    _call("forward", dtype, struct)
    return PackedStatistics(mask if config.gradient_mask == "soft" else mask.new_empty(0), ticket, packed, plan.sizes)


def pull_(weight: Tensor, som_offset: Tensor | None, step: Tensor, som_lr: Tensor, pull: PackedPull) -> bool:
    """`targets_pull_` of what a `forward` left, and step += 1, as one call. False where nothing was done: it cannot."""
    destination = weight if som_offset is None else som_offset
    if pull.sizes.r >= pull.sizes.B or not (weight.is_contiguous() and destination.is_contiguous()):
        return False
    x, dtype = _rows_of(pull.x, weight.dtype), weight.dtype
    struct = cpu_structs.Pull.from_buffer_copy(_pull_of(pull.sizes))
    struct.x, struct.packed, struct.weight = x.data_ptr(), pull.packed.data_ptr(), weight.data_ptr()
    struct.offset, struct.destination = native.pointer(som_offset), destination.data_ptr()
    struct.som_lr, struct.step, struct.x_stride = som_lr.data_ptr(), step.data_ptr(), x.stride(0)
    if refused := _call("pull", dtype, struct):
        raise _outside(refused, pull.unpacked(), weight.shape[0])
    return True


def gradient(
    grad_output: Tensor,
    mask: Tensor | None,
    winner: Tensor | None,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Stage `gradient` (step 12): the masked gradient [B, D], into `out` if given, rounded to `dtype`; its sum [D]."""
    if grad_output.dtype not in SUFFIX:
        grad_output = grad_output.float()
    masked, total = _masked(grad_output, mask, winner, out)
    return masked if dtype is None or masked.dtype == dtype else masked.to(dtype), total


def _masked(
    grad_output: Tensor, mask: Tensor | None, winner: Tensor | None, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    if winner is not None:
        won = winner[:, None]
        masked = torch.zeros_like(grad_output).scatter_(1, won, grad_output.gather(1, won))
        return masked, masked.sum(dim=0)
    if mask is None:
        return grad_output, grad_output.sum(dim=0)
    grad_output, mask = _rows(grad_output), mask.contiguous()
    B, D = mask.shape
    masked = out if out is not None and out.is_contiguous() else torch.empty_like(mask)
    total = mask.new_empty(D)
    pointers = grad_output.data_ptr(), mask.data_ptr(), masked.data_ptr(), total.data_ptr()
    _call("gradient", mask.dtype, cpu_structs.Gradient(*pointers, grad_output.stride(0), B, D))
    return masked if out is None or out is masked else out.copy_(masked), total


def rank(key: Tensor) -> Tensor:
    """Stage `rank` (step 9b): key [B, D] -> stable rank within its column [B, D] int64."""
    key = _rows(key)
    B, D = key.shape
    ranks = torch.empty(B, D, dtype=torch.int64)
    _call("rank", key.dtype, cpu_structs.Rank(key.data_ptr(), ranks.data_ptr(), key.stride(0), B, D))
    return ranks
