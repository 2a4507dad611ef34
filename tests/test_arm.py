"""The C++ library on ARM: cross-compiled, and run in an emulator on calls whose results the reference has written down.

The same program, made by GCC and by Clang, runs on this processor, where it must find what is planted.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import replay
from helpers.cpu_builds import over_instruction_sets, widest

from bcl_fast import cpu, native

COMPILER, CROSS = shutil.which("g++"), shutil.which("aarch64-linux-gnu-g++")
CLANG = shutil.which("clang++")
EMULATOR, OBJDUMP = shutil.which("qemu-aarch64-static"), shutil.which("aarch64-linux-gnu-objdump")
LIBRARIES = Path("/usr/aarch64-linux-gnu")  # where the cross-compiler's packages put what programs load

needs_cross = pytest.mark.skipif(CROSS is None, reason="no aarch64-linux-gnu-g++ (package g++-aarch64-linux-gnu)")
needs_emulator = pytest.mark.skipif(EMULATOR is None, reason="no qemu-aarch64-static (package qemu-user-static)")


@pytest.fixture(scope="module")
def program():
    """The program for this processor."""
    if COMPILER is None:
        pytest.skip("no g++")
    return replay.build(COMPILER, "-O1", "-Werror")


@pytest.fixture(scope="module")
def clang_s():
    """The same, made by Clang, which warns of the order of flags."""
    if CLANG is None:
        pytest.skip("no clang++ (package clang)")
    try:
        return replay.build(CLANG, "-O1")
    except subprocess.CalledProcessError:
        return replay.build(CLANG, "-O1", "-fno-openmp")  # it may have no runtime (package libomp-dev)


@pytest.fixture(scope="module")
def arm():
    """The program for ARM, as setup.py would compile the library there."""
    return replay.build(CROSS, "-Werror")


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    return replay.write(tmp_path_factory.mktemp("calls") / "calls", replay.cases())


def run(*words, **environment):
    done = subprocess.run(list(map(str, words)), env=os.environ | environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@needs_cross
@needs_emulator
def test_arm_chooses_as_the_reference(arm, calls):
    code, output = run(EMULATOR, "-L", LIBRARIES, arm, calls)
    assert code == 0 and re.fullmatch(r"[1-9]\d+ cases, 0 differences, baseline\n", output), output[-3000:]


@over_instruction_sets()
@pytest.mark.parametrize("compiler", ["program", "clang_s"])
def test_this_processor_chooses_as_the_reference(request, calls, compiler, isa):
    """Where nobody asks for an instruction set the widest is taken."""
    asked = "" if isa == widest() else isa
    code, output = run(request.getfixturevalue(compiler), calls, BCL_FAST_ISA=asked)
    assert code == 0 and re.fullmatch(rf"[1-9]\d+ cases, 0 differences, {isa}\n", output), output[-3000:]


# --- What the program finds -------------------------------------------------------------------------------------------

RANDOM = replay.columns("random", 67, 19)
ONE = {
    "neighbors": replay.neighbors("planted", RANDOM[:19], 3),
    "competition": replay.competition("planted", RANDOM, 3),
    "inverse_norm": replay.inverse_norm("planted", RANDOM),
    "selection": replay.selection("planted", RANDOM, None, weighting="soft"),
    "targets": replay.targets("planted", torch.float64, True, True),
    "gradient": replay.gradient("planted", RANDOM, RANDOM),
    "rank": replay.rank("planted", RANDOM),
}
RESULTS = [
    (stage, name)
    for stage, case in ONE.items()
    for name, value in case.fields.items()
    if type(value) is replay.Result and value.judged
]


@pytest.mark.parametrize("stage, field", RESULTS)
def test_a_wrong_expectation_is_found(program, tmp_path, stage, field):
    case = ONE[stage]
    assert run(program, replay.write(tmp_path / "calls", [case]))[0] == 0
    suffix = "f64" if case.dtype == torch.float64 else "f32"
    for nan in (False, True)[: 1 + case.fields[field].right.is_floating_point()]:
        code, output = run(program, replay.write(tmp_path / "calls", [case.wrong(field, nan)]))
        told = re.match(rf"{stage}_{suffix}, planted.*: {field} (differs in 1 of|is off by) ", output)
        assert code == 1 and told, output


@needs_cross
@needs_emulator
def test_a_wrong_expectation_is_found_on_arm(arm, tmp_path):
    wrong = [ONE["selection"].wrong("rows"), ONE["competition"].wrong("win_rate")]
    code, output = run(EMULATOR, "-L", LIBRARIES, arm, replay.write(tmp_path / "calls", wrong))
    assert code == 1 and re.search(r"^selection_f32, planted.*: rows differs in 1 of 95 elements", output, re.M)
    assert re.search(r"^competition_f32, planted.*: win_rate is off by 1.0e-03, allowed are 1.0e-05$", output, re.M)
    assert output.endswith("2 cases, 2 differences, baseline\n")


def test_a_file_that_is_not_understood_is_no_success(program, tmp_path):
    case = ONE["rank"]
    whole = replay.write(tmp_path / "whole", [case]).read_bytes()
    less = case._replace(fields={name: value for name, value in case.fields.items() if name != "D"})
    beyond = case._replace(fields=case.fields | {"rank": replay.Result(case.fields["rank"].right.view(-1)[:-1])})
    for file, told in (
        (whole[:-1], "the file ends early"),
        (whole + b"1", "the file goes on"),
        (b"1" + whole[1:], "the file is of another kind"),
        (less, "not all fields"),
        (case._replace(stage="rang"), "no stage rang"),
    ):
        path = tmp_path / "calls"
        path.write_bytes(file) if isinstance(file, bytes) else replay.write(path, [file])
        code, output = run(program, path)
        assert code == 2 and told in output
    code, output = run(program, replay.write(tmp_path / "calls", [beyond]))
    assert code == 1 and "rank is written beyond its ends" in output
    assert run(program, replay.write(tmp_path / "calls", []))[0] == 1


# --- Fused instructions -----------------------------------------------------------------------------------------------

# Compilers fuse a product and a sum where a processor can, and round once. What decides choices is never such a pair;
# these functions, whose sums are judged by a budget, may hold them.
SMOOTH = (
    "target_rows",
    "compete_rows",
    "competition",
    "inverse_norm",
    "inverse_norm_of",
    "inverse_norm_of_huge",
    "mask_rows",
    "per_feature",
    "share",
)
FUSED = re.compile(r"\t(fmla|fmls|fn?madd|fn?msub|vfn?m(add|sub)\w+)\s")


def fused_in(objdump, program):
    """The functions of the stages that hold fused multiply-adds."""
    code, text = run(objdump, "-dC", "--no-show-raw-insn", program)
    assert code == 0
    found, function = set(), None
    for line in text.splitlines():
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            name = re.search(r"bcl::\(anonymous namespace\)::(\w+)", header[1])
            function = name and name[1]
        elif function and FUSED.search(line):
            found.add(function)
    return found


@needs_cross
@pytest.mark.skipif(OBJDUMP is None, reason="no aarch64-linux-gnu-objdump (package binutils-aarch64-linux-gnu)")
def test_no_choice_is_made_by_a_fused_instruction_on_arm(arm):
    found = fused_in(OBJDUMP, arm)
    assert {"target_rows", "compete_rows"} <= found <= set(SMOOTH)


@pytest.mark.skipif(shutil.which("objdump") is None or cpu.missing() is not None, reason="no objdump, or no library")
def test_no_choice_is_made_by_a_fused_instruction_here():
    """In the library that serves here, as it was built."""
    found = fused_in("objdump", native.cpu()._name)
    assert found <= set(SMOOTH)
    if os.uname().machine in ("x86_64", "aarch64"):
        assert {"target_rows", "compete_rows"} <= found
