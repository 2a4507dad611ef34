"""Where a right implementation lands on MNIST: ranges that an independent implementation of each variant measured.

`ranges.csv` has a line per variant, metric and 0-based forward pass. Ten seeds to step 300, five beyond; som_lr 0.001
unless the name says otherwise. A value from the same distribution falls outside a ten-seed range 18 % of the time (five
seeds: 33 %): the median over our seeds is judged, never one run. `random weights` with a seed have one value, known to
three decimals.
"""

from __future__ import annotations

import csv
from pathlib import Path

Ranges = dict[str, dict[int, tuple[float, float]]]  # metric -> index -> least, largest


def _ranges() -> dict[str, Ranges]:
    found: dict[str, Ranges] = {}
    with Path(__file__).with_name("ranges.csv").open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            spans = found.setdefault(line["variant"], {}).setdefault(line["metric"], {})
            spans[int(line["index"])] = float(line["least"]), float(line["largest"])
    return found


RANGES = _ranges()


def variant_of(condition: str) -> str:
    """Which entry of RANGES a condition belongs to."""
    return "decoupled" if condition == "decoupled (0.001)" else condition
