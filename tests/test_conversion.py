"""Layers of a model made to compete, bound, and made plain again: what is computed then is what nn.Linear computes."""

import pytest
import torch
from helpers.layers import D, N, batch, make, same, state
from torch import nn
from torch.nn.utils import parametrizations

spaces = pytest.mark.parametrize("space", ["weight", "offset"])


def trained(space="weight", steps=3, **options):
    """A layer that has pulled, so that its offset, if it has one, is not zero."""
    layer = make(som_space=space, som_lr=0.1, **options)
    for seed in range(steps):
        layer(batch(seed=seed, dtype=layer.weight.dtype)).square().mean().backward()
    return layer


# --- effective_weight and to_linear ----------------------------------------------------------------------------------


@spaces
def test_the_effective_weight_is_what_the_layer_multiplies_with(space):
    layer = trained(space)
    weight = layer.effective_weight
    assert weight.equal(layer.weight if space == "weight" else layer.weight + layer.som_offset)
    assert not weight.requires_grad and weight.equal(layer.weight) == (space == "weight")
    assert layer.eval()(batch()).equal(nn.functional.linear(batch(), weight, layer.bias))
    layer.weight.data.add_(1)
    assert weight.equal(layer.weight) == (space == "weight")  # W itself, or a sum of that moment


def test_an_offset_that_nobody_wrote_is_not_in_the_effective_weight(memory):
    layer = make(som_space="offset", device="meta")
    assert layer.effective_weight.is_meta
    layer = layer.to_empty(device="cpu")
    nn.init.ones_(layer.weight)
    with pytest.warns(UserWarning, match="neighbors were never written"):
        assert layer.effective_weight.equal(layer.weight)


@spaces
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_to_linear_computes_what_the_layer_does_in_eval(space, dtype, bias):
    layer, x = trained(space, bias=bias, dtype=dtype), batch(dtype=dtype)
    random = torch.get_rng_state()
    linear = layer.to_linear()
    assert type(linear) is nn.Linear and (linear.in_features, linear.out_features) == (N, D)
    assert torch.get_rng_state().equal(random)
    assert linear.training and not layer.eval().to_linear().training
    assert linear(x).equal(layer(x)) and linear(x).dtype == dtype and (linear.bias is None) != bias
    other = nn.Linear(N, D, bias, dtype=dtype)
    other.load_state_dict(linear.state_dict(), strict=True)
    assert other(x).equal(linear(x))


@spaces
def test_to_linear_is_independent(space):
    layer = trained(space)
    layer.bias.requires_grad_(False)
    layer.register_forward_hook(lambda *args: pytest.fail("a hook went along"))
    linear, before = layer.to_linear(), state(layer)
    assert linear.weight.requires_grad and not linear.bias.requires_grad and linear.weight.grad is None
    assert {p.data_ptr() for p in linear.parameters()}.isdisjoint(p.data_ptr() for p in layer.parameters())
    torch.optim.SGD(linear.parameters(), 0.1).zero_grad()
    linear(batch()).square().mean().backward()
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.fill_(7)
    assert same(state(layer), before)


def test_to_linear_keeps_strides_of_the_weight_and_the_meta_device():
    layer = make()
    layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    assert layer.to_linear().weight.stride() == layer.weight.stride() == (1, D)
    for space in ("weight", "offset"):
        linear = make(device="meta", som_space=space).to_linear()
        assert {parameter.device.type for parameter in linear.parameters()} == {"meta"}
        assert linear.weight.shape == (D, N)


def test_to_linear_of_a_parametrized_layer_has_its_weight():
    layer = parametrizations.weight_norm(make()).eval()
    linear = layer.to_linear()
    assert type(linear) is nn.Linear and linear(batch()).equal(layer(batch())) and linear.weight.is_leaf
