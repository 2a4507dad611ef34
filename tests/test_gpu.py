"""The layer on a GPU: served by Triton and CUDA C++, in training programs, CUDA graphs and torch.compile. Skipped
without one."""

import copy
from collections import Counter

import pytest
import torch
from test_layer import batch, make, same, state

from bcl_fast import BCLLayer, ops
from bcl_fast.measure.contestants import Size, build
from bcl_fast.measure.stages import check_stages
from bcl_fast.testing import VARIANTS, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SIZES = [(128, 64, 784), (1000, 777, 501), (1024, 4096, 784), (8192, 8192, 784)]


@pytest.fixture(params=ops.ON_GPU)
def backend(request):
    if reason := ops.why_not(request.param, "cuda"):
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


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_first_step_is_that_of_the_reference(backend, options):
    reference, layer = (on_gpu(name, som_lr=0.1, **options) for name in ("reference", backend))
    assert layer.backend == backend
    start = layer.weight.detach().clone()
    for each in (reference, layer):
        steps(each, 1)
    for name in ("weight", "bias"):
        got, expected = (getattr(each, name).grad for each in (layer, reference))
        assert relative_error(got, expected) <= 1e-4
    destination = "weight" if layer.som_offset is None else "som_offset"
    moved = [getattr(each, destination) - (start if destination == "weight" else 0) for each in (layer, reference)]
    assert relative_error(*moved) <= 1e-4 and int(layer.step) == 1


def test_the_same_inputs_give_the_same_bits(backend):
    assert same(state(steps(on_gpu(backend), 5)), state(steps(on_gpu(backend), 5)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_train(dtype):
    if dtype == torch.float64:
        with pytest.warns(UserWarning, match="'portable' serves, slower than 'triton' would: it computes in float32"):
            layer = make(dtype=dtype).cuda()
    else:
        layer = make(dtype=dtype).cuda()
        assert layer.backend == "triton"
    assert int(steps(layer, 3, dtype=dtype).step) == 3


def test_compiled_training_is_bit_equal_across_the_refresh(backend):
    plain = on_gpu(backend, recompute_every=2)
    other = copy.deepcopy(plain)
    compiled = torch.compile(other, fullgraph=True)
    for seed in range(5):
        for call in (plain, compiled):
            call(batch(seed=seed).cuda()).square().mean().backward()
    assert same(state(plain), state(other))


def test_a_step_can_be_captured_in_a_cuda_graph(backend):
    """Refreshes and steps are counted on the device: replays do what eager steps do."""
    plain = on_gpu(backend, recompute_every=2)
    captured = copy.deepcopy(plain)
    x = batch().cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles
        for _ in range(3):
            captured(x).square().mean().backward()
            captured.weight.grad = captured.bias.grad = None
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured(x).square().mean().backward()
    for _ in range(4):
        graph.replay()
    for _ in range(7):
        plain(x).square().mean().backward()
        plain.weight.grad = plain.bias.grad = None
    torch.cuda.synchronize()
    assert int(captured.step) == 7 and captured.weight.equal(plain.weight)


def kernels_of(step):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return Counter(event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)


def test_a_step_takes_at_most_eight_launches_beyond_its_products():
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
    assert layer.backend == "triton"
    steps(layer)
    layer.cpu()(batch()).sum().backward()
    assert int(layer.step) == 4
