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
    for dtype in (torch.bfloat16, torch.float16):
        grad, mask = columns("random", 37, 19).to(dtype), columns("random", 37, 19, seed=1).sigmoid()
        for soft, expected in ((mask, grad.float() * mask), (None, grad.float())):
            masked, bias = stage("gradient", backend)(grad, soft, None, None, dtype)
            assert masked.dtype == dtype and masked.equal(expected.to(dtype))
            assert bias.dtype == torch.float32 and relative_error(bias, expected.double().sum(dim=0)) <= 1e-6
        assert stage("gradient", backend)(grad, mask, None)[0].equal(grad.float() * mask)


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
