"""The structs of the CPU library's C interface, as csrc/cpu/interface.h declares them: field by field, in its order.

Pointers are of float32 or float64 elements, after the function that is called, and of int64 indices. Sizes and strides
count elements.
"""

from __future__ import annotations

from ctypes import Structure, c_char_p, c_double, c_int, c_int64, c_void_p


def _fields(names: str, kind: type) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Neighbors(Structure):
    """Step 1, of a panel of similarities."""

    _fields_ = [*_fields("similarity near", c_void_p), *_fields("stride rows D first k", c_int64)]


class Competition(Structure):
    """Steps 2 to 8, and what follows from them for a sample or a feature: the results are those of `structures`."""

    _fields_ = [
        *_fields("activation neighbors x", c_void_p),
        *_fields("rank_score novelty win_rate winner pair_feature pair_pull", c_void_p),
        *_fields("x_inverse_norm need winner_share som_strength", c_void_p),
        *_fields("activation_stride x_stride B D N k", c_int64),
        *_fields("temperature rescue_onset pull_onset", c_double),
        ("coupled", c_int),
    ]


class InverseNorm(Structure):
    """Of step 9b."""

    _fields_ = [*_fields("rows inverse", c_void_p), *_fields("stride R N", c_int64)]


class Selection(Structure):
    """Step 9b."""

    _fields_ = [
        *_fields("activation bias x_inverse_norm weight_inverse_norm need rows shares", c_void_p),
        *_fields("stride B D r", c_int64),
        *_fields("rule soft", c_int),
    ]


class Targets(Structure):
    """Steps 9a and 10 and, where there is a weight, step 13: a Pull, and what it moves."""

    _fields_ = [
        *_fields("x pair_feature pair_pull rescue_rows rescue_weight winner_share som_strength", c_void_p),
        *_fields("weight offset destination", c_void_p),
        *_fields("x_stride B D N k r", c_int64),
        ("som_lr", c_double),
    ]


class Gradient(Structure):
    """Step 12."""

    _fields_ = [*_fields("gradient mask masked sum", c_void_p), *_fields("stride B D", c_int64)]


class Rank(Structure):
    """The ranks of step 9b."""

    _fields_ = [*_fields("key rank", c_void_p), *_fields("stride B D", c_int64)]


STRUCTS: dict[str, type[Structure]] = {
    "neighbors": Neighbors,
    "competition": Competition,
    "inverse_norm": InverseNorm,
    "selection": Selection,
    "targets": Targets,
    "gradient": Gradient,
    "rank": Rank,
}


class Field(Structure):
    """A row of what `bcl_cpu_layout_<struct>` returns: where the library has a field. The last has no name."""

    _fields_ = [("name", c_char_p), ("offset", c_int64), ("size", c_int64)]
