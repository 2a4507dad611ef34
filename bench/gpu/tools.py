"""Tools: pytest, ncu and compute-sanitizer in processes of their own, and what they say as rows."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from bcl_fast.measure.rows import OK, Row

from .units import FAILED, Refused

ROOT = Path(__file__).parents[2]
PYTEST = sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"


def _said(command: Sequence[str], **environment: str) -> tuple[int, str, str]:
    """The exit code of a command, what it printed, and that with its errors, which are printed here too."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)
    print(done.stdout + done.stderr)
    return done.returncode, done.stdout, done.stdout + done.stderr


def pytest(words: Sequence[str], workers: int = 0) -> Iterator[Row]:
    """A row for every test that fails, and one of all, which failed also where nothing passed on several workers."""
    many = ("-n", str(workers)) if workers and importlib.util.find_spec("xdist") else ()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        code = subprocess.run([*PYTEST, f"--junitxml={report}", *many, *words], cwd=ROOT).returncode
        if not report.exists():
            raise RuntimeError(f"pytest ended with {code} and no report")
        cases = list(ElementTree.parse(report).iter("testcase"))
    counts: Counter[str] = Counter()
    for case in cases:
        wrong = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        counts["failed" if wrong is not None else "passed" if case.find("skipped") is None else "skipped"] += 1
        if wrong is not None:
            test = f"{case.get('classname')}::{case.get('name')}"
            yield {"status": FAILED, "test": test, "message": wrong.get("message", "")[:500]}
    works = code == 0 and (counts["passed"] or not workers)
    yield {"status": OK if works else FAILED, "message": f"pytest ended with {code}", **counts}


# --- ncu --------------------------------------------------------------------------------------------------------------

SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "WarpStateStats")
METRICS = re.compile(
    r"gpu__time_duration\.sum|(dram|lts|l1tex)__throughput\.avg\.pct_of_peak_sustained_elapsed"
    r"|sm__warps_active\.avg\.pct_of_peak_sustained_active|launch__registers_per_thread|launch__occupancy_limit_\w+"
    r"|smsp__average_warps?_\w*stall\w*_per_issue_active\.ratio"
)


def ncu(kernel: str, program: Sequence[str]) -> dict[str, float]:
    """What ncu counts of the first launch of a kernel between the program's own profiler start and stop."""
    sections = [word for section in SECTIONS for word in ("--section", section)]
    options = [
        "--clock-control",
        "none",
        "--profile-from-start",
        "off",
        "--launch-count",
        "1",
        "--page",
        "raw",
        "--csv",
    ]
    code, printed, said = _said(["ncu", *options, "--kernel-name", f"regex:^{kernel}$", *sections, *program])
    if found := metrics(printed):
        return found
    if "==ERROR==" in said and "application returned an error" not in said:
        raise Refused(" ".join(line for line in said.splitlines() if "==ERROR==" in line)[:500])
    raise RuntimeError(f"ncu counted nothing (exit {code}): {said[-500:]}")


def metrics(printed: str) -> dict[str, float]:
    """METRICS of the first kernel in what `ncu --page raw --csv` printed: names, units, and a line for each kernel."""
    lines = [line for line in printed.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        return {}
    names, _, values = csv.reader(io.StringIO("\n".join(lines[:3])))
    return {
        name: float(value.replace(",", ""))
        for name, value in zip(names, values, strict=False)
        if METRICS.fullmatch(name) and re.fullmatch(r"[\d.,]+(e[+-]?\d+)?", value)
    }


# --- compute-sanitizer ------------------------------------------------------------------------------------------------

UNABLE = re.compile(r".*(?:[Nn]ot supported|Unable to|Internal Sanitizer Error|Failed to initialize).*")
ERRORS = 9  # the exit code that says that it found some


def sanitizer(tool: str, tests: Sequence[str]) -> Row:
    """What a tool of compute-sanitizer finds in these tests, every allocation apart from all others."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(ERRORS), *PYTEST, *tests]
    code, _, said = _said(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return judged(code, said)


def judged(code: int, said: str) -> Row:
    if code != 0 and (unable := UNABLE.search(said)):
        raise Refused(unable[0][:500])
    own = " ".join(line for line in said.splitlines() if line.startswith("========="))
    return {"status": OK if code == 0 else FAILED, "exit": code, "message": (own or said)[-500:]}
