"""The operators a training step is made of, and the only place that knows backends.

Every stage of SPEC 2 has one name and one signature in every backend; `DISPATCH` says who serves it. Around the
stages stand five operators that torch.compile sees as opaque (torch.library, with fakes): the product where it is not
float32's own, the statistics and choices of a forward with the neighbor refresh, the masked gradient of a backward,
the pull, and its increment alone.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .spec import BCLConfig

# --- Backends --------------------------------------------------------------------------------------------------------

# Stage -> backend -> where the function of that name is found. `cuda` is Triton but where CUDA_SERVES says otherwise.
DISPATCH: dict[str, dict[str, str]] = {
    "neighbors": {"reference": "reference", "portable": "portable", "cpu": "cpu", "triton": "kernels.neighbors"},
    "competition": {"reference": "reference", "portable": "portable", "cpu": "cpu", "triton": "kernels.competition"},
    "inverse_norm": {"reference": "reference", "portable": "portable", "cpu": "cpu", "triton": "kernels.inverse_norm"},
    "selection": {"reference": "reference", "portable": "portable", "cpu": "cpu", "triton": "kernels.selection"},
    "targets": {"reference": "reference", "portable": "portable", "cpu": "cpu", "triton": "kernels.targets_pull"},
    "targets_pull_": {"reference": "reference", "portable": "portable", "cpu": "cpu", "triton": "kernels.targets_pull"},
    "gradient": {"reference": "reference", "portable": "portable", "cpu": "cpu", "triton": "kernels.gradient"},
    "rank": {"reference": "reference", "portable": "portable", "cpu": "cpu", "triton": "kernels.selection"},
}
# Stage -> the fewest samples and features from which on the C++ of the backend `cuda` serves it; below, Triton does.
# Not yet measured on a GPU: by arithmetic (bench/LOG.md) the C++ is ahead at every size.
CUDA_FROM: dict[str, tuple[int, int]] = {"competition": (1, 2), "selection": (1, 2), "rank": (1, 2)}
# Stage -> whether that C++ can express a call with these arguments.
CUDA_SERVES: dict[str, Callable[..., bool]] = {
    "competition": lambda *arguments: True,
    "selection": lambda *arguments: arguments[5] == "rank" and 0 < arguments[7] <= 32,  # affinity_rule, rescue_k
    "rank": lambda *arguments: True,
}
# Backends that decide on the device whether neighbors are due, and count steps there: nothing waits for the host.
REFRESH = {"triton": "kernels.neighbors", "cuda": "kernels.neighbors"}
ON_GPU = ("triton", "cuda")  # without a GPU they run in Triton's interpreter and on the host, slowly
UNMEASURED = ON_GPU  # no record of bench/results is from a GPU yet
BACKENDS = ("reference", "portable", "cpu", *ON_GPU)
# Type of device -> what `fused=True` means there, the first of these that serves; else, or where none does: GENERAL.
FASTEST: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
GENERAL = "portable"


@functools.cache
def stage(name: str, backend: str) -> Callable[..., Any]:
    """The function that serves a stage on a backend."""
    if backend == "cuda" and name in CUDA_SERVES:
        own, triton = _function("cuda", name), stage(name, "triton")
        return lambda *arguments: (own if _cuda_serves(name, arguments) else triton)(*arguments)
    where = REFRESH if name == "refresh_" else DISPATCH[name]
    return _function(where["triton" if backend == "cuda" else backend], name)


def _cuda_serves(name: str, arguments: tuple[Any, ...]) -> bool:
    """Whether a call of this stage goes to the C++ of the backend `cuda`."""
    (B, D), (fewest_samples, fewest_features) = arguments[0].shape, CUDA_FROM[name]
    return B >= fewest_samples and D >= fewest_features and CUDA_SERVES[name](*arguments)


def _function(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module("." + module, __package__), name)


def why_not(backend: str, device_type: str, dtype: torch.dtype = torch.float32) -> str | None:
    """None where a backend can serve weights of this dtype on this type of device ("cpu", ...), else the reason."""
    if device_type == "meta":
        return "meta tensors hold no numbers"
    if backend == "cpu":
        from . import cpu

        return cpu.missing() if device_type == "cpu" else "it serves CPU tensors only"
    if backend in ON_GPU:
        return _why_not_triton(device_type, dtype) or (_why_not_cuda(device_type) if backend == "cuda" else None)
    return None


def _why_not_triton(device_type: str, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not (device_type == "cpu" and interpreted):
        return "it serves CUDA tensors only (with TRITON_INTERPRET=1 Triton's interpreter runs it on the CPU, slowly)"
    return "it computes in float32, and a float64 weight asks for float64" if dtype == torch.float64 else None


def _why_not_cuda(device_type: str) -> str | None:
    from . import cuda

    return cuda.missing(device_type)


def cpu_library() -> str:
    """What the C++ library of the backend `cpu` is built on here, or why there is none."""
    from . import cpu

    return cpu.missing() or f"{cpu.instruction_set()} instructions"


def cuda_library() -> str:
    """Whether the CUDA C++ library of the backend `cuda` is there, or why it is not."""
    from . import cuda

    return cuda.missing("cuda") or "built"


def backends(device_type: str) -> dict[str, str | None]:
    """Every backend by name -> None where it can serve on this type of device, else why it cannot."""
    return {name: why_not(name, device_type) for name in BACKENDS}


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
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if not fused and backend != "reference":
        raise ValueError(f"backend={backend!r} needs fused=True; fused=False is the reference")
    reason = why_not(backend, device_type, dtype) if device_type != "meta" else None
    if reason:
        raise ValueError(f"backend={backend!r} cannot serve on {device_type!r}: {reason}")
    return backend


@functools.cache  # warns once
def _fastest(device_type: str, dtype: torch.dtype) -> str:
    reasons = {name: why_not(name, device_type, dtype) for name in FASTEST.get(device_type, ())}
    for name, reason in reasons.items():
        if reason is None:
            return name
    if reasons:
        name, reason = list(reasons.items())[-1]
        warnings.warn(f"backend {GENERAL!r} serves, slower than {name!r} would: {reason}", stacklevel=5)
    return GENERAL


# --- Owners: who receives a backward's pending pull ------------------------------------------------------------------


class Owner(Protocol):
    """The pulls of a layer, as the operators see them."""

    def receive(self, pending: list[Tensor], compiled: bool) -> None: ...
    def recompute(self, task: int) -> bool: ...
    def require_still(self, moves: int) -> None: ...
    def called_by_compiled_code(self, *state: Tensor) -> None: ...


# importlib.reload keeps what the layers that live now are registered in.
_owners: weakref.WeakValueDictionary[int, Owner] = globals().get("_owners") or weakref.WeakValueDictionary()
_owner_numbers = globals().get("_owner_numbers") or itertools.count(1)


def register_owner(owner: Owner) -> Tensor:
    """The ticket of `owner`, the number by which operators find it as long as it lives; it is never used again.

    An int64 scalar on the host: as a tensor it is data to torch.compile, so that layers share compiled code. Every
    forward copies it for its pull: negative where it runs inside a backward, as the recomputations of activation
    checkpointing do, and 0 once the pull is consumed.
    """
    number = next(_owner_numbers)
    _owners[number] = owner
    return torch.tensor(number, device="cpu")


def owner_of(ticket: Tensor) -> Owner | None:
    """Whom a ticket names: None where its pull is consumed, or its layer gone."""
    return _owners.get(abs(int(ticket)))


def require_still(found: Tensor, own: Tensor, moves: int) -> None:
    """Raise where the forward of the ticket `own` was recomputed, as the one found instead says, at another weight."""
    if int(found) < 0 <= int(own) and (owner := owner_of(found)) is not None:
        owner.require_still(moves)


# --- Counters read on the host ---------------------------------------------------------------------------------------


NEAR = ("cpu",)  # devices whose memory the host reads at no cost: there a counter is read, not remembered


def read_counter(counter: Tensor) -> int:
    """The value of an int64 scalar; another device is asked only where somebody else wrote the counter since.

    What the host knows hangs on the tensor itself, and goes with it wherever its object is moved to.
    """
    if counter.device.type in NEAR:
        return int(counter)
    version, value = counter.__dict__.get("_seen", (None, 0))
    return value if version == counter._version else _remember(counter, int(counter))


def _remember(counter: Tensor, value: int) -> int:
    counter._seen = counter._version, value
    return value


def write_counter_(counter: Tensor, value: int) -> None:
    """counter = value, and `read_counter` knows."""
    counter.fill_(value)
    if counter.device.type not in NEAR:
        _remember(counter, value)


def advance_(step: Tensor, backend: str) -> None:
    """step += 1, where this backend counts: on the device, or on the host that then knows it."""
    if backend in REFRESH:
        step.add_(1)
    else:
        _require_replayable(step, backend)
        write_counter_(step, read_counter(step) + 1)


# --- CUDA graphs -----------------------------------------------------------------------------------------------------


def capturing(device: torch.device) -> bool:
    """Whether what is launched on this device now goes into a CUDA graph instead of being run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _require_replayable(step: Tensor, backend: str) -> None:
    """Raise where a graph would keep what the host knows of `step` at its capture, for all of its replays."""
    if capturing(step.device):
        raise RuntimeError(
            f"backend {backend!r} counts steps on the host, which no CUDA graph replays: to capture training, build "
            f"the layer with backend={' or '.join(map(repr, REFRESH))}"
        )


# --- The operators ---------------------------------------------------------------------------------------------------

if "_library" in globals():  # importlib.reload: torch has one library of this name at a time
    globals()["_library"]._destroy()
_library = torch.library.Library("bcl_fast", "DEF")
_functions: dict[str, Callable[..., Any]] = {}
PLAIN = (Tensor, torch.nn.Parameter)
MAX_STEPS = 1 << 40  # of which `refresh_` on a device keeps count
NO_BACKWARD = -1  # what torch says for the number of the running backward where none runs


def _operator(
    schema: str, host: bool = False, before: Callable[..., None] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the function below as the operator of this schema, computed outside any autocast.

    `host`: it also does something on the host, so that torch.compile must keep it out of the CUDA graphs it makes.
    `before` is called first, with the same arguments, where the operator is called through torch's dispatcher.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        _functions[name] = functools.partial(_call, function)
        _library.define(name + schema, tags=(torch.Tag.cudagraph_unsafe,) if host else ())

        def dispatched(*arguments: Any) -> Any:
            before(*arguments)
            return _call(function, *arguments)

        _library.impl(name, dispatched if before else _functions[name], "CompositeExplicitAutograd")
        return function

    return register


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """An operator's function, outside any autocast and on the device of its first argument."""
    device = arguments[0].device
    with no_autocast(device.type):
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return function(*arguments)
        with torch.cuda.device(device):  # Triton launches on the current device, whatever its arguments are
            return function(*arguments)


def can_bypass_dispatcher(tensor: Tensor) -> bool:
    """Whether a plain function may stand in for an operator on `tensor`: no compiler runs, and it is a plain tensor."""
    return not torch.compiler.is_compiling() and type(tensor) in PLAIN and not tensor.is_meta


def operator(name: str, tensor: Tensor) -> Callable[..., Any]:
    """The operator of this name for arguments such as `tensor`, past the dispatcher where that is allowed.

    The dispatcher costs 10 us; a compiler, and tensors that are more than numbers, must go through it.
    """
    return _functions[name] if can_bypass_dispatcher(tensor) else getattr(torch.ops.bcl_fast, name)


def no_autocast(device_type: str) -> AbstractContextManager[None]:
    """Outside any autocast; entering one costs 10 us, so only where there is one."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _fake(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.library.register_fake("bcl_fast::" + function.__name__.removesuffix("_fake"), function, lib=_library)
    return function


MIN_NORM = 1e-6  # of which EPS = 1e-8 is one percent


def require_finite(**tensors: Tensor) -> None:
    """Raise a ValueError that names the first tensor holding NaN or Inf (`check_finite` of SPEC 3)."""
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise ValueError(f"{name} must be finite (check_finite=True), got {bad} NaN or Inf of {tensor.numel()}")


def require_norms(x: Tensor) -> None:
    """Raise a ValueError that names rows of x [B, N], not zero, of which EPS is a share that shrinks their cosines."""
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
def product_fake(x, weight, bias, dtype):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=exact(dtype))


def _refresh_neighbors_(
    weight: Tensor, neighbors: Tensor, step: Tensor, refreshed_at: Tensor, recompute_every: int, backend: str
) -> None:
    """Step 1 where it is due: at multiples of `recompute_every`, once per value of `step` (int64 scalars)."""
    if backend in REFRESH:
        stage("refresh_", backend)(weight, neighbors, step, refreshed_at, recompute_every)
        torch.autograd.graph.increment_version((neighbors, refreshed_at))
        return
    _require_replayable(step, backend)
    now = read_counter(step)
    if now < 0:  # written where no version shows it
        raise ValueError(f"step must be >= 0, got {now}")
    if now % recompute_every == 0 and read_counter(refreshed_at) != now:
        neighbors.copy_(stage("neighbors", backend)(_float(weight), neighbors.shape[1]))
        write_counter_(refreshed_at, now)


def _called_by_compiled_code(*arguments: Any) -> None:
    *_, neighbors, step, refreshed_at, ticket = arguments[:8]
    owner = owner_of(ticket)
    if owner is not None:
        owner.called_by_compiled_code(neighbors, step, refreshed_at)


@_operator(
    "(Tensor x, Tensor weight, Tensor? bias, Tensor activation, Tensor(a!) neighbors, Tensor step,"
    " Tensor(b!) refreshed_at, Tensor owner, int recompute_every, float temperature, str affinity, bool need_weighting,"
    " str rescue_weighting, int rescue_k, str forces, str gradient_mask, float rescue_onset, float pull_onset,"
    " bool check_finite, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
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
    owner: Tensor,
    recompute_every: int,
    temperature: float,
    affinity: str,
    need_weighting: bool,
    rescue_weighting: str,
    rescue_k: int,
    forces: str,
    gradient_mask: str,
    rescue_onset: float,
    pull_onset: float,
    check_finite: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    """Steps 1 to 11 of a forward: x [B, N], weight [D, N] (W + O in offset space), activation [B, D] float32 or 64.

    Writes neighbors [D, k] and refreshed_at where the refresh is due. That is part of this operator because a compiler
    must then run it in the forward: one without a lasting effect it may move to the backward.

    Returns mask ([B, D] for gradient_mask `soft`, else empty), winner [B], and what the pull needs: ticket (that of
    `owner`, copied: see `register_owner`), pair_feature [B, k], pair_pull [B, k], rescue_rows [D, r],
    rescue_weight [D, r], winner_share [D], som_strength [D].
    """
    if check_finite:
        require_finite(x=x, weight=weight, activation=activation)
        require_norms(x)
    ticket, due, task = owner.clone(), True, torch._C._current_graph_task_id()
    if task != NO_BACKWARD and (recomputed := owner_of(ticket)) is not None:
        ticket.neg_()
        due = recomputed.recompute(task)
    if due:
        _refresh_neighbors_(weight, neighbors, step, refreshed_at, recompute_every, backend)
    bias = None if bias is None else bias.to(activation.dtype)
    rank_score, _, novelty, win_rate, winner, *pairs, x_inverse_norm, need, winner_share, som_strength = stage(
        "competition", backend
    )(activation, neighbors, temperature, x, forces, rescue_onset, pull_onset)
    need = need if need_weighting else None
    weight_inverse_norm = None if affinity == "rank" else stage("inverse_norm", backend)(_float(weight))
    rescue = stage("selection", backend)(
        activation, bias, x_inverse_norm, weight_inverse_norm, need, affinity, rescue_weighting, rescue_k
    )
    if gradient_mask != "soft":
        rank_score = rank_score.new_empty(0)
    elif forces == "coupled":  # step 11
        rank_score.mul_(novelty * (win_rate * novelty))
    return rank_score, winner, ticket, *pairs, *rescue, winner_share, som_strength


@_fake
def statistics__fake(x, weight, bias, activation, neighbors, step, refreshed_at, owner, recompute_every, temperature,
                     affinity, need_weighting, rescue_weighting, rescue_k, forces, gradient_mask, rescue_onset,
                     pull_onset, check_finite, backend):  # fmt: skip
    (B, D), k = activation.shape, neighbors.shape[1]
    r = torch.sym_min(rescue_k, B) if rescue_k else B

    def floats(*shape):
        return activation.new_empty(shape)

    def indices(*shape):
        return activation.new_empty(shape, dtype=torch.int64)

    mask = floats(B, D) if gradient_mask == "soft" else floats(0)
    pairs, rescue = (indices(B, k), floats(B, k)), (indices(D, r), floats(D, r))
    return mask, indices(B), torch.empty_like(owner), *pairs, *rescue, floats(D), floats(D)


@_operator(
    "(Tensor grad_output, Tensor mask, Tensor winner, str gradient_mask, ScalarType dtype, Tensor[] pending,"
    " bool compiled, bool reuse, str backend)"
    " -> (Tensor, Tensor)",
    host=True,
)
def masked_gradient(
    grad_output: Tensor,
    mask: Tensor,
    winner: Tensor,
    gradient_mask: str,
    dtype: torch.dtype,
    pending: Sequence[Tensor],
    compiled: bool,
    reuse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Step 12 before its products: grad_output * G [B, D] in `dtype`, and the bias gradient [D] as statistics are.

    With `reuse` the product takes the place of a mask of its dtype, which nobody reads again. No schema says so: only
    who calls this function without the dispatcher may ask for it.

    Also hands `pending`, what the pull of this forward needs, to the layer whose number stands in its ticket. That is
    part of this operator because it must happen once per backward, also in a compiled one.
    """
    owner = owner_of(pending[0])
    if owner is not None:
        owner.receive(list(pending), compiled)
    soft = gradient_mask == "soft"
    masked, bias_gradient = stage("gradient", backend)(
        grad_output,
        mask if soft else None,
        winner if gradient_mask == "winner_take_all" else None,
        mask if soft and reuse and mask.dtype == dtype else None,
        dtype,
    )
    return (masked.clone() if masked is grad_output else masked), bias_gradient


@_fake
def masked_gradient_fake(grad_output, mask, winner, gradient_mask, dtype, pending, compiled, reuse, backend):
    masked = torch.empty_like(grad_output, dtype=dtype, memory_format=torch.contiguous_format)
    return masked, masked.new_empty(grad_output.shape[1], dtype=exact(grad_output.dtype))


_CHOICES = (
    "Tensor x, Tensor pair_feature, Tensor pair_pull, Tensor rescue_rows, Tensor rescue_weight, Tensor winner_share,"
    " str target_projection, str backend"
)


@_operator(
    "(Tensor(a!) weight, Tensor(b!)? som_offset, Tensor(c!) step, Tensor som_strength, Tensor som_lr, "
    + _CHOICES
    + ") -> ()",
    host=True,
)
def targets_pull_(
    weight: Tensor, som_offset: Tensor | None, step: Tensor, som_strength: Tensor, som_lr: Tensor, *choices: Any
) -> None:
    """Steps 9a to 13: the pull, in place on weight [D, N] or, where there is one, on som_offset; step advances by one.

    som_lr is a scalar in the dtype and on the device of weight, so that a CUDA graph reads it anew in every replay. Not
    for low-precision weights.
    """
    *choices, backend = choices
    arguments = weight, som_offset, som_strength, som_lr, *choices
    if backend in REFRESH:
        stage("targets_pull_", backend)(*arguments, step)  # one launch does both
        torch.autograd.graph.increment_version(step)
    else:
        stage("targets_pull_", backend)(*arguments)
        advance_(step, backend)
    # Autograd must see what was written past it.
    torch.autograd.graph.increment_version(weight if som_offset is None else som_offset)


@_fake
def targets_pull__fake(weight, som_offset, step, som_strength, som_lr, *choices) -> None:
    return None


@_operator("(Tensor weight, Tensor? som_offset, Tensor som_strength, " + _CHOICES + ") -> Tensor")
def som_increment(weight: Tensor, som_offset: Tensor | None, som_strength: Tensor, *choices: Any) -> Tensor:
    """v (target - W) [D, N] in the dtype of the statistics: a pull to be averaged or rounded before it is applied."""
    x, *choices, backend = choices
    effective_weight = _float(weight if som_offset is None else weight + som_offset)
    target = stage("targets", backend)(x.to(effective_weight.dtype), *choices)
    return target.sub_(effective_weight).mul_(som_strength[:, None])


@_fake
def som_increment_fake(weight, som_offset, som_strength, *choices):
    return torch.empty_like(_float(weight), memory_format=torch.contiguous_format)


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
    """One step's `reference.Record` with every tensor of the SPEC, each with storage of its own."""
    from . import reference

    dtype = activation.dtype
    effective_weight = weight.to(dtype, copy=True) if som_offset is None else (weight + som_offset).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return reference.record(step, x.to(dtype), effective_weight, bias, activation, neighbors, config)
