"""One page of everything a folder holds: trainings, tables, sweeps, monitors, with every picture inside it."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from ..monitor import LINES, Monitored
from ..records import read_record, replacing, trusting
from ..spec import BCLConfig
from . import charts, layout, plots
from .formats import as_text
from .jobs import path_of, read, read_snapshot
from .judging import REASONS, UNMEASURED, counts_of, outside_of_ranges
from .layout import Block, picture
from .monitored import layer_blocks
from .run import check_record, check_snapshot, read_snapshots
from .settings import jobs_of
from .sweep import METRICS
from .tables import TABLES

REMEDY = "repeat the command that wrote it, or delete it"
# Which run of the tables is shown in pictures beside which control: the first pair whose runs are there.
SHOWN_PAIRS = (("decoupled (0.001)", "plain"), ("decoupled", "plain, 300 steps"))


def write_report(folder: Path) -> Path:
    """Write FOLDER/report.html and FOLDER/pictures from what is found in `folder` and below; the page's path.

    Raises ValueError or FileNotFoundError where there is nothing, DamagedFile where something is not what was written.
    """
    wanted = "FOLDER must be what train, table, sweep or a Monitor wrote, or a folder above it"
    if not folder.is_dir():
        raise ValueError(f"{wanted}, got {folder}: {'it is a file' if folder.exists() else 'there is no such folder'}")
    found = [(name, path) for name in READERS for path in sorted(folder.rglob(name))]
    if not found:
        raise FileNotFoundError(f"{wanted}, got {folder}: no {', '.join(READERS)} in there")
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    sections, names = [], set()
    for name, path in found:
        place = path.parent.relative_to(folder).as_posix()
        for section in _trusted(READERS[name](path), path):
            origin = f"{path.stem} {place} {section['name']}"
            blocks = [_drawn(block, pictures, origin, names) for block in _trusted(section["blocks"], path)]
            title = section["title"] if place == "." else f"{section['title']}: {place}"
            sections.append({**section, "title": title, "blocks": blocks})
    page = folder / "report.html"
    template = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True).get_template("report.html")
    with replacing(page) as part:
        part.write_text(template.render(sections=sections), encoding="utf-8")
    return page


def _trusted(parts: Iterable[dict[str, Any]], path: Path) -> Iterator[dict[str, Any]]:
    """Parts that are made from a file as they are asked for; what is then done with them is not the file's fault."""
    each = iter(parts)
    while True:
        with trusting(path, REMEDY):
            part = next(each, None)
        if part is None:
            return
        yield part


def _drawn(block: Block, pictures: Path, origin: str, names: set[str]) -> Block:
    """A block whose figure is a file in the folder `pictures`, under a name of its own, and text for the page."""
    if "figure" not in block:
        return block
    words = re.findall(r"[a-z0-9]+", f"{origin} {block['title']}".lower())
    stem = "-".join(dict.fromkeys(word[:20] for word in words[:8]))
    name = next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, len(names) + 3))) if n not in names)
    names.add(name)
    path = pictures / f"{name}.png"
    plots.save(block["figure"], path)
    return {"title": block["title"], "lines": block["lines"], "picture": base64.b64encode(path.read_bytes()).decode()}


def _record(path: Path) -> Iterator[dict[str, Any]]:
    """The section of a record of train, table or sweep."""
    record = read_record(path, REMEDY)
    title, blocks = SECTIONS[path.stem]
    yield {
        "name": "",
        "title": title,
        "command": record["command"],
        "lines": [f"bcl_fast {record['bcl_fast']}, {record['seconds']:,.0f} s."],
        "blocks": blocks(record, path.parent),
        "environment": dict(record["environment"]),
    }


def _monitor(path: Path) -> Iterator[dict[str, Any]]:
    """A section for each layer that a `Monitor` has measured."""
    found = Monitored.read(path.parent)
    run = found.runs[-1]
    starts = f"Started {len(found.runs)} times, the last" if len(found.runs) > 1 else "Started"
    for name, lines in found.layers.items():
        about = run["layers"][name]
        (features, inputs), changed = about["shape"], BCLConfig(**about["config"]).changed()
        options = ", ".join(f"{option} {value}" for option, value in changed.items()) or "default options"
        measured = layer_blocks(name, lines, found.glances(name), found.logged[name]) if lines else ()
        yield {
            "name": name,
            "title": f"Layer {name}",
            "lines": [
                f"{features:,} features of {inputs:,} inputs; {options}; backend {about['backend']}.",
                f"{starts} on {run['environment']['date'][:16].replace('T', ' ')} UTC, bcl_fast {run['bcl_fast']}."
                + ("" if lines else " No step has been measured yet."),
            ],
            "blocks": measured,
            "environment": dict(run["environment"]),
        }


def _train(record: dict[str, Any], folder: Path) -> Iterator[Block]:
    path = folder / "train.pt"
    snapshots = read_snapshots(path, REMEDY)
    bcl, control = (
        plots.Run(check_record(record["conditions"][name]), check_snapshot(snapshots.get(name), path, REMEDY))
        for name in ("bcl", "plain")
    )
    yield from _pair("a plain network", bcl, control)


def _pair(name: str, bcl: plots.Run, control: plots.Run) -> Iterator[Block]:
    """Everything there is to see of one run and its control."""
    yield picture(f"Beside {name}", plots.training_picture("With BCL and plain", bcl, control))
    rows = []
    for label, key in (("L1", "l1"), ("MSE", "mse"), ("features that fire", "firing_features")):
        outcomes = (as_text(run.record["held_out"][key], f"held_out_{key}") for run in (bcl, control))
        rows.append([layout.text(one) for one in (label, *outcomes)])
    yield {"title": "Held-out images", "table": {"headings": ["", "with BCL", "plain"], "rows": rows}}
    yield picture("Reconstructions", plots.reconstruction_picture(bcl, control))
    competing = {"with BCL": bcl, "plain, as if its features competed": control}
    yield picture("Win rates", plots.win_rate_picture(competing))
    yield picture("Forces", plots.force_picture("Forces on every feature, with BCL", bcl))
    images = {
        "Encoder weights in the end": bcl.tensors["weight"],
        f"Rescue targets at step {bcl.tensors['step'][-1]:,}": bcl.tensors["rescue_target"],
    }
    yield picture("Weights and targets", plots.image_picture("Features and their rescue targets, with BCL", images))
    yield picture("Coverage", plots.coverage_picture({"with BCL": bcl, "plain": control}))


def _sweep(record: dict[str, Any], folder: Path) -> Iterator[Block]:
    yield picture(record["title"], charts.sweep_picture(record["title"], record["rows"]))
    headings = list(record["rows"][0])
    rows = [[layout.text(_plain(row[key], key)) for key in headings] for row in record["rows"]]
    yield {"title": "Every run", "table": {"headings": headings, "rows": rows}}


def _tables(record: dict[str, Any], folder: Path) -> Iterator[Block]:
    rows = record["rows"]
    yield from _verdicts(rows)
    for name in dict.fromkeys(row["table"] for row in rows):
        own = [row for row in rows if row["table"] == name]
        title = TABLES[name].title
        if name == "explanations":
            yield from _explanations(own)
        elif name == "fixes":
            yield picture(title, charts.outcomes_picture(title, own), "Mean, and range over seeds.")
            yield {"title": f"{name}: the numbers", "table": layout.pivot(name, own, "mean")}
        else:
            yield picture(f"{name}: {title}", charts.cells_picture(title, own))
            yield {"title": f"{name}: the numbers", "table": layout.pivot(name, own, "median")}
    for pair in SHOWN_PAIRS:
        jobs = [jobs_of(name, **record["options"] | {"seeds": 1})[0] for name in pair]
        if all(path_of(job, folder / "runs").exists() for job in jobs):
            loaded = (plots.Run(read(job, folder / "runs"), read_snapshot(job, folder / "runs")) for job in jobs)
            yield from _pair(f"{pair[1]}: {pair[0]}, seed 0", *loaded)
            return


def _verdicts(rows: list[dict[str, Any]]) -> Iterator[Block]:
    """What replicates, as a count, and everything that does not, one by one."""
    unmeasured = {reason: sum(row["reason"] == reason for row in rows if row["printed"]) for reason in UNMEASURED}
    different = layout.different(rows)
    outside, count = outside_of_ranges(rows)
    lines = [
        f"Published cells: {counts_of(rows)}. Inside: the published number lies within the least and largest of our "
        "seeds, or within the range of an independent implementation where one is known.",
        f"Our medians outside the range of an independent implementation: {len(outside)} of {count}.",
        *(f"{REASONS[reason]} ({number} cells)" for reason, number in unmeasured.items() if number),
        *(f"{reason}: {REASONS[reason]}" for reason in dict.fromkeys(row["reason"] for row in different)),
    ]
    yield {"title": "What replicates", "lines": lines, "table": layout.differences(different), "text": True}
    if outside:
        yield {"title": "Medians outside", "table": layout.misses(outside)}


def _explanations(rows: list[dict[str, Any]]) -> Iterator[Block]:
    for reason in dict.fromkeys(row["row"] for row in rows):
        yield {"title": f"Why: {reason}", "lines": [REASONS[reason]], "table": layout.evidence(rows, reason)}


def _plain(value: float | None, key: str) -> str:
    """A field of a sweep's row: settings as they are, outcomes rounded."""
    return as_text(value, key) if key in METRICS else "" if value is None else f"{value:g}"


SECTIONS = {"train": ("Training", _train), "tables": ("Tables", _tables), "sweep": ("Sweep", _sweep)}
READERS = {**dict.fromkeys((f"{kind}.json" for kind in SECTIONS), _record), LINES: _monitor}
