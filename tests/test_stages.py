"""Every backend against the reference, stage by stage, by the exactness contract: one body, each backend a parameter.

Choices are equal bit by bit given the same inputs; sums stay within budgets judged by float64.
"""

import pytest
import torch
from helpers.backends import DEVICE, ON_CPU, SLOW, candidates, over_backends, stage
from helpers.stages import check_competition, check_selection, doubled, needs, pull_of, vectors
from hypothesis import given, settings
from hypothesis import strategies as st

from bcl_fast import BCLConfig, operators
from bcl_fast import reference as ref
from bcl_fast.projection import project_
from bcl_fast.structures import Pull
from bcl_fast.testing import COLUMNS, budget, columns, compete, neighbors_of, relative_error

SIZES = [(1, 2, 1), (2, 3, 5), (7, 5, 3), (37, 64, 16), (257, 129, 31), (1024, 512, 784)]
RULES = ("rank", "clamped_cosine", "cosine")
DTYPES = (torch.float32, torch.float64)

backend = over_backends()
on_cpu = pytest.mark.parametrize("backend", [name for name in ON_CPU if name != "reference"])
on_gpu = pytest.mark.parametrize("backend", [name for name, _ in candidates() if DEVICE[name] == "cuda"])
kinds = pytest.mark.parametrize("kind", COLUMNS)


def cases(stage, dtypes=DTYPES):
    """Every backend that has a stage of its own, over dtypes and sizes."""
    found = [(t, pair) for t in dtypes for pair in candidates(dtype=t, sizes=SIZES, stage=stage)]
    rows = [(name, dtype, *size) for dtype, (name, size) in found]
    return pytest.mark.parametrize("backend, dtype, B, D, N", rows, ids=str)


@cases("selection")
@kinds
def test_selection_is_bit_equal(backend, B, D, N, kind, dtype):
    activation = columns(kind, B, D, dtype)
    rinv, winv, need, bias = vectors(1, B, D, B, D, dtype=dtype)
    rules = RULES if B * D < 1e5 else ("rank",)
    for rule in rules:
        check_selection(backend, activation, bias, rinv, winv, need, rule, "hard", 5)
        check_selection(backend, activation, None, torch.ones_like(rinv), winv, None, rule, "soft", 3)


@backend
@pytest.mark.parametrize("rescue_k", [1, 2, 36, 37, 38, 0])
@pytest.mark.parametrize("weighting", ["hard", "soft"])
@pytest.mark.parametrize("rule", RULES)
def test_selection_takes_any_rescue_k(backend, rescue_k, weighting, rule):
    activation = columns("quantized", 37, 11)
    rinv, winv, need = vectors(2, 37, 11, 37, dtype=torch.float32)
    check_selection(backend, activation, None, rinv, winv, need, rule, weighting, rescue_k)


@backend
@pytest.mark.parametrize("kind", ["flat", "falling", "log-uniform", "two values", "with nan"])
@pytest.mark.parametrize("rule", RULES)
def test_selection_under_hostile_needs(backend, kind, rule):
    B, D = 211, 163 if backend not in SLOW else 7  # large enough for every sort a backend may choose
    ascending = torch.arange(1, B + 1, dtype=torch.float32)[:, None].expand(B, D) * 1e-3
    need = needs(kind, B)
    for activation in (ascending, columns("quantized", B, D)):
        check_selection(backend, activation, None, torch.ones(B), torch.ones(D), need, rule, "hard", 5)


@backend
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("B, D", [(3, 2), (19, 5), (211, 163)])
def test_selection_with_nan_and_inf(backend, rule, B, D):
    D = min(D, 7) if backend in SLOW else D
    activation = columns("random", B, D)
    odd = torch.rand(B, D, generator=torch.Generator().manual_seed(4))
    for low, value in ((0.0, torch.nan), (0.1, torch.inf), (0.2, -torch.inf), (0.3, -torch.tensor(torch.nan))):
        activation = torch.where((odd >= low) & (odd < low + 0.1), value, activation)
    activation[:, 0] = torch.nan
    ones = torch.ones(B), torch.ones(D)
    for rescue_k in (1, 5, 0):
        check_selection(backend, activation, None, *ones, vectors(5, B, dtype=torch.float32)[0], rule, "hard", rescue_k)


@backend
def test_selection_keeps_outliers_apart(backend):
    """Two outliers would collapse a histogram of equal bins into one."""
    D = 33 if backend not in SLOW else 7
    activation = columns("random", 257, D) * 1e-6
    activation[3], activation[250] = 1e30, -1e30
    ones = torch.ones(257), torch.ones(D)
    check_selection(backend, activation, None, *ones, vectors(6, 257, dtype=torch.float32)[0], "rank", "hard", 5)


@backend
def test_selection_takes_strided_activations(backend):
    activation = columns("quantized", 2 * 67, 3 * 41)[::2, ::3]
    rinv, winv, need = vectors(7, 67, 41, 67, dtype=torch.float32)
    check_selection(backend, activation, None, rinv, winv, need, "rank", "hard", 5)


@cases("rank")
@kinds
def test_rank_is_bit_equal(backend, B, D, N, kind, dtype):
    key = columns(kind, B, D, dtype)
    assert stage("rank", backend)(key).equal(ref.rank(key))


@cases("competition")
@kinds
def test_competition(backend, B, D, N, kind, dtype):
    check_competition(backend, columns(kind, B, D, dtype), neighbors_of(D, 8), x=columns("random", B, N, dtype, seed=1))


@backend
@pytest.mark.parametrize("k", [1, 2, 7, 28])
def test_competition_takes_any_number_of_neighbors(backend, k):
    check_competition(backend, columns("random", 31, 29), neighbors_of(29, k), temperature=0.5)


@backend
@pytest.mark.parametrize("forces", ["decoupled", "coupled"])
@pytest.mark.parametrize("onsets", [(0.0, 0.0), (0.25, 0.0), (0.0, 0.25), (0.3, 0.2), (1.0, 1.0)], ids=str)
def test_forces_of_each_feature(backend, forces, onsets):
    activation, neighbors = columns("random", 61, 29), neighbors_of(29, 8)
    check_competition(backend, activation, neighbors, forces=forces, rescue_onset=onsets[0], pull_onset=onsets[1])


@backend
def test_competition_takes_strided_samples(backend):
    activation = columns("random", 2 * 19, 3 * 13)[::2, ::3]
    check_competition(backend, activation, neighbors_of(13, 4), x=columns("random", 7, 19, seed=2).T)


@backend
def test_winner_of_equal_margins_is_the_smallest_index(backend):
    activation = torch.zeros(3, 5)
    assert compete(stage("competition", backend), activation, neighbors_of(5, 2)).winner.tolist() == [0, 0, 0]


@cases("targets")
def test_targets_and_pull(backend, B, D, N, dtype):
    pull = pull_of(B, D, N, 8, 5, dtype)
    own, truth = ref.targets(pull), ref.targets(doubled(pull))
    assert relative_error(stage("targets", backend)(pull), truth) <= budget(own, truth)
    for in_offset in (False, True):
        results = []
        for name, cast in ((backend, dtype), ("reference", dtype), ("reference", torch.float64)):
            weight = columns("random", D, N, dtype, seed=9).to(cast)
            offset = columns("random", D, N, dtype, seed=10).to(cast) if in_offset else None
            before = weight.clone()
            exact = doubled(pull) if cast == torch.float64 else pull
            stage("targets_pull_", name)(weight, offset, torch.tensor(0.1, dtype=cast), exact)
            assert not in_offset or weight.equal(before)
            results.append(offset if in_offset else weight)
        assert relative_error(results[0], results[2]) <= budget(results[1], results[2])


@pytest.mark.parametrize("projection", ["none", "orthogonal", "centered"])
def test_projection_is_the_reference_s(projection):
    for D, N in ((7, 5), (2, 1), (29, 37)):
        target = columns("random", D, N) + 0.5
        own, truth = ref.project(target, projection), ref.project(target.double(), projection)
        # Measured on the scale of what is projected: with N = 1 nothing but roundings is left of it.
        shift = (target.double() - truth).float()
        got = project_(target.clone(), projection)
        assert relative_error(got + shift, target) <= budget(own + shift, target)


@over_backends(stage="targets")
def test_targets_of_the_whole_batch_and_of_features_nobody_won(backend):
    for B in (13, 41):
        pull = pull_of(B, 7, 5, 3, 0, torch.float32)
        all_to_one = torch.full_like(pull.pair_feature[:, :1], 2), pull.pair_pull[:, :1]  # others' winner target is 0
        for one in (pull, pull._replace(pair_feature=all_to_one[0], pair_pull=all_to_one[1])):
            assert relative_error(stage("targets", backend)(one), ref.targets(doubled(one))) <= 1e-5


@over_backends(stage="targets")
def test_targets_take_strided_samples(backend):
    pull = pull_of(22, 7, 10, 3, 5, torch.float32)
    strided = pull._replace(x=torch.empty(10, 44).T[::2].copy_(pull.x))
    assert stage("targets", backend)(strided).equal(stage("targets", backend)(pull))


@cases("gradient")
def test_gradient(backend, B, D, N, dtype):
    grad, mask = columns("random", B, D, dtype), columns("random", B, D, dtype, seed=1).sigmoid()
    winner = torch.arange(B) % D
    for arguments in ((grad, mask, None), (grad, None, winner), (grad, None, None)):
        masked, bias = stage("gradient", backend)(*arguments)
        own, own_bias = ref.gradient(*arguments)
        assert masked.equal(own)
        truth = own.double().sum(dim=0)
        assert relative_error(bias, truth) <= budget(own_bias, truth)
    place = mask.clone()
    masked, _ = stage("gradient", backend)(grad, place, None, place)
    assert masked.equal(place) and place.equal(grad * mask)


@over_backends(stage="gradient")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_in_the_dtype_of_its_products(backend, dtype):
    """Low-precision gradients are masked and summed in float32, and rounded once."""
    grad, mask = columns("random", 37, 19).to(dtype), columns("random", 37, 19, seed=1).sigmoid()
    for soft, expected in ((mask, grad.float() * mask), (None, grad.float())):
        masked, bias = stage("gradient", backend)(grad, soft, None, None, dtype)
        assert masked.dtype == dtype and masked.equal(expected.to(dtype))
        assert bias.dtype == torch.float32 and relative_error(bias, expected.double().sum(dim=0)) <= 1e-6
    assert stage("gradient", backend)(grad, mask, None)[0].equal(grad.float() * mask)


@cases("neighbors", dtypes=DTYPES[:1])
def test_neighbors_by_float64_regret(backend, dtype, B, D, N):
    weight = columns("random", D, N) + 3 * columns("random", 1, N, seed=1)  # close cosines
    near = stage("neighbors", backend)(weight, 8)
    assert near.shape == (D, min(8, D - 1)) and near.dtype == torch.int64
    cosine = ref.cosine_similarity(weight.double())
    assert not (near == torch.arange(D)[:, None]).any()
    assert (near.sort(dim=1).values.diff(dim=1) > 0).all()
    best = cosine.clone().fill_diagonal_(-torch.inf).sort(dim=1, descending=True).values[:, : near.shape[1]]
    regret = (best - cosine.gather(1, near)).clamp(min=0)
    assert float(regret.max()) <= 1e-6


# --- The whole range of a dtype ---------------------------------------------------------------------------------------


# Powers of two: no rounding differs. Squares leave float32 at 2^64 and float64 at 2^512.
EXPONENTS = {torch.float32: (0, 30, 63, 64, 65, 90, 126), torch.float64: (0, 300, 511, 512, 513, 800, 1022)}


def every_dtype(**options):
    """Parametrize a test over `name`, a backend or the reference, and the dtypes that it serves."""
    rows = [(name, t) for t in DTYPES for name in ["reference", *(n for n, _ in candidates(dtype=t, **options))]]
    return pytest.mark.parametrize("name, dtype", rows, ids=str)


def scaled_rows(dtype, N=50):
    """Rows of many magnitudes, and what 1 / (|row| + eps) is, each told from the same row near 1."""
    exponents = EXPONENTS[dtype]
    near_one = columns("random", len(exponents), N, torch.float64).clamp(-1.5, 1.5).to(dtype)
    inverse = 1 / torch.linalg.vector_norm(near_one.double(), dim=1)  # eps = 1e-8 is within the tolerance
    scale = torch.tensor([2.0**e for e in exponents], dtype=torch.float64)
    return (near_one.double() * scale[:, None]).to(dtype), inverse, scale


def check_inverse_norms(found, inverse, scale):
    assert found.dtype in EXPONENTS
    error = (found.double() * scale / inverse - 1).abs()  # a norm may be out of range where its inverse is not
    assert (error <= torch.where(found < torch.finfo(found.dtype).tiny, 1e-3, 1e-6)).all(), error


@every_dtype()
def test_norms_whose_squares_are_out_of_range(name, dtype):
    rows, inverse, scale = scaled_rows(dtype)
    check_inverse_norms(stage("inverse_norm", name)(rows), inverse, scale)
    B = len(rows)
    for x in (rows, rows.T.contiguous().T):
        won = compete(stage("competition", name), columns("random", B, 5, dtype), neighbors_of(5, 2), x=x)
        check_inverse_norms(won.x_inverse_norm, inverse, scale)


@backend
def test_norms_of_rows_with_nan_and_inf(backend):
    rows = columns("random", 6, 33)
    rows[1, 3], rows[2, 4], rows[3, 5], rows[4] = torch.inf, -torch.inf, torch.nan, 1e30
    rows[3, 6] = torch.inf
    won = compete(stage("competition", backend), columns("random", 6, 5), neighbors_of(5, 2), x=rows)
    for found in (stage("inverse_norm", backend)(rows), won.x_inverse_norm):
        assert found[1] == 0 and found[2] == 0 and found[3].isnan()
        torch.testing.assert_close(found[[0, 4, 5]], ref.inverse_norm(rows.double())[[0, 4, 5]].float())


@every_dtype(stage="neighbors")
def test_neighbors_do_not_depend_on_the_features_norms(name, dtype):
    weight = columns("random", 37, 19, dtype) + 0.5
    scale = torch.tensor([2.0 ** EXPONENTS[dtype][d % 6] for d in range(37)], dtype=dtype)
    find = stage("neighbors", name)
    assert find(weight * scale[:, None], 8).equal(find(weight, 8))


@over_backends(stage="neighbors")
def test_neighbors_of_features_with_nan_and_inf(backend):
    weight = columns("random", 23, 9)
    weight[2, 3], weight[11, 5], weight[5] = torch.inf, torch.nan, 1e25
    assert stage("neighbors", backend)(weight, 22).equal(ref.neighbors(weight, 22))


@pytest.mark.parametrize("exponent", [-70, 63, 66, 100])
def test_projected_targets_scale_with_the_samples(exponent):
    target = columns("random", 7, 10) - 0.3
    for project in (ref.project, project_):
        expected = project(target.clone(), "orthogonal") * 2.0**exponent
        assert project(target * 2.0**exponent, "orthogonal").equal(expected)


def chosen_for(backend, x, weight, temperature, affinity):
    """winner, pair_feature and rescue_rows of a training forward on these samples, as the layer asks for them."""
    counters = torch.tensor(1), torch.tensor(0), torch.tensor(0)
    tensors = x, weight, None, x @ weight.T, neighbors_of(weight.shape[0], 4), *counters
    tensors = [None if t is None else t.to(DEVICE[backend]) for t in tensors]
    config = BCLConfig(temperature=temperature, affinity=affinity)
    found = operators.operator("statistics_", tensors[0])(*tensors, backend, *config.statistics)
    return found.winner.cpu(), found.pair_feature.cpu(), found.rescue_rows.cpu().sort(dim=1).values


@pytest.mark.parametrize("backend", ["reference", *(name for name, _ in candidates())])
@pytest.mark.parametrize("affinity", RULES)
@pytest.mark.parametrize("factor", [2.0**63, 2.0**80, 1e19])
def test_a_batch_in_other_units_has_the_same_winners_and_rescued_samples(backend, affinity, factor):
    """Margins scale too: a temperature in the same units makes the competition the same."""
    x, weight = columns("random", 41, 130), columns("random", 11, 130, seed=1)
    expected = chosen_for(backend, x, weight, 5.0, affinity)
    for found, same in zip(chosen_for(backend, x * factor, weight, 5.0 / factor, affinity), expected, strict=True):
        assert found.equal(same)


# --- Damaged state, hostile sizes -------------------------------------------------------------------------------------

HOSTILE = (-5, -1, -(2**31), -(2**63), 2**31, 2**32 + 1, 2**40, 2**63 - 1)


@backend
@pytest.mark.parametrize("k", [1, 3, 9, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_neighbor_that_is_no_feature_counts_as_the_nearest_that_is(backend, k, dtype):
    if (backend, None) not in candidates(dtype=dtype):
        pytest.skip("float32 only")
    D = 13
    neighbors = neighbors_of(D, 8, seed=3).repeat(1, 3)[:, :k].clone()  # more than there are others too
    places = torch.randperm(D * k, generator=torch.Generator().manual_seed(4))[: D * k // 2]
    hostile = torch.tensor([*HOSTILE, D, D + 1])
    neighbors.view(-1)[places] = hostile[torch.arange(len(places)) % len(hostile)]
    inside = neighbors.clamp(0, D - 1)
    activation, x = columns("quantized", 29, D, dtype), columns("random", 29, 7, dtype)
    before = neighbors.clone()
    got, same = (compete(stage("competition", backend), activation, near, x=x) for near in (neighbors, inside))
    own = compete(ref.competition, activation, neighbors, x=x)
    assert all(map(torch.equal, got, same)) and neighbors.equal(before)
    assert got.winner.equal(own.winner) and got.pair_feature.equal(own.pair_feature)
    assert all(relative_error(mine, right) <= 1e-5 for mine, right in zip(got, own, strict=True))


@backend
def test_neighbors_of_another_layout_are_read_as_they_are(backend):
    neighbors = neighbors_of(13, 4)
    activation = columns("random", 9, 13)
    spread = torch.full((8, 39), -1)
    spread[::2, ::3] = neighbors.T
    got, own = (
        compete(stage("competition", backend), activation, near) for near in (spread[::2, ::3].T, neighbors)
    )  # fmt: skip
    assert all(map(torch.equal, got, own))


@over_backends(stage="gradient")
def test_a_masked_gradient_goes_where_it_is_asked_for(backend):
    grad, mask, spread = columns("random", 9, 13), columns("random", 9, 13, seed=1).sigmoid(), torch.zeros(26, 18).T
    place = spread[::2, ::2].copy_(mask)
    masked, total = stage("gradient", backend)(grad, place, None, place)
    assert place.equal(grad * mask) and masked.equal(place) and relative_error(total, place.sum(dim=0)) <= 1e-6
    assert spread[1::2].count_nonzero() == 0 and spread[:, 1::2].count_nonzero() == 0


@backend
def test_an_empty_batch_has_no_winners(backend):
    got, own = (compete(stage("competition", name), torch.empty(0, 5), neighbors_of(5, 2)) for name in
                (backend, "reference"))  # fmt: skip
    torch.testing.assert_close(got, own, equal_nan=True)
    none = torch.empty(0)
    for rule, weighting in (("rank", "hard"), ("cosine", "soft")):
        given = torch.empty(0, 5), None, none, torch.ones(5), none, rule, weighting, 3
        rows, shares = stage("selection", backend)(*given)
        assert rows.shape == shares.shape == (5, 0)


@backend
def test_two_features_no_neighbors_no_inputs_do_no_harm(backend):
    """An error or a result, but nothing out of bounds: the interpreter and the sanitizers look at every address."""

    def attempt(name, *arguments):
        try:
            stage(name, backend)(*arguments)
        except (IndexError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
            assert "outside" not in str(error), error

    sizes = (0, 5, 3, 2), (3, 1, 3, 0), (3, 1, 3, 1), (3, 0, 3, 1), (3, 5, 0, 2), (3, 5, 3, 9), (3, 5, 3, 0)
    for B, D, N, k in sizes:
        activation, x = columns("random", B, D), columns("random", B, N)
        attempt("competition", activation, torch.zeros(D, k, dtype=torch.int64), 5.0, x, "decoupled", 0.0, 0.0)
        attempt("neighbors", columns("random", D, N), 8)
        attempt("rank", activation)
        attempt("gradient", activation, activation, None)
        for r in (0, 1, B, B + 1):
            pairs = torch.zeros(B, k, dtype=torch.int64), torch.zeros(B, k)
            rescue = torch.zeros(D, r, dtype=torch.int64), torch.zeros(D, r)
            attempt("targets", Pull(x, *pairs, *rescue, torch.ones(D), torch.ones(D)))


@over_backends(stage="neighbors")
@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("k", [1, 3, 40])
def test_neighbor_choice_is_bit_equal_given_similarities(backend, kind, k):
    """The product may round as it likes; given its result the choice is the reference's, ties and NaN included."""
    nearest = stage("nearest", backend, beside="neighbors")
    similarity = columns(kind, 41, 41)
    similarity[3], similarity[:, 3] = torch.nan, torch.nan
    assert nearest(similarity, 0, k).equal(ref.nearest(similarity, k))
    assert nearest(similarity[17:], 17, k).equal(ref.nearest(similarity, k)[17:])


@over_backends(stage="neighbors")
def test_neighbors_of_zero_rows(backend):
    weight = columns("random", 6, 4)
    weight[2] = 0
    assert stage("neighbors", backend)(weight, 5).equal(ref.neighbors(weight, 5))


def any_options(**sizes):
    return given(
        B=st.integers(1, 70),
        rule=st.sampled_from(RULES),
        weighting=st.sampled_from(["hard", "soft"]),
        kind=st.sampled_from(COLUMNS),
        weighted=st.booleans(),
        seed=st.integers(0, 2**31),
        **sizes,
    )


@on_cpu
@settings(max_examples=60)
@any_options(D=st.integers(2, 40), k=st.integers(1, 45), rescue_k=st.integers(0, 80))
def test_any_shape_and_option(backend, **drawn):
    check_any_shape(backend, **drawn)


@on_gpu
@settings(max_examples=30)
@any_options(D=st.sampled_from([2, 9, 40]), k=st.sampled_from([2, 8, 45]), rescue_k=st.sampled_from([0, 1, 5, 31, 33]))
def test_any_batch_and_option_on_a_gpu(backend, **drawn):
    """Triton compiles for each number of neighbors, and for powers of two of samples: a few of each."""
    check_any_shape(backend, **drawn)


def check_any_shape(backend, B, D, k, rescue_k, rule, weighting, kind, weighted, seed):
    activation, neighbors = columns(kind, B, D, seed=seed), neighbors_of(D, k, seed)
    got, own = (compete(stage("competition", name), activation, neighbors) for name in (backend, "reference"))
    assert got.winner.equal(own.winner)
    own.som_strength.add_(1)  # 1 - novelty may be all but nothing: its error is measured on the scale of novelty
    got.som_strength.add_(1)
    assert all(relative_error(mine, right) <= 1e-5 for mine, right in zip(got, own, strict=True))
    rinv, winv = vectors(seed, B, D, dtype=torch.float32)
    need = own.need if weighted else None
    check_selection(backend, activation, None, rinv, winv, need, rule, weighting, rescue_k)


@on_cpu
def test_no_tensor_of_three_dimensions_and_no_second_product(backend):
    """The scheme's promise: nothing of B * D * k elements, one sort, no product but the layer's own."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        largest, names = 0, []

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            out = function(*arguments, **(options or {}))
            self.names.append(function.overloadpacket.__name__)
            for tensor in torch.utils._pytree.tree_leaves(out):
                if torch.is_tensor(tensor):
                    self.largest = max(self.largest, tensor.numel())
            return out

    B, D, N, k = 96, 64, 48, 8
    activation, neighbors = columns("random", B, D), neighbors_of(D, k)
    x = columns("random", B, N)
    with Watch() as watch:
        won = compete(stage("competition", backend), activation, neighbors, x=x)
        chosen = stage("selection", backend)(activation, None, won.x_inverse_norm, None, won.need, "rank", "hard", 5)
        forces = won.winner_share, won.som_strength
        stage("targets", backend)(Pull(x, won.pair_feature, won.pair_pull, *chosen, *forces))
    assert watch.largest <= max(B * D, D * N, B * N)
    assert not {"mm", "addmm", "bmm"} & set(watch.names)
    assert sum(name.startswith("sort") for name in watch.names) <= 2  # of the keys, and of the B * k winner pairs
