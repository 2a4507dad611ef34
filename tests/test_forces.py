"""The forces that a Monitor measures are those of a loop taken apart: gradient, pull, and the optimizer's own move."""

import math

import pytest
import torch
from helpers.layers import D, batch, make, same, state
from helpers.training import DATA, OPTIONS, measured, two_layers
from torch import nn

from bcl_fast import diagnostics as diag
from bcl_fast.layer import BCLLayer
from bcl_fast.monitor import Monitor

SGD = torch.optim.SGD


@pytest.mark.parametrize("kind", ["free", "bound", "offset", "low precision"])
@pytest.mark.parametrize("window", [1, 3])
def test_forces_are_those_of_a_loop_taken_apart(kind, window):
    """The gradient as the optimizer gets it; what the pulls of the step have added; what the optimizer has."""
    options = dict(som_space="offset") if kind == "offset" else {}
    models = [nn.Sequential(make(som_lr=0.05, **options)) for _ in range(3)]
    if kind == "low precision":
        models = [model.to(torch.bfloat16) for model in models]
    optimizers = [SGD(model.parameters(), 0.1) for model in models]
    frozen = SGD(models[2].parameters(), 0.0)  # of the third model nothing but pulls moves the weight
    if kind in ("bound", "offset"):
        for model, optimizer in zip(models, [*optimizers[:2], frozen], strict=True):
            model[0].bind_optimizer(optimizer)
    found, monitor = measured(models[0], optimizers[0], every=2)
    xs = batch(5 * window * 3, dtype=models[0][0].weight.dtype).split(5)

    def window_of(step, model):
        for x in xs[step * window : (step + 1) * window]:
            model(x).square().mean().backward()

    expected = []
    for step in range(3):
        before = models[1][0].effective_weight.clone()
        models[2].load_state_dict(models[1].state_dict())
        for model in (models[1], models[2]):
            window_of(step, model)
        gradient = models[1][0].weight.grad.clone()
        optimizers[1].step()
        frozen.step()
        pulled, after = models[2][0].effective_weight, models[1][0].effective_weight
        expected.append(diag.force_norms(*(each.double() for each in (gradient, before, pulled, after))))
        optimizers[1].zero_grad()
        frozen.zero_grad()
    with monitor:
        for step in range(3):
            window_of(step, models[0])
            optimizers[0].step()
            optimizers[0].zero_grad()
    assert same(state(models[0]), state(models[1])) and [one.step for one in found] == [window - 1, 3 * window - 1]
    tolerance = dict(rtol=2e-2, atol=1e-3) if kind == "low precision" else dict(rtol=2e-4, atol=1e-6)
    for one, norms in zip(found, expected[::2], strict=True):
        for name, norm in norms.items():
            torch.testing.assert_close(one.features[name].double(), norm, **tolerance)
        assert one.metrics["pull"] == pytest.approx(float(one.features["pull"].mean()))


def test_a_scaler_s_gradient_is_measured_without_its_scale_and_a_skipped_step_is_none():
    model, twin = (nn.Sequential(make(som_lr=0.05)) for _ in range(2))
    optimizers = [torch.optim.Adam(each.parameters(), 1e-2, fused=True) for each in (model, twin)]
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        each[0].bind_optimizer(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    found, monitor = measured(model, optimizers[0])
    with monitor:
        for step in range(3):
            x = batch(seed=step) * (math.inf if step == 1 else 1)
            loss = model(x).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizers[0])
            scaler.update()
            optimizers[0].zero_grad()
    twin(batch(seed=0)).square().mean().backward()
    gradient = twin[0].weight.grad.norm(dim=1)
    torch.testing.assert_close(found[0].features["gradient"], gradient, rtol=1e-4, atol=1e-6)
    assert found[-1].step == 2 and found[-1].metrics["adam"] < 1 and found[-1].metrics["pull"] > 0


def test_a_step_that_a_fused_optimizer_has_skipped_is_none():
    layer = make(som_lr=0.05)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2, fused=True)
    scaler, (found, monitor) = torch.amp.GradScaler("cpu", init_scale=1024.0), measured(layer, optimizer)
    with monitor:
        for factor in (math.inf, 1.0, 1.0):
            scaler.scale((layer(batch()) * factor).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert [one.step for one in found] == [1, 2] and all(one.metrics["adam"] > 0 for one in found)


@pytest.mark.parametrize("closed", [False, True], ids=["step", "step(closure)"])
def test_the_gradient_is_what_the_optimizer_gets_even_where_it_writes_into_it(closed):
    layer, gradients = make(som_lr=0.05), []
    optimizer = SGD(layer.parameters(), 0.1, momentum=0.9, nesterov=True, foreach=True)
    found, monitor = measured(layer, optimizer)

    def closure():
        optimizer.zero_grad()
        layer(batch(seed=len(gradients))).square().mean().backward()
        gradients.append(layer.weight.grad.norm(dim=1))

    with monitor:
        for _ in range(3):
            if closed:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            assert not layer.weight.grad.norm(dim=1).equal(gradients[-1])  # this optimizer does
    for one, gradient in zip(found, gradients, strict=True):
        torch.testing.assert_close(one.features["gradient"], gradient)


@pytest.mark.parametrize("bound", [False, True])
def test_a_write_of_somebody_else_is_not_the_optimizer_s_move(bound):
    """Whether the step is tried once more from a checkpoint, or the weight is moved as it waits for its step."""
    layers, found, moves = [make(som_lr=0.05) for _ in range(2)], [], []
    for layer, disturbed in zip(layers, (False, True), strict=True):
        optimizer, saved = SGD(layer.parameters(), 0.1), state(layer)
        if bound:
            layer.bind_optimizer(optimizer)
        with Monitor(layer, optimizer, 1, out=None, callback=found.append):
            if disturbed:
                layer(batch(seed=9)).square().mean().backward()
                optimizer.zero_grad()
                layer.load_state_dict(saved)
            layer(batch()).square().mean().backward()
            if disturbed:
                layer.weight.data.mul_(3)
            moves.append(0.1 * layer.weight.grad.norm(dim=1))
            optimizer.step()
    for one, move in zip(found, moves, strict=True):
        torch.testing.assert_close(one.features["adam"], move, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(one.features["pull"], found[0].features["pull"], rtol=1e-3, atol=1e-6)
    assert [one.step for one in found] == [0, 0]


@pytest.mark.parametrize("how", ["add and subtract", "save and restore"])
def test_forces_that_cannot_be_told_apart_are_left_out(how):
    """Of two backwards in a step, the second with the weight elsewhere: who knows what is left of the first pull?"""
    layer = make(som_lr=0.05)
    optimizer = SGD(layer.parameters(), 0.1)
    found, monitor = measured(layer, optimizer)
    with monitor, torch.no_grad():
        for _ in range(2):
            saved = layer.weight.clone()
            for part in range(2):
                with torch.enable_grad():
                    layer(batch(seed=part)).square().mean().backward()
                if part == 0:
                    layer.weight.add_(0.01)
                elif how == "save and restore":
                    layer.weight.copy_(saved)
                else:
                    layer.weight.sub_(0.01)
            optimizer.step()
        layer.zero_grad()
        with torch.enable_grad():
            layer(batch()).square().mean().backward()
        optimizer.step()
    assert [("pull" in one.metrics, one.step) for one in found] == [(False, 1), (False, 3), (True, 4)]


@pytest.mark.parametrize("first", [True, False], ids=["bound before", "bound within"])
def test_lbfgs_is_measured_whole(first):
    layer = make(som_lr=0.05)
    optimizer, before = torch.optim.LBFGS(layer.parameters(), max_iter=3), layer.weight.detach().clone()
    found, monitor = measured(layer, optimizer, every=2)
    if first:
        layer.bind_optimizer(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = layer(batch()).square().mean()
        loss.backward()
        return loss

    with monitor:
        layer.bind_optimizer(optimizer)
        optimizer.step(closure)
        assert len(found) == 1 and found[0].layer == "BCLLayer" and found[0].metrics["pull"] > 0
        moved = (layer.weight - before).norm(dim=1)
        for _ in range(3):
            optimizer.step(closure)
    assert len(found) == 2
    assert (found[0].features["pull"] + found[0].features["adam"] >= moved - 1e-6).all()


def test_a_layer_that_is_unfrozen_within_the_block_has_its_forces():
    model = two_layers()
    model[2].weight.requires_grad = False
    optimizer = SGD(model[0].parameters(), 0.1)
    found, monitor = measured(model, optimizer)
    with monitor:
        for step in range(4):
            if step == 2:
                model[2].weight.requires_grad = True
                optimizer.add_param_group({"params": model[2].parameters()})
            model(DATA[step][0]).square().mean().backward()
            optimizer.step()
    assert [(one.layer, "adam" in one.metrics) for one in found[2:]] == [("0", True), ("2", True)] * 2


def test_layers_of_one_weight_have_no_forces_to_tell_apart():
    model = nn.Sequential(BCLLayer(D, D, **OPTIONS), nn.Tanh(), BCLLayer(D, D, **OPTIONS))
    model[2].weight = model[0].weight
    optimizer = SGD(model.parameters(), 0.1)
    found, monitor = measured(model, optimizer)
    with monitor:
        model(torch.rand(7, D)).sum().backward()
        optimizer.step()
    assert [one.layer for one in found] == ["0", "2"] and not any("pull" in one.metrics for one in found)
