"""What every bench shares: one thread unless told otherwise, a table at the end, and rows saved as JSON on request."""

import json
import os
import shlex
from pathlib import Path

import pytest
import torch

from bcl_fast.environment import environment

ROWS = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=1, help="torch threads of every bench (default 1)")
    parser.addoption("--save", type=Path, help="write every measured row and the environment to this JSON file")


def pytest_configure(config):
    torch.set_num_threads(config.getoption("--threads"))
    config.stash[ROWS] = []


@pytest.fixture
def rows(request):
    """The list that measured rows (dicts) go to."""
    return request.config.stash[ROWS]


def _text(value):
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    write = terminalreporter.write_line
    write("")
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in ("question", "device")]
    text = [[_text(row.get(key)) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *text]) for i in range(len(columns))]
    for line in [columns, *text]:
        write("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    target = config.getoption("--save")
    if target is not None:
        record = {
            "command": shlex.join(["pytest", *config.invocation_params.args]),
            "environment": environment(),
            "rows": rows,
        }
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, target)
        write(f"saved {len(rows)} rows to {target}")
