"""The C++ library as other compilers build it: Clang's copies of the stages, and builds with other threads, or none."""

import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import cpu_builds
from helpers.cpu_builds import DOCTOR, PROBE
from helpers.elf import needs

from bcl_fast import backends, cpu, native

COMPILER, CLANG = shutil.which("g++"), shutil.which("clang++")
LINUX = sys.platform == "linux"
SERVED = cpu.missing() is None


def doctor(folder, **environment):
    """What the row `C++ library` of the doctor says of the library in this folder."""
    pytest.importorskip("typer")
    code, output = cpu_builds.python(folder, DOCTOR, COLUMNS="200", **environment)
    assert code == 0, output
    (row,) = re.findall(r"^C\+\+ library +(.*?) *$", output, re.M)
    return row


# --- Clang ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clang(tmp_path_factory):
    """The folder of the library that Clang builds."""
    if CLANG is None:
        pytest.skip("no clang++ (package clang)")
    return cpu_builds.build(tmp_path_factory.mktemp("clang"), CLANG)


def test_clang_s_library_takes_the_widest_instructions_of_the_processor(clang):
    """That every set chooses as the reference does is in tests/test_arm.py, by the same program as for ARM."""
    code, output = cpu_builds.python(clang, PROBE.format(isa=cpu_builds.widest()), BCL_FAST_ISA="")
    assert code == 0, output


@pytest.mark.skipif(not LINUX or shutil.which("readelf") is None, reason="no readelf, or not Linux")
def test_two_runtimes_in_a_process_are_named(clang):
    """And one that is loaded before all others, which serves torch too, is torch's."""
    own = next((name for name in needs(clang / "_cpu.so") if name.startswith("libomp")), None)
    if own is None:
        assert doctor(clang).endswith(", one thread: built without OpenMP")
        pytest.skip("Clang has no OpenMP (package libomp-dev)")
    assert re.fullmatch(
        rf"\w+ instructions, another OpenMP runtime \({own}\) than torch's \(libgomp.*\)", doctor(clang)
    )
    code, output = cpu_builds.python(clang, "print(cpu.threading())", LD_PRELOAD=own)
    assert code == 0 and output == "OpenMP of torch\n"


# --- Threads ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without_openmp(tmp_path_factory):
    """The folder of the library as a compiler builds it that has no OpenMP."""
    if COMPILER is None:
        pytest.skip("no g++")
    return cpu_builds.build(tmp_path_factory.mktemp("alone"), COMPILER, refused="-fopenmp")


def test_a_library_without_openmp_is_served(without_openmp):
    code, output = cpu_builds.python(without_openmp, PROBE.format(isa=cpu_builds.widest()), BCL_FAST_ISA="")
    assert code == 0, output


def test_a_library_without_openmp_says_so(without_openmp):
    assert re.fullmatch(r"\w+ instructions, one thread: built without OpenMP", doctor(without_openmp))


@pytest.mark.skipif(not SERVED or not LINUX, reason="no C++ library, or not Linux")
def test_the_runtime_is_a_file_of_this_process():
    assert native.library_of(1) is None
    own = native.cpu().bcl_cpu_openmp()
    if own is None or not torch.backends.openmp.is_available():
        pytest.skip("the library, or torch, was built without OpenMP")
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    for runtime in (native.torch_openmp(), native.library_of(own)):
        assert runtime in loaded and re.match(r"lib(gomp|omp|iomp5)\b", Path(runtime).name)


WORDS = {
    (None, "/a/libgomp.so.1"): "one thread: built without OpenMP",
    ("/a/libgomp.so.1", "/a/libgomp.so.1"): "OpenMP of torch",
    ("/a/libgomp.so.1", "/b/libgomp.so.1"): "another OpenMP runtime (/a/libgomp.so.1) than torch's (/b/libgomp.so.1)",
    ("/a/libomp.so.5", "/b/libgomp.so.1"): "another OpenMP runtime (libomp.so.5) than torch's (libgomp.so.1)",
    ("/a/libomp.so.5", None): "OpenMP runtime libomp.so.5, torch's is not known",
    ("", "/b/libgomp.so.1"): "OpenMP, this system does not say whose",
}


@pytest.mark.parametrize("own, torch_s", WORDS, ids=WORDS.values())
def test_threads_in_words(own, torch_s, monkeypatch):
    library = SimpleNamespace(bcl_cpu_openmp=lambda: None if own is None else 1, bcl_cpu_isa=lambda: b"avx2")
    monkeypatch.setattr(native, "cpu", lambda: library)
    monkeypatch.setattr(native, "library_of", lambda address: own or None)
    monkeypatch.setattr(native, "torch_openmp", lambda: torch_s)
    assert backends.cpu_library() == f"avx2 instructions, {WORDS[own, torch_s]}"


def test_a_system_without_dladdr_says_nothing(monkeypatch):
    def nothing(name):
        raise TypeError("no name for the process itself")

    monkeypatch.setattr(native.ctypes, "CDLL", nothing)
    assert native.library_of(1) is None and native.torch_openmp() is None
