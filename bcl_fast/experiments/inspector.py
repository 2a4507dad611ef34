"""The step inspector's data: the kept steps of a layer, packed to fit a page. inspector.js draws what this returns."""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..glance import MATRICES, VECTORS, Shape

STEPS = 40  # inspected at most
BYTES = 8_000_000  # of page, at most
SIDE = 32  # pixels of an image, at most, in either direction
INPUTS = 1024  # of a feature whose inputs are no images, at most
CURVE = 400  # steps at most on the curve of win rates
OF_FEATURES = ("win_rate", "novelty", "som_strength", "gradient", "pull", "adam", "nearest")  # [D]
OF_LINES = ("alive", "dead", "redundant", "wt_sim", "tgt_sim")


def inspector_data(lines: Sequence[Mapping[str, Any]], glances: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """What the step inspector of one layer shows; numbers and texts alone, None where one is not finite.

    lines: the metrics of the measured steps, in order; glances: what `glance` kept of the same steps, at least one, and
    where there was an optimizer `gradient`, `pull`, `adam` and `nearest` [D]. b, d, m, r as there; n values of a vector
    as it is shown:

    - `measured`, `features_of`, `inputs`: how many steps, features and inputs there are; `features` [d]: which are kept
    - `shape`: channels (1 or 3), height, width of the images shown, None where inputs are no images;
      `full_shape`: as they are; `length`: n, None where no vectors were kept
    - `curve`: `step` [c], `win_rate` [d][c] over the measured steps, or CURVE of them
    - `steps`: a dict for each of at most STEPS steps, evenly spread, and fewer where they would take more than BYTES:
        - `step`; `batch`: B; `samples`, `winner`, `pulls`, `coverage`, `need` [b]; `metrics`: those of OF_LINES
        - each of OF_FEATURES [d]; `rescue_rows`, `rescue_weight` [d][r]; `chosen` [m]
        - `range`: NAME -> what 0 and 255 stand for, for each feature of VECTORS; `alike`: NAME -> mean cosine and
          correlation of all columns
        - `packed`: base64 of the zlib stream of bytes: MATRICES, each [b, d], then, with vectors, VECTORS, each [d, n],
          and the inputs [m, n]
    """
    last = glances[-1]
    D, features = len(last["win_rate"]), last["features"]
    shape = tuple(last["image_shape"].tolist())
    full = shape if math.prod(shape) else None
    places = spread(len(glances), CURVE)
    curve = torch.stack([glances[place]["win_rate"][features] for place in places], dim=1)  # [d, c]
    data = {
        "measured": len(glances),
        "features_of": D,
        "features": features.tolist(),
        "inputs": last["weight"].shape[1] if "weight" in last else None,
        "full_shape": full and list(full),
        "shape": full and list(_shown_shape(full)),
        "length": _shown(last["weight"][:1], full).shape[1] if "weight" in last else None,
        "curve": {"step": [lines[place]["step"] for place in places], "win_rate": _numbers(curve)},
    }
    return {**data, "steps": _steps(lines, glances, full, BYTES - len(json.dumps(data)))}


def spread(count: int, most: int) -> list[int]:
    """At most `most` >= 2 of `count` places, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [i * (count - 1) // (most - 1) for i in range(most)]


def _steps(
    lines: Sequence[Mapping[str, Any]], glances: Sequence[Mapping[str, Tensor]], full: Shape | None, room: int
) -> list[dict[str, Any]]:
    """As many packed steps as may be and have room; the first and the last at any size."""
    packed: dict[int, dict[str, Any]] = {}
    sizes: dict[int, int] = {}
    most = min(STEPS, len(glances))
    while True:
        places = spread(len(glances), max(2, most))
        for place in places:
            if place not in packed:
                packed[place] = _step(lines[place], glances[place], full)
                sizes[place] = len(json.dumps(packed[place]))
        size = sum(sizes[place] for place in places)
        if size <= room or most <= 2:
            return [packed[place] for place in places]
        most = max(2, min(most - 1, most * room // size))


def _step(line: Mapping[str, Any], kept: Mapping[str, Tensor], full: Shape | None) -> dict[str, Any]:
    features, samples = kept["features"], kept["samples"]
    named = [*MATRICES, *(name for name in (*VECTORS, "inputs") if name in kept)]
    parts = [kept[name] if name in MATRICES else _shown(kept[name], full) for name in named]
    content = b"".join(part.contiguous().numpy().tobytes() for part in parts)
    return {
        "step": line["step"],
        "batch": len(kept["image_coverage"]),
        "samples": samples.tolist(),
        "winner": kept["winner"].tolist(),
        "pulls": kept["pulls"].tolist(),
        "coverage": _numbers(kept["image_coverage"][samples]),
        "need": _numbers(kept["image_need"][samples]),
        "metrics": {name: _number(line[name]) for name in OF_LINES if name in line},
        **{name: _numbers(kept[name][features]) for name in OF_FEATURES if name in kept},
        "rescue_rows": kept["rescue_rows"].tolist(),
        "rescue_weight": _numbers(kept["rescue_weight"]),
        "chosen": kept["chosen"].tolist() if "chosen" in kept else [],
        "range": {name: _numbers(kept[f"{name}_range"]) for name in named},
        "alike": {name: _numbers(kept[f"{name}_alike"]) for name in MATRICES},
        "packed": base64.b64encode(zlib.compress(content, 6)).decode(),
    }


def _shown_shape(full: Shape) -> Shape:
    channels, height, width = full
    scale = min(1.0, SIDE / max(height, width))
    return 3 if channels == 3 else 1, *(max(1, round(side * scale)) for side in (height, width))


def _shown(vectors: Tensor, full: Shape | None) -> Tensor:
    """Bytes [rows, N] as they are shown, [rows, n]: images averaged to fewer pixels, other inputs evenly spaced."""
    if full is None:
        return vectors[:, spread(vectors.shape[1], INPUTS)]
    channels, *size = _shown_shape(full)
    if (channels, *size) == full:
        return vectors
    images = vectors.unflatten(1, full).float()
    images = images if channels == 3 else images.mean(dim=1, keepdim=True)
    return F.adaptive_avg_pool2d(images, size).round().to(torch.uint8).flatten(1)


def _numbers(tensor: Tensor) -> list[Any]:
    """A tensor as nested lists, rounded to what is worth its place in a page."""
    if tensor.ndim > 1:
        return [_numbers(row) for row in tensor]
    return [_number(value) for value in tensor.tolist()]


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
