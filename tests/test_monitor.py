"""Monitor: what it measures is right, when it measures, and nothing of the training changes."""

import contextlib
import math

import pytest
import torch
from helpers.layers import D, batch, make, same, state
from helpers.training import DATA, OPTIONS, run, two_layers
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from bcl_fast import diagnostics as diag
from bcl_fast import reference as ref
from bcl_fast.layer import BCLLayer
from bcl_fast.monitor import Monitor, Monitored

SGD = torch.optim.SGD


def measured(model, optimizer=None, every=1):
    """A list that gets everything measured, and the monitor that fills it."""
    found = []
    return found, Monitor(model, optimizer, every, out=None, callback=found.append)


# --- What is measured, and when -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [False, True], ids=["free", "bound"])
@pytest.mark.parametrize("given", [False, True], ids=["backwards", "optimizer"])
def test_first_step_and_every_third_are_what_observers_see_and_nothing_changes(given, bound, tmp_path):
    models = [two_layers() for _ in range(2)]
    optimizers = [SGD(model.parameters(), 0.1, momentum=0.9) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        for layer in (model[0], model[2]) if bound else ():
            layer.bind_optimizer(optimizer)
    records = {"0": [], "2": []}
    with models[0][0].observe(records["0"].append), models[0][2].observe(records["2"].append):
        alone = run(models[0], optimizers[0])
    with Monitor(models[1], optimizers[1] if given else None, 3, tmp_path) as monitor:
        watched = run(models[1], optimizers[1], monitor=monitor)
    assert same(alone, watched)
    found = Monitored.read(tmp_path)
    assert list(found.layers) == ["0", "2"]
    for name, lines in found.layers.items():
        assert [line["step"] for line in lines] == [0, 3, 6] == [line["step"] for line in found.logged[name]]
        for line, kept in zip(lines, found.glances(name), strict=True):
            record = records[name][line["step"]]
            nearest = torch.stack(
                [F.cosine_similarity(record.weight, record.weight[near]) for near in record.neighbors.T]
            )
            expected = diag.step_metrics(record)
            expected["dead"] = int((record.win_rate <= 0.01).sum())
            expected["redundant"] = int((nearest.amax(dim=0) > 0.95).sum())
            assert {key: line[key] for key in expected} == pytest.approx(expected, nan_ok=True)
            assert ("pull" in line) == given and kept["win_rate"].equal(record.win_rate)
            torch.testing.assert_close(kept["nearest"], nearest.amax(dim=0))


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


@pytest.mark.filterwarnings("ignore:Monitor has measured no step")
def test_what_a_block_leaves_does_not_come_into_the_next_and_none_is_in_itself():
    layer, twin = make(som_lr=0.05), make(som_lr=0.05)
    optimizers = [SGD(each.parameters(), 0.1) for each in (layer, twin)]
    saved, (found, monitor), (alone, other) = (
        state(layer),
        measured(layer, optimizers[0]),
        measured(twin, optimizers[1]),
    )
    with monitor:
        layer(batch()).sum().backward()  # whose step never comes
        with pytest.raises(RuntimeError, match="a Monitor cannot be entered within its own block"), monitor:
            pass
    layer.load_state_dict(saved)
    layer.zero_grad()
    for each, block, optimizer in ((layer, monitor, optimizers[0]), (twin, other, optimizers[1])):
        with block:
            each(batch(seed=2)).square().mean().backward()
            optimizer.step()
    assert [one.metrics for one in found] == [one.metrics for one in alone] and not layer._observers


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


def test_a_callback_that_raises_takes_no_step_from_another_layer():
    runs = []
    for fails in (False, True):
        model, found = two_layers(), []
        optimizer = SGD(model.parameters(), 0.1)

        def take(one, found=found, fails=fails):
            found.append(one)
            if fails and len(found) == 1:
                raise OSError("full")

        with Monitor(model, optimizer, 2, out=None, callback=take):
            for step in range(3):
                model(DATA[step][0]).square().mean().backward()
                with pytest.raises(OSError, match="full") if fails and step == 0 else contextlib.nullcontext():
                    optimizer.step()
        runs.append([(one.layer, one.step, one.metrics) for one in found])
    assert runs[0] == runs[1] and [each[:2] for each in runs[0]] == [("0", 0), ("2", 0), ("0", 2), ("2", 2)]


def test_autocast_around_the_step_changes_no_metric():
    found = []
    for around in (False, True):
        layer = make()
        optimizer = SGD(layer.parameters(), 0.1)
        with Monitor(layer, optimizer, 1, out=None, callback=found.append):
            with torch.autocast("cpu", torch.bfloat16):
                loss = layer(batch()).float().square().mean()
            with torch.autocast("cpu", torch.bfloat16, enabled=around):
                loss.backward()
                optimizer.step()
    assert found[0].metrics == found[1].metrics


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


def test_a_layer_that_joins_late_or_rests_is_measured_by_its_own_steps():
    model = two_layers()
    optimizer = SGD(model.parameters(), 0.1)
    found, monitor = measured(model, optimizer, every=2)
    with monitor:
        for step in range(6):
            hidden = model[0](DATA[0][0])
            (hidden if step % 2 else model[2](hidden.relu())).square().mean().backward()
            optimizer.step()
    assert [one.step for one in found if one.layer == "0"] == [0, 2, 4]
    assert [one.step for one in found if one.layer == "2"] == [0, 2]


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


def test_each_layer_belongs_to_the_optimizer_that_holds_it():
    model = two_layers()
    optimizers = [SGD(model[0].parameters(), 0.1), SGD(model[3].parameters(), 0.1)]
    found, monitor = measured(model, optimizers)
    with monitor:
        model(DATA[0][0]).sum().backward()
        assert [one.layer for one in found] == ["2"]  # nobody steps it: its backward is its step
        for optimizer in optimizers:
            optimizer.step()
    assert [one.layer for one in found] == ["2", "0"]
    assert ["pull" in one.metrics for one in found] == [False, True]


def test_frozen_layers_are_measured_and_untrained_ones_are_not():
    model = two_layers()
    model[0].frozen, model[2].weight.requires_grad = True, False
    found, monitor = measured(model, SGD(model.parameters(), 0.1))
    with monitor:
        for x, _ in DATA[:2]:
            model(x).sum().backward()
            monitor._meter.optimizers[0].step()
    assert [(one.layer, one.metrics["pull"]) for one in found] == [("0", 0.0)] * 2
    assert math.isnan(found[0].metrics["adam_over_pull"])


@pytest.mark.parametrize("losses", [1, 2])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_forwards_are_measured_once(reentrant, losses):
    """Also where the backward of one loss ends a step, and with that what the forward of another is recomputed in."""
    layers, found = [make(), make()], []
    for layer, checkpointed in zip(layers, (False, True), strict=True):
        optimizer = SGD(layer.parameters(), 0.1)
        if losses > 1:
            layer.bind_optimizer(optimizer)
        with Monitor(layer, every=2 * losses, out=None, callback=found.append):
            for step in range(3):
                outputs = []
                for part in range(losses):
                    x = batch(seed=2 * step + part).requires_grad_()
                    call = torch.utils.checkpoint.checkpoint
                    outputs.append(call(layer, x, use_reentrant=reentrant) if checkpointed else layer(x))
                for output in outputs:
                    output.square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    assert same(state(layers[0]), state(layers[1]))
    assert [one.step for one in found] == [0, 2 * losses] * 2
    assert [one.metrics for one in found[:2]] == [one.metrics for one in found[2:]]


@pytest.mark.parametrize("whole", [False, True], ids=["the model", "the whole step"])
def test_what_is_compiled_is_measured_like_an_eager_step_and_compiled_once(whole, caplog):
    torch._dynamo.reset()
    models, found = [two_layers() for _ in range(2)], []
    counter = CompileCounterWithBackend("aot_eager")
    states, frames = [], []
    for model, compiled in zip(models, (False, True), strict=True):
        optimizer = SGD(model.parameters(), 0.1)
        call = torch.compile(model, fullgraph=True, backend=counter) if compiled and not whole else model

        def step(x, call=call, optimizer=optimizer):
            call(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        step = torch.compile(step, backend=counter) if compiled and whole else step
        with Monitor(call, optimizer, 2, out=None, callback=found.append):
            for _ in range(5):
                step(DATA[0][0])
                frames.append(counter.frame_count)
        states.append(state(model))
    assert same(*states) and frames[-1] == frames[6] >= 1  # nothing is compiled after the second step
    assert not any("meter.py" in record.getMessage() for record in caplog.records)
    eager, compiled = found[: len(found) // 2], found[len(found) // 2 :]
    assert [(one.layer, one.step, one.metrics) for one in eager] == [(o.layer, o.step, o.metrics) for o in compiled]
    assert {one.layer for one in eager} == {"0", "2"}


@pytest.mark.filterwarnings("ignore:Monitor has measured no step")
def test_nothing_is_kept_or_computed_between(monkeypatch):
    layer = BCLLayer(40, 50)
    x, kept = torch.randn(60, 40), []
    with Monitor(layer, every=1000, out=None):
        layer(x).sum().backward()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            output = layer(x)
        monkeypatch.setattr(ref, "record", lambda *a: pytest.fail("a record was formed"))
        output.sum().backward()
        assert len([t for t in kept if t.numel() >= 50 * 60]) == 1  # the gradient mask
        with Monitor(layer, every=1000, out=None), pytest.raises(BaseException, match="a record was formed"):
            layer(x).sum().backward()  # this test can fail


def test_a_training_that_diverges_is_measured_to_its_end(tmp_path):
    layer = make(som_lr=1e30)
    optimizer = SGD(layer.parameters(), 1e30)
    with Monitor(layer, optimizer, 1, tmp_path) as monitor:
        for _ in range(4):
            loss = layer(batch()).square().mean()
            loss.backward()
            optimizer.step()
            monitor.log(loss=loss)
    assert not layer.weight.isfinite().all()
    found = Monitored.read(tmp_path)
    assert len(found.layers["BCLLayer"]) == 4 == len(list(found.glances("BCLLayer")))
    assert found.layers["BCLLayer"][-1]["wt_sim"] is None and found.logged["BCLLayer"][-1]["loss"] is None
