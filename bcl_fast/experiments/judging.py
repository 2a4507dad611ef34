"""How a cell of a table is measured and judged: whether a published number replicates, and why another does not."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from .formats import decimals
from .ranges import RANGES, variant_of
from .tables import END, TABLES, Cell

Record = Mapping[str, Any]
INSIDE, OUTSIDE, NOT_COMPARABLE = MARKS = ("inside", "outside", "not comparable")

# Why cells do not replicate; the table of explanations shows each reason by measurements.
REASONS = {
    "shared-mean": "A positive mean that columns share makes their cosine large; the Pearson correlation takes it out. "
    "On the same data the clamped columns correlate no more than the ranks do: .298 is the cosine once more.",
    "mixed": "The document sets a cosine (clamp) beside a Pearson correlation (rank). By one measure, Pearson, "
    "the two collapse alike.",
    "threshold": "Alive means win_rate > 0.01, as in the clamp tables. 64 comes out where any win rate above 0 counts, "
    "which a sigmoid makes nearly automatic.",
    "dense": "Targets as alike as .99 are those of dense rescue (rescue_k = 0), which came before top-8.",
    "sweet-spot": "The medians over seeds differ between rescue_k by less than seeds do within one; the document "
    "itself gives .803 and .857 for rescue_k = 5 at step 300.",
    "gradient": "Is the gradient what makes weights alike? A network without BCL, equal otherwise, decides.",
    "ticks-up": "A batch's loss is noisy. Its mean over the steps since the row before still falls after 5,000.",
    "force-ratio": "No reading of the two norms gives 7 to 108: neither the move by Adam nor the raw gradient, over "
    "the pull, per step.",
    "raw-gradient": "About 1e-5 is the raw gradient over the pull; Adam rescales the gradient.",
    "identity": "The sum of win_rate * novelty over features is 1 by its definition, so its mean is 1 / D = .016 "
    "whatever the features do: the 98.4 % of rescue carry no information.",
    "slower": "At steps 10 to 50 the document's run is slower than ours and than ten independent ones, counted from "
    "either index. No cause was found.",
    "adam-eps": "The coupled mask leaves gradients near Adam's eps (1e-8 per element), so what they do depends on eps "
    "and on the scale of the loss, which the document does not give; another eps gives another run.",
    "noisy": "A number of one batch: from step to step it changes by as much as it differs here.",
    "novelty-range": "The document's last row is the range over time of the mean over features (see the 10,000-step "
    "trajectory), not over features.",
    "wa-gap": "The document's bound is that of the steps it prints; ours is over every step measured up to 300.",
    "chance": "Outside by less than the width of our range: a single run of the document against a few of ours.",
    "unexplained": "No cause found.",
    "other data": "Published for MNIST, measured on other data.",
    "not reached": "Not measured: the runs were cut short.",
    "ours": "Not in the document.",
}
UNMEASURED = ("other data", "not reached")  # reasons that lie with what was asked for, not with the document
NEVER_COMPARABLE = {"mixed", "novelty-range"}  # reasons for which the two numbers are of different things

DERIVED: dict[str, Callable[[dict[int, Mapping[str, float]], int], float]] = {
    "delta_aff": lambda rows, i: rows[i]["aff_sim"] - rows[i - 1]["aff_sim"],
    "need_ratio": lambda rows, i: rows[i]["need_max"] / rows[i]["need_min"],
    "wa_gap": lambda rows, i: max(abs(row["wa_sim"] - row["aff_sim"]) for step, row in rows.items() if step <= i),
    "pull_over_gradient": lambda rows, i: rows[i]["pull"] / rows[i]["gradient"],
    "rescue_weight": lambda rows, i: 1 - rows[i]["effective_win"],
}


def value(record: Record, metric: str, index: int) -> float | None:
    """One metric of a record at an index; None where the run did not reach it or does not have it."""
    if metric.startswith("held_out_"):
        return record["held_out"].get(metric.removeprefix("held_out_")) if index == END else None
    rows = {row["step"]: row for row in record["rows"]}
    index = max(rows, default=END) if index == END else index
    if index not in rows:
        return None
    if metric == "effective_wins":
        return rows[index]["effective_win"] * record["condition"]["features"]
    if ">=" in metric:
        name, _, threshold = metric.partition(">=")
        return next((i for i in range(index + 1) if rows[i][name] >= float(threshold)), index + 1)
    return DERIVED[metric](rows, index) if metric in DERIVED else rows[index].get(metric)


def judge(published: str, low: float, high: float) -> str:
    """Whether what the document prints can be a rounded value of [low, high]: INSIDE or OUTSIDE."""
    number = Decimal(published)
    half = 0.5 * 10.0 ** number.as_tuple().exponent
    return INSIDE if low - half <= float(number) <= high + half else OUTSIDE


def measure_cell(cell: Cell, records: list[Record], mnist: bool = True) -> dict[str, Any]:
    """A cell's row of the results: our seeds' median, mean, min and max, what is published, and the verdicts.

    `mark` says whether the published number lies within our seeds' min..max, widened to `range`, where an independent
    implementation's is known; `reason` why not. `in_range` says whether our median lies in that range.
    """
    values = [v for v in (value(record, cell.metric, cell.index) for record in records) if v is not None]
    values = [v for v in values if not math.isnan(v)]
    span = RANGES.get(variant_of(cell.condition), {}).get(cell.metric, {}).get(cell.index) if mnist else None
    row: dict[str, Any] = {
        "row": cell.row,
        "column": cell.column,
        "condition": cell.condition,
        "index": records[0].get("steps_done", 0) - 1 if cell.index == END else cell.index,
        "metric": cell.metric,
        "published": None if cell.published is None else float(cell.published),
        "printed": cell.published,
        **dict.fromkeys(("median", "mean", "min", "max")),
        "mark": NOT_COMPARABLE,
        "reason": None,
        "range": span,
        "in_range": None,
    }
    if not values:
        return row | {"reason": "not reached"}
    low, high = min(values), max(values)
    median = statistics.median(values)
    row |= {"median": median, "mean": statistics.fmean(values), "min": low, "max": high}
    if span is not None:
        row["in_range"] = span[0] <= round(median, decimals(cell.metric)) <= span[1]
    if cell.published is None:
        return row | {"reason": "ours"}
    if not mnist:
        return row | {"reason": "other data"}
    if cell.reason in NEVER_COMPARABLE:
        return row | {"reason": cell.reason}
    low, high = (min(low, span[0]), max(high, span[1])) if span else (low, high)
    mark = judge(cell.published, low, high)
    if mark == INSIDE:
        return row | {"mark": mark}
    near = max(low - float(cell.published), float(cell.published) - high) < high - low
    return row | {"mark": mark, "reason": cell.reason or ("chance" if near else "unexplained")}


def measure_table(name: str, records: Mapping[str, Mapping[int, Record]], mnist: bool = True) -> list[dict[str, Any]]:
    """The rows of one of TABLES from the records of its conditions, given as condition -> seed -> record."""
    return [
        {"table": name, "seeds": list(records[cell.condition])}
        | measure_cell(cell, list(records[cell.condition].values()), mnist)
        for cell in TABLES[name].cells
    ]


def check(condition: str, record: Record) -> None:
    """Raise what measuring the cells of a condition raises where this is no record of it."""
    for cell in (cell for table in TABLES.values() for cell in table.cells):
        if cell.condition == condition:
            measure_cell(cell, [record])


def outside_of_ranges(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """The different measurements whose median lies outside its range, and how many have a range at all."""
    with_range = (row for row in rows if row["in_range"] is not None)
    ranged = {(variant_of(row["condition"]), row["metric"], row["index"], len(row["seeds"])): row for row in with_range}
    return [row for row in ranged.values() if not row["in_range"]], len(ranged)


def counts_of(rows: list[dict[str, Any]]) -> str:
    """How many of the published cells have which mark."""
    marks = [row["mark"] for row in rows if row["printed"]]
    return ", ".join(f"{marks.count(mark)} {mark}" for mark in dict.fromkeys(marks)) or "none"
