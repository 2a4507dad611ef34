"""Monitor: what it measures is right, nothing of the training changes, and its folder is whole whatever happens."""

import gzip
import json
import math

import pytest
import torch
from helpers.layers import D, N, batch, make, same, state
from helpers.training import DATA, OPTIONS, network
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from bcl_fast import diagnostics as diag
from bcl_fast import reference as ref
from bcl_fast.glance import image_shape_of
from bcl_fast.layer import BCLLayer
from bcl_fast.monitor import LINES, STEPS, Monitor, Monitored
from bcl_fast.records import DamagedFile

SGD = torch.optim.SGD


def two_layers(seed=0, **options):
    torch.manual_seed(seed)
    made = [BCLLayer(N, D, **{**OPTIONS, **options}), nn.ReLU(), BCLLayer(D, 6, **{**OPTIONS, **options})]
    return nn.Sequential(*made, nn.Linear(6, 5))


def run(model, optimizer, steps=7, start=0, monitor=None, window=1):
    """A plain loop; a step is `window` batches."""
    for step in range(start, start + steps):
        for part in range(window):
            x, y = DATA[(step * window + part) % len(DATA)]
            loss = F.cross_entropy(model(x), y) / window
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            monitor.log(loss=loss)
    return state(model)


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
    assert list(found.layers) == ["0", "2"] and [line["step"] for line in found.logged] == [0, 3, 6]
    for name, lines in found.layers.items():
        assert [line["step"] for line in lines] == [0, 3, 6]
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


@pytest.mark.parametrize("first", [True, False], ids=["bound before", "bound within"])
def test_lbfgs_is_measured_whole(first):
    layer = make(som_lr=0.05)
    optimizer, before = torch.optim.LBFGS(layer.parameters(), max_iter=3), layer.weight.detach().clone()
    found, monitor = measured(layer, optimizer)
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


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_forwards_are_measured_once(reentrant):
    layers, found = [make(), make()], []
    for layer, checkpointed in zip(layers, (False, True), strict=True):
        with Monitor(layer, every=2, out=None, callback=found.append):
            for step in range(3):
                x = batch(seed=step).requires_grad_()
                call = torch.utils.checkpoint.checkpoint
                output = call(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
                output.square().mean().backward()
    assert same(state(layers[0]), state(layers[1]))
    assert [one.step for one in found] == [0, 2, 0, 2]
    assert [one.metrics for one in found[:2]] == [one.metrics for one in found[2:]]


def test_a_compiled_step_is_measured_like_an_eager_one_and_compiled_once():
    torch._dynamo.reset()
    models, found = [two_layers() for _ in range(2)], []
    counter = CompileCounterWithBackend("aot_eager")
    states = []
    for model, compiled in zip(models, (False, True), strict=True):
        optimizer = SGD(model.parameters(), 0.1)
        call = torch.compile(model, fullgraph=True, backend=counter) if compiled else model
        with Monitor(call, optimizer, 2, out=None, callback=found.append):
            for _ in range(5):
                call(DATA[0][0]).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        states.append(state(model))
    assert same(*states) and counter.frame_count == 1
    eager, compiled = found[: len(found) // 2], found[len(found) // 2 :]
    assert [(one.layer, one.step, one.metrics) for one in eager] == [(o.layer, o.step, o.metrics) for o in compiled]
    assert {one.layer for one in eager} == {"0", "2"}


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
    assert found.layers["BCLLayer"][-1]["wt_sim"] is None and found.logged[-1]["loss"] is None


# --- The folder -------------------------------------------------------------------------------------------------------


def test_a_crash_loses_no_line_and_leaves_nothing_on_the_model(tmp_path):
    model = two_layers()
    optimizer = SGD(model.parameters(), 0.1)
    with pytest.raises(ZeroDivisionError), Monitor(model, optimizer, 1, tmp_path):
        run(model, optimizer, 3)
        assert len((tmp_path / LINES).read_text().splitlines()) == 1 + 2 * 3  # while it runs
        raise ZeroDivisionError
    assert {name: len(lines) for name, lines in Monitored.read(tmp_path).layers.items()} == {"0": 3, "2": 3}
    assert not any(module._observers for module in (model[0], model[2])) and not optimizer._optimizer_step_post_hooks
    run(model, optimizer, 1)
    assert len(Monitored.read(tmp_path).layers["0"]) == 3


def test_resuming_goes_on_and_what_was_repeated_counts_once(tmp_path):
    model = two_layers()
    optimizer = SGD(model.parameters(), 0.1)
    with Monitor(model, optimizer, 2, tmp_path) as monitor:
        run(model, optimizer, 3, monitor=monitor)
        saved = state(model)
        run(model, optimizer, 4, 3, monitor=monitor)
    with (tmp_path / LINES).open("a") as file:
        file.write('{"layer": "0", "step": 8, "lo')  # as a crash may leave it
    resumed = two_layers(seed=1)
    resumed.load_state_dict(saved)
    optimizer = SGD(resumed.parameters(), 0.1)
    with Monitor(resumed, optimizer, 2, tmp_path) as monitor:
        run(resumed, optimizer, 4, 3, monitor=monitor)
    found = Monitored.read(tmp_path)
    assert [line["step"] for line in found.layers["0"]] == [0, 2, 3, 5] == [line["step"] for line in found.logged]
    assert len(found.runs) == 2 and len(list(found.glances("2"))) == 4
    other = nn.Sequential(BCLLayer(N, D + 1, **OPTIONS))
    before = (tmp_path / LINES).read_text()
    with pytest.raises(ValueError, match=r"out must be a new folder or one of the same layers.*'2': \[6, 11\]"):
        Monitor(other, out=tmp_path).__enter__()
    assert (tmp_path / LINES).read_text() == before and not other[0]._observers


def test_numbers_of_the_user_are_read_at_measured_steps_alone(tmp_path):
    class Number:
        reads = 0

        def __float__(self):
            Number.reads += 1
            return 0.5

    layer = make()
    with Monitor(layer, every=3, out=tmp_path) as monitor:
        monitor.log(early=Number())
        for step in range(7):
            layer(batch(seed=step)).sum().backward()
            monitor.log(number=Number(), tensor=torch.tensor([float(step)], requires_grad=True))
            monitor.log(twice=Number())
        with pytest.raises(TypeError, match=r"bad must be one number, got tensor\(\[1., 1.\]\)"):
            for _ in range(3):
                layer(batch()).sum().backward()
                monitor.log(bad=torch.ones(2))
    expected = [{"step": step, "number": 0.5, "tensor": float(step)} for step in (0, 3, 6)]
    assert Monitored.read(tmp_path).logged == expected and Number.reads == 3


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra [demo]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = two_layers()
    optimizer = SGD(model.parameters(), 0.1)
    with Monitor(model, optimizer, 2, tmp_path, tensorboard=True) as monitor:
        run(model, optimizer, 3, monitor=monitor)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = Monitored.read(tmp_path).layers["2"]
    for name in ("wt_sim", "alive", "adam_over_pull", "dead"):
        got = [(event.step, event.value) for event in events.Scalars(f"2/{name}")]
        assert got == [(line["step"], pytest.approx(line[name])) for line in lines]
    assert [event.step for event in events.Scalars("loss")] == [0, 2]


def test_inputs_that_are_images_are_seen(tmp_path):
    sklearn = pytest.importorskip("sklearn.datasets", reason="needs the extra [demo]")
    digits = torch.tensor(sklearn.load_digits().data[:100], dtype=torch.float32)
    assert image_shape_of(digits) == (1, 8, 8)
    colors = digits.unflatten(1, (1, 8, 8)).repeat(1, 3, 1, 1).flatten(1)
    assert image_shape_of(colors) == (3, 8, 8)
    for other in (digits[:, torch.randperm(64)], torch.rand(100, 64), digits[:, :60], digits[:1], torch.zeros(9, 64)):
        assert image_shape_of(other) is None
    wide = BCLLayer(60, 8)
    with Monitor(wide, out=tmp_path, image_shape=(6, 10)):
        wide(torch.rand(9, 60)).sum().backward()
    kept = Monitored.read(tmp_path).glances("BCLLayer")[0]
    assert kept["image_shape"].tolist() == [1, 6, 10]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(model=nn.Linear(3, 2)), ValueError, "model must hold a BCLLayer, got a Linear without one"),
        (dict(model="net"), TypeError, "model must be an nn.Module, got str"),
        (dict(every=0), ValueError, "every must be an integer >= 1, got 0"),
        (dict(every=2.5), TypeError, "every must be an integer >= 1, got 2.5"),
        (dict(optimizer=3), TypeError, "optimizer must be a torch.optim.Optimizer, or several, got int"),
        (dict(optimizer=[SGD(nn.Linear(2, 2).parameters())]), ValueError, "optimizer must hold .*'0', '2'.*got SGD"),
        (dict(image_shape=7), TypeError, "image_shape must be .*, got 7"),
        (dict(image_shape=(2, 4, 4)), ValueError, "image_shape must have 1 or 3 channels"),
        (dict(callback=3), TypeError, "callback must be callable or None, got 3"),
        (dict(out=None, tensorboard=True), ValueError, "tensorboard=True needs a folder, got out=None"),
    ],
)
def test_what_is_wrong_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        Monitor(**{"model": two_layers(), "out": "nowhere", **arguments})


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=f"out must be a folder to write to, got {out}"):
            Monitor(two_layers(), out=out).__enter__()


DAMAGES = {
    "a line that is no JSON": (lambda out: (out / LINES).write_text("{}\n{broken\n"), "line 1 of .*monitor.jsonl"),
    "no start": (lambda out: (out / LINES).write_text(""), "monitor.jsonl is damaged .*no line of a start"),
    "a text for a number": (lambda out: append(out, layer="0", step=9, wt_sim="high"), "wt_sim must be a number"),
    "a step that is none": (lambda out: append(out, layer="0", step="9"), "step must be an integer, got '9'"),
    "another kind": (lambda out: (out / LINES).write_bytes(b"\xff\xfe\x00"), "monitor.jsonl is damaged"),
    "tensors of another kind": (lambda out: tensors(out).write_bytes(b"junk"), "0-1.pt.gz is damaged"),
    "half the tensors": (lambda out: tensors(out).write_bytes(tensors(out).read_bytes()[:99]), "0-1.pt.gz is damaged"),
    "other tensors": (lambda out: compressed(tensors(out), {"win_rate": torch.ones(3)}), "KeyError.*image_coverage"),
    "a list": (lambda out: compressed(tensors(out), [1]), "0-1.pt.gz is damaged"),
}


def append(out, **line):
    with (out / LINES).open("a") as file:
        file.write(json.dumps(line) + "\n")


def tensors(out):
    return out / STEPS / "0-1.pt.gz"


def compressed(path, value):
    with gzip.open(path, "wb") as file:
        torch.save(value, file)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_line_that_names_the_file(damage, tmp_path):
    model = network()
    model[0] = BCLLayer(N, N, **OPTIONS)
    with Monitor(model, every=1, out=tmp_path):
        run(model, SGD(model.parameters(), 0.1), 2)
    spoil, message = DAMAGES[damage]
    spoil(tmp_path)
    with pytest.raises(DamagedFile, match=message) as raised:
        list(Monitored.read(tmp_path).glances("0"))
    assert "\n" not in str(raised.value) and "delete it" in str(raised.value)


def test_a_missing_file_is_named(tmp_path):
    model = two_layers()
    with Monitor(model, every=1, out=tmp_path):
        run(model, SGD(model.parameters(), 0.1), 2)
    tensors(tmp_path).unlink()
    with pytest.raises(FileNotFoundError, match="0-1.pt.gz"):
        list(Monitored.read(tmp_path).glances("0"))
