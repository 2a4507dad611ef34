"""The C++ library: hostile inputs at sizes where its fast paths run, every instruction set, any number of threads.

What every backend must do is in tests/test_stages.py; here is what is particular to this one.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import cpu_builds
from helpers.cpu_builds import PROBE, TESTS, over_instruction_sets
from helpers.layouts import check_layout

from bcl_fast import cpu, cpu_structs, native
from bcl_fast import reference as ref
from bcl_fast.experiments.data import Images
from bcl_fast.experiments.run import Condition, trained
from bcl_fast.spec import BCLConfig
from bcl_fast.structures import Competition, Pull
from bcl_fast.testing import COLUMNS, columns, compete, neighbors_of, relative_error

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))
PRIMES = (1009, 67)  # B, D: four histograms, several tiles, a rest of every vector width


def check(activation, need, rescue_k=5, rule="rank", weighting="hard", rinv=None, bias=None):
    """The chosen sets and shares are the reference's."""
    B, D = activation.shape
    rinv = torch.ones(B, dtype=activation.dtype) if rinv is None else rinv
    winv = torch.ones(D, dtype=activation.dtype)
    arguments = activation, bias, rinv, winv, need, rule, weighting, rescue_k
    rows, shares = cpu.selection(*arguments)
    expected, expected_shares = ref.selection(*arguments)
    order, expected_order = rows.argsort(dim=1), expected.argsort(dim=1)
    assert rows.gather(1, order).equal(expected.gather(1, expected_order))
    assert relative_error(shares.gather(1, order), expected_shares.gather(1, expected_order)) <= 1e-6


def uniform(B, seed=0, dtype=torch.float32):
    return torch.rand(B, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", COLUMNS)
def test_selection_by_bounds_is_bit_equal(kind, dtype):
    B, D = PRIMES
    need, rinv, bias = uniform(B, 1, dtype) / 20 + 0.02, uniform(B, 2, dtype) + 0.1, uniform(D, 3, dtype)
    for weighting in ("hard", "soft"):
        check(columns(kind, B, D, dtype), need, weighting=weighting, rinv=rinv, bias=bias)
        check(columns(kind, B, D, dtype), None, weighting=weighting)


@pytest.mark.parametrize(
    "need",
    [
        1 / torch.arange(1, 1010.0),  # every score of a rising column is nearly 1
        1 / torch.arange(1, 1010.0).flip(0),
        10 ** (30 * uniform(1009, 4) - 30),
        torch.ones(1009),
        torch.zeros(1009),
        -torch.zeros(1009),
        torch.where(uniform(1009, 5) < 0.5, 0.0, 1.0),
        torch.where(uniform(1009, 5) < 0.01, torch.nan, uniform(1009, 6)),
        torch.where(uniform(1009, 5) < 0.01, torch.inf, uniform(1009, 6)),
        -uniform(1009, 7),
    ],
    ids=["1/rank", "1/rank falling", "log-uniform", "equal", "zero", "minus zero", "two", "nan", "inf", "negative"],
)
def test_hostile_needs(need):
    B, D = PRIMES
    rising = torch.arange(1.0, B + 1)[:, None].expand(B, D) * 1e-3
    for activation in (rising, -rising, columns("random", B, D), columns("quantized", B, D)):
        check(activation, need)
        check(activation, need, rule="cosine")


@pytest.mark.parametrize(
    "outliers", [[1e30], [-1e30], [1e30, -1e30], [torch.inf], [-torch.inf, torch.inf], [torch.nan]]
)
def test_outliers_that_collapse_the_histogram(outliers):
    B, D = PRIMES
    activation = columns("random", B, D) * 1e-3
    for i, value in enumerate(outliers):
        activation[3 + 500 * i, ::2] = value  # every other column: a tile holds both
    check(activation, uniform(B, 8))
    check(activation, uniform(B, 8), weighting="soft")
    check(activation, uniform(B, 8), rule="clamped_cosine")


@pytest.mark.parametrize("rescue_k", [1, 32, 33, 97, 1008, 0])  # around FEW, beyond SURVIVORS, up to the batch
def test_rescue_k_up_to_the_batch(rescue_k):
    B, D = PRIMES
    for rule in ("rank", "cosine"):
        check(columns("random", B, D), uniform(B, 9), rescue_k, rule)
        check(columns("quantized", B, D), uniform(B, 9), rescue_k, rule, "soft")


@pytest.mark.parametrize("odd", [torch.nan, -torch.tensor(torch.nan), torch.inf])
def test_competition_with_nan_and_inf_has_the_reference_s_winner(odd):
    activation = torch.where(uniform(257 * 37, 10).reshape(257, 37) < 0.02, odd, columns("random", 257, 37))
    neighbors = neighbors_of(37, 8)
    got, own = (compete(module.competition, activation, neighbors) for module in (cpu, ref))
    assert got.winner.equal(own.winner)


@pytest.mark.parametrize("k", [1, 8, 66])
def test_competition_at_primes(k):
    B, D = PRIMES
    activation, neighbors = columns("random", B, D), neighbors_of(D, k)
    got, own = (compete(module.competition, activation, neighbors) for module in (cpu, ref))
    assert max(map(relative_error, got, own)) <= 1e-5


def test_scores_far_below_are_zero_and_make_no_subnormal_numbers():
    """A loser by a margin beyond the exponential's range weighs nothing, as in torch's own sigmoid."""
    activation = torch.tensor([[100.0, 1.0, 2.0], [3.0, 50.0, 4.0]])
    neighbors = torch.tensor([[1, 2], [0, 2], [0, 1]])
    for dtype in (torch.float32, torch.float64):
        a = activation.to(dtype) * (1 if dtype == torch.float32 else 10)
        score = cpu.competition(a, neighbors, 5.0, a, "decoupled", 0.0, 0.0).rank_score
        assert score.equal(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=dtype))


def test_infinite_similarities_are_the_largest_numbers():
    similarity = columns("random", 40, 40)
    similarity[::3, ::5], similarity[1::3, ::7] = torch.inf, -torch.inf
    assert cpu.nearest(similarity, 0, 9).equal(ref.nearest(similarity, 9))


@pytest.mark.parametrize("value", [-1, 41, -(2**63), 2**32, 2**63 - 1])
@pytest.mark.parametrize("name, size", [("pair_feature", 19), ("rescue_rows", 41)])
def test_an_index_out_of_bounds_is_an_error_that_names_it(name, size, value):
    B, D, N = 41, 19, 33
    pairs = neighbors_of(D, 3)[torch.arange(B) % D], torch.ones(B, 3)
    rescue = torch.arange(D * 5).view(D, 5) % B, torch.ones(D, 5)
    pull = Pull(columns("random", B, N), *pairs, *rescue, torch.ones(D), torch.ones(D))
    getattr(pull, name).view(-1)[-1] = value
    weight = columns("random", D, N)
    before = weight.clone()
    for offset in (None, torch.zeros(D, N)):
        with pytest.raises(ValueError, match=rf"^{name} must hold indices 0 \.\. {size - 1}, got {value}$"):
            cpu.targets_pull_(weight, offset, torch.tensor(0.1), pull)
        assert weight.equal(before) and (offset is None or offset.count_nonzero() == 0)
    with pytest.raises(ValueError, match=f"^{name} must hold"):
        cpu.targets(pull)


def test_indices_of_a_whole_batch_are_looked_at_too():
    x, rows = columns("random", 4, 3), torch.arange(4).repeat(5, 1)
    pairs = torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2)
    for value in (-1, 4, 2**40):
        rows[2, 1] = value
        with pytest.raises(RuntimeError, match="out of bounds"):  # torch's own: a product takes the place of sums
            cpu.targets(Pull(x, *pairs, rows, torch.ones(5, 4), torch.ones(5), torch.ones(5)))


@pytest.mark.parametrize("shape, dtype", [((6, 3), int), ((5, 0), int), ((5, 3), torch.int32)], ids=str)
def test_neighbors_of_another_shape_are_refused(shape, dtype):
    neighbors = torch.zeros(shape, dtype=torch.int64 if dtype is int else dtype)
    with pytest.raises(ValueError, match=r"^neighbors must be torch.int64 \[5, k\] with D, k >= 1, got torch.int"):
        compete(cpu.competition, columns("random", 7, 5), neighbors)


BAD_SIZES = {
    "neighbors": [dict(k=-1), dict(rows=-1), dict(columns=-1)],
    "competition": [dict(B=-1), dict(D=0), dict(D=2**31), dict(k=0), dict(N=-1)],
    "selection": [dict(B=2**31), dict(D=-1), dict(r=8), dict(r=-1)],
    "targets": [dict(B=2**31), dict(N=-1), dict(D=-1), dict(k=-1), dict(r=-1)],
}


@pytest.mark.parametrize("stage", BAD_SIZES)
def test_the_interface_refuses_sizes_that_no_input_has(stage):
    """Before it looks at any memory: here there is none."""
    struct, good = cpu_structs.STRUCTS[stage], dict(B=7, D=5, N=3, k=2, r=2, rows=7, columns=5)
    names = {name for name, _ in struct._fields_}
    for bad in BAD_SIZES[stage]:
        sizes = {name: size for name, size in (good | bad).items() if name in names}
        assert getattr(native.cpu(), f"bcl_cpu_{stage}_f32")(struct(**sizes), 1) == cpu.BAD_SIZE, bad


@pytest.mark.parametrize("struct", cpu_structs.STRUCTS.values(), ids=lambda struct: struct.__name__)
def test_structs_are_laid_out_as_the_library_has_them(struct):
    check_layout(struct, getattr(native.cpu(), f"bcl_cpu_layout_{struct.__name__}"))


def test_what_travels_by_name_is_in_the_order_of_the_structs():
    fields = {name: [field for field, _ in struct._fields_] for name, struct in cpu_structs.STRUCTS.items()}
    assert fields["competition"][3:13] == list(Competition._fields)
    assert fields["targets"][:7] == list(Pull._fields)


def test_nobody_is_near_a_single_feature():
    assert cpu.nearest(torch.ones(3, 1), 5, 8).shape == (3, 0) and cpu.neighbors(torch.ones(1, 4), 8).shape == (1, 0)


def test_bits_do_not_depend_on_the_number_of_threads():
    B, D, N = 1031, 301, 97  # enough work for several threads
    activation, x = columns("random", B, D), columns("random", B, N)
    neighbors, weight = neighbors_of(D, 8), columns("random", D, N)

    def everything():
        won = compete(cpu.competition, activation, neighbors, x=x)
        rows, shares = cpu.selection(activation, None, won.x_inverse_norm, None, won.need, "rank", "hard", 5)
        forces = won.winner_share, won.som_strength
        target = cpu.targets(Pull(x, won.pair_feature, won.pair_pull, rows, shares, *forces))
        gradient = cpu.gradient(activation, won.rank_score, None)
        others = cpu.neighbors(weight, 8), cpu.rank(activation), cpu.inverse_norm(x)
        return *won, rows, target, *gradient, *others

    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything())
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            assert one.equal(other)


@over_instruction_sets()
def test_every_instruction_set_chooses_alike(isa):
    code, output = cpu_builds.python(native.HERE, PROBE.format(isa=isa), BCL_FAST_ISA=isa)
    assert code == 0, output


# --- Under AddressSanitizer and UndefinedBehaviorSanitizer -----------------------------------------------------------

COMPILER = shutil.which("g++")
# Alignment is left out: vectors are loaded from wherever torch put a row, through memcpy.
SANITIZED = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize=alignment", "-fno-sanitize-recover=all"]
OVERRUN = """
import torch
rows, inverse = torch.ones(2, 33), torch.ones(2)
struct = cpu_structs.InverseNorm(rows.data_ptr(), inverse.data_ptr(), stride=33, R=2, N=34)
native.cpu().bcl_cpu_inverse_norm_f32(struct, 1)
"""
FILES = (__file__, *(str(Path(__file__).with_name(f"test_{name}.py")) for name in ("eager", "neighbors")))
CHOSEN = (
    "bounds or outliers or rescue_k or competition or similarities or threads or feature or interface or index "
    "or in_one_call or first_in_any"
)


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory):
    """The folder of a library that looks at every address it uses, and what must be loaded before it."""
    if COMPILER is None:
        pytest.skip("no g++")
    runtimes = [
        subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(map(os.path.isabs, runtimes)):
        pytest.skip("g++ has no sanitizers")
    folder = tmp_path_factory.mktemp("sanitized")
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    flags = "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-fvisibility=hidden", *SANITIZED
    subprocess.run([COMPILER, *flags, *sources, "-o", folder / "_cpu.so"], check=True)
    return folder, " ".join(runtimes)


def under_sanitizers(sanitizers, isa, code, *words):
    """The exit code and output of a process."""
    folder, runtimes = sanitizers
    environment = {"BCL_FAST_ISA": isa, "LD_PRELOAD": runtimes, "ASAN_OPTIONS": "detect_leaks=0"}
    return cpu_builds.python(folder, code, *words, **environment)


@over_instruction_sets()
def test_no_stage_leaves_its_memory(sanitizers, isa):
    code, output = under_sanitizers(sanitizers, isa, TESTS, *FILES, "-k", CHOSEN)
    assert code == 0 and " passed" in output, output[-3000:]


def test_what_leaves_its_memory_is_seen(sanitizers):
    code, output = under_sanitizers(sanitizers, "", OVERRUN)
    assert code != 0 and "heap-buffer-overflow" in output, output[-3000:]


def test_sigmoid_is_as_exact_as_torch_s():
    """Of margins: one feature wins, the other is 0, so that the margin is the activation."""
    x = torch.cat([torch.linspace(0, 1, 20001), torch.linspace(0, 87, 40001)])
    activation = torch.stack([x, torch.zeros_like(x)], dim=1)
    R = compete(cpu.competition, activation, torch.tensor([[1], [0]]), 1.0).rank_score
    truth = torch.stack([x, -x], dim=1).double().sigmoid()
    assert ((R - truth).abs() / truth).max() <= 4e-7  # 3.3 units in the last place
    assert torch.sigmoid(torch.stack([x, -x], dim=1)).sub(truth).abs().div(truth).max() <= 4e-7


def test_a_library_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(native, "CPU_ABI", -1)
    native.cpu.cache_clear()
    try:
        assert "of another version" in cpu.missing()
    finally:
        monkeypatch.undo()
        native.cpu.cache_clear()


def test_a_missing_library_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "HERE", tmp_path)
    native.cpu.cache_clear()
    try:
        assert "was not built" in cpu.missing()
        (tmp_path / "_cpu.so").write_text("no library")
        native.cpu.cache_clear()
        assert "does not load" in cpu.missing()
    finally:
        monkeypatch.undo()
        native.cpu.cache_clear()


def test_training_is_the_reference_s_for_the_first_steps():
    """Then roundings grow: the figures on MNIST hold both to the same ranges."""
    pixels = torch.rand(400, 30, generator=torch.Generator().manual_seed(0))
    images = Images("digits", pixels[:340], pixels[340:], (5, 6))
    options = dict(steps=4, batch_size=64, features=17)
    conditions = (Condition("digits", BCLConfig(som_lr=0.05), backend=who, **options) for who in ("cpu", "reference"))
    for ours, expected in zip(*(trained(one, images, range(4)).rows for one in conditions), strict=True):
        assert ours == pytest.approx(expected, rel=1e-3, abs=1e-5)
