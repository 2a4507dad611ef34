"""When pulls happen, in training loops of every kind: closures, gradients that leave, recomputation, copies."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from helpers.layers import D, N, batch, each_backend, make, same, square, state
from torch import nn

from bcl_fast import reference as ref
from bcl_fast.layer import BCLLayer

OPTIONS = dict(som_lr=0.05, recompute_every=2)


@pytest.fixture(autouse=True)
def no_warning_that_a_test_does_not_expect():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*BCLLayer.*")
        yield


def model_of(backend=None, bound=None, seed=0, **options):
    """A model of two BCLLayers and, where `bound` makes one of its parameters, the optimizer they are bound to."""
    torch.manual_seed(seed)
    layers = [BCLLayer(N, D, backend=backend, neighborhood_k=3, **{**OPTIONS, **options}) for _ in range(1)]
    layers.append(BCLLayer(D, 7, backend=backend, neighborhood_k=2, **{**OPTIONS, **options}))
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    if bound is None:
        return model
    optimizer = bound(model.parameters())
    for layer in layers:
        layer.bind_optimizer(optimizer)
    return model, optimizer


def loss_of(model, seed):
    return model(batch(seed=seed)).square().mean()


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


# --- Steps that bring a closure --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_optimizer", [sgd, torch.optim.AdamW], ids=["SGD", "AdamW"])
def test_a_closure_s_backward_belongs_to_its_step(make_optimizer):
    """As Lightning's automatic optimization: the last micro-batch of a window runs inside of step()."""
    for how in ("positional", "keyword"):
        for window in (1, 3):
            (plain, plain_optimizer), (other, optimizer) = (model_of(bound=make_optimizer) for _ in range(2))
            for step in range(7):
                seeds = [window * step + i for i in range(window)]
                for seed in seeds:
                    loss_of(plain, seed).backward()
                plain_optimizer.step()
                plain_optimizer.zero_grad()

                def closure(seed=seeds[-1], other=other):
                    loss = loss_of(other, seed)
                    loss.backward()
                    return loss

                optimizer.zero_grad()
                for seed in seeds[:-1]:
                    loss_of(other, seed).backward()
                loss = optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
                assert loss.requires_grad, "step() must return the closure's loss"
                assert same(state(plain), state(other))
                assert all(layer._pulls.idle for layer in (other[0], other[2])), "a pull was left waiting"


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_pulls_once_after_its_step_by_the_mean_of_what_it_evaluated(search):
    """The function must not move under a line search: a frozen twin goes the same way, up to the pull at its end."""
    layers = [square(som_lr=0.3, recompute_every=100) for _ in range(2)]
    layers[1].frozen = True
    increments, losses = [], ([], [])

    def observe(record):
        increments.append(ref.som_increment(record.weight, record.som_target, record.som_strength))

    for layer, seen in zip(layers, losses, strict=True):
        optimizer = torch.optim.LBFGS(layer.parameters(), 0.1, max_iter=5, line_search_fn=search)
        layer.bind_optimizer(optimizer)

        def closure(layer=layer, optimizer=optimizer, seen=seen):
            optimizer.zero_grad()
            loss = loss_of(layer, 1)
            loss.backward()
            seen.append(float(loss.detach()))
            return loss

        with layer.observe(observe if not layer.frozen else lambda record: None):
            optimizer.step(closure)
    assert losses[0] == losses[1] and len(losses[0]) == len(increments) > 2
    pulled = layers[1].weight + 0.3 * torch.stack(increments).mean(dim=0)
    torch.testing.assert_close(layers[0].weight, pulled)
    assert not layers[0].weight.allclose(layers[1].weight) and layers[0]._pulls.idle


class Sharpness(torch.optim.Optimizer):
    """Sharpness-aware minimization in its usual form: it evaluates at a perturbed weight, then puts the weight back."""

    def __init__(self, parameters):
        super().__init__(parameters, dict(lr=0.1))

    @torch.no_grad()
    def step(self, closure):
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.data.clone() for p in parameters]
        for p in parameters:
            p.add_(p.grad, alpha=0.05)
        self.zero_grad()
        with torch.enable_grad():
            closure()
        for p, data in zip(parameters, before, strict=True):
            p.data = data
            p.add_(p.grad, alpha=-0.1)


def test_a_trial_at_another_weight_pulls_nothing_and_loses_nothing():
    """The pull is that of the backward before the step, and comes after what the optimizer has put back."""
    model, optimizer = model_of(bound=Sharpness, recompute_every=100)
    twin = model_of(recompute_every=100)
    twin_optimizer = Sharpness(twin.parameters())

    def closure_of(model):
        return lambda: loss_of(model, 1).backward()

    loss_of(model, 1).backward()
    optimizer.step(closure_of(model))
    with torch.no_grad():  # by hand: the pulls at the first weight, on top of a step without any
        bound, bound_optimizer = model_of(bound=lambda p: torch.optim.SGD(p, 0.0), recompute_every=100)
        before = [p.clone() for p in bound.parameters()]
        with torch.enable_grad():
            loss_of(bound, 1).backward()
        bound_optimizer.step()
        pulls = [after - p for after, p in zip(bound.parameters(), before, strict=True)]
    for layer in (twin[0], twin[2]):
        layer.frozen = True
    loss_of(twin, 1).backward()
    twin_optimizer.step(closure_of(twin))
    for name, value, expected, pull in zip(
        dict(model.named_parameters()), model.parameters(), twin.parameters(), pulls, strict=True
    ):
        torch.testing.assert_close(value, expected + pull, msg=name)
    assert any(pull.any() for pull in pulls) and model[0]._pulls.idle


def test_a_closure_that_the_optimizer_never_evaluates():
    class Deaf(torch.optim.SGD):
        def step(self, closure=None):
            return super().step()

    # Optimizer.step is hooked for every class once: Deaf's own and SGD's inside of it.
    (plain, plain_optimizer), (other, optimizer) = model_of(bound=sgd), model_of(bound=lambda p: Deaf(p, 0.1, 0.9))
    for seed in range(3):
        for model, step in ((plain, plain_optimizer.step), (other, lambda: optimizer.step(lambda: None))):
            loss_of(model, seed).backward()
            step()
        plain_optimizer.zero_grad()
        optimizer.zero_grad()
    assert same(state(plain), state(other)) and other[0]._pulls.idle


# --- Gradients that leave early, steps that are skipped --------------------------------------------------------------


@each_backend
def test_gradients_that_leave_in_a_hook_take_no_pull_with_them(backend):
    """Wrappers with a main gradient move each parameter's .grad away as soon as it is there."""
    (plain, plain_optimizer), (other, optimizer) = (model_of(backend, sgd) for _ in range(2))
    main = {}

    def leave(parameter):
        kept = main.get(parameter)
        main[parameter] = parameter.grad if kept is None else kept + parameter.grad
        parameter.grad = None

    for parameter in other.parameters():
        parameter.register_post_accumulate_grad_hook(leave)
    for step in range(4):
        for seed in range(3):
            loss_of(plain, 3 * step + seed).backward()
            loss_of(other, 3 * step + seed).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        for parameter, gradient in main.items():
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        main.clear()
    assert same(state(plain), state(other))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_skipped_step_takes_its_pulls_with_it(set_to_none):
    """However the gradients of a step that a scaler skips are thrown away; a NaN in its pull does not come back."""
    (plain, plain_optimizer), (other, optimizer) = (model_of(bound=sgd) for _ in range(2))
    for seed in range(6):
        skipped = seed % 2 == 1
        x = batch(seed=seed)
        if skipped:
            x[0, 0] = torch.nan
        other(x).square().mean().backward()
        if not skipped:
            loss_of(plain, seed).backward()
            plain_optimizer.step()
            plain_optimizer.zero_grad(set_to_none=set_to_none)
            optimizer.step()
        else:
            for layer in (plain[0], plain[2]):
                layer.step += 1  # a pull was consumed, and came to nothing
        optimizer.zero_grad(set_to_none=set_to_none)
    assert same(state(plain), state(other))
    assert other[0].weight.isfinite().all()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_are_zero_or_clipped_keep_their_pulls(set_to_none):
    """Only throwing a gradient away takes its pull along, whatever else is done to it."""
    (plain, plain_optimizer), (other, optimizer) = (model_of(bound=sgd) for _ in range(2))
    for step in range(3):
        for seed in range(3):
            for model in (plain, other):
                (loss_of(model, 3 * step + seed) * (seed > 0)).backward()
            nn.utils.clip_grad_value_(other.parameters(), 1e9)
        for each in (plain_optimizer, optimizer):
            each.step()
            each.zero_grad(set_to_none=set_to_none)
    assert same(state(plain), state(other))


def test_an_optimizer_in_the_backward_steps_after_the_pull_whoever_hooked_first():
    layers = [BCLLayer(N, D, neighborhood_k=3, **OPTIONS) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer, first in zip(layers, (True, False), strict=True):
        optimizer = torch.optim.SGD([layer.weight], 0.1)

        def step(weight, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        if first:
            layer._pulls.release()  # as a layer that is attached to a model whose parameters are hooked already
        layer.weight.register_post_accumulate_grad_hook(step)
        layer.bind_optimizer(optimizer)
        for seed in range(4):
            layer(batch(seed=seed)).square().mean().backward()
    assert same(state(layers[0]), state(layers[1])) and layers[0]._pulls.idle


# --- Pulls that never arrive -----------------------------------------------------------------------------------------


def told(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(w.message) for w in caught if "BCLLayer" in str(w.message)]


def test_a_layer_bound_to_an_optimizer_that_does_not_train_it_says_so_once():
    model, _ = model_of(bound=sgd)
    other = sgd(model.parameters())

    def train():
        for seed in range(30):
            loss_of(model, seed).backward()
            other.step()

    messages = told(train)
    assert len(messages) == 2, "one of each layer"
    assert all("was changed 20 times while pulls waited for a step of SGD" in message for message in messages)


def test_a_layer_bound_to_an_optimizer_that_never_steps_says_so_once():
    """A wrapper that steps main parameters of its own leaves no trace on the weight's version."""
    model, optimizer = model_of(bound=sgd)

    def train():
        for seed in range(30):
            loss_of(model, seed).backward()
            for parameter in model.parameters():
                parameter.data.sub_(0.1 * parameter.grad)
            optimizer.zero_grad()

    messages = told(train)
    assert len(messages) == 2
    assert all("thrown away 20 times in a row" in m and "without a step of SGD" in m for m in messages)


def test_a_bound_layer_whose_gradients_come_without_a_backward_of_its_own_says_so_once():
    model, optimizer = model_of(bound=sgd)

    def train():
        for seed in range(30):
            parameters = list(model.parameters())
            gradients = torch.autograd.grad(loss_of(model, seed), parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()

    messages = told(train)
    assert len(messages) == 2 and all("no backward has ever brought a pull" in message for message in messages)


def test_a_layer_whose_weight_is_read_past_it_says_so_once():
    layer = make()

    def train():
        for seed in range(3):
            nn.functional.linear(batch(seed=seed), layer.weight, layer.bias).sum().backward()

    (message,) = told(train)
    assert "no forward of the layer took part" in message


def heads(set_to_none):
    """Two layers bound to one optimizer, trained in turn, a penalty on both; one is first called in eval()."""
    one, two = make(), make(seed=1)
    optimizer = sgd([*one.parameters(), *two.parameters()])
    for layer in (one, two):
        layer.bind_optimizer(optimizer)
    output = two.eval()(batch())
    two.train()
    output.sum().backward()
    for seed in range(50):
        layer = (one, two)[seed // 5 % 2]
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = layer(batch(seed=seed) if seed % 7 else batch()[:0]).square().sum()
        (loss + 0.01 * (one.weight.square().sum() + two.weight.square().sum())).backward()
        optimizer.step()


def averaged():
    """Weights swapped for their average, and back, between the micro-batches of a window."""
    model, optimizer = model_of(bound=sgd)
    for seed in range(30):
        loss_of(model, seed).backward()
        kept = state(model)
        model.load_state_dict(kept)
        loss_of(model, seed).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("program", [lambda: heads(True), lambda: heads(False), averaged], ids=["none", "zero", "swap"])
def test_ordinary_programs_say_nothing(program):
    assert not told(program)


def test_plain_loops_say_nothing():
    def train():
        for bound in (None, sgd):
            model = model_of(bound=bound)
            model, optimizer = model if bound else (model, sgd(model.parameters()))
            for seed in range(6):
                model.train()
                loss_of(model, seed).backward()
                (0.1 * model[0].weight.square().sum()).backward()  # a loss on the weight itself
                if seed % 2:
                    optimizer.step()
                    optimizer.zero_grad()
                model.eval()
                loss_of(model, seed).backward()  # nn.Linear's
                optimizer.zero_grad()

    assert not told(train)


def test_a_bound_optimizer_is_not_kept_alive():
    """Its moments are as large as the model: they must go with it, not with the next garbage collection."""
    model, optimizer = model_of(bound=torch.optim.Adam)
    loss_of(model, 1).backward()
    optimizer.step()
    optimizer.zero_grad()
    gone, copied = weakref.ref(optimizer), copy.deepcopy(optimizer)
    assert "zero_grad" not in vars(copied)
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()


@each_backend
def test_several_gradients_at_once_are_those_one_by_one(backend):
    layer, x = square(backend=backend), batch(3).requires_grad_()
    output, directions = layer(x), torch.randn(5, 3, N)
    (together,) = torch.autograd.grad(output, x, directions, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(output, x, direction, retain_graph=True)[0] for direction in directions]
    torch.testing.assert_close(together, torch.stack(alone))
    assert int(layer.step) == 0
