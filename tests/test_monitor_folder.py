"""The folder of a Monitor is whole whatever happens, goes on where it was left, and what is wrong with one is named."""

import contextlib
import errno
import gzip
import json
import os
import warnings

import pytest
import torch
from helpers.layers import D, N, batch, make, state
from helpers.training import DATA, OPTIONS, network, run, two_layers
from torch import nn

from bcl_fast.glance import image_shape_of
from bcl_fast.layer import BCLLayer
from bcl_fast.monitor import LINES, STEPS, Monitor, Monitored
from bcl_fast.records import DamagedFile

SGD = torch.optim.SGD


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


@pytest.mark.parametrize("within", [False, True], ids=["loaded before the block", "loaded within"])
def test_resuming_goes_on_and_what_was_repeated_counts_once(within, tmp_path):
    model = two_layers()
    optimizer = SGD(model.parameters(), 0.1)
    with Monitor(model, optimizer, 2, tmp_path) as monitor:
        run(model, optimizer, 3, monitor=monitor)
        saved = state(model)
        run(model, optimizer, 4, 3, monitor=monitor)
    with (tmp_path / LINES).open("a") as file:
        file.write('{"layer": "0", "step": 8, "lo')  # as a crash may leave it
    resumed = two_layers(seed=1)
    if not within:
        resumed.load_state_dict(saved)
    optimizer = SGD(resumed.parameters(), 0.1)
    with warnings.catch_warnings(), Monitor(resumed, optimizer, 2, tmp_path) as monitor:
        warnings.simplefilter("error")
        resumed.load_state_dict(saved)
        run(resumed, optimizer, 4, 3, monitor=monitor)
    found = Monitored.read(tmp_path)
    for rows in (*found.layers.values(), *found.logged.values()):
        assert [row["step"] for row in rows] == [0, 2, 3, 5]
    assert len(found.runs) == 2 and len(list(found.glances("2"))) == 4
    other = nn.Sequential(BCLLayer(N, D + 1, **OPTIONS))
    before = (tmp_path / LINES).read_text()
    with pytest.raises(ValueError, match=r"out must be a new folder or one of the same layers.*'2': \[6, 11\]"):
        Monitor(other, out=tmp_path).__enter__()
    assert (tmp_path / LINES).read_text() == before and not other[0]._observers


@pytest.mark.filterwarnings("ignore:Monitor has measured no step")
def test_a_training_that_begins_anew_leaves_no_row_of_the_one_before(tmp_path):
    """Nor does one of which a layer is frozen; one that measures nothing takes nothing away."""
    for layers, steps, expected in (("02", 7, [0, 3, 6]), ("02", 0, [0, 3, 6]), ("0", 4, [0, 3])):
        model = two_layers()
        model[2].weight.requires_grad = "2" in layers
        optimizer = SGD(model.parameters(), 0.1)
        anew = pytest.warns(UserWarning, match="holds 6 measured steps of an earlier training, whose place")
        told = anew if steps and (tmp_path / LINES).exists() else contextlib.nullcontext()
        with told, Monitor(model, optimizer, 3, tmp_path) as monitor:
            run(model, optimizer, steps, monitor=monitor)
        found = Monitored.read(tmp_path)
        for rows in (found.layers, found.logged):
            assert {name: [row["step"] for row in rows[name]] for name in "02"} == {
                name: expected if name in layers else [] for name in "02"
            }


def forked(monitor):
    monitor.log(child=1)
    monitor.__exit__(None, None, None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_neither_writes_nor_unlocks(tmp_path):
    layer = make()
    with Monitor(layer, every=1, out=tmp_path) as monitor:
        layer(batch()).sum().backward()
        process = torch.multiprocessing.get_context("fork").Process(target=forked, args=(monitor,))
        process.start()
        process.join()
        assert process.exitcode == 0
        with pytest.raises(ValueError, match="to which one does now"):
            Monitor(make(), out=tmp_path).__enter__()
    found = Monitored.read(tmp_path)
    assert len(found.layers["BCLLayer"]) == 1 and found.logged["BCLLayer"] == []


def test_the_folder_stays_where_it_is_and_one_without_locks_is_written_to(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    fcntl = pytest.importorskip("fcntl", reason="this system has no such locks")

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    layer = make()
    with Monitor(layer, every=1, out="here"):
        monkeypatch.chdir(tmp_path / "elsewhere")
        layer(batch()).sum().backward()
    assert len(list(Monitored.read(tmp_path / "here").glances("BCLLayer"))) == 1


def test_a_start_that_was_cut_short_is_started_anew(tmp_path):
    (tmp_path / LINES).write_text('{"bcl_fast": "0.')
    layer = make()
    with Monitor(layer, every=1, out=tmp_path):
        layer(batch()).sum().backward()
    assert len(Monitored.read(tmp_path).layers["BCLLayer"]) == 1


def test_numbers_of_the_user_are_read_at_measured_steps_alone(tmp_path):
    class Number:
        reads = 0

        def __float__(self):
            Number.reads += 1
            return 0.5

    layer = make()
    with Monitor(layer, every=3, out=tmp_path) as monitor:
        for step in range(7):
            layer(batch(seed=step)).sum().backward()
            monitor.log(number=Number(), tensor=torch.tensor([float(step)], requires_grad=True))
            monitor.log(again=Number())
        for bad, got in ((torch.ones(2), r"tensor\(\[1., 1.\]\)"), (10**400, "1000")):
            with pytest.raises(TypeError, match=rf"bad must be one number, got {got}"):
                for _ in range(3):
                    layer(batch()).sum().backward()
                    monitor.log(bad=bad)
    expected = [{"step": step, "number": 0.5, "tensor": float(step), "again": 0.5} for step in (0, 3, 6)]
    assert Monitored.read(tmp_path).logged == {"BCLLayer": expected} and Number.reads == 6


def test_numbers_are_kept_with_the_layers_that_stepped_and_with_no_step_but_theirs(tmp_path):
    """Two networks in turn as in a GAN, a layer that rests, a part of a step, a call now and then."""
    critic, other = two_layers(), make()
    model = nn.ModuleDict({"critic": critic, "other": other})
    optimizers = [SGD(each.parameters(), 0.1) for each in (critic, other)]
    told = pytest.warns(UserWarning, match="kept no number named 'half'")
    with told, Monitor(model, optimizers, 2, tmp_path) as monitor:
        for step in range(5):
            for turn in range(2):  # two steps of the critic for one of the other
                hidden = critic[0](DATA[step][0])
                (hidden if turn else critic[2](hidden.relu())).square().mean().backward()
                monitor.log(half=step)  # within a step
                optimizers[0].step()
                if turn == 0:
                    monitor.log(first=step)
            other(batch(seed=step)).square().mean().backward()
            optimizers[1].step()
            monitor.log(last=step)
    logged = Monitored.read(tmp_path).logged
    assert logged["critic.0"] == [{"step": 2 * step, "first": step} for step in range(5)]
    assert logged["critic.2"] == [{"step": step, "first": step} for step in (0, 2, 4)]
    assert logged["other"] == [{"step": step, "last": step} for step in (0, 2, 4)]


@pytest.mark.filterwarnings("ignore:.* of an earlier training")
def test_one_folder_has_one_monitor_at_a_time(tmp_path):
    models = [nn.Sequential(make()) for _ in range(2)]
    with Monitor(models[0], every=1, out=tmp_path):
        with pytest.raises(ValueError, match=f"out must be a folder that no other Monitor writes to, got {tmp_path}"):
            Monitor(models[1], out=tmp_path).__enter__()
        models[0](batch()).sum().backward()
    assert not models[1][0]._observers and len(Monitored.read(tmp_path).layers["0"]) == 1
    with Monitor(models[1], out=tmp_path):
        models[1](batch()).sum().backward()


def test_what_would_be_lost_or_kept_with_another_step_is_told(tmp_path):
    layer, monitor = make(), Monitor(make(), out=tmp_path)
    with pytest.raises(ValueError, match="numbers must have other names than step"):
        monitor.log(step=3, loss=1.0)
    with pytest.raises(RuntimeError, match=r"log\(\) works within the `with` block"):
        monitor.log(loss=1.0)
    layer.weight.requires_grad = False
    with Monitor(layer, every=1, out=None) as monitor:
        monitor.log(number=1)  # nothing can come before it
    layer.weight.requires_grad = True
    with Monitor(layer, every=1, out=tmp_path) as monitor, pytest.warns(UserWarning, match="call it after the whole"):
        for step in range(3):
            output = layer(batch(seed=step))
            monitor.log(number=step)
            output.sum().backward()
    with pytest.warns(UserWarning, match=r"log\(\) has kept no number named 'late': it keeps what comes"):
        with Monitor(layer, out=tmp_path) as monitor:
            for step in range(4):
                layer(batch(seed=step)).sum().backward()
                monitor.log(number=step)
                if step % 2:
                    monitor.log(late=step)
    pair = nn.ModuleList([make(), make()])
    with (
        pytest.warns(UserWarning, match=r"log\(\) has kept nothing with '0': it keeps"),
        Monitor(pair, out=tmp_path / "two") as monitor,
    ):
        for each in pair:
            each(batch()).sum().backward()
        monitor.log(number=1)
    model = two_layers().eval()
    with pytest.warns(UserWarning, match="Monitor has measured no step of '0', '2': a step is a backward in train"):
        with Monitor(model, out=None):
            model(DATA[0][0]).sum().backward()


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra [demo]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = two_layers()
    optimizer = SGD(model.parameters(), 0.1)
    with Monitor(model, optimizer, 2, tmp_path, tensorboard=True) as monitor:
        run(model, optimizer, 1, monitor=monitor)
        saved = state(model)
        run(model, optimizer, 4, 1, monitor=monitor)
    model.load_state_dict(saved)  # as if it had stopped behind its checkpoint
    with Monitor(model, optimizer, 2, tmp_path, tensorboard=True) as monitor:
        run(model, optimizer, 4, 1, monitor=monitor)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = Monitored.read(tmp_path).layers["2"]
    for name in ("wt_sim", "alive", "adam_over_pull", "dead"):
        got = [(event.step, event.value) for event in events.Scalars(f"2/{name}")]
        assert got == [(line["step"], pytest.approx(line[name])) for line in lines]
    assert [event.step for event in events.Scalars("2/loss")] == [0, 1, 3] == [line["step"] for line in lines]


def test_inputs_that_are_images_are_seen(tmp_path):
    sklearn = pytest.importorskip("sklearn.datasets", reason="needs the extra [demo]")
    digits = torch.tensor(sklearn.load_digits().data[:100], dtype=torch.float32)
    assert image_shape_of(digits) == (1, 8, 8)
    colors = digits.unflatten(1, (1, 8, 8)).repeat(1, 3, 1, 1).flatten(1)
    assert image_shape_of(colors) == (3, 8, 8)
    for other in (digits[:, torch.randperm(64)], torch.rand(100, 64), digits[:, :60], digits[:1], torch.zeros(9, 64)):
        assert image_shape_of(other) is None
    layer = BCLLayer(64, 8)
    with Monitor(layer, every=1, out=tmp_path / "late"):
        for x in (digits[:1], digits):  # of one sample nobody can tell
            layer(x).sum().backward()
    kept = Monitored.read(tmp_path / "late").glances("BCLLayer")
    assert [one["image_shape"].tolist() for one in kept] == [[0, 0, 0], [1, 8, 8]]
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
        (dict(optimizer=[]), ValueError, "optimizer must hold .*'0', '2'.*got no optimizer without any"),
        (dict(image_shape=7), TypeError, "image_shape must be .*, got 7"),
        (dict(image_shape=(6, 5)), ValueError, r"image_shape must be of as many numbers as .* 11, 13, got \(6, 5\)"),
        (dict(out=3), TypeError, "out must be a str, a path or None, got 3"),
        (dict(image_shape=(2, 4, 4), out=None), ValueError, "image_shape must have 1 or 3 channels"),
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
