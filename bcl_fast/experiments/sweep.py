"""A grid of conditions over som_lr and rescue_k, with a plain control: what to run, and a table of what came out."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..records import replacing, trusting
from ..spec import BCLConfig
from .jobs import AGAIN, path_of, read
from .run import Condition
from .tables import OUTCOMES

METRICS = tuple(OUTCOMES.values())


def sweep_conditions(
    preset: str, som_lrs: Sequence[float], rescue_ks: Sequence[int], seeds: int, **common: Any
) -> list[Condition]:
    """Every cell of the grid for seeds 0, 1, ..., and the control of each seed; `common` are fields of all of them."""
    cells = [BCLConfig.preset(preset, som_lr=som_lr, rescue_k=rescue_k) for som_lr in som_lrs for rescue_k in rescue_ks]
    conditions = [Condition(config=config, seed=seed, **common) for config in cells for seed in range(seeds)]
    return conditions + [Condition(config=None, seed=seed, **common).control() for seed in range(seeds)]


def sweep_rows(conditions: Iterable[Condition], folder: Path) -> list[dict[str, Any]]:
    """A row per finished condition: its place in the grid (None for a control), its seed, and its OUTCOMES."""
    rows = []
    for condition in conditions:
        record, config = read(condition, folder), condition.config
        if record is None:
            continue
        row: dict[str, Any] = {
            "som_lr": config and config.som_lr,
            "rescue_k": config and config.rescue_k,
            "seed": condition.seed,
            "steps": condition.steps,
        }
        with trusting(path_of(condition, folder), AGAIN):
            last = record["rows"][-1] | {f"held_out_{name}": number for name, number in record["held_out"].items()}
            row |= {metric: last[metric] for metric in METRICS}
        rows.append(row)
    return rows


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows of equal keys as CSV, completely or not at all; an empty field is None."""
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def median(values: Iterable[float | None]) -> float | None:
    """The median of what is known; None where nothing is, as of runs that diverged."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def numbers(name: str, text: str, kind: type = float) -> list[Any]:
    """A comma-separated list such as "0.001,0.01"; ValueError that names `name` where it is not one."""
    try:
        found = [kind(word) for word in text.split(",")]
        if not all(map(math.isfinite, found)):
            raise ValueError
    except ValueError:
        what = "integers" if kind is int else "numbers"
        raise ValueError(f"{name} must be {what} separated by commas, got {text!r}") from None
    return list(dict.fromkeys(found))
