"""The pages of results, from the newest records of each machine: `python bench/results.py`.

Writes bench/results/README.md, and into README.md the table of training steps between its markers. With --check it
writes nothing, and exits with 1 where one of them is not what the records say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bcl_fast.measure.implementations import NAMES
from bcl_fast.measure.rows import Row, spelled
from bcl_fast.measure.timing import ENOUGH, MIN_ROUNDS, PRECISION, ROUNDS
from bcl_fast.records import DamagedFile, read_record, replacing, trusting

FOLDER = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- results: written by `python bench/results.py` -->", "<!-- results: end -->"
REMEDY = "measure again, or delete it"
INTRODUCTION = f"""\
# Results

Written by `python bench/results.py` from the records beside this page. What the layer learns is on
[another page](replication.md).

A ratio is the median over rounds, in each of which everybody is timed for at least 0.2 s, one right after the other.
There are {ENOUGH} rounds and, until its standard error is at most {PRECISION:.0%}, up to {ROUNDS}; fewer where a call
takes long, and a median of fewer than {MIN_ROUNDS} has their number in brackets. The records have the quartiles.
Meanwhile the process keeps what it frees (glibc's malloc): else the kernel clears large tensors at every call, which
can double the time of what is bound by memory, and differs from process to process. Records without rounds are older:
there it did, and a ratio of stages is one of medians over windows of 0.05 s.

```sh
pytest bench/ --save cpu.json                          # all but scaling; with --quick in half a minute
pytest bench/bench_step.py --threads 2                 # one question; --device cuda on a GPU
python -m bcl_fast bench scale-d --out runs/scale-d    # features up to 65,536, the batch 1,024; half an hour
python -m bcl_fast bench scale-b --out runs/scale-b    # batches up to 131,072, the features 1,024; half an hour
python bench/compare.py OLD NEW                        # which ratio is worse by more than 10 %
```

MNIST is looked for in `BCL_DATA`; without it training benches take scikit-learn's digits. `pip install ".[peers]"`
brings MiniSom, TorchSOM and vector-quantize-pytorch for `bench/bench_peers.py`.
"""


class Block(NamedTuple):
    """The rows of one question in the newest record that has them, and where they come from."""

    machine: str  # with the versions that matter
    threads: int
    question: str
    rows: list[Row]
    record: dict[str, Any]
    path: Path


def page(folder: Path) -> str:
    """The page of a folder's newest results."""
    return f"{INTRODUCTION}\n{section(folder)}"


def updated(text: str, folder: Path) -> str:
    """A README with the `face` of a folder's newest results between its markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"there must be one line {BEGIN!r} and, below it, one line {END!r}")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{face(folder)}\n\n{END}{rest.partition(END)[2]}"


def face(folder: Path) -> str:
    """Markdown: training steps over those of `nn.Linear` on the CPU measured last, on the fewest threads there."""
    blocks = []
    for block in newest(folder):
        rows = [row for row in block.rows if (row["device"], row.get("weights")) == ("cpu", "init") and row["ms"]]
        if rows and block.question == "step":
            blocks.append(block._replace(rows=rows))
    if not blocks:
        raise ValueError(f"no steps on a CPU in the records of {folder}")
    machine = max(blocks, key=lambda block: block.record["environment"]["date"]).machine
    block = min((block for block in blocks if block.machine == machine), key=lambda block: block.threads)
    names, groups = [name for name in _measured(block.rows, "ms") if name != "linear"], _together(block.rows, *"BDN")
    lines = [[_size(own["linear"]), *(_ratio(own.get(name)) for name in names)] for own in groups]
    threads = "one thread" if block.threads == 1 else f"{block.threads} threads"
    text = f"A training step over one of `nn.Linear`, on {threads}; `compiled` is `torch.compile` of the reference.\n"
    return f"{text}Measured on {block.machine}.\n\n" + _table(["(B, D, N)", *names], lines)


def newest(folder: Path) -> list[Block]:
    """What the records of a folder answer, by machine, threads and question; where two do, the later one."""
    found: dict[tuple[str, int, str], Block] = {}
    for path in sorted(folder.glob("*.json")):
        record = read_record(path, REMEDY)
        with trusting(path, REMEDY):
            rows = [row for row in map(spelled, record.get("rows", ())) if row.get("question") in TABLES]
            for key in dict.fromkeys((row["device"], row["threads"], row["question"]) for row in rows):
                device, threads, question = key
                own = [row for row in rows if (row["device"], row["threads"], row["question"]) == key]
                block = Block(_machine(record["environment"], device), threads, question, own, record, path)
                other = found.get(block[:3])
                if other is None or other.record["environment"]["date"] < record["environment"]["date"]:
                    found[block[:3]] = block
    return list(found.values())


def _machine(environment: dict[str, Any], device: str) -> str:
    processor, names = environment["devices"]["cpu"], environment["devices"]
    on = f"{processor} ({environment['cpu_capability']}, {environment['cores']} cores)"
    on = on if device == "cpu" else f"{names[device + ':0']}, {on}"
    return f"{on}, torch {environment['torch']}, Python {environment['python']}"


def section(folder: Path) -> str:
    """Markdown: for every machine the tables of every question it has answered."""
    blocks = newest(folder)
    if not blocks:
        raise ValueError(f"no record of a bench in {folder}")
    parts = []
    for machine in dict.fromkeys(block.machine for block in blocks):
        own = [block for block in blocks if block.machine == machine]
        paths = dict.fromkeys((block.path, block.record["environment"]["date"][:10]) for block in own)
        links = ", ".join(f"[`{path.name}`]({path.name}) ({date})" for path, date in paths)
        parts.append(f"Measured on {machine}. Records: {links}.")
        steps = [row for block in own if block.question == "step" for row in block.rows]
        absent = {row["contestant"]: row["status"] for row in steps if row["ms"] is None}
        for reason in dict.fromkeys(absent.values()):
            names = ", ".join(f"`{name}`" for name, why in absent.items() if why == reason)
            parts.append(f"Not timed there: {names} ({reason}).")
        for questions, table in ANSWERS.items():
            some = sorted((b for b in own if b.question in questions), key=lambda b: questions.index(b.question))
            if some:
                with trusting(", ".join(dict.fromkeys(str(block.path) for block in some)), REMEDY):
                    parts.append(table(some))
    return "\n\n".join(parts) + "\n"


# --- Tables -----------------------------------------------------------------------------------------------------------


def _table(headings: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    body = [headings, ["---"] * len(headings), *lines]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in body)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3f}"
    return "" if value is None else str(value)


def _ratio(row: Row | None, key: str = "ratio_to_linear") -> str | None:
    """The ratio of a row, marked where it is of few rounds; None where there is none."""
    if row is None or row[key] is None:
        return None
    rounds = row.get("rounds", MIN_ROUNDS)  # early records do not have it
    return _cell(row[key]) + f" ({rounds})" * (rounds < MIN_ROUNDS)


def _size(row: Row) -> str:
    return f"({row['B']:,}, {row['D']:,}, {row['N']:,})"


def _together(rows: Iterable[Row], *keys: str) -> list[dict[str, Row]]:
    """The rows that have these keys in common, by implementation."""
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), {})[row["contestant"]] = row
    return list(groups.values())


def _measured(rows: Iterable[Row], key: str) -> list[str]:
    """The implementations that have a number, the known ones first and in their order."""
    names = dict.fromkeys(row["contestant"] for row in rows if row.get(key) is not None)
    return [name for name in NAMES if name in names] + [name for name in names if name not in NAMES]


def _rows(blocks: Iterable[Block]) -> list[Row]:
    return [row for block in blocks for row in block.rows]


def _steps(blocks: list[Block]) -> str:
    rows = _rows(blocks)
    names = [name for name in _measured(rows, "ms") if name != "linear"]
    lines = []
    for own in _together(rows, "B", "D", "N", "weights", "threads"):
        linear = own["linear"]
        ratios = [_ratio(own.get(name)) for name in names]
        lines.append([_size(linear), linear["weights"], linear["threads"], *ratios, linear["floor_ms"] / linear["ms"]])
    text = "**A training step** over an `nn.Linear` step (forward, backward with the input's gradient; the neighbor "
    text += "refresh shared out over its 50 steps), float32. `floor`: bytes and operations over what this machine "
    text += "reaches, from formulas.\n\n"
    return text + _table(["(B, D, N)", "weights", "threads", *names, "floor"], lines)


def _stages(blocks: list[Block]) -> str:
    rows = [row for row in _rows(blocks) if row.get("stage") not in (None, "products") and row["ms"]]
    largest = max(row["B"] * row["D"] for row in rows if row["question"] == "stages")
    sizes = [_size(row) for row in rows if row["question"] == "stages" and row["B"] * row["D"] == largest]
    rows = [row for row in rows if row["question"] != "stages" or _size(row) == sizes[0]]
    names = _measured(rows, "ms")
    lines = []
    for own in _together(rows, "question", "stage", "B", "D", "N", "threads"):
        best = min((row for row in own.values()), key=lambda row: row["ms"])
        ratios = [_ratio(own.get(name)) for name in names]
        rate = f"{best['tflops'] * 1e3:.0f} GFLOP/s" if best["tflops"] else f"{best['gbs']:.2f} GB/s"
        lines.append([f"`{best['stage']}`", _size(best), *ratios, rate, f"{best['fraction_of_roof']:.0%}"])
    text = "**Stages**, each over an `nn.Linear` step of that size; the rate (of what the stage cannot do without) and "
    text += "the fraction of the measured roof are the fastest's. Beyond 100 %: a cache holds it. `neighbors` happens "
    text += "once in 50 steps, `rank` never.\n\n"
    return text + _table(["stage", "(B, D, N)", *names, "rate", "of the roof"], lines)


def _memory(blocks: list[Block]) -> str:
    rows = _rows(blocks)
    names = [name for name in _measured(rows, "peak_mb") if name != "linear"]
    lines = []
    for own in _together(rows, "B", "D", "N", "threads"):
        linear = own["linear"]
        beyond = [
            own[name]["status"] if own[name]["peak_mb"] is None else f"{own[name]['mb_beyond_linear']:.0f}"
            for name in names
        ]
        lines.append([_size(linear), f"{linear['one_bd_and_one_dn_mb']:.0f}", *beyond])
    text = (
        "**Peak memory** of training steps beyond what `nn.Linear` needs, in MB, beside one [B, D] and one [D, N] of "
    )
    return text + "float32:\n\n" + _table(["(B, D, N)", "one [B, D] and one [D, N]", *names], lines)


def _training(blocks: list[Block]) -> str:
    lines = []
    for row in (row for row in _rows(blocks) if row["ms"] is not None):
        gaps = [_gap(row, curve) for curve in ("loss", "wt_sim")]
        seconds = row["ms"] * row.get("steps", 1) / 1e3  # of an epoch ms are those of all its steps
        what = f"{row['steps']:,} steps" if row["question"] == "training" else "one epoch"
        if row["question"] == "autoencoder":
            what = f"one step, {row['mode']}"
        taken = f"{seconds:.1f}" if seconds >= 0.1 else f"{seconds:.2g}"
        lines.append([what, row["contestant"], row.get("data", "random"), taken, _ratio(row), *gaps])
    text = "**Training** the autoencoder (128 images a batch, 64 features). Distance: of the median curve to the "
    text += "reference's, mean over steps; spread: between the reference's seeds.\n\n"
    headings = ["", "encoder", "data", "seconds", "over `nn.Linear`", "loss: distance / spread", "wt_sim"]
    text += _table(headings, lines)
    for block in blocks:
        if block.question == "training":
            picture = block.path.with_name(f"{block.path.stem}-training.png")
            text += _picture("Loss and similarity of the same training on every backend", picture)
    return text


def _gap(row: Row, curve: str) -> str:
    """How far a curve lies from the reference's; empty for that itself, and for plain training."""
    distance = row.get(f"{curve}_distance")
    return (
        "" if distance is None or row["contestant"] == "reference" else f"{distance:.4f} / {row[f'{curve}_spread']:.4f}"
    )


def _scaling(blocks: list[Block]) -> str:
    text = "**Scaling**: milliseconds and megabytes grow as the size to the power of (fitted to the three largest "
    text += "sizes measured), and where it ended.\n\n"
    lines = []
    for block in blocks:
        axis = block.question[-1].upper()
        for name in _measured(block.rows, "ms"):
            own = [row for row in block.rows if row["contestant"] == name]
            powers = block.record["exponents"].get(name, {})
            last = max(own, key=lambda row: (row["ms"] is not None, row[axis]))
            failed = next((row for row in own if row["ms"] is None), None)
            ended = "" if failed is None else f"{failed['status']} at {axis} = {failed[axis]:,}"
            largest = f"{axis} = {last[axis]:,}", _ratio(last)
            lines.append([axis, name, powers.get("ms"), powers.get("peak_mb"), *largest, ended])
    headings = ["growing", "contestant", "ms", "MB", "largest measured", "over `nn.Linear` there", "ended by"]
    text += _table(headings, lines)
    for block in blocks:
        picture = block.path.with_suffix(".png")
        text += _picture(f"A training step as {block.question[-1].upper()} grows", picture)
    return text


def _picture(text: str, path: Path) -> str:
    if not path.exists():
        raise DamagedFile(f"no picture {path} beside its record: measure again, or delete the record")
    return f"\n\n![{text}]({path.name})"


def _selection(blocks: list[Block]) -> str:
    rows = _rows(blocks)
    names = _measured(rows, "ms")
    groups = _together(rows, "B", "D", "N", "threads")
    lines = [[_size(own[names[0]]), *(_ratio(own[name], "ratio_to_reference") for name in names)] for own in groups]
    text = "**Peers: choosing samples** with torch's own sorts, over the reference (equal choices):\n\n"
    return text + _table(["(B, D, N)", *names], lines)


def _peers(blocks: list[Block], cells: Callable[[Row], list[Any]]) -> list[list[Any]]:
    """A line for each peer: its four cells and what differs, or why it is absent."""
    return [
        [row["contestant"], *cells(row), row["difference"]]
        if row["ms"] is not None
        else [row["contestant"], *[None] * 4, row["status"]]
        for row in _rows(blocks)
    ]


def _som(blocks: list[Block]) -> str:
    def cells(row: Row) -> list[Any]:
        in_use = f"{row['units_in_use']} of {row['D']}"
        return [f"{row['ms'] / 1e3:.1f}", row["quantization_error"], row["best_cosine"], in_use]

    text = "**Peers: an epoch of a self-organizing map** of the same size on the same images, judged by held-out ones "
    text += "(mean distance to the nearest unit, mean cosine of the best, units that are a nearest):\n\n"
    headings = ["", "seconds", "quantization error", "best cosine", "units in use", "what differs"]
    return text + _table(headings, _peers(blocks, cells))


def _revival(blocks: list[Block]) -> str:
    def cells(row: Row) -> list[Any]:
        revived = f"{row['revived']} of {row['dead']}"
        return [row["ms"], revived, row["half_revived_after"], row["quantization_error"]]

    text = "**Peers: reviving dead units.** Half of the units start where they serve no image; after an epoch:\n\n"
    headings = ["", "ms per step", "revived", "half of them after steps", "quantization error", "what differs"]
    return text + _table(headings, _peers(blocks, cells))


def _monitor(blocks: list[Block]) -> str:
    lines = []
    for own in _together(_rows(blocks), *"BDN"):
        between = _ratio(own["between"], "ratio_to_unmonitored")
        lines.append([_size(own["between"]), own["unmonitored"]["ms"], between, own["measured"]["ms"]])
    text = "**A `Monitor`** around training steps of the fastest backend, and Adam:\n\n"
    headings = ["(B, D, N)", "ms a step without", "between measured steps, over it", "ms a measured step"]
    return text + _table(headings, lines)


ANSWERS: dict[tuple[str, ...], Callable[[list[Block]], str]] = {
    ("step", "overhead"): _steps,
    ("scale-d", "scale-b"): _scaling,
    ("stages", "neighbors", "rank"): _stages,
    ("memory",): _memory,
    ("autoencoder", "epoch", "training"): _training,
    ("monitor",): _monitor,
    ("selection",): _selection,
    ("som-epoch",): _som,
    ("revival",): _revival,
}
TABLES = {question for questions in ANSWERS for question in questions}


# --- The command ------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the records and their page")
    parser.add_argument("--readme", type=Path, default=FOLDER.parents[1] / "README.md", help="with the markers")
    parser.add_argument("--check", action="store_true", help="write nothing, only tell what is not up to date")
    options = parser.parse_args()
    try:
        pages = {options.folder / "README.md": page(options.folder)}
        readme = options.readme.read_text(encoding="utf-8")
        if BEGIN in readme:
            pages[options.readme] = updated(readme, options.folder)
        stale = [path for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
        for path in stale:
            print(f"{'not up to date' if options.check else 'written'}: {path}")
            if not options.check:
                with replacing(path) as part:
                    part.write_text(pages[path], encoding="utf-8")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
