"""Pictures of training runs, and what they share with those of `charts`: nobody else imports matplotlib."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no window, no global state
from matplotlib.image import AxesImage
from torch import Tensor

from ..diagnostics import ALIVE_ABOVE, REDUNDANT_ABOVE
from ..records import replacing

# Okabe and Ito's colors: told apart with any color vision. Dashes and markers tell the lines apart without color.
LARGEST = 1e200  # of what is drawn: an axis is wider than its curve, and its ends are numbers too
BCL = {"color": "#0072B2", "marker": "o", "linestyle": "-"}
CONTROL = {"color": "#D55E00", "marker": "s", "linestyle": "--"}
TARGETS = {"color": "#CC79A7", "marker": "^", "linestyle": "-."}
AFFINITY = {"color": "#009E73", "marker": "v", "linestyle": ":"}
STYLES = (BCL, CONTROL, TARGETS, AFFINITY)
SHOWN_FEATURES = 64
SHOWN_SCALARS = 4  # of those that a user's training measures
FEW = 10  # features that have a tick each
MARKERS = 200  # on one curve
CROWDED = 10**0.4  # an axis that reaches less far, as a factor, has labels at all of its small ticks


Rows = Sequence[Mapping[str, Any]]  # what was measured, in the order of steps; None where it was not finite


class Run(NamedTuple):
    """A finished training: its record, and the tensors of `Training.snapshot`."""

    record: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, completely or not at all."""
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=120)


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure with a title; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    figure.suptitle(_verbatim(title), fontsize=14)
    return figure


def tidy(axes: Axes, title: str) -> None:
    """A title, a light grid, and no box."""
    axes.set_title(_verbatim(title), fontsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


# --- One run beside its control ---------------------------------------------------------------------------------------


def training_picture(title: str, bcl: Run, control: Run) -> Figure:
    """A run with BCL beside its control: loss and similarities over steps, and the weights as images."""
    figure = new_figure(12, 11, title)
    loss, similarity, *mosaics = figure.subplots(2, 2, height_ratios=(2, 3)).flat
    _line(loss, bcl.record["rows"], "loss", "with BCL", BCL)
    _line(loss, control.record["rows"], "loss", "plain", CONTROL)
    over_steps(loss, "Loss on the batch of the step")
    loss.set_ylim(bottom=0)
    _line(similarity, bcl.record["rows"], "wt_sim", "weights, with BCL (wt_sim)", BCL)
    _line(similarity, control.record["rows"], "wt_sim", "weights, plain (wt_sim)", CONTROL)
    _line(similarity, bcl.record["rows"], "tgt_sim", "rescue targets (tgt_sim)", TARGETS)
    _line(similarity, bcl.record["rows"], "aff_corr", "affinity columns (aff_corr)", AFFINITY)
    over_steps(similarity, "How alike features are: mean cosine or correlation")
    similarity.set_ylim(-0.1, 1.05)
    for axes, run, name in zip(mosaics, (bcl, control), ("with BCL", "plain"), strict=True):
        image = _mosaic(axes, run.tensors["weight"])
        axes.set_title(f"Encoder weights, {name}, after {run.record['steps_done']:,} steps", fontsize=11)
    _weight_scale(figure, image, mosaics)
    return figure


def win_rate_picture(runs: Mapping[str, Run]) -> Figure:
    """Which feature wins how often, over the measured steps: features in the order of their last win rate."""
    figure = new_figure(12, 6, "Win rate of every feature")
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    top = max(_finite(run.tensors["win_rate"]).max().item() for run in runs.values())
    for axes, (name, run) in zip(panels, runs.items(), strict=True):
        rate, steps = run.tensors["win_rate"], run.tensors["step"].tolist()  # [rows, D]
        rate = rate[:, rate[-1].argsort(descending=True)].T.numpy()
        image = axes.imshow(rate, aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
        places = range(0, len(steps), max(1, len(steps) // 8))
        axes.set_xticks(places, [f"{steps[i]:,}" for i in places])
        axes.set_xlabel("step, as measured (not to scale)")
        axes.set_title(_verbatim(name), fontsize=11)
    if len(rate) <= FEW:
        panels[0].set_yticks(range(len(rate)))
    panels[0].set_ylabel("feature, by win rate at the last step")
    figure.colorbar(image, ax=panels, label="win rate (mean rank_score over the batch)")
    return figure


def force_picture(title: str, run: Run, move: str = "Adam's move") -> Figure:
    """The two forces on each feature: gradient against pull, at four of the measured steps; `move`: the optimizer's."""
    figure = new_figure(12, 5.5, title)
    steps = run.tensors["step"].tolist()
    places = dict.fromkeys(round(i * (len(steps) - 1) / 3) for i in range(4))
    for axes, name, label in zip(figure.subplots(1, 2), ("gradient", "adam"), ("the gradient", move), strict=True):
        for place, style in zip(places, STYLES, strict=False):
            x, y = run.tensors["pull"][place], run.tensors[name][place]
            some = (x > 0) & (y > 0) & (x < LARGEST) & (y < LARGEST)  # a logarithm has no place for others
            points = f"step {steps[place]:,}" + ("" if some.all() else f" ({int((~some).sum())} left out)")
            look = dict(s=18, alpha=0.8, color=style["color"], marker=style["marker"])
            axes.scatter(x[some].tolist(), y[some].tolist(), label=points, **look)
        if any(len(drawn.get_offsets()) for drawn in axes.collections):  # else it has no place at all
            axes.set_xscale("log")
            axes.set_yscale("log")
            left, right = axes.get_xlim()
            if right < CROWDED * left:
                axes.tick_params(axis="x", which="both", labelrotation=40, labelsize=8)
        axes.set_xlabel("norm of the SOM pull")
        axes.set_ylabel(f"norm of {label}")
        tidy(axes, f"{label.capitalize()} against pull")
        axes.legend(frameon=False, fontsize=9)
    return figure


def image_picture(title: str, images: Mapping[str, Tensor]) -> Figure:
    """Images of features beside each other, each [D, pixels] or [D, channels, height, width]: weights and targets."""
    figure = new_figure(12, 6.8, title)
    panels = figure.subplots(1, len(images))
    for axes, (name, tensor) in zip(panels, images.items(), strict=True):
        image = _mosaic(axes, tensor)
        axes.set_title(name, fontsize=11)
    _weight_scale(figure, image, panels, "value / largest |value| of its image")
    return figure


def coverage_picture(runs: Mapping[str, Run]) -> Figure:
    """How many features claim each sample of a batch, at the first and the last measured step."""
    figure = new_figure(12, 4.5, "Image coverage: how many features claim a sample")
    for axes, (name, run) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items(), strict=True):
        coverage, steps = run.tensors["image_coverage"], run.tensors["step"].tolist()  # rows of [B], of any B
        low, high = (pick(pick(_finite(row)).item() for row in coverage) for pick in (min, max))
        low, high = (low, high + 1e-6) if low < high else (low - 0.5, high + 0.5)
        bins = torch.linspace(low, high, 31).tolist()
        for place, style in dict(((0, CONTROL), (len(steps) - 1, BCL))).items():
            look = dict(histtype="step", linewidth=1.8, color=style["color"], linestyle=style["linestyle"])
            finite = coverage[place].isfinite()
            label = f"step {steps[place]:,}" + ("" if finite.all() else f" ({int((~finite).sum())} not finite)")
            axes.hist(coverage[place][finite].tolist(), bins, label=label, **look)
        axes.set_xlabel("coverage (sum of rank_score over features)")
        axes.set_ylabel("samples of the batch")
        tidy(axes, name)
        axes.legend(frameon=False)
    return figure


def reconstruction_picture(bcl: Run, control: Run) -> Figure:
    """Held-out images, and what either network makes of them."""
    count = len(bcl.tensors["images"])
    figure = new_figure(12, 3.4, "Reconstructions of held-out images")
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


# --- A layer of anybody's model ---------------------------------------------------------------------------------------

ALIKE = {
    "How alike features are: mean cosine or correlation": {
        "wt_sim": "weights (wt_sim)",
        "wt_abscos": "weights, |cosine| (wt_abscos)",
        "tgt_sim": "rescue targets (tgt_sim)",
        "aff_corr": "affinity columns (aff_corr)",
    },
    "How alike columns are: mean cosine or correlation": {
        "aff_sim": "affinity (aff_sim)",
        "wa_sim": "weighted affinity (wa_sim)",
        "rp_sim": "rescue pull (rp_sim)",
        "rp_corr": "rescue pull, correlation (rp_corr)",
    },
}
COUNTS = {
    "alive": f"alive: win rate above {ALIVE_ABOVE:g}",
    "dead": "dead",
    "redundant": f"redundant: cosine with another above {REDUNDANT_ABOVE:g}",
}
FORCES = {"gradient": "norm of the gradient", "pull": "norm of the pull", "adam": "norm of the optimizer's move"}


def course_picture(title: str, lines: Rows, scalars: Rows) -> Figure:
    """The metrics of one layer over steps, beside the first SHOWN_SCALARS of what the user measured."""
    names = scalar_names(scalars)[:SHOWN_SCALARS]
    counts, forces = ([key for key in keys if any(key in line for line in lines)] for keys in (COUNTS, FORCES))
    panels = len(names) + len(ALIKE) + bool(counts) + bool(forces)
    down = math.ceil(panels / 2)
    figure = new_figure(12, 3.9 * down + 0.6, title)
    grid = iter(figure.subplots(down, 2).flat)
    for name in names:
        axes = next(grid)
        _line(axes, [row for row in scalars if name in row], name, name, BCL)
        over_steps(axes, name, even=True)
    for heading, labels in ALIKE.items():
        _lines(next(grid), heading, lines, labels).set_ylim(min(-0.1, _least(lines, labels) - 0.05), 1.05)
    if counts:
        heading, labels = "How many features are alive, dead or redundant", {key: COUNTS[key] for key in counts}
        _lines(next(grid), heading, lines, labels).set_ylim(bottom=0)
    if forces:
        axes = _lines(next(grid), "Forces: mean over features", lines, {key: FORCES[key] for key in forces})
        if any(line.get(key) for key in forces for line in lines):  # a logarithm has no place for others
            axes.set_yscale("log", nonpositive="mask")
    for axes in grid:
        axes.set_axis_off()
    return figure


def scalar_names(scalars: Rows) -> list[str]:
    """The keys of a user's own lines that hold numbers."""
    return list(dict.fromkeys(key for row in scalars for key, value in row.items() if key != "step" and _number(value)))


def _number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _lines(axes: Axes, heading: str, rows: Rows, labels: Mapping[str, str]) -> Axes:
    for (key, label), style in zip(labels.items(), STYLES, strict=False):
        _line(axes, [row for row in rows if key in row], key, label, style)
    over_steps(axes, heading, even=True)
    if len(rows) == 1:
        axes.set_xticks([rows[0]["step"]])
    return axes


def _least(rows: Rows, keys: Iterable[str]) -> float:
    return min(
        (row[key] for key in keys for row in rows if row[key] is not None and math.isfinite(row[key])), default=0
    )


# --- Parts of pictures ------------------------------------------------------------------------------------------------


def over_steps(axes: Axes, title: str, even: bool = False) -> None:
    """The same for curves over training steps, with their legend; `even`: steps measured at equal distances."""
    if even:
        axes.xaxis.get_major_locator().set_params(integer=True)
    else:  # Logarithmic: the collapse begins within the first steps. Linear up to 1, for step 0.
        axes.set_xscale("symlog", linthresh=1, linscale=0.3, subs=range(2, 10))
        axes.set_xlim(left=-0.2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("step")
    tidy(axes, title)
    axes.legend(frameon=False)


def _line(axes: Axes, rows: Rows, key: str, label: str, style: dict[str, str]) -> None:
    look = dict(markersize=4, linewidth=1.5, markevery=max(1, len(rows) // MARKERS), **style)
    values = [None if r[key] is None or abs(r[key]) > LARGEST else r[key] for r in rows]
    axes.plot([r["step"] for r in rows], values, label=_verbatim(label), **look)


def _verbatim(name: str) -> str:
    """A name of the user's as it is: between dollars stands mathematics."""
    return name.replace("$", r"\$")


def _finite(tensor: Tensor) -> Tensor:
    """The finite values, a zero where there are none."""
    values = tensor[tensor.isfinite()]
    return values if values.numel() else values.new_zeros(1)


def _mosaic(axes: Axes, weight: Tensor) -> AxesImage | None:
    """Draw the first features of weight as a square of images, each on a scale of its own; None where in color.

    weight [D, side * side] or [D, channels, height, width]; three channels are colors, of others the mean is drawn.
    """
    weight = weight[:SHOWN_FEATURES]
    if weight.ndim == 2:
        side = math.isqrt(weight.shape[1])
        weight = weight.unflatten(1, (1, side, side))
    tiles = weight if weight.shape[1] == 3 else weight.mean(dim=1, keepdim=True)
    tiles = tiles.permute(0, 2, 3, 1)  # [D, height, width, 1 or 3]
    largest = tiles.abs().amax(dim=(1, 2, 3), keepdim=True)
    tiles = tiles / largest.where(largest > 0, 1)
    zoom = math.ceil(20 / max(tiles.shape[1:3]))  # the lines between small images stay thin
    tiles = tiles.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)
    D, height, width, colors = tiles.shape
    columns = min(D, math.ceil(math.sqrt(D * height / width)))
    between = torch.nan if colors == 1 else 0.5
    size = math.ceil(D / columns) * (height + 1) - 1, columns * (width + 1) - 1
    canvas = torch.full((*size, colors), between)
    for d, tile in enumerate(tiles):
        top, left = d // columns * (height + 1), d % columns * (width + 1)
        canvas[top : top + height, left : left + width] = tile
    axes.set_axis_off()
    if colors == 3:
        axes.imshow(((canvas + 1) / 2).nan_to_num(0.5).clamp(0, 1).numpy(), interpolation="nearest")
        return None
    shades = colormaps["RdBu_r"].with_extremes(bad="0.75")  # between the images
    return axes.imshow(canvas.squeeze(2).numpy(), cmap=shades, vmin=-1, vmax=1, interpolation="nearest")


def _weight_scale(
    figure: Figure,
    image: AxesImage | None,
    axes: Sequence[Axes],
    label: str = "weight / largest |weight| of its feature",
) -> None:
    if image is None:  # in color
        figure.supxlabel(f"{label}: middle gray is 0, full color 1, no color -1", fontsize=10)
        return
    scale = figure.colorbar(image, ax=axes, orientation="horizontal", shrink=0.3, aspect=30, ticks=(-1, 0, 1))
    scale.set_label(label)
