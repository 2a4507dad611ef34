"""Small layers, batches for them, and what one training step must do."""

import pytest
import torch
from torch.nn import functional as F

from bcl_fast import reference as ref
from bcl_fast.layer import BCLLayer
from bcl_fast.testing import VARIANTS
from helpers.backends import ON_CPU

N, D = 13, 11
each_backend = pytest.mark.parametrize("backend", ON_CPU)
CLOSE = {torch.float64: {}, torch.float32: dict(rtol=1e-4, atol=1e-5)}  # for torch.testing.assert_close


def close(got, expected):
    torch.testing.assert_close(got, expected, **CLOSE[got.dtype])


variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def make(backend=None, seed=0, **options):
    torch.manual_seed(seed)
    return BCLLayer(N, D, backend=backend, **{"neighborhood_k": 3, **options})


def square(**options):
    """A layer of as many features as inputs, which may follow itself; its pull shows soon."""
    torch.manual_seed(0)
    return BCLLayer(N, N, **{"neighborhood_k": 3, "som_lr": 0.05, "recompute_every": 2, **options})


def batch(B=17, seed=1, dtype=torch.float32):
    return torch.randn(B, N, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def state(layer):
    return {name: value.clone() for name, value in layer.state_dict().items()}


def same(one, other):
    return all(one[name].equal(other[name]) for name in one) and one.keys() == other.keys()


def check_one_step(backend, options, bias=True, dtype=torch.float64):
    """Output, dX, dW, dc, the pull and the buffers of one training step, composed by hand from the reference."""
    layer = make(backend, bias=bias, dtype=dtype, som_lr=0.1, **options)
    if layer.som_offset is not None:
        layer.som_offset.copy_(0.1 * batch(D, seed=5, dtype=dtype))
    config, x = layer.config, batch(dtype=dtype).requires_grad_()
    before = state(layer)
    weight = before["weight"] + before.get("som_offset", 0)
    grad_output = torch.randn(17, D, dtype=dtype)

    output = layer(x)
    output.backward(grad_output)

    activation = F.linear(x.detach(), weight, before.get("bias"))
    neighbors = ref.neighbors(weight, config.neighborhood_k)
    record = ref.record(0, x.detach(), weight, before.get("bias"), activation, neighbors, config)
    x_gradient, weight_gradient, bias_gradient = ref.masked_gradients(
        grad_output, record.gradient_mask, x.detach(), weight
    )
    pull = 0.1 * ref.som_increment(weight, record.som_target, record.som_strength)
    close(output, activation)
    close(x.grad, x_gradient)
    close(layer.weight.grad, weight_gradient)
    if bias:
        close(layer.bias.grad, bias_gradient)
    assert layer.neighbors.equal(neighbors) and int(layer.step) == 1
    if layer.som_offset is None:
        close(layer.weight.detach(), weight + pull)
    else:
        close(layer.som_offset, before["som_offset"] + pull)
        assert layer.weight.equal(before["weight"])


def train(layer, steps, start=0):
    """Steps of plain gradient descent, each on a batch of its own."""
    optimizer = torch.optim.SGD(layer.parameters(), 1e-2)
    for step in range(start, start + steps):
        layer(batch(seed=step, dtype=layer.weight.dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
