"""Write bench/results/replication.md from bench/results/tables.json: `python bench/replication.py`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bcl_fast.experiments import layout
from bcl_fast.experiments.formats import as_text, spread
from bcl_fast.experiments.judging import MARKS, REASONS, outside_of_ranges
from bcl_fast.experiments.settings import LONG_SEEDS, SETTINGS, jobs_of
from bcl_fast.experiments.tables import DOCUMENT_TABLES, OUTCOMES
from bcl_fast.records import read_record, replacing, trusting

RESULTS = Path(__file__).resolve().parent / "results"
RECORD, PAGE = RESULTS / "tables.json", RESULTS / "replication.md"
REMEDY = "it is what `python -m bcl_fast table all fixes` writes"

SUMMARY = """\
# Replication

Written by `python bench/replication.py` from [`tables.json`](tables.json).

    {command}

trained every condition of the research document and of its untested fixes: {runs} runs, {seeds} seeds of a condition,
{long_seeds} where it trains for 10,000 steps ({devices}, torch {torch}). Interrupted, the same command goes on.
`python -m bcl_fast report runs/tables` makes one page of all runs, with win rates, forces, weights and reconstructions.

![Loss, similarities and encoder weights of 300 steps on MNIST, with BCL and plain](train-mnist.png)

`python -m bcl_fast train --data mnist --data-dir data --preset decoupled --som-lr 0.001 --steps 300` (seed 0; record:
[`train-mnist.json`](train-mnist.json)). The loss falls as fast as without BCL, every feature fires, and the features
become alike: the collapse that the presets are steps against.

## What replicates

A published number is inside where it lies within the range of our seeds, or within that of an independent
implementation. Of {published} published numbers {inside} are inside, {outside} outside, {not comparable} not
comparable.
"""

MISSES = """\
Each preset is held to the ranges of the independent implementation by `tests/test_ranges.py`. Of our {count} medians
that have a range, {missed} lie outside of it{by}:
"""

DOCUMENT = """\
## The document's tables

In each cell the published number, **bold** where it is outside, and below it the median and range of our seeds.
"""

FIXES = """\
## What the fixes do

After 10,000 steps on MNIST; `(0.001)` and `(0.01)` are som_lr.

- **BCL loses to the plain network**: held-out L1 {decoupled (0.001)|L1} at som_lr 0.001 and {decoupled (0.01)|L1} at
  0.01, {plain|L1} without BCL; the stronger the pull, the more (A). Trained on MSE the gap is wider,
  {decoupled (0.001), MSE|L1} against {plain, MSE|L1}, and no fix that was tried there closes it.
- **The pull makes features alike, not the gradient.** A plain network ends at wt_sim {plain|wt_sim}, the mask alone at
  {mask only|wt_sim}; with the pull it is {decoupled (0.001)|wt_sim}. The mask alone costs L1 too ({mask only|L1}).
- **Centering the inputs helps most**, with BCL ({centred inputs (0.001)|L1}) and far more without
  ({plain, centred inputs|L1}): features converge to the positive mean that all images share.
- **Orthogonal and centered targets (4) are the best of the proposed fixes**, and the only ones that beat the plain
  network on raw inputs. At som_lr 0.01 orthogonal targets tie with it in L1 ({4 orthogonal targets (0.01)|L1}) and win
  in MSE ({4 orthogonal targets (0.01)|MSE} against {plain|MSE}); centered targets without the mask win in both
  ({4 centred targets, no mask (0.01)|L1}, {4 centred targets, no mask (0.01)|MSE}). None comes near a plain network on
  centered inputs. wt_sim falls to about 0, but wt_abscos does not: the features are parallel up to sign.
- **A pull onset (5) helps a little** ({5 pull_onset 0.005 (0.001)|L1}). Raw cosine (1), contrastive targets (3), a
  rescue onset (5) and the offset space (B) change next to nothing.
- **Diversity losses (C) do not help the plain network** ({plain, entropy, lambda 1.0|L1} at best): fewer of its
  features fire. With BCL entropy helps a little ({C entropy, lambda 1.0 (0.001)|L1}); weight similarity brings wt_sim
  to what it asks for ({C weight similarity, lambda 1.0 (0.001)|wt_sim}), and fewer features fire
  ({C weight similarity, lambda 1.0 (0.001)|firing}).
- **Winner-take-all (D) hurts most**: with the pull the effective rank falls to {D winner-take-all (0.001)|eff. rank}.
- What BCL does keep is firing: all {decoupled (0.001)|firing} features fire, of the plain network {plain|firing}.
  Redrawing dead features does that too, at no cost ({plain, dead redrawn|L1}).

![Every fix and control: held-out errors, similarity, effective rank, firing features](tables-fixes.png)
"""


def markdown(headings: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    rows = ([cell.replace("|", r"\|") for cell in row] for row in (headings, ["---"] * len(headings), *lines))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def laid_out(table: layout.Layout) -> str:
    """A table of `layout` in Markdown."""
    return markdown(table["headings"], [[_cell(cell) for cell in row] for row in table["rows"]])


def _cell(cell: Mapping[str, str]) -> str:
    text = f"**{cell['text']}**" if cell.get("mark") == "outside" else cell["text"]
    note = f"<sup>{cell['note']}</sup>" if cell.get("note") else ""
    return text + note + (f"<br>{cell['small']}" if cell.get("small") else "")


def summary(record: Mapping[str, Any]) -> Iterator[str]:
    """What was run, and how many numbers of each table replicate."""
    rows, environment = record["rows"], record["environment"]
    runs = {job for name in {row["condition"] for row in rows} for job in jobs_of(name, **record["options"])}
    printed = [row for row in rows if row["printed"]]
    counts = {mark: sum(row["mark"] == mark for row in printed) for mark in MARKS}
    yield SUMMARY.format_map(
        {
            "command": record["command"],
            "runs": len(runs),
            "seeds": record["options"]["seeds"],
            "long_seeds": LONG_SEEDS,
            "published": len(printed),
            "devices": ", ".join(environment["devices"].values()),
            "torch": environment["torch"],
            **counts,
        }
    )
    lines = []
    for name in DOCUMENT_TABLES:
        own = [row for row in printed if row["table"] == name]
        why = dict.fromkeys(row["reason"] for row in own if row["reason"])
        marks = [row["mark"] for row in own]
        lines.append([f"[`{name}`](#{name})", *(str(marks.count(mark)) for mark in MARKS), ", ".join(why)])
    yield markdown(["table", *MARKS, "why"], lines)
    missed, count = outside_of_ranges(rows)
    near = all(2 * low - high < row["median"] < 2 * high - low for row in missed for low, high in [row["range"]])
    yield MISSES.format(count=count, missed=len(missed), by=", each by less than its width" if near else "")
    yield laid_out(layout.misses(missed))


def reasons(rows: layout.Rows) -> Iterator[str]:
    """Every reason that a table gives, with the measurements that show it."""
    yield "## Why numbers do not replicate\n"
    shown = [row for row in rows if row["table"] == "explanations"]
    given = (row["reason"] for row in layout.different(rows))
    for reason in dict.fromkeys([*given, *(row["row"] for row in shown)]):
        yield f"### {reason}\n\n{REASONS[reason]}\n"
        table = layout.evidence(shown, reason)
        if table["rows"]:
            yield laid_out(table)


def document(rows: layout.Rows) -> Iterator[str]:
    """The document's tables, each number with ours."""
    yield DOCUMENT
    for name, table in DOCUMENT_TABLES.items():
        found = layout.pivot(name, [row for row in rows if row["table"] == name], "median")
        yield f"### {name}\n\n{table.title}.\n"
        yield laid_out(found)
        legend = (f"<sup>{note}</sup> [{reason}](#{reason})" for reason, note in found["notes"].items())
        if found["notes"]:
            yield ", ".join(legend) + "\n"


def fixes(rows: layout.Rows) -> Iterator[str]:
    """What came out of the fixes, in words and as a table for each loss that was trained on."""
    cells = {(row["row"], row["column"]): row for row in rows if row["table"] == "fixes"}
    yield re.sub(r"\{(.+?)\|(.+?)\}", lambda found: _mean(cells[found[1], found[2]]), FIXES)
    for loss, heading in (("l1", "L1"), ("mse", "MSE")):
        names = {name for name, _ in cells if SETTINGS[name].get("loss", "l1") == loss}
        yield f"### Trained on {heading}\n\nMean and range of seeds, sorted by {heading}.\n"
        lines = []
        for name in sorted(names, key=lambda name: (cells[name, heading]["mean"], name)):
            found = (cells.get((name, outcome)) for outcome in OUTCOMES)
            lines.append([name, *(f"{_mean(row)}<br>{spread(row)}" if row else "" for row in found)])
        yield markdown(["condition", *OUTCOMES], lines)


def _mean(row: Mapping[str, Any]) -> str:
    return as_text(row["mean"], row["metric"])


def page(record: Mapping[str, Any]) -> str:
    """The page that the record of all tables gives."""
    rows = record["rows"]
    return "\n".join([*summary(record), *reasons(rows), *document(rows), *fixes(rows)])


def main() -> None:
    record = read_record(RECORD, REMEDY)
    with trusting(RECORD, REMEDY), replacing(PAGE) as part:
        part.write_text(page(record), encoding="utf-8")
    print(f"Written: {PAGE}")


if __name__ == "__main__":
    main()
