"""A wheel, a source archive, every mode of editable install and a bare checkout give bcl_fast and its kernels."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from bcl_fast import native

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("bcl_fast", "kernels", "csrc", "bench", "tests")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
# Imported from anywhere but the checkout: where each came from, and that a kernel file would be found.
PROBE = """
import bcl_fast, bcl_fast.kernels, bcl_fast.experiments.run, os
print(os.path.dirname(bcl_fast.__file__)); print(list(bcl_fast.kernels.__path__)[0])
assert os.path.exists(os.path.join(list(bcl_fast.kernels.__path__)[0], "README.md"))
bcl_fast.BCLLayer(4, 3)
"""


def run(*words, **options):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def probe(python, folder, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return run(python, "-c", PROBE, cwd=folder, env=kept | environment).splitlines()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources: builds leave files behind."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so"))
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    target = tmp_path_factory.mktemp("wheel")
    pip = sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", target, checkout
    run(*pip, env=os.environ | {"BCL_FAST_CUDA_ARCHITECTURES": "90"})
    (found,) = target.glob("*.whl")
    return found


def test_wheel_holds_the_package_its_kernels_and_the_license(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"bcl_fast/layer.py", "bcl_fast/experiments/run.py", "bcl_fast/kernels/README.md"} <= names
    assert {"bcl_fast/GUIDE.md", "bcl_fast/SPEC.md"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("kernels/", "tests/", "bench/", "csrc/")) for name in names)
    assert not any(name == "bcl_fast/kernels/__init__.py" for name in names)


COMPILER = shutil.which("c++") or shutil.which("g++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_wheel_holds_the_library_for_every_python(wheel):
    assert "bcl_fast/_cpu.so" in zipfile.ZipFile(wheel).namelist()
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_wheel_holds_the_cuda_library(wheel):
    assert "bcl_fast/_cuda.so" in zipfile.ZipFile(wheel).namelist()


def build_without_compiler(checkout, tmp_path, mode):
    """A wheel of a fresh copy, where every compiler is `false`."""
    fresh = shutil.copytree(checkout, tmp_path / "copy", ignore=shutil.ignore_patterns("build", "*.so", "*.egg-info"))
    pip = sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, fresh
    broken = {"CC": "false", "CXX": "false", "CUDA_HOME": str(tmp_path), "BCL_FAST_EXT": mode}
    done = subprocess.run(list(map(str, pip)), capture_output=True, text=True, env=os.environ | broken)
    return done, list(tmp_path.glob("*.whl"))


def test_without_compilers_the_package_installs_without_the_libraries(checkout, tmp_path):
    done, wheels = build_without_compiler(checkout, tmp_path, "auto")
    assert done.returncode == 0, done.stderr
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheels[0]).namelist())


@pytest.mark.parametrize("mode, missing", [("cpu", "false"), ("cuda", "no nvcc in"), ("all", "false")])
def test_a_library_that_is_asked_for_is_built_or_an_error(checkout, tmp_path, mode, missing):
    done, wheels = build_without_compiler(checkout, tmp_path, mode)
    assert done.returncode != 0 and not wheels and missing in done.stdout + done.stderr


def test_no_library_where_none_is_wanted(checkout, tmp_path):
    _, wheels = build_without_compiler(checkout, tmp_path, "none")
    assert wheels[0].name.endswith("-py3-none-any.whl")


def test_a_wrong_mode_is_named(checkout, tmp_path):
    done, _ = build_without_compiler(checkout, tmp_path, "gpu")
    message = "BCL_FAST_EXT must be one of auto, cpu, cuda, all, none, got 'gpu'"
    assert done.returncode != 0 and message in done.stdout + done.stderr


def test_wheel_asks_for_torch_alone(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    needs = [line for line in archive.read(name).decode().splitlines() if line.startswith("Requires-Dist")]
    always = sorted(line.split(": ")[1] for line in needs if "extra ==" not in line)
    assert always == ["torch>=2.11", 'triton>=3.6; platform_system == "Linux"']


def test_installed_wheel_imports_from_anywhere(wheel, tmp_path):
    target = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel)
    package, kernels = probe(sys.executable, tmp_path, PYTHONPATH=str(target))
    assert Path(package) == target / "bcl_fast" and Path(kernels) == target / "bcl_fast" / "kernels"


def test_source_archive_builds_what_the_checkout_builds(checkout, tmp_path):
    code = f"import setuptools.build_meta as b; print(b.build_sdist({str(tmp_path)!r}))"
    name = run(sys.executable, "-c", code, cwd=checkout).splitlines()[-1]
    with tarfile.open(tmp_path / name) as archive:
        held = {path.partition("/")[2] for path in archive.getnames()}
    wanted = {str(path.relative_to(checkout)) for folder in FOLDERS for path in (checkout / folder).rglob("*.py")}
    assert wanted | set(FILES) | {"kernels/README.md", "csrc/README.md", "bench/results/tables.json"} <= held


@pytest.mark.parametrize("mode", ["lenient", "strict", "compat"])
def test_editable_install(checkout, tmp_path, mode):
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    if not python.exists():
        pytest.skip("this platform's virtual environments have another layout")
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    pip = sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-build-isolation"
    without_cuda = os.environ | {"BCL_FAST_EXT": "cpu"}  # it takes long, and the wheel has it
    run(*pip, "--config-settings", f"editable_mode={mode}", "-e", checkout, env=without_cuda)
    package, kernels = map(Path, probe(python, tmp_path))
    if mode != "strict":  # strict links single files into a build folder
        assert package == checkout / "bcl_fast" and kernels == checkout / "kernels"


def test_bare_checkout(tmp_path):
    package, kernels = probe(sys.executable, tmp_path, PYTHONPATH=str(ROOT))
    assert Path(package) == ROOT / "bcl_fast" and Path(kernels) == ROOT / "kernels"
    pytest.importorskip("typer")
    assert "portable" in run(sys.executable, "-m", "bcl_fast", "doctor", cwd=ROOT)


# --- Flags of the environment that would change results --------------------------------------------------------------

HOSTILE = {
    "CC": f"{COMPILER} -funsafe-math-optimizations",
    "CXX": f"{COMPILER} -Ofast",
    "CFLAGS": "-ffast-math",
    "CXXFLAGS": "-O3 -ffast-math -ffinite-math-only -fassociative-math -freciprocal-math -fno-signed-zeros",
    "CPPFLAGS": "-funsafe-math-optimizations -ffp-contract=fast",
    "LDFLAGS": "-Ofast -ffast-math -funsafe-math-optimizations",
}
# In a process of its own, as it may change how its thread computes. `folder` holds the library.
ALONE = """
import sys, torch
from pathlib import Path
from bcl_fast import BCLLayer, cpu, native, reference as ref
native.HERE = Path({folder!r})
subnormal = lambda: sys.float_info.min * 0.5 > 0 and (torch.full((64,), 1e-38) * 0.1 > 0).all().item()
"""
EXACT = """
from bcl_fast.testing import columns, compete, neighbors_of
assert cpu.missing() is None and subnormal(), (cpu.missing(), subnormal())
for B in (1, 67, 1009):
    a, near = columns("random", B, 67), neighbors_of(67, 8)
    a[::5, ::3], a[2::7, ::2], a[3::4, 1::3], a[::6, 5::7] = torch.nan, torch.inf, -0.0, 0.0
    got, own = (compete(module.competition, a, near) for module in (cpu, ref))
    assert got["winner"].equal(own["winner"])
    for name, value in got.items():
        assert value.isnan().equal(own[name].isnan()), name
        torch.testing.assert_close(value, own[name], rtol=1e-5, atol=1e-7, equal_nan=True)
    assert cpu.rank(a).equal(ref.rank(a)) and (B != 67 or cpu.nearest(a, 0, 9).equal(ref.nearest(a, 9)))
    for rule in ("rank", "clamped_cosine", "cosine"):
        arguments = a, torch.rand(67), torch.rand(B), torch.ones(67), torch.rand(B), rule, "hard", 5
        rows = [module.selection(*arguments)[0] for module in (cpu, ref)]
        assert rows[0].sort().values.equal(rows[1].sort().values), rule
"""
REFUSED = """
import warnings
for _ in range(2):  # it is the first time that a library changes the process
    assert "was built with -ffast-math or a part of it" in (cpu.missing() or ""), cpu.missing()
    assert subnormal()
try:
    BCLLayer(4, 3, backend="cpu")(torch.rand(5, 4)).sum().backward()
except ValueError as error:
    assert "-ffast-math" in str(error)
else:
    raise AssertionError("served by an inexact library")
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    layer = BCLLayer(4, 3, fused=True)
    layer(torch.rand(5, 4)).sum().backward()
assert layer.backend == "portable" and any("-ffast-math" in str(one.message) for one in seen), seen
assert subnormal()
"""


def in_a_process(code, folder, **environment):
    return run(sys.executable, "-c", ALONE.format(folder=str(folder)) + code, cwd=ROOT, env=os.environ | environment)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_flags_of_the_environment_change_no_result(checkout, tmp_path):
    build = sys.executable, "setup.py", "build_ext", "--force", "--build-lib", tmp_path, "--build-temp", tmp_path / "o"
    run(*build, cwd=checkout, env=os.environ | HOSTILE | {"BCL_FAST_EXT": "cpu"})
    for isa in ("", "baseline"):
        in_a_process(EXACT, tmp_path / "bcl_fast", BCL_FAST_ISA=isa)


PARTS = ["-ffast-math", "-ffinite-math-only", "-freciprocal-math", "-fno-signed-zeros",
         "-fassociative-math -fno-signed-zeros -fno-trapping-math"]  # fmt: skip


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("flags", [*PARTS, "-fsingle-precision-constant"])
def test_sources_do_not_compile_with_flags_that_change_results(flags):
    words = COMPILER, "-std=c++17", "-fsyntax-only", *flags.split(), ROOT / "csrc" / "cpu" / "baseline.cpp"
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode != 0 and "bcl_fast is exact: build it without" in done.stderr


def stub(folder, compiled="", linked=""):
    """A library of nothing but its version and its check, built by hand."""
    version = folder / "version.cpp"
    version.write_text(f'extern "C" int bcl_cpu_abi() {{ return {native.CPU_ABI}; }}')
    common = COMPILER, "-O3", "-std=c++17", "-fPIC"
    for source in (ROOT / "csrc" / "cpu" / "exact.cpp", version):
        run(*common, *compiled.split(), "-c", source, "-o", folder / f"{source.stem}.o")
    run(*common, *linked.split(), "-shared", folder / "exact.o", folder / "version.o", "-o", folder / "_cpu.so")
    return folder


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("flags", ["", "-march=native", "-ffp-contract=off", *PARTS])
def test_a_library_says_whether_it_is_exact(flags, tmp_path):
    library = ctypes.CDLL(str(stub(tmp_path, flags) / "_cpu.so"))
    assert library.bcl_cpu_exact() == (flags not in PARTS)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("compiled, linked", [("-ffast-math", ""), ("", "-ffast-math")], ids=["compiled", "linked"])
def test_an_inexact_library_is_refused_and_leaves_the_process_as_it_was(compiled, linked, tmp_path):
    stub(tmp_path, compiled, linked)
    if linked and b"set_fast_math" not in (tmp_path / "_cpu.so").read_bytes():
        pytest.skip("this compiler links nothing that changes a process")
    in_a_process(REFUSED, tmp_path)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_who_flushes_subnormal_numbers_himself_is_not_blamed(tmp_path):
    code = """
if torch.set_flush_denormal(True):
    library = native._load("cpu", "C++", native.CPU_ABI)
    assert library.bcl_cpu_exact() and native._flushes()
"""
    in_a_process(code, stub(tmp_path))


NVCC = shutil.which("nvcc")


@pytest.mark.parametrize("name", ["NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"])
def test_nvcc_s_own_flags_change_no_result(checkout, tmp_path, name):
    """By what nvcc would run; where there is none, by what a stand-in is told."""
    stand_in = tmp_path / "bin" / "nvcc"
    stand_in.parent.mkdir()
    says = f'{NVCC} --dryrun "$@"' if NVCC else 'echo "cicc $NVCC_PREPEND_FLAGS $* $NVCC_APPEND_FLAGS"'
    stand_in.write_text(f"#!/bin/sh\n{says} >{tmp_path / 'said'} 2>&1\n")
    stand_in.chmod(0o755)
    hostile = "--use_fast_math -Xcompiler -ffast-math -use_fast_math=true -fmad=true -ftz=true -prec-div=false -DKEPT"
    environment = os.environ | {"CUDA_HOME": str(tmp_path), "BCL_FAST_EXT": "cuda", name: hostile}
    words = sys.executable, "setup.py", "build_ext", "--force", "--build-lib", tmp_path
    done = subprocess.run(list(map(str, words)), cwd=checkout, env=environment, capture_output=True, text=True)
    assert f"bcl_fast: {name} without --use_fast_math" in done.stderr
    said = [line for line in (tmp_path / "said").read_text().splitlines() if not line.startswith("#$ NVCC_")]
    compiled = [line for line in said if "cicc" in line and " -ftz=" in line]
    assert compiled and any("KEPT" in line for line in said) and "use_fast_math" not in "".join(said)
    for option, exact in (("fmad", "0 false"), ("ftz", "0 false"), ("prec.div", "1 true"), ("prec.sqrt", "1 true")):
        for line in compiled:
            assert re.findall(rf" -{option}=(\w+)", line)[-1] in exact.split(), (option, line)
    for line in said:  # what the host's compiler and linker are told, too
        assert line.rfind("-ffast-math") <= line.rfind("-fno-fast-math"), line
        assert " -fast-math" not in line
