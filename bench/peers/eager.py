"""RVI in plain PyTorch with dense Adam over all rows: the published algorithm, as one would write it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rvi_fast.model import RowModel
from rvi_fast.nn import RelayPosterior


class EagerRVI(nn.Module):
    """Embeddings for coefficients, residual and log std, relays, an MLP decoder and a Gaussian of fixed scale."""

    def __init__(
        self,
        num_rows: int,
        dim: int,
        latent_dim: int,
        hidden: Sequence[int],
        groups: Sequence[int],
        active: Sequence[int],
        scale: float,
        *,
        sparse: bool = False,
    ):
        super().__init__()
        self.groups, self.active, self.scale = list(groups), list(active), scale
        self.relays = nn.Parameter(torch.empty(sum(groups), latent_dim))
        self.coef = nn.Embedding(num_rows, sum(groups), sparse=sparse)
        self.residual = nn.Embedding(num_rows, latent_dim, sparse=sparse)
        self.log_std = nn.Embedding(num_rows, latent_dim, sparse=sparse)
        self.decoder = mlp((latent_dim, *hidden, dim))

    @property
    def embeddings(self) -> tuple[nn.Embedding, nn.Embedding, nn.Embedding]:
        return self.coef, self.residual, self.log_std

    def shared_parameters(self) -> list[nn.Parameter]:
        return [self.relays, *self.decoder.parameters()]

    @classmethod
    def copy_of(cls, model: RowModel, dim: int, hidden: Sequence[int], scale: float) -> EagerRVI:
        """A peer that starts from a model's present values."""
        posterior = model.posterior
        assert isinstance(posterior, RelayPosterior)
        peer = cls(posterior.num_rows, dim, posterior.latent_dim, hidden, posterior.groups, posterior.active, scale)
        with torch.no_grad():
            peer.relays.copy_(posterior.relays)
            for name in ("coef", "residual", "log_std"):
                getattr(peer, name).weight.copy_(posterior.table.read(name))
            linears = [layer for layer in model.decoder.modules() if isinstance(layer, nn.Linear)]
            for mine, theirs in zip((m for m in peer.decoder if isinstance(m, nn.Linear)), linears, strict=True):
                mine.load_state_dict(theirs.state_dict())
        return peer

    def forward(self, rows: Tensor, x: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
        """Mean negative ELBO of a batch. rows [B], x [B, D], mask [B, D] bool, noise [B, T]."""
        coef, residual, log_std = (embedding(rows) for embedding in self.embeddings)
        return self.of_rows(coef, residual, log_std, x, mask, noise)

    def of_rows(
        self, coef: Tensor, residual: Tensor, log_std: Tensor, x: Tensor, mask: Tensor, noise: Tensor
    ) -> Tensor:
        """The same, of the rows' own parameters [B, ..]."""
        kept = torch.zeros_like(coef)  # multiplying all relays takes half the time of gathering the largest's
        for part, to, active in zip(coef.split(self.groups, 1), kept.split(self.groups, 1), self.active, strict=True):
            to.scatter_(1, part.detach().abs().topk(active, dim=1).indices, 1.0)
        mean = torch.addmm(residual, coef * kept, self.relays)
        return negative_elbo(self.decoder, mean, log_std, x, mask, noise, self.scale)


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def negative_elbo(
    decoder: nn.Module, mean: Tensor, log_std: Tensor, x: Tensor, mask: Tensor, noise: Tensor, scale: float
) -> Tensor:
    """Mean over rows of the negative ELBO of q = N(mean, exp(log_std)^2), at z = mean + exp(log_std) noise."""
    nll = masked_nll(decoder(mean + log_std.exp() * noise), x, mask, scale)
    kl = 0.5 * (mean**2 + (2 * log_std).exp() - 1) - log_std
    return (nll + kl.sum()) / len(x)


def masked_nll(xhat: Tensor, x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Sum over observed entries of -log N(x; xhat, scale^2), in as few passes as torch has for it."""
    seen = mask.to(x.dtype)
    squares = F.mse_loss(xhat * seen, x * seen, reduction="sum")
    return squares / (2 * scale**2) + seen.sum() * (math.log(scale) + 0.5 * math.log(2 * math.pi))
