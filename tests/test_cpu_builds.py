"""The C++ library as other compilers build it."""

import shutil

import pytest
from helpers import cpu_builds
from helpers.cpu_builds import PROBE

CLANG = shutil.which("clang++")


@pytest.fixture(scope="module")
def clang(tmp_path_factory):
    """The folder of the library that Clang builds."""
    if CLANG is None:
        pytest.skip("no clang++ (package clang)")
    return cpu_builds.build(tmp_path_factory.mktemp("clang"), CLANG)


def test_clang_s_library_takes_the_widest_instructions_of_the_processor(clang):
    code, output = cpu_builds.python(clang, PROBE.format(isa=cpu_builds.widest()), BCL_FAST_ISA="")
    assert code == 0, output
