"""Where the fit of new rows starts, better than at random: from ridge regression."""

from __future__ import annotations

import torch
from torch import Tensor

from .likelihoods import Bernoulli
from .linearization import Linearization
from .model import RowModel

COLUMNS_AT_ONCE = 1 << 22  # numbers of a block of columns' outer products; a model with no more keeps them
ROWS_AT_ONCE = 1 << 24  # of the rows' systems, T^2 each: 64 MiB in float32, and as much for their factors
LEAST_WEIGHT = 1e-6  # of the prior, without which latents that nothing observes have no variance


class LinearStart:
    """The posterior of rows under a linear decoder, where it is a Gaussian: ridge regression on the observed cells.

    With xhat = offset + J z, cell d of precision w_d and trust t_d (see Linearization) and prior N(0, I) of weight
    kl_weight, a row's posterior has the precision A = kl_weight I + sum over observed d of t_d w_d J_d J_d^T and the
    mean A^-1 sum of t_d J_d g_d, where g_d is the gradient of log p(x_d) at z = 0. The closest distribution with
    independent latents has this mean and the variances kl_weight / A_tt, of which the decoder's own slopes make
    kl_weight / (kl_weight + gain_t (A_tt - kl_weight)).
    """

    def __init__(self, model: RowModel, linear: Linearization):
        self.model, self.linear = model, linear
        self.precision = linear.trust * linear.precision
        columns, latent_dim = linear.slope.shape
        self.upper = torch.triu_indices(latent_dim, latent_dim, device=linear.slope.device)
        numbers = torch.arange(self.upper.shape[1], device=linear.slope.device)
        place = numbers.new_empty(latent_dim, latent_dim)
        place[*self.upper] = place.T[*self.upper] = numbers
        self.place = place.flatten()  # in the triangle, of each entry of the whole
        spans = torch.arange(columns).split(max(1, COLUMNS_AT_ONCE // self.upper.shape[1]))
        self.spans = [slice(int(span[0]), int(span[-1]) + 1) for span in spans]
        self.rows_at_once = max(1, ROWS_AT_ONCE // latent_dim**2)
        self.outer = self._outer(self.spans[0]) if len(self.spans) == 1 else None  # else it would fill the memory

    @torch.no_grad()
    def _outer(self, span: slice) -> Tensor:
        """The upper triangle of w_d J_d J_d^T of columns d, [d, T (T + 1) / 2]."""
        slope, (i, j) = self.linear.slope[span], self.upper
        return slope[:, i] * (self.precision[span, None] * slope)[:, j]

    @torch.no_grad()
    def __call__(self, p: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        """p [B, C] with residual and log_std such that the rows' posteriors are those under the linear decoder.

        x [B, D] in the model's units, anything where mask (bool [B, D]) is False. A row whose equations are too ill
        conditioned for its dtype stays as it is.
        """
        posterior, kl_weight = self.model.posterior, max(self.model.kl_weight, LEAST_WEIGHT)
        latent_dim = posterior.latent_dim
        seen = mask.to(p.dtype)
        upper = p.new_zeros(len(p), self.upper.shape[1])
        for span in self.spans:
            upper += seen[:, span] @ (self._outer(span) if self.outer is None else self.outer)
        precision = upper[:, self.place].view(-1, latent_dim, latent_dim)
        del upper  # half as large as what follows
        precision.diagonal(dim1=1, dim2=2).add_(kl_weight)
        pull = torch.where(mask, x - self.model.likelihood.mean(self.linear.offset), 0.0) * self.linear.trust
        if not isinstance(self.model.likelihood, Bernoulli):
            pull = pull * self.linear.precision
        factor, failed = torch.linalg.cholesky_ex(precision)
        mean = torch.cholesky_solve((pull @ self.linear.slope)[:, :, None], factor)[:, :, 0]
        learned = self.linear.gain * (precision.diagonal(dim1=1, dim2=2) - kl_weight)
        log_std = -0.5 * (learned / kl_weight).log1p()
        moved = posterior.moved(p, mean, log_std)
        solved = (failed == 0) & moved.isfinite().all(1)
        return torch.where(solved[:, None], moved, p)
