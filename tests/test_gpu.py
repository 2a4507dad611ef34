"""The layer on a GPU: served by Triton and CUDA C++, in training programs, CUDA graphs and torch.compile. Skipped
without one."""

import copy
from collections import Counter

import pytest
import torch
from helpers.layers import batch, make, same, state
from stages import check_stages
from torch import nn

from bcl_fast import BCLLayer, backends, graphed
from bcl_fast.measure.implementations import Size, build
from bcl_fast.testing import VARIANTS, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SIZES = [(128, 64, 784), (1000, 777, 501), (1024, 4096, 784), (8192, 8192, 784)]


@pytest.fixture(params=backends.ON_GPU)
def backend(request):
    if reason := backends.why_not(request.param, "cuda"):
        pytest.skip(reason)
    return request.param


def on_gpu(backend, **options):
    """`make()`, but on the GPU from the start: a backend asked for by name must serve where the layer is."""
    layer = make(backend, device="cuda", **options)
    layer.load_state_dict(make("reference", **options).state_dict())
    return layer


@pytest.mark.parametrize("size", [Size(*size) for size in SIZES], ids=str)
def test_every_stage_keeps_the_contract(backend, size):
    check_stages(size, [backend], "cuda")


def steps(layer, count=3, **kinds):
    for seed in range(count):
        layer(batch(seed=seed, **kinds).cuda()).square().mean().backward()
    return layer


def test_the_first_step_is_that_of_the_reference(backend):
    for options in VARIANTS.values():
        reference, layer = (on_gpu(name, som_lr=0.1, **options) for name in ("reference", backend))
        assert layer.backend == backend
        start = layer.weight.detach().clone()
        for each in (reference, layer):
            steps(each, 1)
        for name in ("weight", "bias"):
            got, expected = (getattr(each, name).grad for each in (layer, reference))
            assert relative_error(got, expected) <= 1e-4, options
        destination = "weight" if layer.som_offset is None else "som_offset"
        moved = [getattr(each, destination) - (start if destination == "weight" else 0) for each in (layer, reference)]
        assert relative_error(*moved) <= 1e-4 and int(layer.step) == 1, options


def test_the_same_inputs_give_the_same_bits(backend):
    assert same(state(steps(on_gpu(backend), 5)), state(steps(on_gpu(backend), 5)))


def fastest():
    return "cuda" if backends.why_not("cuda", "cuda") is None else "triton"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_train(dtype):
    if dtype == torch.float64:
        backends._fastest.cache_clear()
        with pytest.warns(UserWarning, match="'portable' serves, slower than 'triton' would: it computes in float32"):
            layer = make(dtype=dtype).cuda()
    else:
        layer = make(dtype=dtype).cuda()
        assert layer.backend == fastest()
    assert int(steps(layer, 3, dtype=dtype).step) == 3


@pytest.mark.parametrize("B, D, N", [(257, 129, 784), (1, 2, 1), (1, 64, 784), (128, 2, 1), (8192, 64, 13)])
def test_a_low_precision_product_is_summed_and_kept_in_float32(B, D, N):
    """It errs by the roundings of float32, a thousandth of those of its operands' own dtype."""
    for dtype in (torch.bfloat16, torch.float16):
        for bias in (False, True):
            x, weight = torch.randn(N, 2 * B, device="cuda").T[::2], torch.randn(D, N, device="cuda")
            c = torch.randn(D, device="cuda") if bias else None
            product = torch.ops.bcl_fast.product(x, weight, c, dtype)
            exact = nn.functional.linear(*(None if t is None else t.to(dtype).double() for t in (x, weight, c)))
            assert product.dtype == torch.float32 and relative_error(product, exact) <= 1e-5


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_training_under_autocast_is_bit_equal(backend, compiler):
    plain = on_gpu(backend)
    other = copy.deepcopy(plain)
    compiled = torch.compile(other, fullgraph=True, backend=compiler)
    with torch.autocast("cuda", torch.bfloat16):
        for seed in range(3):
            for call in (plain, compiled):
                call(batch(seed=seed).cuda()).float().square().mean().backward()
    assert same(state(plain), state(other)) and plain.weight.grad.equal(other.weight.grad)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_training_is_bit_equal_across_the_refresh(backend, mode):
    """reduce-overhead replays graphs of its own: the pull must not be in one, for it is handed over in Python."""
    plain = on_gpu(backend, recompute_every=2)
    other = copy.deepcopy(plain)
    compiled = torch.compile(other, fullgraph=True, mode=mode)
    for seed in range(8):
        torch.compiler.cudagraph_mark_step_begin()
        for layer, call in ((plain, plain), (other, compiled)):
            layer.weight.grad = layer.bias.grad = None  # may lie in a graph's memory (pytorch#169545)
            call(batch(seed=seed).cuda()).square().mean().backward()
    assert int(other.step) == 8 and same(state(plain), state(other))


def test_a_bound_layer_trains_with_a_grad_scaler(backend):
    layer = on_gpu(backend)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3, fused=True)
    layer.bind_optimizer(optimizer)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    start = layer.weight.detach().clone()
    for factor in (torch.inf, 1.0):  # the first step is skipped, with its pull
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = layer(batch().cuda()).float().square().mean()
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert layer.weight.equal(start) == (factor == torch.inf) and bool(layer.weight.isfinite().all())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_layer_trains_on_a_device_that_is_not_the_current_one(backend):
    first, second = on_gpu(backend), on_gpu(backend).to("cuda:1")
    for layer in (first, second):
        for seed in range(3):
            layer(batch(seed=seed).to(layer.weight.device)).square().mean().backward()
    assert same({name: value.to("cuda:0") for name, value in state(second).items()}, state(first))


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


def capture(function, warmup=3):
    """A CUDA graph of the function, after so many calls in a stream of its own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def test_a_step_can_be_captured_in_a_cuda_graph(backend):
    """Refreshes and steps are counted on the device: replays do what eager steps do, with the som_lr of their time."""
    plain = on_gpu(backend, recompute_every=2)
    captured = copy.deepcopy(plain)
    x = batch().cuda()

    def step(layer):
        layer.weight.grad = layer.bias.grad = None
        layer(x).square().mean().backward()

    graph = capture(lambda: step(captured))
    for _ in range(3):
        step(plain)
    for som_lr in (0.005, 0.005, 0.1, 0.2):
        plain.som_lr = captured.som_lr = som_lr
        step(plain)
        graph.replay()
    torch.cuda.synchronize()
    assert same(state(plain), state(captured)) and int(captured.step) == 7


def test_a_capture_that_would_never_pull_raises(backend):
    with pytest.raises(RuntimeError, match="its replays would never pull"):
        torch.cuda.make_graphed_callables(on_gpu(backend), (batch().cuda(),))


def test_a_capture_of_what_the_host_counts_raises():
    layer = on_gpu("portable")
    with pytest.raises(RuntimeError, match="backend 'portable' counts steps on the host"):
        capture(lambda: layer(batch().cuda()).square().mean().backward())


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, dampening=0.5),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(0.01, device="cuda"), capturable=True),
}


@pytest.mark.parametrize("bind", [False, True], ids=["unbound", "bound"])
@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_captured_steps_are_eager_ones_bit_by_bit(backend, make_optimizer, bind):
    model = nn.Sequential(on_gpu(backend, recompute_every=2), nn.ReLU(), nn.Dropout(0.3), nn.Linear(11, 13)).cuda()
    model[0].som_lr = 0.0
    twin = copy.deepcopy(model)
    optimizer, twin_optimizer = (make_optimizer(each.parameters()) for each in (model, twin))
    if bind:
        model[0].bind_optimizer(optimizer)
        twin[0].bind_optimizer(twin_optimizer)

    def loss_function(model, x):
        return (model(x) - x).square().mean()

    step = graphed(model, loss_function, optimizer, batch().cuda())
    assert same(state(model), state(twin))
    generator = torch.cuda.get_rng_state()
    losses = []
    for seed in range(6):  # 0 first: the capture must hold a pull all the same
        model[0].som_lr = 0.01 * seed
        losses.append(step(batch(seed=seed).cuda()))
    torch.cuda.set_rng_state(generator)
    for seed, loss in enumerate(losses):
        twin[0].som_lr = 0.01 * seed
        twin_optimizer.zero_grad()
        expected = loss_function(twin, batch(seed=seed).cuda())
        expected.backward()
        twin_optimizer.step()
        assert loss.equal(expected)
    assert same(state(model), state(twin)) and int(model[0].step) == 6


def test_a_captured_learning_rate_is_read_or_refused():
    model = on_gpu("triton")
    rate = torch.tensor(0.0, device="cuda")
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, capturable=True)
    step = graphed(model, lambda m, x: m(x).square().mean(), optimizer, batch().cuda())
    model.som_lr, start = 0.0, model.weight.detach().clone()
    step(batch().cuda())
    assert model.weight.equal(start)
    rate.fill_(0.1)
    step(batch().cuda())
    assert not model.weight.equal(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = graphed(model, lambda m, x: m(x).square().mean(), optimizer, batch().cuda())
    optimizer.param_groups[0]["lr"] = 0.2
    with pytest.raises(RuntimeError, match=r"\['lr'\] is 0\.2 and was 0\.1"):
        step(batch().cuda())


# --- Launches, devices ------------------------------------------------------------------------------------------------


def kernels_of(step):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return Counter(event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)


def test_a_step_takes_at_most_eight_launches_beyond_its_products(memory_as_it_comes):
    size = Size(1000, 777, 501)
    found = {}
    for name in ("linear", "triton"):
        step = build(name, size, device="cuda").step
        for _ in range(3):
            step()
        found[name] = kernels_of(step)
    ours = Counter({name: n for name, n in found["triton"].items() if name.endswith("_kernel") and name[0] == "_"})
    assert 0 < ours.total() <= 8, ours
    assert (found["triton"] - ours).total() <= found["linear"].total(), found


def test_a_layer_moves_between_devices():
    layer = BCLLayer(13, 11, neighborhood_k=3)
    assert layer.backend == "cpu" or layer.backend == "portable"
    layer.cuda()
    assert layer.backend == fastest()
    steps(layer)
    layer.cpu()(batch()).sum().backward()
    assert int(layer.step) == 4
