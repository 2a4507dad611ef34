"""Training on MNIST lands where an independent implementation of each historical variant landed.

The ranges are of 10 seeds, som_lr 0.001, index = 0-based forward pass. Judged is the median of the seeds 0 to 4, fixed
beforehand: at most 10 % of a variant's cells outside, each by less than the range's width. Every miss is listed by
`pytest -rA`.
"""

import json
import os
import statistics
from pathlib import Path

import pytest
from helpers.backends import ON_CPU

from bcl_fast.experiments.data import mnist
from bcl_fast.experiments.formats import decimals
from bcl_fast.experiments.judging import outside_of_ranges
from bcl_fast.experiments.ranges import RANGES
from bcl_fast.experiments.run import Condition, trained
from bcl_fast.spec import BCLConfig

ROOT = Path(__file__).resolve().parents[1]
MNIST = Path(os.environ.get("BCL_DATA", Path(__file__).parents[2] / "shared" / "data"))
SEEDS = range(5)

METRICS = {"aff_sim", "rp_sim", "wt_sim", "wt_sim_post", "tgt_sim", "alive", "aff_corr", "rp_corr", "unique_tgt"}
METRICS |= {"loss", "novelty", "need_min", "need_max", "coverage_cv", "adam_over_pull"}
LAST = 300  # bench/results/tables.json has the longer runs
PRESETS = ("soft-clamp", "hard-clamp", "hard-rank", "decoupled")


def cells_of(preset):
    """(metric, index) -> (low, high) for the metrics that are keys of a row."""
    return {
        (metric, index): span
        for metric, spans in RANGES[preset].items()
        for index, span in spans.items()
        if index <= LAST and metric in METRICS
    }


@pytest.fixture(scope="module")
def images():
    pytest.importorskip("torchvision")
    if not (MNIST / "MNIST" / "raw").is_dir():
        pytest.skip(f"no MNIST in {MNIST}: set BCL_DATA")
    return mnist(MNIST)


# The default preset on every backend, the others on the fastest (None): stages are equal on all, preset by preset.
RUNS = [("soft-clamp", None), ("hard-clamp", None), ("hard-rank", None), *(("decoupled", one) for one in ON_CPU)]


@pytest.mark.parametrize("preset, backend", RUNS)
def test_median_of_five_seeds_is_in_the_ranges(images, preset, backend):
    cells = cells_of(preset)
    indices = {index for _, index in cells}
    config = BCLConfig.preset(preset, som_lr=0.001)
    runs = (Condition("mnist", config, max(indices) + 1, seed, backend=backend) for seed in SEEDS)
    by_step = [{row["step"]: row for row in trained(run, images, indices).rows} for run in runs]
    missed = []
    for (metric, index), (low, high) in cells.items():
        median = round(statistics.median(rows[index][metric] for rows in by_step), decimals(metric))
        if not low <= median <= high:
            missed.append((index, metric, median, (low, high), max(low - median, median - high) < high - low))
    for miss in missed:
        print("outside:", *miss)
    assert all(close for *_, close in missed)
    assert len(missed) <= 0.1 * len(cells)


def test_every_metric_with_a_range_is_looked_at():
    held = {preset: {metric for metric, _ in cells_of(preset)} for preset in PRESETS}
    of_need = {"need_min", "need_max", "coverage_cv"}
    assert held["soft-clamp"] == {"aff_sim", "rp_sim", "wt_sim_post", "tgt_sim", "alive", "aff_corr"} | of_need
    assert held["hard-clamp"] == {"rp_sim", "tgt_sim", "aff_sim", "unique_tgt", "alive"}
    assert held["hard-rank"] >= {"aff_corr", "rp_corr", "tgt_sim", "wt_sim", "unique_tgt", "alive"}
    assert held["decoupled"] >= {"loss", "wt_sim", "tgt_sim", "unique_tgt", "alive", "novelty"}
    assert len(cells_of("decoupled")) == 30 + 4


def test_committed_tables_are_in_the_ranges():
    """At most 10 % of the medians outside, each by less than the range's width; 10,000 steps included."""
    rows = json.loads((ROOT / "bench" / "results" / "tables.json").read_text(encoding="utf-8"))["rows"]
    outside, count = outside_of_ranges(rows)
    assert count >= 200 and len(outside) <= 0.1 * count
    for row in outside:
        (low, high), median = row["range"], round(row["median"], decimals(row["metric"]))
        assert max(low - median, median - high) < high - low, row
