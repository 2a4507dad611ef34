"""What needs no training: how alike affinity columns of random weights are, how alike images are, and PCA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from ..diagnostics import column_correlation, column_cosine, zero_fraction
from ..spec import check_choice, check_number
from .data import DATA_SETS, Images

KINDS = ("random-weights", "uniform-images", "pca")
BATCH_SEED, BATCH_SIZE, FEATURES = 42, 128, 64  # those of the research document


@dataclass(frozen=True)
class Baseline:
    """One measurement without training; equal baselines give equal records.

    Raises TypeError or ValueError that names the field, its value and what is allowed.
    """

    data: str  # digits, mnist
    kind: str  # random-weights, uniform-images (the same on noise in place of images), pca
    seed: int = 0  # >= 0, of the random weights
    steps: int = 1  # nothing is trained: the one row is that of step 0

    def __post_init__(self) -> None:
        check_choice("data", self.data, DATA_SETS)
        check_choice("kind", self.kind, KINDS)
        check_number("seed", self.seed, low=0, integer=True)


def measure(baseline: Baseline, images: Images) -> dict[str, Any]:
    """The record of a baseline: `rows` and `held_out`, as those of a training run."""
    if baseline.kind == "pca":
        return {"rows": [], "held_out": pca(images, FEATURES)}
    batch = first_batch(torch.cat([images.train, images.held_out]))
    if baseline.kind == "uniform-images":
        batch = torch.rand(batch.shape, generator=torch.Generator().manual_seed(BATCH_SEED))
    weight = torch.randn(FEATURES, batch.shape[1], generator=torch.Generator().manual_seed(baseline.seed))
    return {"rows": [{"step": 0, **affinity_similarity(batch, weight), **image_similarity(batch)}], "held_out": {}}


def first_batch(images: Tensor) -> Tensor:
    """The first batch [128, pixels] of a shuffled DataLoader over images [n, pixels] under `torch.manual_seed(42)`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(BATCH_SEED)
        return next(iter(DataLoader(images, BATCH_SIZE, shuffle=True)))


def affinity_similarity(images: Tensor, weight: Tensor) -> dict[str, float]:
    """How alike the columns of each affinity rule are: images [B, pixels], weight [D, pixels].

    For the raw cosine, for the clamped one and for ranks; cosine between columns, and Pearson correlation.
    """
    raw = F.normalize(images, dim=1) @ F.normalize(weight, dim=1).T
    clamped = raw.clamp(min=0)
    rank = raw.argsort(dim=0, stable=True).argsort(dim=0).float() / (len(images) - 1)
    return {
        "raw_cosine": column_cosine(raw),
        "clamped_cosine": column_cosine(clamped),
        "clamped_correlation": column_correlation(clamped),
        "clamped_fraction": zero_fraction(clamped),
        "rank_cosine": column_cosine(rank),
        "rank_correlation": column_correlation(rank),
    }


def image_similarity(images: Tensor) -> dict[str, float]:
    """Mean, least and largest cosine of two different images of [B, pixels]."""
    unit = F.normalize(images, dim=1)
    pairs = (unit @ unit.T)[~torch.eye(len(images), dtype=torch.bool)]
    return {"image_cosine": pairs.mean().item(), "image_min": pairs.min().item(), "image_max": pairs.max().item()}


def pca(images: Images, rank: int) -> dict[str, float]:
    """How held-out images come back from the leading `rank` principal components of the training images, cut to [0, 1].

    The best linear autoencoder of that width in squared error: what a nonlinear one has to beat.
    """
    train, held_out = images.train.double(), images.held_out.double()
    mean = train.mean(dim=0)
    centered = train - mean
    components = torch.linalg.eigh(centered.T @ centered).eigenvectors[:, -min(rank, train.shape[1]) :]
    error = ((held_out - mean) @ components @ components.T + mean).clamp(0, 1) - held_out
    return {"l1": error.abs().mean().item(), "mse": error.square().mean().item()}
