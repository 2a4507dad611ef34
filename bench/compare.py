"""The ratios of two records of a bench side by side: `python bench/compare.py OLD NEW`.

Exits with 1 where a ratio is worse by more than 10 %, with --either also where one is better by more than that: two
runs of the same code should agree.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bcl_fast.measure.rows import OK, Row
from bcl_fast.records import read_record, trusting

# What a row is about; further keys of a question come after the keys that all rows have.
ABOUT = ("question", "device", "contestant", "stage", "B", "D", "N", "weights", "threads")
RATIOS = ("ratio_to_linear", "ratio_to_reference")
WORSE = 1.1  # times its old ratio: what lies within is noise
REMEDY = "name the record of a bench"


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
    """The ratios of two records' rows, side by side, where both have them; `worse` or `better` by more than WORSE.

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
        verdict = "worse" if now is None or now > WORSE * was else "better" if was > WORSE * now else ""
        sides = {"ratio": ratio, "old": was, "new": now, "verdict": verdict}
        found.append(dict(zip(ABOUT, about, strict=True)) | sides)
    return found


def text(value: Any) -> str:
    """A cell."""
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells in columns of one width."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs=2, metavar=("OLD", "NEW"))
    parser.add_argument("--either", action="store_true", help="better by more than 10 % is an error too")
    options = parser.parse_args()
    records = []
    try:
        for path in options.records:
            record = read_record(path, REMEDY)
            with trusting(path, REMEDY):
                ratios(record["rows"])
                machine = ", ".join(record["environment"]["devices"].values())
                print(f"{path}: {machine}, torch {record['environment']['torch']}")
            records.append(record["rows"])
        found = compare(*records)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    names = (*ABOUT, "ratio", "old", "new", "verdict")
    lines = [[text(row[name]) for name in names] for row in found]
    print("\n".join(aligned([names, *lines])))
    told = {row["verdict"] for row in found}
    return int("worse" in told or options.either and "better" in told)


if __name__ == "__main__":
    sys.exit(main())
