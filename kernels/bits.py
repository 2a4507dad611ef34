"""What several kernels do with bits and bounds: floats as ordered integers, a value packed with an index, indices kept
inside. Device functions and constants alone."""

import triton
import triton.language as tl

EPS = tl.constexpr(1e-8)
LARGEST = tl.constexpr(3.4028234663852886e38)  # of the finite float32
SCALE = tl.constexpr(2.0**-96)  # brings the squares of any float32 into its range


@triton.jit
def ordered(x):
    """float32 as int32 in the order of the numbers: -0 equals +0, NaN is the largest, as argmax has it."""
    # Not x + 0.0: fused with the product that x may be, it leaves one that underflows -0.
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def pack(x, low):
    """int64 in the order of (x, low), for 0 <= low < 2^31."""
    return (ordered(x).to(tl.int64) << 32) | low


@triton.jit
def unpack(packed):
    """The number that was packed."""
    bits = (packed >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def clamp(index, n):
    """The index among 0 .. n - 1 nearest to this one: damaged state may hold anything, and touches no other memory."""
    return tl.minimum(tl.maximum(index, 0), n - 1)
