"""Every backend against the reference, stage by stage, by the exactness contract: one body, each backend a parameter.

The contract is `bcl_fast.testing.check_stage`; here is what it is held over.
"""

import pytest
import torch
from helpers.backends import DEVICE, ON_CPU, SLOW, candidates, over_backends, stage
from helpers.stages import check_competition, check_selection, needs, pull_of, vectors
from hypothesis import given, settings
from hypothesis import strategies as st

from bcl_fast import reference as ref
from bcl_fast.projection import project_
from bcl_fast.structures import Pull
from bcl_fast.testing import (
    COLUMNS,
    budget,
    check_stage,
    columns,
    compete,
    neighbors_of,
    octave_needs,
    relative_error,
)

SIZES = [(1, 2, 1), (2, 3, 5), (7, 5, 3), (37, 64, 16), (257, 129, 31), (1024, 512, 784)]
RULES = ("rank", "clamped_cosine", "cosine")

backend = over_backends()
rules = pytest.mark.parametrize("rule", RULES)
on_cpu = pytest.mark.parametrize("backend", [name for name in ON_CPU if name != "reference"])
on_gpu = pytest.mark.parametrize("backend", [name for name, _ in candidates() if DEVICE[name] == "cuda"])


def cases(stage):
    """Every backend that has a stage of its own: float32 at all sizes, float64 at one that no vector divides."""
    rows = [(name, torch.float32, *size) for name, size in candidates(sizes=SIZES, stage=stage)]
    rows += [(name, torch.float64, 61, 67, 31) for name, _ in candidates(dtype=torch.float64, stage=stage)]
    return pytest.mark.parametrize("backend, dtype, B, D, N", rows, ids=str)


def cases_of_kinds(stage):
    """`cases`, and columns: of one kind at every size, of every kind at one size a dtype."""
    rows = [(name, torch.float32, *size, "quantized") for name, size in candidates(sizes=SIZES, stage=stage)]
    for dtype, size in ((torch.float32, (55, 19, 16)), (torch.float64, (61, 67, 31))):
        names = [name for name, _ in candidates(dtype=dtype, stage=stage)]
        rows += [(name, dtype, *size, kind) for name in names for kind in COLUMNS]
    return pytest.mark.parametrize("backend, dtype, B, D, N, kind", dict.fromkeys(rows), ids=str)


# --- Selection and ranks ----------------------------------------------------------------------------------------------


@cases_of_kinds("selection")
def test_selection_is_bit_equal(backend, dtype, B, D, N, kind):
    activation = columns(kind, B, D, dtype)
    rinv, winv, need, bias = vectors(1, B, D, B, D, dtype=dtype)
    if kind == "octaves":  # whose keys are ranks as they are
        rinv, need = torch.ones_like(rinv), octave_needs(B, dtype)
    rules = RULES if B * D < 1e5 else ("rank",)
    for rule in rules:
        check_selection(backend, activation, bias, rinv, winv, need, rule, "hard", 5)
        check_selection(backend, activation, None, torch.ones_like(rinv), winv, None, rule, "soft", 3)


@backend
def test_scores_of_different_needs_that_tie_at_the_boundary(backend):
    """At these numbers of samples the top rank, of the smallest need, has the score of the last sample chosen."""
    for B, rescue_k in ((29, 1), (55, 5), (57, 4), (127, 3)):
        ones = torch.ones(B), torch.ones(19)
        for weighting in ("hard", "soft"):
            check_selection(
                backend, columns("octaves", B, 19), None, *ones, octave_needs(B), "rank", weighting, rescue_k
            )


@backend
@rules
def test_selection_takes_any_rescue_k(backend, rule):
    activation = columns("quantized", 37, 11)
    rinv, winv, need = vectors(2, 37, 11, 37, dtype=torch.float32)
    for rescue_k in (1, 36, 37, 38, 0):
        for weighting in ("hard", "soft"):
            check_selection(backend, activation, None, rinv, winv, need, rule, weighting, rescue_k)


@backend
@rules
def test_selection_under_hostile_needs(backend, rule):
    B, D = 211, 163 if backend not in SLOW else 7  # large enough for every sort a backend may choose
    ascending = torch.arange(1, B + 1, dtype=torch.float32)[:, None].expand(B, D) * 1e-3
    for kind in ("flat", "falling", "log-uniform", "two values", "with nan"):
        for activation in (ascending, columns("quantized", B, D)):
            check_selection(backend, activation, None, torch.ones(B), torch.ones(D), needs(kind, B), rule, "hard", 5)


@backend
@rules
def test_selection_with_nan_and_inf(backend, rule):
    for B, D in ((3, 2), (19, 5), (211, 163 if backend not in SLOW else 7)):
        activation, need = columns("random", B, D), vectors(5, B, dtype=torch.float32)[0]
        odd = torch.rand(B, D, generator=torch.Generator().manual_seed(4))
        for low, value in ((0.0, torch.nan), (0.1, torch.inf), (0.2, -torch.inf), (0.3, -torch.tensor(torch.nan))):
            activation = torch.where((odd >= low) & (odd < low + 0.1), value, activation)
        activation[:, 0] = torch.nan
        for rescue_k in (1, 5, 0):
            check_selection(backend, activation, None, torch.ones(B), torch.ones(D), need, rule, "hard", rescue_k)


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


@cases_of_kinds("rank")
def test_rank_is_bit_equal(backend, dtype, B, D, N, kind):
    check_stage(stage("rank", backend), "rank", [columns(kind, B, D, dtype)])


# --- Competition ------------------------------------------------------------------------------------------------------


@cases_of_kinds("competition")
def test_competition(backend, dtype, B, D, N, kind):
    check_competition(backend, columns(kind, B, D, dtype), neighbors_of(D, 8), x=columns("random", B, N, dtype, seed=1))


@backend
def test_competition_takes_any_number_of_neighbors(backend):
    for k in (1, 2, 7, 28):
        check_competition(backend, columns("random", 17, 29), neighbors_of(29, k), temperature=0.5)


@backend
@pytest.mark.parametrize("forces", ["decoupled", "coupled"])
def test_forces_of_each_feature(backend, forces):
    activation, neighbors = columns("random", 23, 29), neighbors_of(29, 8)
    for rescue_onset, pull_onset in ((0.25, 0.0), (0.0, 0.25), (0.3, 0.2), (1.0, 1.0)):
        onsets = dict(rescue_onset=rescue_onset, pull_onset=pull_onset)
        check_competition(backend, activation, neighbors, forces=forces, **onsets)


@backend
def test_competition_takes_strided_samples(backend):
    activation = columns("random", 2 * 19, 3 * 13)[::2, ::3]
    check_competition(backend, activation, neighbors_of(13, 4), x=columns("random", 7, 19, seed=2).T)


@backend
def test_winner_of_equal_margins_is_the_smallest_index(backend):
    """Also where the equal ones lie in different tiles of the features."""
    activation, neighbors = torch.zeros(3, 300), neighbors_of(300, 2)
    activation[1, [140, 290]] = activation[2, [290, 7]] = 1.0
    assert neighbors[[7, 140]].ne(290).all()
    assert compete(stage("competition", backend), activation, neighbors).winner.tolist() == [0, 140, 7]


@backend
def test_what_an_operator_returns_of_a_competition_has_storage_of_its_own(backend):
    """What operators return may not alias; the rest stays within them."""
    got = compete(stage("competition", backend), columns("random", 19, 13), neighbors_of(13, 4))
    assert all(value.is_contiguous() for value in got)
    returned = got.rank_score, got.winner, got.pair_feature, got.pair_pull, got.winner_share, got.som_strength
    assert len({tensor.untyped_storage().data_ptr() for tensor in returned}) == len(returned)


# --- Targets and pull -------------------------------------------------------------------------------------------------


@cases("targets")
def test_targets_and_pull(backend, dtype, B, D, N):
    pull = pull_of(B, D, N, 8, 5, dtype)
    check_stage(stage("targets", backend), "targets", [pull])
    weight, offset = columns("random", D, N, dtype, seed=9), columns("random", D, N, dtype, seed=10)
    for in_offset in (None, offset):
        given = weight, in_offset, torch.tensor(0.1, dtype=dtype), pull
        check_stage(stage("targets_pull_", backend), "targets_pull_", given)


def test_projection_is_the_reference_s():
    for projection in ("none", "orthogonal", "centered"):
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
            check_stage(stage("targets", backend), "targets", [one])


@over_backends(stage="targets")
def test_targets_take_strided_samples(backend):
    pull = pull_of(22, 7, 10, 3, 5, torch.float32)
    strided = pull._replace(x=torch.empty(10, 44).T[::2].copy_(pull.x))
    assert stage("targets", backend)(strided).equal(stage("targets", backend)(pull))


# --- Gradient ---------------------------------------------------------------------------------------------------------


@cases("gradient")
def test_gradient(backend, dtype, B, D, N):
    grad, mask = columns("random", B, D, dtype), columns("random", B, D, dtype, seed=1).sigmoid()
    winner = torch.arange(B) % D
    for arguments in ((grad, mask, None), (grad, None, winner), (grad, None, None)):
        check_stage(stage("gradient", backend), "gradient", arguments)
    place = mask.clone()
    masked, _ = stage("gradient", backend)(grad, place, None, place)
    assert masked.equal(place) and place.equal(grad * mask)


@over_backends(stage="gradient")
def test_gradient_in_the_dtype_of_its_products(backend):
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
    found = operators.call("statistics_", *tensors, backend, *config.statistics)
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


# --- Neighbors --------------------------------------------------------------------------------------------------------


@cases("neighbors")
def test_neighbors_by_float64_regret(backend, dtype, B, D, N):
    weight = columns("random", D, N, dtype) + 3 * columns("random", 1, N, dtype, seed=1)  # close cosines
    check_stage(stage("neighbors", backend), "neighbors", [weight, 8])


@over_backends(stage="neighbors")
def test_neighbor_choice_is_bit_equal_given_similarities(backend):
    """The product may round as it likes; given its result the choice is the reference's, ties and NaN included."""
    nearest = stage("nearest", backend, beside="neighbors")
    for kind in COLUMNS:
        similarity = columns(kind, 41, 41)
        similarity[3], similarity[:, 3] = torch.nan, torch.nan
        for k, first in ((1, 0), (3, 17), (40, 0)):
            assert nearest(similarity[first:], first, k).equal(ref.nearest(similarity, k)[first:]), kind


@over_backends(stage="neighbors")
def test_neighbors_of_zero_rows(backend):
    weight = columns("random", 6, 4)
    weight[2] = 0
    assert stage("neighbors", backend)(weight, 5).equal(ref.neighbors(weight, 5))


# --- Any shape, any option --------------------------------------------------------------------------------------------


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
    need = octave_needs(B) if kind == "octaves" else own.need
    check_selection(backend, activation, None, rinv, winv, need if weighted else None, rule, weighting, rescue_k)


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
