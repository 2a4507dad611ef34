"""The commands `python -m bcl_fast bench scale-d` and `scale-b`: how a training step grows."""

# Without postponed annotations: those of a command are made where it is.

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from .cli import Device, checked, origin
from .environment import device_types, devices
from .experiments import console as show
from .experiments.sweep import numbers
from .measure import floor, rows, scaling
from .measure.implementations import NAMES, Size
from .records import write_record
from .spec import check_choice, check_number

bench = typer.Typer(help="How time and memory of a training step grow.", no_args_is_help=True)
Inputs = Annotated[int, typer.Option(min=1, help="N, inputs of the layer.")]
Sizes = Annotated[str, typer.Option(help="The sizes, separated by commas.")]
Contestants = Annotated[str, typer.Option(help=f"Who takes part, of {', '.join(NAMES)}, separated by commas.")]
Threads = Annotated[int, typer.Option(min=1, help="torch threads of each process.", show_default="torch's own")]
Limit = Annotated[float, typer.Option(min=1, help="Seconds a process may take; then it is a time-out.")]
EVERYBODY = ",".join(NAMES)
THREADS = torch.get_num_threads()


def _scaling_command(axis: str, grows: str, other: str, least: int, told: str) -> None:
    """Add the command that lets D or B grow; the option `other` is the one that does not."""
    name, known = f"scale-{axis.lower()}", ",".join(map(str, scaling.SIZES[axis]))

    @bench.command(
        name,
        help=f"Time and peak memory of a training step as {grows} grow, for every contestant.\n\n"
        "Out of memory and time-outs are rows. Ctrl-C ends it and keeps what is measured.",
    )
    def scale(
        context: typer.Context,
        sizes: Sizes = known,
        fixed: Annotated[int, typer.Option(other, min=least, help=told)] = 1024,
        inputs: Inputs = 784,
        contestants: Contestants = EVERYBODY,
        threads: Threads = THREADS,
        device: Device = "cpu",
        limit: Limit = 300,
        out: Annotated[Path, typer.Option(readable=False, help="Folder for record and picture.")] = Path("runs") / name,
    ) -> None:
        size = Size(fixed, 2, inputs) if axis == "D" else Size(1, fixed, inputs)
        _scale(context, axis, sizes, size, contestants, threads, device, limit, out)


_scaling_command("D", "the features D", "--batch-size", 1, "B, samples of a batch.")
_scaling_command("B", "the batch B", "--features", 2, "D, features of the layer.")


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
    with checked(out):
        values, chosen = numbers("sizes", sizes, int), contestants.split(",")
        for value in values:
            check_number("sizes", value, low=2 if axis == "D" else 1, integer=True)
        for name in chosen:
            check_choice("contestants", name, NAMES)
        check_choice("device", device, device_types())
        from .experiments import charts, plots
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
    plots.save(charts.scaling_picture(f"{machine}, {fixed_sizes}", axis, measured, exponents), path.with_suffix(".png"))
    console.print(f"Written to {out}: {path.name} and {path.with_suffix('.png').name}", soft_wrap=True, highlight=False)
