"""A Bayesian GPLVM for data with holes, by minibatches (after Lalchand et al., 2022), with random Fourier features.

Every row of the data has a latent place x with q(x) = N(mean, scale^2), 2 T numbers in a table; column d is a Gaussian
process of x, written as features(x) . w_d with q(w_d) Gaussian too. The loss is the negative ELBO of observed cells.
What differs from nn.Embedding and Adam is the two lines that make the table and the optimiser.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from compare import Problem, main, row_table
from torch import Tensor, nn

from rvi_fast.optim import RowAdam

COLUMNS, LATENTS, FREQUENCIES = 30, 24, 64
NOISE = 0.1  # of the data
MISSING = 0.5
ROWS = 128  # of a batch
LR = 1e-2


def make_data(count: int) -> tuple[Tensor, Tensor]:
    """Y [N, D], smooth functions of a place in the plane with noise, and which cells are observed."""
    generator = torch.Generator().manual_seed(0)
    place = 2 * torch.rand(count, 2, generator=generator) - 1
    waves = 2 * torch.randn(2, 3 * COLUMNS, generator=generator)
    phases = 2 * math.pi * torch.rand(3 * COLUMNS, generator=generator)
    smooth = (place @ waves + phases).sin().view(count, COLUMNS, 3).sum(2) / 1.5**0.5
    noisy = smooth + NOISE * torch.randn(count, COLUMNS, generator=generator)
    return noisy, torch.rand(count, COLUMNS, generator=generator) >= MISSING


class GPLVM(nn.Module):
    frequencies: Tensor

    def __init__(self, places: nn.Module, num_rows: int):
        super().__init__()
        self.places = places  # [N, 2 T]: means and log scales of q(x)
        self.num_rows = num_rows
        self.log_frequency = nn.Parameter(torch.full((LATENTS,), -1.0))  # 1 / length scale, one for each latent (ARD)
        self.register_buffer("frequencies", torch.randn(LATENTS, FREQUENCIES))
        self.w_mean = nn.Parameter(0.1 * torch.randn(2 * FREQUENCIES, COLUMNS))
        self.w_log_std = nn.Parameter(torch.full((2 * FREQUENCIES, COLUMNS), -3.0))
        self.log_noise = nn.Parameter(torch.tensor(-1.0))

    def features(self, x: Tensor) -> Tensor:
        """x [B, T] -> [B, 2 F], whose products are near the kernel exp(-|x - x'|^2 / 2) at ARD's length scales."""
        angles = (x * self.log_frequency.exp()) @ self.frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=1) / FREQUENCIES**0.5

    def forward(self, rows: Tensor, y: Tensor, observed: Tensor, noise: Tensor) -> Tensor:
        mean, log_std = self.places(rows).chunk(2, dim=1)
        features = self.features(mean + log_std.exp() * noise)
        variance = (2 * self.log_noise).exp()
        misfit = (y - features @ self.w_mean).square() + features.square() @ (2 * self.w_log_std).exp()
        nll = 0.5 * (misfit / variance + math.log(2 * math.pi)) + self.log_noise
        of_weights = kl(self.w_mean, self.w_log_std).sum() / self.num_rows
        return (torch.where(observed, nll, 0.0).sum(1) + kl(mean, log_std).sum(1)).mean() + of_weights


def kl(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(N(mean, exp(log_std)^2) || N(0, 1))."""
    return 0.5 * (mean.square() + (2 * log_std).exp() - 1) - log_std


def batches(y: Tensor, observed: Tensor, steps: int) -> Iterator[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randint(len(y), (ROWS,), generator=generator)
        yield rows, y[rows], observed[rows], torch.randn(ROWS, LATENTS, generator=generator)


def initial_places(count: int) -> Tensor:
    means = 0.1 * torch.randn(count, LATENTS, generator=torch.Generator().manual_seed(2))
    return torch.cat((means, torch.full_like(means, -2.0)), dim=1)


def train(count: int, steps: int) -> tuple[float, float]:
    """Mean squared error of hidden cells: of the model at the posterior means, and of the columns' means."""
    torch.manual_seed(0)
    y, observed = make_data(count)
    model = GPLVM(row_table(initial_places(count)), count)
    optimizer = RowAdam(model.parameters(), lr=LR)
    for batch in batches(y, observed, steps):
        optimizer.zero_grad()
        model(*batch).backward()
        optimizer.step()
    with torch.no_grad():
        means = model.places(torch.arange(count))[:, :LATENTS]
        filled = model.features(means) @ model.w_mean
    column_means = torch.where(observed, y, 0.0).sum(0) / observed.sum(0)
    error, baseline = ((guess - y)[~observed].square().mean().item() for guess in (filled, column_means))
    return error, baseline


def problem(count: int, steps: int) -> Problem:
    return Problem(lambda places: GPLVM(places, count), initial_places(count), batches(*make_data(count), steps), LR)


if __name__ == "__main__":
    main(train, problem, train_steps=2_000)
