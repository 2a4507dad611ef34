"""How the optional libraries of csrc/ are built; everything else about the package is in pyproject.toml.

The environment variable BCL_FAST_EXT says what to build: `auto` (the default) builds what it can, the C++ library with
a C++ compiler and the CUDA library where nvcc is found, and tells what it skipped and why; `cpu`, `cuda` and `all`
build that and make a failure an error; `none` builds nothing. BCL_FAST_CUDA_ARCHITECTURES says for which GPUs, such as
`90` alone.

A wheel to give away, one for every Python 3, is made on the oldest Linux it should serve (the extra [wheel] installs
what the second line needs):

    pip wheel --no-deps --wheel-dir build/wheel .
    auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl

libgomp stays outside, because torch brings one, and another would be a second pool of threads.
"""

import hashlib
import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

MODES = ("auto", "cpu", "cuda", "all", "none")
MODE = os.environ.get("BCL_FAST_EXT", "auto")
if MODE not in MODES:
    raise SystemExit(f"BCL_FAST_EXT must be one of {', '.join(MODES)}, got {MODE!r}")

# Behind whatever CXXFLAGS, LDFLAGS and their like ask for: of words that contradict each other GCC and Clang take the
# last, where they link too. Linked with -ffast-math or -Ofast, a library sets flush-to-zero for the whole process, and
# NaN has no order. A product and a sum may be fused: no choice hangs on a sum of products. A key is a product of a
# difference, a score one of two numbers, and neither is added to anything; tests/test_arm.py looks for fused
# instructions where choices are made.
EXACT = (
    "-O3 -fno-fast-math -fno-unsafe-math-optimizations -fno-finite-math-only -fno-associative-math "
    "-fno-reciprocal-math -fsigned-zeros"
).split()
# The same for nvcc, and no fused multiply-add: a key is rounded as the reference rounds it, wherever it is formed.
EXACT_CUDA = ["-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true"]
HOST = "-Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Werror -Xlinker --exclude-libs,ALL".split()


def files(folder, *patterns):
    return sorted(str(path) for pattern in patterns for path in Path(folder).glob(pattern))


CPU = Extension(
    "bcl_fast._cpu",
    files("csrc/cpu", "*.cpp"),
    depends=files("csrc/cpu", "*.h"),
    extra_compile_args=["-std=c++17", "-fvisibility=hidden", *EXACT, "-fno-math-errno", "-fno-trapping-math"],
    language="c++",
)
CUDA = Extension(
    "bcl_fast._cuda",
    ["csrc/cuda/library.cu"],
    depends=files("csrc/cuda", "*.h", "*.cuh"),
    extra_compile_args=["-O3", "-std=c++17", *EXACT_CUDA, "--expt-relaxed-constexpr", "--cudart=static", *HOST],
)
# Later GPUs than the last compile its PTX as they load it.
ARCHITECTURES = os.environ.get("BCL_FAST_CUDA_ARCHITECTURES", "80 90 100").split()
ARCHITECTURES_ASKED = "BCL_FAST_CUDA_ARCHITECTURES" in os.environ
LIBRARIES = {"auto": [CPU, CUDA], "cpu": [CPU], "cuda": [CUDA], "all": [CPU, CUDA], "none": []}[MODE]


def build_name(ext):
    """What the library of these sources and flags, for these architectures, says it is (bcl_cuda_build)."""
    found = hashlib.sha256(repr(ext.extra_compile_args).encode())
    for path in sorted([*ext.sources, *ext.depends]):
        found.update(path.encode() + b"\0" + Path(path).read_bytes() + b"\0")
    return f"{found.hexdigest()[:16]}_for_{'_'.join(ARCHITECTURES)}"


def is_fresh(path, ext):
    """Whether a library is of these sources and flags; and for these architectures, where some were asked for.

    Times say nothing: a library may come from another machine, with sources written after it.
    """
    found = re.search(rb"bcl_cuda_build (\w+)_for_(\w+)\0", path.read_bytes()) if path.exists() else None
    if found is None:
        return False
    sources, _, architectures = build_name(ext).partition("_for_")
    return found[1].decode() == sources and (found[2].decode() == architectures or not ARCHITECTURES_ASKED)


def nvcc_command(ext, target):
    """The words that build a library for every architecture; FileNotFoundError where there is no nvcc."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError(f"no nvcc in {os.path.join(home, 'bin') if home else 'PATH'}")
    codes = [f"arch=compute_{sm},code=sm_{sm}" for sm in ARCHITECTURES]
    codes.append(f"arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}")
    gencode = [word for code in codes for word in ("-gencode", code)]
    arguments = [*ext.extra_compile_args, f"-DBCL_BUILD={build_name(ext)}", *gencode]
    return [nvcc, "-shared", "--threads=0", *arguments, *ext.sources, "-o", str(target)]


def exact_nvcc_flags(environment):
    """What nvcc takes from its environment, so that none of it changes results."""
    flags = {name: environment.get(name, "") for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")}
    for name, asked in flags.items():
        flags[name] = re.sub(r"(?<!\S)--?use_fast_math([= ](true|false))?(?!\S)", "", asked)
        if flags[name] != asked:  # no later word would take all of it back
            print(f"bcl_fast: {name} without --use_fast_math, which changes results", file=sys.stderr, flush=True)
    flags["NVCC_APPEND_FLAGS"] += f" {' '.join(EXACT_CUDA)} -Xcompiler={','.join(EXACT)}"
    return flags


class BuildExt(build_ext):
    """Plain shared libraries for ctypes: nothing of Python in them, so that one file serves every version."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext):
        return ext.export_symbols

    def get_libraries(self, ext):
        return ext.libraries  # without libpython

    def build_extension(self, ext):
        try:
            self.build_with_nvcc(ext) if ext is CUDA else self.build_with_openmp(ext)
        except Exception as error:
            if MODE != "auto":
                raise
            instead = "Triton serves GPUs" if ext is CUDA else "`portable` will serve"
            print(f"bcl_fast: {ext.name} skipped, {instead}: {error}", file=sys.stderr, flush=True)

    def build_with_openmp(self, ext):
        arguments = ext.extra_compile_args
        try:
            ext.extra_compile_args, ext.extra_link_args = [*arguments, "-fopenmp"], [*EXACT, "-fopenmp"]
            super().build_extension(ext)
        except Exception:  # a compiler without OpenMP builds for one thread
            ext.extra_compile_args, ext.extra_link_args = arguments, EXACT
            super().build_extension(ext)

    def build_with_nvcc(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        beside = Path(*ext.name.split(".")).with_suffix(".so")  # where an editable install leaves it
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.force or not (is_fresh(target, ext) or is_fresh(beside, ext)):
            os.environ.update(exact_nvcc_flags(os.environ))
            self.spawn(nvcc_command(ext, target))
        elif not is_fresh(target, ext):
            shutil.copyfile(beside, target)

    # What was skipped must not be expected: by the list of installed files, or by an editable install.
    def get_outputs(self):
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def get_output_mapping(self):
        return {built: source for built, source in super().get_output_mapping().items() if os.path.exists(built)}

    def copy_extensions_to_source(self):
        everything = self.extensions
        self.extensions = [
            ext for ext in everything if os.path.exists(Path(self.build_lib, *ext.name.split(".")).with_suffix(".so"))
        ]
        super().copy_extensions_to_source()
        self.extensions = everything


class Wheel(bdist_wheel):
    """For every Python 3; where there is a library to build, for this platform alone."""

    def get_tag(self):
        *_, platform = super().get_tag()
        return ("py3", "none", platform) if self.distribution.ext_modules else super().get_tag()


setup(ext_modules=LIBRARIES, cmdclass={"build_ext": BuildExt, "bdist_wheel": Wheel})
