"""What a row's cells may be, given those observed: draws of z through the decoder, weighted by the model or not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from . import reference
from .model import LatentModel
from .reference import PredictiveMoments

LEAST = torch.finfo(torch.float64).min  # of a log weight: -inf less -inf is no number


@dataclasses.dataclass
class Predictive:
    """p(x | x_observed) of every cell of M rows, in the user's units; float64 [M, D] each, and ess [M].

    at_mean: f(mean), the decoder's output at the posterior mean, which `impute` fills in and `reconstruct` returns;
    mean: E[f(z)], its mean over draws of z; std: the standard deviation of f(z), what z leaves open; std_with_noise:
    that of the cell itself, the likelihood's noise included; ess: effective number of draws, 1 / sum of squared
    normalised weights (eq. 24), the number of draws itself where they are not weighted.
    """

    at_mean: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    std_with_noise: np.ndarray
    ess: np.ndarray

    def __len__(self) -> int:
        return len(self.ess)


@torch.no_grad()
def weighted_draws(
    model: LatentModel, x: Tensor, mask: Tensor, mean: Tensor, std: Tensor, noises: Iterable[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The decoder's output [B, D] at z = mean + std * noise, and the log of the draw's weight, float64 [B] (eq. 21).

    x [B, D] in the model's units; mask bool [B, D]; mean, std [B, T]; noises: one [B, T] a draw.
    """
    log_std = std.double().log()
    for noise in noises:
        z = mean + std * noise
        xhat = model.decoder(z)
        nll = model.likelihood.nll(xhat, x, mask).double()
        yield xhat, reference.log_importance_weight(nll, z.double(), log_std, noise.double()).clamp(min=LEAST)


def importance_bound(draws: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """log of the mean weight of weighted_draws, float64 [B] (eq. 22)."""
    log_weights = torch.stack([log_weight for _, log_weight in draws])
    return log_weights.logsumexp(0) - math.log(len(log_weights))


@torch.no_grad()
def running_moments(model: LatentModel, draws: Iterable[tuple[Tensor, Tensor]], weighted: bool) -> PredictiveMoments:
    """reference.predictive_moments of weighted_draws, taken one by one: memory does not grow with their number.

    With the share w_l / (w_1 + ... + w_l) of the newest draw, a weighted mean moves by that share of its distance, and
    a variance becomes (1 - share) (variance + share distance^2).
    """
    count, found = 0, None
    for xhat, log_weight in draws:
        count += 1
        f, spread = model.likelihood.mean(xhat).double(), model.likelihood.variance(xhat).double()
        log_weight = log_weight if weighted else torch.zeros_like(log_weight)
        if found is None:
            found = PredictiveMoments(f, torch.zeros_like(f), spread, torch.ones_like(log_weight), log_weight)
            continue
        mean, variance, noise, squares, log_total = found
        log_total = torch.logaddexp(log_total, log_weight)
        share = (log_weight - log_total).exp()
        by_cell, gap = share[:, None], f - mean
        found = PredictiveMoments(
            mean + by_cell * gap,
            (1 - by_cell) * (variance + by_cell * gap * gap),
            noise + by_cell * (spread - noise),
            (1 - share).square() * squares + share.square(),
            log_total,
        )
    assert found is not None
    return found._replace(ess=1 / found.ess, log_mean_weight=found.log_mean_weight - math.log(count))
