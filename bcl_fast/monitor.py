"""`Monitor`: what the BCL layers of any training do, written to a folder as it happens, and read for its report."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import torch
from torch import Tensor, nn

from . import __version__
from .bound import Optimizers
from .environment import environment
from .glance import Shape, check_glance, glance, image_shape_of
from .layer import BCLLayer
from .meter import Measured, Meter
from .records import DamagedFile, plain, replacing, trusting
from .spec import check_number, listed

try:
    import fcntl
except ModuleNotFoundError:  # on Windows
    fcntl = None  # type: ignore[assignment]

LINES, STEPS, BOARD, LOCK = "monitor.jsonl", "steps", "tensorboard", "monitor.lock"
REMEDY = "delete it, or the folder, and monitor anew"
LONGEST = 180  # letters of a layer's name in that of a file


class Monitor:
    """Around a training loop, measures every BCLLayer at its first step and at every `every`-th after it.

    Each measured step of a layer appends a line of numbers to OUT/monitor.jsonl (the metrics of `diagnostics`, and the
    forces where an optimizer is given) and leaves what pictures need in OUT/steps. `python -m bcl_fast report OUT`
    makes a page of them. Both are on disk when the step ends. A folder that holds a monitor of the same layers is gone
    on with: of steps that were repeated after a checkpoint the later ones count. No number of the training changes.

        with bcl_fast.Monitor(model, optimizer, out="runs/mine") as monitor:
            for x, y in data:
                ...
                optimizer.step()
                monitor.log(loss=loss)

    A step is one of the optimizer that holds the layer's weight, or, where none is given, a backward of the layer.
    Under torch.compile everything is measured as well; with several ranks the first measures and writes. CUDA graphs
    cannot be looked into: `graphed` raises within the block.

    Args:
        model: holds at least one BCLLayer; those that it gets within the block are not seen.
        optimizer: one or several, or None: no forces, and steps are backwards.
        every: steps of a layer from one that is measured to the next, >= 1. Nothing is computed for those between.
        out: the folder, made where it is not there; None writes nothing.
        tensorboard: also write every number to OUT/tensorboard (needs the extra [demo]).
        image_shape: (height, width) or (channels, height, width) of the images that inputs of so many numbers are;
            None looks for one or three squares whose neighboring pixels are alike.
        callback: is called with each `meter.Measured`, for a logger of your own.

    Raises TypeError or ValueError that names the argument, its value and what is allowed; OSError where a file cannot
    be written.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers | None = None,
        every: int = 100,
        out: str | os.PathLike[str] | None = "runs/monitor",
        tensorboard: bool = False,
        image_shape: tuple[int, ...] | None = None,
        callback: Callable[[Measured], None] | None = None,
    ) -> None:
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be callable or None, got {callback!r}")
        if tensorboard and out is None:
            raise ValueError("tensorboard=True needs a folder, got out=None")
        if out is not None and not isinstance(out, (str, os.PathLike)):
            raise TypeError(f"out must be a str, a path or None, got {out!r}")
        self._callback = callback
        self._meter = Meter(model, optimizer, every, self._take)
        shape, inputs = _checked_shape(image_shape), {layer.in_features for layer in self._meter.layers.values()}
        if shape is not None and math.prod(shape) not in inputs:
            raise ValueError(
                f"image_shape must be of as many numbers as the inputs of a layer, {listed(sorted(inputs))}, got "
                f"{image_shape!r}"
            )
        # Absolute: the training may go to another folder.
        self._folder = None if out is None else _Folder(Path(out).expanduser().absolute(), tensorboard, shape)
        self._entered = self._warned = False
        self._given: set[str] = set()  # the names of numbers that `log` was given
        self._kept: set[str] = set()  # those of which it has kept any
        self._served: set[str] = set()  # the layers with which it has kept any

    def __enter__(self) -> Monitor:
        if self._entered:
            raise RuntimeError("a Monitor cannot be entered within its own block")
        with ExitStack() as entered:
            if self._folder is not None and self._meter.measures:
                self._folder.open(self._meter.layers)
                entered.callback(self._folder.close)
            self._meter.__enter__()
            entered.pop_all()
        self._entered, self._given, self._kept, self._served = True, set(), set(), set()
        return self

    def __exit__(self, *error: object) -> None:
        self._entered = False
        idle, deserted = self._meter.idle, self._meter.deserted
        without = [name for name in self._meter.measured if self._given and name not in self._served]
        lost = sorted(self._given - self._kept) if self._meter.measured else []
        self._meter.__exit__()
        if self._folder is not None:
            self._folder.close()
        if any(error):
            return
        if idle:
            warnings.warn(
                f"Monitor has measured no step of {listed(idle)}: a step is a backward in train() that "
                "accumulates into the weight of the layer, and where an optimizer holds that, then a step of it",
                stacklevel=2,
            )
        if deserted:
            warnings.warn(
                f"Monitor has seen no step in the last backwards of {listed(deserted)}: if another optimizer than the "
                "one it was given has taken over, give it both",
                stacklevel=2,
            )
        if lost or without:
            what = f"no number named {listed(lost)}" if lost else f"nothing with {listed(without)}"
            warnings.warn(
                f"log() has kept {what}: it keeps what comes between a step that was measured and the next backward; "
                "call it after each step, that of every optimizer",
                stacklevel=2,
            )

    def _take(self, measured: Measured) -> None:
        if not self._meter.measures:
            return
        if self._folder is not None:
            self._folder.write(measured)
        if self._callback is not None:
            self._callback(measured)

    def log(self, **numbers: float | Tensor) -> None:
        """Keep numbers of your own with the step that was measured, such as the loss; call it after each whole step.

        They are kept with every layer of which a step was measured since the last backward, those of several calls side
        by side. Where there is none nothing is read: tensors on a GPU are not waited for. Optimizers that step in turn,
        as a GAN's, have a call after each. Raises RuntimeError outside of the `with` block. Warns where it comes before
        any step, as it then does before every one, and at the end of the block of names and layers for which it never
        came in time.
        """
        if "step" in numbers:
            raise ValueError("numbers must have other names than step, which is the line's own")
        if not self._entered:
            raise RuntimeError("log() works within the `with` block of its Monitor")
        if not self._meter.measures:
            return
        if not self._meter.seen and not self._warned:
            self._warned = True
            warnings.warn(
                "log() comes before any backward of a BCLLayer in train(), and would keep numbers with the step before "
                "theirs: call it after the whole step, optimizer.step() included",
                stacklevel=2,
            )
        steps = self._meter.just_measured
        self._given |= numbers.keys()
        self._served |= steps.keys()
        if steps:
            self._kept |= numbers.keys()
            read = {name: _number(name, value) for name, value in numbers.items()}
            if self._folder is not None:
                self._folder.log(steps, read)


class _Folder:
    """Where a `Monitor` writes."""

    def __init__(self, out: Path, tensorboard: bool, image_shape: Shape | None) -> None:
        self.out, self._boards, self._image_shape = out, tensorboard, image_shape
        self._shapes: dict[str, Shape | None] = {}  # of the images that a layer gets
        self._layers: Mapping[str, BCLLayer] = {}
        self._earlier: dict[str, list[int]] = {}  # the steps of each layer that were there before this start
        self._measures = False  # whether this start has measured any
        self._board: Any = None
        self._opened = ExitStack()
        self._start = 0.0

    def open(self, layers: Mapping[str, BCLLayer]) -> None:
        """Make the folder, or go on with one of the same layers, and write down how this start is."""
        if self._boards:
            try:
                import torch.utils.tensorboard  # noqa: F401
            except ModuleNotFoundError as error:
                raise ImportError(f'tensorboard=True needs {error.name}: pip install "bcl-fast[demo]"') from error
        about = {
            name: {"shape": list(layer.weight.shape), "backend": layer.backend, "config": layer.config.to_dict()}
            for name, layer in layers.items()
        }
        try:
            (self.out / STEPS).mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"out must be a folder to write to, got {self.out}: a file is in its place") from error
        with ExitStack() as opened:
            opened.enter_context(_locked(self.out))
            lines, self._earlier = self.out / LINES, {}
            if lines.exists() and _cut_after_last_line(lines):
                found = Monitored.read(self.out)
                there = _shapes(found.runs[-1])
                if there != _shapes({"layers": about}):
                    raise ValueError(
                        f"out must be a new folder or one of the same layers, got {self.out}, which has {there}"
                    )
                self._earlier = {name: [row["step"] for row in rows] for name, rows in found.layers.items() if rows}
            self._layers, self._measures, self._start = layers, False, time.perf_counter()
            self._append({"bcl_fast": __version__, "environment": environment(), "layers": about})
            self._opened = opened.pop_all()

    def _begin(self, layer: str, step: int) -> None:
        """As the first step is measured, when any checkpoint is loaded: from where on the earlier ones are void."""
        self._measures, repeated = True, None
        if self._earlier:
            void = {name: int(each.step) for name, each in self._layers.items()} | {layer: step}
            self._append({"void": void})
            repeated = min(void[name] for name in self._earlier)
            if all(steps[0] >= void[name] for name, steps in self._earlier.items()):
                warnings.warn(
                    f"{self.out} holds {sum(map(len, self._earlier.values())):,} measured steps of an earlier "
                    "training, whose place this one takes on the page: give each a folder of its own",
                    stacklevel=2,
                )
        if self._boards:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.out / BOARD), purge_step=repeated)
            self._opened.callback(self._board.close)

    def close(self) -> None:
        self._opened.close()
        self._board = None

    def log(self, steps: Mapping[str, int], numbers: Mapping[str, float]) -> None:
        self._append({"steps": steps, "log": numbers})
        for layer, step in steps.items():
            self._show(step, {f"{layer}/{name}": number for name, number in numbers.items()})

    def write(self, measured: Measured) -> None:
        layer, step, record = measured.layer, measured.step, measured.record
        if not self._measures:
            self._begin(layer, step)
        if self._shapes.get(layer) is None:  # a first batch of one sample shows no image
            given = self._image_shape
            fits = given is not None and math.prod(given) == record.x.shape[1]
            self._shapes[layer] = given if fits else image_shape_of(record.x)
        kept = glance(record, self._shapes[layer]) | {name: v.cpu() for name, v in measured.features.items()}
        _save(_path(self.out, layer, step), kept)  # before its line, which says that it is there
        seconds = round(time.perf_counter() - self._start, 3)
        self._append({"layer": layer, "step": step, "seconds": seconds, **measured.metrics})
        self._show(step, measured.named())

    def _append(self, line: Mapping[str, Any]) -> None:
        with (self.out / LINES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain(line), allow_nan=False) + "\n")

    def _show(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._board is not None:
            for name, number in numbers.items():
                self._board.add_scalar(name, number, step)
            self._board.flush()


# --- What is read back ------------------------------------------------------------------------------------------------


class Monitored(NamedTuple):
    """What a folder of a `Monitor` holds: of steps that a later start has repeated what that has measured."""

    folder: Path
    runs: list[dict[str, Any]]  # how each start was: `bcl_fast`, `environment`, `layers`
    layers: dict[str, list[dict[str, Any]]]  # the lines of each layer, by step
    logged: dict[str, list[dict[str, Any]]]  # the user's own numbers with the steps of each layer, by `step`

    @classmethod
    def read(cls, folder: Path) -> Monitored:
        """Raises DamagedFile, which names the file and the line, where it is not what a `Monitor` wrote.

        A last line that a crash has cut short is left out, and so is what a later start has gone back behind.
        """
        path = folder / LINES
        with trusting(path, REMEDY):
            text = path.read_text(encoding="utf-8")
        found = cls(folder, [], {}, {})
        for number, line in enumerate(text.splitlines(keepends=True), 1):
            with trusting(f"line {number} of {path}", REMEDY):
                if line.endswith("\n"):
                    found._take(json.loads(line))
        if not found.runs:
            raise DamagedFile(f"{path} is damaged or of another kind (it has no line of a start): {REMEDY}")
        return found

    def _take(self, line: dict[str, Any]) -> None:
        if "environment" in line:
            self.runs.append({name: line[name] for name in ("bcl_fast", "environment", "layers")})
            for name in line["layers"]:  # in the order of the model; lines come in that of the backward
                self.layers.setdefault(name, [])
                self.logged.setdefault(name, [])
            return
        if not self.runs:
            raise ValueError("it comes before any start")
        if "void" in line:
            for layer, step in line["void"].items():
                self._drop(layer, step)
            return
        measured = "log" not in line
        if measured and not isinstance(line["step"], int):
            raise TypeError(f"step must be an integer, got {line['step']!r}")
        for name, number in (line if measured else line["log"]).items():
            if name != "layer" and not isinstance(number, (int, float, type(None))):
                raise TypeError(f"{name} must be a number, got {number!r}")
        if measured:
            self._drop(line["layer"], line["step"])
            self.layers[line["layer"]].append(line)
            return
        for layer, step in line["steps"].items():
            if [row["step"] for row in self.layers[layer][-1:]] != [step]:
                raise ValueError(f"the line before of layer {layer!r} is not of step {step!r}")
            rows = self.logged[layer]
            if not rows or rows[-1]["step"] != step:
                rows.append({"step": step})
            rows[-1].update(line["log"])

    def _drop(self, layer: str, step: int) -> None:
        for rows in (self.layers[layer], self.logged[layer]):
            while rows and rows[-1]["step"] >= step:
                rows.pop()

    def glances(self, layer: str) -> Sequence[dict[str, Tensor]]:
        """What was kept of each line of a layer, read as it is asked for; nothing where only the lines came along."""
        steps = [line["step"] for line in self.layers[layer]] if (self.folder / STEPS).is_dir() else []
        return _Glances([_path(self.folder, layer, step) for step in steps])


class _Glances(Sequence[dict[str, Tensor]]):
    """What `glance` kept, in files."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return _Glances(self._paths[place])
        path = self._paths[place]
        with trusting(path, REMEDY):
            with gzip.open(path) as file:
                kept = torch.load(io.BytesIO(file.read()), weights_only=True)
            check_glance(kept)
        return kept


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor):
        value = value.detach()
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name} must be one number, got {value!r}") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other monitors out, whose steps would mix into one curve, for as long as this process lives.

    File systems without locks, and Windows, keep none out.
    """
    with (folder / LOCK).open("a") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"out must be a folder that no other Monitor writes to, got {folder}, to which one does now"
            raise ValueError(message) from error
        except OSError:
            pass
        process = os.getpid()
        try:
            yield
        finally:
            # Not by closing alone, since workers forked in the block hold the file too; nor by one of these.
            if fcntl is not None and os.getpid() == process:
                with suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_UN)


def _path(folder: Path, layer: str, step: int) -> Path:
    name = quote(layer, safe="")
    if len(name) > LONGEST:  # file systems take 255 bytes
        name = f"{name[: LONGEST - 33]}-{hashlib.blake2s(layer.encode(), digest_size=16).hexdigest()}"
    return folder / STEPS / f"{name}-{step}.pt.gz"


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    buffer = io.BytesIO()
    torch.save(dict(tensors), buffer)
    with replacing(path) as part, gzip.open(part, "wb", compresslevel=1) as file:
        file.write(buffer.getvalue())


def _shapes(run: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: layer["shape"] for name, layer in run["layers"].items()}


def _cut_after_last_line(path: Path) -> int:
    """Take away a last line that a crash has cut short, as what follows would be written behind it; the bytes left."""
    with path.open("rb+") as file:
        return file.truncate(file.read().rfind(b"\n") + 1)


def _checked_shape(shape: Any) -> Shape | None:
    if shape is None:
        return None
    if not isinstance(shape, (tuple, list)) or len(shape) not in (2, 3):
        raise TypeError(f"image_shape must be (height, width), (channels, height, width) or None, got {shape!r}")
    channels, height, width = (check_number("image_shape", size, low=1, integer=True) for size in (1, *shape)[-3:])
    if channels not in (1, 3):
        raise ValueError(f"image_shape must have 1 or 3 channels, got {shape!r}")
    return int(channels), int(height), int(width)
