"""`bcl_fast.graphed`, and what a layer says to a capture, without a GPU: what stands for a graph calls its function.

tests/test_gpu.py captures in earnest.
"""

import copy
from functools import partial

import pytest
import torch
from helpers.graphs import pulls_on_the_device, stand_in  # noqa: F401 (fixtures of every test here)
from helpers.layers import batch, make, same, state
from torch import nn

from bcl_fast import BCLLayer, capture, graphed

OPTIMIZERS = {
    "SGD": dict(lr=0.05),
    "SGD-momentum": dict(lr=0.05, momentum=0.9, dampening=0.5, nesterov=False),  # its first step is not like the others
    "Adam": dict(lr=0.01),
    "RMSprop": dict(lr=0.01, momentum=0.5, centered=True),
    "Rprop": dict(lr=0.01),
    "Adadelta": dict(lr=0.5),
}


def network(**options):
    return nn.Sequential(
        make("portable", recompute_every=2, **options), nn.Tanh(), nn.BatchNorm1d(11), nn.Linear(11, 3)
    )


def loss_function(model, x, target):
    return (nn.functional.dropout(model(x), 0.2) - target).square().mean()


def examples(seed=7):
    return batch(seed=seed), batch(seed=seed + 1)[:, :3]


def optimizer_of(model, name):
    return getattr(torch.optim, name.partition("-")[0])(model.parameters(), **OPTIMIZERS[name])


def eager(model, optimizer, inputs):
    optimizer.zero_grad()
    loss = loss_function(model, *inputs)
    loss.backward()
    optimizer.step()
    return loss.detach()


def numbers(model, optimizer):
    """Every number of a training: parameters, buffers, gradients and the optimizer's state."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found |= {f"gradient {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    for i, one in enumerate(optimizer.state.values()):
        found |= {f"state {i} {key}": value for key, value in one.items() if torch.is_tensor(value)}
    return {name: value.detach().clone() for name, value in found.items()}


@pytest.mark.parametrize("begun", [False, True], ids=["new", "begun"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_calls_are_eager_steps_bit_by_bit(name, begun):
    model = network()
    optimizer = optimizer_of(model, name)
    torch.manual_seed(1)
    if begun:
        eager(model, optimizer, examples(3))
    twin = copy.deepcopy(model)
    twin_optimizer = optimizer_of(twin, name)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    generator = torch.get_rng_state()
    before = numbers(model, optimizer)
    step = graphed(model, loss_function, optimizer, *examples())
    after = numbers(model, optimizer)
    assert same(
        {n: v for n, v in before.items() if "gradient" not in n},
        {n: v for n, v in after.items() if "gradient" not in n},
    )
    assert torch.get_rng_state().equal(generator)
    losses = [step(*examples(seed)) for seed in range(5)]
    expected = numbers(model, optimizer)
    torch.set_rng_state(generator)
    assert losses == [eager(twin, twin_optimizer, examples(seed)) for seed in range(5)]
    assert same(expected, numbers(twin, twin_optimizer))
    assert int(model[0].step) == 5 + begun


def test_the_optimizer_may_hold_more_than_the_model_and_less():
    model, head = network(), nn.Linear(3, 3)
    optimizer = torch.optim.SGD([*model[0].parameters(), *head.parameters()], lr=0.1, momentum=0.9)
    twins = copy.deepcopy((model, head))
    twin_optimizer = torch.optim.SGD([*twins[0][0].parameters(), *twins[1].parameters()], lr=0.1, momentum=0.9)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    twins[0][3].weight.grad = torch.ones_like(model[3].weight)
    inputs = examples()
    step = graphed(model, lambda model, x, y: (head(model(x)) - y).abs().mean(), optimizer, *inputs)
    for _ in range(3):
        step(*inputs)
        twin_optimizer.zero_grad()
        (twins[1](twins[0](inputs[0])) - inputs[1]).abs().mean().backward()
        twin_optimizer.step()
    assert same(numbers(model, optimizer), numbers(twins[0], twin_optimizer))
    assert head.weight.equal(twins[1].weight)
    assert model[3].weight.grad.equal(twins[0][3].weight.grad)  # nobody drops it: it adds up


def test_som_lr_follows_a_schedule_from_zero():
    model, inputs = network(som_lr=0.0), examples()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, twin)]
    step = graphed(model, lambda model, x, y: (model(x) - y).square().mean(), optimizers[0], *inputs)
    for som_lr in (0.0, 0.1, 0.3):
        model[0].som_lr = twin[0].som_lr = som_lr
        step(*inputs)
        optimizers[1].zero_grad()
        (twin(inputs[0]) - inputs[1]).square().mean().backward()
        optimizers[1].step()
    assert same(state(model), state(twin))


def test_a_bound_optimizer_pulls_in_its_step():
    model, inputs = network(), examples()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[0].bind_optimizer(optimizer)
    before = model[0].weight.detach().clone()
    step = graphed(model, loss_function, optimizer, *inputs)
    assert model[0].weight.equal(before)
    step(*inputs)
    assert int(model[0].step) == 1 and not model[0].weight.equal(before)


def test_the_tensor_of_som_lr_outlives_what_leaves_the_others_in_place():
    """A graph goes on reading it after load_state_dict(), float() and to()."""
    layer = make(som_lr=0.1)
    cell = layer._som_lr_cell
    layer.load_state_dict(layer.state_dict())
    layer.float().to("cpu")
    layer.som_lr = 0.3
    assert layer._som_lr_cell is cell and float(cell) == pytest.approx(0.3)
    assert layer.double()._som_lr_cell.dtype == torch.float64 and float(layer._som_lr_cell) == 0.3


def test_som_lr_of_zero_is_warmed_up_too(monkeypatch):
    """Nothing may be compiled during a capture: the pull must have run before."""
    from bcl_fast import portable

    pulled, stock = [], portable.targets_pull_
    monkeypatch.setattr(portable, "targets_pull_", lambda *arguments: pulled.append(1) or stock(*arguments))
    model, inputs = network(som_lr=0.0), examples()
    before = state(model)
    step = graphed(model, loss_function, torch.optim.SGD(model.parameters(), lr=0.1), *inputs, warmup=2)
    assert len(pulled) == 3 and same(before, state(model)) and not model[0]._warming_up
    step(*inputs)


def test_an_autocast_around_graphed_keeps_no_casts_of_the_warm_up():
    """torch keeps the casts of weights until its outermost autocast ends."""

    def loss_function(model, x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return (model(x).float() - y).square().mean()

    model, inputs = network(), examples()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.5) for each in (model, twin)]
    with torch.autocast("cpu", torch.bfloat16):
        step = graphed(model, loss_function, optimizers[0], *inputs)
        losses = [step(*inputs) for _ in range(3)]
    for loss in losses:
        optimizers[1].zero_grad()
        expected = loss_function(twin, *inputs)
        expected.backward()
        optimizers[1].step()
        assert loss.equal(expected)
    assert same(state(model), state(twin))


def test_what_nobody_drops_adds_up_from_where_it_stands():
    """A graph adds to the tensor of its capture; who takes another one, or none, is followed."""
    model, inputs = network(), examples()
    added = []

    def loss_function(model, x, y):
        return (model(x) - y).square().mean()

    step = graphed(model, loss_function, torch.optim.SGD(model[0].parameters(), lr=0.0), *inputs)
    model[0].som_lr = 0.0
    weight = model[3].weight
    for start in (None, torch.ones_like(weight)):
        weight.grad = None if start is None else start.clone()
        (place,) = (gradient for parameter, gradient in step._adding if parameter is weight)
        step._replay = partial(lambda place: added.append(place.clone()), place)
        step(*inputs)
        assert added[-1].equal(torch.zeros_like(weight) if start is None else start) and weight.grad is place


def test_autograd_sees_what_a_replay_writes():
    """A backward over an older forward would use weights that are new: it raises, as after an eager step."""
    model, inputs = network(), examples()
    step = graphed(model, loss_function, torch.optim.SGD(model.parameters(), lr=0.1), *inputs)
    older = model[3](torch.ones(2, 11, requires_grad=True)).sum()
    step._replay = lambda: None  # a graph tells autograd nothing
    step(*inputs)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        older.backward()


def test_a_scheduler_may_come_later():
    model, inputs = network(), examples()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = graphed(model, loss_function, optimizer, *inputs)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(2):
        step(*inputs)
        scheduler.step()
    with pytest.raises(RuntimeError, match=r"\['lr'\] is 0\.01.* and was 0\.1"):
        step(*inputs)


CHANGES = {
    "frozen": (lambda m, o: setattr(m[0], "frozen", True), r"model\.0\.frozen is True and was False"),
    "mode": (lambda m, o: m[2].eval(), r"model\.2\.training is False and was True"),
    "observers": (lambda m, o: setattr(m[0], "_observers", (print,)), r"model\.0's number of observers is 1 and was 0"),
    "learning rate": (lambda m, o: o.param_groups[0].update(lr=0.5), r"param_groups\[0\]\['lr'\] is 0\.5 and was 0\.1"),
    "weight decay": (lambda m, o: o.param_groups[0].update(weight_decay=1), r"\['weight_decay'\] is 1 and was 0"),
    "parameter": (lambda m, o: setattr(m[3], "bias", nn.Parameter(torch.ones(3))), r"model\.3\.bias is another tensor"),
    "buffer": (lambda m, o: m[0].register_buffer("step", torch.tensor(0)), r"model\.0\.step is another tensor"),
    "transposed": (lambda m, o: setattr(m[3].weight, "data", m[3].weight.data.T), r"model\.3\.weight is .* and was"),
    "frozen weight": (
        lambda m, o: m[3].weight.requires_grad_(False),
        r"model\.3\.weight is .*requires_grad=False.* and was",
    ),
    "optimizer's state": (
        lambda m, o: o.load_state_dict(copy.deepcopy(o.state_dict())),
        r"optimizer\.state of .* is another tensor",
    ),
    "group": (lambda m, o: o.add_param_group({"params": [nn.Parameter(torch.ones(1))]}), r"param_groups\[1\]"),
    "binding": (lambda m, o: m[0].bind_optimizer(o), r"model\.0's being bound to the optimizer is True and was False"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_that_the_graph_cannot_see_raises_at_the_next_step(what):
    for called in (0, 1, 2):
        model, inputs = network(), examples()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        step = graphed(model, loss_function, optimizer, *inputs)
        for _ in range(called):
            step(*inputs)
        if what == "optimizer's state" and not called:
            continue  # there is none yet, nothing is replaced
        change, message = CHANGES[what]
        change(model, optimizer)
        before = numbers(model, optimizer)
        with pytest.raises(RuntimeError, match=message + r".*: call bcl_fast\.graphed again"):
            step(*inputs)
        assert same(before, numbers(model, optimizer))


class Counting(torch.optim.SGD):
    """Keeps a number on the host."""

    def step(self, closure=None):
        super().step(closure)
        state = self.state[self.param_groups[0]["params"][0]]
        state["count"] = state.get("count", 0) + 1


class Replacing(torch.optim.SGD):
    """Makes its state anew in every step."""

    def step(self, closure=None):
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["mean"] = 0.9 * self.state[parameter].get("mean", 0.0) + parameter.detach()


@pytest.mark.parametrize(
    "kind, change", [(Counting, r"'count', is 4 and was 3"), (Replacing, r"'mean', is another tensor")]
)
def test_an_optimizer_that_no_graph_can_hold_is_refused_and_all_is_as_before(kind, change):
    model = network()
    optimizer = kind(model.parameters(), lr=0.1)
    before = numbers(model, optimizer)
    with pytest.raises(RuntimeError, match=f"optimizer.state of .*{change}: a step changes it on the host"):
        graphed(model, loss_function, optimizer, *examples())
    after = {name: value for name, value in numbers(model, optimizer).items() if "gradient" not in name}
    assert same(before, after) and not optimizer.state


def test_an_error_in_the_loss_leaves_all_as_before():
    model = network()
    optimizer, before = torch.optim.Adam(model.parameters()), state(model)
    calls = []

    def failing(model, x, target):
        calls.append(x)
        if len(calls) == 3:
            raise ZeroDivisionError
        return loss_function(model, x, target)

    with pytest.raises(ZeroDivisionError):
        graphed(model, failing, optimizer, *examples())
    assert same(before, state(model)) and not optimizer.state


def test_bad_arguments():
    model, inputs = network(), examples()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for arguments, error, message in [
        (
            (loss_function, loss_function, optimizer, *inputs),
            TypeError,
            "model must be a torch.nn.Module, got function",
        ),
        ((model, None, optimizer, *inputs), TypeError, "loss_function must be callable, got None"),
        ((model, loss_function, "adam", *inputs), TypeError, "optimizer must be a torch.optim.Optimizer, got str"),
        ((model, loss_function, optimizer, inputs[0], 3), TypeError, r"examples\[1\] must be a tensor .*, got int"),
        (
            (model, loss_function, optimizer, batch().requires_grad_()),
            ValueError,
            r"examples\[0\] must not need a gradient",
        ),
        (
            (model, lambda *a: 1.0, optimizer, *inputs),
            TypeError,
            "loss_function must return a scalar tensor .* got float",
        ),
        ((model, lambda m, x, y: m(x), optimizer, *inputs), TypeError, r"loss_function must return .* got \[17, 3\]"),
        ((nn.ReLU(), loss_function, optimizer), ValueError, "model must have parameters, got none"),
    ]:
        with pytest.raises(error, match=message):
            graphed(*arguments)
    with pytest.raises(ValueError, match="warmup must be an integer >= 1, got 0"):
        graphed(model, loss_function, optimizer, *inputs, warmup=0)
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    model[0].bind_optimizer(other)
    with pytest.raises(
        ValueError, match=r"optimizer must be the one that model\.0 is bound to, got another than its SGD"
    ):
        graphed(model, loss_function, optimizer, *inputs)
    with model[0].observe(print), pytest.raises(RuntimeError, match=r"model\.0 is being observed"):
        graphed(model, loss_function, other, *inputs)


def test_what_is_not_on_one_gpu_is_refused(monkeypatch):
    model, inputs = network(), examples()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monkeypatch.setattr(capture, "DEVICE_TYPE", "cuda")
    with pytest.raises(ValueError, match=r"model\.0\.weight must be on one CUDA device .*, got cpu"):
        graphed(model, loss_function, optimizer, *inputs)
    monkeypatch.setattr(capture, "DEVICE_TYPE", "cpu")
    with pytest.raises(ValueError, match=r"examples\[1\] must be on one CUDA device .*, got meta"):
        graphed(model, loss_function, optimizer, inputs[0], inputs[1].to("meta"))
    model[0] = BCLLayer(13, 11, backend="reference")
    with pytest.raises(ValueError, match=r"model\.0 must have the backend 'triton' or 'cuda'.*, got 'reference'"):
        graphed(model, loss_function, optimizer, *inputs)
    monkeypatch.setattr(capture, "ranks", lambda: 4)
    with pytest.raises(RuntimeError, match="the steps of one rank, and this process group has 4"):
        graphed(model, loss_function, optimizer, *inputs)


def test_bad_inputs_change_nothing():
    model, inputs = network(), examples()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = graphed(model, loss_function, optimizer, *inputs)
    before = numbers(model, optimizer)
    for given, error, message in [
        (inputs[:1], TypeError, "inputs must be 2 tensors as the examples are, got 1"),
        ((inputs[0], 2.0), TypeError, r"inputs\[1\] must be a tensor"),
        ((inputs[0][:5], inputs[1]), ValueError, r"inputs\[0\] must have shape \[17, 13\] .*got \[5, 13\]"),
        ((inputs[0].double(), inputs[1]), ValueError, r"inputs\[0\] must have .*float32.*got .*float64"),
    ]:
        with pytest.raises(error, match=message):
            step(*given)
    assert same(before, numbers(model, optimizer))
