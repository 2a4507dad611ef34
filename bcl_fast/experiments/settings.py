"""Every condition of the tables by name: the history of the research document, its untested fixes, and their controls.

A setting has the fields of a `Condition` other than data, seed, backend and device, or the kind of a `Baseline` and
its seeds.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..spec import BCLConfig
from .baselines import Baseline
from .jobs import Job
from .run import Condition

SHORT = 301  # steps that hold index 300
LONG = 10_000
LONG_SEEDS = 3  # at most, of the settings that train for LONG steps


def bcl(preset: str, som_lr: float = 0.001, steps: int = SHORT, **options: Any) -> dict[str, Any]:
    """A setting with BCL; options of BCLConfig go to it, the others are fields of `Condition`."""
    known = {field.name for field in dataclasses.fields(BCLConfig)}
    fields = {name: options.pop(name) for name in [*options] if name not in known}
    return {"config": BCLConfig.preset(preset, som_lr=som_lr, **options), "steps": steps, **fields}


def plain(**fields: Any) -> dict[str, Any]:
    """A setting without BCL."""
    return {"config": None, "steps": LONG, **fields}


DOCUMENT = {
    "soft-clamp": bcl("soft-clamp"),  # bcl-slow
    "bcl-micro": bcl("soft-clamp", 1e-4),
    "bcl-tiny": bcl("soft-clamp", 3e-4),
    "hard-clamp": bcl("hard-clamp"),
    "hard-rank": bcl("hard-rank"),
    "decoupled": bcl("decoupled"),
    **{f"rescue_k {k}": bcl("decoupled", rescue_k=k) for k in (1, 3, 8, 16)},
    # What explains the cells that do not replicate.
    "dense clamp": bcl("soft-clamp", rescue_k=0),
    "hard-rank, Adam's eps 1e-12": bcl("hard-rank", eps=1e-12),
    "hard-rank, Adam's eps 1e-4": bcl("hard-rank", eps=1e-4),
    "plain, 300 steps": {"config": None, "steps": SHORT},
    "random weights": {"kind": "random-weights", "seeds": (42, 123, 456, 789, 999)},
    **{f"random weights {seed}": {"kind": "random-weights", "seeds": (seed,)} for seed in (42, 123, 456, 789, 999)},
    "uniform images": {"kind": "uniform-images", "seeds": (42, 123, 456, 789, 999)},
}

# Fixes, each at two strengths of the pull. The number or letter is that of the research document.
PULLS: dict[str, dict[str, Any]] = {
    "decoupled": {},
    "1 raw cosine, soft top-8": dict(affinity="cosine", rescue_weighting="soft", rescue_k=8),
    "1 raw cosine, hard top-5": dict(affinity="cosine"),
    "3 contrastive top-1, clamp": dict(affinity="clamped_cosine", rescue_k=1, need_weighting=False),
    "3 contrastive top-1, rank": dict(rescue_k=1, need_weighting=False),
    "4 orthogonal targets": dict(target_projection="orthogonal"),
    "4 centred targets": dict(target_projection="centered"),
    **{f"5 rescue_onset {onset}": dict(rescue_onset=onset) for onset in (0.005, 0.01, 0.02)},
    **{f"5 pull_onset {onset}": dict(pull_onset=onset) for onset in (0.005, 0.01, 0.02)},
    "B offset space": dict(som_space="offset"),
    **{
        f"C {name}, lambda {weight}": dict(diversity=diversity, diversity_weight=weight)
        for name, diversity in (("weight similarity", "weight_similarity"), ("entropy", "activation_entropy"))
        for weight in (0.01, 0.1, 1.0)
    },
    "D winner-take-all": dict(gradient_mask="winner_take_all"),
    "no mask": dict(gradient_mask="none"),
    "B offset space, no mask": dict(som_space="offset", gradient_mask="none"),
    "centred inputs": dict(inputs="centered"),
}
CONTROLS: dict[str, dict[str, Any]] = {
    "plain": plain(),
    "plain, centred inputs": plain(inputs="centered"),
    "plain, no activation": plain(activation="none"),
    "plain, dead redrawn": plain(resample_every=500),
    "mask only": bcl("decoupled", 0, LONG),
}

FIXES: dict[str, dict[str, dict[str, Any]]] = {  # group -> name -> setting
    "Controls": {
        **CONTROLS,
        "D winner-take-all mask only": bcl("decoupled", 0, LONG, gradient_mask="winner_take_all"),
        "PCA": {"kind": "pca", "seeds": (0,)},
    },
    "Diversity loss without BCL": {
        f"plain, {name[2:]}": plain(**options) for name, options in PULLS.items() if name.startswith("C ")
    },
    "BCL, som_lr 0.001": {f"{name} (0.001)": bcl("decoupled", 0.001, LONG, **o) for name, o in PULLS.items()},
    "BCL, som_lr 0.01": {f"{name} (0.01)": bcl("decoupled", 0.01, LONG, **o) for name, o in PULLS.items()}
    | {
        "4 centred targets, no mask (0.01)": bcl(
            "decoupled", 0.01, LONG, target_projection="centered", gradient_mask="none"
        )
    },
    "A other som_lr": {f"A som_lr {som_lr}": bcl("decoupled", som_lr, LONG) for som_lr in (0.005, 0.02, 0.05)},
    "Trained on MSE": {f"{name}, MSE": {**fields, "loss": "mse"} for name, fields in CONTROLS.items()}
    | {
        f"{name} ({som_lr}), MSE": bcl("decoupled", som_lr, LONG, loss="mse", **PULLS[name])
        for name, som_lr in (
            ("decoupled", 0.001),
            ("decoupled", 0.01),
            ("no mask", 0.01),
            ("3 contrastive top-1, rank", 0.01),
            ("4 orthogonal targets", 0.01),
            ("B offset space", 0.01),
            ("C weight similarity, lambda 1.0", 0.001),
            ("D winner-take-all", 0.01),
        )
    },
}
SETTINGS = DOCUMENT | {name: fields for group in FIXES.values() for name, fields in group.items()}


def jobs_of(name: str, data: str, seeds: int, most_steps: int = LONG, **common: Any) -> list[Job]:
    """The runs of one setting, cut to `most_steps`: seeds 0, 1, ... as many as asked, at most LONG_SEEDS of LONG ones.

    `common` are further fields of every Condition, such as its device. A baseline has seeds of its own.
    """
    fields = dict(SETTINGS[name])
    if "kind" in fields:
        return [Baseline(data, fields["kind"], seed) for seed in fields["seeds"]]
    asked = min(seeds, LONG_SEEDS) if fields["steps"] == LONG else seeds
    fields["steps"] = min(fields["steps"], most_steps)
    return [Condition(data=data, seed=seed, **fields, **common) for seed in range(asked)]
