"""bind_optimizer on models: each layer to the optimizer that holds its weight, or an error that binds none."""

import pytest
import torch
from helpers.layers import same, state
from helpers.models import deep
from helpers.training import DATA, OPTIONS
from torch import nn

from bcl_fast import attach_bcl, bind_optimizer


def twins(count=2):
    """Models with two BCLLayers beside plain ones."""
    models = [deep() for _ in range(count)]
    handles = [attach_bcl(model, ["1.1", "5"], **OPTIONS) for model in models]
    return models, handles


def accumulate(model, optimizer, window=3):
    for i, (x, _) in enumerate(DATA):
        (model(x).square().mean() / window).backward()
        if (i + 1) % window == 0:
            for each in optimizer:
                each.step()
                each.zero_grad()
    return state(model)


class Wrapper:
    """As accelerate's and Lightning's, around an optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


BINDINGS = {
    "one": lambda model, handle, optimizer: bind_optimizer(model, *optimizer),
    "wrapped": lambda model, handle, optimizer: bind_optimizer(model, Wrapper(*optimizer)),
    "a list": lambda model, handle, optimizer: bind_optimizer(model, optimizer),
    "a generator": lambda model, handle, optimizer: bind_optimizer(model, (Wrapper(each) for each in optimizer)),
    "wrapped and bare": lambda model, handle, optimizer: bind_optimizer(model, [Wrapper(*optimizer), *optimizer]),
    "the handle": lambda model, handle, optimizer: handle.bind_optimizer(*optimizer) or ["1.1", "5"],
}


@pytest.mark.parametrize("binding", BINDINGS)
def test_every_layer_pulls_once_for_each_step(binding):
    (model, twin), handles = twins()
    optimizer, plain = ([torch.optim.SGD(each.parameters(), 0.1)] for each in (model, twin))
    assert BINDINGS[binding](model, handles[0], optimizer) == ["1.1", "5"]
    for layer in handles[1].layers.values():
        layer.bind_optimizer(*plain)
    assert same(accumulate(model, optimizer), accumulate(twin, plain))
    assert not same(state(model), accumulate(twins(1)[0][0], [torch.optim.SGD(twins(1)[0][0].parameters(), 0.1)]))


@pytest.mark.parametrize("binding", ["function", "handle"])
def test_each_layer_is_bound_to_the_optimizer_that_holds_it(binding):
    (model, twin), handles = twins()
    both = [
        [torch.optim.SGD(each[:4].parameters(), 0.1), torch.optim.Adam(each[5].parameters())] for each in (model, twin)
    ]
    if binding == "handle":
        handles[0].bind_optimizer(both[0])
    else:
        assert bind_optimizer(model, both[0]) == ["1.1", "5"]
    for layer, optimizer in zip(handles[1].layers.values(), both[1], strict=True):
        layer.bind_optimizer(optimizer)
    assert [layer.bound_optimizer for layer in handles[0].layers.values()] == both[0]
    assert same(accumulate(model, both[0]), accumulate(twin, both[1]))


def test_layers_that_the_optimizer_does_not_hold_stay_as_they_are():
    (model,), (handle,) = twins(1)
    optimizer, other = torch.optim.SGD(model[5].parameters(), 0.1), torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)
    assert bind_optimizer(model, [other, optimizer]) == ["5"]  # `other` is that of a model without such layers
    assert model[1][1].bound_optimizer is None and model[5].bound_optimizer is optimizer
    assert bind_optimizer(model[5], optimizer) == [""]
    with pytest.raises(ValueError, match="weights of all attached layers, got SGD without '1.1'$"):
        handle.bind_optimizer(optimizer)


WRONG_OPTIMIZERS = {
    "none of them": (lambda model: torch.optim.Adam(model[0].parameters()), ValueError, "got Adam without '1.1', '5'$"),
    "none of several": (
        lambda model: [torch.optim.Adam(model[0].parameters()), torch.optim.SGD(model[3].parameters())],
        ValueError,
        "must hold the weight of a BCLLayer of the model, got Adam, SGD without '1.1', '5'$",
    ),
    "no optimizer": (lambda model: [], ValueError, "got no optimizer without"),
    "two": (
        lambda model: [torch.optim.Adam(model.parameters()), torch.optim.SGD(model[5].parameters())],
        ValueError,
        "one for the weight of each layer, got Adam and SGD for '5'",
    ),
    "a str": (lambda model: "adam", TypeError, "or several, got str"),
    "parameters": (lambda model: model.parameters(), TypeError, "or several, got Parameter"),
    "None": (lambda model: None, TypeError, "or several, got NoneType"),
    "None among them": (lambda model: [torch.optim.Adam(model.parameters()), None], TypeError, "got NoneType"),
}


@pytest.mark.parametrize("how", WRONG_OPTIMIZERS)
def test_a_wrong_optimizer_is_named_and_binds_nothing(how):
    build, error, message = WRONG_OPTIMIZERS[how]
    (model,), (handle,) = twins(1)
    for bind in (lambda optimizer: bind_optimizer(model, optimizer), handle.bind_optimizer):
        with pytest.raises(error, match="optimizer must .*") as caught:
            bind(build(model))
        every = bind == handle.bind_optimizer and error is ValueError and how != "two"
        assert caught.match("weights of all attached layers, got .* without '1.1', '5'$" if every else message)
        assert [layer.bound_optimizer for layer in handle.layers.values()] == [None, None]


def test_a_model_without_a_layer_has_nothing_to_bind():
    model = deep()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(TypeError, match="model must be an nn.Module, got SGD"):
        bind_optimizer(optimizer, model)
    with pytest.raises(ValueError, match="model must have a BCLLayer to bind, got none"):
        bind_optimizer(deep(), torch.optim.SGD(deep().parameters(), 0.1))
