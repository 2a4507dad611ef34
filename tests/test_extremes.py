"""Every backend at the ends of its range: norms whose squares overflow, damaged state, sizes of nothing."""

import pytest
import torch
from helpers.backends import DEVICE, candidates, over_backends, stage

from bcl_fast import BCLConfig, operators
from bcl_fast import reference as ref
from bcl_fast.projection import project_
from bcl_fast.spec import CHOICES
from bcl_fast.structures import Pull
from bcl_fast.testing import columns, compete, neighbors_of, relative_error

DTYPES = (torch.float32, torch.float64)

backend = over_backends()

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


def test_projected_targets_scale_with_the_samples():
    target = columns("random", 7, 10) - 0.3
    for project in (ref.project, project_):
        expected = project(target.clone(), "orthogonal")
        for scale in (2.0**-70, 2.0**63, 2.0**66, 2.0**100):
            assert project(target * scale, "orthogonal").equal(expected * scale)


def chosen_for(backend, x, weight, temperature, affinity):
    """winner, pair_feature and rescue_rows of a training forward on these samples, as the layer asks for them."""
    counters = torch.tensor(1), torch.tensor(0), torch.tensor(0)
    tensors = x, weight, None, x @ weight.T, neighbors_of(weight.shape[0], 4), *counters
    tensors = [None if t is None else t.to(DEVICE[backend]) for t in tensors]
    config = BCLConfig(temperature=temperature, affinity=affinity)
    found = operators.call("statistics_", *tensors, backend, config.statistics)
    return found.winner.cpu(), found.pair_feature.cpu(), found.rescue_rows.cpu().sort(dim=1).values


@pytest.mark.parametrize("backend", ["reference", *(name for name, _ in candidates())])
@pytest.mark.parametrize("affinity", CHOICES["affinity"])
def test_a_batch_in_other_units_has_the_same_winners_and_rescued_samples(backend, affinity):
    """Margins scale too: a temperature in the same units makes the competition the same."""
    x, weight = columns("random", 41, 130), columns("random", 11, 130, seed=1)
    expected = chosen_for(backend, x, weight, 5.0, affinity)
    for factor in (2.0**80, 1e19):
        found = chosen_for(backend, x * factor, weight, 5.0 / factor, affinity)
        assert all(map(torch.equal, found, expected))


# --- Damaged state, hostile sizes -------------------------------------------------------------------------------------

HOSTILE = (-5, -1, -(2**31), -(2**63), 2**31, 2**32 + 1, 2**40, 2**63 - 1)


@pytest.mark.parametrize("backend, dtype", [(name, t) for t in DTYPES for name, _ in candidates(dtype=t)], ids=str)
def test_a_neighbor_that_is_no_feature_counts_as_the_nearest_that_is(backend, dtype):
    D = 13
    for k in (1, 9, 20):  # more than there are others too
        neighbors = neighbors_of(D, 8, seed=3).repeat(1, 3)[:, :k].clone()
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
    competition = stage("competition", backend)
    got, own = (compete(competition, activation, near) for near in (spread[::2, ::3].T, neighbors))
    assert all(map(torch.equal, got, own))


@backend
def test_an_empty_batch_has_no_winners(backend):
    got, own = (
        compete(stage("competition", name), torch.empty(0, 5), neighbors_of(5, 2)) for name in (backend, "reference")
    )
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
