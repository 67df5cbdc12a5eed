"""Dense Adam over tables whose gradients are kept: only the rows of a batch are written into them, and zeroed again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..steps import DenseAdamStep


class KeptGradientsStep(DenseAdamStep):
    """The published algorithm without a new gradient as large as the table at every step."""

    def _make(self, device: torch.device) -> Any:
        model, peer, optimizers = super()._make(device)
        for embedding in peer.embeddings:
            embedding.weight.grad = torch.zeros_like(embedding.weight)
        return model, peer, optimizers

    def __call__(self, rows: Tensor, noise: Tensor | None = None) -> Any:
        _, peer, (optimizer,) = self.make(rows.device)
        x, mask = self.data.batch(rows)
        if noise is None:
            noise = torch.randn(len(rows), self.sizes.latents, device=rows.device)
        for parameter in peer.shared_parameters():
            parameter.grad = None
        own = [embedding.weight.detach().index_select(0, rows).requires_grad_() for embedding in peer.embeddings]
        loss = peer.of_rows(*own, x.to(self.dtype), mask, noise.to(self.dtype))
        loss.backward()
        kept = [embedding.weight.grad for embedding in peer.embeddings]
        for grad, of_batch in zip(kept, own, strict=True):
            grad.index_copy_(0, rows, of_batch.grad)
        optimizer.step()
        for grad in kept:
            grad.index_fill_(0, rows, 0.0)
        return loss
