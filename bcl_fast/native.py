"""The compiled libraries beside this file: loaded with ctypes, their interface declared once.

They know nothing of torch or Python, so one build serves every version of both.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch

from . import cpu_structs, cuda_structs, private

CPU_ABI = 8  # of csrc/cpu/api.cpp
CUDA_ABI = 3  # of csrc/cuda/library.cu
HERE = Path(__file__).parent
INEXACT = "was built with -ffast-math or a part of it, which changes results: install again without such flags"


def pointer(tensor: Any) -> int | None:
    """Where the elements of a tensor begin; None for none."""
    return None if tensor is None else tensor.data_ptr()


def bad_neighbors(neighbors: Any, D: int) -> ValueError:
    """The error for neighbors of a shape or dtype that the libraries do not read, as a user may have loaded them."""
    given = f"{neighbors.dtype} {list(neighbors.shape)}"
    return ValueError(f"neighbors must be torch.int64 [{D}, k] with D, k >= 1, got {given}")


def _flushes() -> bool:
    """Whether this thread takes subnormal numbers for zero, as after torch.set_flush_denormal(True)."""
    return sys.float_info.min * 0.5 == 0.0


@functools.cache  # only the first load changes the process
def _open(path: str) -> tuple[ctypes.CDLL, bool]:
    """A library, and whether it made this thread flush subnormal numbers to zero, which is then undone."""
    before = _flushes()
    library = ctypes.CDLL(path)
    changed = _flushes() and not before
    if changed:
        torch.set_flush_denormal(False)
    return library, changed


def _load(name: str, language: str, abi: int, path: str | os.PathLike | None = None) -> ctypes.CDLL:
    """The library bcl_fast/_`name`, or the one at `path`; an ImportError says why there is none."""
    path = path or next(iter(sorted(HERE.glob(f"_{name}.*"))), None)
    if path is None:
        compiler = "nvcc" if name == "cuda" else "a C++ compiler"
        raise ImportError(f"its {language} library was not built (pip install with {compiler} builds it)")
    try:
        library, changed = _open(str(path))
    except OSError as error:
        raise ImportError(f"its {language} library does not load: {error}") from error
    if changed:
        raise ImportError(f"its {language} library {INEXACT}")
    if (found := getattr(library, f"bcl_{name}_abi")()) != abi:
        raise ImportError(f"its {language} library is of another version (interface {found}, not {abi}): install again")
    return library


@functools.cache
def cpu() -> ctypes.CDLL:
    """The CPU library, or an ImportError that says why there is none."""
    library = _load("cpu", "C++", CPU_ABI)
    if not library.bcl_cpu_exact():
        raise ImportError(f"its C++ library {INEXACT}")
    library.bcl_cpu_isa.restype = c_char_p
    library.bcl_cpu_openmp.restype = c_void_p
    for name, struct in cpu_structs.STRUCTS.items():
        for suffix in ("f32", "f64"):
            getattr(library, f"bcl_cpu_{name}_{suffix}").argtypes = [POINTER(struct), c_int]
    return library


class _Place(ctypes.Structure):
    """What dladdr says of an address: the file of the library that holds it, and more."""

    _fields_ = [("file", c_char_p), ("base", c_void_p), ("symbol", c_char_p), ("symbol_address", c_void_p)]


def library_of(address: int) -> str | None:
    """The file of the loaded library that holds an address; None where the system does not say."""
    try:
        dladdr = ctypes.CDLL(None).dladdr
    except (AttributeError, OSError, TypeError):  # no such function, or no name for the process itself
        return None
    dladdr.argtypes = [c_void_p, POINTER(_Place)]
    place = _Place()
    found = dladdr(address, ctypes.byref(place)) and place.file
    return os.path.realpath(os.fsdecode(found)) if found else None


def torch_openmp() -> str | None:
    """The file of the OpenMP runtime that torch calls; None where it was built without, or where nobody can tell."""
    if not torch.backends.openmp.is_available():
        return None
    for library in (None, private.compiled_torch()):  # as the loader looks: first in what the whole process sees
        try:
            function = ctypes.CDLL(library).omp_get_max_threads
        except (AttributeError, OSError, TypeError):
            continue
        return library_of(ctypes.cast(function, c_void_p).value or 0)
    return None


@functools.cache
def cuda() -> ctypes.CDLL:
    """The CUDA library, or an ImportError that says why there is none.

    BCL_FAST_CUDA names another build of it, such as the one that runs its kernels on the host, for tests.
    """
    library = _load("cuda", "CUDA C++", CUDA_ABI, os.environ.get("BCL_FAST_CUDA"))
    library.bcl_cuda_error.argtypes, library.bcl_cuda_error.restype = [c_int], c_char_p
    for name, struct in cuda_structs.STRUCTS.items():  # with scratch memory, its size, device and stream
        arguments = [POINTER(struct), c_void_p, POINTER(c_size_t), c_int, c_void_p]
        getattr(library, f"bcl_cuda_{name}").argtypes = arguments
    return library
