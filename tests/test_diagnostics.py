"""The metrics on cases worked by hand, and the deterministic baselines on MNIST."""

import math
import os
from pathlib import Path

import pytest
import torch
from torch import tensor

from bcl_fast import diagnostics as diag
from bcl_fast import reference as ref
from bcl_fast.experiments.baselines import Baseline, affinity_similarity, measure
from bcl_fast.experiments.data import mnist
from bcl_fast.spec import BCLConfig

MNIST = Path(os.environ.get("BCL_DATA", Path(__file__).parents[2] / "shared" / "data"))


def near(value, expected, tolerance=1e-6):
    assert value == pytest.approx(expected, abs=tolerance)


def test_cosine_of_equal_orthogonal_and_opposite_rows():
    near(diag.row_cosine(tensor([[1.0, 2.0], [2.0, 4.0], [0.5, 1.0]])), 1.0)
    near(diag.row_cosine(torch.eye(4)), 0.0)
    near(diag.row_cosine(tensor([[1.0, 0.0], [-3.0, 0.0]])), -1.0)


def test_antiparallel_rows_hide_from_the_mean_cosine_but_not_from_its_size():
    pairs = tensor([[1.0, 0.0], [-1.0, 0.0], [2.0, 0.0], [-2.0, 0.0]])
    near(diag.row_cosine(pairs), -1 / 3)  # of 12 ordered pairs 4 are parallel and 8 opposite
    near(diag.row_abs_cosine(pairs), 1.0)


def test_a_mixed_case_by_hand():
    rows = tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 5.0]])  # cosines .7071, 0, .7071
    near(diag.row_cosine(rows), 2 * math.sqrt(0.5) / 3)
    near(diag.column_cosine(rows.T), 2 * math.sqrt(0.5) / 3)


def test_zero_rows_have_cosine_zero_and_a_single_row_has_none():
    near(diag.row_cosine(tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])), 1 / 3)
    near(diag.row_abs_cosine(tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])), 1 / 3)
    assert math.isnan(diag.row_cosine(torch.ones(1, 3))) and math.isnan(diag.row_abs_cosine(torch.ones(1, 3)))


@pytest.mark.parametrize("factor", [1e-30, 1e25])
def test_cosines_and_norms_in_any_units(factor):
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    for metric in (diag.row_cosine, diag.row_abs_cosine, diag.column_cosine, diag.column_correlation):
        near(metric(rows * factor), metric(rows))
    norms = diag.force_norms(rows * factor, torch.zeros_like(rows), rows * factor, rows * factor)
    torch.testing.assert_close(norms["gradient"].double() / factor, rows.double().norm(dim=1))
    torch.testing.assert_close(norms["pull"], norms["gradient"])


def test_what_is_not_finite_has_no_rank():
    assert diag.effective_rank(torch.eye(4)) == pytest.approx(4)
    for value in (math.nan, math.inf):
        assert math.isnan(diag.effective_rank(tensor([[1.0, value], [0.0, 1.0]])))


def test_the_most_alike_of_the_neighbors():
    weight = tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 3.0], [-1.0, 0.0]])
    nearest = diag.nearest_cosine(weight, tensor([[1, 3], [2, 0], [0, 1], [2, 2]]))
    near(nearest, [0.99875, 0.99875, 0.049938, 0.0], 1e-5)
    assert diag.redundant(nearest) == 2 and diag.redundant(nearest, above=0.999) == 0


def test_no_square_matrix_gives_the_same_as_all_pairs():
    rows = torch.randn(9, 5, dtype=torch.float64)
    unit = rows / rows.norm(dim=1, keepdim=True)
    cosine = unit @ unit.T
    near(diag.row_cosine(rows), float(cosine.sum() - 9) / 72, 1e-12)
    near(diag.row_abs_cosine(rows), float(cosine.abs().sum() - 9) / 72, 1e-12)


def test_correlation_is_the_cosine_of_centered_columns():
    matrix = tensor([[1.0, 11.0], [2.0, 10.0], [3.0, 9.0]])  # opposite slopes on a shared mean
    near(diag.column_correlation(matrix), -1.0)
    assert diag.column_cosine(matrix) > 0.8
    near(diag.column_correlation(tensor([[1.0, 5.0], [1.0, 6.0]])), 0.0)  # a constant column correlates with nothing


def test_effective_rank():
    near(diag.effective_rank(torch.eye(5)), 5.0)
    near(diag.effective_rank(torch.ones(4, 6)), 1.0, 1e-5)
    near(diag.effective_rank(torch.diag(tensor([3.0, 1.0]))), math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert diag.effective_rank(torch.zeros(3, 3)) == 0.0


def test_counts():
    assert diag.unique_targets(tensor([[1.0, 0.0, 5.0], [2.0, 9.0, 5.0], [0.0, 1.0, 1.0]])) == 2  # 1, 1, and 0 of a tie
    assert diag.alive(tensor([0.0, 0.01, 0.0101, 0.5])) == 2
    assert diag.alive(tensor([0.0, 0.01, 0.0101, 0.5]), above=0.0) == 3
    near(diag.zero_fraction(tensor([[0.0, -0.0], [1e-30, 2.0]])), 0.5)
    near(diag.variation(tensor([1.0, 3.0])), 0.5)


def test_forces_by_hand():
    before = torch.zeros(2, 2)
    pulled = tensor([[3.0, 4.0], [0.0, 0.0]])
    after = tensor([[3.0, 5.0], [0.0, 2.0]])
    norms = diag.force_norms(tensor([[0.0, 1.0], [0.0, 0.0]]), before, pulled, after)
    found = {name: norm.tolist() for name, norm in norms.items()}
    assert found == {"gradient": [1.0, 0.0], "pull": [5.0, 0.0], "adam": [1.0, 2.0]}
    force = diag.forces(norms)
    assert force == {"gradient": 0.5, "pull": 2.5, "adam": 1.5, "adam_over_pull": 0.6, "gradient_over_pull": 0.2}
    still = diag.forces(diag.force_norms(before, before, before, after))
    assert still["pull"] == 0 and math.isnan(still["adam_over_pull"])


def test_step_metrics_come_from_the_record():
    x, weight = torch.rand(30, 12), torch.randn(8, 12)
    neighbors = ref.neighbors(weight, 3)
    record = ref.record(4, x, weight, None, x @ weight.T, neighbors, BCLConfig(affinity="clamped_cosine"))
    metrics = diag.step_metrics(record)
    near(metrics["aff_sim"], diag.column_cosine(record.affinity))
    near(metrics["rp_corr"], diag.column_correlation(record.rescue_pull))
    near(metrics["tgt_sim"], diag.row_cosine(record.rescue_target))
    near(metrics["wt_sim"], diag.row_cosine(weight))
    near(metrics["affinity_zeros"], float((x @ weight.T <= 0).float().mean()))
    near(metrics["effective_win"], 1 / 8)  # an identity: novelty and win rate undo each other
    assert metrics["unique_tgt"] == record.weighted_affinity.argmax(0).unique().numel()
    assert metrics["need_min"] <= metrics["need_max"] < 1


# --- Deterministic baselines -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images():
    if not (MNIST / "MNIST" / "raw").is_dir():
        pytest.skip(f"no MNIST in {MNIST}: set BCL_DATA")
    return mnist(MNIST)


SEEDS = {42: 0.2983, 123: 0.2955, 456: 0.3077, 789: 0.3297, 999: 0.3195}


def test_random_weights_on_mnist(images):
    """A shared mean makes columns of ranks look alike that are not: .747 = mean² / mean square of 0 .. 1."""
    for seed, clamped_cosine in SEEDS.items():
        (row,) = measure(Baseline("mnist", "random-weights", seed), images)["rows"]
        near(row["clamped_cosine"], clamped_cosine, 5e-4)
        near(row["clamped_correlation"], 0.0, 4e-3)
        assert 0.745 - 5e-4 <= row["rank_cosine"] <= 0.750 + 5e-4
        assert -0.008 - 5e-4 <= row["rank_correlation"] <= 0.012 + 5e-4


def test_baselines_of_seed_42_on_mnist(images):
    (row,) = measure(Baseline("mnist", "random-weights", 42), images)["rows"]
    for metric, expected in dict(
        clamped_correlation=0.0015,
        raw_cosine=-0.0030,
        clamped_fraction=0.508,
        image_cosine=0.400,
        image_min=0.049,
        image_max=0.918,
    ).items():
        near(row[metric], expected, 5e-4)


def test_baselines_have_the_reference_s_affinity():
    x, weight = torch.rand(128, 30), torch.randn(64, 30)
    row = affinity_similarity(x, weight)
    key = ref.cosine_key(x @ weight.T, None, ref.inverse_norm(x))
    for rule, name in (("cosine", "raw"), ("clamped_cosine", "clamped"), ("rank", "rank")):
        near(row[f"{name}_cosine"], diag.column_cosine(ref.affinity(key, ref.inverse_norm(weight), rule)), 1e-5)
