"""Triton kernels without a GPU: its interpreter (3.6 to 3.9) made fast, right and strict, and what kernels do, visible.

`enable()` runs before anything imports triton. From then on an access outside of a launch's tensors raises, and what a
load without `other` leaves in masked lanes shows. `Launches`, `Traffic` and `Races` watch while their `with` lasts.
"""

import functools
import importlib.util
import inspect
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from . import numerics


def enable() -> bool:
    """Whether Triton interprets its kernels in this process, repaired; it does where torch sees no GPU.

    TRITON_INTERPRET decides where it is set; otherwise it is set, for child processes too.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    if "TRITON_INTERPRET" not in os.environ:
        if "triton" in sys.modules:
            raise RuntimeError("triton was imported before enable(): its own functions are compiled ones already")
        os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))
    import triton

    if triton.knobs.runtime.interpret:
        _repair()
    return triton.knobs.runtime.interpret


@functools.cache  # a second call would wrap the wrappers
def _repair() -> None:
    """Each of Triton's functions below gives way to what its repair makes of it."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    for owner, name, repair in [
        (interpreter, "_patch_lang", _binding_once(tl, interpreter)),
        (interpreter.ReduceOps, "apply_impl", _bitwise_reductions(tl)),
        (interpreter.InterpretedFunction, "run", _announced),
        (builder, "cast_impl", numerics.bfloat16_casts),
        (builder, "create_dot", numerics.tensor_core_dot),
        (builder, "create_dot", numerics.bfloat16_dot),
        (builder, "binary_op", numerics.no_bfloat16_arithmetic),
        (builder, "create_histogram", numerics.histogram),
        (
            builder,
            "create_minnumf",
            numerics.of_ufunc(np.fmin),
        ),  # up to 3.7 NaN wins; on a GPU the number does
        (builder, "create_maxnumf", numerics.of_ufunc(np.fmax)),
        (builder, "create_masked_load", _no_silent_other(interpreter)),
        (builder, "create_masked_load", _checked("load", 0, 1)),
        (builder, "create_masked_store", _checked("store", 0, 2)),
        (builder, "create_atomic_rmw", _checked("atomic", 1, 3)),
        (builder, "create_atomic_cas", _checked("atomic", 0, None)),
        (builder, "create_barrier", _announced_barrier),
    ]:
        setattr(owner, name, repair(getattr(owner, name)))


# --- Speed -----------------------------------------------------------------------------------------------------------


def _binding_once(tl, interpreter):
    """Triton binds its language to the interpreter before every call of a jitted function, which takes 1 ms, and undoes
    it after every launch. Nothing in an interpreting process needs that undone: once is enough."""

    def repair(stock):
        def patch_lang(fn):
            languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
            if any(tl.core.is_builtin(language.load) for language in languages):
                stock(fn)
                tl.tensor.__index__ = lambda self: self.handle.data.item()  # numpy 2.4 refuses the one of 3.6
            return interpreter._LangPatchScope()

        return patch_lang

    return repair


def _bitwise_reductions(tl):
    """tl.sort is made of reductions by xor, which the stock interpreter takes one element at a time."""
    ufuncs = {tl.standard._xor_combine: np.bitwise_xor}
    if hasattr(tl.standard, "_or_combine"):
        ufuncs[tl.standard._or_combine] = np.bitwise_or

    def repair(stock):
        def apply_impl(self, inputs):
            if self.combine_fn not in ufuncs:
                return stock(self, inputs)
            reduced = ufuncs[self.combine_fn].reduce(inputs[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
            return self.to_tensor(reduced, inputs[0].dtype)

        return apply_impl

    return repair


# --- Strictness ------------------------------------------------------------------------------------------------------


class Span(NamedTuple):
    """The bytes [start, stop) of the tensor that a launch got as `argument`."""

    argument: str
    start: int
    stop: int
    itemsize: int


class Running(NamedTuple):
    """The launch that the interpreter is at."""

    kernel: str
    spans: list[Span]


class Watcher:
    """Hears, inside its `with` block, of every launch in the interpreter and of every access to memory."""

    def __enter__(self):
        _watchers.append(self)
        return self

    def __exit__(self, *error):
        _watchers.remove(self)

    def begin(self, running: Running) -> None:
        """A launch begins."""

    def access(self, kind: str, kernel: str, span: Span, elements: np.ndarray, program: tuple) -> None:
        """The program's lanes touch these elements, offsets [L] in the span; `kind` is load, store or atomic."""

    def barrier(self) -> None:
        """tl.debug_barrier()."""

    def end(self, running: Running) -> None:
        """A launch has come to its end."""


_watchers: list[Watcher] = []
_running: list[Running] = []  # at most one: none between launches, nor for tensors elsewhere than on the CPU


def _tell(event: str, *arguments) -> None:
    for watcher in _watchers:
        getattr(watcher, event)(*arguments)


def _span(argument: str, tensor: torch.Tensor) -> Span:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start, itemsize = tensor.data_ptr(), tensor.element_size()
    return Span(argument, start, start + (last + 1) * itemsize if tensor.numel() else start, itemsize)


def _announced(stock):
    def run(self, *args, grid, warmup, **kwargs):
        given, _ = _bound(self.fn, args, kwargs)
        tensors = {name: value for name, value in given.items() if torch.is_tensor(value)}
        if any(tensor.device.type != "cpu" for tensor in tensors.values()):  # the interpreter works on copies of these
            return stock(self, *args, grid=grid, warmup=warmup, **kwargs)
        running = Running(self.fn.__name__, [_span(name, tensor) for name, tensor in tensors.items()])
        _running.append(running)
        try:
            _tell("begin", running)
            with np.errstate(all="ignore"):  # a GPU says nothing of an overflow
                stock(self, *args, grid=grid, warmup=warmup, **kwargs)
            _tell("end", running)
        finally:
            _running.clear()

    return run


def _announced_barrier(stock):
    def create_barrier(self):
        _tell("barrier")

    return create_barrier


def _touch(kind: str, builder, pointers: np.ndarray, mask: np.ndarray) -> None:
    """Every unmasked lane must point into a tensor of the launch, the first of those that share its memory."""
    lanes = np.broadcast_to(np.asarray(mask, dtype=bool), pointers.shape)  # it may hold integers 0 and 1
    for running in _running:
        addresses = pointers[lanes]
        for span in running.spans:
            inside = (addresses >= span.start) & (addresses < span.stop)
            if inside.any():
                elements = (addresses[inside] - np.uint64(span.start)) // np.uint64(span.itemsize)
                _tell("access", kind, running.kernel, span, elements.astype(np.int64), builder.grid_idx)
                addresses = addresses[~inside]
        if addresses.size:
            raise IndexError(f"{running.kernel}: {addresses.size} lanes of a {kind} point outside of its tensors")


def _checked(kind: str, pointers_at: int, mask_at: int | None):
    """For a method of the builder that takes its pointers and its mask at these places."""

    def repair(stock):
        def access(self, *arguments, **options):
            mask = True if mask_at is None else arguments[mask_at]
            mask = mask if isinstance(mask, (bool, np.ndarray)) else mask.data  # an array for descriptors, up to 3.8
            _touch(kind, self, arguments[pointers_at].data, mask)
            return stock(self, *arguments, **options)

        return access

    return repair


def _no_silent_other(interpreter):
    def repair(stock):
        def create_masked_load(self, ptrs, mask, other, *rest, **options):
            """Masked lanes of a load without `other` hold anything on a GPU: here NaN or -1, where stock has 0."""
            if other is None:
                dtype = ptrs.get_element_ty()
                array = np.ones(ptrs.data.shape, interpreter._get_np_dtype(dtype))
                if array.dtype != bool:
                    array.view(np.uint8).fill(0xFF)
                other = type(ptrs)(array, dtype)
            return stock(self, ptrs, mask, other, *rest, **options)

        return create_masked_load

    return repair


# --- Memory: what moves, and who touches it --------------------------------------------------------------------------


class Place(NamedTuple):
    """Where elements are counted: at which tensor argument of which kernel; `kind` is load, store or atomic."""

    kernel: str
    argument: str
    kind: str


class Traffic(Watcher):
    """Counts the elements that kernels touch: `lanes` every touch, `distinct` each element once per launch and kind.

    `distinct` has to cross the device's memory, the rest of `lanes` may be served by a cache. Where several arguments
    share memory, the first of them stands for all.
    """

    def __init__(self):
        self.lanes: Counter[Place] = Counter()
        self.distinct: Counter[Place] = Counter()
        self._seen: dict[tuple[Place, Span], np.ndarray] = {}

    def access(self, kind, kernel, span, elements, program):
        place = Place(kernel, span.argument, kind)
        self.lanes[place] += elements.size
        if (place, span) not in self._seen:
            self._seen[place, span] = np.zeros((span.stop - span.start) // span.itemsize, dtype=bool)
        self._seen[place, span][elements] = True

    def end(self, running):
        for (place, _), seen in self._seen.items():
            self.distinct[place] += int(seen.sum())
        self._seen.clear()

    def __str__(self):
        return "\n".join(
            f"{place.kernel:32} {place.argument:24} {place.kind:6} {lanes:12,} {self.distinct[place]:12,} distinct"
            for place, lanes in sorted(self.lanes.items())
        )


class Races(Watcher):
    """Raises where the outcome of a launch would hang on an order that a GPU does not promise.

    That is where two programs touch one element, or one program twice without a tl.debug_barrier() in between, and one
    of the two accesses is a store, or only one is atomic; and where two lanes of a store meet. A program may store to
    what it has loaded, since the stored value waited for the load. `shared`: arguments with a protocol of their own.
    """

    RIVALS = {"load": ("store", "atomic"), "store": ("store", "atomic", "load"), "atomic": ("store", "load")}
    MANY = -1  # in place of a program's number, which is at least 1; 0 is nobody

    def __init__(self, shared: Collection[str] = ()):
        self._shared = shared

    def begin(self, running):
        self._numbers: dict[tuple, int] = defaultdict(lambda: len(self._numbers) + 1)
        self._touched: dict[tuple[str, Span], np.ndarray] = {}  # by which program, in this launch
        self._unfenced: dict[tuple[str, Span], np.ndarray] = {}  # by this program, since its last barrier
        self._program = 0

    def access(self, kind, kernel, span, elements, program):
        if span.argument in self._shared:
            return
        me, where = self._numbers[program], f"{kernel}, program {program}: a {kind} of {span.argument} meets"
        if me != self._program:
            self._program = me
            self.barrier()
        for rival in self.RIVALS[kind]:
            touched = self._map(self._touched, rival, span)[elements]
            if ((touched != 0) & (touched != me)).any():
                raise AssertionError(f"{where} a {rival} of another program")
            if (kind, rival) != ("store", "load") and self._map(self._unfenced, rival, span)[elements].any():
                raise AssertionError(f"{where} an earlier {rival} without a barrier between them")
        if kind == "store" and np.unique(elements).size < elements.size:
            raise AssertionError(f"{where} itself in another lane")
        touched = self._map(self._touched, kind, span)
        touched[elements] = np.where((touched[elements] == 0) | (touched[elements] == me), me, self.MANY)
        self._map(self._unfenced, kind, span)[elements] = 1

    def barrier(self):
        self._unfenced.clear()

    @staticmethod
    def _map(maps: dict[tuple[str, Span], np.ndarray], kind: str, span: Span) -> np.ndarray:
        if (kind, span) not in maps:
            maps[kind, span] = np.zeros((span.stop - span.start) // span.itemsize, dtype=np.int32)
        return maps[kind, span]


# --- Launches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """One launch: which kernel, and its arguments as Triton's compiler sees them."""

    function: Any = field(repr=False)  # the JITFunction, or what stands for it in the interpreter
    name: str
    file: str
    grid: tuple[int, ...]
    types: dict[str, str]  # by argument: *fp32, i32, i64, fp32, ..., or constexpr, which None is too
    values: dict[str, Any]  # of the arguments that are not tensors
    options: dict[str, Any]  # num_warps, num_stages, ...


def _bound(fn, args: tuple, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a launch by name, defaults included, and the options among its keywords."""
    signature = inspect.signature(fn)
    bound = signature.bind(*args, **{name: value for name, value in kwargs.items() if name in signature.parameters})
    bound.apply_defaults()
    return bound.arguments, {name: value for name, value in kwargs.items() if name not in signature.parameters}


def _described(function, grid, args: tuple, kwargs: dict[str, Any]) -> Launch:
    from triton.runtime.jit import KernelParam, mangle_type

    given, options = _bound(function.fn, args, kwargs)
    types = {}
    for number, parameter in enumerate(inspect.signature(function.fn).parameters.values()):
        declared = KernelParam(number, parameter, False, False)
        annotation = "constexpr" if declared.is_constexpr else declared.annotation_type
        types[parameter.name] = annotation or mangle_type(given[parameter.name])
    return Launch(
        function=function,
        name=function.fn.__name__,
        file=inspect.getfile(function.fn),
        grid=tuple(grid(given) if callable(grid) else grid),
        types=types,
        values={name: value for name, value in given.items() if not torch.is_tensor(value)},
        options=options,
    )


class Launches(list[Launch]):
    """Every launch inside the `with` block, in order; without `execute` none takes place, so that tensors may be meta.

    Interpreted or on a GPU.
    """

    def __init__(self, execute: bool = True):
        super().__init__()
        self._execute = execute

    def __enter__(self):
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction

        self._patches = [
            mock.patch.object(owner, "run", self._noted(owner.run)) for owner in (InterpretedFunction, JITFunction)
        ]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *error):
        for patch in self._patches:
            patch.stop()

    def _noted(self, stock):
        def run(function, *args, grid, warmup, **kwargs):
            if not warmup:
                self.append(_described(function, grid, args, kwargs))
            return stock(function, *args, grid=grid, warmup=warmup, **kwargs) if self._execute or warmup else None

        return run
