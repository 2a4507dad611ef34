"""Steps outside compilers: one call of a library does what the operators do of the same arguments, bit by bit."""

import itertools
import weakref

import pytest
import torch
from helpers.operators import statistics_arguments

from bcl_fast import BCLLayer, cpu, eager
from bcl_fast.spec import CHOICES, BCLConfig
from bcl_fast.structures import PackedPull, PackedStatistics, Pull, Statistics

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))

CONFIGS = [
    *(
        BCLConfig(affinity=rule, rescue_weighting=weighting, need_weighting=need)
        for rule, weighting, need in itertools.product(CHOICES["affinity"], CHOICES["rescue_weighting"], (True, False))
    ),
    *(
        BCLConfig(forces=forces, gradient_mask=mask, rescue_onset=onset, pull_onset=onset)
        for forces, mask, onset in itertools.product(CHOICES["forces"], CHOICES["gradient_mask"], (0.0, 0.4))
    ),
    BCLConfig(rescue_k=0),
    BCLConfig(rescue_k=1, temperature=0.5),
    BCLConfig(rescue_k=1000),
]


def both(config, dtype, bias=True):
    """What the operator makes of a forward, and what one call does."""
    x, *others = statistics_arguments("cpu", config, dtype, bias)
    expected = Statistics(
        *torch.ops.bcl_fast.statistics_(x, *(t.clone() if isinstance(t, torch.Tensor) else t for t in others))
    )
    arguments = others[: -len(config.statistics)]
    found = eager.statistics(x, *arguments, config.statistics)
    assert isinstance(found, PackedStatistics)
    return x, expected, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: str(config.changed()))
def test_a_forward_in_one_call_finds_what_the_operator_finds(config, dtype):
    for bias in (True, False):
        x, expected, found = both(config, dtype, bias)
        pull = found.pull(x).unpacked()
        assert found.mask.equal(expected.mask) and found.winner.equal(expected.winner)
        for name, one, other in zip(Pull._fields, pull, expected.pull(x), strict=True):
            assert one.dtype == other.dtype and one.equal(other), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"rescue_k": 0}, {"target_projection": "orthogonal"}], ids=str)
@pytest.mark.parametrize("kind", ["weight", "offset", "weight by columns"])
def test_a_pull_in_one_call_moves_as_the_operator_does(kind, options, dtype):
    config = BCLConfig(**options)
    x, expected, found = both(config, dtype)
    results = []
    for pull in (expected.pull(x), found.pull(x)):
        weight = torch.nn.Parameter(statistics_arguments("cpu", config, dtype)[1])
        if kind == "weight by columns":
            weight = torch.nn.Parameter(weight.detach().T.contiguous().T)
        offset = torch.ones_like(weight) if kind == "offset" else None
        step, som_lr = torch.tensor(6), torch.tensor(0.3, dtype=dtype)
        versions = weight._version, step._version
        with torch.no_grad():
            eager.pull_(weight, offset, step, som_lr, config.target_projection, "cpu", pull)
        moved = weight if offset is None else offset
        assert (
            step.item() == 7 and step._version > versions[1] and (offset is not None or weight._version > versions[0])
        )
        results.append(moved.detach().clone())
    assert results[0].equal(results[1]) and not results[0].equal(torch.ones_like(results[0]))


def test_packed_memory_has_just_the_words_it_needs():
    x, _, found = both(BCLConfig(), torch.float32)
    assert found.packed.numel() == found.sizes.words
    with pytest.raises(RuntimeError):
        PackedPull(x, found.packed[:-1], found.sizes).unpacked()


def test_another_thread_s_forward_takes_nothing_of_this_one():
    """Every call has a struct of its own: ctypes lets other threads run meanwhile."""
    from concurrent.futures import ThreadPoolExecutor

    torch.manual_seed(0)
    layers = [BCLLayer(300, 40, backend="cpu", som_lr=0.0) for _ in range(2)]
    inputs = [torch.randn(257, 300) for _ in layers]

    def gradients(i):
        found = []
        for _ in range(30):
            layers[i].zero_grad()
            layers[i](inputs[i]).sum().backward()
            found.append(layers[i].weight.grad.clone())
        return found

    alone = [gradients(i)[0] for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for i, found in enumerate(pool.map(gradients, range(2))):
            assert all(one.equal(alone[i]) for one in found)


@pytest.mark.parametrize("name, place, size", [("pair_feature", 9, 5), ("rescue_rows", 36, 9)])
def test_a_packed_index_out_of_bounds_is_an_error_that_names_it(name, place, size):
    """Nothing is pulled then. Only hooks of saved tensors could have damaged it."""
    x, _, found = both(BCLConfig(rescue_k=2), torch.float32)
    assert getattr(found.pull(x).unpacked(), name).flatten()[0] == found.packed[place]
    found.packed[place] = 2**40
    weight, step = torch.ones(5, x.shape[1]), torch.tensor(3)
    with pytest.raises(ValueError, match=rf"^{name} must hold indices 0 \.\. {size - 1}, got {2**40}$"):
        eager.pull_(weight, None, step, torch.tensor(0.5), "none", "cpu", found.pull(x))
    assert weight.equal(torch.ones_like(weight)) and step.item() == 3


def test_a_graph_that_lives_on_keeps_nothing_of_what_was_packed():
    layer, found = BCLLayer(7, 5, backend="cpu"), []
    compete = layer._compete

    def watched(*arguments):
        competed = compete(*arguments)
        found.extend(map(weakref.ref, (competed.statistics.mask, competed.statistics.packed)))
        return competed

    layer._compete = watched
    output = layer(torch.randn(9, 7))
    assert all(reference() is not None for reference in found)
    output.sum().backward()
    assert len(found) == 2 and all(reference() is None for reference in found) and output.grad_fn is not None


class Subclass(torch.Tensor):
    """A tensor that goes through the dispatcher."""


def test_a_gradient_of_another_kind_of_tensor_gives_the_same():
    results = []
    for kind in (torch.Tensor, Subclass):
        torch.manual_seed(0)
        layer, x = BCLLayer(7, 5, backend="cpu", som_lr=0.1), torch.randn(9, 7)
        output = layer(x)
        output.backward(torch.ones(9, 5).as_subclass(kind))
        results.append((layer.weight.grad, layer.weight.detach()))
    assert all(one.equal(other) for one, other in zip(*results, strict=True))
