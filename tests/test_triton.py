"""The Triton kernels as one backend, without a GPU: launches, no work beside them, determinism, far addresses.

What each kernel computes is held to the reference in test_stages.py, what it moves in test_traffic.py, what it compiles
to in test_ahead_of_time.py.
"""

import mmap

import pytest
import torch
from helpers.backends import INTERPRETED
from helpers.interpreter import Launches, Place, Traffic
from helpers.layers import N, batch, check_one_step, make, same, state
from helpers.operators import forward, statistics_arguments
from helpers.stages import check_selection, needs, pull_of
from stages import check_stages, stage_calls
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bcl_fast import BCLConfig, BCLLayer, backends, reference
from bcl_fast.measure.implementations import Size, trained_weight
from bcl_fast.structures import Pull
from bcl_fast.testing import COLUMNS, VARIANTS, columns, compete, neighbors_of

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Triton compiles for a GPU here, or is not installed")
MAX_LAUNCHES = 8


def train(layer, steps=3, **kinds):
    for seed in range(steps):
        layer(batch(seed=seed, **kinds)).square().mean().backward()
    return layer


@pytest.mark.parametrize("B", [17, 300])
def test_a_step_takes_at_most_eight_launches(B):
    layer = train(make("triton"), 1)  # the next step refreshes nothing
    with Launches() as launches:
        layer(batch(B)).square().mean().backward()
    assert len(launches) <= MAX_LAUNCHES, [launch.name for launch in launches]
    assert {launch.name for launch in launches} >= {"_neighbors_kernel", "_competition_kernel", "_pull_kernel"}


class Computed(TorchDispatchMode):
    """Counts the torch operations that compute: each would be a launch of its own on a GPU."""

    FREE = set(
        "empty new_empty empty_like empty_strided view _unsafe_view reshape t transpose detach as_strided alias "
        "_reshape_alias slice select expand unsqueeze permute "
        "fill_".split()  # by the tests themselves, which poison what comes uninitialized
    )

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        scalar = arguments and torch.is_tensor(arguments[0]) and arguments[0].dim() == 0  # the ticket, on the host
        if name not in self.FREE and not scalar and function.namespace == "aten":
            self.names.append(name)
        return function(*arguments, **(options or {}))


def test_a_step_does_nothing_beside_its_kernels_and_three_products():
    layer = train(make("triton"), 1)
    layer.zero_grad()
    x, gradient = batch().requires_grad_(), torch.randn(17, 11)
    with Launches(execute=False), Computed() as computed:  # the interpreter computes with torch itself
        layer(x).backward(gradient)
    assert sorted(computed.names) == ["addmm", "mm", "mm"]


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_one_step_is_the_specification(options):
    check_one_step("triton", options, dtype=torch.float32)


PRESETS = [BCLConfig(), BCLConfig.preset("soft-clamp"), BCLConfig(rescue_k=0, gradient_mask="winner_take_all")]


@pytest.mark.parametrize("config", PRESETS, ids=["decoupled", "soft-clamp", "dense"])
def test_operators_are_what_they_declare(config):
    check = torch.library.opcheck
    check(torch.ops.bcl_fast.statistics_.default, statistics_arguments("triton", config))
    weight, found, pull = forward("triton", config)
    arguments = found.mask, found.winner, config.gradient_mask, torch.float32, False, "triton", found.ticket
    check(torch.ops.bcl_fast.masked_gradient.default, (torch.ones(9, 5), *arguments, None, None, *pull))
    options = config.target_projection, "triton"
    for offset in (None, torch.zeros_like(weight)):
        pulled = weight, offset, torch.tensor(3), torch.tensor(0.1), *options, *pull
        check(torch.ops.bcl_fast.targets_pull_.default, pulled)
        check(torch.ops.bcl_fast.som_increment.default, (weight, offset, *options, *pull))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_training_is_bit_equal_across_the_refresh(compiler):
    torch._dynamo.reset()
    plain, other = make("triton", recompute_every=2), make("triton", recompute_every=2)
    compiled = torch.compile(other, fullgraph=True, backend=compiler)
    for seed in range(3):
        for call in (plain, compiled):
            call(batch(seed=seed)).square().mean().backward()
    assert same(state(plain), state(other)) and int(other.step) == 3


def test_checkpointed_hidden_layers_and_averaged_forwards():
    """What the layer asks of a backend beside a plain step."""
    torch.manual_seed(0)
    plain = nn.Sequential(BCLLayer(N, 9, backend="triton"), nn.Tanh(), BCLLayer(9, 7, backend="triton"))
    other = nn.Sequential(BCLLayer(N, 9, backend="triton"), nn.Tanh(), BCLLayer(9, 7, backend="triton"))
    other.load_state_dict(plain.state_dict())
    plain(batch()).square().sum().backward()
    checkpoint(other, batch(), use_reentrant=False).square().sum().backward()
    for one, two in zip(plain, other, strict=True):
        assert same(state(one), state(two))
    first, second = make("triton", som_lr=0.1), make("portable", som_lr=0.1)
    for layer in (first, second):
        (layer(batch(5, 1)).square().sum() + layer(batch(20, 2)).square().sum()).backward()
    torch.testing.assert_close(first.weight, second.weight, rtol=1e-5, atol=1e-6)
    assert int(first.step) == 1


def test_the_same_inputs_give_the_same_bits():
    assert same(*(state(train(make("triton"), 2)) for _ in range(2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_layers_train(dtype):
    layer = make("triton", som_lr=0.1, dtype=dtype)
    reference = make("reference", som_lr=0.1, dtype=dtype)
    for each in (layer, reference):
        train(each, 1, dtype=dtype)
    torch.testing.assert_close(layer.weight, reference.weight, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_steps_and_refreshes_are_counted_on_the_device():
    """A host that changes the counters behind the layer's back is believed: nothing is remembered of them."""
    layer, other = make("triton", recompute_every=2), make("portable", recompute_every=2)
    for each in (layer, other):
        train(each, 2)
        each.step.fill_(40)
        train(each, 3)
        assert int(each.step) == 43
    assert layer.neighbors.equal(other.neighbors)


def far(tensor, stride):
    """The same numbers [R, C], rows far apart: 32 bits cannot number the elements. Untouched pages cost nothing."""
    R, C = tensor.shape
    size = (R - 1) * stride + C
    memory = torch.frombuffer(mmap.mmap(-1, size * tensor.element_size()), dtype=tensor.dtype)
    copy = memory.as_strided((R, C), (stride, 1))
    return copy.copy_(tensor)


STRIDE = (1 << 30) + 3  # itself a 32-bit number: the third row is beyond 2^31


@pytest.mark.parametrize(
    "name", ["neighbors", "competition", "inverse_norm", "selection", "rank", "gradient", "targets", "targets_pull_"]
)
def test_more_than_two_to_the_31_elements(name):
    size = Size(3, 4, 5)
    calls = stage_calls(size, like="reference")
    calls["targets"] = calls["targets_pull_"][-1:]
    near = calls[name]
    done = []

    def spread(value):
        """The first matrix lies far apart, everything else is a copy."""
        if isinstance(value, Pull):
            return Pull(*map(spread, value))
        if not torch.is_tensor(value):
            return value
        if value.dim() != 2 or done:
            return value.clone()
        done.append(value)
        return far(value, STRIDE)

    distant = [spread(value) for value in near]
    function = backends.stage(name, "triton")
    expected, got = function(*near), function(*distant)
    if name.endswith("_"):
        expected, got = near[0], distant[0]
    for one, other in zip(*((r if isinstance(r, tuple) else (r,)) for r in (expected, got)), strict=True):
        assert one.equal(other)


@pytest.fixture(scope="module")
def alike():
    """Features after strong pulls; and some whose 8th and 9th neighbor are 6e-6 apart, as after long training."""
    common, own = columns("random", 1, 784, seed=1), columns("random", 150, 784)
    return trained_weight(Size(256, 150, 784)), common + 0.06 * own


@pytest.mark.parametrize("tile", ["FEW", "MANY"])
@pytest.mark.parametrize("product, enough", [("ieee", True), ("tf32x3", True), ("tf32", False)])
def test_neighbors_of_features_alike(alike, monkeypatch, product, enough, tile):
    """As tensor cores multiply, which the interpreter imitates: three products of parts are near enough, one is not."""
    from bcl_fast.kernels import neighbors

    monkeypatch.setattr(neighbors, "PRODUCT", product)
    monkeypatch.setattr(neighbors, "FROM", 8192 if tile == "FEW" else 0)
    for weight in alike:
        cosine = reference.cosine_similarity(weight.double()).fill_diagonal_(-torch.inf)
        best = cosine.sort(dim=1, descending=True).values[:, :8]
        regret = best - cosine.gather(1, neighbors.neighbors(weight, 8))
        assert (float(regret.max()) <= 1e-6) == enough


@pytest.mark.parametrize("form", [dict(PROGRAMS=2), dict(CACHE=0), dict(CACHE=0, WIDE=(2, 256, 16))], ids=str)
def test_competition_in_other_forms(monkeypatch, form):
    """More samples than one pass of all programs takes, so that sums go on where they stopped; and the wide tile."""
    from bcl_fast.kernels import competition

    activation, neighbors = columns("random", 101, 13), neighbors_of(13, 4)
    whole = compete(competition.competition, activation, neighbors)
    for name, value in form.items():
        monkeypatch.setattr(competition, name, value)
    found = compete(competition.competition, activation, neighbors)
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("cache", [None, 0], ids=["usual tiles", "wide tiles"])
def test_of_equal_margins_in_different_tiles_the_smallest_index_wins(monkeypatch, cache):
    from bcl_fast.kernels import competition

    if cache is not None:
        monkeypatch.setattr(competition, "CACHE", cache)
    D, equal = 600, [(5, 590), (127, 128), (255, 256), (3, 130, 260), (299, 300, 550)]
    activation = torch.full((len(equal), D), 0.25)
    for b, features in enumerate(equal):
        activation[b, list(features)] = torch.tensor([2.0, -2.0, 2.0])[: len(features)]
    neighbors = (torch.arange(D)[:, None] + torch.tensor([10, 20])) % D  # of no feature that ties with it
    winner = compete(competition.competition, activation, neighbors).winner
    assert winner.tolist() == [min(features) for features in equal]


@pytest.mark.parametrize("value", [-1, 2**31, 2**63 - 1])
def test_indices_out_of_bounds_touch_no_other_memory(value):
    """They count as the nearest inside; the interpreter looks at every address."""
    B, D, N = 37, 300, 5
    pull = pull_of(B, D, N, 3, 5, torch.float32)
    pairs, rows = pull.pair_feature.clone(), pull.rescue_rows.clone()
    pairs[::2, 1], rows[::3, 2] = value, value
    found = []
    for feature, row in ((pairs, rows), (pairs.clamp(0, D - 1), rows.clamp(0, B - 1))):
        weight, one = torch.zeros(D, N), pull._replace(pair_feature=feature, rescue_rows=row)
        backends.stage("targets_pull_", "triton")(weight, None, torch.tensor(0.1), one)
        found.append((weight, backends.stage("targets", "triton")(one)))
    for got, expected in zip(*found, strict=True):
        assert got.equal(expected) and got.isfinite().all()


def test_a_refresh_writes_neighbors_of_any_layout():
    weight, spread = columns("random", 9, 5), torch.full((6, 27), -7)
    near, step = spread[::2, ::3].T, torch.tensor(50)
    backends.stage("refresh_", "triton")(weight, near, step, torch.tensor(-1), 50)
    assert near.equal(reference.neighbors(weight, 3)) and (spread[1::2] == -7).all()


def test_strengths_of_competing_programs_stay_in_the_cache():
    """Up to the number of features at which a program for every multiprocessor alone is too many."""
    from bcl_fast.kernels import competition

    for D in (64, 3000, 4096, 7900):
        activation, neighbors = torch.empty(1 << 14, D, device="meta"), torch.empty(D, 8, device="meta").long()
        with Launches(execute=False) as launches:
            compete(competition.competition, activation, neighbors)
        (programs,), warps = launches[0].grid, launches[0].options["num_warps"]
        assert programs * D * competition.BLOCK_B * 4 <= competition.CACHE and programs * warps >= 132 * 16


@pytest.mark.parametrize("kind", ["random", "quantized", "equal", "huge"])
@pytest.mark.parametrize("need", ["flat", "log-uniform", "with nan"])
def test_selection_by_several_runs(kind, need):
    """More samples than one run sorts, and columns that no program's tile divides."""
    B, D = 1100, 5
    check_selection(
        "triton", columns(kind, B, D), None, torch.ones(B), torch.ones(D), needs(need, B), "rank", "hard", 5
    )


def test_ranks_by_several_runs():
    key = columns("quantized", 2100, 3)
    assert backends.stage("rank", "triton")(key).equal(backends.stage("rank", "reference")(key))


class Largest(TorchDispatchMode):
    """The most elements of a tensor that a torch operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for tensor in made if isinstance(made, tuple) else (made,):
            if torch.is_tensor(tensor) and not tensor._is_view():
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.fixture
def few_runs(monkeypatch):
    """More than one run is too many, and two columns of 1,100 samples are sorted at once."""
    from bcl_fast.kernels import selection

    for name, value in dict(MAX_RUNS=1, MAX_RUNS_OF_RANK=1, SORTED=2500).items():
        monkeypatch.setattr(selection, name, value)
    return selection


@pytest.mark.parametrize("kind", ["random", "quantized", "signed_zeros", "with nan"])
@pytest.mark.parametrize("need", ["flat", "log-uniform", "with nan", "negative"])
def test_selection_by_sorting_whole_columns(few_runs, kind, need):
    B, D = 1100, 5
    activation = columns(kind if kind in COLUMNS else "random", B, D)
    if kind == "with nan":
        activation[::3, 1], activation[::2, 2], activation[:, 3] = torch.nan, -torch.tensor(torch.nan), torch.nan
    weights = -needs("log-uniform", B) if need == "negative" else needs(need, B)
    rinv, bias = torch.linspace(0.5, 1.5, B), torch.linspace(-1, 1, D)
    soft = "hard" if kind == "with nan" else "soft"  # what a column of nothing but NaN shares out, nobody says
    for rescue_k, weighting in ((5, "hard"), (5, soft), (40, soft)):
        check_selection("triton", activation, bias, rinv, torch.ones(D), weights, "rank", weighting, rescue_k)
    assert few_runs.rank(activation).equal(reference.rank(activation))


def test_sorting_needs_no_more_memory_than_its_parts(few_runs):
    activation, ones = columns("random", 1100, 50), torch.ones(1100)
    with Largest() as largest, Launches(execute=False):
        few_runs.selection(activation, None, ones, None, ones, "rank", "hard", 5)
    assert 1100 < largest.elements <= 2500


@pytest.mark.parametrize("need", ["flat", "log-uniform", None])
def test_few_runs_are_looked_through(need):
    """Of the 7 other runs each element is looked up in less than a fifth of one: what could be chosen has few above."""
    from bcl_fast.kernels import selection

    B, D = 8192, 4
    given = columns("random", B, D), None, torch.ones(B), None, None if need is None else needs(need, B)
    with Traffic() as traffic:
        selection.selection(*given, "rank", "hard", 5)
    probes = traffic.lanes[Place("_selection_kernel", "run_ptr", "load")] - B * D  # less the walk down every run
    assert probes / 11 <= 0.2 * B * D


def test_more_samples_and_features_than_a_tile():
    errors = check_stages(Size(150, 70, 130), ["triton"])["triton"]
    assert max(errors.values()) <= 1e-5
