"""Where new rows start: under a linear decoder that is their posterior itself."""

import math

import numpy as np
import pytest
import torch

from rvi_fast import VAD
from rvi_fast.likelihoods import Bernoulli, Gaussian
from rvi_fast.model import RowModel
from rvi_fast.nn import MeanFieldPosterior, MLPDecoder, RelayPosterior
from rvi_fast.starts import LinearStart

ROWS, LATENTS, COLUMNS = 9, 4, 13


def make(likelihood, hidden=(), kl_weight=1.0, relays=True, columns=COLUMNS):
    torch.manual_seed(0)
    sizes = dict(groups=(3, 5)) if relays else {}
    posterior = (RelayPosterior if relays else MeanFieldPosterior)(ROWS, LATENTS, dtype=torch.float64, **sizes)
    decoder = MLPDecoder(LATENTS, columns, hidden, linear_path=bool(hidden)).double()
    likelihood.bind(columns)
    return RowModel(posterior, decoder, likelihood.double(), kl_weight)


def cells(columns=COLUMNS):
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(ROWS, columns, generator=generator) < 0.6
    mask[0] = False
    x = torch.randn(ROWS, columns, generator=generator, dtype=torch.float64)
    x[~mask] = torch.nan
    return x, mask


def start_of(model, x, mask):
    ids = torch.arange(ROWS)
    before = model.posterior.initial_values(ids)
    return before, LinearStart(model)(before, x, mask)


@pytest.mark.parametrize("likelihood", [Gaussian(0.3), Gaussian("learned")])
@pytest.mark.parametrize("kl_weight", [1.0, 0.2])
@pytest.mark.parametrize("relays", [True, False])
def test_it_is_the_best_there_is_under_a_linear_decoder(likelihood, kl_weight, relays):
    model = make(likelihood, kl_weight=kl_weight, relays=relays)
    x, mask = cells()
    before, p = start_of(model, x, mask)
    weight, bias = model.decoder.head.weight.detach(), model.decoder.head.bias.detach()
    precision = likelihood.scale().detach().expand(COLUMNS).double() ** -2
    mean = model.posterior.mean_of(p).detach().requires_grad_()
    log_std = model.posterior.log_std_of(p).detach().requires_grad_()
    error = torch.where(mask, x - bias - mean @ weight.T, 0.0)
    spread = mask.double() @ (precision[:, None] * weight**2) * torch.exp(2 * log_std)
    expected_nll = 0.5 * (precision * error**2).sum() + 0.5 * spread.sum()
    kl = 0.5 * (mean**2 + torch.exp(2 * log_std) - 2 * log_std - 1).sum()
    for grad in torch.autograd.grad(expected_nll + kl_weight * kl, (mean, log_std)):
        assert grad.abs().max() < 1e-9
    if relays:
        assert torch.equal(p[:, :8], before[:, :8])  # coefficients stay


def test_a_row_with_nothing_observed_starts_at_the_prior():
    model = make(Gaussian(0.3), hidden=(6,))
    x, mask = cells()
    _, p = start_of(model, x, mask)
    assert model.posterior.mean_of(p)[0].abs().max() < 1e-12 and model.posterior.log_std_of(p)[0].abs().max() < 1e-12


@pytest.mark.parametrize("likelihood", [Gaussian(0.3), Bernoulli()])
def test_it_takes_one_newton_step_from_the_origin(likelihood):
    model = make(likelihood, hidden=() if isinstance(likelihood, Bernoulli) else (6,))
    x, mask = cells()
    x = (x > 0).double() if isinstance(likelihood, Bernoulli) else x
    _, p = start_of(model, x, mask)
    slope = torch.autograd.functional.jacobian(lambda z: model.decoder(z[None])[0], torch.zeros(LATENTS).double())
    for row in range(1, ROWS):

        def tangent_loss(z, row=row):
            xhat = model.decoder(torch.zeros(1, LATENTS).double()).detach() + (slope @ z)[None]
            return model.likelihood.nll(xhat, x[row : row + 1], mask[row : row + 1])[0] + 0.5 * z @ z

        origin = torch.zeros(LATENTS).double()
        hessian = torch.autograd.functional.hessian(tangent_loss, origin)
        gradient = torch.autograd.functional.jacobian(tangent_loss, origin)
        torch.testing.assert_close(model.posterior.mean_of(p)[row].detach(), -torch.linalg.solve(hessian, gradient))
        torch.testing.assert_close(model.posterior.log_std_of(p)[row].detach(), -0.5 * hessian.diagonal().log())


def test_columns_in_several_blocks(monkeypatch):
    model = make(Gaussian(0.3), hidden=(6,))
    x, mask = cells()
    whole = start_of(model, x, mask)[1]
    monkeypatch.setattr("rvi_fast.starts.COLUMNS_AT_ONCE", 5 * LATENTS**2)
    torch.testing.assert_close(start_of(model, x, mask)[1], whole)


def test_rows_are_bounded_by_their_systems(monkeypatch):
    """T^2 numbers a row: wide latents take few rows at once, and a row's values stay."""
    X = np.random.default_rng(0).normal(size=(70, 6))
    model = VAD(latent_dim=3, hidden=(5,), epochs=2, progress=False).fit(X)
    whole, sizes, there = model.infer(X, steps=2), [], LinearStart.__call__
    monkeypatch.setattr("rvi_fast.starts.ROWS_AT_ONCE", 5 * 3**2 + 1)
    monkeypatch.setattr(LinearStart, "__call__", lambda self, p, *row: sizes.append(len(p)) or there(self, p, *row))
    torch.testing.assert_close(model.infer(X, steps=2).mean, whole.mean, rtol=1e-4, atol=1e-4)
    assert set(sizes) == {5}
    monkeypatch.setattr("rvi_fast.starts.ROWS_AT_ONCE", 2)
    assert LinearStart(model.model_).rows_at_once == 1


def test_it_does_not_see_what_holes_hold():
    model = make(Gaussian(0.3))
    x, mask = cells()
    other = torch.where(mask, x, math.inf)
    assert torch.equal(start_of(model, x, mask)[1], start_of(model, other, mask)[1])


def test_rows_without_a_solution_stay_where_they_were():
    model = make(Gaussian(0.3))
    x, mask = cells()
    x[3] = torch.where(mask[3], 1e308, x[3])
    before, p = start_of(model, x, mask)
    assert torch.equal(p[3], before[3]) and p.isfinite().all() and not torch.equal(p[4], before[4])


def test_without_a_prior_it_is_finite():
    x, mask = cells()
    assert start_of(make(Gaussian(0.3), kl_weight=0.0), x, mask)[1].isfinite().all()
