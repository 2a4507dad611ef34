"""Pictures of training runs, tables and sweeps: the only module that imports matplotlib."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no window, no global state
from matplotlib.image import AxesImage
from torch import Tensor

from ..records import replacing
from .formats import decimals
from .settings import FIXES
from .sweep import median

# Okabe and Ito's colors: told apart with any color vision. Dashes and markers tell the lines apart without color.
BCL = {"color": "#0072B2", "marker": "o", "linestyle": "-"}
CONTROL = {"color": "#D55E00", "marker": "s", "linestyle": "--"}
TARGETS = {"color": "#CC79A7", "marker": "^", "linestyle": "-."}
AFFINITY = {"color": "#009E73", "marker": "v", "linestyle": ":"}
STYLES = (BCL, CONTROL, TARGETS, AFFINITY)
SHOWN_FEATURES = 64


class Run(NamedTuple):
    """A finished training: its record, and the tensors of `Training.snapshot`."""

    record: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, completely or not at all."""
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=120)


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    figure.suptitle(title, fontsize=14)
    return figure


def _tidy(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


# --- One run beside its control ---------------------------------------------------------------------------------------


def training_picture(title: str, bcl: Run, control: Run) -> Figure:
    """A run with BCL beside its control: loss and similarities over steps, and the weights as images."""
    figure = _figure(12, 11, title)
    loss, similarity, *mosaics = figure.subplots(2, 2, height_ratios=(2, 3)).flat
    _line(loss, bcl, "loss", "with BCL", BCL)
    _line(loss, control, "loss", "plain", CONTROL)
    _over_steps(loss, "Loss on the batch of the step")
    loss.set_ylim(bottom=0)
    _line(similarity, bcl, "wt_sim", "weights, with BCL (wt_sim)", BCL)
    _line(similarity, control, "wt_sim", "weights, plain (wt_sim)", CONTROL)
    _line(similarity, bcl, "tgt_sim", "rescue targets (tgt_sim)", TARGETS)
    _line(similarity, bcl, "aff_corr", "affinity columns (aff_corr)", AFFINITY)
    _over_steps(similarity, "How alike features are: mean cosine or correlation")
    similarity.set_ylim(-0.1, 1.05)
    for axes, run, name in zip(mosaics, (bcl, control), ("with BCL", "plain"), strict=True):
        image = _mosaic(axes, run.tensors["weight"])
        axes.set_title(f"Encoder weights, {name}, after {run.record['steps_done']:,} steps", fontsize=11)
    _weight_scale(figure, image, mosaics)
    return figure


def win_rate_picture(bcl: Run, control: Run) -> Figure:
    """Which feature wins how often, over the measured steps: features in the order of their last win rate."""
    figure = _figure(12, 6, "Win rate of every feature")
    panels = figure.subplots(1, 2, sharey=True)
    top = max(run.tensors["win_rate"].max().item() for run in (bcl, control))
    for axes, run, name in zip(panels, (bcl, control), ("with BCL", "plain, as if its features competed"), strict=True):
        rate, steps = run.tensors["win_rate"], run.tensors["step"].tolist()  # [rows, D]
        rate = rate[:, rate[-1].argsort(descending=True)].T.numpy()
        image = axes.imshow(rate, aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
        places = range(0, len(steps), max(1, len(steps) // 8))
        axes.set_xticks(places, [f"{steps[i]:,}" for i in places])
        axes.set_xlabel("step, as measured (not to scale)")
        axes.set_title(name, fontsize=11)
    panels[0].set_ylabel("feature, by win rate at the last step")
    figure.colorbar(image, ax=panels, label="win rate (mean rank_score over the batch)")
    return figure


def force_picture(bcl: Run) -> Figure:
    """The two forces on each feature: gradient against pull, at four of the measured steps."""
    figure = _figure(12, 5.5, "Forces on every feature, with BCL")
    steps = bcl.tensors["step"].tolist()
    places = dict.fromkeys(round(i * (len(steps) - 1) / 3) for i in range(4))
    for axes, name, label in zip(
        figure.subplots(1, 2), ("gradient", "adam"), ("norm of the gradient", "norm of Adam's move"), strict=True
    ):
        for place, style in zip(places, STYLES, strict=False):
            x, y = bcl.tensors["pull"][place], bcl.tensors[name][place]
            some = (x > 0) & (y > 0) & (x + y).isfinite()  # a logarithm has no place for others
            points = f"step {steps[place]:,}" + ("" if some.all() else f" ({int((~some).sum())} left out)")
            look = dict(s=18, alpha=0.8, color=style["color"], marker=style["marker"])
            axes.scatter(x[some].tolist(), y[some].tolist(), label=points, **look)
        if any(len(drawn.get_offsets()) for drawn in axes.collections):  # else it has no place at all
            axes.set_xscale("log")
            axes.set_yscale("log")
        axes.set_xlabel("norm of the SOM pull")
        axes.set_ylabel(label)
        _tidy(axes, f"{label[8:].capitalize()} against pull")
        axes.legend(frameon=False, fontsize=9)
    return figure


def image_picture(bcl: Run) -> Figure:
    """Each feature's weight, and the target that its rescue pulls it to."""
    figure = _figure(12, 6.8, "Features and their rescue targets, with BCL")
    panels = figure.subplots(1, 2)
    _mosaic(panels[0], bcl.tensors["weight"])
    panels[0].set_title("Encoder weights in the end", fontsize=11)
    image = _mosaic(panels[1], bcl.tensors["rescue_target"])
    panels[1].set_title(f"Rescue targets at step {bcl.tensors['step'][-1]:,}", fontsize=11)
    _weight_scale(figure, image, panels, "value / largest |value| of its image")
    return figure


def coverage_picture(bcl: Run, control: Run) -> Figure:
    """How many features claim each sample of a batch, at the first and the last measured step."""
    figure = _figure(12, 4.5, "Image coverage: how many features claim a sample")
    for axes, run, name in zip(figure.subplots(1, 2), (bcl, control), ("with BCL", "plain"), strict=True):
        coverage, steps = run.tensors["image_coverage"], run.tensors["step"].tolist()  # [rows, B]
        bins = torch.linspace(coverage.min().item(), coverage.max().item() + 1e-6, 31).tolist()
        for place, style in ((0, CONTROL), (-1, BCL)):
            look = dict(histtype="step", linewidth=1.8, color=style["color"], linestyle=style["linestyle"])
            axes.hist(coverage[place].tolist(), bins, label=f"step {steps[place]:,}", **look)
        axes.set_xlabel("coverage (sum of rank_score over features)")
        axes.set_ylabel("samples of the batch")
        _tidy(axes, name)
        axes.legend(frameon=False)
    return figure


def reconstruction_picture(bcl: Run, control: Run) -> Figure:
    """Held-out images, and what either network makes of them."""
    count = len(bcl.tensors["images"])
    figure = _figure(12, 3.4, "Reconstructions of held-out images")
    axes = figure.subplots()
    rows = [bcl.tensors["images"], bcl.tensors["reconstruction"], control.tensors["reconstruction"]]
    side = math.isqrt(rows[0].shape[1])
    pictures = [torch.cat([image.unflatten(0, (side, side)) for image in row], dim=1) for row in rows]
    axes.imshow(torch.cat(pictures).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks([side * (i + 0.5) for i in range(3)], ["image", "with BCL", "plain"])
    axes.set_xticks([side * (i + 0.5) for i in range(count)], range(count))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _over_steps(axes: Axes, title: str) -> None:
    # Logarithmic: the collapse begins within the first steps. Linear up to 1, for step 0.
    axes.set_xscale("symlog", linthresh=1, linscale=0.3, subs=range(2, 10))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(left=-0.2)
    axes.set_xlabel("step")
    _tidy(axes, title)
    axes.legend(frameon=False)


def _line(axes: Axes, run: Run, key: str, label: str, style: dict[str, str]) -> None:
    rows = run.record["rows"]
    axes.plot([r["step"] for r in rows], [r[key] for r in rows], label=label, markersize=4, linewidth=1.5, **style)


def _mosaic(axes: Axes, weight: Tensor) -> AxesImage:
    """Draw the first features of weight [D, side * side] as a square of images, each on a scale of its own."""
    weight = weight[:SHOWN_FEATURES]
    side = math.isqrt(weight.shape[1])
    largest = weight.abs().amax(dim=1, keepdim=True)
    zoom = math.ceil(20 / side)  # the lines between small images stay thin
    tiles = (weight / largest.where(largest > 0, 1)).unflatten(1, (side, side))
    tiles = tiles.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)
    (D, height, width), columns = tiles.shape, math.ceil(math.sqrt(len(tiles)))
    canvas = torch.full((math.ceil(D / columns) * (height + 1) - 1, columns * (width + 1) - 1), torch.nan)
    for d, tile in enumerate(tiles):
        top, left = d // columns * (height + 1), d % columns * (width + 1)
        canvas[top : top + height, left : left + width] = tile
    axes.set_axis_off()
    colors = colormaps["RdBu_r"].with_extremes(bad="0.75")  # between the images
    return axes.imshow(canvas.numpy(), cmap=colors, vmin=-1, vmax=1, interpolation="nearest")


def _weight_scale(
    figure: Figure, image: AxesImage, axes: Sequence[Axes], label: str = "weight / largest |weight| of its feature"
) -> None:
    scale = figure.colorbar(image, ax=axes, orientation="horizontal", shrink=0.3, aspect=30, ticks=(-1, 0, 1))
    scale.set_label(label)


# --- Tables and sweeps ------------------------------------------------------------------------------------------------


def cells_picture(title: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel per column of a table: the published number, and the median and range of our seeds, row by row."""
    columns = list(dict.fromkeys(row["column"] for row in rows))
    across = min(3, len(columns))
    down = math.ceil(len(columns) / across)
    figure = _figure(4.2 * across + 0.4, 3.3 * down + 0.9, title)
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
        _tidy(axes, column)
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
    figure = _figure(16, 0.21 * len(lines) + 1.5, title)
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
        _tidy(axes, heading)
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
    figure = _figure(3 * width, 2 * max(2.6, 0.55 * len(som_lrs) + 1.8) + 0.6, title)
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
    figure = _figure(13, 6, f"A training step as {axis} grows ({title})")
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
        _tidy(axes, label)
    floor = sorted({(row[axis], row["floor_ms"]) for row in rows})
    panels[0].plot(*zip(*floor, strict=True), color="0.5", linestyle=":", label="floor of a BCL step (bytes and FLOPs)")
    for axes in panels:
        axes.legend(frameon=False, fontsize=9, title="fitted to the three largest sizes", title_fontsize=8)
    return figure


def curves_picture(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss and similarity of one training on every implementation: medians, and the reference's range over seeds."""
    trained = [row for row in rows if row.get("curves")]
    size = "{seeds} seeds of {steps:,} steps on {data}".format(**trained[0])
    figure = _figure(12, 5, f"The same training on every backend: {size}")
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
        _over_steps(axes, heading)
    return figure
