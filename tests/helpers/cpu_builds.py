"""Builds of the C++ library beside the one of this checkout, each used in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = """
import sys
from pathlib import Path
from bcl_fast import cpu, cpu_structs, native
native.HERE = Path(sys.argv.pop(1))
"""
TESTS = """
import pytest
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""
DOCTOR = """
from bcl_fast.__main__ import main
sys.argv[1:] = ["doctor"]
main()
"""
PROBE = """
import torch
from bcl_fast import cpu, reference as ref
from bcl_fast.testing import columns, compete, neighbors_of, relative_error
assert cpu.instruction_set() == {isa!r}, cpu.instruction_set()
for B, D in ((1, 2), (17, 19), (1009, 67)):
    a, near, need = columns("random", B, D), neighbors_of(D, 8), torch.rand(B)
    got, own = (compete(module.competition, a, near) for module in (cpu, ref))
    assert got.winner.equal(own.winner) and max(map(relative_error, got, own)) <= 1e-5
    for rule in ("rank", "cosine"):
        arguments = a, None, torch.ones(B), torch.ones(D), need, rule, "hard", 5
        assert cpu.selection(*arguments)[0].sort().values.equal(ref.selection(*arguments)[0].sort().values)
    assert cpu.rank(a).equal(ref.rank(a))
"""


def instruction_sets() -> dict[str, bool]:
    """Every instruction set that the stages are compiled for, narrow ones first -> whether this processor has it."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        flags = ""
    needs = {"baseline": "", "avx2": " avx2 ", "avx512": " avx512dq "}
    return {isa: flag in flags for isa, flag in needs.items()}


def widest() -> str:
    """The instruction set that a library takes here where nobody asks for one."""
    return [isa for isa, here in instruction_sets().items() if here][-1]


def over_instruction_sets():
    """Every test that takes `isa` runs with every copy of the stages that this processor can take."""
    return pytest.mark.parametrize(
        "isa",
        [
            pytest.param(isa, marks=pytest.mark.skipif(not here, reason=f"this processor has no {isa}"))
            for isa, here in instruction_sets().items()
        ],
    )


def build(folder: Path, compiler: str, refused: str = "") -> Path:
    """The folder of the library as setup.py builds it, quickly, with a compiler that may have to refuse a word."""
    stand_in = folder / "compiler"
    refuse = f'for word; do if [ "$word" = "{refused}" ]; then exit 1; fi; done\n' if refused else ""
    stand_in.write_text(f'#!/bin/sh\n{refuse}exec {compiler} "$@" -O1\n')
    stand_in.chmod(0o755)
    words = (
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--force",
        "--build-lib",
        folder,
        "--build-temp",
        folder / "o",
    )
    chosen = {"CC": str(stand_in), "CXX": str(stand_in), "BCL_FAST_EXT": "cpu"}
    done = subprocess.run(words, cwd=ROOT, env=os.environ | chosen, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "bcl_fast"


def python(folder: Path, code: str, *words: str, **environment: str) -> tuple[int, str]:
    """The exit code and output of a process that takes the library of this folder."""
    command = [sys.executable, "-c", HERE + code, folder, *words]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr
