"""CUDA graphs that the user captures: what they could not replay raises."""

import pytest
import torch
from helpers.graphs import pulls_on_the_device, stand_in  # noqa: F401 (fixtures of every test here)
from helpers.layers import batch, each_backend, make

from bcl_fast import counters


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr(counters, "capturing", lambda device: True)
    return lambda now: monkeypatch.setattr(counters, "capturing", lambda device: now)


def test_a_captured_backward_that_accumulates_nothing_raises(capturing):
    """As torch.cuda.make_graphed_callables captures it: replays would train without any pull."""
    layer, x = make("portable"), batch().requires_grad_()
    for wanted in (x, layer.weight):
        with pytest.raises(
            RuntimeError, match="captured a backward .* replays would never pull .*make_graphed_callables"
        ):
            torch.autograd.grad(layer(x).square().sum(), wanted)
    layer(x).square().sum().backward()
    assert int(layer.step) == 1


def test_one_of_backward_and_bound_step_in_a_graph_raises(capturing):
    for first, then in ((True, False), (False, True)):
        layer = make("portable")
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        layer.bind_optimizer(optimizer)
        capturing(first)
        layer(batch()).sum().backward()
        capturing(then)
        with pytest.raises(RuntimeError, match="must both be in one CUDA graph, or both outside"):
            optimizer.step()


def test_observing_a_capture_raises(capturing):
    layer = make("portable")
    with layer.observe(print), pytest.raises(RuntimeError, match=r"observe\(\) cannot look into a CUDA graph"):
        layer(batch()).sum().backward()


@each_backend
def test_a_pull_reads_som_lr_where_it_lies(backend):
    """In a graph the number that a schedule writes there later; in eager mode it is the same number."""
    layer, other = make(backend, som_lr=0.1), make(backend, som_lr=0.1)
    other._som_lr_cell.fill_(0.3)
    layer.som_lr = 0.3
    for each in (layer, other):
        each(batch()).sum().backward()
    assert layer.weight.equal(other.weight)
