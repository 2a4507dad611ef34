"""What the command line shows in a terminal: growing tables, progress, results. Lines without a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from . import layout
from .formats import as_text, spread
from .jobs import Job
from .judging import REASONS, counts_of, outside_of_ranges
from .sweep import median
from .tables import OUTCOMES, TABLES

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

PIPE_WIDTH = 250  # a file or a pipe has no width: tables there are never cut


def make_console() -> Console:
    """Standard output: a terminal, or a file or pipe without a width."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


def print_threads(console: Console, threads: int, workers: int | None = None) -> None:
    """On how many threads a command computes, and how to change that."""
    whose = "" if workers is None else f"{workers} process{'es' * (workers > 1)} of "
    console.print(f"On {whose}{threads} thread{'s' * (threads > 1)} (--threads).", highlight=False)


def print_written(console: Console, out: Path, names: str) -> None:
    """The last line of a command: what it has left where."""
    console.print(f"Written to {out}: {names}", soft_wrap=True, highlight=False)


COLUMNS = (  # heading, which training (0: BCL, 1: its control), key of the row, format
    ("step", 0, "step", "d"),
    ("loss", 0, "loss", ".4f"),
    ("plain\nloss", 1, "loss", ".4f"),
    ("wt_sim", 0, "wt_sim", ".3f"),
    ("plain\nwt_sim", 1, "wt_sim", ".3f"),
    ("aff_corr", 0, "aff_corr", ".3f"),
    ("tgt_sim", 0, "tgt_sim", ".3f"),
    ("unique\ntgt", 0, "unique_tgt", ".0f"),
    ("alive", 0, "alive", ".0f"),
    ("novelty", 0, "novelty", ".3f"),
    ("force\nratio", 0, "adam_over_pull", ".2f"),
)
LEGEND = "plain: the same network without BCL; force ratio: move by Adam / by the pull"


class TrainingTable:
    """The table of measured steps, growing while it is entered: live on a terminal, a line per row elsewhere."""

    def __init__(self, console: Console, steps: int) -> None:
        self.console = console
        self.cells: list[list[str]] = []
        self.finished = False
        bar = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.progress = Progress(*bar, console=console)
        self.task = self.progress.add_task("training", total=steps)
        self.live = Live(get_renderable=self.view, console=console) if console.is_terminal else None

    def __enter__(self) -> TrainingTable:
        if self.live is None:
            self.print_line([heading.replace("\n", "_") for heading, *_ in COLUMNS])
        else:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.finished = True
        if self.live is not None:
            self.live.stop()

    def on_step(self, rows: list[dict[str, float] | None]) -> None:
        """Take the rows of one step, BCL's and its control's; None where the step was not measured."""
        self.progress.advance(self.task)
        if rows[0] is not None:
            self.cells.append([format(rows[which][key], form) for _, which, key, form in COLUMNS])
            if self.live is None:
                self.print_line(self.cells[-1])

    def print_line(self, cells: list[str]) -> None:
        line = " ".join(cell.rjust(len(heading)) for cell, (heading, *_) in zip(cells, COLUMNS, strict=True))
        self.console.print(line, highlight=False, soft_wrap=True)

    def view(self) -> Group:
        """The last rows that the terminal has room for; in the end all of them."""
        shown = len(self.cells) if self.finished else max(1, self.console.height - 7)
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, caption=LEGEND, header_style="bold")
        for heading, *_ in COLUMNS:
            table.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
        for cells in self.cells[-shown:]:
            table.add_row(*cells)
        return Group(table, self.progress)


def print_outcome(console: Console, record: dict[str, Any]) -> None:
    """What came out at the end of each training, on images that were not trained on."""
    table = Table("", title="Held-out images", title_justify="left")
    for heading in ("steps", "L1", "MSE", "features that fire"):
        table.add_column(heading, justify="right")
    for name, run in record["conditions"].items():
        outcome = run["held_out"]
        fires = f"{outcome['firing_features']} of {run['condition']['features']}"
        table.add_row(name, str(run["steps_done"]), f"{outcome['l1']:.4f}", f"{outcome['mse']:.4f}", fires)
    console.print(table)
    console.print(f"{'Interrupted after' if record['interrupted'] else 'Trained in'} {record['seconds']:.1f} s")


# --- Many runs --------------------------------------------------------------------------------------------------------


class _Bar:
    """A bar that shows on a terminal while it is entered."""

    def __init__(self, console: Console, *columns: ProgressColumn, total: int, **fields: int) -> None:
        self.console = console
        self.bar = Progress(*columns, console=console)
        self.task = self.bar.add_task("", total=total, **fields)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()


class JobsProgress(_Bar):
    """A bar over all steps of many jobs on a terminal, a line every tenth elsewhere."""

    def __init__(self, console: Console, jobs: list[Job]) -> None:
        self.count, self.done, self.told = len(jobs), 0, 0
        columns = TextColumn("{task.fields[done]} of {task.fields[count]} runs"), BarColumn(), TimeElapsedColumn()
        left = TextColumn("left:"), TimeRemainingColumn()
        super().__init__(console, *columns, *left, total=sum(job.steps for job in jobs), done=0, count=self.count)

    def on_done(self, job: Job) -> None:
        self.done += 1
        self.bar.update(self.task, advance=job.steps, done=self.done)
        if not self.console.is_terminal and 10 * self.done // self.count > self.told:
            self.told = 10 * self.done // self.count
            self.console.print(f"{self.done} of {self.count} runs", highlight=False)


def print_cells(console: Console, name: str, rows: list[dict[str, Any]]) -> None:
    """A table of the document, a line per cell: published, ours, and whether they agree."""
    table = Table(title=f"{name}: {TABLES[name].title}", title_justify="left", box=None, header_style="bold")
    for heading in ("", TABLES[name].heading):
        table.add_column(heading)
    for heading in ("published", "median", "min..max"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("mark", no_wrap=True)
    table.add_column("reason", no_wrap=True)
    if name != "explanations":  # column by column, steps in order
        columns = list(dict.fromkeys(row["column"] for row in rows))
        rows = sorted(rows, key=lambda row: columns.index(row["column"]))
    for row in rows:
        ours = as_text(row["median"], row["metric"]), spread(row)
        table.add_row(row["column"], row["row"], row["printed"] or "", *ours, row["mark"], row["reason"] or "")
    console.print(table, highlight=False)
    console.print()


def print_outcomes(console: Console, name: str, rows: list[dict[str, Any]]) -> None:
    """A table of our own, a line per condition: mean and range over seeds of each outcome."""
    headings = list(dict.fromkeys(row["column"] for row in rows))
    table = Table("condition", title=TABLES[name].title, title_justify="left", box=None, header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for condition in dict.fromkeys(row["row"] for row in rows):
        cells = {row["column"]: row for row in rows if row["row"] == condition}
        texts = []
        for heading in headings:
            row = cells.get(heading)
            measured = row is not None and row["mean"] is not None
            texts.append(f"{as_text(row['mean'], row['metric'])} ({spread(row)})" if measured else "")
        table.add_row(condition, *texts)
    console.print(table, highlight=False)
    console.print()


def print_sweep(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """The grid of a sweep, a line per cell: the median over seeds of each outcome."""
    table = Table("som_lr", "rescue_k", title=title, title_justify="left", box=None, header_style="bold")
    for heading in OUTCOMES:
        table.add_column(heading, justify="right", no_wrap=True)
    for som_lr, rescue_k in dict.fromkeys((row["som_lr"], row["rescue_k"]) for row in rows):
        cell = [row for row in rows if (row["som_lr"], row["rescue_k"]) == (som_lr, rescue_k)]
        place = ("plain", "") if som_lr is None else (f"{som_lr:g}", str(rescue_k))
        medians = (as_text(median(row[metric] for row in cell), metric) for metric in OUTCOMES.values())
        table.add_row(*place, *medians)
    console.print(table, highlight=False)
    console.print()


def print_verdicts(console: Console, rows: list[dict[str, Any]]) -> None:
    """How many cells replicate, why the others do not, and which of our medians miss the independent ranges."""
    console.print(f"Published cells: {counts_of(rows)}", highlight=False)
    for reason in dict.fromkeys(row["reason"] for row in rows if row["printed"] and row["reason"]):
        console.print(f"  {reason}: {REASONS[reason]}", highlight=False, soft_wrap=True)
    outside, count = outside_of_ranges(rows)
    console.print(
        f"Medians outside the range of an independent implementation: {len(outside)} of {count}", highlight=False
    )
    for cells in layout.misses(outside)["rows"]:
        measurement, ours, span = (cell["text"] for cell in cells)
        console.print(f"  {measurement}: {ours}, not in {span}", highlight=False, soft_wrap=True)


# --- Scaling runs -----------------------------------------------------------------------------------------------------


class ScalingTable(_Bar):
    """Rows of a scaling run as they are measured, a line each, above a bar on a terminal."""

    def __init__(self, console: Console, axis: str, count: int) -> None:
        self.axis = axis
        columns = TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        super().__init__(console, *columns, total=count)

    def __enter__(self) -> Self:
        super().__enter__()
        self.print_line(self.axis, "contestant", "ms", "floors", "x linear", "peak MB", "status")
        return self

    def on_row(self, row: dict[str, Any]) -> None:
        ms, ratio, peak = (row[key] for key in ("ms", "ratio_to_linear", "peak_mb"))
        numbers = (ms, ".2f"), (ms and ms / row["floor_ms"], ".2f"), (ratio, ".2f"), (peak, ".0f")
        cells = ("" if value is None else format(value, form) for value, form in numbers)
        self.print_line(f"{row[self.axis]:,}", row["contestant"], *cells, row["status"])
        self.bar.advance(self.task)

    def print_line(self, size: str, name: str, *cells: str) -> None:
        line = " ".join(cell.rjust(10) for cell in cells[:-1])
        self.console.print(f"{size:>8} {name:10} {line}  {cells[-1]}", highlight=False, soft_wrap=True)
