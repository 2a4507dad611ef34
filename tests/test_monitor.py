"""Monitor: what it measures is right, when it measures, and nothing of the training changes."""

import contextlib
import math
import warnings

import pytest
import torch
from helpers.layers import batch, make, same, state
from helpers.training import DATA, measured, run, two_layers
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from bcl_fast import diagnostics as diag
from bcl_fast import reference as ref
from bcl_fast.layer import BCLLayer
from bcl_fast.monitor import Monitor, Monitored

SGD = torch.optim.SGD


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


@pytest.mark.parametrize("since", [5, 6])
def test_another_optimizer_than_the_one_given_is_told_and_costs_nothing_more(since, monkeypatch):
    """Whether it takes over where a step is due or between: a step of 30 backwards is none."""
    layer, formed = make(som_lr=0.05), []
    given, other = (SGD(layer.parameters(), 0.1) for _ in range(2))
    record = ref.record
    monkeypatch.setattr(ref, "record", lambda *a: formed.append(a) or record(*a))
    found, monitor = measured(layer, given, every=2)
    if since % 2:
        told = pytest.warns(UserWarning, match="no step in the last backwards of 'BCLLayer': if another optimizer")
    else:
        told = pytest.warns(UserWarning, match="'BCLLayer' was written 20 times while Monitor waited for a step of SGD")
    with told, monitor:
        for step in range(50):
            layer(batch(seed=step)).square().mean().backward()
            (given if step < since else other).step()
        assert [one.step for one in found] == [0, 2, 4] and len(formed) < 30
    with warnings.catch_warnings(), monitor:
        warnings.simplefilter("error")
        for step in range(90):
            layer(batch(seed=step)).square().mean().backward()
            if step % 30 == 29:
                given.step()


def test_records_keep_inputs_that_are_written_over():
    layer, x, records = make(), batch(), []
    with layer.observe(records.append):
        for seed in range(3):
            layer(x.copy_(batch(seed=seed))).sum().backward()
    assert all(record.x.equal(batch(seed=seed)) for seed, record in enumerate(records))


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
        optimizer = SGD(model.parameters(), 0.125)  # a power of 2: compiled, torch 2.11 rounds otherwise
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
