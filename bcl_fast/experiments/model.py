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

    `linear` leaves out the ReLU. `center` [pixels] is subtracted from what the encoder sees.
    """

    center: Tensor | None

    def __init__(
        self,
        pixels: int,
        features: int,
        config: BCLConfig | None,
        backend: str | None = None,
        *,
        linear: bool = False,
        center: Tensor | None = None,
    ) -> None:
        super().__init__()
        if config is None:
            self.encoder: nn.Linear = nn.Linear(pixels, features)
        else:
            self.encoder = BCLLayer(pixels, features, backend=backend, config=config)
        self.decoder = nn.Linear(features, pixels)
        self.linear = linear
        self.register_buffer("center", center)

    def encode(self, images: Tensor) -> Tensor:
        """images [B, pixels] -> the encoder's output before the ReLU [B, features]."""
        return self.encoder(images if self.center is None else images - self.center)

    def decode(self, activation: Tensor) -> Tensor:
        """activation [B, features] -> reconstructions [B, pixels]."""
        return self.decoder(activation if self.linear else activation.relu()).sigmoid()

    def forward(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images))

    @property
    def encoder_weight(self) -> Tensor:
        """The weight the encoder multiplies with [features, pixels], detached: W, or W + O in offset space."""
        encoder = self.encoder
        return encoder.effective_weight if isinstance(encoder, BCLLayer) else encoder.weight.detach()

    @torch.no_grad()
    def fires(self, images: Tensor) -> Tensor:
        """Which features are above zero for any of images [B, pixels]: [features] bool."""
        return (self.encode(images) > 0).any(dim=0)

    @torch.no_grad()
    def redraw(self, features: Tensor, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
        """Give the features of a mask [features] new weights, as nn.Linear draws them, and forget their moments."""
        encoder, decoder = self.encoder, self.decoder
        # What belongs to a feature: its row, its bias, its column.
        for parameter, rows in ((encoder.weight, True), (encoder.bias, True), (decoder.weight, False)):
            fan_in = decoder.in_features if parameter is decoder.weight else encoder.in_features
            part = features if rows else (slice(None), features)
            for tensor in optimizer.state[parameter].values():
                if tensor.shape == parameter.shape:
                    tensor[part] = 0
            shape = parameter[part].shape
            parameter[part] = ((2 * torch.rand(shape, generator=generator) - 1) * fan_in**-0.5).to(parameter.device)
