"""What all commands share: errors as one line, and where a record comes from."""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

from . import __version__
from .environment import environment
from .records import DamagedFile

DEMO = ("typer", "rich", "matplotlib", "sklearn", "torchvision", "tensorboard")  # packages of the extra [demo]


def fail(message: object) -> NoReturn:
    """End the program with a line that says what is wrong."""
    if isinstance(message, OSError) and message.filename is not None:
        message = f"cannot read or write {message.filename}: {message.strerror}"
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def demo_extra() -> Iterator[None]:
    """Within this block a missing package of the extra [demo] ends the program and says how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in DEMO:
            raise
        fail(f'{error.name} is not installed; the command line needs: pip install "bcl-fast[demo]"')


with demo_extra():
    import typer
    from typer.core import TyperGroup


class Commands(TyperGroup):
    """Commands that end with a line where a file is not what it should be, or cannot be read or written."""

    def invoke(self, context: typer.Context) -> Any:
        try:
            return super().invoke(context)
        except BrokenPipeError:
            raise  # whoever read the output has gone
        except (DamagedFile, OSError) as error:
            fail(error)


@contextmanager
def checked(out: Path | None = None) -> Iterator[None]:
    """Within this block options are read: what is wrong with one ends the program with a line; then `out` is made."""
    try:
        with demo_extra():
            yield
        if out is not None:
            output(out)
    except (TypeError, ValueError, OSError) as error:
        fail(error)


def output(folder: Path) -> None:
    """Make the folder --out; where nothing can be written there, the program ends before it computes anything."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fail(f"--out must be a folder to write to, got {folder}: {error.strerror}")


Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, ...")]


def command_line(context: typer.Context, **resolved: Any) -> str:
    """The command that repeats this run, with every option spelled out; `resolved` replace what was left to chance."""
    options = {**context.params, **resolved}
    flags = {option.name: option.opts[0] for option in context.command.params}
    command, groups = context, []
    while command.parent is not None:
        groups.insert(0, command.info_name or "")
        command = command.parent
    words = ["python", "-m", "bcl_fast", *groups, *options.pop("names", ())]
    for name, value in options.items():
        if value is True:
            words.append(flags[name])
        elif value is not None and value is not False:
            words += [flags[name], str(value)]
    return shlex.join(words)


def origin(context: typer.Context, start: float, threads: int | None = None, **resolved: Any) -> dict[str, Any]:
    """Where a record comes from: the command, the version, the machine, and how long it took.

    `threads` are those of the processes that computed, where they were not this one.
    """
    return {
        "command": command_line(context, **resolved),
        "bcl_fast": __version__,
        "environment": environment() | ({} if threads is None else {"threads": threads}),
        "seconds": time.perf_counter() - start,
    }
