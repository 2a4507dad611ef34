"""One measured step as pictures need it: a part of its tensors, small enough to keep for every one of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .diagnostics import column_correlation, column_cosine
from .reference import Record

MATRICES = ("affinity", "weighted_affinity", "rescue_pull", "rank_score", "local_novelty", "gradient_mask")  # [B, D]
VECTORS = ("weight", "winner_target", "rescue_target", "som_target")  # [D, N]
SAMPLES, FEATURES, RESCUED = 96, 64, 5  # kept of a batch, of a layer, and of the samples that rescue one feature
WIDEST = 4096  # inputs a feature may have whose vectors are kept
ALIKE = 0.25  # the correlation of neighboring inputs above which they are pixels
Shape = tuple[int, int, int]  # channels, height, width


def glance(record: Record, image_shape: Shape | None) -> dict[str, Tensor]:
    """What is kept of a step, on the CPU; b of B samples and d of D features, evenly spaced.

    - `win_rate`, `novelty`, `som_strength` [D]; `image_coverage`, `image_need` [B], whole
    - `samples` [b], `features` [d]: which are kept; `winner` [b]: the feature that wins each; `pulls` [b]: how many of
      all features each pulls
    - each of MATRICES [b, d] as bytes, `NAME_range` [2]: what 0 and 255 stand for, `NAME_alike` [2]: the mean
      off-diagonal cosine and correlation of all D columns
    - `rescue_rows` [d, r], `rescue_weight` [d, r]: the samples that pull most, r <= RESCUED
    - for at most WIDEST inputs each of VECTORS [d, N], with ranges [d, 2]: each feature has its own; and `chosen` [m]
      with `inputs` [m, N], as bytes: the samples in rescue_rows
    - `image_shape` [3]: channels, height, width; zeros where the inputs are no images
    """
    (B, D), N = record.rank_score.shape, record.x.shape[1]
    samples, features = (_spaced(size, most, record.x.device) for size, most in ((B, SAMPLES), (D, FEATURES)))
    kept = {name: getattr(record, name) for name in ("win_rate", "novelty", "som_strength")}
    kept |= {name: getattr(record, name) for name in ("image_coverage", "image_need")}
    kept |= {"samples": samples, "features": features, "winner": record.winner[samples]}
    kept["pulls"] = (record.rescue_pull[samples] > 0).sum(dim=1)
    for name in MATRICES:
        matrix = getattr(record, name)
        alike = torch.tensor([column_cosine(matrix), column_correlation(matrix)])
        kept |= {**_bytes(name, matrix[samples][:, features]), f"{name}_alike": alike}
    pulls = record.rescue_pull[:, features]  # [B, d]
    weight, rows = pulls.topk(min(RESCUED, record.rescue_rows.shape[1], B), dim=0)
    kept |= {"rescue_rows": rows.T, "rescue_weight": weight.T}
    if N <= WIDEST:
        for name in VECTORS:
            kept |= _bytes(name, getattr(record, name)[features], each=True)
        chosen = rows.unique()
        kept |= {"chosen": chosen, **_bytes("inputs", record.x[chosen])}
    kept["image_shape"] = torch.tensor(image_shape or (0, 0, 0))
    return {name: tensor.detach().cpu().contiguous() for name, tensor in kept.items()}


def values(kept: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor that was kept as bytes, in float64, to 1/255 of its range."""
    low, high = kept[f"{name}_range"].double()[..., None].unbind(dim=-2)
    share = kept[name].double() / 255
    return low * (1 - share) + high * share  # whose difference may overflow


def _spaced(size: int, most: int, device: torch.device) -> Tensor:
    """All of `size` indices, or as many as may be, evenly spaced: the same ones in every step."""
    return torch.arange(min(size, most), device=device) * size // min(size, most)


def _bytes(name: str, matrix: Tensor, each: bool = False) -> dict[str, Tensor]:
    """A matrix as bytes over the range of its finite values, or of `each` row's; NaN is the least, Inf at its end."""
    rows = matrix if each else matrix.reshape(1, -1)
    finite = rows.where(rows.isfinite(), 0)
    low, high = finite.amin(dim=1, keepdim=True), finite.amax(dim=1, keepdim=True)
    span = high / 2 - low / 2  # the whole of it may overflow
    levels = (rows.clamp(low, high) / 2 - low / 2) / span.where(span > 0, 1) * 255
    bounds = torch.cat([low, high], dim=1)
    return {
        name: levels.nan_to_num(0).round().to(torch.uint8).reshape_as(matrix),
        f"{name}_range": bounds if each else bounds[0],
    }


def image_shape_of(x: Tensor) -> Shape | None:
    """The images that x [B, N] seems to hold, or None: one or three squares, whose neighboring pixels are alike."""
    B, N = x.shape
    for channels in (1, 3):
        side = math.isqrt(N // channels)
        if channels * side * side != N or side < 4 or B < 2:
            continue
        pixels = x.float().unflatten(1, (channels, side, side))
        pixels = pixels - pixels.mean(dim=0)  # what all samples share says nothing of how neighbors vary
        energy = pixels.square().mean()
        across = (pixels[..., 1:] * pixels[..., :-1]).mean()
        down = (pixels[..., 1:, :] * pixels[..., :-1, :]).mean()
        if bool(torch.minimum(across, down) > ALIKE * energy):
            return channels, side, side
    return None


def check_glance(kept: Mapping[str, Tensor]) -> None:
    """Raise where something is not what `glance` returns."""
    expected = "win_rate image_coverage image_need samples features winner pulls image_shape".split()
    for name in (*expected, *MATRICES):
        if not torch.is_tensor(kept[name]):
            raise TypeError(f"{name} must be a tensor, got a {type(kept[name]).__name__}")
    shape = len(kept["samples"]), len(kept["features"])
    for name in MATRICES:
        if tuple(kept[name].shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(kept[name].shape)}")
