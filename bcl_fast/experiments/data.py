"""The images that experiments train on, each set as one tensor, and the order in which they are seen."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..spec import check_choice

DATA_SETS = ("digits", "mnist")
TRAIN_SHARE = 0.85  # the first images of a set are trained on, the rest is held out


@dataclass(frozen=True)
class Images:
    """One data set, flattened and split; values in [0, 1], not standardized."""

    name: str  # one of DATA_SETS
    train: Tensor  # [n, pixels] float32
    held_out: Tensor  # [m, pixels] float32
    shape: tuple[int, int]  # height and width of an image

    def to(self, device: torch.device | str) -> Images:
        """The same images on `device`."""
        return Images(self.name, self.train.to(device), self.held_out.to(device), self.shape)


def split(name: str, images: Tensor) -> Images:
    """images [n, height, width] in [0, 1] -> the first 85 % to train on, the others held out."""
    flat = images.to(torch.float32).flatten(1)
    cut = int(TRAIN_SHARE * len(flat))
    return Images(name, flat[:cut], flat[cut:], tuple(images.shape[1:]))


def digits() -> Images:
    """The 1,797 digits of 8 x 8 pixels that scikit-learn brings: 1,527 to train on."""
    from sklearn.datasets import load_digits

    return split("digits", torch.from_numpy(load_digits().images) / 16)


def mnist(root: Path | str, download: bool = False) -> Images:
    """The 60,000 training images of MNIST, 28 x 28 pixels, under `root`: 51,000 to train on.

    Raises FileNotFoundError where `root` does not hold them, ConnectionError where they cannot be downloaded, and
    ValueError where their file is damaged.
    """
    path = Path(root, "MNIST", "raw", "train-images-idx3-ubyte")
    if not path.exists():
        if not download:
            raise FileNotFoundError(
                f"no MNIST in {root}: name the folder that holds MNIST/raw (--data-dir), or fetch it (--download)"
            )
        from torchvision.datasets import MNIST

        try:
            MNIST(root=root, download=True)
        except RuntimeError as error:
            raise ConnectionError(f"cannot download MNIST to {root}: {str(error).splitlines()[0]}") from error
    return split("mnist", read_idx(path) / 255)


def read_idx(path: Path) -> Tensor:
    """The images [n, height, width] uint8 of a file in MNIST's format: four big-endian numbers, then the pixels."""
    content = path.read_bytes()
    magic, *shape = struct.unpack(">4I", content[:16].ljust(16, b"\0"))
    if magic != 0x803 or len(content) != 16 + math.prod(shape) or 0 in shape:
        raise ValueError(f"{path} is damaged or no file of images: delete it and fetch it again (--download)")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=16).reshape(shape)


def load(name: str, root: Path | str, download: bool = False) -> Images:
    """The images of one of DATA_SETS; `root` and `download` as for `mnist`."""
    return mnist(root, download) if check_choice("data", name, DATA_SETS) == "mnist" else digits()


def batches(images: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Batches [batch_size, pixels] of images [n, pixels] without end, in an order that `seed` alone decides.

    Every epoch is a fresh `torch.randperm` of one generator seeded with `seed`; the last images, too few for a batch,
    are left out, as by a shuffling DataLoader with drop_last. Raises ValueError where `images` do not fill one batch.
    """
    if batch_size > len(images):
        raise ValueError(f"batch_size must be at most {len(images)}, the number of training images, got {batch_size}")
    return _endless(images, batch_size, torch.Generator().manual_seed(seed))


def _endless(images: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for rows in order.split(batch_size):
            if len(rows) == batch_size:
                yield images[rows]
