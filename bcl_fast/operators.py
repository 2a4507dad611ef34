"""The operators a training step is made of: the stages of a backend, as torch.compile and autograd see them.

Five operators are opaque to a compiler (torch.library, with fakes): the product where it is not float32's own, the
statistics and choices of a forward with the neighbor refresh, the masked gradient of a backward, the pull, and its
increment alone. Their schemas are written from the fields of `BCLConfig` and of the structures that travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, counters
from .owners import hand_over, owner_of
from .private import NO_BACKWARD, running_backward
from .projection import project_
from .spec import STATISTICS_FIELDS, StatisticsOptions
from .structures import Observed, PendingPull, Pull, Statistics

if "_library" in globals():  # importlib.reload: torch has one library of this name at a time
    globals()["_library"]._destroy()
_library = torch.library.Library("bcl_fast", "DEF")
_functions: dict[str, Callable[..., Any]] = {}
PLAIN = (Tensor, torch.nn.Parameter)
_AS_IT_IS = nullcontext()


def _tensors(names: Iterable[str]) -> str:
    return ", ".join(f"Tensor {name}" for name in names)


_PULL = _tensors(Pull._fields)
_OBSERVED = ", ".join(f"Tensor? observed_{name}" for name in Observed._fields)
_STATISTICS = "(" + ", ".join("Tensor" for _ in Statistics._fields) + ")"
_OPTIONS = ", ".join(f"{field.type} {field.name}" for field in STATISTICS_FIELDS)


def _operator(
    schema: str,
    packed: Callable[..., Any] | None = None,
    host: bool = False,
    before: Callable[..., None] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the function below as the operator of this schema, computed outside any autocast.

    Through torch's dispatcher a structure comes field by field: `packed` makes the function's last argument of the
    fields. `host`: it also does something on the host, so that torch.compile must keep it out of the CUDA graphs it
    makes. `before` is called first, with the same arguments, where it is called through the dispatcher.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name, leading = function.__name__, function.__code__.co_argcount - 1
        _functions[name] = function
        _library.define(name + schema, tags=(torch.Tag.cudagraph_unsafe,) if host else ())

        def dispatched(*fields: Any) -> Any:
            arguments = fields if packed is None else (*fields[:leading], packed(*fields[leading:]))
            if before is not None:
                before(*arguments)
            return run(function, *arguments)

        _library.impl(name, dispatched, "CompositeExplicitAutograd")
        return function

    return register


def run(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function makes of its arguments outside any autocast, on the device of the first of them."""
    device = arguments[0].device
    with no_autocast(device.type):
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return function(*arguments)
        with torch.cuda.device(device):  # Triton launches on the current device, whatever its arguments are
            return function(*arguments)


def can_bypass_dispatcher(tensor: Tensor) -> bool:
    """Whether a plain function may stand in for an operator on `tensor`: no compiler runs, and it is a plain tensor."""
    return not torch.compiler.is_compiling() and type(tensor) in PLAIN and not tensor.is_meta


def call(name: str, *arguments: Any) -> Any:
    """What the operator of this name makes of its arguments, past the dispatcher where their first one allows that.

    The dispatcher costs 10 us; a compiler, and tensors that are more than numbers, must go through it.
    """
    if can_bypass_dispatcher(arguments[0]):
        return run(_functions[name], *arguments)
    return getattr(torch.ops.bcl_fast, name)(*_fields(arguments))


def _fields(arguments: tuple[Any, ...]) -> list[Any]:
    """Arguments with the fields of every structure in its place."""
    flat: list[Any] = []
    for argument in arguments:
        flat += _fields(argument) if isinstance(argument, tuple) else [argument]
    return flat


def no_autocast(device_type: str) -> AbstractContextManager[None]:
    """Outside any autocast; entering one costs 10 us, so only where there is one."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return _AS_IT_IS


def _fake(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.library.register_fake("bcl_fast::" + function.__name__.removesuffix("_fake"), function, lib=_library)
    return function


MIN_NORM = 1e-6  # of which EPS = 1e-8 is one percent


def require_finite(**tensors: Tensor) -> None:
    """Raise a ValueError that names the first tensor holding NaN or Inf (`check_finite` of SPEC section 3)."""
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise ValueError(f"{name} must be finite (check_finite=True), got {bad} NaN or Inf of {tensor.numel()}")


def require_norms(x: Tensor) -> None:
    """Raise a ValueError that names rows of x [B, N] that are not zero, but so short that EPS shrinks their cosines."""
    short = torch.linalg.vector_norm(_float(x), dim=1) < MIN_NORM
    short &= (x != 0).any(dim=1)  # squares may underflow
    if bool(short.any()):
        rows = short.nonzero()[:, 0]
        raise ValueError(
            f"rows of x must be zero or of norm >= {MIN_NORM:g} (check_finite=True), got {len(rows)} of "
            f"{len(x)} that are shorter, the first of them row {int(rows[0])}"
        )


def exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and pull: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype `nn.Linear` would multiply in: that of the weight, or of the autocast that is on."""
    device = weight.device.type
    if weight.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _float(tensor: Tensor) -> Tensor:
    return tensor.to(exact(tensor.dtype))


@_operator("(Tensor x, Tensor weight, Tensor? bias, ScalarType dtype) -> Tensor")
def product(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x Wᵀ + c of operands rounded to `dtype`, itself float32 (float64 for float64): [B, N], [D, N], [D] -> [B, D].

    One operator with its roundings: a compiler leaves out a rounding that it sees undone, and the compiled layer would
    compute other numbers. NVIDIA's tensor cores multiply float16 and bfloat16 and add up in float32; elsewhere the
    rounded operands are multiplied as float32, to the same effect.
    """
    wide = exact(dtype)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype).to(wide)
    if x.is_cuda and x.dtype != wide and torch.version.hip is None:
        factors = x, weight.T
        return torch.mm(*factors, out_dtype=wide) if bias is None else torch.addmm(bias, *factors, out_dtype=wide)
    return F.linear(x.to(wide), weight.to(wide), bias)


@_fake
def product_fake(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=exact(dtype))


def _refresh_neighbors_(
    weight: Tensor, neighbors: Tensor, step: Tensor, refreshed_at: Tensor, recompute_every: int, backend: str
) -> None:
    """Step 1 where it is due: at multiples of `recompute_every`, once per value of `step` (int64 scalars)."""
    if backend in backends.REFRESH:
        backends.stage("refresh_", backend)(weight, neighbors, step, refreshed_at, recompute_every)
        torch.autograd.graph.increment_version((neighbors, refreshed_at))
        return
    counters.require_replayable(step, backend)
    now = counters.read_counter(step)
    if now < 0:  # written where no version shows it
        raise ValueError(f"step must be >= 0, got {now}")
    if now % recompute_every == 0 and counters.read_counter(refreshed_at) != now:
        neighbors.copy_(backends.stage("neighbors", backend)(_float(weight), neighbors.shape[1]))
        counters.write_counter_(refreshed_at, now)


def begin_(
    x: Tensor,
    weight: Tensor,
    activation: Tensor,
    neighbors: Tensor,
    step: Tensor,
    refreshed_at: Tensor,
    ticket: Tensor,
    backend: str,
    config: StatisticsOptions,
) -> Tensor:
    """What comes before the statistics of a forward: checks, and neighbors where they are due. Its own ticket."""
    if config.check_finite:
        require_finite(x=x, weight=weight, activation=activation)
        require_norms(x)
    ticket, due, task = ticket.clone(), True, running_backward()
    if task != NO_BACKWARD and (recomputed := owner_of(ticket)) is not None:
        ticket.neg_()
        due = recomputed.recompute(task)
    if due:
        _refresh_neighbors_(weight, neighbors, step, refreshed_at, config.recompute_every, backend)
    return ticket


def _called_by_compiled_code(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Tensor,
    neighbors: Tensor,
    step: Tensor,
    refreshed_at: Tensor,
    ticket: Tensor,
    *_: Any,
) -> None:
    owner = owner_of(ticket)
    if owner is not None:
        owner.called_by_compiled_code(neighbors, step, refreshed_at)


@_operator(
    "(Tensor x, Tensor weight, Tensor? bias, Tensor activation, Tensor(a!) neighbors, Tensor step,"
    f" Tensor(b!) refreshed_at, Tensor ticket, str backend, {_OPTIONS}) -> {_STATISTICS}",
    packed=StatisticsOptions,
    host=True,
    before=_called_by_compiled_code,
)
def statistics_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Tensor,
    neighbors: Tensor,
    step: Tensor,
    refreshed_at: Tensor,
    ticket: Tensor,
    backend: str,
    config: StatisticsOptions,
) -> Statistics:
    """Steps 1 to 11 of a forward: x [B, N], weight [D, N] (W + O in offset space), activation [B, D] float32 or 64.

    Writes neighbors [D, k] and refreshed_at where the refresh is due. That is part of this operator because a compiler
    must then run it in the forward: one without a lasting effect it may move to the backward.
    """
    ticket = begin_(x, weight, activation, neighbors, step, refreshed_at, ticket, backend, config)
    bias = None if bias is None else bias.to(activation.dtype)
    found = backends.stage("competition", backend)(
        activation, neighbors, config.temperature, x, config.forces, config.rescue_onset, config.pull_onset
    )
    need = found.need if config.need_weighting else None
    weight_inverse_norm = None if config.affinity == "rank" else backends.stage("inverse_norm", backend)(_float(weight))
    rescue: tuple[Tensor, Tensor] = backends.stage("selection", backend)(
        activation,
        bias,
        found.x_inverse_norm,
        weight_inverse_norm,
        need,
        config.affinity,
        config.rescue_weighting,
        config.rescue_k,
    )
    mask = found.rank_score
    if config.gradient_mask != "soft":
        mask = mask.new_empty(0)
    elif config.forces == "coupled":  # step 11
        mask.mul_(found.novelty * (found.win_rate * found.novelty))
    pairs, per_feature = (found.pair_feature, found.pair_pull), (found.winner_share, found.som_strength)
    return Statistics(mask, found.winner, ticket, *pairs, *rescue, *per_feature)


@_fake
def statistics__fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Tensor,
    neighbors: Tensor,
    step: Tensor,
    refreshed_at: Tensor,
    ticket: Tensor,
    backend: str,
    *options: Any,
) -> tuple[Tensor, ...]:
    (B, D), k, config = activation.shape, neighbors.shape[1], StatisticsOptions(*options)
    r = torch.sym_min(config.rescue_k, B) if config.rescue_k else B

    def floats(*shape: int) -> Tensor:
        return activation.new_empty(shape)

    def indices(*shape: int) -> Tensor:
        return activation.new_empty(shape, dtype=torch.int64)

    mask = floats(B, D) if config.gradient_mask == "soft" else floats(0)
    pairs, rescue = (indices(B, k), floats(B, k)), (indices(D, r), floats(D, r))
    return mask, indices(B), torch.empty_like(ticket), *pairs, *rescue, floats(D), floats(D)


def masked(
    grad_output: Tensor,
    mask: Tensor,
    winner: Tensor,
    gradient_mask: str,
    dtype: torch.dtype,
    backend: str,
    last: bool = False,
) -> tuple[Tensor, Tensor]:
    """What `masked_gradient` returns; it may take the place of the mask, where that is read for the `last` time."""
    soft = gradient_mask == "soft"
    masked, bias_gradient = backends.stage("gradient", backend)(
        grad_output,
        mask if soft else None,
        winner if gradient_mask == "winner_take_all" else None,
        mask if soft and last and mask.dtype == dtype else None,
        dtype,
    )
    return (masked.clone() if masked is grad_output else masked), bias_gradient


@_operator(
    "(Tensor grad_output, Tensor mask, Tensor winner, str gradient_mask, ScalarType dtype, bool compiled,"
    f" str backend, Tensor ticket, {_OBSERVED}, {_PULL}) -> (Tensor, Tensor)",
    packed=PendingPull.of,
    host=True,
)
def masked_gradient(
    grad_output: Tensor,
    mask: Tensor,
    winner: Tensor,
    gradient_mask: str,
    dtype: torch.dtype,
    compiled: bool,
    backend: str,
    pending: PendingPull,
) -> tuple[Tensor, Tensor]:
    """Step 12 before its products: grad_output * G [B, D] in `dtype`, and the bias gradient [D] in that of statistics.

    Also hands `pending`, the pull of this forward, to the layer that its ticket names. That is part of this operator
    because it must happen once per backward, also in a compiled one.
    """
    hand_over(pending, dtype, compiled)
    return masked(grad_output, mask, winner, gradient_mask, dtype, backend)


@_fake
def masked_gradient_fake(
    grad_output: Tensor, mask: Tensor, winner: Tensor, gradient_mask: str, dtype: torch.dtype, *others: Any
) -> tuple[Tensor, Tensor]:
    masked = torch.empty_like(grad_output, dtype=dtype, memory_format=torch.contiguous_format)
    return masked, masked.new_empty(grad_output.shape[1], dtype=exact(grad_output.dtype))


@_operator(
    "(Tensor(a!) weight, Tensor(b!)? som_offset, Tensor(c!) step, Tensor som_lr, str target_projection, str backend,"
    f" {_PULL}) -> ()",
    packed=Pull,
    host=True,
)
def targets_pull_(
    weight: Tensor,
    som_offset: Tensor | None,
    step: Tensor,
    som_lr: Tensor,
    target_projection: str,
    backend: str,
    pull: Pull,
) -> None:
    """Steps 9a to 13: the pull, in place on weight [D, N] or, where there is one, on som_offset; step advances by one.

    som_lr is a scalar in the dtype and on the device of weight, so that a CUDA graph reads it anew in every replay. Not
    for low-precision weights.
    """
    destination = weight if som_offset is None else som_offset
    if target_projection != "none":
        destination.addcmul_(som_increment(weight, som_offset, target_projection, backend, pull), som_lr)
        counters.advance_(step, backend)
    elif backend in backends.REFRESH:
        backends.stage("targets_pull_", backend)(weight, som_offset, som_lr, pull, step)  # one launch does both
        torch.autograd.graph.increment_version(step)
    else:
        backends.stage("targets_pull_", backend)(weight, som_offset, som_lr, pull)
        counters.advance_(step, backend)
    torch.autograd.graph.increment_version(destination)  # autograd must see what was written past it


@_fake
def targets_pull__fake(weight: Tensor, som_offset: Tensor | None, step: Tensor, som_lr: Tensor, *others: Any) -> None:
    return None


@_operator(f"(Tensor weight, Tensor? som_offset, str target_projection, str backend, {_PULL}) -> Tensor", packed=Pull)
def som_increment(
    weight: Tensor, som_offset: Tensor | None, target_projection: str, backend: str, pull: Pull
) -> Tensor:
    """v (target - W) [D, N] in the dtype of the statistics: a pull to be averaged or rounded before it is applied."""
    effective_weight = _float(weight if som_offset is None else weight + som_offset)
    target = backends.stage("targets", backend)(pull._replace(x=pull.x.to(effective_weight.dtype)))
    return project_(target, target_projection).sub_(effective_weight).mul_(pull.som_strength[:, None])


@_fake
def som_increment_fake(weight: Tensor, som_offset: Tensor | None, *others: Any) -> Tensor:
    return torch.empty_like(_float(weight), memory_format=torch.contiguous_format)
