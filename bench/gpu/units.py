"""Units of a long check: each in a forked process of its own, within its time, its rows on disk as they come.

So that what ends one unit ends no other, and importing is paid for once. The parent must never ask for a GPU: what it
would set up for itself its children could not use.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bcl_fast.measure.rows import OK, Row

FAILED, TIMED_OUT, REFUSED, SKIPPED = "failed", "timeout", "refused", "skipped"
EXIT = {OK: 0, FAILED: 1, REFUSED: 3}  # how a child says which
MIN_SECONDS = 40.0  # seconds that every unit may take
PATIENCE = 3  # times what a unit is planned to take, before it is ended


class Refused(Exception):
    """What a tool says that does not work on this device: nobody's mistake."""


@dataclass(frozen=True)
class Unit:
    """A piece of work whose rows belong together."""

    part: str
    name: str
    seconds: float  # planned
    call: Callable[[], Iterable[Row]]

    @property
    def limit(self) -> float:
        return max(MIN_SECONDS, PATIENCE * self.seconds)


class Record:
    """A folder with check.jsonl, a row a line, and check.log, all that was printed.

    Every row has `part`, `unit`, `status` and `seconds`; the last one of a unit has `closing` too.
    """

    def __init__(self, folder: Path, resume: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.log = folder / "check.jsonl", folder / "check.log"
        if not resume:
            for path in (self.path, self.log):
                path.write_bytes(b"")

    def add(self, unit: Unit, status: str, seconds: float, **values: Any) -> None:
        row = {"part": unit.part, "unit": unit.name, "status": status, "seconds": round(seconds, 3)} | values
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def rows(self) -> list[Row]:
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def outcomes(self) -> dict[tuple[str, str], Row]:
        """Part and unit -> how it ended last."""
        return {(row["part"], row["unit"]): row for row in self.rows() if "closing" in row}


def run(unit: Unit, record: Record, left: float = math.inf) -> Row:
    """Run a unit in a child, end it and all its children after its limit, and say how it ended.

    If `left` is less it ends after that, and was skipped: it is not to blame.
    """
    limit = min(unit.limit, left)
    started = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child(unit, record, started)
    try:
        ended = _ended(pid, started + limit)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):  # interrupted before it led a group
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = next((status for status, known in EXIT.items() if known == code), FAILED)
    status = status if ended else SKIPPED if left < unit.limit else TIMED_OUT
    values: dict[str, Any] = {"closing": True}
    if ended and code not in EXIT.values():
        values["message"] = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
    if not ended:
        values["message"] = f"ended after {limit:.0f} s"
    record.add(unit, status, time.monotonic() - started, **values)
    return record.outcomes()[unit.part, unit.name]


def _ended(pid: int, until: float) -> bool:
    """Whether a child ends in time; it is not reaped, so that its group keeps its number."""
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def _child(unit: Unit, record: Record, started: float) -> None:
    """Run a unit, in a group of its own and with its output in the log; does not return."""
    code = EXIT[FAILED]
    try:
        os.setsid()
        log = os.open(record.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(log, 1)  # for whom it starts
        os.dup2(log, 2)
        sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)
        print(f"\n=== {unit.part}: {unit.name}", flush=True)
        code = _work(unit, record, started)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _work(unit: Unit, record: Record, started: float) -> int:
    status = OK
    try:
        for row in unit.call():
            values = {"status": OK, **row}
            status = FAILED if values["status"] == FAILED else status
            record.add(unit, values.pop("status"), time.monotonic() - started, **values)
    except Refused as refusal:
        status = REFUSED
        record.add(unit, status, time.monotonic() - started, message=str(refusal))
    except Exception as error:
        status = FAILED
        traceback.print_exc()
        record.add(unit, status, time.monotonic() - started, message=f"{type(error).__name__}: {error}"[:2000])
    return EXIT[status]


def run_all(
    units: Iterable[Unit], record: Record, until: float, done: Collection[tuple[str, str]] = (), say: Callable = print
) -> None:
    """Run those units that are not `done`, one after the other; what would not end by `until` is not begun."""
    for unit in units:
        if (unit.part, unit.name) in done:
            continue
        left = until - time.monotonic()
        if unit.seconds > left:
            record.add(unit, SKIPPED, 0, closing=True, message=f"takes {unit.seconds:.0f} s, {max(left, 0):.0f} s left")
            continue
        end = run(unit, record, left)
        say(f"{unit.part:10} {unit.name:40} {end['status']:8} {end['seconds']:6.1f} s {end.get('message', '')}")
