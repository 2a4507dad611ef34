"""Every table of the research document as a short piece of data, and how a cell of it is measured and judged.

The document's clamp tables call forward pass N "step N" and show the weights after its update; its rank and decoupled
tables call pass N - 1 "step N" and show the weights before it (`before`). `index` is always the 0-based forward pass.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from .ranges import RANGES, digits
from .settings import FIXES

Record = Mapping[str, Any]
END = -1  # the last row of a run, or its state in the end
INSIDE, OUTSIDE, NOT_COMPARABLE = MARKS = ("inside", "outside", "not comparable")


@dataclass(frozen=True)
class Cell:
    """One number of a table: what the document prints, and which measurement of ours stands beside it."""

    row: str
    column: str
    condition: str  # a name of SETTINGS
    index: int  # of the forward pass, or END
    metric: str  # a key of a record's rows, of DERIVED, or held_out_ and a key of its `held_out`
    published: str | None = None  # as printed: its last digit tells how exact it is
    reason: str | None = None  # a key of REASONS: why it does not replicate, or why it cannot be compared


@dataclass(frozen=True)
class Table:
    """A table of the document, or one of our own."""

    title: str
    cells: tuple[Cell, ...]
    heading: str = "step"  # what its rows are


def here(step: int) -> int:
    """The clamp tables: step N is forward pass N."""
    return step


def before(step: int) -> int:
    """The rank and decoupled tables: step N is forward pass N - 1."""
    return max(step - 1, 0)


def grid(
    text: str,
    condition: str | Mapping[str, str],
    index: Callable[[int], int] = here,
    metrics: Mapping[str, str] | None = None,
    reasons: Mapping[str, str] | None = None,
) -> tuple[Cell, ...]:
    """Cells from a text: a first line of headings, then per line a step and what the document prints; `-` for nothing.

    `condition` is one for all or by heading; `metrics` are those of headings that are not metrics themselves; `reasons`
    go by heading, or by `heading@step`.
    """
    metrics, reasons = metrics or {}, reasons or {}
    heading, *lines = text.strip().splitlines()
    cells = []
    for line in lines:
        step, *values = line.split()
        for column, value in zip(heading.split(), values, strict=True):
            if value != "-":
                name = condition if isinstance(condition, str) else condition[column]
                reason = reasons.get(f"{column}@{step}", reasons.get(column))
                cells.append(Cell(step, column, name, index(int(step)), metrics.get(column, column), value, reason))
    return tuple(cells)


# --- The document's tables, in its order ------------------------------------------------------------------------------

POST = {"wt_sim": "wt_sim_post"}
DECOUPLED_LONG = "decoupled (0.001)"

DOCUMENT_TABLES: dict[str, Table] = {
    "trace": Table(
        "Step-by-step trace of the first 30 steps (soft clamp)",
        grid(
            """
               aff_sim wa_sim rp_sim wt_sim alive delta_aff
            0  0.322   0.320  0.065  -0.000 64    -
            1  0.381   0.379  0.067  0.001  64    0.059
            2  0.448   0.448  0.078  0.002  64    0.067
            3  0.518   0.515  0.103  0.005  64    0.069
            5  0.636   0.638  0.120  0.014  64    0.063
            10 0.813   0.815  0.167  0.060  48    0.024
            15 0.901   0.903  0.285  0.128  40    0.009
            25 0.954   0.955  0.329  0.258  32    0.002
            29 0.964   0.965  0.317  0.299  31    0.001
            """,
            "soft-clamp",
            metrics=POST,
        ),
    ),
    "trajectory": Table(
        "Extended trajectory (soft clamp)",
        grid(
            """
                aff_sim wa_sim rp_sim wt_sim alive
            0   0.322   0.320  0.065  -0.000 64
            5   0.636   0.638  0.120  0.014  64
            10  0.813   0.815  0.167  0.060  48
            25  0.954   0.955  0.329  0.258  32
            50  0.979   0.981  0.426  0.470  18
            100 0.988   0.988  0.573  0.706  5
            200 0.990   0.990  0.484  0.846  25
            300 0.991   0.991  0.510  0.885  21
            """,
            "soft-clamp",
            metrics=POST,
        ),
    ),
    "conditions": Table(
        "Cross-condition comparison of aff_sim: som_lr 1e-4 (micro), 3e-4 (tiny), 1e-3 (slow)",
        grid(
            """
                bcl-micro bcl-tiny bcl-slow
            0   0.338     0.322    0.307
            5   0.357     0.394    0.578
            10  0.411     0.483    0.763
            25  0.451     0.637    0.945
            50  0.510     0.806    0.980
            100 0.710     0.952    0.987
            300 0.903     0.976    0.991
            """,
            {"bcl-micro": "bcl-micro", "bcl-tiny": "bcl-tiny", "bcl-slow": "soft-clamp"},
            metrics=dict.fromkeys(("bcl-micro", "bcl-tiny", "bcl-slow"), "aff_sim"),
        ),
    ),
    "crossings": Table(
        "The first step at which a similarity reaches a threshold (30: not within the first 30 steps)",
        tuple(
            Cell(threshold, metric, "soft-clamp", 29, f"{POST.get(metric, metric)}>={threshold}", published)
            for threshold, *steps in (("0.5", "3", "30"), ("0.7", "7", "30"), ("0.9", "15", "30"))
            for metric, published in zip(("aff_sim", "wt_sim"), steps, strict=True)
        ),
        heading="threshold",
    ),
    "clamp": Table(
        "Affinity columns of random weights with and without the clamp, and the fraction clamped",
        (
            Cell("without clamp", "column cosine", "random weights 42", 0, "raw_cosine", "-0.003"),
            Cell("with clamp", "column cosine", "random weights 42", 0, "clamped_cosine", "0.298"),
            Cell("with clamp", "fraction clamped", "random weights 42", 0, "clamped_fraction", "0.508"),
        ),
        heading="affinity",
    ),
    "images": Table(
        "Image statistics: pairwise cosine in a batch, and the clamped affinity of uniform noise",
        (
            Cell("mean", "MNIST images", "random weights 42", 0, "image_cosine", "0.400"),
            Cell("min", "MNIST images", "random weights 42", 0, "image_min", "0.049"),
            Cell("max", "MNIST images", "random weights 42", 0, "image_max", "0.918"),
            Cell("column cosine", "uniform images", "uniform images", 0, "clamped_cosine", "0.265"),
        ),
        heading="cosine",
    ),
    "need": Table(
        "The flatness of image_need (soft clamp)",
        (
            Cell("0", "need, least", "soft-clamp", 0, "need_min", "0.042"),
            Cell("0", "need, largest", "soft-clamp", 0, "need_max", "0.066"),
            Cell("0", "ratio", "soft-clamp", 0, "need_ratio", "1.57"),
            Cell("50", "coverage CV", "soft-clamp", 50, "coverage_cv", "0.41"),
            Cell("0-300", "largest |wa_sim - aff_sim|", "soft-clamp", 300, "wa_gap", "0.002", "wa-gap"),
        ),
    ),
    "top-k": Table(
        "What top-8 does to column similarity (soft clamp)",
        grid(
            """
               wa_sim rp_sim
            0  0.320  0.065
            25 0.955  0.329
            50 0.981  0.426
            """,
            "soft-clamp",
        ),
    ),
    "hard-top1": Table(
        "Fix attempt 1, hard top-1 (clamp): old is soft top-8",
        grid(
            """
                rp_sim_old rp_sim_new tgt_sim_old tgt_sim_new aff_sim_new
            0   0.065      0.011      0.99        0.38        -
            50  0.426      0.435      0.99        0.78        0.98
            300 0.510      0.342      0.99        0.74        -
            """,
            {
                f"{m}_{which}": name
                for m in ("rp_sim", "tgt_sim", "aff_sim")
                for which, name in (("old", "soft-clamp"), ("new", "hard-clamp"))
            },
            metrics={f"{m}_{which}": m for m in ("rp_sim", "tgt_sim", "aff_sim") for which in ("old", "new")},
            reasons={"tgt_sim_old": "dense"},
        ),
    ),
    "rank": Table(
        "Fix attempt 2, rank affinity and hard top-1",
        grid(
            """
                aff_corr rp_corr tgt_sim wt_sim unique_tgt alive
            0   -0.001   0.026   0.470   -0.001 24         64
            5   0.041    0.092   0.620   0.007  21         64
            10  0.161    0.213   0.699   0.034  20         64
            25  0.414    0.185   0.601   0.197  13         64
            50  0.569    0.216   0.678   0.425  12         64
            100 0.652    0.271   0.680   0.678  6          64
            200 0.688    0.458   0.808   0.827  9          64
            300 0.666    0.444   0.765   0.863  7          64
            """,
            "hard-rank",
            before,
            reasons={"alive": "threshold"}
            | {f"{m}@{s}": "slower" for m in ("aff_corr", "wt_sim") for s in (10, 25, 50)},
        ),
    ),
    "rank-vs-clamp": Table(
        "Rank against clamp at step 300",
        (
            Cell("aff column corr", "clamp", "soft-clamp", 300, "aff_corr", "0.99", "mixed"),
            Cell("aff column corr", "rank", "hard-rank", 299, "aff_corr", "0.67"),
            Cell("rescue_pull corr", "clamp", "soft-clamp", 300, "rp_corr", "0.51", "mixed"),
            Cell("rescue_pull corr", "rank", "hard-rank", 299, "rp_corr", "0.44"),
            Cell("target similarity", "clamp", "soft-clamp", 300, "tgt_sim", "0.99", "dense"),
            Cell("target similarity", "rank", "hard-rank", 299, "tgt_sim", "0.77"),
            Cell("weight similarity", "clamp", "soft-clamp", 300, "wt_sim_post", "0.89"),
            Cell("weight similarity", "rank", "hard-rank", 299, "wt_sim", "0.86"),
            Cell("features alive", "clamp", "soft-clamp", 300, "alive", "21"),
            Cell("features alive", "rank", "hard-rank", 299, "alive", "64", "threshold"),
            Cell("unique rescue targets", "clamp", "soft-clamp", 300, "unique_tgt", "1"),
            Cell("unique rescue targets", "rank", "hard-rank", 299, "unique_tgt", "7"),
        ),
        heading="metric",
    ),
    "forces-coupled": Table(
        "Finding 6, the forces before decoupling (rank, hard top-1): norms per feature",
        grid(
            """
                gradient pull  pull_over_gradient
            0   0.000003 0.011 3e3
            50  0.000000 0.010 1e7
            100 0.000000 0.010 4e6
            """,
            "hard-rank",
            reasons={"gradient": "adam-eps", "pull_over_gradient": "adam-eps"},
        ),
    ),
    "blend": Table(
        "Finding 6, the blend weights (rank, hard top-1)",
        grid(
            """
               effective_win rescue_weight
            0  0.016         0.984
            10 0.016         0.984
            50 0.016         0.984
            """,
            "hard-rank",
        ),
    ),
    "forces-decoupled": Table(
        "Fix attempt 3, decoupled forces: the move by Adam over the pull, per step",
        grid(
            """
                before  after
            5   0.00001 7.4
            50  0.00001 34.2
            100 0.00001 51.6
            300 0.00001 107.7
            """,
            {"before": "hard-rank", "after": "decoupled"},
            metrics={"before": "adam_over_pull", "after": "adam_over_pull"},
            reasons={"before": "raw-gradient", "after": "force-ratio"},
        ),
    ),
    "ten-thousand": Table(
        "The 10,000-step trajectory (decoupled, rescue_k 5)",
        grid(
            """
                  loss  wt_sim tgt_sim unique_tgt alive novelty
            0     0.474 0.000  0.760   28         64    0.052
            10    0.400 0.046  0.833   15         64    0.082
            50    0.127 0.488  0.877   10         64    0.099
            100   0.124 0.674  0.924   6          64    0.177
            300   0.112 0.857  0.852   9          64    0.075
            500   0.110 0.867  0.833   12         64    0.053
            1000  0.094 0.871  0.857   9          64    0.052
            2000  0.093 0.909  0.933   11         64    0.082
            3000  0.091 0.941  0.906   10         58    0.061
            5000  0.093 0.946  0.951   6          64    0.049
            10000 0.096 0.945  0.955   4          64    0.082
            """,
            DECOUPLED_LONG,
            before,
            reasons={"alive": "threshold", "loss@500": "noisy", "loss@5000": "ticks-up", "loss@10000": "ticks-up"},
        ),
    ),
    "rescue-k": Table(
        "rescue_k at 300 steps (decoupled)",
        tuple(
            Cell(k, metric, "decoupled" if k == "5" else f"rescue_k {k}", 299, metric, value, reason)
            for k, *values in (
                ("1", "0.848", "0.115", "4"),
                ("3", "0.845", "0.112", "10"),
                ("5", "0.803", "0.112", "11"),
                ("8", "0.828", "0.109", "7"),
                ("16", "0.815", "0.113", "9"),
            )
            for metric, value, reason in zip(
                ("wt_sim", "loss", "unique_tgt"), values, ("sweet-spot", None, "noisy"), strict=True
            )
        ),
        heading="rescue_k",
    ),
    "novelty": Table(
        "The range of feature_novelty over features (decoupled)",
        grid(
            """
                  least largest
            0     0.051 0.055
            10000 0.049 0.082
            """,
            DECOUPLED_LONG,
            before,
            metrics={"least": "novelty_min", "largest": "novelty_max"},
            reasons={"least@10000": "novelty-range", "largest@10000": "novelty-range"},
        ),
    ),
    "baselines": Table(
        "Raw data: clamped affinity of random weights by seed, and random rank columns by cosine and by Pearson",
        tuple(
            Cell(f"seed {seed}", "clamped, cosine", f"random weights {seed}", 0, "clamped_cosine", value)
            for seed, value in ((42, "0.298"), (123, "0.296"), (456, "0.308"), (789, "0.330"), (999, "0.320"))
        )
        + (
            Cell("all seeds", "rank, cosine", "random weights", 0, "rank_cosine", "0.747"),
            Cell("all seeds", "rank, Pearson", "random weights", 0, "rank_correlation", "0.002"),
            Cell("all seeds", "clamped, Pearson", "random weights", 0, "clamped_correlation", "0.298", "shared-mean"),
        ),
        heading="weights",
    ),
}

# --- Why cells do not replicate: each reason with the measurements that show it ---------------------------------------

REASONS = {
    "shared-mean": "A positive mean that columns share makes their cosine large; the Pearson correlation takes it out. "
    "On the same data the clamped columns correlate no more than the ranks do: .298 is the cosine once more.",
    "mixed": "The document sets a cosine (clamp) beside a Pearson correlation (rank). By one measure, Pearson, "
    "the two collapse alike.",
    "threshold": "Alive means win_rate > 0.01, as in the clamp tables. 64 comes out where any win rate above 0 counts, "
    "which a sigmoid makes nearly automatic.",
    "dense": "Targets as alike as .99 are those of dense rescue (rescue_k = 0), which came before top-8.",
    "sweet-spot": "The medians over seeds differ between rescue_k by less than seeds do within one; the document "
    "itself gives .803 and .857 for rescue_k = 5 at step 300.",
    "gradient": "Is the gradient what makes weights alike? A network without BCL, equal otherwise, decides.",
    "ticks-up": "A batch's loss is noisy. Its mean over the steps since the row before still falls after 5,000.",
    "force-ratio": "No reading of the two norms gives 7 to 108: neither the move by Adam nor the raw gradient, over "
    "the pull, per step.",
    "raw-gradient": "About 1e-5 is the raw gradient over the pull; Adam rescales the gradient.",
    "identity": "The sum of win_rate * novelty over features is 1 by its definition, so its mean is 1 / D = .016 "
    "whatever the features do: the 98.4 % of rescue carry no information.",
    "slower": "At steps 10 to 50 the document's run is slower than ours and than ten independent ones, counted from "
    "either index. No cause was found.",
    "adam-eps": "The coupled mask leaves gradients near Adam's eps (1e-8 per element), so what they do depends on eps "
    "and on the scale of the loss, which the document does not give; another eps gives another run.",
    "noisy": "A number of one batch: from step to step it changes by as much as it differs here.",
    "novelty-range": "The document's last row is the range over time of the mean over features (see the 10,000-step "
    "trajectory), not over features.",
    "wa-gap": "The document's bound is that of the steps it prints; ours is over every step measured up to 300.",
    "chance": "Outside by less than the width of our range: a single run of the document against a few of ours.",
    "unexplained": "No cause found.",
    "other data": "Published for MNIST, measured on other data.",
    "not reached": "Not measured: the runs were cut short.",
    "ours": "Not in the document.",
}
UNMEASURED = ("other data", "not reached")  # reasons that lie with what was asked for, not with the document
NEVER_COMPARABLE = {"mixed", "novelty-range"}  # reasons for which the two numbers are of different things


def evidence(reason: str, *cells: tuple[str, str, int, str]) -> tuple[Cell, ...]:
    """Cells that show a reason: (heading, condition, index, metric)."""
    return tuple(Cell(reason, *cell) for cell in cells)


EXPLANATIONS = Table(
    "What shows the reasons",
    evidence(
        "shared-mean",
        ("clamped columns, Pearson", "random weights", 0, "clamped_correlation"),
        ("clamped columns, cosine", "random weights", 0, "clamped_cosine"),
        ("rank columns, Pearson", "random weights", 0, "rank_correlation"),
        ("rank columns, cosine", "random weights", 0, "rank_cosine"),
    )
    + evidence(
        "mixed",
        *((f"soft clamp, aff_corr at {i}", "soft-clamp", i, "aff_corr") for i in (25, 50, 100, 300)),
        *((f"hard rank, aff_corr at {i}", "hard-rank", i, "aff_corr") for i in (24, 49, 99, 299)),
        ("soft clamp, aff_sim at 300", "soft-clamp", 300, "aff_sim"),
        ("soft clamp, rp_sim at 300", "soft-clamp", 300, "rp_sim"),
    )
    + evidence(
        "threshold",
        *((f"hard rank, alive at {i}", "hard-rank", i, "alive") for i in (49, 299)),
        *((f"hard rank, win_rate > 0 at {i}", "hard-rank", i, "ever_winning") for i in (49, 299)),
        *((f"soft clamp, alive at {i}", "soft-clamp", i, "alive") for i in (50, 300)),
        ("decoupled, win_rate > 0 at 9999", DECOUPLED_LONG, 9999, "ever_winning"),
        ("decoupled, features that fire in the end", DECOUPLED_LONG, END, "held_out_firing_features"),
    )
    + evidence("dense", *((f"dense clamp, tgt_sim at {i}", "dense clamp", i, "tgt_sim") for i in (0, 50, 300)))
    + evidence(
        "sweet-spot",
        *(
            (f"rescue_k {k}, wt_sim at 299", "decoupled" if k == 5 else f"rescue_k {k}", 299, "wt_sim")
            for k in (1, 3, 5, 8, 16)
        ),
    )
    + evidence(
        "gradient",
        ("decoupled, wt_sim at 299", "decoupled", 299, "wt_sim"),
        ("plain, wt_sim at 299", "plain, 300 steps", 299, "wt_sim"),
        ("decoupled, wt_sim at 9999", DECOUPLED_LONG, 9999, "wt_sim"),
        ("mask only, wt_sim at 9999", "mask only", 9999, "wt_sim"),
        ("plain, wt_sim at 9999", "plain", 9999, "wt_sim"),
        ("decoupled, held-out L1", DECOUPLED_LONG, END, "held_out_l1"),
        ("plain, held-out L1", "plain", END, "held_out_l1"),
    )
    + evidence(
        "ticks-up",
        *((f"decoupled, mean loss up to {i}", DECOUPLED_LONG, i, "mean_loss") for i in (1999, 4999, 6999, 9999)),
    )
    + evidence(
        "force-ratio",
        *((f"decoupled, Adam / pull at {i}", "decoupled", i, "adam_over_pull") for i in (5, 50, 100, 300)),
        *((f"decoupled, gradient / pull at {i}", "decoupled", i, "gradient_over_pull") for i in (5, 50, 100, 300)),
    )
    + evidence(
        "raw-gradient",
        *((f"hard rank, gradient / pull at {i}", "hard-rank", i, "gradient_over_pull") for i in (5, 50, 100, 300)),
        *((f"hard rank, Adam / pull at {i}", "hard-rank", i, "adam_over_pull") for i in (5, 50, 100, 300)),
    )
    + evidence(
        "identity",
        *(
            (f"{name}, sum of win_rate * novelty at 300", name, 300, "effective_wins")
            for name in ("hard-rank", "decoupled")
        ),
        ("plain, sum of win_rate * novelty at 300", "plain, 300 steps", 300, "effective_wins"),
    )
    + evidence(
        "slower",
        *((f"hard rank, aff_corr at {i}", "hard-rank", i, "aff_corr") for i in (9, 10, 24, 25, 49, 50)),
    )
    + evidence(
        "adam-eps",
        ("eps 1e-8, gradient at 0", "hard-rank", 0, "gradient"),
        *(
            (f"{label}, {metric} at 299", name, 299, metric)
            for metric in ("loss", "wt_sim")
            for label, name in (
                ("eps 1e-12", "hard-rank, Adam's eps 1e-12"),
                ("eps 1e-8", "hard-rank"),
                ("eps 1e-4", "hard-rank, Adam's eps 1e-4"),
            )
        ),
    )
    + evidence(
        "noisy",
        *((f"decoupled, loss at {i}", DECOUPLED_LONG, i, "loss") for i in (399, 400, 499, 500, 699, 700)),
        *((f"rescue_k 8, unique_tgt at {i}", "rescue_k 8", i, "unique_tgt") for i in (199, 200, 249, 250, 299, 300)),
    )
    + evidence(
        "novelty-range",
        *((f"decoupled, mean novelty at {i}", DECOUPLED_LONG, i, "novelty") for i in (0, 99, 4999, 9999)),
    )
    + evidence(
        "wa-gap",
        *((f"soft clamp, largest gap up to {i}", "soft-clamp", i, "wa_gap") for i in (5, 30, 300)),
    ),
    heading="reason",
)

# --- The fixes --------------------------------------------------------------------------------------------------------

OUTCOMES = {  # heading -> metric; at the end of the run, or of its last step
    "L1": "held_out_l1",
    "MSE": "held_out_mse",
    "wt_sim": "wt_sim",
    "wt_abscos": "wt_abscos",
    "eff. rank": "effective_rank",
    "tgt_sim": "tgt_sim",
    "unique_tgt": "unique_tgt",
    "alive": "alive",
    "firing": "held_out_firing_features",
}
FIXES_TABLE = Table(
    "Fixes and controls at the end of training: held-out L1 and MSE, and what the features look like",
    tuple(
        Cell(name, heading, name, END, metric)
        for group in FIXES.values()
        for name in group
        for heading, metric in OUTCOMES.items()
        if name != "PCA" or metric in ("held_out_l1", "held_out_mse")  # what it has
    ),
    heading="condition",
)
TABLES = DOCUMENT_TABLES | {"explanations": EXPLANATIONS, "fixes": FIXES_TABLE}
ALL = tuple(name for name in TABLES if name != "fixes")  # what `table all` is

# --- Measuring and judging --------------------------------------------------------------------------------------------

DERIVED: dict[str, Callable[[dict[int, Mapping[str, float]], int], float]] = {
    "delta_aff": lambda rows, i: rows[i]["aff_sim"] - rows[i - 1]["aff_sim"],
    "need_ratio": lambda rows, i: rows[i]["need_max"] / rows[i]["need_min"],
    "wa_gap": lambda rows, i: max(abs(row["wa_sim"] - row["aff_sim"]) for step, row in rows.items() if step <= i),
    "pull_over_gradient": lambda rows, i: rows[i]["pull"] / rows[i]["gradient"],
    "rescue_weight": lambda rows, i: 1 - rows[i]["effective_win"],
}


def value(record: Record, metric: str, index: int) -> float | None:
    """One metric of a record at an index; None where the run did not reach it or does not have it."""
    if metric.startswith("held_out_"):
        return record["held_out"].get(metric.removeprefix("held_out_")) if index == END else None
    rows = {row["step"]: row for row in record["rows"]}
    index = max(rows, default=END) if index == END else index
    if index not in rows:
        return None
    if metric == "effective_wins":
        return rows[index]["effective_win"] * record["condition"]["features"]
    if ">=" in metric:
        name, _, threshold = metric.partition(">=")
        return next((i for i in range(index + 1) if rows[i][name] >= float(threshold)), index + 1)
    return DERIVED[metric](rows, index) if metric in DERIVED else rows[index].get(metric)


def judge(published: str, low: float, high: float) -> str:
    """Whether what the document prints can be a rounded value of [low, high]: INSIDE or OUTSIDE."""
    number = Decimal(published)
    half = 0.5 * 10.0 ** number.as_tuple().exponent
    return INSIDE if low - half <= float(number) <= high + half else OUTSIDE


def variant_of(condition: str) -> str:
    """Which entry of RANGES a condition belongs to."""
    return "decoupled" if condition == DECOUPLED_LONG else condition


def measure_cell(cell: Cell, records: list[Record], mnist: bool = True) -> dict[str, Any]:
    """A cell's row of the results: our seeds' median, mean, min and max beside what is published, and the verdicts.

    `mark` says whether the published number lies within our seeds' min..max, widened to `range`, where an independent
    implementation's is known; `reason` why not. `in_range` says whether our median lies in that range.
    """
    values = [v for v in (value(record, cell.metric, cell.index) for record in records) if v is not None]
    values = [v for v in values if not math.isnan(v)]
    span = RANGES.get(variant_of(cell.condition), {}).get(cell.metric, {}).get(cell.index) if mnist else None
    row: dict[str, Any] = {
        "row": cell.row,
        "column": cell.column,
        "condition": cell.condition,
        "index": records[0].get("steps_done", 0) - 1 if cell.index == END else cell.index,
        "metric": cell.metric,
        "published": None if cell.published is None else float(cell.published),
        "printed": cell.published,
        **dict.fromkeys(("median", "mean", "min", "max")),
        "mark": NOT_COMPARABLE,
        "reason": None,
        "range": span,
        "in_range": None,
    }
    if not values:
        return row | {"reason": "not reached"}
    low, high = min(values), max(values)
    median = statistics.median(values)
    row |= {"median": median, "mean": statistics.fmean(values), "min": low, "max": high}
    if span is not None:
        row["in_range"] = span[0] <= round(median, digits(cell.metric)) <= span[1]
    if cell.published is None:
        return row | {"reason": "ours"}
    if not mnist:
        return row | {"reason": "other data"}
    if cell.reason in NEVER_COMPARABLE:
        return row | {"reason": cell.reason}
    low, high = (min(low, span[0]), max(high, span[1])) if span else (low, high)
    mark = judge(cell.published, low, high)
    if mark == INSIDE:
        return row | {"mark": mark}
    near = max(low - float(cell.published), float(cell.published) - high) < high - low
    return row | {"mark": mark, "reason": cell.reason or ("chance" if near else "unexplained")}


def measure_table(name: str, records: Mapping[str, Mapping[int, Record]], mnist: bool = True) -> list[dict[str, Any]]:
    """The rows of one of TABLES from the records of its conditions, given as condition -> seed -> record."""
    return [
        {"table": name, "seeds": list(records[cell.condition])}
        | measure_cell(cell, list(records[cell.condition].values()), mnist)
        for cell in TABLES[name].cells
    ]


def check(condition: str, record: Record) -> None:
    """Raise what measuring the cells of a condition raises where this is no record of it."""
    for cell in (cell for table in TABLES.values() for cell in table.cells):
        if cell.condition == condition:
            measure_cell(cell, [record])


def conditions_of(name: str) -> list[str]:
    """The conditions that one of TABLES needs."""
    return list(dict.fromkeys(cell.condition for cell in TABLES[name].cells))


def outside_of_ranges(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """The different measurements whose median lies outside its range, and how many have a range at all."""
    ranged = {(variant_of(row["condition"]), row["metric"], row["index"], len(row["seeds"])): row
              for row in rows if row["in_range"] is not None}  # fmt: skip
    return [row for row in ranged.values() if not row["in_range"]], len(ranged)
