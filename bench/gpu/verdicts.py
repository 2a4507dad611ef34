"""Verdicts: what the rows of a check come to, in a few lines, and which goals they reach."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from bcl_fast.measure.floor import Ceilings, work
from bcl_fast.measure.implementations import Size
from bcl_fast.measure.rows import OK, Row

from .units import FAILED, TIMED_OUT
from .variants import IN_USE

BAD = (FAILED, TIMED_OUT)
OF_FLOOR, OF_READ, OF_ARGSORT, OF_LINEAR = 1.5, 1.5, 5.0, 3.0  # the goals
LAUNCH_BOUND = 10**6  # elements [B, D] below which a step is a matter of launches
GRAPHED = "graphed"  # the mode of a user's step, with a loss and an optimizer
LONGEST = 5  # kernels that are shown of each step


def saved(path: Path) -> list[Row]:
    """The rows of a bench's record, without those that were not measured; `status` is how each went."""
    return [row | {"status": OK} for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if row["status"] == OK]


def of(rows: Iterable[Row], part: str, *keys: str) -> list[Row]:
    """The rows of a part that have these keys; of a unit that ran twice, those of its last run."""
    found: dict[str, list[Row]] = {}
    closed: set[str] = set()
    for row in rows:
        if row["part"] != part:
            continue
        if row["unit"] in closed:
            found[row["unit"]] = []
            closed.discard(row["unit"])
        found.setdefault(row["unit"], []).append(row)
        if "closing" in row:
            closed.add(row["unit"])
    return [row for own in found.values() for row in own if all(row.get(key) is not None for key in keys)]


def size_of(row: Row) -> Size:
    return Size(row["B"], row["D"], row["N"])


def roof(rows: Sequence[Row]) -> Ceilings | None:
    measured = of(rows, "ceilings", "copy_gbs")
    return Ceilings(**{name: measured[-1][name] for name in Ceilings.__annotations__}) if measured else None


def floor_of(row: Row, ceilings: Ceilings | None) -> float | None:
    """The floor of the step that a row timed, in its precision, where that was measured; a user's step has more."""
    try:
        return None if row["mode"] == GRAPHED else ceilings and ceilings.step_ms(size_of(row), row["precision"])
    except ValueError:
        return None


# --- Goals ------------------------------------------------------------------------------------------------------------


def goals(rows: Sequence[Row], sizes: Sequence[Size]) -> Iterator[tuple[str, float, float]]:
    """What was wanted, what was found, and its limit; of ranks the least, of all others the most."""
    ceilings = roof(rows)
    steps = of(rows, "steps", "mode", "ms")
    for size in sizes:
        for weights in ("init", "trained"):
            own = [row for row in steps if size_of(row) == size and row["mode"] != GRAPHED]
            own = [row for row in own if (row["weights"], row["precision"]) == (weights, "fp32")]
            if size.B * size.D >= LAUNCH_BOUND and own and ceilings:
                best = min(row["ms"] for row in own)
                yield f"step {size} {weights} fp32 / floor", best / ceilings.step_ms(size), OF_FLOOR
            captured = [row["ratio_to_linear"] for row in own if row["mode"] == "captured"]
            if size.B * size.D < LAUNCH_BOUND and captured:
                yield f"captured step {size} {weights} / captured nn.Linear", min(captured), OF_LINEAR
    for row in of(rows, "kernels", "stage", "ms"):
        if row["stage"] == "selection" and size_of(row).B * size_of(row).D >= LAUNCH_BOUND and ceilings:
            read = work(size_of(row))["selection"].moved / ceilings.copy_gbs / 1e6
            yield f"selection {row['contestant']} {size_of(row)} {row['weights']} / one read", row["ms"] / read, OF_READ
    ranked = of(rows, "ranks", "gkeys_per_s")
    for size in dict.fromkeys(map(size_of, ranked)):
        taken = {row["contestant"]: row["ms"] for row in ranked if size_of(row) == size}
        ours = [taken[name] for name in ("triton", "cuda") if name in taken]
        if ours and size.B * size.D >= LAUNCH_BOUND:
            yield f"ranks {size}: argsort of argsort / ours", taken["argsort of argsort"] / min(ours), OF_ARGSORT


def reached(found: float, limit: float) -> bool:
    return found >= limit if limit == OF_ARGSORT else found <= limit


# --- The table at the end ---------------------------------------------------------------------------------------------


def summary(rows: Sequence[Row], sizes: Sequence[Size]) -> str:
    lines = [*_ceilings(rows), *_kernels(rows), *_variants(rows), *_steps(rows), *_ranks(rows), *_large(rows)]
    lines += [*_strayed(rows), *_compiled(rows), *_failures(rows), *_counts(rows)]
    for goal, found, limit in goals(rows, sizes):
        sign = ">=" if limit == OF_ARGSORT else "<="
        lines.append(f"{'reached' if reached(found, limit) else 'MISSED ':8} {goal}: {found:.2f} ({sign} {limit:g})")
    return "\n".join(lines)


def _ceilings(rows: Sequence[Row]) -> Iterator[str]:
    if found := roof(rows):
        yield "ceilings: " + ", ".join(f"{name} {value:.4g}" for name, value in asdict(found).items() if value)


def _kernels(rows: Sequence[Row]) -> Iterator[str]:
    """The stages of a step in one line, then its longest kernels."""
    for unit, own in _by_unit(of(rows, "kernels", "ms")):
        stages = ", ".join(f"{row['stage']} {row['ms']:.4f}" for row in own if "stage" in row)
        longest = [row for row in own if "kernel" in row][:LONGEST]
        shown = ", ".join(f"{row['kernel'][:24]} {row['ms']:.4f}" for row in longest)
        yield f"{unit}: {stages + '; ' if stages else ''}kernels {shown}"


def _by_unit(rows: Iterable[Row]) -> Iterator[tuple[str, list[Row]]]:
    units: dict[str, list[Row]] = {}
    for row in rows:
        units.setdefault(row["unit"], []).append(row)
    yield from units.items()


def _variants(rows: Sequence[Row]) -> Iterator[str]:
    for unit, own in _by_unit(of(rows, "variants", "ms")):
        for weights in ("init", "trained"):
            taken = {row["variant"]: row["ms"] for row in own if row["weights"] == weights}
            if taken:
                shown = ", ".join(
                    f"{name} {ms:.4f}" for name, ms in sorted(taken.items(), key=lambda item: item[1])[:3]
                )
                yield f"{unit} {weights}: {IN_USE} {taken.get(IN_USE, float('nan')):.4f}; best {shown}"


def _steps(rows: Sequence[Row]) -> Iterator[str]:
    ceilings = roof(rows)
    for row in of(rows, "steps", "mode", "ms"):
        floor = floor_of(row, ceilings)
        of_floor = f"{row['ms'] / floor:.2f}" if floor else "-"
        yield (
            f"step {row['contestant']:6} {size_of(row)!s:18} {row['weights']:7} {row['precision']} {row['mode'][:8]:8} "
            f"{row['ms']:9.4f} ms, / floor {of_floor}, / linear {row['ratio_to_linear']:.2f}"
        )


def _strayed(rows: Sequence[Row]) -> Iterator[str]:
    for row in of(rows, "steps", "regret"):
        if row["features"]:
            chose = f"{row['features']} features chose other samples, regret {row['regret']:.1e}"
            yield f"{row['unit']} {row['weights']}: {chose}"


def _ranks(rows: Sequence[Row]) -> Iterator[str]:
    for unit, own in _by_unit(of(rows, "ranks", "gkeys_per_s")):
        yield f"ranks {unit}: " + ", ".join(f"{row['contestant']} {row['gkeys_per_s']:.2f} Gkeys/s" for row in own)


def _large(rows: Sequence[Row]) -> Iterator[str]:
    for unit, own in _by_unit(row for row in of(rows, "large", "ms") if "question" not in row):
        row = own[-1]
        peak = f", {row['peak_mb']:.0f} MB" if row["peak_mb"] else ""
        yield f"large {unit}: {size_of(row)} {row['ms']:.3f} ms{peak}"


def _compiled(rows: Sequence[Row]) -> Iterator[str]:
    if held := of(rows, "contract", "compiled"):
        yield f"contract: {sum(row['compiled'] for row in held)} kernels compiled, with a warm cache none"


def _failures(rows: Sequence[Row]) -> Iterator[str]:
    """Every failure once, with how many others say the same."""
    said: dict[tuple[str, str], list[str]] = {}
    for part in dict.fromkeys(row["part"] for row in rows):
        for row in of(rows, part, "message"):
            if row["status"] in BAD:
                said.setdefault((part, row["message"][:160]), []).append(f"{row['unit']} {row.get('test', '')}".strip())
    for (part, message), (first, *others) in said.items():
        yield f"failed {part}, {first}{f' and {len(others)} others' if others else ''}: {message!r}"


def _counts(rows: Sequence[Row]) -> Iterator[str]:
    for part in dict.fromkeys(row["part"] for row in rows):
        closing = of(rows, part, "closing")
        counts = Counter(row["status"] for row in closing)
        seconds = sum(row["seconds"] for row in closing)
        yield f"{part:10} {seconds:6.0f} s: " + ", ".join(f"{count} {status}" for status, count in counts.items())
