"""The commands `python -m bcl_fast bench ...`: scaling runs, records side by side, the README's results."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from .cli import Device, demo_extra, fail, origin, output
from .environment import device_types, devices
from .experiments import console as show
from .experiments.sweep import numbers
from .measure import floor, results, rows, scaling
from .measure.implementations import NAMES, Size
from .records import DamagedFile, read_record, replacing, trusting, write_record
from .spec import check_choice, check_number

bench = typer.Typer(help="How time and memory grow, and what the benches recorded.", no_args_is_help=True)
Saved = Annotated[Path, typer.Argument(readable=False)]
Inputs = Annotated[int, typer.Option(min=1, help="N, inputs of the layer.")]
Sizes = Annotated[str, typer.Option(help="The sizes, separated by commas.")]
Contestants = Annotated[str, typer.Option(help=f"Who takes part, of {', '.join(NAMES)}, separated by commas.")]
Threads = Annotated[int, typer.Option(min=1, help="torch threads of each process.", show_default="torch's own")]
Limit = Annotated[float, typer.Option(min=1, help="Seconds a process may take; then it is a time-out.")]
EVERYBODY = ",".join(NAMES)
SIZES = {axis: ",".join(map(str, sizes)) for axis, sizes in scaling.SIZES.items()}
THREADS = torch.get_num_threads()


@bench.command()
def scale_d(
    context: typer.Context,
    sizes: Sizes = SIZES["D"],
    batch_size: Annotated[int, typer.Option(min=1, help="B, samples of a batch.")] = 1024,
    inputs: Inputs = 784,
    contestants: Contestants = EVERYBODY,
    threads: Threads = THREADS,
    device: Device = "cpu",
    limit: Limit = 300,
    out: Annotated[Path, typer.Option(readable=False, help="Folder for record and picture.")] = Path("runs/scale-d"),
) -> None:
    """Time and peak memory of a training step as the features D grow, for every contestant.

    Out of memory and time-outs are rows. Ctrl-C ends it and keeps what is measured.
    """
    _scale(context, "D", sizes, Size(batch_size, 2, inputs), contestants, threads, device, limit, out)


@bench.command()
def scale_b(
    context: typer.Context,
    sizes: Sizes = SIZES["B"],
    features: Annotated[int, typer.Option(min=2, help="D, features of the layer.")] = 1024,
    inputs: Inputs = 784,
    contestants: Contestants = EVERYBODY,
    threads: Threads = THREADS,
    device: Device = "cpu",
    limit: Limit = 300,
    out: Annotated[Path, typer.Option(readable=False, help="Folder for record and picture.")] = Path("runs/scale-b"),
) -> None:
    """Time and peak memory of a training step as the batch B grows, for every contestant.

    Out of memory and time-outs are rows. Ctrl-C ends it and keeps what is measured.
    """
    _scale(context, "B", sizes, Size(1, features, inputs), contestants, threads, device, limit, out)


def _scale(
    context: typer.Context,
    axis: str,
    sizes: str,
    fixed: Size,
    contestants: str,
    threads: int,
    device: str,
    limit: float,
    out: Path,
) -> None:
    try:
        values, chosen = numbers("sizes", sizes, int), contestants.split(",")
        for value in values:
            check_number("sizes", value, low=2 if axis == "D" else 1, integer=True)
        for name in chosen:
            check_choice("contestants", name, NAMES)
        check_choice("device", device, device_types())
        with demo_extra():
            from .experiments import plots
        output(out)
    except (TypeError, ValueError, OSError) as error:
        fail(error)
    console, start = show.make_console(), time.perf_counter()
    torch.set_num_threads(threads)
    roof = floor.ceilings(device)
    measured: list[rows.Row] = []
    with show.ScalingTable(console, axis, len(values) * len(chosen)) as table:
        try:
            for row in scaling.scale(axis, values, fixed, chosen, roof, threads, device, limit):
                measured.append(row)
                table.on_row(row)
        except KeyboardInterrupt:
            console.print("Interrupted: what is measured is kept.")
    exponents = scaling.exponents(measured, axis)
    found = {"ceilings": asdict(roof), "exponents": exponents, "rows": measured}
    path = out / f"scale-{axis.lower()}.json"
    write_record(path, origin(context, start, threads) | found)
    machine = f"{devices()['cpu' if device == 'cpu' else device + ':0']}, {threads} thread{'s' * (threads > 1)}"
    fixed_sizes = ", ".join(f"{name} = {value:,}" for name, value in asdict(fixed).items() if name != axis)
    plots.save(plots.scaling_picture(f"{machine}, {fixed_sizes}", axis, measured, exponents), path.with_suffix(".png"))
    console.print(f"Written to {out}: {path.name} and {path.with_suffix('.png').name}", soft_wrap=True, highlight=False)


@bench.command()
def compare(old: Saved, new: Saved) -> None:
    """Show the ratios of two records side by side; exit with 1 where one is worse by more than 10 %."""
    records, lines, remedy = [], [], "name the record of a bench"
    for path in (old, new):
        record = read_record(path, remedy)
        with trusting(path, remedy):
            rows.ratios(record["rows"])
            machine = ", ".join(record["environment"]["devices"].values())
            lines.append(f"{path}: {machine}, torch {record['environment']['torch']}")
        records.append(record["rows"])
    try:
        found = rows.compare(*records)
    except ValueError as error:
        fail(f"{old} and {new}: {error}")
    console, names = show.make_console(), (*rows.ABOUT, "ratio", "old", "new")
    for line in lines:
        console.print(line, highlight=False)
    table = Table(*names, "")
    for row in found:
        cells = [f"{row[name]:.2f}" if isinstance(row[name], float) else str(row[name] or "") for name in names]
        table.add_row(*cells, "worse" if row["worse"] else "", style="red" if row["worse"] else None)
    console.print(table)
    if any(row["worse"] for row in found):
        raise SystemExit(1)


@bench.command()
def readme(
    folder: Annotated[Path, typer.Argument(readable=False, help="Folder of records.")],
    page: Annotated[Path, typer.Argument(readable=False, help="The README to bring up to date.")],
) -> None:
    """Write the tables and pictures of the newest records of each device into a README, between its marks."""
    try:
        text = results.updated(page.read_text(encoding="utf-8"), folder, page.parent)
    except DamagedFile:
        raise  # another file's
    except ValueError as error:
        fail(f"{page}: {error}")
    with replacing(page) as part:
        part.write_text(text, encoding="utf-8")
    print(f"Written: {page}")
