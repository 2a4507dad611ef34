"""The command line: `python -m bcl_fast train` and `python -m bcl_fast doctor`."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

from . import PRESETS, BCLConfig, __version__, ops
from .environment import environment
from .experiments.data import load
from .experiments.run import Condition, Training, advance, row_steps, write_record

DEMO = ("typer", "rich", "matplotlib", "sklearn", "torchvision")  # packages of the extra [demo]


def fail(message: object) -> NoReturn:
    """End the program with a line that says what is wrong."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def demo_extra() -> Iterator[None]:
    """Within this block a missing package of the extra [demo] ends the program and says how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in DEMO:
            raise
        fail(f'{error.name} is not installed; the command line needs: pip install "bcl-fast[demo]"')


with demo_extra():
    import typer
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

app = typer.Typer(
    help="Bidirectional Competitive Learning.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


# --- train ------------------------------------------------------------------------------------------------------------

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


class Report:
    """The table of measured steps, growing while it is entered: live on a terminal, a line per row elsewhere."""

    def __init__(self, console: Console, steps: int) -> None:
        self.console = console
        self.cells: list[list[str]] = []
        self.finished = False
        bar = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.progress = Progress(*bar, console=console)
        self.task = self.progress.add_task("training", total=steps)
        self.live = Live(get_renderable=self.view, console=console) if console.is_terminal else None

    def __enter__(self) -> Report:
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
        """The whole table in the end, before that as many of its last rows as the terminal is high."""
        shown = len(self.cells) if self.finished else max(1, self.console.height - 7)
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, caption=LEGEND, header_style="bold")
        for heading, *_ in COLUMNS:
            table.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
        for cells in self.cells[-shown:]:
            table.add_row(*cells)
        return Group(table, self.progress)


def print_outcome(console: Console, whole: dict[str, Any]) -> None:
    """What came out at the end of each training, on images that were not trained on."""
    table = Table("", title="Held-out images", title_justify="left")
    for heading in ("steps", "L1", "MSE", "features that fire"):
        table.add_column(heading, justify="right")
    for name, record in whole["conditions"].items():
        outcome = record["held_out"]
        fires = f"{outcome['firing_features']} of {record['condition']['features']}"
        table.add_row(name, str(record["steps_done"]), f"{outcome['l1']:.4f}", f"{outcome['mse']:.4f}", fires)
    console.print(table)
    console.print(f"{'Interrupted after' if whole['interrupted'] else 'Trained in'} {whole['seconds']:.1f} s")


def command_line(options: dict[str, Any]) -> str:
    """The command that repeats this run, with every option spelled out."""
    words = ["python", "-m", "bcl_fast", "train"]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words += [flag, str(value)]
    return shlex.join(words)


@app.command()
def train(
    context: typer.Context,
    data: Annotated[str, typer.Option(help="digits (comes with scikit-learn) or mnist.")] = "digits",
    data_dir: Annotated[Path, typer.Option(help="Folder that holds MNIST/raw.")] = Path("data"),
    download: Annotated[bool, typer.Option("--download", help="Fetch MNIST into --data-dir.")] = False,
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "decoupled",
    som_lr: Annotated[float | None, typer.Option(help="Step size of the pull.", show_default="the preset's")] = None,
    rescue_k: Annotated[
        int | None, typer.Option(help="Samples a rescue target is made of, 0: all.", show_default="the preset's")
    ] = None,
    steps: Annotated[int, typer.Option(help="Batches to train on.")] = 1000,
    seed: Annotated[int, typer.Option(help="Decides initial weights and batches, equal for both.")] = 0,
    features: Annotated[int, typer.Option(help="Features of the encoder.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Images in a batch.")] = 128,
    backend: Annotated[str | None, typer.Option(help="Who computes BCL.", show_default="the fastest")] = None,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, ...")] = "cpu",
    out: Annotated[
        Path | None, typer.Option(help="Folder for record and picture.", show_default="runs/DATA-PRESET-seedSEED")
    ] = None,
) -> None:
    """Train an autoencoder with BCL and, beside it, the same one without; write a record and a picture.

    Ctrl-C ends it early and keeps what is done.
    """
    options = {name: value for name, value in (("som_lr", som_lr), ("rescue_k", rescue_k)) if value is not None}
    out = Path("runs", f"{data}-{preset}-seed{seed}") if out is None else out
    try:
        with demo_extra():
            from .experiments import plots

            config = BCLConfig.preset(preset, **options)
            condition = Condition(data, config, steps, seed, features, batch_size, backend=backend, device=device)
            images = load(data, data_dir, download)
        trainings = [Training(c, images, row_steps(steps)) for c in (condition, condition.control())]
        out.mkdir(parents=True, exist_ok=True)
    except (TypeError, ValueError, OSError) as error:
        fail(error)

    console = Console()
    start = time.perf_counter()
    with Report(console, steps) as report:
        advance(trainings, report.on_step)
    records = dict(zip(("bcl", "plain"), (training.record() for training in trainings), strict=True))
    whole = {
        "command": command_line({**context.params, "out": out}),
        "bcl_fast": __version__,
        "environment": environment(),
        "seconds": time.perf_counter() - start,
        "interrupted": any(record["interrupted"] for record in records.values()),
        "conditions": records,
    }
    write_record(out / "train.json", whole)
    title = f"BCL ({preset}, som_lr {config.som_lr:g}) beside a plain autoencoder: {data}, seed {seed}"
    plots.training_picture(out / "train.png", title, *trainings)
    print_outcome(console, whole)
    console.print(f"Written to {out}: train.json, train.png", soft_wrap=True, highlight=False)
    if whole["interrupted"]:
        raise typer.Exit(130)


# --- doctor -----------------------------------------------------------------------------------------------------------


@app.command()
def doctor() -> None:
    """Say what is installed here, which backends can serve, and why each other one cannot."""
    console, here = Console(), environment()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("bcl_fast", __version__)
    table.add_row("Python", f"{here['python']} on {here['platform']}")
    table.add_row("torch", f"{here['torch']}, {here['threads']} threads")
    table.add_row("Triton", here["triton"] or "not installed")
    for device, name in here["devices"].items():
        table.add_row(device, name)
    console.print(table)

    table = Table("backend", "device", "serves", "why not", title="Backends", title_justify="left")
    for device in dict.fromkeys(name.partition(":")[0] for name in here["devices"]):
        for backend, reason in ops.backends(device).items():
            table.add_row(backend, device, "no" if reason else "yes", reason)
    console.print(table)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
