"""The CUDA C++ of the backend `cuda` (csrc/cuda): its launches' arithmetic and every way through its kernels on the
host, of the selection in test_cuda_selection.py. tests/test_stages.py holds the same kernels to the contract."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers import cuda_host
from helpers.backends import DEVICE, stage
from helpers.cuda_cases import check_choices, on_gpu, on_host, over_forms, served
from helpers.layers import batch, make
from helpers.layouts import check_layout
from helpers.stages import check_competition

from bcl_fast import backends, cuda, cuda_structs, native, structures
from bcl_fast import reference as ref
from bcl_fast.testing import VARIANTS, columns, neighbors_of, relative_error

ROOT = Path(__file__).resolve().parents[1]
ONE_BLOCK, CLUSTER, MEMORY = range(3)
IN_REGISTERS, EIGHT_AT_ONCE, ONE_BY_ONE = range(3)
# Multiprocessors, shared bytes of a block, clusters at once.
A100, H100 = (108, 163 << 10, 0), (132, 227 << 10, 15)


@pytest.fixture
def host():
    """Sets what the kernels find on the host; afterwards they find what they found before."""
    yield cuda_host.device
    cuda_host.device()


# --- The arithmetic of launches ---------------------------------------------------------------------------------------


@on_host
@pytest.mark.parametrize(
    "D, device, expected",
    [
        (64, H100, (ONE_BLOCK, 4, 11, 1)),
        (4096, H100, (ONE_BLOCK, 4, 11, 1)),
        (8192, H100, (ONE_BLOCK, 4, 22, 1)),
        (16384, H100, (ONE_BLOCK, 2, 0, 1)),
        (50000, H100, (ONE_BLOCK, 1, 0, 1)),
        (65536, H100, (CLUSTER, 4, 22, 8)),
        (100000, H100, (CLUSTER, 4, 0, 8)),
        (1 << 20, H100, (MEMORY, 4, 0, 1)),
        (8192, A100, (ONE_BLOCK, 4, 22, 1)),
        (65536, A100, (MEMORY, 4, 0, 1)),
    ],
)
def test_where_the_strengths_of_a_tile_lie(D, device, expected):
    plan = cuda_host.plan("competition", 65536, D, 8, *device, near=0, threads=384, cluster=0)
    assert (plan.where, plan.rows, plan.owned, plan.cluster) == expected
    assert plan.groups == {8: 15, 1: device[0]}[plan.cluster]  # no cluster waits for another to end
    at_once = cuda_host.plan("competition", 65536, D, 8, *device, near=1, threads=1024, cluster=0)
    assert (at_once.where, at_once.rows, at_once.cluster) == (plan.where, plan.rows, plan.cluster)
    assert at_once.near == (EIGHT_AT_ONCE if D <= 65536 and plan.where != MEMORY else ONE_BY_ONE)
    assert at_once.threads == (1024 if plan.where == ONE_BLOCK else 768)


@on_host
def test_a_cluster_may_hold_four_rows_where_a_block_holds_two():
    plan = cuda_host.plan("competition", 65536, 16384, 8, 132, 227 << 10, 66, near=0, threads=384, cluster=1)
    assert (plan.where, plan.rows, plan.cluster, plan.near, plan.groups) == (CLUSTER, 4, 2, IN_REGISTERS, 66)
    without = cuda_host.plan("competition", 65536, 16384, 8, 132, 227 << 10, 0, near=0, threads=384, cluster=1)
    assert (without.where, without.rows) == (ONE_BLOCK, 2)


@on_host
@pytest.mark.parametrize("device", [A100, H100, (1, 48 << 10, 0)], ids=["A100", "H100", "small"])
def test_competition_plans_fit_and_cover(device):
    widths = (2, 31, 33, 777, 4097, 8193, 16385, 40000, 57000, 65537, 1 << 17, (1 << 20) + 1)
    for D, form in product(widths, cuda.FORMS["competition"]):
        for B, k in product((1, 5, 1000, 1 << 20), (1, 8, 9)):
            plan = cuda_host.plan("competition", B, D, k, *device, **form)
            assert plan.shared <= device[1] and plan.cluster <= (8 if device[2] else 1)
            assert plan.slice % 32 == 0 and plan.slice * plan.cluster >= D and (plan.cluster == 1 or plan.slice >= 32)
            assert 1 <= plan.groups <= max(1, device[0] // plan.cluster) and plan.groups * plan.rows < B + plan.rows
            assert plan.cluster == 1 or plan.groups <= device[2]
            assert plan.partial >= 8 * plan.groups * D and plan.results >= 4 * (3 * B + 2 * D)
            assert all(n % 256 == 0 for n in (plan.results, plan.partial, plan.strengths, plan.ids))
            assert plan.strengths >= (16 * plan.groups * D if plan.where == MEMORY else 0)
            assert (plan.near == ONE_BY_ONE) == (k > 8 or D > 1 << 16 or plan.where == MEMORY)
            if plan.near == IN_REGISTERS:
                assert plan.owned * 384 >= plan.slice and plan.threads == 384
            elif plan.near == EIGHT_AT_ONCE:
                assert plan.ids >= 16 * D and plan.owned == 0 and plan.threads in (768, 1024)
            else:
                assert plan.ids >= k * D * (2 if plan.where == ONE_BLOCK else 4) and plan.threads == 768
                assert plan.where != ONE_BLOCK or D <= 1 << 16


@on_host
@pytest.mark.parametrize("B, D", [(1, 2), (8192, 8192), (65536, 16384), (1 << 20, 1 << 17)])
def test_selection_and_rank_plans(B, D):
    for form in cuda.FORMS["selection"]:
        for r in (1, 5, 32):
            plan = cuda_host.plan("selection", B, D, min(r, B), 132, **form)
            assert plan.blocks * 32 >= D and plan.shared <= 112 << 10  # two blocks a multiprocessor
            assert plan.bins == form["bins"] // (2 if B > 65535 else 1) and plan.counting >= 1
            assert plan.lists >= 32 + 4 * (plan.blocks + 2 * D) + 8 * D and plan.visits >= 8 * B
            assert plan.survivors == 3 * 4 * plan.blocks * 32 * 64 and plan.sorts == plan.sorting * B * 16
            assert plan.sorts <= max(4 * B * D // 4, 16 * B)  # a quarter of the activation, or one column's
    plan = cuda_host.plan("rank", B, D)
    assert plan.columns >= 1 and (plan.columns == D or plan.columns * B <= 1 << 26 or plan.columns == 1)
    assert plan.keys >= (4 * plan.columns * B if B > 8192 else 0)


# --- Every way through the kernels ------------------------------------------------------------------------------------


def check_damaged(activation, neighbors):
    """Indices that are no feature's count as the nearest that are, bit by bit."""
    inside = neighbors.clamp(0, len(neighbors) - 1)
    results = [
        stage("competition", "cuda")(activation, near, 5.0, activation, "coupled", 0.0, 0.0)
        for near in (neighbors, inside)
    ]
    assert all(got.equal(same) for got, same in zip(*results, strict=True))
    assert results[0].winner.equal(ref.winner(ref.margin(activation.abs(), inside)))


@on_host
@over_forms("competition", cluster=0)
@pytest.mark.parametrize(
    "where, rows, device",
    [
        pytest.param(ONE_BLOCK, 4, (3, 8 << 10, 0), id="block"),
        pytest.param(ONE_BLOCK, 4, (3, 5200, 0), id="block-without-sums"),
        pytest.param(ONE_BLOCK, 2, (2, 3600, 0), id="two-rows"),
        pytest.param(ONE_BLOCK, 1, (1, 2900, 0), id="one-row"),
        pytest.param(CLUSTER, 4, (16, 2600, 1, 2), id="cluster-without-sums"),
        pytest.param(CLUSTER, 4, (8, 2815, 1), id="cluster"),
        pytest.param(ONE_BLOCK, 2, (8, 3600, 1), id="two-rows-though-clusters"),
        pytest.param(MEMORY, 4, (3, 2600, 0), id="memory"),
        pytest.param(MEMORY, 4, (16, 2600, 1, 0), id="no-room-for-a-cluster"),
    ],
)
def test_competition_wherever_the_strengths_lie(monkeypatch, host, where, rows, device, form):
    check_competition_where(monkeypatch, host, where, rows, device, form)


@on_host
@over_forms("competition", cluster=1)
def test_competition_in_a_cluster_where_a_block_holds_two_rows(monkeypatch, host, form):
    """Elsewhere, and where one block holds four, `cluster` changes nothing."""
    check_competition_where(monkeypatch, host, CLUSTER, 4, (8, 3600, 1), form)


def check_competition_where(monkeypatch, host, where, rows, device, form):
    D = 161
    clusters = device[3] if len(device) > 3 else 1 << 30 if device[2] else 0
    monkeypatch.setitem(cuda.LAUNCH, "competition", form)
    host(*device)
    B, counts = (23, (3, 8, 9)) if where != CLUSTER else (5, (8, 9))  # every thread is a fiber
    for k in counts:
        plan = cuda_host.plan("competition", B, D, k, *device[:2], clusters)
        assert (plan.where, plan.rows) == (where, rows) and plan.groups <= max(clusters, device[0] * (plan.cluster < 2))
        activation, neighbors = columns("quantized", B, D), neighbors_of(D, k)
        check_competition("cuda", activation, neighbors, x=columns("random", B, 50, seed=1), forces="coupled")
        activation = activation[:5]
        activation[2, 7], activation[3] = torch.nan, 0.0
        activation[4, 3], activation[4, 9] = torch.inf, -torch.inf
        won = stage("competition", "cuda")(activation, neighbors, 5.0, activation, "decoupled", 0.0, 0.0)
        margin = ref.margin(activation.abs(), neighbors)
        assert won.winner.equal(ref.winner(margin))
        torch.testing.assert_close(won.rank_score, ref.rank_score(margin, 5.0), rtol=1e-5, atol=1e-6, equal_nan=True)
        damaged = neighbors.clone()
        damaged[::3, 0], damaged[1::3, -1], damaged[::5, 1] = -1, 1 << 40, D
        check_damaged(activation[:2], damaged)


@served
@over_forms("competition", cluster=0)
def test_competition_in_every_form(monkeypatch, form):
    monkeypatch.setitem(cuda.LAUNCH, "competition", form)
    for kind in ("random", "huge", "denormal"):
        check_competition("cuda", columns(kind, 9, 1100), neighbors_of(1100, 8), x=columns("random", 9, 3))
    strided = columns("random", 2 * 19, 3 * 413)[::2, ::3]
    check_competition("cuda", strided, neighbors_of(413, 5), x=columns("random", 7, 19, seed=2).T)
    check_competition("cuda", strided.T.contiguous().T, neighbors_of(413, 5), temperature=0.5)


@served
@over_forms("competition", cluster=0)
@pytest.mark.parametrize("k", [1, 8, 9])
def test_damaged_neighbors_in_every_form(monkeypatch, form, k):
    monkeypatch.setitem(cuda.LAUNCH, "competition", form)
    for D in (40, 1100):
        neighbors = neighbors_of(D, k).clone()
        neighbors[::2, 0], neighbors[1::4, -1], neighbors[3::4, k // 2] = -(1 << 63), 1 << 32, (1 << 63) - 1
        check_damaged(columns("quantized", 9, D), neighbors)


@served
def test_neighbors_and_sizes_that_are_refused():
    activation, ones = columns("random", 7, 5).to(DEVICE["cuda"]), torch.ones(7, device=DEVICE["cuda"])
    for shape, dtype in (((6, 3), torch.int64), ((5, 0), torch.int64), ((5, 3), torch.int32)):
        neighbors = torch.zeros(shape, dtype=dtype, device=DEVICE["cuda"])
        with pytest.raises(ValueError, match=r"^neighbors must be torch.int64 \[5, k\]"):
            cuda.competition(activation, neighbors, 5.0, activation, "decoupled", 0.0, 0.0)
    for r, some in ((0, 7), (65, 7), (2, 0)):
        wide = columns("random", 100, 5).to(DEVICE["cuda"]) if r == 65 else activation[:some]
        with pytest.raises(RuntimeError, match="stage selection failed: sizes that it does not take"):
            cuda.selection(wide, None, ones.new_ones(len(wide)), None, None, "rank", "hard", r)


@served
def test_a_form_that_is_not_compiled_is_an_error(monkeypatch):
    activation, ones = columns("random", 5, 4), torch.ones(5)
    monkeypatch.setitem(cuda.LAUNCH, "competition", {"near": 0, "threads": 1024, "cluster": 0})
    with pytest.raises(RuntimeError, match="stage competition failed: this combination .* is not compiled"):
        stage("competition", "cuda")(activation, neighbors_of(4, 2), 5.0, activation, "decoupled", 0.0, 0.0)
    monkeypatch.setitem(cuda.LAUNCH, "selection", {"ahead": 9, "bins": 1024, "warps": 16, "round": 128})
    with pytest.raises(RuntimeError, match="stage selection failed: this combination .* is not compiled"):
        stage("selection", "cuda")(activation, None, ones, None, ones, "rank", "hard", 2)
    for name, form in cuda.LAUNCH.items():
        monkeypatch.undo()
        assert cuda.LAUNCH[name] in cuda.FORMS[name] and all(each.keys() == form.keys() for each in cuda.FORMS[name])


@on_host
def test_a_repeated_call_asks_for_no_size_and_one_buffer(monkeypatch):
    activation, ones, neighbors = columns("random", 6, 5), torch.ones(6), neighbors_of(5, 2)
    stages = {
        "competition": (activation, neighbors, 5.0, activation, "decoupled", 0.0, 0.0),
        "selection": (activation, None, ones, None, ones, "rank", "hard", 2),
        "rank": (activation,),
    }
    library, empty, made = native.cuda(), torch.empty, []

    def counted(name, function):
        return lambda *words, **kinds: made.append(name) or function(*words, **kinds)

    for name, arguments in stages.items():
        symbol = f"bcl_cuda_{name}"
        stage(name, "cuda")(*arguments)
        made.clear()
        with monkeypatch.context() as patch:
            patch.setattr(library, symbol, counted("call", getattr(library, symbol)))
            patch.setattr(torch, "empty", counted("buffer", empty))
            stage(name, "cuda")(*arguments)
        assert made == ["buffer", *["buffer"] * (name == "rank"), "call"]  # the ranks themselves


@on_host
def test_scratch_that_is_too_small_is_an_error(host):
    activation, ones = columns("random", 40, 33), torch.ones(40)
    arguments = activation, None, ones, None, ones, "rank", "hard", 2
    stage("selection", "cuda")(*arguments)
    cuda._bytes("selection", None, (40, 33), tuple(cuda.LAUNCH["selection"].values())).value = 64
    with pytest.raises(RuntimeError, match="too little scratch memory"):
        stage("selection", "cuda")(*arguments)
    stage("selection", "cuda")(*arguments)  # it asks again


@on_gpu
@served
@pytest.mark.parametrize(
    "D, form",
    [(D, form) for D in (16384, 50000, 65536) for form in cuda.FORMS["competition"]]
    + [(100000, cuda.LAUNCH["competition"]), (1 << 20, cuda.LAUNCH["competition"])],
    ids=lambda value: str(value) if isinstance(value, int) else " ".join(map(str, value.values())),
)
def test_competition_of_very_many_features(monkeypatch, D, form):
    """On an H100: two rows or a cluster of two, one row or a cluster of four, a cluster of eight, and memory."""
    monkeypatch.setitem(cuda.LAUNCH, "competition", form)
    for k in (8, 9):
        steps = torch.randint(1, D, (1, k), generator=torch.Generator().manual_seed(0))
        neighbors = (torch.arange(D)[:, None] + steps) % D
        check_competition("cuda", columns("random", 9, D), neighbors, x=columns("random", 9, 3, seed=1))


@served
def test_competition_of_more_features_than_threads():
    for D in (1100, 4200):
        check_competition("cuda", columns("random", 5, D), neighbors_of(D, 8))


@served
@pytest.mark.parametrize("B", [1, 128, 129, 512, 513, 2048, 2049, 8192, 8193])
def test_rank_by_every_path(B):
    for kind in ("quantized", "signed_zeros"):
        key = columns(kind, B, 9)
        key[B // 2, 3], key[B // 3, 3] = torch.nan, torch.inf
        device = "cpu" if "BCL_FAST_CUDA" in os.environ else "cuda"
        for dtype in cuda.KINDS:
            ranks = cuda.rank(key.to(device)[:, 1::2], dtype)
            assert ranks.dtype == dtype and ranks.cpu().equal(ref.rank(key[:, 1::2]).to(dtype))


@served
@pytest.mark.parametrize("name", ["decoupled", "hard-rank", "rank-soft", "dense-rank", "cosine", "offset-coupled"])
def test_one_step_is_that_of_the_reference(name):
    moved = {}
    for backend in ("reference", "cuda"):
        layer = make(backend, device=DEVICE["cuda"], som_lr=0.1, **VARIANTS[name])
        layer.load_state_dict(make("reference", som_lr=0.1, **VARIANTS[name]).state_dict())
        start = layer.weight.detach().clone()
        layer(batch().to(DEVICE["cuda"])).square().mean().backward()
        destination = layer.weight - start if layer.som_offset is None else layer.som_offset
        moved[backend] = destination.detach(), layer.weight.grad, layer.bias.grad
        assert layer.backend == backend and int(layer.step) == 1
    for got, expected in zip(moved["cuda"], moved["reference"], strict=True):
        assert relative_error(got, expected) <= 1e-5


@on_host
def test_other_inputs_are_triton_s(monkeypatch):
    """What the C++ does not express goes to the Triton stage of the same name, as the table says."""
    called = []
    monkeypatch.setattr(cuda, "selection", lambda *arguments: called.append(arguments))
    stage_of = backends.stage.__wrapped__("selection", "cuda")  # past its cache
    some = columns("random", 7, 5), None, torch.ones(7), torch.ones(5), torch.ones(7)
    for rule, r in (("cosine", 2), ("rank", 0), ("rank", 33)):
        assert stage_of(*some, rule, "hard", r)[0].shape == (5, min(r or 7, 7))
    assert not called
    stage_of(*some, "rank", "hard", 2)
    assert len(called) == 1


@served
@pytest.mark.parametrize("struct", cuda_structs.STRUCTS.values(), ids=lambda struct: struct.__name__)
def test_structs_are_laid_out_as_the_library_has_them(struct):
    check_layout(struct, getattr(native.cuda(), f"bcl_cuda_layout_{struct.__name__}"))


def test_results_of_the_competition_are_named_alike():
    shared = [name for name, _ in cuda_structs.Competition._fields_ if name in structures.Competition._fields]
    assert shared == [name for name in structures.Competition._fields if name in shared] and len(shared) == 6


@on_host
def test_a_library_of_another_version_is_named(monkeypatch):
    native.cuda.cache_clear()
    monkeypatch.setattr(native, "CUDA_ABI", 99)
    try:
        assert "interface 3, not 99" in backends.why_not("cuda", "cpu")
        monkeypatch.setenv("BCL_FAST_CUDA", "/nowhere/at/all.so")
        assert "does not load" in backends.why_not("cuda", "cpu")
    finally:
        native.cuda.cache_clear()


# --- Threads ----------------------------------------------------------------------------------------------------------


def sanitized(chosen, *flags):
    """The exit code and output of the chosen tests of this file on a build under ThreadSanitizer."""
    found = subprocess.run([cuda_host.COMPILER, "-print-file-name=libtsan.so"], capture_output=True, text=True)
    if not os.path.isabs(found.stdout.strip()):
        pytest.skip("the compiler has no ThreadSanitizer")
    environment = os.environ | {
        "BCL_FAST_CUDA": str(cuda_host.build(*cuda_host.SANITIZED, *flags)),
        "LD_PRELOAD": found.stdout.strip(),
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1 exitcode=66",
    }
    words = [sys.executable, "-m", "pytest", "-qs", "-p", "no:cacheprovider", __file__, "-k", chosen]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr


@on_host
def test_every_kernel_once(monkeypatch, host):
    """Few samples and features through every kernel: what ThreadSanitizer is run on."""
    for device, *form in (
        ((1, 8 << 10, 0), 1, 1024, 0),
        ((1, 8 << 10, 0), 0, 384, 0),
        ((1, 2600, 0), 1, 768, 0),
        ((8, 2600, 1), 0, 384, 0),
        ((2, 3600, 1), 1, 768, 1),
    ):
        host(*device)
        monkeypatch.setitem(cuda.LAUNCH, "competition", dict(zip(("near", "threads", "cluster"), form, strict=True)))
        check_competition("cuda", columns("random", 5, 161), neighbors_of(161, 8))  # two tiles, one block or cluster
    host()
    check_competition("cuda", columns("random", 3, 40), neighbors_of(40, 9))
    need = torch.linspace(0.2, 0.1, 90)
    for activation in (columns("random", 90, 5), columns("quantized", 90, 5)):
        activation[7, 2] = torch.nan
        for form in (cuda.FORMS["selection"][0], cuda.FORMS["selection"][-1]):
            monkeypatch.setitem(cuda.LAUNCH, "selection", form)
            check_choices(activation, None, torch.ones(90), None, need, "rank", "soft", 4)
    for B in (9, 129, 8193):
        key = columns("quantized", B, 3)
        assert cuda.rank(key).equal(ref.rank(key))


@on_host
def test_no_race_within_a_block():
    """Of one block, or one cluster: blocks meet in nothing but counters and lists of their own entries."""
    code, output = sanitized("every_kernel_once")
    assert code == 0 and "ThreadSanitizer" not in output, output[-3000:]


@on_host
def test_a_missing_barrier_would_be_found():
    code, output = sanitized("every_kernel_once", "-DBCL_WITHOUT_BARRIERS")
    assert code == 66 and "data race" in output, output[-3000:]
