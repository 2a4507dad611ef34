"""Forwards that are made anew, saved tensors that are copied, gradients of gradients: one pull, or an error."""

import warnings

import pytest
import torch
from helpers.layers import N, batch, same, square, state
from torch import nn
from torch.utils.checkpoint import checkpoint


@pytest.fixture(autouse=True)
def no_warning_that_a_test_does_not_expect():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*BCLLayer.*")
        yield


RECOMPUTED = {
    "non-reentrant": lambda function, x: checkpoint(function, x, use_reentrant=False),
    "reentrant": lambda function, x: checkpoint(function, x, use_reentrant=True),
    "nested": lambda function, x: checkpoint(
        lambda x: checkpoint(function, x, use_reentrant=True), x, use_reentrant=True
    ),
    "reentrant in non-reentrant": lambda function, x: checkpoint(
        lambda x: checkpoint(function, x, use_reentrant=True), x, use_reentrant=False
    ),
    "offloaded": lambda function, x: offloaded(function, x),
}


def offloaded(function, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda copy: copy):
        return function(x)


def train_twice_used(layer, bound, segment, steps=5):
    """Steps of a model that uses one layer in two segments; returns the gradients of its inputs."""
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    if bound:
        layer.bind_optimizer(optimizer)
    gradients = []
    for seed in range(steps):
        x = batch(seed=seed).requires_grad_()
        optimizer.zero_grad()
        segment(layer, segment(layer, x).tanh()).square().mean().backward()
        optimizer.step()
        gradients.append(x.grad)
    return gradients


@pytest.mark.parametrize("how", RECOMPUTED)
def test_a_layer_in_two_recomputed_segments_is_bit_equal(how):
    for bound, options in ((False, {}), (True, {}), (False, dict(som_space="offset"))):
        plain, other = square(**options), square(**options)
        expected = train_twice_used(plain, bound, lambda function, x: function(x))
        got = train_twice_used(other, bound, RECOMPUTED[how])
        assert all(map(torch.equal, expected, got)), "the gradient of the input"
        assert same(state(plain), state(other)) and int(other.step) == 5 and other._pulls.idle


@pytest.mark.parametrize("how", RECOMPUTED)
def test_two_losses_of_one_recomputed_forward(how):
    """A second backward over the graph: no second pull, with a bound optimizer; else right, or an error."""
    plain, other = square(), square()
    for layer, segment in ((plain, lambda function, x: function(x)), (other, RECOMPUTED[how])):
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        layer.bind_optimizer(optimizer)
        for seed in range(4):
            x = batch(seed=seed).requires_grad_()
            loss = segment(layer, x).square().mean()
            loss.backward(retain_graph=True)
            if layer is other and how in ("reentrant", "nested", "reentrant in non-reentrant"):
                with pytest.raises(RuntimeError, match=r"use_reentrant=False"):
                    loss.backward()
                return
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same(state(plain), state(other)) and int(other.step) == 4


@pytest.mark.parametrize("how", [how for how in RECOMPUTED if how != "offloaded"])
def test_two_losses_of_one_recomputed_forward_without_binding_raise(how):
    layer = square()
    loss = RECOMPUTED[how](layer, batch().requires_grad_()).square().mean()
    loss.backward(retain_graph=True)
    once = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"recomputed .*bind_optimizer\(\)"):
        loss.backward()
    assert layer.weight.equal(once) and int(layer.step) == 1


@pytest.mark.parametrize("how", ["non-reentrant", "reentrant"])
def test_two_recomputed_forwards_with_a_backward_each_raise_unless_bound(how):
    """The first backward pulls the weight from under the second's recomputation."""
    plain, other, free = (square() for _ in range(3))
    for layer, segment in ((plain, lambda function, x: function(x)), (other, RECOMPUTED[how])):
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        layer.bind_optimizer(optimizer)
        for seed in range(0, 8, 2):
            losses = [segment(layer, batch(seed=s).requires_grad_()).square().mean() for s in (seed, seed + 1)]
            for loss in losses:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    if how == "non-reentrant":
        assert same(state(plain), state(other)) and int(other.step) == 8
    losses = [RECOMPUTED[how](free, batch(seed=s).requires_grad_()).square().mean() for s in (0, 1)]
    losses[0].backward()
    with pytest.raises(RuntimeError, match=r"recomputed .*bind_optimizer\(\)"):
        losses[1].backward()


def test_a_layer_inside_and_outside_of_a_reentrant_checkpoint_is_right_or_raises():
    """Which of the two comes first in the backward decides."""

    def inner_first(layer, segment, x):
        return layer(segment(layer, x))  # backward: the plain one, whose pull waits for the checkpoint's dX

    def outer_first(layer, segment, x):
        return segment(layer, layer(x))

    for build in (inner_first, outer_first):
        plain, other = square(), square()
        for layer, segment in ((plain, lambda function, x: function(x)), (other, RECOMPUTED["reentrant"])):
            x = batch().requires_grad_()
            loss = build(layer, segment, x).square().mean()
            if layer is other and build is inner_first:
                with pytest.raises(RuntimeError, match="use_reentrant=False"):
                    loss.backward()
                continue
            loss.backward()
        if build is outer_first:
            assert same(state(plain), state(other))


@pytest.mark.parametrize("how", ["plain", *RECOMPUTED])
def test_a_backward_that_raises_leaves_nothing_behind(how):
    def break_off(gradient):
        raise OSError("broken")

    layer, other = square(), square()
    segment = RECOMPUTED.get(how, lambda function, x: function(x))
    x = batch(seed=9)
    hidden = segment(layer, x.requires_grad_())
    hidden = segment(layer, hidden)
    entry = x * 1.0
    entry.register_hook(break_off)
    loss = segment(layer, entry).sum() + hidden.sum()
    with pytest.raises(OSError, match="broken"):
        loss.backward()
    del loss, hidden, entry
    layer.load_state_dict(other.state_dict())
    layer.zero_grad()
    for seed in range(4):
        for each in (layer, other):
            segment(each, batch(seed=seed).requires_grad_()).square().mean().backward()
    assert same(state(layer), state(other)) and layer._pulls.idle


@pytest.mark.parametrize("how", ["non-reentrant", "reentrant"])
def test_a_recomputation_refreshes_no_neighbors_that_its_forward_had_not(how):
    """A backward that comes between a forward and its recomputation takes the step to one at which they are due."""
    plain, other = (square(recompute_every=3) for _ in range(2))
    for layer, segment in ((plain, lambda function, x: function(x)), (other, RECOMPUTED[how])):
        optimizer = torch.optim.SGD(layer.parameters(), 0.5)
        layer.bind_optimizer(optimizer)
        for seed in range(0, 8, 2):
            losses = [segment(layer, batch(seed=s).requires_grad_()).square().mean() for s in (seed, seed + 1)]
            losses[0].backward()
            with torch.no_grad():
                layer(batch(seed=99))  # a validation in train()
            losses[1].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same(state(plain), state(other)) and int(other.step) == 8


def test_a_validation_in_between_hides_no_late_recomputation():
    layer = square()
    losses = [RECOMPUTED["reentrant"](layer, batch(seed=s).requires_grad_()).sum() for s in (0, 1)]
    losses[0].backward()
    with torch.no_grad():
        layer(batch(seed=2))
    with pytest.raises(RuntimeError, match=r"recomputed .*bind_optimizer\(\)"):
        losses[1].backward()


class Recomputing(torch.autograd.Function):
    """A function that recomputes by autograd.grad, as those of invertible networks do."""

    @staticmethod
    def forward(ctx, layer, x, *parameters):
        ctx.layer = layer
        ctx.save_for_backward(x, *parameters)
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx, gradient):
        x, *parameters = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.layer(x)
        return None, *torch.autograd.grad(output, (x, *parameters), gradient)


def test_a_recomputation_by_autograd_grad_pulls_with_the_backward_around_it():
    plain, other = square(), square()
    for layer, call in ((plain, plain), (other, lambda x: Recomputing.apply(other, x, *other.parameters()))):
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        for seed in range(4):
            call(batch(seed=seed).requires_grad_()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same(state(plain), state(other)) and int(other.step) == 4 and other._pulls.idle


def test_an_error_that_is_kept_does_not_stay_in_the_way():
    """Its traceback holds the frames of the backward that raised it, as a notebook's last error does."""
    layer, errors = square(), []

    def break_off(record):
        raise KeyboardInterrupt

    with layer.observe(break_off):
        try:
            layer(batch()).sum().backward()
        except KeyboardInterrupt as error:
            errors.append(error)
    step = int(layer.step)
    layer(batch(seed=1)).sum().backward()
    assert errors and int(layer.step) == step + 1 and layer._pulls.idle


# --- Gradients of gradients ------------------------------------------------------------------------------------------


def penalized(layer):
    x = batch().requires_grad_()
    y = layer(x).sum()
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    (y + g.norm(dim=1).square().sum()).backward()


def curvature(layer):
    x, parameters = batch(), list(layer.parameters())
    gradients = torch.autograd.grad(layer(x).square().sum(), parameters, create_graph=True)
    torch.autograd.grad(sum(g.sum() for g in gradients), parameters)


SECOND = {
    "hessian": lambda layer: torch.autograd.functional.hessian(lambda x: layer(x).square().sum(), batch(3)),
    "hvp": lambda layer: torch.autograd.functional.hvp(lambda x: layer(x).square().sum(), batch(3), batch(3)),
    "gradient penalty": penalized,
    "curvature": curvature,
}


@pytest.mark.parametrize("how", SECOND)
def test_second_derivatives_raise_in_training_and_are_nn_linears_in_eval(how):
    """They would be zeros, in silence, wherever the second backward does not pass through the output's gradient."""
    for options in ({}, dict(som_space="offset")):
        layer = square(**options)
        with pytest.raises(RuntimeError, match=r"no second derivative in training.*eval\(\)"):
            SECOND[how](layer)
        layer.eval()
        linear = nn.Linear(N, N)
        linear.weight, linear.bias = layer.weight, layer.bias
        got, expected = SECOND[how](layer), SECOND[how](linear)
        if how == "hessian":
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("how", RECOMPUTED)
def test_a_backward_that_builds_a_graph_trains_alike(how):
    plain, other = square(), square()
    for layer, segment in ((plain, lambda function, x: function(x)), (other, RECOMPUTED[how])):
        for seed in range(3):
            loss = segment(layer, batch(seed=seed).requires_grad_()).square().mean()
            if how in ("plain", "non-reentrant", "offloaded"):  # reentrant checkpoints build none
                loss.backward(create_graph=True)
            else:
                loss.backward()
            layer.zero_grad()
    assert same(state(plain), state(other)) and int(other.step) == 3
