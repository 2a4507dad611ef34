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
from helpers.backends import ON_CPU
from helpers.operators import B, D, K, N, forward, statistics_arguments

from bcl_fast import BCLConfig, BCLLayer, backends, counters, cpu, cuda, operators, owners, reference
from bcl_fast.spec import CHOICES
from bcl_fast.testing import VARIANTS, columns, neighbors_of

ROOT = Path(__file__).resolve().parents[1]
backend = pytest.mark.parametrize("backend", ON_CPU)
CONFIGS = {name: BCLConfig(**options) for name, options in VARIANTS.items()}


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
        name for name in operators._functions
        if torch.Tag.cudagraph_unsafe in getattr(torch.ops.bcl_fast, name).default.tags
    }  # fmt: skip
    assert tagged == {"statistics_", "masked_gradient", "targets_pull_"}
    assert set(operators._functions) - tagged == {"product", "som_increment"}  # functions of their arguments alone


def test_an_operator_runs_on_the_device_of_its_tensors(monkeypatch):
    """Triton launches on the current device: a layer on another one would read memory that is not there."""
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    for device, expected in (("cpu", []), ("cuda:0", []), ("cuda:1", [torch.device("cuda:1")])):
        like = SimpleNamespace(device=torch.device(device))
        assert operators._call(lambda *arguments: arguments, like, 2) == (like, 2)
        assert entered == expected


def captured(monkeypatch):
    """From now on the host believes that what it launches goes into a CUDA graph."""
    monkeypatch.setattr(counters, "capturing", lambda device: True)


@backend
def test_a_capture_of_what_is_counted_on_the_host_raises(monkeypatch, backend):
    """A graph would keep whether neighbors were due at its capture, and the number of the step."""
    arguments = statistics_arguments(backend, BCLConfig())
    captured(monkeypatch)
    with pytest.raises(RuntimeError, match=f"backend '{backend}' counts steps on the host.*'triton' or 'cuda'"):
        torch.ops.bcl_fast.statistics_(*arguments)
    with pytest.raises(RuntimeError, match="counts steps on the host"):
        counters.advance_(torch.tensor(3), backend)


def test_a_capture_of_what_is_counted_on_the_device_goes_on(monkeypatch):
    captured(monkeypatch)
    for backend in backends.REFRESH:
        step = torch.tensor(3)
        counters.advance_(step, backend)
        assert int(step) == 4


@backend
@pytest.mark.parametrize("kind", ["soft", "winner_take_all", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck_masked_gradient(backend, kind, dtype):
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    _, found, pull = forward(backend, BCLConfig(gradient_mask=kind), exact)
    arguments = columns("random", B, D).to(dtype), found.mask, found.winner, kind, dtype, False, False, backend
    for observed in ((None, None), (columns("random", B, D), neighbors_of(D, K))):
        whole = *arguments, found.ticket, *observed, *pull
        torch.library.opcheck(torch.ops.bcl_fast.masked_gradient.default, whole)


@backend
@pytest.mark.parametrize("offset", [False, True])
def test_opcheck_pull_and_increment(backend, offset):
    weight, _, pull = forward(backend, BCLConfig())
    som_offset = torch.zeros_like(weight) if offset else None
    for projection in ("none", "centered"):
        pulled = weight, som_offset, torch.tensor(3), torch.tensor(0.1), projection, backend, *pull
        torch.library.opcheck(torch.ops.bcl_fast.targets_pull_.default, pulled)
        increment = weight, som_offset, projection, backend, *pull
        torch.library.opcheck(torch.ops.bcl_fast.som_increment.default, increment)


@backend
@pytest.mark.parametrize("projection", CHOICES["target_projection"])
def test_increment_is_the_pull_before_its_step_size(backend, projection):
    weight, _, pull = forward(backend, BCLConfig(), torch.float64)
    options, step = (projection, backend), torch.tensor(3)
    expected = weight + 0.1 * torch.ops.bcl_fast.som_increment(weight, None, *options, *pull)
    target = reference.project(reference.targets(pull), projection)
    torch.testing.assert_close(expected, weight + 0.1 * reference.som_increment(weight, target, pull.som_strength))
    torch.ops.bcl_fast.targets_pull_(weight, None, step, torch.tensor(0.1, dtype=weight.dtype), *options, *pull)
    torch.testing.assert_close(weight, expected)
    assert int(step) == 4


def test_every_backend_serves_every_stage():
    for name in backends.STAGES:
        for backend in set(backends.NAMES) - {"cuda"}:
            assert backends.stage(name, backend).__name__ == name
        own = name in cuda.WHY_NOT
        assert own or backends.stage(name, "cuda") is backends.stage(name, "triton")
        assert not own or callable(getattr(cuda, name))
    assert all(backends.stage("refresh_", backend).__name__ == "refresh_" for backend in backends.REFRESH)


@pytest.mark.parametrize(
    "fused, backend, expected",
    [(True, None, "cpu"), (True, "cpu", "cpu"), (False, None, "reference"), (True, "reference", "reference"),
     (True, "portable", "portable"), (False, "reference", "reference")],
)  # fmt: skip
def test_resolve_backend(fused, backend, expected):
    assert backends.resolve_backend(fused, backend) == expected


def test_resolve_backend_refuses():
    with pytest.raises(ValueError, match="backend must be .*'portable', 'cpu', 'triton', 'cuda', got 'fastest'"):
        backends.resolve_backend(True, "fastest")
    with pytest.raises(ValueError, match="backend='portable' needs fused=True"):
        backends.resolve_backend(False, "portable")
    with pytest.raises(TypeError, match="fused must be True or False, got 'yes'"):
        backends.resolve_backend("yes", None)


def unbuilt():
    raise ImportError("no nvcc was there")


def test_backends_say_why_not(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    reasons = backends.availability("cpu")
    assert reasons["reference"] is None and reasons["portable"] is None
    assert reasons["triton"].startswith("it serves CUDA tensors only (with TRITON_INTERPRET=1")
    assert reasons["cuda"] == reasons["triton"]  # most of its stages are Triton's
    assert all(backends.availability("meta").values())
    elsewhere = backends.availability("cuda")
    assert elsewhere["cpu"] == "it serves CPU tensors only"
    assert elsewhere["portable"] is None and elsewhere["triton"] is None
    with pytest.raises(ValueError, match="backend='cpu' cannot serve on 'cuda': it serves CPU tensors only"):
        backends.resolve_backend(True, "cpu", "cuda")
    with pytest.raises(ValueError, match="backend='cuda' cannot serve on 'cpu': it serves CUDA tensors only"):
        backends.resolve_backend(True, "cuda")
    monkeypatch.setattr("bcl_fast.native.cuda", unbuilt)
    assert backends.why_not("cuda", "cuda") == backends.cuda_library() == "no nvcc was there"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert backends.why_not("triton", "cuda") == "Triton is not installed"


def test_float64_on_a_gpu_is_not_served_by_triton_and_says_so():
    backends._fastest.cache_clear()
    assert backends.resolve_backend(True, None, "cuda") in backends.FASTEST["cuda"]
    with pytest.warns(UserWarning, match="'portable' serves, slower than 'triton' would: it computes in float32"):
        assert backends.resolve_backend(True, None, "cuda", torch.float64) == "portable"
    with pytest.raises(ValueError, match="backend='triton' cannot serve on 'cuda': it computes in float32"):
        backends.resolve_backend(True, "triton", "cuda", torch.float64)
    backends._fastest.cache_clear()


def test_on_a_gpu_the_cuda_library_serves_where_it_was_built(monkeypatch):
    for built, expected in ((None, "cuda"), ("no nvcc was there", "triton")):
        monkeypatch.setattr(cuda, "missing", lambda device_type, built=built: built)
        backends._fastest.cache_clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # which of the two is faster is not known
            assert backends.resolve_backend(True, None, "cuda") == expected
    backends._fastest.cache_clear()


def test_on_rocm_triton_serves_and_the_cuda_library_does_not(monkeypatch):
    """ROCm's torch calls its devices `cuda`; the library loads there, for it brings NVIDIA's runtime along."""
    monkeypatch.setattr("bcl_fast.native.cuda", lambda: SimpleNamespace(bcl_cuda_on_host=lambda: 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # Triton, wherever these tests run
    assert backends.fastest("cuda") == "cuda" and "sm_90" in backends.tried("cuda")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert backends.fastest("cuda") == "triton" and "gfx942" in backends.tried("cuda")
    assert backends.why_not("cuda", "cuda") == "its CUDA C++ library is for NVIDIA's GPUs, and this torch for AMD's"


def test_where_nothing_is_faster_the_general_backend_serves_without_a_word(monkeypatch):
    for device in ("mps", "xpu", "meta"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert backends.resolve_backend(True, None, device) == backends.fastest(device) == backends.GENERAL
    assert {backends.tried(device) for device in ("mps", "xpu", "npu")} == {"never run"}


def test_within_cuda_sizes_decide_per_stage(monkeypatch):
    came = []
    monkeypatch.setattr(backends, "_function", lambda module, name: lambda *arguments: came.append(module))
    monkeypatch.setattr(backends, "stage", backends.stage.__wrapped__)  # past its cache
    monkeypatch.setitem(cuda.MIN_SIZE, "rank", (B, D))
    for samples, features in ((B, D), (B + 1, D + 1), (B - 1, D), (B, D - 1)):
        backends.stage("rank", "cuda")(torch.ones(samples, features))
    assert came == ["cuda", "cuda", "kernels.selection", "kernels.selection"]


def test_a_missing_library_is_told_once_and_portable_serves(monkeypatch):
    monkeypatch.setattr(cpu, "missing", lambda: "its C++ library was not built")
    backends._fastest.cache_clear()
    with pytest.warns(UserWarning, match="'portable' serves, slower than 'cpu' would: its C.. library was not built"):
        assert BCLLayer(4, 3).backend == "portable"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert BCLLayer(4, 3).backend == "portable"
    with pytest.raises(ValueError, match="backend='cpu' cannot serve on 'cpu': its C.. library was not built"):
        BCLLayer(4, 3, backend="cpu")
    backends._fastest.cache_clear()


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
    assert [counters.read_counter(counter) for _ in range(3)] == [7, 7, 7]
    assert Counted.readings == 1
    counters.write_counter_(counter, 8)
    assert counters.read_counter(counter) == 8 and Counted.readings == 1
    counter.add_(1)  # not through write_counter_
    assert counters.read_counter(counter) == 9 and Counted.readings == 2


def test_a_dead_owner_is_forgotten():
    class Layer:
        def receive(self, pending, compiled):
            raise AssertionError("dead")

    layer = Layer()
    ticket = owners.register_owner(layer)
    assert owners.owner_of(ticket) is layer
    del layer
    gc.collect()
    assert owners.owner_of(ticket) is None


@backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_check_finite_names_samples_too_short_for_a_cosine(backend, dtype):
    arguments = list(statistics_arguments(backend, BCLConfig(check_finite=True)))
    for place in (0, 1, 3):
        arguments[place] = arguments[place].to(dtype if place == 0 else operators.exact(dtype))
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
    arguments = list(statistics_arguments(backend, BCLConfig(check_finite=True)))
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
