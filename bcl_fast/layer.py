"""BCLLayer, a drop-in for `nn.Linear` (SPEC section 5)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends, counters, eager, operators, private, state
from .autograd import Competed, MaskedLinear, Training
from .checks import check_input, check_weight, no_global_sync, ranks
from .observers import Observer
from .pulls import LOW_PRECISION, Pulls
from .spec import BCLConfig, check_number
from .state import Written
from .transforms import called_not_read, plain, scriptable, traced_by_fx

if TYPE_CHECKING:
    from .reference import Record

FLOATING = (torch.float32, torch.float64, *LOW_PRECISION)


class BCLLayer(nn.Linear):
    """A linear layer whose features compete: `nn.Linear` that masks its gradient and pulls its weight (SPEC section 2).

    Input [..., in_features] -> output [..., out_features]. While training, every backward that accumulates into
    `weight` also moves it: winners get the loss gradient, redundant features are pulled toward samples nobody covers.
    In `eval()`, under `no_grad()` or with a frozen weight it is exactly `nn.Linear`. Every row of the input is a
    sample: of padded sequences leave the padding out, `layer(x[mask])` with mask [...] bool, or it competes too.

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
    _refreshed_at: Tensor
    _parameters: dict[str, Any]
    _buffers: dict[str, Any]
    __call__: Callable[..., Tensor]

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
        backends.resolve_backend(fused, backend, "meta")  # its errors come before anything is built
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._config, self._som_lr, self._requested = config, config.som_lr, (fused, backend)
        self.frozen = False
        for name, (shape, kind) in state.kinds(self.weight, self._k, config.som_space).items():
            buffer = torch.empty(shape, dtype=kind, device=self.weight.device)
            self.register_buffer(name, buffer, persistent=name != "_refreshed_at")
        if config.som_space == "offset":
            self.register_forward_pre_hook(called_not_read)
        else:
            self.register_buffer("som_offset", None)
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
    def effective_weight(self) -> Tensor:
        """What the layer multiplies with [D, N], detached: W itself, or with som_space="offset" a new W + O."""
        weight, offset = self.weight.detach(), self.som_offset
        if offset is None:
            return weight
        compiling = torch.compiler.is_compiling()
        if offset is not self._written.som_offset and not compiling and private.transform(False) is None:
            self._look_at_state(weight)  # an offset that nobody wrote takes part in nothing
        return weight + self._buffers["som_offset"]

    @property
    def som_lr(self) -> float:
        """Step size of the pull; may be set at any time (schedules). 0 stops the pull, the gradient mask stays."""
        return self._som_lr

    @som_lr.setter
    def som_lr(self, value: float) -> None:
        self._som_lr = check_number("som_lr", value, low=0)
        self._som_lr_cell.fill_(self._som_lr)

    def extra_repr(self) -> str:
        changed = (f"{name}={value}" for name, value in self.config.changed().items())
        return ", ".join([super().extra_repr(), f"backend={self.backend}", *changed])

    # --- State -------------------------------------------------------------------------------------------------------

    @property
    def _k(self) -> int:
        return min(self._config.neighborhood_k, self.out_features - 1)

    def reset_parameters(self) -> None:
        """New weight and bias as `nn.Linear` draws them, and a competition that starts afresh at step 0."""
        super().reset_parameters()
        if "step" in self._buffers:  # nn.Linear calls this before the buffers exist
            self._reset_competition()

    def _reset_competition(self, keep: str = "") -> None:
        for name, value in state.fresh(self, self.neighbors.device).items():
            if name != keep:
                self._buffers[name].copy_(value)
        self._refreshed_at.fill_(-1)
        self._written = state.written_by(self)

    def _start_afresh(self, why: str, keep: str = "") -> None:
        self._reset_competition(keep)
        warnings.warn(f"{why}: the competition starts afresh at step 0", stacklevel=6)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state.prepare_loading(self, state_dict, prefix)
        self._pulls.detach()
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._refreshed_at.fill_(-1)
        self._choose_backend()  # with assign=True the weight may be of another dtype now
        self._pulls.attach(self.weight)
        missing = [name for name in ("neighbors", "step") if prefix + name not in state_dict]
        if len(missing) == 1:
            self._start_afresh(f"{missing[0]} is missing from a state_dict that has the rest of the competition")
        elif not missing:
            self._written = Written()
            self._check_numbers(ours=True)

    def _start_runtime(self) -> None:
        """What belongs to this object in this process, and is neither copied nor saved."""
        self._written = Written(refreshed_at=self._refreshed_at)
        self._choose_backend()
        self._pulls: Pulls = Pulls(self)
        self._options = self._config.statistics
        self._observers: tuple[Observer, ...] = ()
        self._warming_up = False  # for a capture, in which nothing may be compiled
        self._pulls.attach(self.weight)

    def _choose_backend(self) -> None:
        weight = self.weight
        self._backend = backends.resolve_backend(*self._requested, weight.device.type, weight.dtype)
        # som_lr where the pull reads it: a CUDA graph then follows a schedule, as long as the tensor is the same one.
        kind = operators.exact(weight.dtype), weight.device
        cell = self.__dict__.get("_som_lr_cell")
        if cell is None or (cell.dtype, cell.device) != kind:
            with torch.inference_mode(False):  # else nobody could set it later
                self._som_lr_cell = torch.tensor(self._som_lr, dtype=kind[0], device=kind[1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BCLLayer:
        """Moves of the module (`to`, `cuda`, `to_empty`, ...): another device may have another backend."""
        state.complete(self, self.weight)
        before = self.neighbors, self.step
        self._pulls.detach()
        super()._apply(fn, recurse)
        self._choose_backend()
        self._pulls.attach(self.weight)
        after = self.neighbors, self.step
        if not all(map(state.same_numbers, before, after)):  # to_empty() left whatever the memory held
            self._reset_competition()
            self._written = Written(nobody=True)
        elif self._written.neighbors is before[0] and self._written.step is before[1]:
            self._written = state.written_by(self)
        return self

    _RUNTIME = ("_backend", "_options", "_som_lr_cell", "_written", "_pulls", "_observers", "_warming_up")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self._RUNTIME}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        super().__setstate__(attributes)
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
        shape = linear.in_features, linear.out_features, linear.bias is not None  # on "meta": no random numbers drawn
        layer = cls(*shape, fused=fused, backend=backend, config=config, device="meta", dtype=weight.dtype, **options)
        layer.weight, layer.bias = weight, linear.bias
        for name, buffer in layer.named_buffers():
            setattr(layer, name, torch.empty_like(buffer, device=weight.device))
        layer._choose_backend()
        layer._reset_competition()
        layer._pulls.attach(weight)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """A new `nn.Linear` that computes what this layer does in `eval()`, on copies of its parameters.

        On its device, in its dtype, mode and requires_grad; an offset is added in. Hooks, gradients and ties to other
        modules do not go along: `detach_bcl` replaces the layers inside a model, and keeps all of them.
        """
        weight = nn.Parameter(self.effective_weight.clone(), self.weight.requires_grad)
        bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return plain(weight, bias).train(self.training)

    # --- Forward -----------------------------------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, torch.fx.Proxy):
            return traced_by_fx(self, self.som_offset, input)
        # nn.Module looks tensors up in Python, which small steps feel: those that are its own are taken from its dicts.
        parameters, offset = self._parameters, self._buffers["som_offset"]
        weight = parameters["weight"] if "weight" in parameters else self.weight
        bias = parameters["bias"] if "bias" in parameters else self.bias
        compiling = torch.compiler.is_compiling()
        if not self.training or not torch.is_grad_enabled() or not weight.requires_grad:
            if not compiling:
                if offset is not None and offset is not self._written.som_offset and private.transform(False) is None:
                    self._look_at_state(weight)
                    offset = self.som_offset
                if not torch.is_grad_enabled():
                    if self.training:
                        self._pulls.first_pass(weight, self._buffers["step"])
                else:
                    self._pulls.received = True
            return self._linear(input, weight, bias, offset)
        self._check_training(weight, offset, compiling)
        check_input(input, weight)
        if input.numel() == 0:
            self._pulls.received = True
            return self._linear(input, weight, bias, offset)
        x = input if input.dim() == 2 else input.reshape(-1, self.in_features)
        dtype = operators.product_dtype(weight)
        if compiling:
            with operators.no_autocast(input.device.type), torch.no_grad():
                activation, shifted, statistics = self._compete(x, weight, bias, dtype)
            options = dtype, self._config.gradient_mask, self._backend
            output = MaskedLinear.apply(x, weight, bias, shifted, activation, *options, *statistics.tensors)
        else:
            output = Training.apply(x, weight, bias, self, dtype)
        return output if input.dim() == 2 else output.reshape(*input.shape[:-1], self.out_features)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None, offset: Tensor | None) -> Tensor:
        """What `nn.Linear` computes, for all that it takes; for anything else an error that names what is wrong."""
        try:
            if offset is None:
                return F.linear(input, weight, bias)
            try:
                effective_weight = weight + offset
            except NotImplementedError:  # a quantized weight can be multiplied only
                return F.linear(input, weight, bias) + F.linear(input, offset)
            return F.linear(input, effective_weight, bias)
        except (RuntimeError, TypeError):
            check_input(input, weight)
            raise

    def __prepare_scriptable__(self) -> nn.Linear:
        return scriptable(self, self.som_offset)

    def _compete(self, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Competed:
        """Steps 1 to 11 of a forward on x [B, N], whose product has `dtype`."""
        buffers, written, compiling = self._buffers, self._written, torch.compiler.is_compiling()
        offset = buffers["som_offset"]
        shifted = None if offset is None else weight + offset
        effective_weight = weight if shifted is None else shifted
        if x.dtype == weight.dtype == dtype and dtype not in LOW_PRECISION:
            activation = F.linear(x, effective_weight, bias)
        else:
            activation = operators.call("product", x, effective_weight, bias, dtype)
        neighbors, step, refreshed_at = buffers["neighbors"], buffers["step"], buffers["_refreshed_at"]
        if not compiling and not written.still(neighbors, step, refreshed_at):
            self._look_at_state(self.weight)
            neighbors, step, refreshed_at = buffers["neighbors"], buffers["step"], buffers["_refreshed_at"]
            written = self._written
        given = x, effective_weight, bias, activation, neighbors, step, refreshed_at, self._pulls.ticket, self._backend
        found = eager.statistics(*given, self._options)
        if not compiling:
            written.neighbors_version = neighbors._version  # a refresh is our own
        return Competed(activation, shifted, found)

    def _check_training(self, weight: Tensor, offset: Tensor | None, compiling: bool) -> None:
        """Raise where training would go wrong."""
        if (transform := private.transform(compiling)) is not None:
            raise RuntimeError(
                f"{transform} would drop the gradient mask and the pull of a BCLLayer in training: call eval() before"
            )
        if not compiling:
            if weight is not self._written.weight or offset is not self._written.som_offset:
                self._look_again(weight)
        elif not weight.is_leaf:
            check_weight(self, weight, self._pulls.hooked)
        # In this order: what depends on som_lr would be compiled anew for each value of a schedule.
        if self._config.sync == "global" and ranks() > 1 and (self._pulls_now or self._config.couples):
            raise no_global_sync()

    # --- State that somebody else has written ------------------------------------------------------------------------

    def _check_objects(self, *seen: Tensor) -> None:
        """Look again where another object has taken a place; `seen` are the buffers, or copies, in compiled code.

        Versions say nothing there: compiled code counts them on without a change.
        """
        buffers, written = (self.neighbors, self.step, self._refreshed_at), self._written
        known = written.neighbors, written.step, written.refreshed_at
        if self.weight is written.weight and all(one is other for one, other in zip(buffers, known, strict=True)):
            return
        self._look_again(self.weight)
        for copy, buffer in zip(seen, (self.neighbors, self.step, self._refreshed_at), strict=True):
            if copy is not buffer:
                copy.copy_(buffer)

    def _look_again(self, weight: Tensor) -> None:
        """Before a training forward trusts what this layer has not written itself: the weight, then the state."""
        if weight is not self._written.weight:
            check_weight(self, weight, self._pulls.hooked)
            self._choose_backend()
            self._pulls.attach(weight)
        self._look_at_state(weight)
        self._written.weight = weight

    @torch.no_grad()
    def _look_at_state(self, weight: Tensor) -> None:
        """Check the state once, whoever has written it (one synchronization on a GPU).

        While a CUDA graph is captured nothing is looked at; kernels clamp.
        """
        if counters.capturing(weight.device):
            return
        written = self._written
        state.complete(self, weight)
        state.check_kinds(self, weight, self._k, self._config.som_space)
        if written.nobody:
            self._start_afresh("neighbors were never written (to_empty, skip_init)")
        else:
            self._check_numbers(ours=self.step is written.step or self.neighbors is written.neighbors)
        if self._refreshed_at is not written.refreshed_at:
            self._refreshed_at.fill_(-1)
        self._written = state.written_by(self)
        self._written.weight = written.weight  # which was not looked at

    def _check_numbers(self, ours: bool) -> None:
        """Start afresh, with a warning, where neighbors are none, as the mean of models'; else a ValueError.

        An offset beside buffers of `ours` stays, as a part of the weight; beside others' it may be any memory.
        """
        wrong = state.wrong(self.neighbors, self.step, self.som_offset)
        if wrong is not None and wrong.buffer == "neighbors":
            self._start_afresh(wrong.message, keep="som_offset" if ours else "")
            wrong = state.wrong(self.neighbors, self.step, self.som_offset)
        if wrong is not None:
            raise ValueError(wrong.message)

    # --- The pull ----------------------------------------------------------------------------------------------------

    @property
    def _pulls_now(self) -> bool:
        # A graph reads som_lr in every replay, so that 0 at its capture decides nothing.
        return not self.frozen and (self._som_lr > 0 or self._warming_up or counters.capturing(self.weight.device))

    def bind_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Pull once per optimizer step instead of once per backward, in a hook before that step.

        The pulls of all backwards since the last step are averaged, weighted by their number of samples, and dropped
        with gradients that `zero_grad()` throws away, as where a GradScaler skips the step. `step(closure)` pulls once
        the closure has run, before the update; LBFGS, which runs it many times, after its step. Use it with gradient
        accumulation, GradScaler, retain_graph, and where several backwards recompute checkpointed forwards; a layer in
        reentrant checkpoints takes one backward per forward. Wrappers that hold their optimizer as `.optimizer`
        (accelerate, Lightning) may be given. Binding is not saved with the layer. Raises ValueError where `optimizer`
        does not hold the weight of this layer.
        """
        self._pulls.bound.bind(optimizer)

    @property
    def bound_optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer that `bind_optimizer` bound this layer to, as long as it lives."""
        return self._pulls.bound.optimizer

    # --- Observers ---------------------------------------------------------------------------------------------------

    @property
    def _observed_now(self) -> bool:
        return bool(self._observers) and any(observer.due for observer in self._observers)

    @contextmanager
    def _observed_by(self, observer: Observer) -> Iterator[None]:
        self._observers += (observer,)
        try:
            yield
        finally:
            self._observers = tuple(other for other in self._observers if other is not observer)

    def observe(self, callback: Callable[[Record], None]) -> AbstractContextManager[None]:
        """Within this block, call `callback(record)` once per training step.

        `record` is a `reference.Record`: every tensor of steps 1 to 11 for the state before this step's update. It is
        handed over after the pull, during the backward. With several forwards in one backward it is that of the last
        one whose backward ran. Under torch.compile the activation is computed once more for it, eagerly. Nothing is
        kept here, and observing changes no number of the training.
        """
        if not callable(callback):
            raise TypeError(f"callback must be callable, got {callback!r}")
        return self._observed_by(Observer(callback))
