"""Pictures of tables, sweeps and scaling runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure

from .formats import decimals
from .plots import BCL, CONTROL, STYLES, new_figure, over_steps, tidy
from .settings import FIXES
from .sweep import median

# --- Tables and sweeps ------------------------------------------------------------------------------------------------


def cells_picture(title: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel per column of a table: the published number, and the median and range of our seeds, row by row."""
    columns = list(dict.fromkeys(row["column"] for row in rows))
    across = min(3, len(columns))
    down = math.ceil(len(columns) / across)
    figure = new_figure(4.2 * across + 0.4, 3.3 * down + 0.9, title)
    grid = figure.subplots(down, across, squeeze=False).flat
    for column, axes in zip(columns, grid, strict=False):  # columns first: it takes no panel too many
        cells = [row for row in rows if row["column"] == column and row["median"] is not None]
        places = range(len(cells))
        for place, cell in zip(places, cells, strict=True):
            if cell["range"]:
                axes.fill_between((place - 0.35, place + 0.35), *cell["range"], color="0.85", linewidth=0)
        axes.errorbar(places, *_bars(cells, "median"), color=BCL["color"], fmt="o", markersize=4, capsize=3)
        printed = [(place, cell["published"]) for place, cell in zip(places, cells, strict=True) if cell["printed"]]
        if printed:
            axes.plot(*zip(*printed, strict=True), color=CONTROL["color"], marker="x", linestyle="", markersize=7)
        values = [v for cell in cells for v in (cell["min"], cell["max"], cell["published"]) if v is not None]
        if values and min(values) > 0 and max(values) > 50 * min(values) and decimals(cells[0]["metric"]) != 0:
            axes.set_yscale("log")
        axes.set_xticks(places, [cell["row"] for cell in cells], rotation=45, ha="right", fontsize=9)
        tidy(axes, column)
    for axes in list(grid):
        axes.set_axis_off()
    figure.supxlabel(
        "x published    o our median, with the range over seeds    gray: independent implementation", fontsize=10
    )
    return figure


def _bars(cells: Sequence[Mapping[str, Any]], center: str) -> tuple[list[float], list[list[float]]]:
    """Points and their error bars: how far the least and the largest over seeds lie from the center."""
    below = [cell[center] - cell["min"] for cell in cells]
    return [cell[center] for cell in cells], [below, [cell["max"] - cell[center] for cell in cells]]


SHOWN_OUTCOMES = ("L1", "MSE", "wt_sim", "wt_abscos", "eff. rank", "firing")


def outcomes_picture(title: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A line per condition, a panel per outcome: the mean and range over seeds; lines mark the plain control's."""
    of = {(row["row"], row["column"]): row for row in rows if row["median"] is not None}
    groups = {group: [name for name in names if (name, "L1") in of] for group, names in FIXES.items()}
    lines: list[str | None] = []  # from the top; None leaves a gap between groups
    for names in groups.values():
        lines += [*names, None]
    figure = new_figure(16, 0.21 * len(lines) + 1.5, title)
    panels = figure.subplots(1, len(SHOWN_OUTCOMES), sharey=True)
    for axes, heading in zip(panels, SHOWN_OUTCOMES, strict=True):
        for group, style in zip(groups, (*STYLES, *STYLES), strict=False):
            places = [place for place, name in enumerate(lines) if name in groups[group] and (name, heading) in of]
            cells = [of[lines[place], heading] for place in places]
            mean, spread = _bars(cells, "mean")
            axes.errorbar(mean, places, xerr=spread, fmt=style["marker"], color=style["color"], markersize=4, capsize=2)
        for control, dashes in (("plain", "--"), ("plain, MSE", ":")):
            if (control, heading) in of:
                axes.axvline(of[control, heading]["mean"], color="0.4", linewidth=1, linestyle=dashes)
        tidy(axes, heading)
        axes.tick_params(axis="x", labelsize=9)
    panels[0].set_yticks(
        [place for place, name in enumerate(lines) if name], [name for name in lines if name], fontsize=9
    )
    panels[0].set_ylim(len(lines) - 0.5, -0.8)
    figure.supxlabel(
        "mean and range over seeds; vertical lines: plain trained on L1 (dashed) and on MSE (dotted)", fontsize=10
    )
    return figure


def sweep_picture(title: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A heat map of som_lr by rescue_k for each outcome: medians over seeds, the plain control's in the heading."""
    shown = {
        "held_out_l1": "held-out L1",
        "held_out_mse": "held-out MSE",
        "wt_sim": "wt_sim",
        "wt_abscos": "wt_abscos",
        "effective_rank": "effective rank",
        "held_out_firing_features": "features that fire",
    }
    cells = [row for row in rows if row["som_lr"] is not None]
    som_lrs, rescue_ks = (sorted({row[key] for row in cells}) for key in ("som_lr", "rescue_k"))
    width = max(3.6, 0.9 * len(rescue_ks) + 2.2)
    figure = new_figure(3 * width, 2 * max(2.6, 0.55 * len(som_lrs) + 1.8) + 0.6, title)
    for axes, (metric, heading) in zip(figure.subplots(2, 3).flat, shown.items(), strict=True):

        def of(som_lr: float | None, rescue_k: int | None, metric: str = metric) -> float:
            found = median(r[metric] for r in rows if (r["som_lr"], r["rescue_k"]) == (som_lr, rescue_k))
            return math.nan if found is None else found

        values = torch.tensor([[of(som_lr, k) for k in rescue_ks] for som_lr in som_lrs])
        image = axes.imshow(values.numpy(), cmap="cividis", aspect="auto")
        middle = (values.min() + values.max()) / 2
        for i, j in torch.cartesian_prod(torch.arange(len(som_lrs)), torch.arange(len(rescue_ks))).tolist():
            color = "white" if values[i, j] <= middle else "black"
            axes.text(j, i, f"{values[i, j]:.{decimals(metric)}f}", ha="center", va="center", color=color, fontsize=9)
        axes.set_xticks(range(len(rescue_ks)), rescue_ks)
        axes.set_yticks(range(len(som_lrs)), [f"{som_lr:g}" for som_lr in som_lrs])
        axes.set_xlabel("rescue_k")
        axes.set_ylabel("som_lr")
        axes.set_title(f"{heading} (plain: {of(None, None):.{decimals(metric)}f})", fontsize=11)
        figure.colorbar(image, ax=axes)
    return figure


# --- Scaling runs -----------------------------------------------------------------------------------------------------

LOOKS = {  # color and marker of each, dashes for what is too slow to train with
    "linear": ("black", "o", "-"),
    "reference": ("#D55E00", "s", "--"),
    "compiled": ("#E69F00", "D", "--"),
    "portable": ("#009E73", "^", "-"),
    "cpu": ("#0072B2", "v", "-"),
    "triton": ("#CC79A7", "P", "-"),
    "cuda": ("#56B4E9", "X", "-"),
}
ENDED = ("time-out", "out of memory")  # what is written next to a cross


def scaling_picture(
    title: str, axis: str, rows: Sequence[Mapping[str, Any]], exponents: Mapping[str, Mapping[str, float]]
) -> Figure:
    """Milliseconds of a step and its peak memory over one size, both logarithmic, a line per implementation."""
    figure = new_figure(13, 6, f"A training step as {axis} grows ({title})")
    panels = figure.subplots(1, 2)
    for axes, key, label in zip(
        panels, ("ms", "peak_mb"), ("ms per step, refresh included", "MB beyond weights and batch"), strict=True
    ):
        for place, (name, (color, marker, dashes)) in enumerate(LOOKS.items()):
            own = [row for row in rows if row["contestant"] == name]
            points = [(row[axis], row[key]) for row in own if row[key]]
            if not points:
                continue
            power = exponents.get(name, {}).get(key)
            text = "nn.Linear" if name == "linear" else name
            text += f" ~ {axis}^{power:.2f}" if power is not None else ""
            style = dict(color=color, marker=marker, linestyle=dashes)
            axes.plot(*zip(*points, strict=True), label=text, markersize=5, linewidth=1.5, **style)
            for row in own:
                if row["status"] in ENDED and row[key] is None:  # above the chart, one below the other
                    at = dict(transform=axes.get_xaxis_transform(), color=color)
                    height = 1.02 - 0.04 * place
                    axes.plot(row[axis], height, "x", markersize=7, markeredgewidth=2, clip_on=False, **at)
                    text = f"{row['status']}   "
                    axes.text(row[axis], height, text, ha="right", va="center", fontsize=8, **at)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sorted({row[axis] for row in rows}), [f"{size:,}" for size in sorted({r[axis] for r in rows})])
        axes.set_xlabel(axis + (" (features)" if axis == "D" else " (samples)"))
        tidy(axes, label)
    floor = sorted({(row[axis], row["floor_ms"]) for row in rows})
    panels[0].plot(*zip(*floor, strict=True), color="0.5", linestyle=":", label="floor of a BCL step (bytes and FLOPs)")
    for axes in panels:
        axes.legend(frameon=False, fontsize=9, title="fitted to the three largest sizes", title_fontsize=8)
    return figure


def curves_picture(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss and similarity of one training on every implementation: medians, and the reference's range over seeds."""
    trained = [row for row in rows if row.get("curves")]
    size = "{seeds} seeds of {steps:,} steps on {data}".format(**trained[0])
    figure = new_figure(12, 5, f"The same training on every backend: {size}")
    headings = {"loss": "Loss on the batch of the step", "wt_sim": "Mean cosine of weights (wt_sim)"}
    for axes, (curve, heading) in zip(figure.subplots(1, 2), headings.items(), strict=True):
        for row in trained:
            name, steps, values = row["contestant"], row["curves"]["step"], row["curves"][curve]
            color, marker, dashes = LOOKS[name]
            label = f"{'plain nn.Linear' if name == 'linear' else name}, {row['seconds']:.1f} s"
            if name == "reference":
                lows, highs = ([pick(seeds) for seeds in values] for pick in (min, max))
                axes.fill_between(steps, lows, highs, color=color, alpha=0.2, linewidth=0)
            middle = [statistics.median(seeds) for seeds in values]
            style = dict(color=color, linestyle=dashes, marker=marker, markersize=3, linewidth=1.2)
            axes.plot(steps, middle, label=label, **style)
        over_steps(axes, heading)
    return figure
