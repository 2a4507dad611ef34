"""torch.compile(fullgraph=True): the same numbers as eager, and errors where it cannot give them."""

import contextlib
import copy

import pytest
import torch
from helpers.backends import ON_CPU
from helpers.layers import D, N, batch, make, same, state
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from bcl_fast.backends import FASTEST
from bcl_fast.layer import BCLLayer
from bcl_fast.testing import VARIANTS


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def train(layer, call, steps=6, **kinds):
    optimizer = torch.optim.SGD(layer.parameters(), 1e-2)
    for step in range(steps):
        x = batch(seed=step, **kinds).requires_grad_()
        call(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return x.grad


@pytest.mark.parametrize(
    "backend, compiler", [*((name, "aot_eager") for name in ON_CPU), (FASTEST["cpu"][0], "inductor")]
)
def test_training_is_bit_equal_across_the_refresh(backend, compiler):
    plain, other = make(backend, recompute_every=4), make(backend, recompute_every=4)
    compiled = torch.compile(other, fullgraph=True, backend=compiler)
    assert train(plain, plain, 10).equal(train(other, compiled, 10))
    assert same(state(plain), state(other)) and int(other.step) == 10


@torch._dynamo.config.patch(recompile_limit=1)
def test_what_a_compiler_gives_up_on_trains_as_it_is():
    """Beyond its limit of recompilations it runs a frame as it is, and looks into those that this one calls."""
    plain, other = make(FASTEST["cpu"][0]), make(FASTEST["cpu"][0])
    compiled = torch.compile(other, dynamic=False, backend="aot_eager")
    gradients = []
    for layer, call in ((plain, plain), (other, compiled)):
        for seed, rows in enumerate((9, 9, 11, 12, 13, 9)):
            layer.zero_grad()
            x = batch(seed=seed)[:1].repeat(rows, 1) * torch.linspace(-1, 1, rows)[:, None]
            call(x).square().mean().backward()
        gradients.append(layer.weight.grad)
    assert gradients[0].equal(gradients[1]) and same(state(plain), state(other)) and int(other.step) == 6


@pytest.mark.parametrize("name", ["cosine-soft", "winner-take-all", "dense-rank", "pull-onset", "offset-coupled"])
def test_variants_compile(name):
    """What the graph sees of the options: a mask, how many samples are chosen, where the pull goes."""
    plain, other = make(**VARIANTS[name]), make(**VARIANTS[name])
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    assert train(plain, plain).equal(train(other, compiled))
    assert same(state(plain), state(other))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes(dtype, compiler):
    plain, other = make(dtype=dtype), make(dtype=dtype)
    compiled = torch.compile(other, fullgraph=True, backend=compiler)
    assert train(plain, plain, dtype=dtype).equal(train(other, compiled, dtype=dtype))
    assert same(state(plain), state(other))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_autocast(compiler):
    """The roundings of the product are inside an operator: a compiler leaves out those that it sees undone."""
    plain, other = make(), make()
    compiled = torch.compile(other, fullgraph=True, backend=compiler)
    with torch.autocast("cpu", torch.bfloat16):
        assert train(plain, plain).equal(train(other, compiled))
    assert same(state(plain), state(other))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_model_of_two_layers(compiler):
    """The second layer's input is a buffer of the compiled graph, which reuses it before the pull."""
    torch.manual_seed(0)
    model = nn.Sequential(BCLLayer(N, D), nn.ReLU(), BCLLayer(D, 7, recompute_every=2), nn.ReLU(), nn.Linear(7, 3))
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend=compiler)
    train(model, model)
    train(twin, compiled)
    for name, value in state(model).items():
        torch.testing.assert_close(twin.state_dict()[name], value, msg=name)


def test_changing_batch_sizes_compile_once_more_and_no_further():
    from torch._dynamo.testing import CompileCounterWithBackend

    layer, counter = make(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for B in (17, 18, 19, 40, 33):
        compiled(batch(B)).sum().backward()
    assert counter.frame_count == 2 and int(layer.step) == 5


def test_imports_share_compiled_code():
    counter = CompileCounterWithBackend("aot_eager")
    layers = [make(seed=seed) for seed in range(12)]
    for layer in layers:
        torch.compile(layer, fullgraph=True, backend=counter)(batch()).sum().backward()
    assert counter.frame_count <= 2 and all(int(layer.step) == 1 for layer in layers)


def test_a_schedule_of_som_lr_recompiles_nothing():
    from torch._dynamo.testing import CompileCounterWithBackend

    layer, counter = make(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for step in range(5):
        layer.som_lr = 0.1 / (step + 1)
        compiled(batch()).sum().backward()
    assert counter.frame_count == 1


def test_a_second_forward_per_backward_raises_before_anything_changes():
    layer = make()
    compiled = torch.compile(layer, fullgraph=True, backend="inductor")
    compiled(batch()).sum().backward()
    layer.zero_grad()
    before = state(layer)
    loss = compiled(batch(seed=2)).sum() + compiled(batch(seed=3)).sum()
    with pytest.raises(RuntimeError, match="one forward of a BCLLayer per backward is supported, got a second"):
        loss.backward()
    assert same(before, state(layer)) and layer.weight.grad is None
    compiled(batch()).sum().backward()
    assert int(layer.step) == 2


def test_a_forward_without_a_backward_is_replaced_by_the_next():
    layer, other = make(), make()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(batch(seed=5))
    compiled(batch()).sum().backward()
    other(batch()).sum().backward()
    assert same(state(layer), state(other))


def test_evaluation_compiles():
    layer = make().eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert compiled(batch()).equal(layer(batch()))


def test_bound_optimizer():
    layers = [make(), make()]
    calls = [layers[0], torch.compile(layers[1], fullgraph=True, backend="aot_eager")]
    for layer, call in zip(layers, calls, strict=True):
        optimizer = torch.optim.SGD(layer.parameters(), 1e-2)
        layer.bind_optimizer(optimizer)
        for step in range(6):
            call(batch(seed=step)).square().mean().backward()
            if step % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
    assert same(state(layers[0]), state(layers[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("som_space", ["weight", "offset"])
def test_observers_come_and_go_without_a_new_compilation_and_see_what_eager_ones_see(som_space, dtype):
    seen, layers = ([], []), [make(som_space=som_space).to(dtype) for _ in range(2)]
    compilations = CompileCounterWithBackend("aot_eager")
    calls = [layers[0], torch.compile(layers[1], fullgraph=True, backend=compilations)]
    for step in range(6):
        for layer, call, records in zip(layers, calls, seen, strict=True):
            with layer.observe(records.append) if step % 2 else contextlib.nullcontext():
                call(batch(seed=step, dtype=dtype)).square().mean().backward()
    assert same(state(layers[0]), state(layers[1])) and compilations.frame_count == 1
    assert [record.step for record in seen[1]] == [1, 3, 5]
    for one, other in zip(*seen, strict=True):
        for name, value in vars(one).items():
            got = getattr(other, name)
            assert got.equal(value) if torch.is_tensor(value) else got == value, name


@pytest.mark.parametrize("bound", [False, True], ids=["free", "bound"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_a_whole_compiled_step_trains_alike_and_is_compiled_once(autocast, bound):
    """What hooks do on the host is not the compiler's: it compiled that anew for every backward, up to its limit."""
    torch.manual_seed(0)
    models = [nn.Sequential(BCLLayer(N, D, neighborhood_k=3, recompute_every=3), nn.ReLU(), nn.Linear(D, 5))]
    models.append(copy.deepcopy(models[0]))
    states = []
    for model, compiled in zip(models, (False, True), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        if bound:
            model[0].bind_optimizer(optimizer)

        def step(x, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(x).float().square().mean()
            loss.backward()
            optimizer.step()

        call = torch.compile(step) if compiled else step
        torch._dynamo.utils.counters.clear()
        for seed in range(10):
            call(batch(seed=seed))
            if seed == 1:
                frames = dict(torch._dynamo.utils.counters["frames"])
        assert dict(torch._dynamo.utils.counters["frames"]) == frames
        assert bool(frames) == compiled
        states.append(state(model))
    assert int(models[1][0].step) == 10
    for name, value in states[0].items():
        if autocast and name.startswith("2."):  # nn.Linear's own backward, which the compiler rounds in its own way
            torch.testing.assert_close(states[1][name], value, rtol=1e-2, atol=1e-3)
        else:
            torch.testing.assert_close(states[1][name], value, msg=name)
