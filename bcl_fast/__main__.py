"""The command line: `python -m bcl_fast train`, `table`, `sweep`, `report`, `bench ...` and `doctor`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from . import PRESETS, BCLConfig, __version__, backends
from .cli import Commands, Device, checked, demo_extra, origin
from .environment import built_for, device_types, environment
from .experiments import judging, tables
from .experiments.data import load
from .experiments.jobs import AGAIN, Job, path_of, read, run_jobs, workers_here
from .experiments.run import Condition, Training, advance, row_steps, write_snapshots
from .experiments.settings import LONG, jobs_of
from .experiments.sweep import numbers, sweep_conditions, sweep_rows, write_csv
from .experiments.threads import on_threads, threads_for
from .records import trusting, write_record
from .spec import check_choice

with demo_extra():
    import typer
    from rich.console import Console
    from rich.table import Table

    from .cli_bench import bench
    from .experiments import console as show

app = typer.Typer(
    cls=Commands,
    help="Bidirectional Competitive Learning.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")


# Options that several commands have.
Data = Annotated[str, typer.Option(help="digits (comes with scikit-learn) or mnist.")]
DataDir = Annotated[Path, typer.Option(readable=False, help="Folder that holds MNIST/raw.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch MNIST into --data-dir.")]
Preset = Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")]
Loss = Annotated[str, typer.Option(help="l1 or mse.")]
Backend = Annotated[str | None, typer.Option(help="Who computes BCL.", show_default="the fastest")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads of each process.", show_default="by the size of the network")
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes at a time.", show_default="cores / threads, 8 at most")
]


# --- train ------------------------------------------------------------------------------------------------------------


@app.command()
def train(
    context: typer.Context,
    data: Data = "digits",
    data_dir: DataDir = Path("data"),
    download: Download = False,
    preset: Preset = "decoupled",
    som_lr: Annotated[float | None, typer.Option(help="Step size of the pull.", show_default="the preset's")] = None,
    rescue_k: Annotated[
        int | None, typer.Option(help="Samples a rescue target is made of, 0: all.", show_default="the preset's")
    ] = None,
    loss: Loss = "l1",
    steps: Annotated[int, typer.Option(help="Batches to train on.")] = 1000,
    seed: Annotated[int, typer.Option(help="Decides initial weights and batches, equal for both.")] = 0,
    features: Annotated[int, typer.Option(help="Features of the encoder.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Images in a batch.")] = 128,
    backend: Backend = None,
    device: Device = "cpu",
    threads: Threads = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write scalars to OUT/tensorboard.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(readable=False, help="Folder for record and picture.", show_default="runs/DATA-PRESET-seedSEED"),
    ] = None,
) -> None:
    """Train an autoencoder with BCL and the same one without; write a record and a picture.

    Ctrl-C ends it early and keeps what is done.
    """
    options = {name: value for name, value in (("som_lr", som_lr), ("rescue_k", rescue_k)) if value is not None}
    out = Path("runs", f"{data}-{preset}-seed{seed}") if out is None else out
    with checked(out):
        from .experiments import plots

        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

        config = BCLConfig.preset(preset, **options)
        condition = Condition(
            data, config, steps, seed, features, batch_size, loss=loss, backend=backend, device=device
        )
        images = load(data, data_dir, download)
        threads = threads or threads_for(batch_size, features, images.train.shape[1])
        pair = {"bcl": condition, "plain": condition.control()}
        trainings = {name: Training(each, images, row_steps(steps)) for name, each in pair.items()}

    console, start = show.make_console(), time.perf_counter()
    writers = [SummaryWriter(str(out / "tensorboard" / name)) for name in pair] if tensorboard else []
    show.print_threads(console, threads)
    with on_threads(threads), show.TrainingTable(console, steps) as table:

        def on_step(rows: list[dict[str, float] | None]) -> None:
            table.on_step(rows)
            for writer, row in zip(writers, rows, strict=bool(writers)):
                for name, value in (row or {}).items():
                    writer.add_scalar(name, value, row["step"])

        advance(list(trainings.values()), on_step)
    for writer in writers:
        writer.close()
    runs = {name: plots.Run(training.record(), training.snapshot()) for name, training in trainings.items()}
    record = {
        **origin(context, start, threads, out=out),
        "interrupted": any(run.record["interrupted"] for run in runs.values()),
        "conditions": {name: run.record for name, run in runs.items()},
    }
    write_snapshots(out / "train.pt", {name: run.tensors for name, run in runs.items()})
    write_record(out / "train.json", record)
    title = f"BCL ({preset}, som_lr {config.som_lr:g}) beside a plain autoencoder: {data}, seed {seed}"
    plots.save(plots.training_picture(title, *runs.values()), out / "train.png")
    show.print_outcome(console, record)
    show.print_written(console, out, "train.json, train.pt, train.png")
    if record["interrupted"]:
        raise typer.Exit(130)


# --- table, sweep, report ---------------------------------------------------------------------------------------------


def check_jobs(jobs: Sequence[Job], data: str, data_dir: Path, download: bool) -> int:
    """Raise what a run would raise for its data, device or backend, before any process starts.

    Returns how many threads the largest network is worth.
    """
    images = load(data, data_dir, download)
    conditions = [job for job in jobs if isinstance(job, Condition)]
    first = next((condition for condition in conditions if condition.config is not None), None)
    if first is not None:
        Training(first, images, ())
    inputs = images.train.shape[1]
    return max((threads_for(each.batch_size, each.features, inputs) for each in conditions), default=1)


def complete(
    console: Console, jobs: Sequence[Job], out: Path, data_dir: Path, workers: int | None, threads: int
) -> None:
    """Do the jobs that are not done yet; a KeyboardInterrupt ends the program."""
    workers = workers or workers_here(threads)
    show.print_threads(console, threads, workers)
    try:
        with show.JobsProgress(console, list(dict.fromkeys(jobs))) as progress:
            run_jobs(jobs, out / "runs", data_dir, workers, progress.on_done, threads)
    except KeyboardInterrupt:
        console.print(f"Interrupted. Finished runs are in {out / 'runs'}: the same command goes on from there.")
        raise typer.Exit(130) from None


@app.command()
def table(
    context: typer.Context,
    names: Annotated[list[str], typer.Argument(help=f"all, fixes, or of {', '.join(tables.ALL)}.")],
    data: Data = "mnist",
    data_dir: DataDir = Path("data"),
    download: Download = False,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each condition; at most 3 of 10,000 steps.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Cut every run to this, to try a table out.")] = LONG,
    backend: Backend = None,
    device: Device = "cpu",
    threads: Threads = None,
    workers: Workers = None,
    out: Annotated[Path, typer.Option(readable=False, help="Folder for runs, records, pictures.")] = Path(
        "runs/tables"
    ),
) -> None:
    """Measure tables of the research document, and compare them with what it published; or its untested fixes.

    Finished runs are kept in OUT/runs and not repeated. Ctrl-C ends it; the same command goes on.
    """
    with checked(out):
        from .experiments import charts, plots

        chosen = list(dict.fromkeys(one for name in names for one in (tables.ALL if name == "all" else (name,))))
        for name in chosen:
            check_choice("table", name, ("all", *tables.TABLES))
        common = dict(data=data, seeds=seeds, most_steps=steps, backend=backend, device=device)
        jobs = {name: jobs_of(name, **common) for one in chosen for name in tables.conditions_of(one)}
        every = [job for some in jobs.values() for job in some]
        worth = check_jobs(every, data, data_dir, download)
        threads = threads or worth

    console, start = show.make_console(), time.perf_counter()
    complete(console, every, out, data_dir, workers, threads)
    records = {name: {job.seed: read(job, out / "runs") for job in some} for name, some in jobs.items()}
    for name, job in ((name, job) for name, some in jobs.items() for job in some):
        with trusting(path_of(job, out / "runs"), AGAIN):
            judging.check(name, records[name][job.seed])
    rows = [row for name in chosen for row in judging.measure_table(name, records, data == "mnist")]
    for name in chosen:
        own = [row for row in rows if row["table"] == name]
        (show.print_outcomes if name == "fixes" else show.print_cells)(console, name, own)
        if name != "explanations":  # single numbers, nothing to draw
            draw = charts.outcomes_picture if name == "fixes" else charts.cells_picture
            plots.save(draw(tables.TABLES[name].title, own), out / f"{name}.png")
    show.print_verdicts(console, rows)
    found = {"options": common, "reasons": judging.REASONS, "rows": rows}
    write_record(out / "tables.json", origin(context, start, threads) | found)
    show.print_written(console, out, "tables.json and a picture of each table")


@app.command()
def sweep(
    context: typer.Context,
    data: Data = "digits",
    data_dir: DataDir = Path("data"),
    download: Download = False,
    preset: Preset = "decoupled",
    som_lr: Annotated[str, typer.Option(help="Step sizes of the pull, separated by commas.")] = "0.001,0.01",
    rescue_k: Annotated[str, typer.Option(help="Samples of a rescue target, separated by commas; 0: all.")] = "1,5",
    loss: Loss = "l1",
    steps: Annotated[int, typer.Option(help="Batches to train on.")] = 1000,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each cell.")] = 3,
    backend: Backend = None,
    device: Device = "cpu",
    threads: Threads = None,
    workers: Workers = None,
    out: Annotated[Path, typer.Option(readable=False, help="Folder for runs, CSV and heat map.")] = Path("runs/sweep"),
) -> None:
    """Train every pair of --som-lr and --rescue-k, and a plain control; write a CSV and a heat map.

    Finished runs are kept in OUT/runs and not repeated. Ctrl-C ends it; the same command goes on.
    """
    with checked(out):
        from .experiments import charts, plots

        grid = numbers("som_lr", som_lr), numbers("rescue_k", rescue_k, int)
        common = dict(data=data, steps=steps, loss=loss, backend=backend, device=device)
        conditions = sweep_conditions(preset, *grid, seeds, **common)
        worth = check_jobs(conditions, data, data_dir, download)
        threads = threads or worth

    console, start = show.make_console(), time.perf_counter()
    complete(console, conditions, out, data_dir, workers, threads)
    rows = sweep_rows(conditions, out / "runs")
    title = f"{preset} on {data} after {steps:,} steps, {loss} loss: median of {seeds} seeds"
    write_csv(out / "sweep.csv", rows)
    write_record(out / "sweep.json", {**origin(context, start, threads), "title": title, "rows": rows})
    plots.save(charts.sweep_picture(title, rows), out / "sweep.png")
    show.print_sweep(console, title, rows)
    show.print_written(console, out, "sweep.csv, sweep.json, sweep.png")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(readable=False, help="What train, table, sweep or a Monitor wrote.")],
) -> None:
    """Make one page of what is in a folder and below: FOLDER/report.html, all in itself, and FOLDER/pictures."""
    with checked():
        from .experiments.report import write_report

        page = write_report(folder)
    print(f"Written: {page}")


# --- doctor -----------------------------------------------------------------------------------------------------------


@app.command()
def doctor() -> None:
    """Say what is installed here, which backends can serve, and why each other one cannot."""
    console, here = show.make_console(), environment()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("bcl_fast", __version__)
    table.add_row("Python", f"{here['python']} on {here['platform']}")
    table.add_row("torch", f"{here['torch']}, {here['threads']} threads")
    table.add_row("Triton", here["triton"] or "not installed")
    for device, name in here["devices"].items():
        table.add_row(device, name)
    table.add_row("C++ library", backends.cpu_library())
    table.add_row("CUDA library", backends.cuda_library())
    console.print(table)

    present = device_types()
    devices = [device for device in dict.fromkeys((*present, built_for())) if device is not None]
    table = Table("device", "here", "fused=True is", "so far", title="Devices", title_justify="left")
    for device in devices:
        table.add_row(device, "yes" if device in present else "no", backends.fastest(device), backends.tried(device))
    table.add_row("any other", "no", backends.GENERAL, backends.tried("any other"))
    console.print(table)

    table = Table("backend", "device", "serves", "why not", title="Backends", title_justify="left")
    for device in devices:
        for backend, reason in backends.availability(device).items():
            serves = "no" if reason else "yes" if device in present else "would"  # on a device that is not here
            table.add_row(backend, device, serves, reason)
    console.print(table)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
