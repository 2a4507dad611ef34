"""Every table of the research document, and our own: which number it prints, and which of our measurements that is.

`tables.csv` has a line per cell. The document's clamp tables call forward pass N "step N" and show the weights after
its update (`wt_sim_post`); its rank and decoupled tables call pass N - 1 "step N" and show the weights before it. The
column `index` is always the 0-based forward pass, or `end`.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

from .settings import FIXES

END = -1  # the last row of a run, or its state in the end


class Cell(NamedTuple):
    """One number of a table: what the document prints, and which measurement of ours is compared with it."""

    row: str
    column: str
    condition: str  # a name of SETTINGS
    index: int  # of the forward pass, or END
    metric: str  # a key of a record's rows, of DERIVED, or held_out_ and a key of its `held_out`
    published: str | None = None  # as printed: its last digit tells how exact it is
    reason: str | None = None  # a key of REASONS: why it does not replicate, or why it cannot be compared


class Table(NamedTuple):
    """A table of the document, or one of our own."""

    title: str
    cells: tuple[Cell, ...]
    heading: str = "step"  # what its rows are


TITLES = {  # of the document's tables, in its order
    "trace": "Step-by-step trace of the first 30 steps (soft clamp)",
    "trajectory": "Extended trajectory (soft clamp)",
    "conditions": "Cross-condition comparison of aff_sim: som_lr 1e-4 (micro), 3e-4 (tiny), 1e-3 (slow)",
    "crossings": "The first step at which a similarity reaches a threshold (30: not within the first 30 steps)",
    "clamp": "Affinity columns of random weights with and without the clamp, and the fraction clamped",
    "images": "Image statistics: pairwise cosine in a batch, and the clamped affinity of uniform noise",
    "need": "The flatness of image_need (soft clamp)",
    "top-k": "What top-8 does to column similarity (soft clamp)",
    "hard-top1": "Fix attempt 1, hard top-1 (clamp): old is soft top-8",
    "rank": "Fix attempt 2, rank affinity and hard top-1",
    "rank-vs-clamp": "Rank against clamp at step 300",
    "forces-coupled": "Finding 6, the forces before decoupling (rank, hard top-1): norms per feature",
    "blend": "Finding 6, the blend weights (rank, hard top-1)",
    "forces-decoupled": "Fix attempt 3, decoupled forces: the move by Adam over the pull, per step",
    "ten-thousand": "The 10,000-step trajectory (decoupled, rescue_k 5)",
    "rescue-k": "rescue_k at 300 steps (decoupled)",
    "novelty": "The range of feature_novelty over features (decoupled)",
    "baselines": "Raw data: clamped affinity of random weights by seed, and random rank columns by cosine and by "
    "Pearson",
}
HEADINGS = {  # what the rows are, where they are not steps
    "crossings": "threshold",
    "clamp": "affinity",
    "images": "cosine",
    "rank-vs-clamp": "metric",
    "rescue-k": "rescue_k",
    "baselines": "weights",
}


def _cells() -> dict[str, tuple[Cell, ...]]:
    """The cells of `tables.csv` by table; an empty field is None."""
    found: dict[str, list[Cell]] = {}
    with Path(__file__).with_name("tables.csv").open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            name, index = line.pop("table"), line.pop("index")
            fields = {key: text or None for key, text in line.items()}
            found.setdefault(name, []).append(Cell(index=END if index == "end" else int(index), **fields))
    return {name: tuple(cells) for name, cells in found.items()}


CELLS = _cells()
DOCUMENT_TABLES = {name: Table(title, CELLS[name], HEADINGS.get(name, "step")) for name, title in TITLES.items()}
EXPLANATIONS = Table("What shows the reasons", CELLS["explanations"], "reason")  # its rows are keys of REASONS

OUTCOMES = {  # heading -> metric; at the end of the run, or of its last step
    "L1": "held_out_l1",
    "MSE": "held_out_mse",
    "wt_sim": "wt_sim",
    "wt_abscos": "wt_abscos",
    "eff. rank": "effective_rank",
    "tgt_sim": "tgt_sim",
    "unique_tgt": "unique_tgt",
    "alive": "alive",
    "firing": "held_out_firing_features",
}
FIXES_TABLE = Table(
    "Fixes and controls at the end of training: held-out L1 and MSE, and what the features look like",
    tuple(
        Cell(name, heading, name, END, metric)
        for group in FIXES.values()
        for name in group
        for heading, metric in OUTCOMES.items()
        if name != "PCA" or metric in ("held_out_l1", "held_out_mse")  # what it has
    ),
    heading="condition",
)
TABLES = DOCUMENT_TABLES | {"explanations": EXPLANATIONS, "fixes": FIXES_TABLE}
ALL = tuple(name for name in TABLES if name != "fixes")  # what `table all` is


def conditions_of(name: str) -> list[str]:
    """The conditions that one of TABLES needs."""
    return list(dict.fromkeys(cell.condition for cell in TABLES[name].cells))
