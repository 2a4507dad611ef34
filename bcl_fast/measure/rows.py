"""Rows: what every measurement is written down as."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from .implementations import Size

Row = dict[str, Any]
OK, OUT_OF_MEMORY, TIMED_OUT = "ok", "out of memory", "time-out"
RECORDED = {"neighbors": "neighbours"}  # records keep the first spelling of a stage and of the question about it
SPELLED = ("question", "stage", "difference")


def row(question: str, implementation: str, size: Size, **values: Any) -> Row:
    """A row with every key that all rows have, in one order; a key that does not apply is None.

    `values` may hold further keys, such as the `rounds` of a ratio. Times are milliseconds, memory is MB (2^20 bytes).
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
    """A row of a record in the spelling of today."""
    for new, old in RECORDED.items():
        row = row | {key: row[key].replace(old, new) for key in SPELLED if isinstance(row.get(key), str)}
    return row


def absent(question: str, size: Size, reasons: dict[str, str], **values: Any) -> list[Row]:
    """A row for every implementation that has a reason not to take part."""
    return [row(question, name, size, status=why, **values) for name, why in reasons.items()]
