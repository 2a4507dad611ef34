"""The CUDA C++ of the backend `cuda` (csrc/cuda): its launches' arithmetic, every way through its kernels on the host,
and what nvcc makes of them. tests/test_stages.py holds the same kernels to the exactness contract."""

import ctypes
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import cuda_host
from helpers.backends import DEVICE, stage
from helpers.elf import SYSTEM, needs
from helpers.layers import batch, make
from helpers.layouts import compiled_layout
from helpers.stages import by_row, check_competition, vectors

from bcl_fast import backends, cuda, cuda_structs, native, structures
from bcl_fast import reference as ref
from bcl_fast.testing import VARIANTS, columns, neighbors_of, relative_error

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc")
ONE_BLOCK, CLUSTER, MEMORY = range(3)
IN_REGISTERS, EIGHT_AT_ONCE, ONE_BY_ONE = range(3)
# Multiprocessors, shared bytes of a block, clusters at once.
A100, H100 = (108, 163 << 10, 0), (132, 227 << 10, 15)
SERVED = backends.why_not("cuda", "cuda" if torch.cuda.is_available() else "cpu") is None

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU; less shared memory leads here on the host")
on_host = pytest.mark.skipif("BCL_FAST_CUDA" not in os.environ, reason="a GPU, or no C++ compiler")
served = pytest.mark.skipif(not SERVED, reason="the CUDA library is not built")


def over_forms(stage):
    """Parametrize a test over every form of a stage that is compiled."""
    names = [" ".join(map(str, form.values())) for form in cuda.FORMS[stage]]
    return pytest.mark.parametrize("form", cuda.FORMS[stage], ids=names)


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
@over_forms("competition")
@pytest.mark.parametrize("device", [A100, H100, (1, 48 << 10, 0)], ids=["A100", "H100", "small"])
@pytest.mark.parametrize("D", [2, 31, 33, 777, 4097, 8193, 16385, 40000, 57000, 65537, 1 << 17, (1 << 20) + 1])
def test_competition_plans_fit_and_cover(D, device, form):
    for B in (1, 5, 1000, 1 << 20):
        for k in (1, 8, 9):
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
    assert results[0][4].equal(ref.winner(ref.margin(activation.abs(), inside)))


@on_host
@over_forms("competition")
@pytest.mark.parametrize(
    "where, rows, device",
    [
        pytest.param(ONE_BLOCK, 4, (3, 8 << 10, 0), id="block"),
        pytest.param(ONE_BLOCK, 4, (3, 5200, 0), id="block-without-sums"),
        pytest.param(ONE_BLOCK, 2, (2, 3600, 0), id="two-rows"),
        pytest.param(ONE_BLOCK, 1, (1, 2900, 0), id="one-row"),
        pytest.param(CLUSTER, 4, (16, 2600, 1, 2), id="cluster-without-sums"),
        pytest.param(CLUSTER, 4, (8, 2815, 1), id="cluster"),
        pytest.param(CLUSTER, 4, (8, 3600, 1), id="two-rows-or-cluster"),
        pytest.param(MEMORY, 4, (3, 2600, 0), id="memory"),
        pytest.param(MEMORY, 4, (16, 2600, 1, 0), id="no-room-for-a-cluster"),
    ],
)
def test_competition_wherever_the_strengths_lie(monkeypatch, host, where, rows, device, form):
    D = 161
    clusters = device[3] if len(device) > 3 else 1 << 30 if device[2] else 0
    if where == CLUSTER and device[1] == 3600 and not form["cluster"]:
        where, rows = ONE_BLOCK, 2
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
        assert won[4].equal(ref.winner(margin))
        torch.testing.assert_close(won[0], ref.rank_score(margin, 5.0), rtol=1e-5, atol=1e-6, equal_nan=True)
        damaged = neighbors.clone()
        damaged[::3, 0], damaged[1::3, -1], damaged[::5, 1] = -1, 1 << 40, D
        check_damaged(activation[:2], damaged)


@served
@over_forms("competition")
def test_competition_in_every_form(monkeypatch, form):
    monkeypatch.setitem(cuda.LAUNCH, "competition", form)
    for kind in ("random", "huge", "denormal"):
        check_competition("cuda", columns(kind, 9, 1100), neighbors_of(1100, 8), x=columns("random", 9, 3))
    strided = columns("random", 2 * 19, 3 * 413)[::2, ::3]
    check_competition("cuda", strided, neighbors_of(413, 5), x=columns("random", 7, 19, seed=2).T)
    check_competition("cuda", strided.T.contiguous().T, neighbors_of(413, 5), temperature=0.5)


@served
@over_forms("competition")
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


def opened(monkeypatch, *arguments):
    """The choices of the stage `selection`, how many stripes hold columns to be counted, and how many are sorted."""
    made = []

    def empty(*shape, **kinds):
        made.append(torch.zeros(*shape, **kinds))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        results = stage("selection", "cuda")(*arguments)
    return *results, made[-1].view(torch.int32)[:2].tolist()


@on_host
@pytest.mark.parametrize("weighting", ["hard", "soft"])
@pytest.mark.parametrize("r", [1, 5, 32])
@pytest.mark.parametrize(
    "kind, B, path",  # a path that some column must take
    [
        ("random", 40, None),
        ("random", 1500, None),
        ("heavy tails", 1500, "counted"),
        ("outliers", 300, "sorted"),
        ("quantized", 300, None),
        ("hostile need", 300, "sorted"),
        ("nan", 300, "sorted"),
    ],
)
def test_selection_by_every_path(monkeypatch, kind, B, path, r, weighting):
    D = 37
    activation = columns("quantized" if kind == "quantized" else "random", B, D)
    rinv, need, bias = vectors(2, B, B, D, dtype=torch.float32)
    need = 1 / (5 + 2 * need)  # as if 5 to 7 features claimed each sample
    if kind == "heavy tails":
        activation = activation**5
        monkeypatch.setitem(cuda.LAUNCH, "selection", {"ahead": 8, "bins": 512, "warps": 16, "round": 128})
    if kind == "outliers":  # found by the sample of few rows: all others share one bin
        activation[:: B // 3] *= 1e20
    if kind == "hostile need":
        need[3] = -1.0
    if kind == "nan":
        activation[torch.rand(B, D, generator=torch.Generator().manual_seed(1)) < 0.1] = torch.nan
        activation[:, 5] = torch.nan
    arguments = activation, bias, rinv, None, need, "rank", weighting, r
    rows, shares, (to_count, to_sort) = opened(monkeypatch, *arguments)
    expected_rows, expected_shares = by_row(*ref.selection(*arguments))
    rows, shares = by_row(rows, shares)
    assert rows.equal(expected_rows) and relative_error(shares, expected_shares) <= 1e-6
    assert path is None or {"counted": to_count, "sorted": to_sort}[path] > 0
    assert weighting == "hard" or to_count + to_sort > 0  # shares need ranks


def check_choices(*arguments):
    got, expected = (by_row(*choose(*arguments)) for choose in (stage("selection", "cuda"), ref.selection))
    assert got[0].equal(expected[0])
    scale = float(expected[1].nan_to_num().max())
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=1e-6 * scale, equal_nan=True)


@served
@over_forms("selection")
def test_selection_in_every_form(monkeypatch, form):
    monkeypatch.setitem(cuda.LAUNCH, "selection", dict(reversed(form.items())))  # in any order
    for kind, B, D in (("random", 700, 37), ("quantized", 300, 33), ("equal", 70, 3), ("huge", 1100, 2)):
        rinv, need, bias = vectors(2, B, B, D, dtype=torch.float32)
        for weighting in ("hard", "soft"):
            check_choices(columns(kind, B, D), bias, rinv, None, need, "rank", weighting, 5)
        check_choices(columns(kind, B, D) ** 3, None, rinv, None, None, "rank", "soft", 32)
    check_choices(columns("random", 70001, 2), None, torch.ones(70001), None, None, "rank", "hard", 3)


ODD_NEEDS = {
    "nan": torch.tensor([0.5, torch.nan, 0.25]),
    "negative": torch.tensor([0.5, -0.25, 0.25]),
    "infinite": torch.tensor([0.5, torch.inf, 0.25]),
    "equal": torch.tensor([0.3]),
    "zero": torch.tensor([0.0, -0.0]),
    "denormal": torch.tensor([1e-45, 3e-42, 1e-40]),
    "far apart": torch.tensor([1e-45, 3e38, 1.0, 1.0000001]),
    "falling": 1 / torch.arange(1, 91),
    "rising": torch.linspace(0.5, 0.6, 90),
}


@served
@pytest.mark.parametrize("need", ODD_NEEDS.values(), ids=ODD_NEEDS)
def test_selection_by_any_needs(need):
    B = 1500
    activation = columns("random", B, 33)
    need = need.repeat(-(-B // len(need)))[:B]
    for weighting, r in (("hard", 1), ("hard", 5), ("soft", 5), ("hard", 32)):
        check_choices(activation, None, torch.ones(B), None, need, "rank", weighting, r)


@served
def test_no_need_of_a_bin_is_taken_for_the_largest():
    """A small need first in its bin must not end the visits: a larger one may follow."""
    B = 200
    activation = torch.linspace(-1, 1, B)[:, None].repeat(1, 3)
    activation[3], activation[40] = 3.0, 2.0
    need = torch.full((B,), 1e-30)  # far below: a bin goes from 0.99 to 0.87
    need[:16], need[16:40], need[40] = 0.9, 0.88, 0.99
    for r in (1, 2):
        check_choices(activation, None, torch.ones(B), None, need, "rank", "hard", r)
    assert stage("selection", "cuda")(activation, None, torch.ones(B), None, need, "rank", "hard", 1)[0].unique() == 40


@served
@pytest.mark.parametrize("B", [65535, 65536, 120000, 131072])
def test_counts_of_keys_in_16_bits_do_not_overflow(B):
    """All of a column in one bin; more than 16 bits count, above others that would seem better; NaN."""
    place, activation = torch.arange(B), torch.full((B, 4), 0.3)
    activation[:, 1] = torch.where(place < 30000, place / 30000 - 2, 0.3)
    activation[29990:30000, 1] = -0.5
    activation[::7, 2] = torch.nan
    activation[:, 3] = columns("random", B, 1)[:, 0]
    activation[B - 1, 3] = torch.nan
    need = torch.where(place < 30000, 0.9, 0.4)
    check_choices(activation, None, torch.ones(B), None, need, "rank", "hard", 5)
    if B == 65535:  # the largest counts that 16 bits hold
        check_choices(activation, None, torch.ones(B), None, None, "rank", "soft", 5)


@on_host
def test_selection_is_settled_by_bounds_alone_where_they_decide(monkeypatch):
    """On a batch whose needs differ, most columns need no rank."""
    B, D = 2000, 64
    activation = columns("random", B, D)
    need = 1 / (1 + 20 * torch.rand(B, generator=torch.Generator().manual_seed(0)))
    rows, _, (stripes, to_sort) = opened(monkeypatch, activation, None, torch.ones(B), None, need, "rank", "hard", 5)
    settled = [bool((chosen.diff() > 0).all()) for chosen in rows]  # in the order of the batch: no rank was needed
    assert to_sort == 0 and stripes <= D // 32 and sum(settled) > D * 2 / 3


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
    fields, size = compiled_layout(getattr(native.cuda(), f"bcl_cuda_layout_{struct.__name__}"))
    mirrored = [(name, getattr(struct, name)) for name, _ in struct._fields_]
    assert fields == [(name, field.offset, field.size) for name, field in mirrored] and size == ctypes.sizeof(struct)
    ends = [offset + field_size for _, offset, field_size in fields]
    starts = [*(offset for _, offset, _ in fields[1:]), size]
    assert ends[:-1] == starts[:-1] and starts[-1] - ends[-1] < 8  # a field that both lists forget would leave a hole


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


# --- What nvcc makes of it --------------------------------------------------------------------------------------------


# Those of setup.py; where a GPU is, its own alone, for a test should not take a minute there.
ARCHITECTURES = ["80", "90", "100"]
if torch.cuda.is_available():
    ARCHITECTURES = ["{}{}".format(*torch.cuda.get_device_capability())]


def build_script(patch, folder, architectures=None):
    """What setup.py defines, in a folder that holds it."""
    patch.chdir(folder)
    patch.setattr("setuptools.setup", lambda **metadata: None)
    patch.delenv("BCL_FAST_CUDA_ARCHITECTURES", raising=False)
    if architectures:
        patch.setenv("BCL_FAST_CUDA_ARCHITECTURES", " ".join(architectures))
    return runpy.run_path("setup.py")


@pytest.fixture(scope="module")
def compiled():
    """The library as setup.py builds it, unless it is there, and what ptxas said of its kernels."""
    if NVCC is None:
        pytest.skip("no nvcc")
    with pytest.MonkeyPatch.context() as patch:
        build = build_script(patch, ROOT, ARCHITECTURES)
        target = ROOT / "build" / f"cuda-{build['build_name'](build['CUDA'])}.so"
        log, partial = target.with_suffix(".log"), target.with_suffix(f".{os.getpid()}")
        if not log.exists():
            target.parent.mkdir(exist_ok=True)
            words = [*build["nvcc_command"](build["CUDA"], partial), "-Xptxas", "-v"]
            done = subprocess.run(words, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            os.replace(partial, target)
            log.write_text(done.stdout + done.stderr)
    return target, log.read_text()


def test_no_kernel_of_ours_spills(compiled):
    pattern = r"Compiling entry function '(\S+)' for '(sm_\d+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    found = re.findall(pattern, compiled[1], re.S)
    # CUB's own sort spills 24 bytes.
    ours = {(name, sm): (int(spilled), int(used)) for name, sm, spilled, used in found if "3cub" not in name}
    assert {sm for _, sm in ours} == {f"sm_{number}" for number in ARCHITECTURES}
    for (name, sm), (spilled, used) in sorted(ours.items()):
        print(f"{sm:7} {used:4} registers {name}")
        assert spilled == 0, f"{name} spills {spilled} bytes on {sm}"
    kernels = {match for name, _ in ours for match in re.findall(r"bcl\d+(\w+?_kernel)", name)}
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cuh"))
    assert kernels == set(re.findall(r"\b(\w+_kernel)\(", sources))


def test_the_built_library_loads_and_explains_errors(compiled):
    library = ctypes.CDLL(str(compiled[0]))
    library.bcl_cuda_error.restype = library.bcl_cuda_build.restype = ctypes.c_char_p
    assert library.bcl_cuda_abi() == native.CUDA_ABI and library.bcl_cuda_on_host() == 0
    assert b"driver" in library.bcl_cuda_error(35) and b"not compiled" in library.bcl_cuda_error(-1)
    assert library.bcl_cuda_build().endswith(b"_for_" + "_".join(ARCHITECTURES).encode())


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_the_built_library_brings_cuda_s_runtime_along(compiled):
    """It asks for what every Linux has: for nothing of CUDA, torch or Python."""
    assert needs(compiled[0]) <= SYSTEM


def disassembler(name):
    """The tool of CUDA's toolkit, or the one that Triton brings; None where there is neither."""
    if found := shutil.which(name):
        return found
    try:
        from triton import knobs

        return getattr(knobs.nvidia, name).path
    except (ImportError, AttributeError, RuntimeError):
        return None


@pytest.fixture(scope="module")
def instructions(compiled):
    """{architecture: {kernel: its lines of SASS, (address, instruction)}}."""
    tools = [disassembler(name) for name in ("cuobjdump", "nvdisasm")]
    if None in tools:
        pytest.skip("no cuobjdump or no nvdisasm")
    paths = os.pathsep.join([os.path.dirname(tools[1]), os.environ["PATH"]])
    found = {}
    for sm in ARCHITECTURES:
        words = [tools[0], "-sass", "-arch", f"sm_{sm}", str(compiled[0])]
        listing = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | {"PATH": paths})
        parts = (part.partition("\n") for part in listing.stdout.split("Function : ")[1:])
        found[sm] = {name.strip(): re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text) for name, _, text in parts}
    return found


def loads_in_flight(lines):
    """The lengths of runs of loads from memory that no branch, barrier, or use of what one of them loads interrupts."""
    joins = {target for _, line in lines for target in re.findall(r"\bBRA\b.*?0x([0-9a-f]+)", line)}
    joins = {int(target, 16) for target in joins}
    runs, awaited = [0], set()
    for address, line in lines:
        name, _, operands = re.sub(r"^@!?U?P\d+ +", "", line).partition(" ")
        registers = [int(number) for number in re.findall(r"\bR(\d+)\b", operands)]
        load = name.startswith("LDG.")
        ends = name.startswith(("BRA", "BAR", "BSYNC", "CALL", "EXIT", "RET", "WARPSYNC"))
        if ends or int(address, 16) in joins or awaited & set(registers[load:]):
            runs.append(0)
            awaited = set()
        if load:
            runs[-1] += 1
            awaited |= set(range(registers[0], registers[0] + (4 if ".128" in name else 2 if ".64" in name else 1)))
    return runs


def test_loads_of_the_selection_are_in_flight_together(instructions):
    """Values and norms of AHEAD samples in the two loops that read columns, of 8 where samples are visited."""
    for sm, kernels in instructions.items():
        chosen = {name: lines for name, lines in kernels.items() if "selection_kernel" in name}
        assert len(chosen) == 2 * len(cuda.FORMS["selection"])
        for name, lines in chosen.items():
            ahead = int(re.search(r"ELb[01]ELi(\d+)E", name)[1])
            last = max(i for i, (_, line) in enumerate(lines) if "BAR.SYNC" in line)  # then columns are settled
            runs = sorted(loads_in_flight(lines[:last]), reverse=True)
            print(f"sm_{sm:4} {name} {[n for n in runs if n > 1]}")
            assert runs[1] >= 2 * ahead, (sm, name, runs)
            assert sum(n >= 8 for n in runs) >= 2 + 4, (sm, name, runs)
        (lines,) = (lines for name, lines in kernels.items() if "selection_counting" in name)
        assert max(loads_in_flight(lines)) >= 16


def test_tiles_of_the_competition_are_copied_asynchronously(instructions):
    for kernels in instructions.values():
        for name, lines in kernels.items():
            if found := re.search(r"competition_kernelILi(\d)ELi(\d)", name):
                copies = sum("LDGSTS" in line for _, line in lines)
                assert copies == (0 if int(found[1]) == MEMORY else 2 * int(found[2])), name  # the first tile, the next


def test_a_library_is_known_by_its_sources_not_by_times(tmp_path, monkeypatch):
    from setuptools.dist import Distribution

    for name in ("setup.py", "README.md", "bcl_fast/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    sources = shutil.copytree(ROOT / "csrc" / "cuda", tmp_path / "csrc" / "cuda")
    monkeypatch.setattr(shutil, "which", lambda *_, **__: "nvcc")
    built = []

    def spawn(words):
        (name,) = (word.partition("=")[2] for word in words if word.startswith("-DBCL_BUILD="))
        Path(words[-1]).write_bytes(b"...bcl_cuda_build " + name.encode() + b"\0...")
        built.append(name.partition("_for_")[2])

    def build(target="build/_cuda.so", architectures=None):
        script = build_script(monkeypatch, tmp_path, architectures)
        command = script["BuildExt"](Distribution())
        monkeypatch.setattr(command, "get_ext_fullpath", lambda name: target)
        monkeypatch.setattr(command, "spawn", spawn)
        command.force = False
        command.build_with_nvcc(script["CUDA"])
        return built.pop() if built else None

    assert build(architectures=["90"]) == "90"
    for path in sources.iterdir():
        os.utime(path, (2e9, 2e9))  # as if written after it
    assert build() is None and build(architectures=["90"]) is None
    assert build(architectures=["80", "90"]) == "80_90"
    shutil.copy("build/_cuda.so", "bcl_fast/_cuda.so")  # carried here, and nothing else
    assert build("elsewhere/_cuda.so") is None and Path("elsewhere/_cuda.so").exists()
    with (sources / "plan.h").open("a") as file:
        file.write("// another\n")
    assert build("elsewhere/_cuda.so") == "80_90_100"
    (tmp_path / "setup.py").write_text((tmp_path / "setup.py").read_text().replace('"-fmad=false"', '"-fmad=true"'))
    assert build("elsewhere/_cuda.so") == "80_90_100" and build("elsewhere/_cuda.so") is None
