"""The autoencoder of the experiments."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layer import BCLLayer
from ..spec import BCLConfig


class Autoencoder(nn.Module):
    """Linear, ReLU, Linear, sigmoid: images [B, pixels] in [0, 1] -> their reconstructions [B, pixels].

    The encoder is a BCLLayer with `config` on `backend` (None: the fastest), or a plain nn.Linear where `config` is
    None. Both draw the same random numbers: after the same `torch.manual_seed` all weights are equal.
    """

    def __init__(self, pixels: int, features: int, config: BCLConfig | None, backend: str | None = None) -> None:
        super().__init__()
        if config is None:
            self.encoder: nn.Linear = nn.Linear(pixels, features)
        else:
            self.encoder = BCLLayer(pixels, features, backend=backend, config=config)
        self.decoder = nn.Linear(features, pixels)

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images).relu()).sigmoid()

    @property
    def encoder_weight(self) -> Tensor:
        """The weight the encoder multiplies with [features, pixels], detached: W, or W + O in offset space."""
        offset = getattr(self.encoder, "som_offset", None)
        weight = self.encoder.weight.detach()
        return weight if offset is None else weight + offset

    @torch.no_grad()
    def fires(self, images: Tensor) -> Tensor:
        """Which features are above zero for any of images [B, pixels]: [features] bool."""
        return (self.encoder(images) > 0).any(dim=0)
