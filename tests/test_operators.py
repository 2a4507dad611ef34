"""The operators: torch.library's own checks, what they refuse, and counters read without a device."""

import gc
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.backends import ON_CPU
from helpers.operators import B, D, K, N, forward, statistics_arguments

from bcl_fast import BCLConfig, backends, counters, operators, owners, reference
from bcl_fast.spec import CHOICES
from bcl_fast.testing import VARIANTS, columns, neighbors_of

ROOT = Path(__file__).resolve().parents[1]
backend = pytest.mark.parametrize("backend", ON_CPU)


@backend
@pytest.mark.parametrize("name", ["decoupled", "winner-take-all", "dense-soft"])
def test_opcheck_statistics(backend, name):
    """A graph sees of the options the shapes of their results: is there a mask, and how many samples are chosen."""
    config = BCLConfig(**VARIANTS[name])
    torch.library.opcheck(torch.ops.bcl_fast.statistics_.default, statistics_arguments(backend, config))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck_product(dtype):
    x, weight, c = columns("random", B, N), columns("random", D, N, seed=1), columns("random", 1, D, seed=2)[0]
    for arguments in ((x, weight, c, dtype), (x, weight, None, dtype)):
        torch.library.opcheck(torch.ops.bcl_fast.product.default, arguments)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        rounded = [None if t is None else t.to(dtype).double() for t in arguments[:3]]
        result = torch.ops.bcl_fast.product(*arguments)
        torch.testing.assert_close(result, torch.nn.functional.linear(*rounded).to(exact))


def test_what_happens_on_the_host_is_kept_out_of_a_compiler_s_cuda_graphs():
    """The pull is handed over, and counters are remembered, in Python: a replay would leave that out."""
    tags = {name: getattr(torch.ops.bcl_fast, name).default.tags for name in operators._functions}
    tagged = {name for name in tags if torch.Tag.cudagraph_unsafe in tags[name]}
    assert tagged == {"statistics_", "masked_gradient", "targets_pull_"}
    assert set(operators._functions) - tagged == {"product", "som_increment"}  # functions of their arguments alone


def test_an_operator_runs_on_the_device_of_its_tensors(monkeypatch):
    """Triton launches on the current device: a layer on another one would read memory that is not there."""
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    for device, expected in (("cpu", []), ("cuda:0", []), ("cuda:1", [torch.device("cuda:1")])):
        like = SimpleNamespace(device=torch.device(device))
        assert operators.run(lambda *arguments: arguments, like, 2) == (like, 2)
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
@pytest.mark.parametrize("kind", CHOICES["gradient_mask"])
def test_opcheck_masked_gradient(backend, kind):
    observed = columns("random", B, D), neighbors_of(D, K)
    for dtype, seen in ((torch.float32, observed), (torch.float64, (None, None)), (torch.bfloat16, (None, None))):
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        _, found, pull = forward(backend, BCLConfig(gradient_mask=kind), exact)
        arguments = columns("random", B, D).to(dtype), found.mask, found.winner, kind, dtype, False, backend
        torch.library.opcheck(torch.ops.bcl_fast.masked_gradient.default, (*arguments, found.ticket, *seen, *pull))


@backend
def test_opcheck_pull_and_increment(backend):
    weight, _, pull = forward(backend, BCLConfig())
    for som_offset, projection in ((None, "none"), (torch.zeros_like(weight), "centered")):
        pulled = weight, som_offset, torch.tensor(3), torch.tensor(0.1), projection, backend, *pull
        torch.library.opcheck(torch.ops.bcl_fast.targets_pull_.default, pulled)
        increment = weight, som_offset, projection, backend, *pull
        torch.library.opcheck(torch.ops.bcl_fast.som_increment.default, increment)


@backend
def test_increment_is_the_pull_before_its_step_size(backend):
    for projection in CHOICES["target_projection"]:
        weight, _, pull = forward(backend, BCLConfig(), torch.float64)
        options, step = (projection, backend), torch.tensor(3)
        expected = weight + 0.1 * torch.ops.bcl_fast.som_increment(weight, None, *options, *pull)
        target = reference.project(reference.targets(pull), projection)
        torch.testing.assert_close(expected, weight + 0.1 * reference.som_increment(weight, target, pull.som_strength))
        torch.ops.bcl_fast.targets_pull_(weight, None, step, torch.tensor(0.1, dtype=weight.dtype), *options, *pull)
        torch.testing.assert_close(weight, expected)
        assert int(step) == 4


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
        def receive(self, pending, dtype, compiled):
            raise AssertionError("dead")

    layer = Layer()
    ticket = owners.register_owner(layer)
    assert owners.owner_of(ticket) is layer
    del layer
    gc.collect()
    assert owners.owner_of(ticket) is None


@backend
def test_check_finite_names_samples_too_short_for_a_cosine(backend):
    message = r"^rows of x must be zero or of norm >= 1e-06 .* got 3 of 9 that are shorter, the first of them row 5"
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        arguments = list(statistics_arguments(backend, BCLConfig(check_finite=True)))
        for place in (0, 1, 3):
            arguments[place] = arguments[place].to(dtype if place == 0 else operators.exact(dtype))
        arguments[2] = None
        x = arguments[0]
        x[1], x[2] = 0, x[2] * 1e-4  # a zero row has cosine 0 by definition
        torch.ops.bcl_fast.statistics_(*arguments)
        x[[5, 7]] *= 1e-8
        x[6] = torch.tensor([1e-30, 0, 0, 0])  # its square underflows
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
