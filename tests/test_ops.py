"""The operators: torch.library's own checks, backend resolution, and counters read without a device."""

import gc
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from backends import ON_CPU

from bcl_fast import BCLLayer, cpu, cuda, ops
from bcl_fast.testing import VARIANTS, columns, neighbors_of

ROOT = Path(__file__).resolve().parents[1]
B, D, N, K = 9, 5, 4, 3
backend = pytest.mark.parametrize("backend", ON_CPU)
CONFIGS = {name: ops.BCLConfig(**options) for name, options in VARIANTS.items()}


def statistics_arguments(backend, config, dtype=torch.float32, bias=True):
    x, weight = columns("random", B, N, dtype), columns("random", D, N, dtype, seed=1)
    c = columns("random", 1, D, dtype, seed=2)[0] if bias else None
    return (
        x, weight, c, torch.nn.functional.linear(x, weight, c), neighbors_of(D, K), torch.tensor(0), torch.tensor(-1),
        torch.tensor(0), config.recompute_every, config.temperature, config.affinity, config.need_weighting,
        config.rescue_weighting, config.rescue_k, config.forces, config.gradient_mask, config.rescue_onset,
        config.pull_onset, config.check_finite, backend,
    )  # fmt: skip


def pending(backend, config, dtype=torch.float32):
    arguments = statistics_arguments(backend, config, dtype)
    mask, winner, ticket, *choices = torch.ops.bcl_fast.statistics_(*arguments)
    return arguments, mask, winner, [ticket, arguments[0], *choices]


@backend
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_opcheck_statistics(backend, config):
    torch.library.opcheck(torch.ops.bcl_fast.statistics_.default, statistics_arguments(backend, config))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck_product(bias, dtype):
    x, weight, c = columns("random", B, N), columns("random", D, N, seed=1), columns("random", 1, D, seed=2)[0]
    arguments = x, weight, c if bias else None, dtype
    torch.library.opcheck(torch.ops.bcl_fast.product.default, arguments)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    rounded = [None if t is None else t.to(dtype).double() for t in arguments[:3]]
    result = torch.ops.bcl_fast.product(*arguments)
    torch.testing.assert_close(result, torch.nn.functional.linear(*rounded).to(exact))


def test_what_happens_on_the_host_is_kept_out_of_a_compiler_s_cuda_graphs():
    """The pull is handed over, and counters are remembered, in Python: a replay would leave that out."""
    tagged = {
        name for name in ops._functions
        if torch.Tag.cudagraph_unsafe in getattr(torch.ops.bcl_fast, name).default.tags
    }  # fmt: skip
    assert tagged == {"statistics_", "masked_gradient", "targets_pull_"}
    assert set(ops._functions) - tagged == {"product", "som_increment"}  # functions of their arguments alone


def test_an_operator_runs_on_the_device_of_its_tensors(monkeypatch):
    """Triton launches on the current device: a layer on another one would read memory that is not there."""
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    for device, expected in (("cpu", []), ("cuda:0", []), ("cuda:1", [torch.device("cuda:1")])):
        like = SimpleNamespace(device=torch.device(device))
        assert ops._call(lambda *arguments: arguments, like, 2) == (like, 2)
        assert entered == expected


def captured(monkeypatch):
    """From now on the host believes that what it launches goes into a CUDA graph."""
    monkeypatch.setattr(ops, "capturing", lambda device: True)


@backend
def test_a_capture_of_what_is_counted_on_the_host_raises(monkeypatch, backend):
    """A graph would keep whether neighbors were due at its capture, and the number of the step."""
    arguments = statistics_arguments(backend, ops.BCLConfig())
    captured(monkeypatch)
    with pytest.raises(RuntimeError, match=f"backend '{backend}' counts steps on the host.*'triton' or 'cuda'"):
        torch.ops.bcl_fast.statistics_(*arguments)
    with pytest.raises(RuntimeError, match="counts steps on the host"):
        ops.advance_(torch.tensor(3), backend)


def test_a_capture_of_what_is_counted_on_the_device_goes_on(monkeypatch):
    captured(monkeypatch)
    for backend in ops.REFRESH:
        step = torch.tensor(3)
        ops.advance_(step, backend)
        assert int(step) == 4


@backend
@pytest.mark.parametrize("kind", ["soft", "winner_take_all", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck_masked_gradient(backend, kind, dtype):
    _, mask, winner, left = pending(backend, ops.BCLConfig(gradient_mask=kind), torch.float64 if dtype.itemsize == 8
                                    else torch.float32)  # fmt: skip
    arguments = columns("random", B, D).to(dtype), mask, winner, kind, dtype, left, False, False, backend
    torch.library.opcheck(torch.ops.bcl_fast.masked_gradient.default, arguments)


@backend
@pytest.mark.parametrize("offset", [False, True])
def test_opcheck_pull_and_increment(backend, offset):
    (_, weight, *_), _, _, (_, x, *choices, strength) = pending(backend, ops.BCLConfig())
    som_offset = torch.zeros_like(weight) if offset else None
    tail = x, *choices, "none", backend
    pull = weight, som_offset, torch.tensor(3), strength, torch.tensor(0.1), *tail
    torch.library.opcheck(torch.ops.bcl_fast.targets_pull_.default, pull)
    torch.library.opcheck(torch.ops.bcl_fast.som_increment.default, (weight, som_offset, strength, *tail))


@backend
def test_increment_is_the_pull_before_its_step_size(backend):
    (_, weight, *_), _, _, (_, x, *choices, strength) = pending(backend, ops.BCLConfig(), torch.float64)
    tail = x, *choices, "none", backend
    expected = weight + 0.1 * torch.ops.bcl_fast.som_increment(weight, None, strength, *tail)
    step = torch.tensor(3)
    torch.ops.bcl_fast.targets_pull_(weight, None, step, strength, torch.tensor(0.1, dtype=weight.dtype), *tail)
    torch.testing.assert_close(weight, expected)
    assert int(step) == 4


def test_every_backend_serves_every_stage():
    for name, served in ops.DISPATCH.items():
        assert {*served, "cuda"} == set(ops.BACKENDS)
        for backend in served:
            assert ops.stage(name, backend).__name__ == name
        own = name in ops.CUDA_SERVES
        assert own or ops.stage(name, "cuda") is ops.stage(name, "triton")
        assert not own or callable(getattr(cuda, name))
    assert all(ops.stage("refresh_", backend).__name__ == "refresh_" for backend in ops.REFRESH)


@pytest.mark.parametrize(
    "fused, backend, expected",
    [(True, None, "cpu"), (True, "cpu", "cpu"), (False, None, "reference"), (True, "reference", "reference"),
     (True, "portable", "portable"), (False, "reference", "reference")],
)  # fmt: skip
def test_resolve_backend(fused, backend, expected):
    assert ops.resolve_backend(fused, backend) == expected


def test_resolve_backend_refuses():
    with pytest.raises(ValueError, match="backend must be .*'portable', 'cpu', 'triton', 'cuda', got 'fastest'"):
        ops.resolve_backend(True, "fastest")
    with pytest.raises(ValueError, match="backend='portable' needs fused=True"):
        ops.resolve_backend(False, "portable")
    with pytest.raises(TypeError, match="fused must be True or False, got 'yes'"):
        ops.resolve_backend("yes", None)


def unbuilt():
    raise ImportError("no nvcc was there")


def test_backends_say_why_not(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    reasons = ops.backends("cpu")
    assert reasons["reference"] is None and reasons["portable"] is None
    assert reasons["triton"].startswith("it serves CUDA tensors only (with TRITON_INTERPRET=1")
    assert reasons["cuda"] == reasons["triton"]  # most of its stages are Triton's
    assert all(ops.backends("meta").values())
    elsewhere = ops.backends("cuda")
    assert elsewhere["cpu"] == "it serves CPU tensors only"
    assert elsewhere["portable"] is None and elsewhere["triton"] is None
    with pytest.raises(ValueError, match="backend='cpu' cannot serve on 'cuda': it serves CPU tensors only"):
        ops.resolve_backend(True, "cpu", "cuda")
    with pytest.raises(ValueError, match="backend='cuda' cannot serve on 'cpu': it serves CUDA tensors only"):
        ops.resolve_backend(True, "cuda")
    monkeypatch.setattr("bcl_fast.native.cuda", unbuilt)
    assert ops.why_not("cuda", "cuda") == ops.cuda_library() == "no nvcc was there"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert ops.why_not("triton", "cuda") == "Triton is not installed"


def test_float64_on_a_gpu_is_not_served_by_triton_and_says_so():
    ops._fastest.cache_clear()
    assert ops.resolve_backend(True, None, "cuda") in ops.FASTEST["cuda"]
    with pytest.warns(UserWarning, match="'portable' serves, slower than 'triton' would: it computes in float32"):
        assert ops.resolve_backend(True, None, "cuda", torch.float64) == "portable"
    with pytest.raises(ValueError, match="backend='triton' cannot serve on 'cuda': it computes in float32"):
        ops.resolve_backend(True, "triton", "cuda", torch.float64)
    ops._fastest.cache_clear()


def test_on_a_gpu_the_cuda_library_serves_where_it_was_built(monkeypatch):
    for built, expected in ((None, "cuda"), ("no nvcc was there", "triton")):
        monkeypatch.setattr(cuda, "missing", lambda device_type, built=built: built)
        ops._fastest.cache_clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # which of the two is faster is not known
            assert ops.resolve_backend(True, None, "cuda") == expected
    ops._fastest.cache_clear()


def test_within_cuda_sizes_decide_per_stage(monkeypatch):
    came = []
    monkeypatch.setattr(ops, "_function", lambda module, name: lambda *arguments: came.append(module))
    monkeypatch.setattr(ops, "stage", ops.stage.__wrapped__)  # past its cache
    monkeypatch.setitem(ops.CUDA_FROM, "rank", (B, D))
    for samples, features in ((B, D), (B + 1, D + 1), (B - 1, D), (B, D - 1)):
        ops.stage("rank", "cuda")(torch.ones(samples, features))
    assert came == ["cuda", "cuda", "kernels.selection", "kernels.selection"]


def test_a_missing_library_is_told_once_and_portable_serves(monkeypatch):
    monkeypatch.setattr(cpu, "missing", lambda: "its C++ library was not built")
    ops._fastest.cache_clear()
    with pytest.warns(UserWarning, match="'portable' serves, slower than 'cpu' would: its C.. library was not built"):
        assert BCLLayer(4, 3).backend == "portable"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert BCLLayer(4, 3).backend == "portable"
    with pytest.raises(ValueError, match="backend='cpu' cannot serve on 'cpu': its C.. library was not built"):
        BCLLayer(4, 3, backend="cpu")
    ops._fastest.cache_clear()


class Counted(torch.Tensor):
    """A counter on a device that notices every reading of its value on the host."""

    readings = 0
    device = torch.device("cuda")

    def __int__(self):
        Counted.readings += 1
        return int(self.as_subclass(torch.Tensor))


def test_counter_is_read_from_the_device_only_when_somebody_else_wrote_it():
    counter = torch.tensor(7).as_subclass(Counted)
    Counted.readings = 0
    assert [ops.read_counter(counter) for _ in range(3)] == [7, 7, 7]
    assert Counted.readings == 1
    ops.write_counter_(counter, 8)
    assert ops.read_counter(counter) == 8 and Counted.readings == 1
    counter.add_(1)  # not through write_counter_
    assert ops.read_counter(counter) == 9 and Counted.readings == 2


def test_a_dead_owner_is_forgotten():
    class Layer:
        def receive(self, pending, compiled):
            raise AssertionError("dead")

    layer = Layer()
    ticket = ops.register_owner(layer)
    assert ops.owner_of(ticket) is layer
    del layer
    gc.collect()
    assert ops.owner_of(ticket) is None


@backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_check_finite_names_samples_too_short_for_a_cosine(backend, dtype):
    arguments = list(statistics_arguments(backend, ops.BCLConfig(check_finite=True)))
    for place in (0, 1, 3):
        arguments[place] = arguments[place].to(dtype if place == 0 else ops.exact(dtype))
    arguments[2] = None
    x = arguments[0]
    x[1], x[2] = 0, x[2] * 1e-4  # a zero row has cosine 0 by definition
    torch.ops.bcl_fast.statistics_(*arguments)
    x[[5, 7]] *= 1e-8
    x[6] = torch.tensor([1e-30, 0, 0, 0])  # its square underflows
    message = r"^rows of x must be zero or of norm >= 1e-06 .* got 3 of 9 that are shorter, the first of them row 5"
    with pytest.raises(ValueError, match=message):
        torch.ops.bcl_fast.statistics_(*arguments)


@backend
def test_require_finite_names_the_tensor(backend):
    arguments = list(statistics_arguments(backend, ops.BCLConfig(check_finite=True)))
    neighbors = arguments[4].clone()
    for place, name in ((0, "x"), (1, "weight"), (3, "activation")):
        bad = list(arguments)
        bad[place] = bad[place].clone()
        bad[place][0, 0] = torch.nan
        with pytest.raises(ValueError, match=f"^{name} must be finite .* got 1 NaN or Inf of {bad[place].numel()}"):
            torch.ops.bcl_fast.statistics_(*bad)
    assert arguments[4].equal(neighbors)  # nothing was refreshed before the error


RELOAD = """
import importlib, sys
import torch
import bcl_fast

layer, twin = (bcl_fast.BCLLayer(8, 6, neighborhood_k=2) for _ in range(2))
twin.load_state_dict(layer.state_dict())
x = torch.randn(9, 8)
for name in sorted(n for n in sys.modules if n.startswith("bcl_fast.") and n != "bcl_fast.kernels"):
    importlib.reload(sys.modules[name])
importlib.reload(bcl_fast)
new = sys.modules["bcl_fast"].BCLLayer(8, 6, neighborhood_k=2)
new.load_state_dict(layer.state_dict())
for each in (layer, twin, new):
    each(x).square().sum().backward()
    assert int(each.step) == 1
compiled = torch.compile(new, fullgraph=True, backend="aot_eager")
compiled(x).square().sum().backward()
twin(x).square().sum().backward()
assert int(new.step) == 2 and new.weight.equal(twin.weight) and not new.weight.equal(layer.weight)
"""


def test_modules_may_be_reloaded():
    """As notebooks do: what lives goes on pulling, and operators are registered once."""
    done = subprocess.run([sys.executable, "-c", RELOAD], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
