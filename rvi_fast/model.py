"""The generative model that every estimator trains: a posterior, a decoder and a likelihood."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import ops, reference
from .likelihoods import Likelihood
from .nn import MeanFieldPosterior, MLPDecoder, RelayPosterior


class LatentModel(nn.Module):
    """x <- decoder(z), z ~ q(z|x) in training; the loss is the negative ELBO over the observed entries (eq. 2)."""

    def __init__(self, decoder: MLPDecoder, likelihood: Likelihood, kl_weight: float):
        super().__init__()
        self.decoder = decoder
        self.likelihood = likelihood
        self.kl_weight = kl_weight

    def sample(self, rows: Tensor, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """z [B, T] and kl [B] of training rows."""
        raise NotImplementedError

    def forward(self, rows: Tensor, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """-log p(x_observed | z) and KL(q || prior) of each row, in nats.

        rows: int64 [B]; x: float32 [B, D] in the model's units; mask: bool [B, D]. Returns nll [B], kl [B].
        """
        z, kl = self.sample(rows, x, mask)
        return self.likelihood.linear_nll(self.decoder.head, self.decoder.features(z), x, mask), kl

    def row_loss(self, nll: Tensor, kl: Tensor) -> Tensor:
        """A row's negative ELBO, with the weight of its KL term."""
        return nll + self.kl_weight * kl


class RowModel(LatentModel):
    """Every training row owns its posterior's parameters (RVI, VAD)."""

    def __init__(
        self,
        posterior: RelayPosterior | MeanFieldPosterior,
        decoder: MLPDecoder,
        likelihood: Likelihood,
        kl_weight: float,
    ):
        super().__init__(decoder, likelihood, kl_weight)
        self.posterior = posterior

    def sample(self, rows: Tensor, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.posterior(rows)


class Encoder(nn.Module):
    """x with holes -> mean and log std of q(z|x): an MLP over the filled columns, and the mask if asked for.

    missing: what the encoder sees in a hole: "zero" or "mean" (the column's, in the model's units), or "zero+mask".
    """

    MISSING = ("zero", "mean", "zero+mask")

    def __init__(self, column_mean: Tensor, latent_dim: int, hidden: Sequence[int], activation: str, missing: str):
        super().__init__()
        if missing not in self.MISSING:
            raise ValueError(f"missing must be one of {', '.join(self.MISSING)}; got {missing!r}")
        self.missing = missing
        fill = column_mean if missing == "mean" else torch.zeros_like(column_mean)
        self.register_buffer("fill", fill)
        inputs = len(column_mean) * (2 if missing == "zero+mask" else 1)
        self.mlp = MLPDecoder(inputs, 2 * latent_dim, hidden, activation=activation)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """x float32 [B, D], mask bool [B, D] -> mean, log_std [B, T]."""
        seen = mask.to(x.dtype)
        filled = reference.without_holes(x, mask) + self.fill * (1 - seen)  # type: ignore[operator]
        inputs = torch.cat((filled, seen), dim=1) if self.missing == "zero+mask" else filled
        mean, log_std = self.mlp(inputs).chunk(2, dim=1)
        return mean, log_std


class EncoderModel(LatentModel):
    """An encoder gives the posterior (VAE): the peer that RVI is compared with."""

    step: Tensor

    def __init__(self, encoder: Encoder, decoder: MLPDecoder, likelihood: Likelihood, kl_weight: float, seed: int):
        super().__init__(decoder, likelihood, kl_weight)
        self.encoder = encoder
        self.seed = seed
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def sample(self, rows: Tensor, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.encoder(x, mask)
        noise = ops.philox_normal(self.seed, "train", self.step, rows, mean.shape[1])
        self.step += 1
        return ops.gaussian_sample(mean, log_std, noise)
