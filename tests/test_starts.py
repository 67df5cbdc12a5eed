"""Where new rows start: under a linear decoder that is their posterior itself."""

import math

import numpy as np
import pytest
import torch

from rvi_fast import VAD
from rvi_fast.likelihoods import Bernoulli, Gaussian
from rvi_fast.linearization import Linearization
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
    return before, LinearStart(model, Linearization.of(model))(before, x, mask)


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


def bent(likelihood=None):
    """A decoder that is far from linear."""
    model = make(likelihood or Gaussian(0.3), hidden=(6,))
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(3.0)
    return model.requires_grad_(False)


def of_prior(rows, seed):
    return torch.randn(rows, LATENTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("likelihood", [Gaussian(0.3), Gaussian("learned"), Bernoulli()])
def test_the_linear_map_is_the_closest_one(likelihood):
    model = bent(likelihood)
    linear = Linearization.of(model)
    z = of_prior(40_000, seed=3)
    xhat = model.decoder(z).detach()
    missed = (xhat - linear.offset - z @ linear.slope.T).square().mean(0)
    origin = torch.zeros(1, LATENTS, dtype=torch.float64)
    tangent = torch.autograd.functional.jacobian(lambda z: model.decoder(z[None])[0], origin[0])
    by_tangent = (xhat - model.decoder(origin).detach() - z @ tangent.T).square().mean(0)
    best = torch.linalg.lstsq(torch.cat((torch.ones(len(z), 1).double(), z), 1), xhat)
    least = (xhat - torch.cat((torch.ones(len(z), 1).double(), z), 1) @ best.solution).square().mean(0)
    assert missed.sum() < 1.1 * least.sum() < by_tangent.sum()
    information = (
        xhat.sigmoid() * (1 - xhat.sigmoid()) if isinstance(likelihood, Bernoulli) else likelihood.scale() ** -2
    )
    torch.testing.assert_close(linear.precision, (information + 0 * xhat).mean(0).detach(), rtol=0.2, atol=1e-3)
    torch.testing.assert_close(linear.trust, 1 / (1 + linear.precision * missed), rtol=0.3, atol=0.02)


def test_standard_deviations_are_those_of_the_decoders_own_slopes():
    model = bent()
    linear, z = Linearization.of(model), of_prior(3000, seed=4)
    slopes = torch.func.vmap(torch.func.jacrev(lambda z: model.decoder(z[None])[0]))(z).detach()  # [n, D, T]
    precision = 1 + (slopes / 0.3).square().sum(1).mean(0)
    every = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    _, p = start_of(model, torch.zeros(ROWS, COLUMNS, dtype=torch.float64), every)
    expected = -0.5 * precision.log().expand(ROWS, -1)
    torch.testing.assert_close(model.posterior.log_std_of(p).detach(), expected, rtol=0, atol=0.15)
    assert not torch.allclose(linear.gain, torch.ones_like(linear.gain), atol=0.2)


def test_a_bernoulli_start_raises_the_probability_of_what_is_seen():
    model = bent(Bernoulli())
    x, mask = cells()
    x = torch.where(mask, (x > 0).double(), torch.nan)
    _, p = start_of(model, x, mask)
    linear = Linearization.of(model)
    origin, started = (
        linear.offset.expand(ROWS, -1),
        linear.offset + model.posterior.mean_of(p).detach() @ linear.slope.T,
    )
    before, after = (model.likelihood.nll(xhat, x, mask) for xhat in (origin, started))
    assert (after <= before).all() and after[1:].sum() < 0.9 * before[1:].sum()


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
    assert LinearStart(model.model_, Linearization.of(model.model_)).rows_at_once == 1


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
