"""The README is true: its Python blocks run, its commands and options exist, its numbers are those of the records."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bcl_fast.measure import results

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def commands():
    """Every `python -m bcl_fast ...` of the README as a list of words."""
    found = re.findall(r"python -m bcl_fast ([^`\n]*)", README)
    assert len(found) >= 3
    return sorted({line.split("&&")[0].strip() for line in found})


@pytest.mark.parametrize("line", commands())
def test_command_and_its_options_exist(line):
    pytest.importorskip("typer")
    words = shlex.split(line, comments=True)
    command = words[: 2 if words[0] == "bench" else 1]
    help_text = subprocess.run(
        [sys.executable, "-m", "bcl_fast", *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True,
        env={"COLUMNS": "200", "PATH": ""},
    ).stdout  # fmt: skip
    for option in (word for word in words if word.startswith("--")):
        assert option in help_text, option


@pytest.mark.parametrize("name", ["test-command", "main-command"])
def test_marked_commands_are_one_line_each(name):
    """`.ci/run` executes them as they stand."""
    found = re.findall(rf"^<!-- {name} -->\n```sh\n(.*?)^```", README, re.M | re.S)
    assert len(found) == 1 and found[0].count("\n") == 1


TABLES = json.loads((ROOT / "bench" / "results" / "tables.json").read_text(encoding="utf-8"))


def test_counts_of_the_tables_are_those_of_the_committed_record():
    printed = [row for row in TABLES["rows"] if row["printed"]]
    found = {name: [int(n) for n in counts] for name, *counts in
             re.findall(r"^\| `([\w-]+)` \| (\d+) \| (\d+) \| (\d+) \|", README, re.M)}  # fmt: skip
    marks = ("inside", "outside", "not comparable")
    for name in {row["table"] for row in printed}:
        own = [row["mark"] for row in printed if row["table"] == name]
        assert found[name] == [own.count(mark) for mark in marks]
    total = [sum(row["mark"] == mark for row in printed) for mark in marks]
    assert "{} published numbers {} are inside, {} outside, {} not comparable".format(len(printed), *total) in README


def test_fixes_table_is_that_of_the_committed_record():
    cells = {(row["row"], row["column"]): row["mean"] for row in TABLES["rows"] if row["table"] == "fixes"}
    headings, decimals = ("L1", "MSE", "wt_sim", "wt_abscos", "eff. rank", "firing"), (4, 4, 3, 3, 1, 0)
    start = README.index("| condition | " + " | ".join(headings))
    lines = README[start:].split("\n\n")[0].splitlines()[2:]
    assert len(lines) > 20
    for line in lines:
        name, *values = (word.strip() for word in line.strip("|").split("|"))
        for heading, digits, value in zip(headings, decimals, values, strict=True):
            expected = cells.get((name, heading))
            assert value == ("" if expected is None else f"{expected:.{digits}f}"), (name, heading)


RESULTS = ROOT / "bench" / "results"


def test_results_are_those_of_the_newest_records():
    """`python -m bcl_fast bench readme bench/results README.md` brings them up to date."""
    assert results.updated(README, RESULTS, ROOT) == README


def test_the_cpu_backend_keeps_its_promise_of_memory():
    block = next(block for block in results.newest(RESULTS) if block.question == "memory")
    kept = [row for row in block.rows if row["contestant"] == "cpu" and row["peak_mb"] is not None]
    assert kept and all(row["mb_beyond_linear"] <= row["one_bd_and_one_dn_mb"] for row in kept)
