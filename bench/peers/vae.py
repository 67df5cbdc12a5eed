"""A VAE of the same decoder, its encoder mirrored, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..steps import Peer
from .eager import mlp, negative_elbo


class VAEStep(Peer):
    """Holes are zeros to the encoder. Noise is not keyed."""

    def _make(self, device: torch.device) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
        s = self.sizes
        with device:
            encoder = mlp((s.columns, *reversed(s.hidden), 2 * s.latents))
            decoder = mlp((s.latents, *s.hidden, s.columns))
        parameters = [*encoder.parameters(), *decoder.parameters()]
        adam = torch.optim.Adam(parameters, lr=self.rates[1], fused=True, capturable=device.type == "cuda")
        return encoder, decoder, adam

    def __call__(self, rows: Tensor, noise: Tensor | None = None) -> Any:
        encoder, decoder, adam = self.make(rows.device)
        x, mask = self.data.batch(rows)
        noise = torch.randn(len(rows), self.sizes.latents, device=rows.device)
        adam.zero_grad()
        mean, log_std = encoder(x * mask).chunk(2, dim=1)
        loss = negative_elbo(decoder, mean, log_std, x, mask, noise, self.sizes.scale)
        loss.backward()
        adam.step()
        return loss
