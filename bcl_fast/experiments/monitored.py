"""What a page shows of a layer in anybody's model: the pictures of our own runs, without a control."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..diagnostics import ALIVE_ABOVE, REDUNDANT_ABOVE
from ..glance import values
from . import plots
from .formats import as_text
from .inspector import inspector_data
from .layout import Block, picture, text

MEANINGS = {
    "step": "training step of the layer",
    "aff_sim": "affinity: mean cosine of two features' columns",
    "wa_sim": "weighted affinity: mean cosine of two features' columns",
    "rp_sim": "rescue pull: mean cosine of two features' columns",
    "aff_corr": "affinity: mean correlation of two features' columns",
    "rp_corr": "rescue pull: mean correlation of two features' columns",
    "wt_sim": "mean cosine of two features' weights",
    "wt_abscos": "mean |cosine| of two features' weights",
    "effective_rank": "how many directions the weights span",
    "tgt_sim": "mean cosine of two rescue targets",
    "unique_tgt": "samples that are the first choice of some feature",
    "alive": f"features with a win rate (mean rank_score) above {ALIVE_ABOVE:g}",
    "ever_winning": "features with a win rate above 0 at this step",
    "dead": f"features with a win rate of at most {ALIVE_ABOVE:g}",
    "redundant": f"features with a cosine above {REDUNDANT_ABOVE:g} with one of their neighbors",
    "novelty": "mean novelty: near 1 where features win alone",
    "novelty_min": "least novelty of a feature",
    "novelty_max": "largest novelty of a feature",
    "effective_win": "mean of win rate times novelty",
    "affinity_zeros": "share of affinities that are exactly 0",
    "coverage_cv": "coverage of samples: standard deviation over mean",
    "need_min": "least need of a sample",
    "need_max": "largest need of a sample",
    "gradient": "norm of the gradient, mean over features",
    "pull": "norm of the pull, mean over features",
    "adam": "norm of the optimizer's move, mean over features",
    "adam_over_pull": "optimizer's move over pull",
    "gradient_over_pull": "gradient over pull",
}
SORTED = "Features are sorted by their last win rate here; the step inspector has them by number."
LEFT_OUT = "Features whose norm is 0, for which a logarithm has no place, are counted as left out."
INSPECTOR = "One batch's competition at each measured step: choose a step and a feature."
MOVE = "the optimizer's move"  # Adam's or another
FEATURE_NORMS = ("gradient", "pull", "adam")  # [D]


def layer_blocks(
    name: str,
    lines: Sequence[Mapping[str, Any]],
    glances: Sequence[Mapping[str, Tensor]],
    scalars: Sequence[Mapping[str, Any]],
) -> Iterator[Block]:
    """The pictures of layer `name`, and a table of its last measured step.

    lines: its metrics in the order of steps, at least one; glances: what `glance` kept of the same steps, or nothing,
    read one at a time; scalars: the user's own lines, each with its step.
    """
    names = plots.scalar_names(scalars)
    left_out = names[plots.SHOWN_SCALARS :]
    notes = [f"{plots.SHOWN_SCALARS} of {len(names)} scalars; not shown: {', '.join(left_out)}."] if left_out else []
    yield picture("Course", plots.course_picture(f"Layer {name} over {_steps(lines)}", lines, scalars), *notes)
    if glances:
        yield {"title": "Step inspector", "lines": [INSPECTOR], "inspector": inspector_data(lines, glances)}
        yield from _pictures(name, lines, glances)
    rows = [
        [text(key), text(_as_text(lines[-1][key], key)), text(MEANINGS[key])] for key in MEANINGS if key in lines[-1]
    ]
    table = {"headings": ["metric", f"step {lines[-1]['step']:,}", "what it is"], "rows": rows}
    yield {"title": "Last measured step", "table": table, "text": True}


def _pictures(
    name: str, lines: Sequence[Mapping[str, Any]], glances: Sequence[Mapping[str, Tensor]]
) -> Iterator[Block]:
    """What is drawn feature by feature, or sample by sample."""
    run = _run(lines, small := [_small(kept) for kept in glances])
    yield picture("Win rates", plots.win_rate_picture({f"layer {name}": run}), SORTED)
    forced = [place for place, kept in enumerate(small) if all(norm in kept for norm in FEATURE_NORMS)]
    if forced:
        driven = _run([lines[place] for place in forced], [small[place] for place in forced])
        figure = plots.force_picture(f"Forces on every feature of layer {name}", driven, MOVE)
        yield picture("Forces", figure, LEFT_OUT)
    last, step = glances[-1], lines[-1]["step"]
    shape = tuple(last["image_shape"].tolist())
    if "weight" in last and math.prod(shape):
        images = {
            f"{label} at step {step:,}": values(last, key).unflatten(1, shape)
            for key, label in (("weight", "Weights"), ("rescue_target", "Rescue targets"))
        }
        shown, D = len(last["features"]), len(last["win_rate"])
        notes = [f"{shown} of {D:,} features."] if shown < D else []
        figure = plots.image_picture(f"Features of layer {name} and their rescue targets", images)
        yield picture("Weights and targets", figure, *notes)
    yield picture("Coverage", plots.coverage_picture({f"layer {name}": run}))


def _small(kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the pictures need of every step: glances may lie on disk, and there may be thousands."""
    return {name: kept[name].double() for name in ("win_rate", "image_coverage", *FEATURE_NORMS) if name in kept}


def _run(lines: Sequence[Mapping[str, Any]], glances: Sequence[Mapping[str, Tensor]]) -> plots.Run:
    """Steps in the form of a training of our own; batches may differ in size, so coverage stays a list."""
    tensors: dict[str, Any] = {"step": torch.tensor([line["step"] for line in lines])}
    for name in ("win_rate", *FEATURE_NORMS):
        if all(name in kept for kept in glances):
            tensors[name] = torch.stack([kept[name] for kept in glances])
    tensors["image_coverage"] = [kept["image_coverage"] for kept in glances]
    return plots.Run({"rows": lines}, tensors)


def _steps(lines: Sequence[Mapping[str, Any]]) -> str:
    return "one measured step" if len(lines) == 1 else f"{len(lines):,} measured steps"


def _as_text(value: float | None, key: str) -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    if key in FEATURE_NORMS:
        return f"{value:.2g}"
    return f"{value:,}" if isinstance(value, int) else as_text(value, key)
