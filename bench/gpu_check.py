"""Everything that only a GPU can show, from a checkout with nothing installed: `python bench/gpu_check.py --out FILE`.

In this order: the ceilings of the device; every stage at real sizes against the reference by the exactness contract;
the tests of the stages and of the layer on the device; the stages and the whole step timed, with the fraction of the
roof each reaches; small sizes under compute-sanitizer where it is installed. FILE (JSON) is rewritten after each part,
so that whatever ends the run early leaves what was found. Takes under eight minutes; exits with 1 if anything failed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bcl_fast import measure, ops  # noqa: E402
from bcl_fast.environment import environment  # noqa: E402

EQUAL = [(128, 64, 784), (1000, 777, 501), (1024, 4096, 784), (8192, 8192, 784)]
TIMED = [(128, 64, 784), (1024, 4096, 784), (8192, 8192, 784)]
LARGE = [(65536, 16384, 784)]  # without the reference: its [B, D, k] alone takes 34 GB
SANITIZED = "(37-64 or 7-5) and triton and not any_shape"  # small sizes: the sanitizer is a hundred times slower
TESTS = ["tests/test_stages.py", "tests/test_gpu.py"]


def pytest(*words: str, prefix: tuple[str, ...] = (), limit: int = 150) -> dict[str, Any]:
    """The tests in a process of their own, within `limit` seconds."""
    command = [*prefix, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    started = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        code, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        code, output = "timeout", (error.stdout or b"").decode(errors="replace")
    return {"command": " ".join(command), "exit": code, "s": time.monotonic() - started, "output": output[-3000:]}


def contract(device: str, sizes: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    rows = []
    for size in sizes:
        row: dict[str, Any] = dict(zip("BDN", size, strict=True))
        try:
            row["errors"] = measure.check_stages(measure.Size(*size), "triton", device)
        except (AssertionError, torch.OutOfMemoryError) as error:
            row["failed"] = str(error)
        rows.append(row)
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def timed(device: str, roof: measure.Ceilings, sizes: list[tuple[int, int, int]], **amount: int) -> dict[str, Any]:
    """Stages and whole steps; a step also against its floor: what all of its stages and products must take."""
    stages, steps = [], []
    for size in (measure.Size(*size) for size in sizes):
        stages += measure.stage_times(size, device=device, roof=roof)
        floor = sum(roof.floor_ms(size).values())
        for row in measure.step_times(size, device=device, **amount):
            steps.append(asdict(row) | {"times_the_floor": row.ms / floor if row.contestant != "linear" else None})
    return {"stages": stages, "steps": steps}


def large(device: str, roof: measure.Ceilings, sizes: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Steps too large for the reference: `nn.Linear` and Triton alone, and their peak memory."""
    rows = []
    for size in (measure.Size(*size) for size in sizes):
        for name in ("linear", "triton"):
            row = {"contestant": name, **asdict(size), "floor_ms": sum(roof.floor_ms(size).values())}
            try:
                torch.cuda.reset_peak_memory_stats()
                _, step = measure.contestants(device)[name](size, None)
                step()
                row["ms"] = measure.window(step, 10, device)
                row["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
            except torch.OutOfMemoryError:
                row["failed"] = "out of memory"
            rows.append(row)
            step = None
            torch.cuda.empty_cache()
    return rows


def show(report: dict[str, Any]) -> None:
    """The report as tables."""
    print("\nceilings:", {name: round(value, 1) for name, value in report["ceilings"].items()})
    for row in report["contract"]:
        worst = max(row.get("errors", {"": 0.0}).values())
        print(f"({row['B']}, {row['D']}, {row['N']}): {row.get('failed') or f'equal, largest error {worst:.1e}'}")
    for name in ("tests", "sanitizer"):
        if name in report:
            print(f"{name}: exit {report[name].get('exit')}, {report[name].get('output', '').strip()[-200:]}")
    for row in report.get("timed", {}).get("stages", []):
        roof, gain = row["fraction_of_roof"], row["times_faster_than_reference"]
        print(f"{row['B']:6} {row['D']:6} {row['N']:5} {row['stage']:14} {row['contestant']:10} {row['ms']:10.4f} ms"
              f" {gain:8.1f}x {'' if roof is None else f'{roof:6.1%} of the roof'}")  # fmt: skip
    for row in report.get("timed", {}).get("steps", []):
        floor = row["times_the_floor"]
        print(f"{row['B']:6} {row['D']:6} {row['N']:5} step {row['contestant']:10} {row['ms']:10.4f} ms"
              f" {row['ratio_to_linear']:8.2f} linear {'' if floor is None else f'{floor:6.2f} floors'}")  # fmt: skip
    for row in report.get("large", []):
        print({name: value if isinstance(value, (str, int)) else round(value, 2) for name, value in row.items()})


def wrong(report: dict[str, Any]) -> list[str]:
    """What failed, by name of the part."""
    parts = [name for name in ("tests", "sanitizer") if report.get(name, {}).get("exit", 0) != 0]
    return parts + ["contract"] * any("failed" in row for row in report["contract"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the report goes, as JSON")
    parser.add_argument("--rehearse", action="store_true", help="the same on the CPU, interpreted, on tiny sizes")
    options = parser.parse_args()
    device = "cpu" if options.rehearse else "cuda"
    reason = ops.why_not("triton", device)
    if reason or (device == "cuda" and not torch.cuda.is_available()):
        parser.error(f"Triton cannot serve on {device!r}: {reason or 'torch sees no GPU'}")
    roof = measure.ceilings(device)
    tiny = [(16, 8, 12)]
    report: dict[str, Any] = {"environment": environment(), "ceilings": asdict(roof)}
    parts: dict[str, Callable[[], Any]] = {
        "contract": lambda: contract(device, tiny if options.rehearse else EQUAL),
        "tests": lambda: pytest(*TESTS, "-k", "triton or gpu" if not options.rehearse else "moves_between"),
        "timed": lambda: timed(
            device, roof, tiny if options.rehearse else TIMED, **(dict(steps=2, rounds=1) if options.rehearse else {})
        ),
    }
    if not options.rehearse:
        parts["large"] = lambda: large(device, roof, LARGE)
        if sanitizer := shutil.which("compute-sanitizer"):
            parts["sanitizer"] = lambda: pytest(
                TESTS[0], "-k", SANITIZED, prefix=(sanitizer, "--tool", "memcheck", "--error-exitcode", "9"), limit=90
            )
    for name, part in parts.items():
        started = time.monotonic()
        report[name] = part()
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        partial = options.out.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, options.out)
    show(report)
    failed = wrong(report)
    print("wrong:", ", ".join(failed) if failed else "nothing")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
