"""The decoder alone: what a step would cost if rows, relays and noise were free."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..steps import Peer
from .eager import masked_nll, mlp


class DecoderStep(Peer):
    """Gathers the batch; forward, masked loss, backward and Adam of a decoder at one z."""

    def _make(self, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer, dict[int, Tensor]]:
        s = self.sizes
        with device:
            decoder = mlp((s.latents, *s.hidden, s.columns))
        cuda = device.type == "cuda"
        return decoder, torch.optim.Adam(decoder.parameters(), lr=self.rates[1], fused=True, capturable=cuda), {}

    def __call__(self, rows: Tensor, noise: Tensor | None = None) -> Any:
        decoder, adam, drawn = self.make(rows.device)
        if len(rows) not in drawn:
            drawn[len(rows)] = torch.randn(len(rows), self.sizes.latents, device=rows.device)
        x, mask = self.data.batch(rows)
        adam.zero_grad()
        loss = masked_nll(decoder(drawn[len(rows)]), x, mask, self.sizes.scale) / len(rows)
        loss.backward()
        adam.step()
        return loss
