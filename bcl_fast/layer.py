"""BCLLayer, a drop-in for `nn.Linear`, and `attach_bcl` for an existing model (SPEC section 5)."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .autograd import MaskedLinear
from .rounding import add_rounded_
from .spec import BCLConfig, check_number

LOW_PRECISION = (torch.bfloat16, torch.float16)
FLOATING = (torch.float32, torch.float64, *LOW_PRECISION)


@dataclass
class PendingPull:
    """What one forward leaves for its pull: the input, the choices, and the marks that go with them."""

    ticket: Tensor  # int64 scalar on the host, shared with the graph: 0 once consumed, so that it happens once
    x: Tensor  # [B, N]
    pair_feature: Tensor  # [B, k]
    pair_pull: Tensor  # [B, k]
    rescue_rows: Tensor  # [D, r]
    rescue_weight: Tensor  # [D, r]
    winner_share: Tensor  # [D]
    som_strength: Tensor  # [D]
    activation: Tensor | None = None  # [B, D], where somebody observes
    neighbors: Tensor | None = None  # [D, k], likewise

    @property
    def choices(self) -> tuple[Tensor, ...]:
        return self.pair_feature, self.pair_pull, self.rescue_rows, self.rescue_weight, self.winner_share


class _Kept(NamedTuple):
    """The mean increment of the backwards since the bound optimizer's last step."""

    mean: Tensor  # [D, N]
    samples: int  # that it is of
    captured: bool  # in a CUDA graph


class BCLLayer(nn.Linear):
    """A linear layer whose features compete: `nn.Linear` that masks its gradient and pulls its weight (SPEC 2).

    Input [..., in_features] -> output [..., out_features]. While training, every backward that accumulates into
    `weight` also moves it: winners get the loss gradient, redundant features are pulled toward samples nobody covers.
    In `eval()`, under `no_grad()` or with a frozen weight it is exactly `nn.Linear`.

    Args:
        in_features, out_features, bias, device, dtype: as for `nn.Linear`; out_features >= 2; dtype float32, float64,
            bfloat16 or float16. Statistics and pull are float32 (float64 for float64).
        fused: True for the fastest backend of the device, False for the reference.
        backend: the name of one backend, served or an error. `layer.backend` tells which one serves.
        config: a `BCLConfig`, or None for the default.
        **options: fields of the config to change, such as `som_lr=0.01, rescue_k=3, affinity="cosine"`.

    Buffers: `neighbors` [D, k] int64 (meaningless before the first training forward), `step` (int64 scalar, consumed
    pulls), and `som_offset` [D, N] with `som_space="offset"`. They are saved; a resumed run continues bit-equal. A
    checkpoint of a plain `nn.Linear` loads too and starts at step 0.

    Raises TypeError or ValueError that names the argument, its value and what is allowed.
    """

    neighbors: Tensor
    step: Tensor
    som_offset: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        fused: bool = True,
        backend: str | None = None,
        config: BCLConfig | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        check_number("in_features", in_features, low=1, integer=True)
        check_number("out_features", out_features, low=2, integer=True)
        if config is not None and not isinstance(config, BCLConfig):
            raise TypeError(f"config must be a BCLConfig or None, got {config!r}")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in FLOATING:
            raise TypeError(f"dtype must be one of {', '.join(map(str, FLOATING))}, got {dtype!r}")
        config = (config or BCLConfig()).replace(**options)
        ops.resolve_backend(fused, backend, "meta")  # its errors come before anything is built
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._config, self._som_lr, self._requested = config, config.som_lr, (fused, backend)
        self.frozen = False
        D, k = out_features, min(config.neighborhood_k, out_features - 1)
        empty = partial(torch.empty, device=self.weight.device)
        self.register_buffer("neighbors", empty(D, k, dtype=torch.int64))
        self.register_buffer("step", empty((), dtype=torch.int64))
        self.register_buffer("_refreshed_at", empty((), dtype=torch.int64), persistent=False)
        offset = empty(D, in_features, dtype=dtype) if config.som_space == "offset" else None
        self.register_buffer("som_offset", offset)
        self._start_runtime()
        self._reset_competition()

    # --- Configuration -----------------------------------------------------------------------------------------------

    @property
    def config(self) -> BCLConfig:
        """The options in force, `som_lr` as last set."""
        return self._config if self._som_lr == self._config.som_lr else self._config.replace(som_lr=self._som_lr)

    @property
    def backend(self) -> str:
        """The name of the backend that serves this layer."""
        return self._backend

    @property
    def som_lr(self) -> float:
        """Step size of the pull; may be set at any time (schedules). 0 stops the pull, the gradient mask stays."""
        return self._som_lr

    @som_lr.setter
    def som_lr(self, value: float) -> None:
        self._som_lr = check_number("som_lr", value, low=0)
        self._som_lr_cell.fill_(self._som_lr)

    def extra_repr(self) -> str:
        default = BCLConfig().to_dict()
        changed = {name: value for name, value in self.config.to_dict().items() if value != default[name]}
        return ", ".join([super().extra_repr(), f"backend={self.backend}", *(f"{k}={v}" for k, v in changed.items())])

    # --- State -------------------------------------------------------------------------------------------------------

    def reset_parameters(self) -> None:
        """New weight and bias as `nn.Linear` draws them, and a competition that starts afresh at step 0."""
        super().reset_parameters()
        if "step" in self._buffers:  # nn.Linear calls this before the buffers exist
            self._reset_competition()

    def _fresh_competition(self) -> dict[str, Tensor]:
        """The saved buffers of a layer at step 0."""
        (D, k), device = self.neighbors.shape, self.neighbors.device
        place, feature = torch.arange(k, device=device), torch.arange(D, device=device)[:, None]
        neighbors = place + (place >= feature)  # valid indices, none of them one's own
        fresh = {"neighbors": neighbors, "step": torch.zeros_like(self.step)}
        return fresh if self.som_offset is None else {**fresh, "som_offset": torch.zeros_like(self.som_offset)}

    def _reset_competition(self) -> None:
        for name, value in self._fresh_competition().items():
            self._buffers[name].copy_(value)
        self._refreshed_at.fill_(-1)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        fresh = {prefix + name: value for name, value in self._fresh_competition().items()}
        if prefix + "weight" in state_dict and not fresh.keys() & state_dict.keys():
            state_dict.update(fresh)  # the checkpoint of a plain nn.Linear
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._refreshed_at.fill_(-1)
        self._choose_backend()  # with assign=True the weight may be of another dtype now

    def _start_runtime(self) -> None:
        """What belongs to this object in this process, and is neither copied nor saved."""
        self._choose_backend()
        self._owner = ops.register_owner(self)
        self._due: dict[int, list[PendingPull]] = {}  # running backward -> pulls whose turn came in it
        self._kept: _Kept | None = None  # for the bound optimizer's step
        self._binding: tuple[Callable[[], Any], Any] | None = None  # the optimizer, and its hook
        self._observers: tuple[Callable[[Any], None], ...] = ()
        self._hook: tuple[Callable[[], Tensor | None], Any] | None = None
        self._warned_of_drift = False
        self._warming_up = False  # for a capture, which must find everything compiled
        self._attach_hook()

    def _choose_backend(self) -> None:
        weight = self.weight
        self._backend = ops.resolve_backend(*self._requested, weight.device.type, weight.dtype)
        # som_lr where the pull reads it: a CUDA graph then follows a schedule, as long as the tensor is the same one.
        kind = dict(dtype=ops.exact(weight.dtype), device=weight.device)
        cell = self.__dict__.get("_som_lr_cell")
        if cell is None or dict(dtype=cell.dtype, device=cell.device) != kind:
            with torch.inference_mode(False):  # else nobody could set it later
                self._som_lr_cell = torch.tensor(self._som_lr, **kind)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BCLLayer:
        """Moves of the module (`to`, `cuda`, `to_empty`, ...): another device may have another backend."""
        super()._apply(fn, recurse)
        self._choose_backend()
        return self

    _RUNTIME = ("_backend", "_som_lr_cell", "_owner", "_due", "_kept", "_binding", "_observers", "_hook",
                "_warned_of_drift", "_warming_up")  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self._RUNTIME}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start_runtime()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        fused: bool = True,
        backend: str | None = None,
        config: BCLConfig | None = None,
        **options: Any,
    ) -> BCLLayer:
        """A BCLLayer on the same Parameter objects as `linear`, in its mode, on its device, in its dtype."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        weight = linear.weight
        shape = linear.in_features, linear.out_features, linear.bias is not None
        kinds = dict(device="meta", dtype=weight.dtype)  # draws no random numbers
        layer = cls(*shape, fused=fused, backend=backend, config=config, **kinds, **options)
        layer.weight, layer.bias = weight, linear.bias
        for name, buffer in layer.named_buffers():
            setattr(layer, name, torch.empty_like(buffer, device=weight.device))
        layer._reset_competition()
        layer._choose_backend()
        layer._attach_hook()
        return layer.train(linear.training)

    # --- Forward -----------------------------------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        # nn.Module looks its tensors up in Python, which is felt in a small step: once each.
        weight, bias, offset = self.weight, self.bias, self.som_offset
        self._check_input(input, weight)
        if not (self.training and torch.is_grad_enabled() and weight.requires_grad) or input.numel() == 0:
            return F.linear(input, weight if offset is None else weight + offset, bias)
        self._check_training(weight)
        x, dtype = input.reshape(-1, self.in_features), _product_dtype(weight)
        with ops.no_autocast(input.device.type):
            with torch.no_grad():
                shifted = None if offset is None else weight + offset
                stands = weight if shifted is None else shifted
                if x.dtype == weight.dtype == dtype and dtype not in LOW_PRECISION:
                    activation = F.linear(x, stands, bias)
                else:
                    activation = ops.operator("product", x)(x, stands, bias, dtype)
                mask, winner, *pending = self._statistics(x, stands, bias, activation)
                if self._observers:
                    pending += [activation.clone(), self.neighbors.clone()]
            output = MaskedLinear.apply(
                x, weight, bias, shifted, activation, mask, winner, dtype, self._config.gradient_mask, self._backend,
                *pending,
            )  # fmt: skip
        return output if input.dim() == 2 else output.reshape(*input.shape[:-1], self.out_features)

    def _statistics(self, x: Tensor, stands: Tensor, bias: Tensor | None, activation: Tensor) -> tuple[Tensor, ...]:
        """Steps 1 to 11 for x [B, N], the weight [D, N] that stands and activation [B, D]: see `ops.statistics_`."""
        config = self._config
        return ops.operator("statistics_", x)(
            x,
            stands,
            bias,
            activation,
            self.neighbors,
            self.step,
            self._refreshed_at,
            self._owner,
            config.recompute_every,
            config.temperature,
            config.affinity,
            config.need_weighting,
            config.rescue_weighting,
            config.rescue_k,
            config.forces,
            config.gradient_mask,
            config.rescue_onset,
            config.pull_onset,
            config.check_finite,
            self._backend,
        )

    def _check_input(self, input: Tensor, weight: Tensor) -> None:
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a tensor, got {type(input).__name__}")
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ValueError(f"input must have shape [..., {self.in_features}], got {list(input.shape)}")
        if not input.is_floating_point():
            raise TypeError(f"input must be floating point like the weight ({weight.dtype}), got {input.dtype}")
        if input.dtype != weight.dtype and not torch.is_autocast_enabled(input.device.type):
            raise TypeError(f"input must be {weight.dtype} like the weight (or use autocast), got {input.dtype}")

    def _check_training(self, weight: Tensor) -> None:
        if not weight.is_leaf:
            raise RuntimeError(
                "weight must be a leaf: BCLLayer cannot train a parametrised weight (torch.nn.utils.parametrize, "
                "weight_norm, ...), because the pull writes it in place; remove the parametrisation"
            )
        if self._observers and torch.compiler.is_compiling():
            raise RuntimeError("observe() works in eager mode only: call the layer outside torch.compile to observe it")
        if self._config.sync == "global" and ranks() > 1:
            raise RuntimeError(
                f"sync='global' is not built yet and this process group has {ranks()} ranks; "
                "allowed: one rank, or sync='local' (every rank by itself: replicas drift)"
            )

    # --- The pending pull --------------------------------------------------------------------------------------------

    def receive(self, pending: list[Tensor], compiled: bool) -> None:
        """Called by the backward of each forward with the fields of its PendingPull (see `ops.masked_gradient`)."""
        if self._kept is not None and self.weight.grad is None:
            self._kept = None  # its gradients were thrown away: a scaler skipped their step
        captured = ops.capturing(self.weight.device)
        if captured and self._observers:
            raise RuntimeError("observe() cannot look into a CUDA graph: leave its block before the capture")
        task = torch._C._current_graph_task_id()
        if task not in self._due:
            self._due[task] = []
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._forget, task, captured))
        elif compiled:
            raise RuntimeError("under torch.compile one forward of a BCLLayer per backward is supported, got a second")
        if compiled:  # the compiled backward reuses its buffers for other values after this call
            pending[1:] = [tensor.clone() for tensor in pending[1:]]
        self._due[task].append(PendingPull(*pending))
        self._attach_hook()
        if ranks() > 1 and not self._warned_of_drift:
            self._warned_of_drift = True
            warnings.warn("BCLLayer(sync='local'): statistics and pulls are per rank, replicas drift", stacklevel=2)

    def _forget(self, task: int, captured: bool) -> None:
        """At the end of a backward: one that never accumulates into the weight (autograd.grad) leaves nothing behind.

        A CUDA graph of such a backward, which is what torch.cuda.make_graphed_callables makes, would train without any
        pull in all of its replays.
        """
        if self._due.pop(task, None) and captured:
            raise RuntimeError(
                "a CUDA graph captured a backward of BCLLayer that does not accumulate into its weight: its replays "
                "would never pull (torch.cuda.make_graphed_callables does so): capture whole training steps with "
                "bcl_fast.graphed, or loss.backward(); for gradients alone use eval()"
            )

    def _attach_hook(self) -> None:
        """Consume pulls after each accumulation into `weight`, the Parameter object of this moment.

        deepcopy, torch.save, to_empty and load_state_dict(assign=True) put another object there, without its hooks.
        """
        weight = self.weight
        if not (isinstance(weight, nn.Parameter) and weight.is_leaf and weight.requires_grad):
            return
        if self._hook is not None:
            hooked, handle = self._hook
            if hooked() is weight:
                return
            handle.remove()
        layer = weakref.ref(self)

        def consume(weight: Tensor) -> None:
            owner = layer()
            if owner is not None and owner.weight is weight:
                if not torch.is_grad_enabled():
                    return owner._consume()
                with torch.no_grad():  # a backward with create_graph=True
                    owner._consume()

        self._hook = weakref.ref(weight), weight.register_post_accumulate_grad_hook(consume)

    def _consume(self) -> None:
        """Pull once with what the running backward brought, or keep it for the bound optimizer's step."""
        pulls = self._due.pop(torch._C._current_graph_task_id(), [])
        if not pulls:
            return
        observers, last = self._observers, pulls[-1]
        record = None
        if observers and last.activation is not None:
            state = self.weight, self.som_offset, self.bias, last.activation, last.neighbors, self.config
            record = ops.record(ops.read_counter(self.step), last.x, *state)
        for pull in pulls:
            pull.ticket.data.zero_()  # a second backward over the graph finds no owner; .data: no version to check
        self._pull(pulls)
        if record is not None:
            for observer in observers:
                observer(record)

    @property
    def _pulls(self) -> bool:
        # A graph reads som_lr in every replay, so that 0 at its capture decides nothing.
        return not self.frozen and (self._som_lr > 0 or self._warming_up or ops.capturing(self.weight.device))

    def _pull(self, pulls: list[PendingPull]) -> None:
        """Step 13, now or kept for the bound optimizer, unless nothing is to be pulled; `step` advances."""
        weight, offset, step = self.weight, self.som_offset, self.step
        if self._pulls and self._binding is None and len(pulls) == 1 and weight.dtype not in LOW_PRECISION:
            (pull,) = pulls
            choices = *pull.choices, self._config.target_projection, self._backend
            forces = pull.som_strength, self._som_lr_cell
            ops.operator("targets_pull_", weight)(weight, offset, step, *forces, pull.x, *choices)
            return
        if self._pulls:
            for pull in pulls:
                self._average(pull)
            if self._binding is None:
                self._apply_average(found_inf=None)
        ops.advance_(step, self._backend)

    def _average(self, pull: PendingPull) -> None:
        """Merge the increment of a pull into the kept mean, by numbers of samples."""
        choices = *pull.choices, self._config.target_projection, self._backend
        increment = ops.operator("som_increment", self.weight)(
            self.weight, self.som_offset, pull.som_strength, pull.x, *choices
        )
        captured = ops.capturing(self.weight.device)
        kept = self._kept or _Kept(torch.zeros_like(increment), 0, captured)
        self._require_same_side(kept, captured)
        total = kept.samples + pull.x.shape[0]
        kept.mean.mul_(kept.samples / total).add_(increment, alpha=pull.x.shape[0] / total)
        self._kept = kept._replace(samples=total)

    @staticmethod
    def _require_same_side(kept: _Kept, captured: bool) -> None:
        """Raise where one of a backward and the optimizer's step is in a CUDA graph and the other is not."""
        if kept.captured != captured:
            raise RuntimeError(
                "the backward of a BCLLayer with a bound optimizer and that optimizer's step must both be in one CUDA "
                "graph, or both outside: bcl_fast.graphed captures whole steps"
            )

    def _apply_average(self, found_inf: Tensor | None) -> None:
        """Step 13 with the kept mean; nothing where a scaler reports found_inf = 1 (a tensor on the device)."""
        kept, self._kept = self._kept, None
        if kept is None or not self._pulls:
            return
        self._require_same_side(kept, ops.capturing(self.weight.device))
        increment = kept.mean.mul_(self._som_lr_cell)
        if found_inf is not None:  # not a product: what overflowed may have made the increment NaN
            increment = torch.where(found_inf > 0, 0.0, increment)
        destination = self.weight if self.som_offset is None else self.som_offset
        add_rounded_(destination, increment, self.step)

    def bind_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Pull once per optimizer step instead of once per backward, in a hook before that step.

        The pulls of all backwards since the last step are averaged, weighted by their number of samples, and dropped
        where a GradScaler skips the step. Use it with gradient accumulation, GradScaler and retain_graph. Binding is
        not saved with the layer. Raises ValueError where `optimizer` does not hold the weight of this layer.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if not any(p is self.weight for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(f"optimizer must hold the weight of this layer, got {type(optimizer).__name__} without it")
        if self._binding is not None:
            self._binding[1].remove()
        layer = weakref.ref(self)

        def before_step(optimizer, args, kwargs) -> None:
            owner = layer()
            if owner is not None:
                with torch.no_grad():
                    owner._apply_average(getattr(optimizer, "found_inf", None))

        self._binding = weakref.ref(optimizer), optimizer.register_step_pre_hook(before_step)

    @property
    def bound_optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer that `bind_optimizer` bound this layer to, as long as it lives."""
        return None if self._binding is None else self._binding[0]()

    def _release(self) -> None:
        """Leave the weight and the optimizer alone from now on."""
        for pair in (self._binding, self._hook):
            if pair is not None:
                pair[1].remove()
        self._binding = self._hook = None

    @contextmanager
    def observe(self, callback: Callable[[Any], None]) -> Iterator[None]:
        """Within this block, call `callback(record)` once per training step (eager only).

        `record` is a `reference.Record`: every tensor of SPEC 2 for the state before this step's update. It is handed
        over after the pull, during the backward. With several forwards in one backward it is that of the last one
        whose backward ran. Nothing is kept here, and observing changes no number of the training.
        """
        if not callable(callback):
            raise TypeError(f"callback must be callable, got {callback!r}")
        self._observers += (callback,)
        try:
            yield
        finally:
            kept = list(self._observers)
            kept.remove(callback)
            self._observers = tuple(kept)


def _product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype `nn.Linear` would multiply in: that of the weight, or of the autocast that is on."""
    device = weight.device.type
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def ranks() -> int:
    """How many ranks the process group has; 1 without one."""
    group = torch.distributed
    return group.get_world_size() if group.is_available() and group.is_initialized() else 1


class AttachedBCL:
    """What `attach_bcl` returns: `.layer`, the BCLLayer in the model, and `.remove()`."""

    def __init__(self, parent: nn.Module, name: str, linear: nn.Linear, layer: BCLLayer) -> None:
        self._parent, self._name, self._linear = parent, name, linear
        self.layer = layer

    @torch.no_grad()
    def remove(self) -> None:
        """Put the plain `nn.Linear` back, with the trained weight (and the SOM offset added to it). Twice is once."""
        if getattr(self._parent, self._name) is not self.layer:
            return
        layer, linear = self.layer, self._linear
        linear.weight, linear.bias = layer.weight, layer.bias
        if layer.som_offset is not None:
            linear.weight.add_(layer.som_offset)
        layer._release()
        setattr(self._parent, self._name, linear.train(layer.training))


def attach_bcl(model: nn.Module, name: str, **arguments: Any) -> AttachedBCL:
    """Replace the `nn.Linear` called `name` in `model`, such as "encoder.0", by a BCLLayer on the same parameters.

    `arguments` are those of `BCLLayer.from_linear`. The model's optimizer stays valid. Raises ValueError for a name
    that is not an `nn.Linear` inside `model`, and lists those that are.
    """
    linears = {n: m for n, m in model.named_modules() if n and isinstance(m, nn.Linear)}
    if name not in linears:
        raise ValueError(f"name must be an nn.Linear inside the model, one of {list(linears)}, got {name!r}")
    path, _, last = name.rpartition(".")
    parent, linear = model.get_submodule(path), linears[name]
    layer = BCLLayer.from_linear(linear, **arguments)
    setattr(parent, last, layer)
    return AttachedBCL(parent, last, linear, layer)
