"""The structs of the CPU library's C interface, as csrc/cpu/interface.h declares them: field by field, in its order.

Pointers are of float32 or float64 elements, after the function that is called, and of int64 indices. Sizes and strides
count elements.
"""

from __future__ import annotations

from ctypes import Structure, c_double, c_int, c_int64, c_void_p


def fields(names: str, kind: type) -> list[tuple[str, type]]:
    """Fields of one kind, in order, of names with spaces between them."""
    return [(name, kind) for name in names.split()]


class Neighbors(Structure):
    """Step 1, of a tile of similarities."""

    _fields_ = [
        *fields("similarity row_near row_best column_near column_best", c_void_p),
        *fields("stride rows columns first_row first_column k", c_int64),
    ]


class Competition(Structure):
    """Steps 2 to 8, and what follows from them for a sample or a feature: the results are those of `structures`."""

    _fields_ = [
        *fields("activation neighbors x", c_void_p),
        *fields("rank_score novelty win_rate winner pair_feature pair_pull", c_void_p),
        *fields("x_inverse_norm need winner_share som_strength", c_void_p),
        *fields("activation_stride x_stride B D N k", c_int64),
        *fields("temperature rescue_onset pull_onset", c_double),
        ("coupled", c_int),
    ]


class InverseNorm(Structure):
    """Of step 9b."""

    _fields_ = [*fields("rows inverse", c_void_p), *fields("stride R N", c_int64)]


class Selection(Structure):
    """Step 9b."""

    _fields_ = [
        *fields("activation bias x_inverse_norm weight_inverse_norm need rows shares", c_void_p),
        *fields("stride B D r", c_int64),
        *fields("rule soft", c_int),
    ]


class Targets(Structure):
    """Steps 9a and 10 and, where there is a weight, step 13: a Pull, and what it moves."""

    _fields_ = [
        *fields("x pair_feature pair_pull rescue_rows rescue_weight winner_share som_strength", c_void_p),
        *fields("weight offset destination", c_void_p),
        *fields("x_stride B D N k r", c_int64),
        ("som_lr", c_double),
    ]


class Forward(Structure):
    """Steps 2 to 11 of a forward, for `cpu_steps`."""

    _fields_ = [
        *fields("activation neighbors x bias weight mask packed", c_void_p),
        *fields("x_stride weight_stride B D N k r", c_int64),
        *fields("temperature rescue_onset pull_onset", c_double),
        *fields("coupled need rule soft", c_int),
    ]


class Pull(Structure):
    """The pull of such a forward."""

    _fields_ = [
        *fields("x packed weight offset destination som_lr step", c_void_p),
        *fields("x_stride B D N k r", c_int64),
    ]


class Gradient(Structure):
    """Step 12."""

    _fields_ = [*fields("gradient mask masked sum", c_void_p), *fields("stride B D", c_int64)]


class Rank(Structure):
    """The ranks of step 9b."""

    _fields_ = [*fields("key rank", c_void_p), *fields("stride B D", c_int64)]


STRUCTS: dict[str, type[Structure]] = {
    "neighbors": Neighbors,
    "competition": Competition,
    "inverse_norm": InverseNorm,
    "selection": Selection,
    "targets": Targets,
    "forward": Forward,
    "pull": Pull,
    "gradient": Gradient,
    "rank": Rank,
}
