"""What every bench shares: `--quick`, one thread unless told otherwise, a table at the end, rows saved on request."""

import os
import shlex
from pathlib import Path

import pytest
import torch
from compare import aligned, text

from bcl_fast.environment import environment
from bcl_fast.experiments.data import load
from bcl_fast.measure.floor import ceilings
from bcl_fast.measure.implementations import Size
from bcl_fast.measure.timing import keep_memory
from bcl_fast.records import write_record

ROWS = pytest.StashKey[list]()
TINY = Size(16, 8, 12)  # what `--quick` measures instead of every size


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="run every bench once on small numbers, to see that it runs")
    parser.addoption("--threads", type=int, default=1, help="torch threads of every bench (default 1)")
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where to measure (default cpu)")
    parser.addoption("--save", type=Path, help="write every measured row and the environment to this JSON file")


def pytest_configure(config):
    torch.set_num_threads(config.getoption("--threads"))
    keep_memory()
    config.stash[ROWS] = []


def pytest_generate_tests(metafunc):
    """A bench that takes `size` runs once for each of the sizes its module names (SIZES); `trained_size`: TRAINED."""
    for name, sizes in (("size", "SIZES"), ("trained_size", "TRAINED")):
        if name in metafunc.fixturenames:
            chosen = [TINY] if metafunc.config.getoption("--quick") else getattr(metafunc.module, sizes)
            metafunc.parametrize(name, chosen, ids=str)


@pytest.fixture(scope="session")
def quick(pytestconfig):
    return pytestconfig.getoption("--quick")


@pytest.fixture(scope="session")
def amount(quick, device):
    """How long the clocks of `measure` run: with --quick once, on a GPU, which nobody shares, few rounds."""
    return dict(rounds=1, seconds=0) if quick else dict(rounds=7) if device == "cuda" else {}


@pytest.fixture(scope="session")
def device(pytestconfig):
    return pytestconfig.getoption("--device")


@pytest.fixture(scope="session")
def roof(device):
    """The ceilings of this device, measured once."""
    return ceilings(device)


@pytest.fixture(scope="session")
def images(quick):
    """MNIST from the folder that BCL_DATA names; scikit-learn's digits with --quick or where that is not set."""
    data = os.environ.get("BCL_DATA")
    return load("digits" if quick or data is None else "mnist", data or "")


@pytest.fixture
def measured(request, benchmark):
    """Call a function of `measure` once; its rows go to the table, to --save, and to pytest-benchmark's own record."""

    def call(function, *arguments, **options):
        rows = benchmark.pedantic(function, arguments, options)
        benchmark.extra_info["rows"] = rows
        request.config.stash[ROWS].extend(rows)
        return rows

    return call


def pytest_terminal_summary(terminalreporter, config):
    rows, write = config.stash[ROWS], terminalreporter.write_line
    for question in dict.fromkeys(row["question"] for row in rows):
        own = [row for row in rows if row["question"] == question]
        hidden = {"question", "difference", "curves"}  # the heading; texts and lists, which only the record holds
        columns = [
            key
            for key in dict.fromkeys(key for row in own for key in row)
            if key not in hidden and any(row.get(key) is not None for row in own)
        ]
        write("")
        write(question)
        for line in aligned([columns, *([text(row.get(key)) for key in columns] for row in own)]):
            write(line)
    target = config.getoption("--save")
    if rows and target is not None:
        command = shlex.join(["pytest", *config.invocation_params.args])
        write_record(target, {"command": command, "environment": environment(), "rows": rows})
        write(f"saved {len(rows)} rows to {target}")
