"""Implementations: everybody whose training step is timed, from plain `nn.Linear` to the CUDA kernels."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends, reference
from ..layer import BCLLayer
from ..spec import BCLConfig
from ..structures import Pull
from .precisions import forward

Step = Callable[[], None]
CONFIG = BCLConfig()
NAMES = ("linear", "reference", "compiled", *backends.NAMES[1:])  # `nn.Linear`, the floor, first
COMPILERS = (os.environ.get("CXX", "c++"), "g++", "clang++")  # one of which torch.compile takes on a CPU
NEVER = 10**9  # recompute_every of a layer that is timed: its refresh is timed apart


@dataclass(frozen=True)
class Size:
    """One layer and its batch: B samples, D features, N inputs."""

    B: int
    D: int
    N: int

    def __str__(self) -> str:
        return f"({self.B}, {self.D}, {self.N})"


@dataclass(frozen=True)
class Implementation:
    """A layer that is ready to train on a fixed random batch."""

    weight: Tensor  # [D, N], changed in place by `step`
    step: Step  # forward, backward with dX, and for BCL the pull; never a refresh
    refresh: Step | None  # finds the neighbors: before the first step, and in training every 50 steps; None: no BCL


def why_not(name: str, device: str) -> str | None:
    """None where an implementation can be timed on this type of device ("cpu", "cuda"), else the reason."""
    if name == "compiled" and device == "cpu" and not any(map(shutil.which, COMPILERS)):
        return f"torch.compile finds no C++ compiler ({', '.join(COMPILERS)})"
    if name not in backends.NAMES:
        return None
    if name in backends.ON_GPU and device == "cpu":
        return "it serves GPUs; what interprets it on a CPU is not timed"
    return backends.why_not(name, device)


def reasons(device: str, **others: str) -> dict[str, str]:
    """Implementations that cannot be timed on this type of device -> why; `others` are the caller's own."""
    found = {name: why_not(name, device) for name in NAMES}
    return {name: why for name, why in found.items() if why is not None} | others


def serving(device: str = "cpu") -> list[str]:
    """Those of NAMES that can be timed on this type of device."""
    return [name for name in NAMES if why_not(name, device) is None]


def serving_stages(device: str = "cpu") -> list[str]:
    """Those of them that are backends, the reference first: whoever serves single stages."""
    return [name for name in serving(device) if name in backends.NAMES]


def build(
    name: str, size: Size, weight: Tensor | None = None, device: str = "cpu", precision: str = "fp32"
) -> Implementation:
    """An implementation with this weight [D, N], or None for one drawn by `nn.Linear`: the same numbers for everybody.

    Its forward is one of this precision (see `precisions`); `compiled` knows fp32 and tf32. Raises ValueError where a
    backend of this name cannot serve on the device.
    """
    torch.manual_seed(0)
    options = {} if name in ("linear", "compiled") else dict(backend=name, recompute_every=NEVER)
    layer = (BCLLayer if options else nn.Linear)(size.N, size.D, device=device, **options)
    if weight is not None:
        layer.weight.data.copy_(weight)
    if name == "compiled":
        return _compiled(layer, size)
    if name == "linear":
        return Implementation(layer.weight, training_step(layer, size, precision), None)

    def refresh() -> None:
        layer.neighbors.copy_(backends.stage("neighbors", name)(layer.weight.detach(), layer.neighbors.shape[1]))

    layer.step.fill_(1)  # not a multiple of recompute_every: no step refreshes by itself
    return Implementation(layer.weight, training_step(layer, size, precision), refresh)


def training_step(layer: nn.Linear, size: Size, precision: str = "fp32") -> Step:
    """A function that runs one training step on a fixed random batch whose gradient is needed too."""
    x, grad_output = batch(size, layer.weight.device)
    grad_output = grad_output.bfloat16() if precision == "bf16" else grad_output
    x.requires_grad_()

    def step() -> None:
        with forward(precision, x.device.type):
            output = layer(x)
        output.backward(grad_output)
        x.grad = layer.weight.grad = layer.bias.grad = None

    return step


def batch(size: Size, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """x [B, N] in [0, 1] and the gradient of an output [B, D], drawn on the device: the same numbers at every call."""
    meta = torch.device(device).type == "meta"
    kinds = dict(device=device, generator=None if meta else torch.Generator(device).manual_seed(0))
    return torch.rand(size.B, size.N, **kinds), torch.randn(size.B, size.D, **kinds) / size.B


def whole_step(x: Tensor, weight: Tensor, bias: Tensor, neighbors: Tensor, grad_output: Tensor) -> tuple[Tensor, ...]:
    """The literal algorithm with its three products, the pull included, as one function of the reference's stages."""
    activation = F.linear(x, weight, bias)
    won = reference.competition(activation, neighbors, CONFIG.temperature, x, CONFIG.forces, 0.0, 0.0)
    choosing = won.x_inverse_norm, None, won.need, CONFIG.affinity, "hard", CONFIG.rescue_k
    rescue = reference.selection(activation, bias, *choosing)
    masked, bias_gradient = reference.gradient(grad_output, won.rank_score, None)
    gradients = masked @ weight, masked.T @ x, bias_gradient
    forces = won.winner_share, won.som_strength
    target = reference.targets(Pull(x, won.pair_feature, won.pair_pull, *rescue, *forces))
    return *gradients, weight + CONFIG.som_lr * reference.som_increment(weight, target, won.som_strength)


def _compiled(layer: nn.Linear, size: Size) -> Implementation:
    """`whole_step` through torch.compile, without autograd: the best that a compiler makes of the reference."""
    weight, bias = layer.weight.detach(), layer.bias.detach()
    x, grad_output = batch(size, weight.device)
    torch.compiler.reset()  # after eight sizes it would give up and not say so
    function = torch.compile(whole_step, dynamic=False)
    neighbors = torch.zeros(size.D, min(CONFIG.neighborhood_k, size.D - 1), dtype=torch.int64, device=weight.device)

    def step() -> None:
        weight.copy_(function(x, weight, bias, neighbors, grad_output)[-1])

    def refresh() -> None:
        neighbors.copy_(reference.neighbors(weight, CONFIG.neighborhood_k))

    return Implementation(weight, step, refresh)


def trained_weight(size: Size, steps: int = 60, device: str = "cpu", backend: str | None = None) -> Tensor:
    """A weight [D, N] after strong pulls on random data: features have become alike, and few win.

    `backend` trains it, None: the fastest of the device.
    """
    torch.manual_seed(0)
    layer = BCLLayer(size.N, size.D, som_lr=0.05, backend=backend, device=device)
    step = training_step(layer, size)
    for _ in range(steps):
        step()
    return layer.weight.detach().clone()
