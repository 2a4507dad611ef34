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

import cuda_host
import pytest
import torch
from backends import stage
from test_layer import batch, make
from test_stages import by_row, check_competition, vectors

from bcl_fast import cuda, ops
from bcl_fast import reference as ref
from bcl_fast.testing import VARIANTS, columns, neighbours_of, relative_error

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc")
ONE_BLOCK, CLUSTER, MEMORY = range(3)
A100, H100 = (108, 163 << 10, 0), (132, 227 << 10, 1)  # multiprocessors, shared bytes of a block, clusters
SERVED = ops.why_not("cuda", "cuda" if torch.cuda.is_available() else "cpu") is None

on_host = pytest.mark.skipif("BCL_FAST_CUDA" not in os.environ, reason="a GPU, or no C++ compiler")
served = pytest.mark.skipif(not SERVED, reason="the CUDA library is not built")


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
    plan = cuda_host.plan("competition", 65536, D, 8, *device)
    assert (plan.where, plan.rows, plan.owned, plan.cluster) == expected


@on_host
@pytest.mark.parametrize("device", [A100, H100, (1, 48 << 10, 0)], ids=["A100", "H100", "small"])
@pytest.mark.parametrize("D", [2, 31, 33, 777, 4097, 8193, 16385, 40000, 57000, 65537, 1 << 17, (1 << 20) + 1])
@pytest.mark.parametrize("B", [1, 5, 1000, 1 << 20])
@pytest.mark.parametrize("k", [1, 8, 9])
def test_competition_plans_fit_and_cover(B, D, k, device):
    plan = cuda_host.plan("competition", B, D, k, *device)
    assert plan.shared <= device[1] and plan.cluster <= (8 if device[2] else 1)
    assert plan.slice % 32 == 0 and plan.slice * plan.cluster >= D and (plan.cluster == 1 or plan.slice >= 32)
    assert 1 <= plan.groups <= max(1, device[0] // plan.cluster) and plan.groups * plan.rows < B + plan.rows
    assert plan.partial >= 8 * plan.groups * D and all(n % 256 == 0 for n in (plan.partial, plan.strengths, plan.ids))
    assert plan.strengths >= (16 * plan.groups * D if plan.where == MEMORY else 0)
    if plan.owned:
        assert k <= 8 and D <= 1 << 16 and plan.owned * 384 >= plan.slice
    else:
        assert plan.ids >= k * D * (2 if plan.where == ONE_BLOCK else 4) and (plan.where != ONE_BLOCK or D <= 1 << 16)


@on_host
@pytest.mark.parametrize("B, D", [(1, 2), (8192, 8192), (65536, 16384), (1 << 20, 1 << 17)])
def test_selection_and_rank_plans(B, D):
    for r in (1, 5, 32):
        plan = cuda_host.plan("selection", B, D, min(r, B), 132)
        assert plan.blocks * 32 >= D and plan.shared <= 99 << 10  # two blocks a multiprocessor
        assert plan.survivors >= 4 * D * 64 and plan.lists >= 4 * (2 + 3 * D) and plan.sorts == plan.sorting * B * 16
        assert plan.sorts <= max(4 * B * D // 4, 16 * B)  # a quarter of the activation, or one column's
    plan = cuda_host.plan("rank", B, D)
    assert plan.columns >= 1 and (plan.columns == D or plan.columns * B <= 1 << 26 or plan.columns == 1)
    assert plan.keys >= (4 * plan.columns * B if B > 8192 else 0)


# --- Every way through the kernels ------------------------------------------------------------------------------------


@on_host
@pytest.mark.parametrize("k", [3, 8, 9], ids="k{}".format)
@pytest.mark.parametrize(
    "where, rows, device",
    [
        pytest.param(ONE_BLOCK, 4, (3, 8 << 10, 0), id="block"),
        pytest.param(ONE_BLOCK, 4, (3, 5200, 0), id="block-without-sums"),
        pytest.param(ONE_BLOCK, 2, (2, 3600, 0), id="two-rows"),
        pytest.param(ONE_BLOCK, 1, (1, 2900, 0), id="one-row"),
        pytest.param(CLUSTER, 4, (16, 2600, 1), id="cluster-without-sums"),
        pytest.param(CLUSTER, 4, (8, 2815, 1), id="cluster"),
        pytest.param(MEMORY, 4, (3, 2600, 0), id="memory"),
    ],
)
def test_competition_wherever_the_strengths_lie(host, where, rows, device, k):
    D = 161
    plan = cuda_host.plan("competition", 23, D, k, *device)
    assert (plan.where, plan.rows) == (where, rows)
    host(*device)
    activation, neighbors = columns("quantised", 23, D), neighbours_of(D, k)
    check_competition("cuda", activation, neighbors, x=columns("random", 23, 50, seed=1), forces="coupled")
    activation = activation[:7]
    activation[4, 7], activation[5] = torch.nan, 0.0
    winner = stage("competition", "cuda")(activation, neighbors, 5.0, activation, "decoupled", 0.0, 0.0)[4]
    assert winner.equal(ref.winner(ref.margin(activation.abs(), neighbors)))


@served
def test_competition_of_more_features_than_threads():
    for D in (1100, 4200):
        check_competition("cuda", columns("random", 5, D), neighbours_of(D, 8))


def opened(monkeypatch, *arguments):
    """The choices of the stage `selection`, and how many columns were left to counting and to sorting."""
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
        ("quantised", 300, None),
        ("hostile need", 300, "sorted"),
        ("nan", 300, "sorted"),
    ],
)
def test_selection_by_every_path(monkeypatch, kind, B, path, r, weighting):
    D = 37
    activation = columns("quantised" if kind == "quantised" else "random", B, D)
    rinv, need, bias = vectors(2, B, B, D, dtype=torch.float32)
    need = 1 / (5 + 2 * need)  # as if 5 to 7 features claimed each sample
    if kind == "heavy tails":
        activation = activation**5
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


@on_host
def test_selection_of_very_many_samples():
    activation = columns("random", 70001, 2)
    (need,) = vectors(3, 70001, dtype=torch.float32)
    arguments = activation, None, torch.ones(70001), None, need, "rank", "hard", 5
    assert by_row(*stage("selection", "cuda")(*arguments))[0].equal(by_row(*ref.selection(*arguments))[0])


@on_host
def test_selection_is_settled_by_bounds_alone_where_they_decide(monkeypatch):
    """On a batch whose needs differ, most columns need no rank."""
    B, D = 2000, 64
    activation = columns("random", B, D)
    need = 1 / (1 + 20 * torch.rand(B, generator=torch.Generator().manual_seed(0)))
    *_, (to_count, to_sort) = opened(monkeypatch, activation, None, torch.ones(B), None, need, "rank", "hard", 5)
    assert to_sort == 0 and to_count < D / 3


@served
@pytest.mark.parametrize("B", [1, 128, 129, 512, 513, 2048, 2049, 8192, 8193])
def test_rank_by_every_path(B):
    for kind in ("quantised", "signed_zeros"):
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
        torch.manual_seed(0)
        layer = make(backend, som_lr=0.1, **VARIANTS[name])
        start = layer.weight.detach().clone()
        layer(batch()).square().mean().backward()
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
    stage_of = ops.stage.__wrapped__("selection", "cuda")  # past its cache
    some = columns("random", 7, 5), None, torch.ones(7), torch.ones(5), torch.ones(7)
    for rule, r in (("cosine", 2), ("rank", 0), ("rank", 33)):
        assert stage_of(*some, rule, "hard", r)[0].shape == (5, min(r or 7, 7))
    assert not called
    stage_of(*some, "rank", "hard", 2)
    assert len(called) == 1


@on_host
def test_a_library_of_another_version_is_named(monkeypatch):
    from bcl_fast import native

    native.cuda.cache_clear()
    monkeypatch.setattr(native, "CUDA_ABI", 99)
    try:
        assert "interface 1, not 99" in ops.why_not("cuda", "cpu")
        monkeypatch.setenv("BCL_FAST_CUDA", "/nowhere/at/all.so")
        assert "does not load" in ops.why_not("cuda", "cpu")
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
def test_every_kernel_once(host):
    """Few samples and features through every kernel: what ThreadSanitizer is run on."""
    for device in ((1, 8 << 10, 0), (1, 2600, 0), (8, 2600, 1)):
        host(*device)
        check_competition("cuda", columns("random", 5, 161), neighbours_of(161, 8))
    host()
    check_competition("cuda", columns("random", 3, 40), neighbours_of(40, 9))
    need = torch.linspace(0.2, 0.1, 90)
    for activation in (columns("random", 90, 5), columns("quantised", 90, 5)):
        activation[7, 2] = torch.nan
        arguments = activation, None, torch.ones(90), None, need, "rank", "soft", 4
        assert by_row(*stage("selection", "cuda")(*arguments))[0].equal(by_row(*ref.selection(*arguments))[0])
    for B in (9, 129, 8193):
        key = columns("quantised", B, 3)
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


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The library as setup.py builds it, and what ptxas said of its kernels."""
    if NVCC is None:
        pytest.skip("no nvcc")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.delenv("BCL_FAST_CUDA_ARCHITECTURES", raising=False)
        patch.setattr("setuptools.setup", lambda **metadata: None)
        build = runpy.run_path("setup.py")
    target = tmp_path_factory.mktemp("cuda") / "_cuda.so"
    words = build["nvcc_command"](build["CUDA"], target)
    done = subprocess.run([*words, "-Xptxas", "-v"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return target, done.stdout + done.stderr


def test_no_kernel_of_ours_spills(compiled):
    pattern = r"Compiling entry function '(\S+)' for '(sm_\d+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    found = re.findall(pattern, compiled[1], re.S)
    # CUB's own sort spills 24 bytes.
    ours = {(name, sm): (int(spilled), int(used)) for name, sm, spilled, used in found if "3cub" not in name}
    assert {sm for _, sm in ours} == {"sm_80", "sm_90", "sm_100"}
    for (name, sm), (spilled, used) in sorted(ours.items()):
        print(f"{sm:7} {used:4} registers {name}")
        assert spilled == 0, f"{name} spills {spilled} bytes on {sm}"
    kernels = {match for name, _ in ours for match in re.findall(r"bcl\d+(\w+?_kernel)", name)}
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cuh"))
    assert kernels == set(re.findall(r"\b(\w+_kernel)\(", sources))


def test_the_built_library_loads_and_explains_errors(compiled):
    library = ctypes.CDLL(str(compiled[0]))
    library.bcl_cuda_error.restype = ctypes.c_char_p
    assert library.bcl_cuda_abi() == 1 and library.bcl_cuda_on_host() == 0
    assert b"driver" in library.bcl_cuda_error(35)
