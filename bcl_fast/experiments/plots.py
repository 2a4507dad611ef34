"""Pictures of training runs, and what they share with those of `charts`: nobody else imports matplotlib."""

from __future__ import annotations

import math
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


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure with a title; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    figure.suptitle(title, fontsize=14)
    return figure


def tidy(axes: Axes, title: str) -> None:
    """A title, a light grid, and no box."""
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


# --- One run beside its control ---------------------------------------------------------------------------------------


def training_picture(title: str, bcl: Run, control: Run) -> Figure:
    """A run with BCL beside its control: loss and similarities over steps, and the weights as images."""
    figure = new_figure(12, 11, title)
    loss, similarity, *mosaics = figure.subplots(2, 2, height_ratios=(2, 3)).flat
    _line(loss, bcl, "loss", "with BCL", BCL)
    _line(loss, control, "loss", "plain", CONTROL)
    over_steps(loss, "Loss on the batch of the step")
    loss.set_ylim(bottom=0)
    _line(similarity, bcl, "wt_sim", "weights, with BCL (wt_sim)", BCL)
    _line(similarity, control, "wt_sim", "weights, plain (wt_sim)", CONTROL)
    _line(similarity, bcl, "tgt_sim", "rescue targets (tgt_sim)", TARGETS)
    _line(similarity, bcl, "aff_corr", "affinity columns (aff_corr)", AFFINITY)
    over_steps(similarity, "How alike features are: mean cosine or correlation")
    similarity.set_ylim(-0.1, 1.05)
    for axes, run, name in zip(mosaics, (bcl, control), ("with BCL", "plain"), strict=True):
        image = _mosaic(axes, run.tensors["weight"])
        axes.set_title(f"Encoder weights, {name}, after {run.record['steps_done']:,} steps", fontsize=11)
    _weight_scale(figure, image, mosaics)
    return figure


def win_rate_picture(bcl: Run, control: Run) -> Figure:
    """Which feature wins how often, over the measured steps: features in the order of their last win rate."""
    figure = new_figure(12, 6, "Win rate of every feature")
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
    figure = new_figure(12, 5.5, "Forces on every feature, with BCL")
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
        tidy(axes, f"{label[8:].capitalize()} against pull")
        axes.legend(frameon=False, fontsize=9)
    return figure


def image_picture(bcl: Run) -> Figure:
    """Each feature's weight, and the target that its rescue pulls it to."""
    figure = new_figure(12, 6.8, "Features and their rescue targets, with BCL")
    panels = figure.subplots(1, 2)
    _mosaic(panels[0], bcl.tensors["weight"])
    panels[0].set_title("Encoder weights in the end", fontsize=11)
    image = _mosaic(panels[1], bcl.tensors["rescue_target"])
    panels[1].set_title(f"Rescue targets at step {bcl.tensors['step'][-1]:,}", fontsize=11)
    _weight_scale(figure, image, panels, "value / largest |value| of its image")
    return figure


def coverage_picture(bcl: Run, control: Run) -> Figure:
    """How many features claim each sample of a batch, at the first and the last measured step."""
    figure = new_figure(12, 4.5, "Image coverage: how many features claim a sample")
    for axes, run, name in zip(figure.subplots(1, 2), (bcl, control), ("with BCL", "plain"), strict=True):
        coverage, steps = run.tensors["image_coverage"], run.tensors["step"].tolist()  # [rows, B]
        bins = torch.linspace(coverage.min().item(), coverage.max().item() + 1e-6, 31).tolist()
        for place, style in ((0, CONTROL), (-1, BCL)):
            look = dict(histtype="step", linewidth=1.8, color=style["color"], linestyle=style["linestyle"])
            axes.hist(coverage[place].tolist(), bins, label=f"step {steps[place]:,}", **look)
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


def over_steps(axes: Axes, title: str) -> None:
    """The same for curves over training steps, with their legend."""
    # Logarithmic: the collapse begins within the first steps. Linear up to 1, for step 0.
    axes.set_xscale("symlog", linthresh=1, linscale=0.3, subs=range(2, 10))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(left=-0.2)
    axes.set_xlabel("step")
    tidy(axes, title)
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
