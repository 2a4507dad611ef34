"""Pictures of training runs: the only module that imports matplotlib."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no window, no global state
from matplotlib.image import AxesImage
from torch import Tensor

from .run import Training, replacing

# Okabe and Ito's colours: told apart with any colour vision. Dashes and markers tell the lines apart without colour.
BCL = {"color": "#0072B2", "marker": "o", "linestyle": "-"}
CONTROL = {"color": "#D55E00", "marker": "s", "linestyle": "--"}
TARGETS = {"color": "#CC79A7", "marker": "^", "linestyle": "-."}
AFFINITY = {"color": "#009E73", "marker": "v", "linestyle": ":"}
SHOWN_FEATURES = 64


def training_picture(path: Path, title: str, bcl: Training, control: Training) -> None:
    """Write a PNG of a run with BCL beside its control: loss and similarities over steps, and the weights as images."""
    figure = Figure(figsize=(12, 11), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    figure.suptitle(title, fontsize=14)
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
    for axes, training, name in zip(mosaics, (bcl, control), ("with BCL", "plain"), strict=True):
        image = _mosaic(axes, training.model.encoder_weight.cpu(), training.images.shape)
        axes.set_title(f"Encoder weights, {name}, after {training.done:,} steps", fontsize=11)
    scale = figure.colorbar(image, ax=mosaics, orientation="horizontal", shrink=0.3, aspect=30, ticks=(-1, 0, 1))
    scale.set_label("weight / largest |weight| of its feature")
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=120)


def _over_steps(axes: Axes, title: str) -> None:
    # Logarithmic: the collapse begins within the first steps. Linear up to 1, for step 0.
    axes.set_xscale("symlog", linthresh=1, linscale=0.3, subs=range(2, 10))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(left=-0.2)
    axes.set_xlabel("step")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _line(axes: Axes, training: Training, key: str, label: str, style: dict[str, str]) -> None:
    steps = [row["step"] for row in training.rows]
    axes.plot(steps, [row[key] for row in training.rows], label=label, markersize=4, linewidth=1.5, **style)


def _mosaic(axes: Axes, weight: Tensor, shape: tuple[int, int]) -> AxesImage:
    """Draw the first features of weight [D, pixels] as a square of images, each on a scale of its own."""
    weight = weight[:SHOWN_FEATURES]
    largest = weight.abs().amax(dim=1, keepdim=True)
    zoom = math.ceil(20 / max(shape))  # the lines between small images stay thin
    tiles = (weight / largest.where(largest > 0, 1)).unflatten(1, shape)
    tiles = tiles.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)
    (D, height, width), columns = tiles.shape, math.ceil(math.sqrt(len(tiles)))
    canvas = torch.full((math.ceil(D / columns) * (height + 1) - 1, columns * (width + 1) - 1), torch.nan)
    for d, tile in enumerate(tiles):
        top, left = d // columns * (height + 1), d % columns * (width + 1)
        canvas[top : top + height, left : left + width] = tile
    axes.set_axis_off()
    colors = colormaps["RdBu_r"].with_extremes(bad="0.75")  # between the images
    return axes.imshow(canvas.numpy(), cmap=colors, vmin=-1, vmax=1, interpolation="nearest")
