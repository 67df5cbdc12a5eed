"""torch.optim.SparseAdam on sparse gradients of the embeddings: lazy Adam, which is a different algorithm."""

from __future__ import annotations

import torch

from ..steps import DenseAdamStep
from .eager import EagerRVI


class SparseAdamStep(DenseAdamStep):
    """Rows that a batch does not hold stay where they are, momentum and all."""

    sparse = True
    capture = False

    def _optimizers(self, peer: EagerRVI, device: torch.device) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.SparseAdam([e.weight for e in peer.embeddings], lr=self.rates[0]),
            torch.optim.Adam(peer.shared_parameters(), lr=self.rates[1], fused=True, capturable=device.type == "cuda"),
        ]
