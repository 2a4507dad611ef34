"""Optimizers whose steps bring a closure, and scalers that skip steps: the bits of the same plain loop."""

import pytest
import torch
from helpers.layers import same, state
from helpers.training import (
    DATA,
    OPTIMIZERS,
    bind_all,
    network,
    optimizers,
    train,
)
from torch import nn
from torch.nn import functional as F


def closure_of(model, optimizer, x, y):
    def closure():
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        return loss

    return closure


@optimizers
@pytest.mark.parametrize("call", ["positional", "keyword", "none", "keyword none"])
def test_a_closure_pulls_before_its_own_update(optimizer, call):
    model = network()
    expected, optimizer = train(network(), optimizer, epochs=2), OPTIMIZERS[optimizer](model.parameters())
    bind_all(model, optimizer)
    for x, y in 2 * DATA:
        closure = closure_of(model, optimizer, x, y)
        if "none" in call:
            closure()
            optimizer.step(None) if call == "none" else optimizer.step(closure=None)
        else:
            loss = optimizer.step(closure) if call == "positional" else optimizer.step(closure=closure)
            assert loss.requires_grad, "the closure's result must be returned"
    assert same(state(model), expected)


def test_backwards_before_a_closure_are_averaged_with_its_own():
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    bind_all(model, optimizer)
    for start in (0, 4):
        window = DATA[start : start + 4]

        def backward(x, y):
            loss = F.cross_entropy(model(x), y) / 4
            loss.backward()
            return loss

        for x, y in window[:-1]:
            backward(x, y)
        optimizer.step(lambda item=window[-1]: backward(*item))
        optimizer.zero_grad()
    assert same(state(model), train(network(), window=4))


def test_a_closure_that_raises_pulls_nothing_twice():
    model, other = network(), network()
    optimizers = [OPTIMIZERS["sgd"](each.parameters()) for each in (model, other)]
    for each, optimizer in zip((model, other), optimizers, strict=True):
        bind_all(each, optimizer)

    def fails():
        closure_of(model, optimizers[0], *DATA[0])()
        raise KeyError("closure")

    with pytest.raises(KeyError, match="closure"):
        optimizers[0].step(fails)
    closure_of(other, optimizers[1], *DATA[0])()
    for each, optimizer in zip((model, other), optimizers, strict=True):
        optimizer.zero_grad()
        F.cross_entropy(each(DATA[1][0]), DATA[1][1]).backward()
        optimizer.step()
    assert same(state(model), state(other))


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_in_a_loop_of_windows(fused):
    """float16's loop: a step with an overflow leaves no trace but in `step`, which counts backwards."""

    def make(model):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=fused)
        bind_all(model, optimizer)
        return model, optimizer

    (scaled, optimizer), (model, reference) = make(network()), make(network())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    for i, (x, y) in enumerate(2 * DATA):
        overflows = i in (3, 9)
        loss = F.cross_entropy(scaled(x), y)
        scaler.scale(loss * torch.inf if overflows else loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(scaled.parameters(), 1e6)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if not overflows:
            nn.utils.clip_grad_norm_(model.parameters(), 1e6)
            reference.step()
        reference.zero_grad()
    assert scaler.get_scale() == 2.0 and same(state(scaled), state(model))
