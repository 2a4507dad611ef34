"""What observers of a layer are shown, and that nothing changes by it."""

import weakref

import pytest
import torch
from helpers.backends import ON_CPU
from helpers.layers import batch, make, same, state, train
from torch.nn import functional as F

from bcl_fast import reference as ref
from bcl_fast.layer import BCLLayer
from bcl_fast.testing import VARIANTS

OBSERVED = [("portable", name) for name in VARIANTS] + [(name, "decoupled") for name in ON_CPU if name != "portable"]


@pytest.mark.parametrize("backend, name", OBSERVED)
def test_observing_changes_no_number_and_records_the_specification(backend, name):
    options = {"recompute_every": 2, **VARIANTS[name]}
    watched, alone = (make(backend, **options) for _ in range(2))
    records = []
    with watched.observe(records.append):
        train(watched, 3)
    train(alone, 3)
    assert same(state(watched), state(alone))
    assert [record.step for record in records] == [0, 1, 2]
    fresh = make(backend, **options)
    for step, record in enumerate(records):
        before = state(fresh)
        weight = before["weight"] + before.get("som_offset", 0)
        train(fresh, 1, start=step)
        x, bias = batch(seed=step), before["bias"]
        expected = ref.record(step, x, weight, bias, F.linear(x, weight, bias), fresh.neighbors, fresh.config)
        for name, value in vars(expected).items():
            got = getattr(record, name)
            assert got.equal(value) if torch.is_tensor(value) else got == value, name


def test_records_keep_their_numbers_when_training_goes_on():
    layer, records = make(), []
    with layer.observe(records.append):
        train(layer, 1)
    kept = {name: value.clone() for name, value in vars(records[0]).items() if torch.is_tensor(value)}
    train(layer, 3, start=1)
    assert all(getattr(records[0], name).equal(value) for name, value in kept.items())


def test_several_observers_and_the_end_of_observing():
    layer, one, two = make(), [], []
    with layer.observe(one.append):
        with layer.observe(two.append):
            train(layer, 1)
        train(layer, 1)
    train(layer, 1)
    assert (len(one), len(two)) == (2, 1)
    with pytest.raises(TypeError, match="callback must be callable, got 3"), layer.observe(3):
        pass


def test_an_observers_error_comes_through_and_loses_nothing():
    layer, other = make(), make()

    def fail(record):
        raise KeyError("observer")

    with layer.observe(fail), pytest.raises(KeyError, match="observer"):
        layer(batch()).sum().backward()
    other(batch()).sum().backward()
    assert same(state(layer), state(other))


def test_without_an_observer_nothing_dense_is_kept(monkeypatch):
    """Only what the backward and the pull need outlives the forward."""
    layer = BCLLayer(40, 50)
    x = torch.randn(60, 40)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    dense = [t for t in kept if t.numel() >= 50 * 60]
    assert len(dense) == 1  # the gradient mask
    monkeypatch.setattr(ref, "record", lambda *a: pytest.fail("a record was formed"))
    train_once = layer(x).sum()
    train_once.backward()
    assert layer._pulls.idle


def test_a_graph_that_lives_on_keeps_nothing_of_what_was_observed():
    """As that of a loss which somebody logs."""
    layer, seen = make(), []
    with layer.observe(lambda record: seen.append(weakref.ref(record.activation))):
        loss = layer(batch()).sum()
        loss.backward()
    assert loss.grad_fn is not None and seen[0]() is None
