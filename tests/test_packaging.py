"""A wheel, a source archive, every mode of editable install and a bare checkout give bcl_fast and its kernels."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

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


def test_wheel_holds_the_package_its_kernels_and_the_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"bcl_fast/layer.py", "bcl_fast/experiments/run.py", "bcl_fast/kernels/README.md"} <= names
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
