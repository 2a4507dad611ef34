"""BCLLayer inside a training program: what SPEC section 5 says of autograd, optimizers and precision."""

import warnings

import pytest
import torch
from helpers.layers import N, batch, each_backend, make, same, state
from torch import nn
from torch.utils.checkpoint import checkpoint

from bcl_fast import counters
from bcl_fast import reference as ref
from bcl_fast.layer import BCLLayer
from bcl_fast.testing import relative_error

LOW = (torch.bfloat16, torch.float16)


def increment(layer, x):
    """v (target - W) of one batch for the present weight, by the reference."""
    weight, bias = layer.weight.detach(), layer.bias.detach()
    neighbors = ref.neighbors(weight, 3)
    record = ref.record(0, x, weight, bias, nn.functional.linear(x, weight, bias), neighbors, layer.config)
    return ref.som_increment(weight, record.som_target, record.som_strength)


# --- Which backward pulls, and how often -----------------------------------------------------------------------------


@each_backend
def test_each_backward_pulls_once_and_counts_a_step(backend):
    layer = make(backend)
    for step in range(3):
        assert int(layer.step) == step
        before = layer.weight.detach().clone()
        layer(batch(seed=step)).sum().backward()
        assert not layer.weight.equal(before)


@each_backend
def test_a_forward_without_a_backward_changes_nothing_but_the_neighbors(backend):
    layer, other = make(backend), make(backend)
    for seed in range(5):
        layer(batch(seed=seed + 9))  # abandoned
    for each in (layer, other):
        each(batch()).square().sum().backward()
    assert same(state(layer), state(other))


@each_backend
def test_an_old_forward_may_get_its_backward_after_a_newer_one(backend):
    layer, other = make(backend, som_lr=0.0), make(backend, som_lr=0.0)
    old, new = layer(batch(seed=1)), layer(batch(seed=2))
    new.sum().backward()
    old.sum().backward()
    assert int(layer.step) == 2
    for seed in (2, 1):
        other(batch(seed=seed)).sum().backward()
    assert layer.weight.grad.equal(other.weight.grad)


@each_backend
def test_autograd_grad_gives_the_masked_gradient_and_pulls_nothing(backend):
    layer, other, x = make(backend), make(backend), batch().requires_grad_()
    before = state(layer)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert layer.weight.equal(before["weight"]) and int(layer.step) == 0
    assert layer._pulls.idle, "the pull of an abandoned backward was kept"
    other(x).square().sum().backward()
    assert gradient.equal(x.grad)


@each_backend
def test_autograd_grad_of_the_weight_and_backward_of_inputs_pull_nothing(backend):
    layer, x = make(backend), batch().requires_grad_()
    before = layer.weight.detach().clone()
    torch.autograd.grad(layer(x).sum(), layer.weight)
    layer(x).sum().backward(inputs=[x])
    assert layer.weight.equal(before) and int(layer.step) == 0 and layer._pulls.idle
    layer(x).sum().backward(inputs=[layer.weight])
    assert int(layer.step) == 1


@each_backend
def test_autograd_grad_and_then_backward_over_the_same_graph(backend):
    layer, x = make(backend), batch().requires_grad_()
    loss = layer(x).square().sum()
    torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward()
    assert int(layer.step) == 1


@each_backend
def test_a_second_backward_over_the_same_graph_pulls_no_second_time(backend):
    layer = make(backend)
    loss = layer(batch()).square().sum()
    loss.backward(retain_graph=True)
    once, gradient = layer.weight.detach().clone(), layer.weight.grad.clone()
    loss.backward()
    assert layer.weight.equal(once) and int(layer.step) == 1
    assert layer.weight.grad.equal(2 * gradient)


@each_backend
def test_a_second_backward_that_needs_the_changed_weight_is_autograds_error(backend):
    layer = make(backend)
    loss = layer(batch().requires_grad_()).square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_backend
def test_double_backward_is_refused(backend):
    layer, x = make(backend), batch().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative in training"):
        gradient.sum().backward()


@each_backend
def test_hidden_layer_gets_and_gives_the_right_gradients(backend):
    """Both layers pull; the first one's gradient goes through the second one's weight of the forward pass."""
    torch.manual_seed(0)
    model = nn.Sequential(BCLLayer(N, 9, backend=backend), nn.Tanh(), BCLLayer(9, 7, backend=backend)).double()
    weights = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    x, grad_output = batch(dtype=torch.float64), torch.randn(17, 7, dtype=torch.float64)
    records = []
    with model[0].observe(records.append), model[2].observe(records.append):
        model(x).backward(grad_output)
    second, first = records
    hidden = torch.tanh(first.activation)
    assert second.x.equal(hidden)
    into_hidden, second_gradient, _ = ref.masked_gradients(grad_output, second.gradient_mask, hidden, weights[1])
    _, first_gradient, _ = ref.masked_gradients(into_hidden * (1 - hidden**2), first.gradient_mask, x, weights[0])
    torch.testing.assert_close(model[2].weight.grad, second_gradient)
    torch.testing.assert_close(model[0].weight.grad, first_gradient)
    assert all(not layer.weight.equal(weight) for layer, weight in zip((model[0], model[2]), weights, strict=True))


def test_an_inplace_activation_may_follow():
    one, two = nn.Sequential(make(), nn.ReLU(inplace=True)), nn.Sequential(make(), nn.ReLU())
    records = []
    with one[0].observe(records.append):
        one(batch()).square().sum().backward()
    two(batch()).square().sum().backward()
    assert same(state(one[0]), state(two[0])) and one[0].weight.grad.equal(two[0].weight.grad)
    assert (records[0].activation < 0).any(), "the record must hold the activation before the ReLU"


@each_backend
def test_the_pull_comes_before_an_optimizer_that_steps_in_the_backward(backend):
    layer, other = make(backend), make(backend)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer.weight.register_post_accumulate_grad_hook(lambda weight: optimizer.step())
    x = batch()
    layer(x).square().sum().backward()
    other(x).square().sum().backward()
    torch.testing.assert_close(layer.weight, other.weight - 0.1 * other.weight.grad)


def test_two_layers_may_share_one_weight():
    one, two = make(), make()
    two.weight = one.weight
    (one(batch()).sum() + two(batch(seed=2)).sum()).backward()
    assert (int(one.step), int(two.step)) == (1, 1)


def test_training_reads_no_counter_from_the_device(monkeypatch):
    """After the first step the host knows `step`: no synchronization, also across a refresh."""
    monkeypatch.setattr(counters, "NEAR", ())
    layer = make("portable", recompute_every=2)
    layer(batch()).sum().backward()
    read = torch.Tensor.__int__

    def watched(tensor):
        assert tensor is not layer.step and tensor is not layer._refreshed_at, "a counter was read"
        return read(tensor)

    monkeypatch.setattr(torch.Tensor, "__int__", watched)
    for _ in range(4):
        layer(batch()).sum().backward()
    monkeypatch.undo()
    assert int(layer.step) == 5 and int(layer._refreshed_at) == 4


# --- Several forwards before one accumulation ------------------------------------------------------------------------


@each_backend
def test_forwards_of_one_backward_are_averaged_by_their_samples(backend):
    for options in ({}, dict(som_space="offset")):
        layer = make(backend, som_lr=0.1, dtype=torch.float64, **options)
        one, two = batch(5, 1, torch.float64), batch(20, 2, torch.float64)
        start = layer.weight.detach().clone()
        expected = 0.1 * (5 * increment(layer, one) + 20 * increment(layer, two)) / 25
        (layer(one).square().sum() + layer(two).square().sum()).backward()
        moved = layer.weight.detach() - start if layer.som_offset is None else layer.som_offset
        torch.testing.assert_close(moved, expected)
        assert int(layer.step) == 1


@each_backend
def test_only_forwards_whose_backward_ran_are_averaged(backend):
    layer, other = make(backend), make(backend)
    kept, dropped = layer(batch(seed=1)), layer(batch(seed=2))
    kept.sum().backward()
    other(batch(seed=1)).sum().backward()
    assert dropped.requires_grad and same(state(layer), state(other))


@each_backend
def test_a_layer_used_twice_in_one_forward_feeding_itself(backend):
    torch.manual_seed(0)
    layer = BCLLayer(N, N, backend=backend)
    layer(layer(batch()).tanh()).square().sum().backward()
    assert int(layer.step) == 1 and layer._pulls.idle


# --- bind_optimizer --------------------------------------------------------------------------------------------------


def bound(backend=None, optimizer=torch.optim.SGD, **options):
    layer = make(backend, som_lr=0.1, dtype=options.pop("dtype", torch.float32))
    optimizer = optimizer(layer.parameters(), lr=options.pop("lr", 0.0), **options)
    layer.bind_optimizer(optimizer)
    return layer, optimizer


@each_backend
def test_bound_pulls_are_averaged_and_applied_once_before_the_step(backend):
    layer, optimizer = bound(backend, dtype=torch.float64, lr=0.5)
    start = layer.weight.detach().clone()
    parts = [batch(n, n, torch.float64) for n in (4, 8, 12)]
    expected = 0.1 * sum(len(x) * increment(layer, x) for x in parts) / 24
    for x in parts:
        layer(x).square().sum().backward()
        assert layer.weight.equal(start)
    assert int(layer.step) == 3
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), start + expected - 0.5 * layer.weight.grad)
    after = layer.weight.detach().clone()
    layer.weight.grad = None
    optimizer.step()
    assert layer.weight.equal(after), "a pull was applied twice"


@each_backend
def test_bound_pulls_do_not_see_inputs_that_were_overwritten(backend):
    """Programs with one static input buffer overwrite it between the backward and the step."""
    weights = []
    for overwrite in (False, True):
        layer, optimizer = bound(backend)
        x = batch()
        layer(x).square().sum().backward()
        if overwrite:
            x.fill_(7)
        optimizer.step()
        weights.append(layer.weight.detach().clone())
    assert weights[0].equal(weights[1])


@each_backend
def test_bound_layer_allows_a_second_backward_that_needs_the_weight(backend):
    layer, optimizer = bound(backend)
    x = batch().requires_grad_()
    loss = layer(x).square().sum()
    loss.backward(retain_graph=True)
    gradient = x.grad.clone()
    loss.backward()
    assert x.grad.equal(2 * gradient) and int(layer.step) == 1


def test_frozen_and_som_lr_count_at_the_bound_step():
    layer, optimizer = bound()
    start = layer.weight.detach().clone()
    layer(batch()).sum().backward()
    layer.frozen = True
    optimizer.step()
    layer.frozen = False
    optimizer.step()
    assert layer.weight.equal(start)


def test_bind_optimizer_refuses_and_rebinds():
    layer, optimizer = bound()
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, got str"):
        layer.bind_optimizer("adam")
    with pytest.raises(ValueError, match="optimizer must hold the weight of this layer, got SGD without it"):
        layer.bind_optimizer(torch.optim.SGD(nn.Linear(2, 2).parameters()))
    other = torch.optim.SGD(layer.parameters(), lr=0.0)
    layer.bind_optimizer(other)
    start = layer.weight.detach().clone()
    layer(batch()).sum().backward()
    optimizer.step()
    assert layer.weight.equal(start)
    other.step()
    assert not layer.weight.equal(start)


@pytest.mark.parametrize("fused, set_to_none", [(False, True), (False, False), (True, True), (True, False)])
def test_grad_scaler_skips_the_pull_with_the_step(fused, set_to_none):
    layer, optimizer = bound(optimizer=torch.optim.Adam, lr=1e-3, fused=fused)
    other, plain = bound(optimizer=torch.optim.Adam, lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    start = layer.weight.detach().clone()
    scaler.scale(layer(batch(seed=1)).square().sum() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=set_to_none)
    assert layer.weight.equal(start) and scaler.get_scale() < 4
    scaler.scale(layer(batch(seed=2)).square().sum()).backward()
    scaler.step(optimizer)
    other(batch(seed=2)).square().sum().backward()
    plain.step()
    assert not layer.weight.equal(start)
    torch.testing.assert_close(layer.weight, other.weight)


def test_a_skipped_step_leaves_the_weight_finite_where_the_pull_is_not():
    layer, optimizer = bound(optimizer=torch.optim.Adam, fused=True)
    start = layer.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu")
    x = batch()
    x[0, 0] = torch.inf
    scaler.scale(layer(x).sum()).backward()
    scaler.step(optimizer)
    assert layer.weight.equal(start)


def test_without_binding_every_backward_pulls_also_where_the_scaler_skips():
    layer = make()
    optimizer = torch.optim.SGD(layer.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cpu")
    start = layer.weight.detach().clone()
    scaler.scale(layer(batch()).sum() * torch.inf).backward()
    scaler.step(optimizer)
    assert not layer.weight.equal(start) and int(layer.step) == 1


# --- Checkpointing ---------------------------------------------------------------------------------------------------


@each_backend
def test_activation_checkpointing_is_bit_equal(backend):
    for reentrant in (True, False):
        layers = [make(backend, recompute_every=2) for _ in range(2)]
        inputs = [batch().requires_grad_() for _ in range(2)]
        for _ in range(5):
            layers[0](inputs[0]).square().sum().backward()
            checkpoint(layers[1], inputs[1], use_reentrant=reentrant).square().sum().backward()
        assert same(state(layers[0]), state(layers[1]))
        assert layers[0].weight.grad.equal(layers[1].weight.grad) and inputs[0].grad.equal(inputs[1].grad)
        assert layers[1]._pulls.idle


# --- Precision -------------------------------------------------------------------------------------------------------


@each_backend
def test_low_precision_uses_the_float32_product_before_rounding(backend):
    for dtype in LOW:
        layer = make(backend, dtype=dtype)
        x, weight, bias = batch(dtype=dtype), layer.weight.detach().float(), layer.bias.detach().float()
        records = []
        with layer.observe(records.append):
            output = layer(x)
            output.float().square().sum().backward()
        exact = nn.functional.linear(x.float(), weight, bias)
        assert output.dtype == dtype and output.equal(exact.to(dtype))
        assert records[0].activation.equal(exact)
        assert layer.weight.grad.dtype == dtype and layer.weight.dtype == dtype and int(layer.step) == 1


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("options", [{}, dict(som_space="offset")], ids=str)
def test_the_pull_is_not_lost_in_low_precision(dtype, options):
    """Over many steps the weights follow a float32 layer that gets the same pulls; rounding to nearest would not."""
    low = make(dtype=dtype, som_lr=1e-4, **options)
    high = make(som_lr=1e-4, **options)
    high.load_state_dict(low.state_dict())
    start = (high.weight if high.som_offset is None else high.som_offset).detach().clone()
    for _ in range(200):
        for layer in (low, high):
            layer(batch().to(dtype).to(layer.weight.dtype)).float().sum().backward()
            layer.zero_grad()
    ends = [(layer.weight if layer.som_offset is None else layer.som_offset).detach().float() for layer in (low, high)]
    moved, wanted = ends[0] - start, ends[1] - start
    cosine = nn.functional.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0)
    assert cosine > 0.9 and 0.8 < moved.norm() / wanted.norm() < 1.25


@each_backend
def test_autocast_keeps_statistics_and_pull_in_float32(backend):
    for dtype in LOW:
        layer, x = make(backend), batch().requires_grad_()
        weight, records = layer.weight.detach().clone(), []
        with layer.observe(records.append), torch.autocast("cpu", dtype):
            output = layer(x)
            output.float().square().sum().backward()  # also the hook runs inside autocast
        assert output.dtype == dtype and layer.weight.grad.dtype == x.grad.dtype == torch.float32
        (record,) = records
        exact = nn.functional.linear(
            x.detach().to(dtype).float(), weight.to(dtype).float(), layer.bias.to(dtype).float()
        )
        assert record.activation.equal(exact) and output.equal(exact.to(dtype))
        pulled = weight + layer.som_lr * ref.som_increment(weight, record.som_target, record.som_strength)
        assert relative_error(layer.weight.detach(), pulled) <= 1e-5
        assert record.neighbors.equal(ref.neighbors(weight, 3))


def test_autocast_leaves_float64_alone():
    layer = make(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(batch(dtype=torch.float64)).dtype == torch.float64


@each_backend
def test_float64_end_to_end(backend):
    layer = make(backend, dtype=torch.float64)
    output = layer(batch(dtype=torch.float64))
    output.sum().backward()
    assert output.dtype == layer.weight.grad.dtype == layer.weight.dtype == torch.float64


# --- Process groups --------------------------------------------------------------------------------------------------


@pytest.fixture
def two_ranks(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)


def test_global_sync_raises_until_it_is_built(two_ranks):
    layer = make()
    with pytest.raises(RuntimeError, match="sync='global' is not built yet .* 2 ranks; allowed: .*sync='local'"):
        layer(batch())
    layer.eval()(batch())


def test_local_sync_says_once_that_replicas_drift(two_ranks):
    layer = make(sync="local")
    with pytest.warns(UserWarning, match="replicas drift"):
        layer(batch()).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(batch()).sum().backward()
    assert int(layer.step) == 2
