"""Rows: what every measurement is written down as, and two records of them side by side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch

from .implementations import Size

Row = dict[str, Any]
OK, OUT_OF_MEMORY, TIMED_OUT = "ok", "out of memory", "time-out"
# What a row is about; further keys of a question (its stage, say) come after the keys that all rows have.
ABOUT = ("question", "device", "contestant", "stage", "B", "D", "N", "weights", "threads")
RATIOS = ("ratio_to_linear", "ratio_to_reference")
RECORDED = {"neighbors": "neighbours"}  # records keep the first spelling of a stage and of the question about it
WORSE = 1.1  # times its old ratio: what lies within is noise


def row(question: str, implementation: str, size: Size, **values: Any) -> Row:
    """A row with every key that all rows have, in one order; a key that does not apply is None.

    `values` may hold further keys. Times are milliseconds, memory is MB (2^20 bytes).
    """
    common = {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "contestant": implementation,
        "question": question,
        **asdict(size),
        "weights": "init",  # init, trained
        "ms": None,
        "ratio_to_linear": None,
        "peak_mb": None,
        "status": OK,
    }
    return {
        key: RECORDED.get(value, value) if key in ("question", "stage") else value
        for key, value in (common | values).items()
    }


def spelled(row: Row) -> Row:
    """A row of a record, its stage and its question under their names of today."""
    today = {old: new for new, old in RECORDED.items()}
    return row | {key: today.get(row[key], row[key]) for key in ("question", "stage") if key in row}


def absent(question: str, size: Size, reasons: dict[str, str], **values: Any) -> list[Row]:
    """A row for every implementation that has a reason not to take part."""
    return [row(question, name, size, status=why, **values) for name, why in reasons.items()]


def ratios(rows: Iterable[Row]) -> dict[tuple[tuple[Any, ...], str], float | None]:
    """What rows are about and the name of a ratio -> that ratio; None where it was not measured."""
    found = {
        (tuple(row.get(key) for key in ABOUT), ratio): row.get(ratio)
        for row in rows
        for ratio in RATIOS
        if row.get(ratio) is not None or row.get("status", OK) != OK
    }
    return {key: None if value is None else value + 0.0 for key, value in found.items()}


def compare(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """The ratios of two records' rows, side by side, where both have them; `worse` by more than WORSE.

    A ratio that the new record has lost (out of memory, time-out) is None there, and worse. Raises ValueError where the
    records have no ratio in common.
    """
    before, after = ratios(old), ratios(new)
    common = [key for key in after if before.get(key) is not None]
    if not common:
        raise ValueError(f"the records must have rows in common (the same {', '.join(ABOUT)}), got none")
    found = []
    for about, ratio in common:
        was, now = before[about, ratio], after[about, ratio]
        sides = {"ratio": ratio, "old": was, "new": now, "worse": now is None or now > WORSE * was}
        found.append(dict(zip(ABOUT, about, strict=True)) | sides)
    return found
