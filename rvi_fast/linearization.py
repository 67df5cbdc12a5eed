"""The linear map that is closest to a decoder under the prior, and how close it is."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from . import ops
from .likelihoods import Bernoulli, Likelihood
from .model import RowModel

DRAWS, CELLS = 512, 1 << 24  # of z: at most so many, with fewer cells than this, and at least
DRAWS_A_LATENT = 8  # times as many as latents
RIDGE = 1e-12  # of the draws' variance, for latents that do not vary
POSITION, CELL = 0, 1  # steps of the stream "infer" that key the draws' noise


@dataclasses.dataclass
class Linearization:
    """xhat ~ offset + slope z by least squares over draws of z from the prior N(0, I).

    offset [D]; slope [D, T]; precision w [D]: mean of a cell's information about xhat (1/scale^2, or p(1-p) of a
    Bernoulli); trust [D]: 1 / (1 + w e^2) where the map misses xhat by e in the root mean square; gain [T]: the mean
    information of all cells about each latent, with the decoder's own slopes and the cells' own w, over what slope,
    precision and trust make of it.
    """

    offset: Tensor
    slope: Tensor
    precision: Tensor
    trust: Tensor
    gain: Tensor

    @classmethod
    def of(cls, model: RowModel) -> Linearization:
        weight = model.decoder.head.weight
        z = _draws(model).requires_grad_()
        with torch.enable_grad():
            xhat = model.decoder(z)
            weights = _information(model.likelihood, xhat.detach())
            errors = _normal(model, CELL, len(z), xhat.shape[1])  # whitened: of precision 1
            (score,) = torch.autograd.grad(xhat, z, weights.sqrt() * errors)  # its variance is the information
        offset, slope, missed = (t.to(weight) for t in _least_squares(*(t.detach().cpu().double() for t in (z, xhat))))
        precision = weights.mean(0)
        trust = 1 / (1 + precision * missed)
        linear_score = ((trust * precision).sqrt() * errors) @ slope
        least = torch.finfo(score.dtype).tiny
        gain = score.square().mean(0).clamp(min=least) / linear_score.square().mean(0).clamp(min=least)
        return cls(offset, slope, precision, trust, gain)


def _least_squares(z: Tensor, xhat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """offset [D] and slope [D, T] of the linear map closest to xhat [n, D] of z [n, T], and its mean squared errors."""
    centred, at_centre = z - z.mean(0), xhat.mean(0)
    gram = centred.T @ centred  # not lstsq, whose last bits change from call to call
    gram.diagonal().add_(RIDGE * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
    slope = torch.cholesky_solve(centred.T @ (xhat - at_centre), torch.linalg.cholesky(gram)).T.contiguous()
    missed = (xhat - at_centre - centred @ slope.T).square().mean(0)
    return at_centre - slope @ z.mean(0), slope, missed


def _draws(model: RowModel) -> Tensor:
    """z [n, T] of the prior."""
    columns, latent_dim = model.decoder.head.out_features, model.posterior.latent_dim
    n = max(min(DRAWS, CELLS // columns), DRAWS_A_LATENT * latent_dim)
    return _normal(model, POSITION, n, latent_dim)


def _normal(model: RowModel, step: int, rows: int, columns: int) -> Tensor:
    weight = model.decoder.head.weight
    keys = torch.arange(rows, device=weight.device)
    return ops.philox_normal(model.posterior.seed, "infer", step, keys, columns, dtype=weight.dtype)


@torch.no_grad()
def _information(likelihood: Likelihood, xhat: Tensor) -> Tensor:
    """Minus the expected second derivative of log p(x_d) by xhat_d [n, D]."""
    variance = likelihood.variance(xhat)
    return variance if isinstance(likelihood, Bernoulli) else variance.reciprocal()
