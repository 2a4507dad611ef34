"""What nvcc makes of csrc/cuda: registers, loads in flight, and when setup.py builds it anew."""

import ctypes
import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers.cubin import resources
from helpers.elf import SYSTEM, needs

from bcl_fast import cuda, native

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc")
MEMORY = 2  # Where the strengths lie, in csrc/cuda/plan.h

# Those of setup.py; where a GPU is, its own alone, for a test should not take a minute there.
ARCHITECTURES = ["80", "90", "100"]
if torch.cuda.is_available():
    ARCHITECTURES = ["{}{}".format(*torch.cuda.get_device_capability())]


def build_script(patch, folder, architectures=None):
    """What setup.py defines, in a folder that holds it."""
    patch.chdir(folder)
    patch.setattr("setuptools.setup", lambda **metadata: None)
    patch.delenv("BCL_FAST_CUDA_ARCHITECTURES", raising=False)
    if architectures:
        patch.setenv("BCL_FAST_CUDA_ARCHITECTURES", " ".join(architectures))
    return runpy.run_path("setup.py")


@pytest.fixture(scope="module")
def compiled():
    """The library as setup.py builds it: the one that is installed, if it is of these sources, else a new one."""
    with pytest.MonkeyPatch.context() as patch:
        build = build_script(patch, ROOT, ARCHITECTURES)
        installed = ROOT / "bcl_fast" / "_cuda.so"
        if build["is_fresh"](installed, build["CUDA"]):
            return installed
        if NVCC is None:
            pytest.skip("no nvcc")
        target = ROOT / "build" / f"cuda-{build['build_name'](build['CUDA'])}.so"
        partial = target.with_suffix(f".{os.getpid()}")
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            done = subprocess.run(build["nvcc_command"](build["CUDA"], partial), capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            os.replace(partial, target)
    return target


def test_no_kernel_of_ours_spills(compiled):
    """What is spilled lies on the stack, where our kernels keep nothing else."""
    if (tool := disassembler("cuobjdump")) is None:
        pytest.skip("no cuobjdump")
    # CUB's own sort spills 24 bytes.
    ours = {key: numbers for key, numbers in resources(tool, compiled).items() if "3cub" not in key[1]}
    assert {sm for sm, _ in ours} == {f"sm_{number}" for number in ARCHITECTURES}
    for (sm, name), (used, spilled) in sorted(ours.items()):
        print(f"{sm:7} {used:4} registers {name}")
        assert spilled == 0, f"{name} has {spilled} bytes outside of registers on {sm}"
    kernels = {match for _, name in ours for match in re.findall(r"bcl\d+(\w+?_kernel)", name)}
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cuh"))
    assert kernels == set(re.findall(r"\b(\w+_kernel)\(", sources))


def test_the_built_library_loads_and_explains_errors(compiled):
    library = ctypes.CDLL(str(compiled))
    library.bcl_cuda_error.restype = library.bcl_cuda_build.restype = ctypes.c_char_p
    assert library.bcl_cuda_abi() == native.CUDA_ABI and library.bcl_cuda_on_host() == 0
    assert b"driver" in library.bcl_cuda_error(35) and b"not compiled" in library.bcl_cuda_error(-1)
    assert library.bcl_cuda_build().endswith(b"_for_" + "_".join(ARCHITECTURES).encode())


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_the_built_library_brings_cuda_s_runtime_along(compiled):
    """It asks for what every Linux has: for nothing of CUDA, torch or Python."""
    assert needs(compiled) <= SYSTEM


def disassembler(name):
    """The tool of CUDA's toolkit, or the one that Triton brings; None where there is neither."""
    if found := shutil.which(name):
        return found
    try:
        from triton import knobs

        return getattr(knobs.nvidia, name).path
    except (ImportError, AttributeError, RuntimeError):
        return None


@pytest.fixture(scope="module")
def instructions(compiled):
    """{architecture: {kernel: its lines of SASS, (address, instruction)}}."""
    tools = [disassembler(name) for name in ("cuobjdump", "nvdisasm")]
    if None in tools:
        pytest.skip("no cuobjdump or no nvdisasm")
    paths = os.pathsep.join([os.path.dirname(tools[1]), os.environ["PATH"]])
    found = {}
    for sm in ARCHITECTURES:
        words = [tools[0], "-sass", "-arch", f"sm_{sm}", str(compiled)]
        listing = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | {"PATH": paths})
        parts = (part.partition("\n") for part in listing.stdout.split("Function : ")[1:])
        found[sm] = {name.strip(): re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text) for name, _, text in parts}
    return found


def loads_in_flight(lines):
    """The lengths of runs of loads from memory that no branch, barrier, or use of what one of them loads interrupts."""
    joins = {target for _, line in lines for target in re.findall(r"\bBRA\b.*?0x([0-9a-f]+)", line)}
    joins = {int(target, 16) for target in joins}
    runs, awaited = [0], set()
    for address, line in lines:
        name, _, operands = re.sub(r"^@!?U?P\d+ +", "", line).partition(" ")
        registers = [int(number) for number in re.findall(r"\bR(\d+)\b", operands)]
        load = name.startswith("LDG.")
        ends = name.startswith(("BRA", "BAR", "BSYNC", "CALL", "EXIT", "RET", "WARPSYNC"))
        if ends or int(address, 16) in joins or awaited & set(registers[load:]):
            runs.append(0)
            awaited = set()
        if load:
            runs[-1] += 1
            awaited |= set(range(registers[0], registers[0] + (4 if ".128" in name else 2 if ".64" in name else 1)))
    return runs


def test_loads_of_the_selection_are_in_flight_together(instructions):
    """Values and norms of AHEAD samples in the two loops that read columns, of 8 where samples are visited."""
    for sm, kernels in instructions.items():
        chosen = {name: lines for name, lines in kernels.items() if "selection_kernel" in name}
        assert len(chosen) == 2 * len(cuda.FORMS["selection"])
        for name, lines in chosen.items():
            ahead = int(re.search(r"ELb[01]ELi(\d+)E", name)[1])
            last = max(i for i, (_, line) in enumerate(lines) if "BAR.SYNC" in line)  # then columns are settled
            runs = sorted(loads_in_flight(lines[:last]), reverse=True)
            print(f"sm_{sm:4} {name} {[n for n in runs if n > 1]}")
            assert runs[1] >= 2 * ahead, (sm, name, runs)
            assert sum(n >= 8 for n in runs) >= 2 + 4, (sm, name, runs)
        (lines,) = (lines for name, lines in kernels.items() if "selection_counting" in name)
        assert max(loads_in_flight(lines)) >= 16


def test_tiles_of_the_competition_are_copied_asynchronously(instructions):
    for kernels in instructions.values():
        for name, lines in kernels.items():
            if found := re.search(r"competition_kernelILi(\d)ELi(\d)", name):
                copies = sum("LDGSTS" in line for _, line in lines)
                assert copies == (0 if int(found[1]) == MEMORY else 2 * int(found[2])), name  # the first tile, the next


def test_a_library_is_known_by_its_sources_not_by_times(tmp_path, monkeypatch):
    from setuptools.dist import Distribution

    for name in ("setup.py", "README.md", "bcl_fast/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    sources = shutil.copytree(ROOT / "csrc" / "cuda", tmp_path / "csrc" / "cuda")
    monkeypatch.setattr(shutil, "which", lambda *_, **__: "nvcc")
    built = []

    def spawn(words):
        (name,) = (word.partition("=")[2] for word in words if word.startswith("-DBCL_BUILD="))
        Path(words[-1]).write_bytes(b"...bcl_cuda_build " + name.encode() + b"\0...")
        built.append(name.partition("_for_")[2])

    def build(target="build/_cuda.so", architectures=None):
        script = build_script(monkeypatch, tmp_path, architectures)
        command = script["BuildExt"](Distribution())
        monkeypatch.setattr(command, "get_ext_fullpath", lambda name: target)
        monkeypatch.setattr(command, "spawn", spawn)
        command.force = False
        command.build_with_nvcc(script["CUDA"])
        return built.pop() if built else None

    assert build(architectures=["90"]) == "90"
    for path in sources.iterdir():
        os.utime(path, (2e9, 2e9))  # as if written after it
    assert build() is None and build(architectures=["90"]) is None
    assert build(architectures=["80", "90"]) == "80_90"
    shutil.copy("build/_cuda.so", "bcl_fast/_cuda.so")  # carried here, and nothing else
    assert build("elsewhere/_cuda.so") is None and Path("elsewhere/_cuda.so").exists()
    with (sources / "plan.h").open("a") as file:
        file.write("// another\n")
    assert build("elsewhere/_cuda.so") == "80_90_100"
    (tmp_path / "setup.py").write_text((tmp_path / "setup.py").read_text().replace('"-fmad=false"', '"-fmad=true"'))
    assert build("elsewhere/_cuda.so") == "80_90_100" and build("elsewhere/_cuda.so") is None
