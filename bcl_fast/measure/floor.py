"""The floor: bytes and operations of every stage, by formula, over what this device reached in this process."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .implementations import CONFIG, Size
from .precisions import PRECISIONS, multiplying
from .timing import captured, fastest_ms, taken, window


@dataclass(frozen=True)
class Work:
    """What a stage cannot do without."""

    moved: float = 0  # bytes read or written once, of matrices that no cache holds
    gathered: float = 0  # bytes read again and again, through the cache
    operations: float = 0  # of float32 products


def work(size: Size) -> dict[str, Work]:
    """Stage -> its work. `products` are those of an `nn.Linear` step; `neighbors` is one refresh.

    Each [B, D] matrix moves once: the competition reads the activation and writes rank_score, the selection reads the
    activation, the gradient reads two and writes one, the rank reads one and writes int64. Targets gather B * k + D * r
    rows of x through the cache and read and write the weight. A product of P x Q x R is 2 P Q R operations; neighbors
    need that of every pair of features once.
    """
    B, D, N = size.B, size.D, size.N
    k, r = min(CONFIG.neighborhood_k, D - 1), min(CONFIG.rescue_k, B)
    matrix, x, weight = 4 * B * D, 4 * B * N, 4 * D * N
    return {
        "neighbors": Work(moved=weight + 8 * D * k, operations=D * (D - 1) * N),
        "competition": Work(moved=2 * matrix + x),
        "inverse_norm": Work(moved=x),
        "selection": Work(moved=matrix),
        "targets_pull_": Work(moved=2 * weight, gathered=4 * (B * k + D * r) * N),
        "gradient": Work(moved=3 * matrix),
        "rank": Work(moved=3 * matrix),
        "products": Work(operations=6 * B * D * N),
    }


LARGE, SIDE = 1 << 28, 8192  # elements of a copy and sides of a product that fill a GPU
STEP = ("competition", "selection", "targets_pull_", "gradient", "products")  # norms are part of the competition


@dataclass(frozen=True)
class Ceilings:
    """What this device reached in this process: nothing that moves or multiplies as much can be faster."""

    copy_gbs: float  # GB/s read and written, of a copy that no cache holds
    cache_gbs: float  # the same of one that a cache holds
    tflops: float  # of a float32 product, in the precision torch's settings allow it
    tf32_tflops: float | None = None  # of other precisions, on a GPU
    bf16_tflops: float | None = None

    def ms(self, needed: Work, precision: str = "fp32") -> float:
        """The least milliseconds this work takes; only products know a precision."""
        moving = needed.moved / self.copy_gbs + needed.gathered / self.cache_gbs
        return moving / 1e6 + needed.operations / self._rate(precision) / 1e9

    def _rate(self, precision: str) -> float:
        rate = {"fp32": self.tflops, "tf32": self.tf32_tflops, "bf16": self.bf16_tflops}[precision]
        if rate is None:
            raise ValueError(f"the rate of {precision} products was not measured")
        return rate

    def floor_ms(self, size: Size, precision: str = "fp32") -> dict[str, float]:
        """The least milliseconds of every stage; neighbors are found in float32 whatever the layer multiplies in."""
        return {
            stage: self.ms(needed, precision if stage == "products" else "fp32") for stage, needed in work(size).items()
        }

    def step_ms(self, size: Size, precision: str = "fp32") -> float:
        """The least milliseconds of a training step, its share of a refresh included."""
        floor = self.floor_ms(size, precision)
        return sum(floor[stage] for stage in STEP) + floor["neighbors"] / CONFIG.recompute_every


def ceilings(device: str = "cpu") -> Ceilings:
    """Measure the two bandwidths and the product rates of a device."""
    if device == "cuda":
        return _of_gpu()
    large, small, side = 1 << 26, 1 << 14, 1024
    source = torch.rand(large)
    target, a, b = torch.empty_like(source), *torch.rand(2, side, side)
    rates = []
    for count in (large, small):
        one, other = source[:count], target[:count]
        repeats = max(1, (1 << 22) // count)  # a call takes longer than it takes to launch
        ms = fastest_ms(lambda one=one, other=other, n=repeats: [other.copy_(one) for _ in range(n)])
        rates.append(8 * count * repeats / ms / 1e6)
    return Ceilings(*rates, 2 * side**3 / fastest_ms(lambda: a @ b) / 1e9)


def _of_gpu() -> Ceilings:
    large, side, repeats = LARGE, SIDE, 100
    small = torch.cuda.get_device_properties("cuda").L2_cache_size * 2 // 5 // 8  # both copies are 0.4 of the cache
    source = torch.rand(large, device="cuda")
    target, a, b = torch.empty_like(source), *torch.rand(2, side, side, device="cuda")
    copy_gbs = 8 * large / taken(lambda: target.copy_(source), "cuda").ms / 1e6
    one, other = source[:small], target[:small]
    many = captured(lambda: [other.copy_(one) for _ in range(repeats)])  # one by one they wait for their launches
    cache_gbs = 8 * small * repeats / window(many, 0.1, "cuda") / 1e6
    rates = {}
    for precision in PRECISIONS:
        if precision == "bf16":
            a, b = a.bfloat16(), b.bfloat16()
        with multiplying(precision):
            rates[precision] = 2 * side**3 / taken(lambda a=a, b=b: a @ b, "cuda").ms / 1e9
    return Ceilings(copy_gbs, cache_gbs, rates["fp32"], rates["tf32"], rates["bf16"])
