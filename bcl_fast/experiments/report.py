"""One page of everything a folder holds: trainings, tables, sweeps, with every picture inside it."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from ..records import read_record, replacing, trusting
from . import charts, layout, plots
from .formats import as_text
from .jobs import path_of, read, read_snapshot
from .judging import REASONS, UNMEASURED, counts_of, outside_of_ranges
from .layout import Block, picture
from .run import check_record, check_snapshot, read_snapshots
from .settings import jobs_of
from .sweep import METRICS
from .tables import TABLES

REMEDY = "repeat the command that wrote it, or delete it"
# Which run of the tables is shown in pictures beside which control: the first pair whose runs are there.
SHOWN_PAIRS = (("decoupled (0.001)", "plain"), ("decoupled", "plain, 300 steps"))


def write_report(folder: Path) -> Path:
    """Write FOLDER/report.html and FOLDER/pictures from the records found in `folder` and below; the page's path.

    Raises FileNotFoundError where there is no record, DamagedFile where one is not what was written.
    """
    found = [(kind, path) for kind in SECTIONS for path in sorted(folder.rglob(f"{kind}.json"))]
    if not found:
        raise FileNotFoundError(f"no {', '.join(f'{kind}.json' for kind in SECTIONS)} in {folder} or below")
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    sections = []
    for kind, path in found:
        with trusting(path, REMEDY):
            place = path.parent.relative_to(folder).as_posix()
            sections.append(_section(kind, read_record(path, REMEDY), path.parent, place, pictures))
    page = folder / "report.html"
    template = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True).get_template("report.html")
    with replacing(page) as part:
        part.write_text(template.render(sections=sections), encoding="utf-8")
    return page


def _section(kind: str, record: dict[str, Any], folder: Path, place: str, pictures: Path) -> dict[str, Any]:
    """What the page says of one record, which lies in `folder`; its pictures go to the folder `pictures`."""
    blocks = []
    for block in SECTIONS[kind](record, folder):
        if "figure" in block:
            words = re.findall(r"[a-z0-9]+", f"{kind} {place} {block['title']}".lower())
            path = pictures / ("-".join(dict.fromkeys(words[:8])) + ".png")
            plots.save(block.pop("figure"), path)
            block["picture"] = base64.b64encode(path.read_bytes()).decode()
        blocks.append(block)
    title = {"train": "Training", "tables": "Tables", "sweep": "Sweep"}[kind]
    return {
        "title": title if place == "." else f"{title}: {place}",
        "command": record["command"],
        "lines": [f"bcl_fast {record['bcl_fast']}, {record['seconds']:,.0f} s."],
        "blocks": blocks,
        "environment": dict(record["environment"]),
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


SECTIONS = {"train": _train, "tables": _tables, "sweep": _sweep}
