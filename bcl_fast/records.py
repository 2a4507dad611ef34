"""Records on disk: JSON files, written completely or not at all, and the errors that name a damaged one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class DamagedFile(ValueError):
    """A file that is not what it should be; the message is a line that names it and says what to do."""


@contextmanager
def trusting(path: Path | str, remedy: str) -> Iterator[None]:
    """Within this block the content of a file is used unchecked; any error becomes one that names the file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (DamagedFile, MemoryError)) or getattr(error, "filename", None) is not None:
            raise  # it names its file itself, or the file is not at fault
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise DamagedFile(f"{path} is damaged or of another kind ({what[:160]}): {remedy}") from error


def read_record(path: Path, remedy: str) -> dict[str, Any]:
    """What `write_record` wrote; `remedy` says what to do where there is something else."""
    with trusting(path, remedy):
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise TypeError(f"a record must be a JSON object, got a {type(record).__name__}")
        return record


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` only where the block ends without an error."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:  # often without a name, or with that of the part
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON, completely or not at all. See `plain`."""
    with replacing(path) as part:
        part.write_text(json.dumps(plain(record), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """The same value with null for NaN and Inf, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
