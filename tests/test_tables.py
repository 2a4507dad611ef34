"""The tables: every recipe holds what the document prints, every condition runs, and the verdicts are right."""

import json
import math
from pathlib import Path

import pytest

from bcl_fast.experiments import judging, tables
from bcl_fast.experiments.baselines import Baseline, measure
from bcl_fast.experiments.data import digits
from bcl_fast.experiments.formats import as_text
from bcl_fast.experiments.jobs import rows_of
from bcl_fast.experiments.judging import INSIDE, NOT_COMPARABLE, OUTSIDE, judge, measure_cell, value
from bcl_fast.experiments.ranges import RANGES, variant_of
from bcl_fast.experiments.run import Condition, trained
from bcl_fast.experiments.settings import CONTROLS, FIXES, LONG, PULLS, SETTINGS, SHORT, jobs_of
from bcl_fast.experiments.tables import END, Cell

# How many numbers each table of the document prints, counted there.
PUBLISHED = {
    "trace": 53,
    "trajectory": 40,
    "conditions": 21,
    "crossings": 6,
    "clamp": 3,
    "images": 4,
    "need": 5,
    "top-k": 6,
    "hard-top1": 13,
    "rank": 48,
    "rank-vs-clamp": 12,
    "forces-coupled": 9,
    "blend": 6,
    "forces-decoupled": 8,
    "ten-thousand": 66,
    "rescue-k": 15,
    "novelty": 4,
    "baselines": 8,
}


# --- Recipes ----------------------------------------------------------------------------------------------------------


def test_every_number_of_the_document_is_a_cell():
    counts = {name: sum(c.published is not None for c in t.cells) for name, t in tables.DOCUMENT_TABLES.items()}
    assert counts == PUBLISHED
    assert {*tables.ALL, "fixes"} == set(tables.TABLES) and "fixes" not in tables.ALL


def test_recipes_are_consistent():
    for table in tables.TABLES.values():
        assert len({(cell.row, cell.column) for cell in table.cells}) == len(table.cells), table.title
    for cell in (cell for table in tables.TABLES.values() for cell in table.cells):
        assert cell.condition in SETTINGS
        assert cell.reason is None or cell.reason in judging.REASONS
        assert cell.published is None or math.isfinite(float(cell.published))
        steps = SETTINGS[cell.condition].get("steps", 1)
        assert cell.index == END or cell.index < steps
        held_out = cell.metric.startswith("held_out_")
        assert (cell.index == END) if held_out else cell.index == END or cell.index in rows_of(steps)


def test_committed_record_is_of_these_cells_and_ranges():
    """It has both as they were when it was measured: no digit of tables.csv or ranges.csv changes unseen."""
    path = Path(__file__).parents[1] / "bench" / "results" / "tables.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    cells = [(name, cell) for name, table in tables.TABLES.items() for cell in table.cells]
    for row, (name, cell) in zip(rows, cells, strict=True):
        assert (row["table"], row["row"], row["column"]) == (name, cell.row, cell.column)
        assert (row["printed"], row["condition"], row["metric"]) == (cell.published, cell.condition, cell.metric)
        assert cell.index in (row["index"], END)
        span = RANGES.get(variant_of(cell.condition), {}).get(cell.metric, {}).get(cell.index)
        assert row["range"] == (span and list(span)), row


def test_every_reason_is_shown_by_a_measurement():
    """A reason that a recipe gives has rows in the table of explanations; the rest are about runs, not numbers."""
    shown = {cell.row for cell in tables.EXPLANATIONS.cells}
    given = {cell.reason for table in tables.DOCUMENT_TABLES.values() for cell in table.cells} - {None}
    assert given <= shown <= set(judging.REASONS)


def test_step_n_is_the_forward_pass_that_the_document_counts():
    trace, ranked = (tables.TABLES[name].cells for name in ("trace", "rank"))
    assert {(cell.row, cell.index) for cell in trace} >= {("0", 0), ("10", 10), ("29", 29)}
    assert {cell.metric for cell in trace if cell.column == "wt_sim"} == {"wt_sim_post"}
    assert {(cell.row, cell.index) for cell in ranked} >= {("0", 0), ("5", 4), ("300", 299)}
    assert {cell.metric for cell in ranked if cell.column == "wt_sim"} == {"wt_sim"}


def test_every_range_is_of_a_cell():
    cells = {(variant_of(c.condition), c.metric, c.index) for t in tables.TABLES.values() for c in t.cells}
    ranges = {(name, metric, i) for name, metrics in RANGES.items() for metric, spans in metrics.items() for i in spans}
    # No table of the document has tgt_sim and aff_corr of the soft clamp, and most of the hard one:
    # tests/test_ranges.py holds them.
    assert {variant for variant, *_ in ranges - cells} <= {"soft-clamp", "hard-clamp"}


def test_fixes_and_their_controls_are_all_there():
    fixes = {name: setting for group in FIXES.values() for name, setting in group.items()}
    for som_lr in ("0.001", "0.01"):
        for name in PULLS:
            config = fixes[f"{name} ({som_lr})"]["config"]
            assert config.som_lr == float(som_lr) and config.forces == "decoupled"
    assert {fixes[f"A som_lr {som_lr}"]["config"].som_lr for som_lr in (0.005, 0.02, 0.05)} == {0.005, 0.02, 0.05}
    for name in CONTROLS:
        assert fixes[name].get("loss", "l1") == "l1" and fixes[f"{name}, MSE"]["loss"] == "mse"
    assert fixes["mask only"]["config"].som_lr == 0 and fixes["plain"]["config"] is None
    assert all(setting.get("steps", LONG) == LONG for setting in fixes.values())


def test_jobs_of_a_setting():
    assert [job.seed for job in jobs_of("soft-clamp", "mnist", 5)] == [0, 1, 2, 3, 4]
    assert [job.seed for job in jobs_of("plain", "mnist", 5)] == [0, 1, 2]  # 10,000 steps
    assert {job.steps for job in jobs_of("plain", "mnist", 5, most_steps=50)} == {50}
    assert jobs_of("soft-clamp", "digits", 1, device="cuda")[0].device == "cuda"
    assert jobs_of("soft-clamp", "digits", 1)[0].steps == SHORT
    assert jobs_of("random weights", "mnist", 1) == [
        Baseline("mnist", "random-weights", s) for s in (42, 123, 456, 789, 999)
    ]


# --- Every condition runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images():
    pytest.importorskip("sklearn")
    return digits()


@pytest.fixture(scope="module")
def records(images):
    """Condition -> its record after a few steps on digits; settings that make equal runs share one."""
    done = {}

    def record(name):
        job = jobs_of(name, "digits", 1, most_steps=6)[0]
        if job not in done:
            if isinstance(job, Condition):
                done[job] = trained(job, images, rows_of(job.steps)).record()
            else:
                done[job] = measure(job, images)
        return done[job]

    return record


def test_every_recipe_runs(records):
    for name, table in tables.TABLES.items():
        rows = judging.measure_table(name, {c: {0: records(c)} for c in tables.conditions_of(name)}, mnist=False)
        for row, cell in zip(rows, table.cells, strict=True):
            assert (row["table"], row["row"], row["column"]) == (name, cell.row, cell.column)
            assert row["mark"] == NOT_COMPARABLE and row["seeds"] == [0]
            if cell.index <= 5 or "kind" in SETTINGS[cell.condition]:
                assert row["reason"] == ("ours" if cell.published is None else "other data")
                assert row["min"] <= row["median"] <= row["max"] and math.isfinite(row["mean"]), row
            else:
                assert row["reason"] == "not reached" and row["median"] is None
        json.dumps(rows, allow_nan=False)


# --- Verdicts, on made-up records -------------------------------------------------------------------------------------


def test_judge():
    for published, low, high, mark in (
        ("0.322", 0.30, 0.35, INSIDE),
        ("0.322", 0.3224, 0.35, INSIDE),  # .3224 is printed as .322
        ("0.322", 0.3226, 0.35, OUTSIDE),
        ("0.35", 0.30, 0.346, INSIDE),
        ("64", 63, 64, INSIDE),
        ("64", 56, 63, OUTSIDE),
        ("3e3", 2600, 2700, INSIDE),
        ("3e3", 4000, 5000, OUTSIDE),
        ("0.000000", 1e-9, 2e-9, INSIDE),
        ("-0.000", 0.0, 0.001, INSIDE),
    ):
        assert judge(published, low, high) == mark, (published, low, high)


def made_up(*values, metric="aff_sim", step=3):
    return [{"rows": [{"step": step, metric: v}], "held_out": {}, "steps_done": step + 1} for v in values]


def cell(published="0.50", condition="rescue_k 3", metric="aff_sim", index=3, reason=None):
    return Cell("3", metric, condition, index, metric, published, reason)


def test_a_cell_inside_the_spread_of_our_seeds():
    row = measure_cell(cell(), made_up(0.4, 0.6, 0.45))
    assert (row["mark"], row["reason"]) == (INSIDE, None)
    assert (row["published"], row["printed"]) == (0.5, "0.50")
    assert (row["median"], row["min"], row["max"]) == (0.45, 0.4, 0.6) and row["mean"] == pytest.approx(1.45 / 3)
    assert row["range"] is None and row["in_range"] is None


def test_a_cell_outside_says_why():
    near, far = (measure_cell(cell(p), made_up(0.4, 0.45, 0.5)) for p in ("0.55", "0.90"))
    assert (near["mark"], near["reason"]) == (OUTSIDE, "chance")
    assert (far["mark"], far["reason"]) == (OUTSIDE, "unexplained")
    told = measure_cell(cell("0.90", reason="dense"), made_up(0.4, 0.5))
    assert (told["mark"], told["reason"]) == (OUTSIDE, "dense")
    assert measure_cell(cell("0.45", reason="dense"), made_up(0.4, 0.5))["reason"] is None  # it does replicate


def test_cells_that_cannot_be_compared():
    assert measure_cell(cell("0.45", reason="mixed"), made_up(0.4, 0.5))["mark"] == NOT_COMPARABLE
    for row, reason in (
        (measure_cell(cell(), made_up(0.5), mnist=False), "other data"),
        (measure_cell(cell(index=4), made_up(0.5)), "not reached"),
        (measure_cell(cell(metric="tgt_sim"), made_up(0.5)), "not reached"),
        (measure_cell(cell(), made_up(math.nan)), "not reached"),
        (measure_cell(cell(published=None), made_up(0.5)), "ours"),
    ):
        assert (row["mark"], row["reason"]) == (NOT_COMPARABLE, reason)


def test_the_independent_range_widens_ours_and_judges_our_median():
    """decoupled, wt_sim at 299 is known to lie within .851 and .888."""
    of = dict(condition="decoupled", metric="wt_sim", index=299)
    inside = measure_cell(cell("0.887", **of), made_up(0.86, 0.87, metric="wt_sim", step=299))
    assert inside["range"] == (0.851, 0.888) and inside["in_range"] and inside["mark"] == INSIDE
    outside = measure_cell(cell("0.887", **of), made_up(0.6, 0.7, 0.8, metric="wt_sim", step=299))
    assert outside["in_range"] is False and outside["mark"] == INSIDE
    rounded = measure_cell(cell("0.887", **of), made_up(0.8506, metric="wt_sim", step=299))
    assert rounded["in_range"]  # .8506 is .851
    low = measure_cell(cell("0.852", **of), made_up(0.86, 0.87, metric="wt_sim", step=299))
    assert low["mark"] == INSIDE
    rows = [dict(table="t", seeds=[0, 1], **row) for row in (inside, outside)]
    assert judging.outside_of_ranges(rows[:1]) == ([], 1)
    missed, count = judging.outside_of_ranges(rows[1:] + rows[1:])  # the same measurement in two tables counts once
    assert count == 1 and missed == rows[1:]


def test_derived_metrics():
    constant = dict(wt_sim=0.0, need_min=0.1, pull=3.0, gradient=1.5, effective_win=0.25)
    changing = (dict(aff_sim=0.3 + i / 10, wa_sim=0.25 + i / 5, need_max=0.2 + i) for i in range(6))
    rows = [{"step": i, **constant, **row} for i, row in enumerate(changing)]
    record = {"rows": rows, "held_out": {"l1": 0.2}, "steps_done": 6, "condition": {"features": 4}}
    assert value(record, "delta_aff", 3) == pytest.approx(0.1)
    assert value(record, "need_ratio", 1) == pytest.approx(12)
    assert value(record, "wa_gap", 2) == pytest.approx(0.15)
    assert value(record, "pull_over_gradient", 0) == 2 and value(record, "rescue_weight", 0) == 0.75
    assert value(record, "effective_wins", 5) == 1
    assert value(record, "aff_sim>=0.5", 5) == 2 and value(record, "wt_sim>=0.5", 5) == 6
    assert value(record, "held_out_l1", END) == 0.2 and value(record, "aff_sim", END) == 0.8
    assert value(record, "held_out_l1", 5) is None and value(record, "aff_sim", 6) is None


def test_numbers_are_shown_as_they_are_worth_reading():
    for number, metric, text in (
        (0.12345, "wt_sim", "0.123"),
        (41.0, "alive", "41"),
        (3e-7, "gradient", "3.0e-07"),
        (0.0, "pull", "0.000"),
        (2e7, "pull_over_gradient", "2.0e+07"),
        (0.08412, "held_out_l1", "0.0841"),
        (None, "pull", ""),
    ):
        assert as_text(number, metric) == text


# --- Baselines --------------------------------------------------------------------------------------------------------


def test_pca_is_the_best_linear_reconstruction(images):
    from sklearn.decomposition import PCA

    from bcl_fast.experiments.baselines import pca

    model = PCA(n_components=10, svd_solver="full").fit(images.train.double().numpy())
    expected = model.inverse_transform(model.transform(images.held_out.double().numpy())).clip(0, 1)
    error = images.held_out.double().numpy() - expected
    ours = pca(images, 10)
    assert ours["mse"] == pytest.approx((error**2).mean(), rel=1e-6)
    assert ours["l1"] == pytest.approx(abs(error).mean(), rel=1e-6)


def test_bad_baseline_names_the_field():
    for field, bad in dict(kind="ica", data="faces", seed=-1).items():
        with pytest.raises(ValueError, match=f"{field} must be .*, got {bad!r}"):
            Baseline(**{"data": "digits", "kind": "pca", field: bad})
