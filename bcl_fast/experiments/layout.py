"""What pages are made of: blocks, and the rows of a tables record as headings and cells; pages decide how they look."""

from __future__ import annotations

from typing import Any

from .formats import as_text, spread
from .judging import REASONS, UNMEASURED
from .tables import TABLES

Block = dict[str, Any]  # `title` and `lines`, and a `figure`, a `table` (a Layout) or an `inspector` (its data)
Rows = list[dict[str, Any]]
Cell = dict[str, str]  # `text`; where there is more to say `small`, `mark`, `note` (a number) and `reason`
Layout = dict[str, Any]  # `headings`: texts; `rows`: lists of Cell; of `pivot` also `notes`: reason -> its number


def picture(title: str, figure: Any, *lines: str) -> Block:
    """A block that is a picture, a matplotlib Figure."""
    return {"title": title, "figure": figure, "lines": lines}


def text(value: str, mark: str = "") -> Cell:
    """A cell with nothing but a text, or that and a mark."""
    return {"text": value, "mark": mark}


def ours(row: dict[str, Any], center: str = "median") -> str:
    """What was measured, with its range over seeds."""
    return f"{as_text(row[center], row['metric'])} ({spread(row)})" if row[center] is not None else "not measured"


def pivot(name: str, rows: Rows, center: str) -> Layout:
    """The rows of one of TABLES as the document lays them out: what is published, and below it what was measured."""
    columns = list(dict.fromkeys(row["column"] for row in rows))
    reasons = dict.fromkeys(row["reason"] for row in rows if row["printed"] and row["reason"])
    notes = {reason: str(i) for i, reason in enumerate(reasons, 1)}
    body = []
    for label in dict.fromkeys(row["row"] for row in rows):
        of = {row["column"]: row for row in rows if row["row"] == label}
        cells = (_cell(of[column], center, notes) if column in of else text("") for column in columns)
        body.append([text(label), *cells])
    return {"headings": [TABLES[name].heading, *columns], "rows": body, "notes": notes}


def _cell(row: dict[str, Any], center: str, notes: dict[str, str]) -> Cell:
    if not row["printed"]:
        return {"text": as_text(row[center], row["metric"]), "small": spread(row)}
    about = {"note": notes.get(row["reason"], ""), "reason": REASONS.get(row["reason"], "")}
    return {"text": row["printed"], "small": ours(row, center), "mark": row["mark"], **about}


def different(rows: Rows) -> Rows:
    """The published cells that were measured and do not replicate, or cannot be compared."""
    return [row for row in rows if row["printed"] and row["reason"] and row["reason"] not in UNMEASURED]


def differences(rows: Rows) -> Layout:
    """Published cells one by one, each with our number and a reason."""
    body = []
    for row in rows:
        cell = f"{row['column']}, {row['row']}"
        published, reason = text(row["printed"], row["mark"]), text(row["reason"])
        body.append([text(row["table"]), text(cell), published, text(ours(row)), reason])
    return {"headings": ["table", "cell", "published", "ours", "why"], "rows": body}


def misses(rows: Rows) -> Layout:
    """The rows of `judging.outside_of_ranges`: our medians, and the ranges they are not in."""
    body = []
    for row in rows:
        low, high = (as_text(value, row["metric"]) for value in row["range"])
        texts = f"{row['condition']}, {row['metric']} at {row['index']}", as_text(row["median"], row["metric"])
        body.append([*map(text, texts), text(f"{low}..{high}")])
    return {"headings": ["measurement", "median", "range"], "rows": body}


def evidence(rows: Rows, reason: str) -> Layout:
    """The measurements that show a reason, of the rows of the table of explanations."""
    own = (row for row in rows if row["row"] == reason)
    body = [[text(row["column"]), text(as_text(row["median"], row["metric"])), text(spread(row))] for row in own]
    return {"headings": ["measurement", "median", "min..max"], "rows": body}
