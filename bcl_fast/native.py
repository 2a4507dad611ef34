"""The compiled libraries beside this file: loaded with ctypes, their interface declared once.

They know nothing of torch or Python, so one build serves every version of both.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_char_p, c_double, c_int, c_int64, c_void_p
from pathlib import Path

CPU_ABI = 3  # of csrc/cpu/api.cpp
HERE = Path(__file__).parent

_CPU_ARGUMENTS = {
    "competition": [c_void_p, *[c_int64] * 3, c_void_p, c_int64, c_double, c_void_p, *[c_int64] * 2, c_int,
                    *[c_double] * 2, *[c_void_p] * 11, c_int],
    "inverse_norm": [c_void_p, *[c_int64] * 3, c_void_p, c_int],
    "selection": [c_void_p, *[c_int64] * 3, *[c_void_p] * 4, *[c_int] * 2, c_int64, *[c_void_p] * 2, c_int],
    "targets": [c_void_p, *[c_int64] * 4, *[c_void_p] * 2, c_int64, *[c_void_p] * 2, c_int64, *[c_void_p] * 4, c_int64,
                c_void_p, c_double, c_int],
    "gradient": [c_void_p, c_int64, c_void_p, *[c_int64] * 2, *[c_void_p] * 2, c_int],
    "nearest": [c_void_p, *[c_int64] * 5, c_void_p, c_int],
    "rank": [c_void_p, *[c_int64] * 3, c_void_p, c_int],
}  # fmt: skip


@functools.cache
def cpu() -> ctypes.CDLL:
    """The CPU library, or an ImportError that says why there is none."""
    path = next(iter(sorted(HERE.glob("_cpu.*"))), None)
    if path is None:
        raise ImportError("its C++ library was not built (pip install with a C++ compiler builds it)")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"its C++ library does not load: {error}") from error
    library.bcl_cpu_isa.restype = c_char_p
    if (found := library.bcl_cpu_abi()) != CPU_ABI:
        raise ImportError(f"its C++ library is of another version (interface {found}, not {CPU_ABI}): install again")
    for name, arguments in _CPU_ARGUMENTS.items():
        for suffix in ("f32", "f64"):
            getattr(library, f"bcl_cpu_{name}_{suffix}").argtypes = arguments
    return library
