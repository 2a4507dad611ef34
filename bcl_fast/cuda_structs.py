"""The structs of the CUDA library's C interface, as csrc/cuda/interface.h declares them: field by field, in its order.

Pointers are the device's. Sizes and strides count elements. The last fields say which form of the kernels runs.
"""

from __future__ import annotations

from ctypes import Structure, c_float, c_int, c_int64, c_void_p

from .cpu_structs import fields


class Competition(Structure):
    """Steps 2 to 8, and what follows from them for a sample or a feature."""

    _fields_ = [
        *fields("activation neighbors x", c_void_p),
        *fields("rank_score winner pair_feature pair_pull winner_share som_strength", c_void_p),
        *fields("stride_b stride_d x_stride_b x_stride_n B D N k", c_int64),
        *fields("temperature rescue_onset pull_onset", c_float),
        *fields("coupled near threads cluster", c_int),
    ]


class Selection(Structure):
    """Step 9b by rank."""

    _fields_ = [
        *fields("activation bias x_inverse_norm need rows shares", c_void_p),
        *fields("stride_b stride_d B D r", c_int64),
        *fields("soft ahead bins warps round", c_int),
    ]


class Rank(Structure):
    """The ranks of step 9b."""

    _fields_ = [*fields("key rank", c_void_p), *fields("stride_b stride_d B D", c_int64), ("kind", c_int)]


class Sort(Structure):
    """CUB's sort alone, to measure ranks against."""

    _fields_ = [*fields("key other_key sample other_sample", c_void_p), *fields("segments length", c_int64)]


STRUCTS: dict[str, type[Structure]] = {
    "competition": Competition,
    "selection": Selection,
    "rank": Rank,
    "sort": Sort,
}
