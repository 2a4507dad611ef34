"""Scaling: time and memory of every implementation as one size grows, up to what memory and patience allow."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .alone import alone
from .floor import Ceilings
from .implementations import Size, why_not
from .rows import OK, Row, row

SIZES = {  # 64 to 65,536 features; 128 to 131,072 samples
    "D": tuple(4**i for i in range(3, 9)),
    "B": tuple(2 * 4**i for i in range(3, 9)),
}
FITTED = 3  # the largest sizes measured, which an exponent is fitted to


def scale(
    axis: str,
    sizes: Sequence[int],
    fixed: Size,
    names: Sequence[str],
    roof: Ceilings,
    threads: int,
    device: str = "cpu",
    limit: float = 300.0,
) -> Iterator[Row]:
    """A row for every size along `axis` ("D" or "B", the others as in `fixed`) and implementation, as it is measured.

    Each is measured in processes of its own, of at most `limit` seconds. Out of memory, time-outs and whatever else
    ends a process are rows; larger sizes are then not tried.
    """
    ended: dict[str, str] = {}
    for value in sorted(sizes):
        size = dataclasses.replace(fixed, **{axis: value})
        labels = {"device": device, "threads": threads, "floor_ms": roof.step_ms(size)}
        for name in names:
            reason = why_not(name, device) or ended.get(name)
            found: dict[str, Any] = {"status": reason}
            if reason is None:
                for what in ("time", "memory") if device == "cuda" or sys.platform == "linux" else ("time",):
                    if found["status"] in (None, OK):
                        found |= alone(what, name, size, threads, device, limit)
                if found["status"] != OK:
                    ended[name] = f"not tried: {found['status']} at {axis} = {value:,}"
            yield row(f"scale-{axis.lower()}", name, size, **labels | found)


def exponents(rows: Iterable[Row], axis: str) -> dict[str, dict[str, float]]:
    """Contestant -> p of `ms` and of `peak_mb` where they grow as size ** p, fitted to its FITTED largest sizes."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(one["contestant"] for one in rows):
        for measured in ("ms", "peak_mb"):
            points = [(one[axis], one[measured]) for one in rows if one["contestant"] == name and one[measured]]
            if len(points) >= FITTED:
                found.setdefault(name, {})[measured] = _slope(sorted(points)[-FITTED:])
    return found


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the least-squares line through the logarithms."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    middle_x, middle_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - middle_x) * (y - middle_y) for x, y in logs) / sum((x - middle_x) ** 2 for x, _ in logs)
