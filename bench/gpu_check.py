"""Everything that only a GPU can show, from a checkout with nothing installed: `python bench/gpu_check.py --out FILE`.

In this order: the CUDA library, built where nvcc is; the ceilings of the device; every stage of `triton` and `cuda` at
real sizes against the reference by the exactness contract; the tests of the stages and of the layer on the device; the
stages and the whole step timed, with the fraction of the roof each reaches; ranks a second; small sizes under
compute-sanitizer where it is installed. FILE (JSON) is rewritten after each part, so that whatever ends the run early
leaves what was found. Takes under eight minutes; exits with 1 if anything failed.
"""

import argparse
import functools
import itertools
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

from bcl_fast import ops  # noqa: E402
from bcl_fast.environment import environment  # noqa: E402
from bcl_fast.measure.clocks import median_ms, window  # noqa: E402
from bcl_fast.measure.contestants import Size, build  # noqa: E402
from bcl_fast.measure.floor import Ceilings, ceilings  # noqa: E402
from bcl_fast.measure.stages import check_stages, stage_times  # noqa: E402
from bcl_fast.measure.steps import step_times  # noqa: E402
from bcl_fast.records import write_record  # noqa: E402

EQUAL = [(128, 64, 784), (1000, 777, 501), (1024, 4096, 784), (8192, 8192, 784)]
TIMED = [(128, 64, 784), (1024, 4096, 784), (8192, 8192, 784)]
LARGE = [(65536, 16384, 784)]  # without the reference: its [B, D, k] alone takes 34 GB
RANKED = [(128, 8192), (4096, 4096), (65536, 1024)]  # B, D
SANITIZED = "(37-64 or 7-5) and {} and not any_shape"  # small sizes: the sanitizer is a hundred times slower
SANITIZERS = {"triton memcheck": "memcheck", "cuda memcheck": "memcheck", "cuda racecheck": "racecheck"}
CHECKS = ("build", "tests", *SANITIZERS)
TESTS = ["tests/test_stages.py", "tests/test_gpu.py", "tests/test_cuda.py"]


def library() -> dict[str, Any]:
    """The CUDA library beside the package, as `pip install` would build it."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"BCL_FAST_EXT": "cuda"})
    return {"exit": done.returncode, "output": (done.stdout + done.stderr)[-2000:]}


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


def serving(device: str) -> list[str]:
    return [name for name in ops.ON_GPU if ops.why_not(name, device) is None]


def contract(device: str, sizes: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    rows = []
    for size, backend in itertools.product(sizes, serving(device)):
        row: dict[str, Any] = {"backend": backend, **dict(zip("BDN", size, strict=True))}
        try:
            row["errors"] = check_stages(Size(*size), [backend], device)[backend]
        except (AssertionError, torch.OutOfMemoryError) as error:
            row["failed"] = str(error)
        rows.append(row)
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def timed(device: str, roof: Ceilings, sizes: list[tuple[int, int, int]], **amount: float) -> dict[str, Any]:
    """Stages and whole steps, beside their floors."""
    stages, steps = [], []
    for size in (Size(*size) for size in sizes):
        stages += stage_times(size, roof, device=device)
        steps += step_times(size, roof, device=device, **amount)
    return {"stages": stages, "steps": steps}


def large(device: str, roof: Ceilings, sizes: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Steps too large for the reference: `nn.Linear` and the kernels alone, and their peak memory."""
    rows = []
    for size in (Size(*size) for size in sizes):
        for name in ("linear", *serving(device)):
            row = {"contestant": name, **asdict(size), "floor_ms": roof.step_ms(size)}
            try:
                torch.cuda.reset_peak_memory_stats()
                contestant = build(name, size, device=device)
                if contestant.refresh is not None:
                    contestant.refresh()
                contestant.step()
                row["ms"] = window(contestant.step, 1.0, device)
                row["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
            except torch.OutOfMemoryError:
                row["failed"] = "out of memory"
            rows.append(row)
            contestant = None
            torch.cuda.empty_cache()
    return rows


def ranked(device: str, sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Ranks a second of every way to them; CUB's sort alone is what the C++ stands on for large B."""
    from bcl_fast import cuda

    rows = []
    for B, D in sizes:
        key = torch.randn(B, D, device=device)
        ways: dict[str, Callable[[], Any]] = {
            "argsort of argsort": lambda key=key: key.argsort(dim=0, stable=True).argsort(dim=0, stable=True),
            "torch.sort": lambda key=key: key.sort(dim=0, stable=True),
            **{name: functools.partial(ops.stage("rank", name), key) for name in serving(device)},
        }
        expected = ways["argsort of argsort"]()
        for name in serving(device):
            assert ways[name]().equal(expected), f"{name}: ranks of ({B}, {D}) are wrong"
        if "cuda" in serving(device):
            columns = key.T.contiguous().view(torch.int32)
            ways["CUB segmented sort"] = lambda columns=columns: cuda.sort_segments(columns)
        for name, way in ways.items():
            ms = median_ms(way, device)
            rows.append({"way": name, "B": B, "D": D, "ms": ms, "gkeys_per_s": B * D / ms / 1e6})
    return rows


def show(report: dict[str, Any]) -> None:
    """The report as tables."""
    print("\nceilings:", {name: round(value, 1) for name, value in report["ceilings"].items()})
    for row in report["contract"]:
        worst = max(row.get("errors", {"": 0.0}).values())
        outcome = row.get("failed") or f"equal, largest error {worst:.1e}"
        print(f"{row['backend']:6} ({row['B']}, {row['D']}, {row['N']}): {outcome}")
    for name in CHECKS:
        if name in report:
            print(f"{name}: exit {report[name].get('exit')}, {report[name].get('output', '').strip()[-200:]}")
    timed = report.get("timed", {"stages": [], "steps": []})
    for row in (row for row in timed["stages"] if row["ms"] is not None):
        of_reference = row["ratio_to_reference"] or 1
        print(f"{row['B']:6} {row['D']:6} {row['N']:5} {row['stage']:14} {row['contestant']:10} {row['ms']:10.4f} ms"
              f" {of_reference:8.4f} references {row['fraction_of_roof']:6.1%} of the roof")  # fmt: skip
    for row in (row for row in timed["steps"] if row["ms"] is not None):
        print(f"{row['B']:6} {row['D']:6} {row['N']:5} step {row['contestant']:10} {row['ms']:10.4f} ms"
              f" {row['ratio_to_linear']:8.2f} linear {row['ms'] / row['floor_ms']:6.2f} floors")  # fmt: skip
    for row in report.get("ranked", []):
        print(f"{row['B']:6} {row['D']:6} rank {row['way']:20} {row['ms']:10.4f} ms {row['gkeys_per_s']:8.2f} Gkeys/s")
    for row in report.get("large", []):
        print({name: value if isinstance(value, (str, int)) else round(value, 2) for name, value in row.items()})


def wrong(report: dict[str, Any]) -> list[str]:
    """What failed, by name of the part."""
    parts = [name for name in CHECKS if report.get(name, {}).get("exit", 0) != 0]
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
    report: dict[str, Any] = {"environment": environment()}
    if not options.rehearse and shutil.which("nvcc"):
        report["build"] = library()
    roof = ceilings(device)
    report["ceilings"] = asdict(roof)
    tiny = [(16, 8, 12)]
    parts: dict[str, Callable[[], Any]] = {
        "contract": lambda: contract(device, tiny if options.rehearse else EQUAL),
        "tests": lambda: pytest(*TESTS, "-k", "triton or cuda or gpu" if not options.rehearse else "moves_between"),
        "timed": lambda: timed(
            device, roof, tiny if options.rehearse else TIMED, **(dict(rounds=1, seconds=0) if options.rehearse else {})
        ),
    }
    parts["ranked"] = lambda: ranked(device, [(16, 8)] if options.rehearse else RANKED)
    if not options.rehearse:
        parts["large"] = lambda: large(device, roof, LARGE)
        if sanitizer := shutil.which("compute-sanitizer"):
            for name, tool in SANITIZERS.items():
                words = TESTS[0], "-k", SANITIZED.format(name.partition(" ")[0])
                prefix = sanitizer, "--tool", tool, "--error-exitcode", "9"
                parts[name] = functools.partial(pytest, *words, prefix=prefix, limit=45)
    for name, part in parts.items():
        started = time.monotonic()
        report[name] = part()
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        write_record(options.out, report)
    show(report)
    failed = wrong(report)
    print("wrong:", ", ".join(failed) if failed else "nothing")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
