"""What Triton's interpreter computes, made right: bfloat16, products of tensor cores, histograms, minima and maxima.

Each function takes a method of the interpreter's builder and returns what stands in for it.
"""

import numpy as np


def _is_bfloat16(handle) -> bool:
    return handle.dtype.scalar.name == "bf16"  # numpy lacks it: its bits are kept as uint16


def _widened(builder, handle):
    """A bfloat16 handle as float32; any other as it is."""
    if not _is_bfloat16(handle):
        return handle
    return type(handle)((handle.data.astype(np.uint32) << 16).view(np.float32), builder.get_float_ty())


def _rounded(builder, handle):
    """A float32 handle as bfloat16: to nearest, ties to even, as a GPU does; the stock interpreter truncates."""
    bits = handle.data.view(np.uint32)
    nearest = ((bits + ((bits >> 16) & 1) + 0x7FFF) >> 16).astype(np.uint16)
    return type(handle)(np.where(np.isnan(handle.data), np.uint16(0x7FC0), nearest), builder.get_bf16_ty())


def bfloat16_casts(stock):
    def cast_impl(self, src, dst_type):
        if dst_type.scalar.name != "bf16":
            return stock(self, _widened(self, src), dst_type)
        return src if _is_bfloat16(src) else _rounded(self, stock(self, src, self.get_float_ty()))

    return cast_impl


def _tf32(x: np.ndarray) -> np.ndarray:
    """float32 rounded to the 10 bits of a tensor core's operand, to nearest, ties away from 0."""
    return np.where(np.isnan(x), x, _cut((x.view(np.uint32) + np.uint32(1 << 12)).view(np.float32)))


def _cut(x: np.ndarray) -> np.ndarray:
    """What a tensor core sees of a float32 that was not rounded."""
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _multiplied(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """total + a b as a tensor core sums it: 8 products at a time, and what float32 does not hold is cut off."""
    for k in range(0, a.shape[1], 8):
        exact = total + a[:, k : k + 8].astype(np.float64) @ b[k : k + 8].astype(np.float64)
        total = exact.astype(np.float32)
        total = np.where(np.abs(total) > np.abs(exact), np.nextafter(total, np.float32(0)), total)
    return total


def tensor_core_dot(stock):
    def create_dot(self, a, b, d, input_precision, *rest):
        """float32 with the precision asked for, which the stock interpreter ignores; `ieee` is its own."""
        if input_precision.name not in ("TF32", "TF32x3") or a.data.dtype != np.float32:
            return stock(self, a, b, d, input_precision, *rest)
        (high, low), (other_high, other_low) = ((_tf32(x), _cut(x - _tf32(x))) for x in (a.data, b.data))
        total = np.zeros_like(d.data)
        if input_precision.name == "TF32x3":
            total = _multiplied(high, other_low, _multiplied(low, other_high, total))
            total = np.where(np.isnan(total), 0, total)  # an infinity's rest is none
        return type(d)(_multiplied(high, other_high, total) + d.data, d.dtype.scalar)

    return create_dot


def bfloat16_dot(stock):
    def create_dot(self, a, b, *rest):
        return stock(self, _widened(self, a), _widened(self, b), *rest)

    return create_dot


def no_bfloat16_arithmetic(stock):
    def binary_op(self, lhs, rhs, op):
        if _is_bfloat16(lhs) or _is_bfloat16(rhs):
            raise TypeError(f"{op.__name__} of bfloat16 is wrong in the interpreter: convert to float32 after the load")
        return stock(self, lhs, rhs, op)

    return binary_op


def histogram(stock):
    def create_histogram(self, data, bins, mask):
        """Counts what lies in 0 .. bins - 1 and drops the rest, as a GPU does; up to 3.8 `bins` itself is counted."""
        counted = (data.data >= 0) & (data.data < bins)
        counted &= True if mask is None else mask.data.astype(bool)
        counts = np.bincount(data.data[counted].astype(np.int64), minlength=bins)
        return type(data)(counts.astype(np.int32), self.get_int32_ty())

    return create_histogram


def of_ufunc(ufunc):
    return lambda stock: lambda self, lhs, rhs: self.binary_op(lhs, rhs, ufunc)
