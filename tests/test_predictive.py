"""The posterior predictive: against closed forms under a linear decoder, its equations, and what bad calls are told."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from rvi_fast import RVI, VAD, VAE, Posterior, reference
from rvi_fast.likelihoods import Bernoulli, Gaussian
from rvi_fast.predictive import running_moments, weighted_draws

COLUMNS, LATENTS, ROWS, DRAWS = 9, 3, 12, 1_000
SMALL = dict(latent_dim=LATENTS, hidden=(5,), batch_size=16, epochs=3, progress=False)


def table(rows=60, columns=COLUMNS, seed=0, binary=False):
    """Rank two with a little noise, a third of the cells missing."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(rows, 2)) @ np.random.default_rng(9).normal(size=(2, columns)) + 0.1 * rng.normal(
        size=(rows, columns)
    )
    X = (X > 0).astype(float) if binary else X
    return np.where(rng.random((rows, columns)) < 0.3, np.nan, X)


@pytest.fixture(scope="module")
def linear():
    """A model with a linear decoder and a learned scale, new rows, and their exact posterior."""
    kw = SMALL | dict(hidden=(), linear_path=False, epochs=40, lr=1e-2, standardize=False)
    model = VAD(**kw, likelihood=Gaussian("learned")).fit(table())
    X = table(ROWS, seed=3)
    X[4] = np.nan
    return model, X, Exact(model, X)


class Exact:
    """Of x = W z + b + noise with z ~ N(0, I), given the observed cells: moments of z and x, and log p(x_observed)."""

    def __init__(self, model, X):
        head = model.model_.decoder.head
        weight, bias = (t.detach().double() for t in (head.weight, head.bias))
        scale = model.model_.likelihood.scale().detach().double()
        x, mask = torch.from_numpy(np.nan_to_num(X)), torch.from_numpy(~np.isnan(X))
        self.z_mean, self.z_std = torch.zeros(len(X), LATENTS), torch.ones(len(X), LATENTS)
        self.mean, self.std, self.with_noise, self.evidence = ([] for _ in range(4))
        for row, seen in enumerate(mask):
            J, error = weight[seen], (x[row] - bias)[seen]
            precision = torch.eye(LATENTS).double() + J.T @ (J / scale[seen, None] ** 2)
            covariance = torch.linalg.inv(precision)
            z = covariance @ J.T @ (error / scale[seen] ** 2)
            self.z_mean[row], self.z_std[row] = z, covariance.diagonal().sqrt()
            spread = (weight @ covariance * weight).sum(1)
            self.mean.append(weight @ z + bias)
            self.std.append(spread.sqrt())
            self.with_noise.append((spread + scale**2).sqrt())
            marginal = J @ J.T + torch.diag(scale[seen] ** 2)
            logdet = torch.logdet(marginal) if len(J) else torch.zeros(())
            quadratic = error @ torch.linalg.solve(marginal, error) if len(J) else torch.zeros(())
            self.evidence.append(float(-0.5 * (quadratic + logdet + len(J) * math.log(2 * math.pi))))
        self.mean, self.std, self.with_noise = (torch.stack(t).numpy() for t in (self.mean, self.std, self.with_noise))
        self.evidence = np.array(self.evidence)

    def independent(self):
        """q with the exact means and standard deviations of z, and without its correlations."""
        unknown = torch.full((len(self.z_mean),), torch.nan)
        return Posterior(self.z_mean, self.z_std, unknown, unknown > 0, torch.arange(len(self.z_mean)))


def test_weighted_moments_are_those_of_the_exact_posterior(linear):
    """Correlations of z, which q lacks, change the spread of x; weights give it back. Five standard errors."""
    model, X, exact = linear
    q = exact.independent()
    weighted = model.predictive(X, importance_samples=DRAWS, posterior=q)
    plain = model.predictive(X, n_samples=DRAWS, posterior=q)
    np.testing.assert_allclose(plain.at_mean, exact.mean, atol=1e-5)
    for found in (plain, weighted):
        assert (np.abs(found.mean - exact.mean) < 5 * found.std / np.sqrt(found.ess)[:, None]).all()
    off, by_q = (np.abs(np.log(found.std / exact.std)) for found in (weighted, plain))
    assert (off < 5 / np.sqrt(2 * weighted.ess)[:, None]).all() and by_q.max() > 0.3 > 2 * off.max()
    noisy = np.abs(np.log(weighted.std_with_noise / exact.with_noise))
    assert (noisy < 5 / np.sqrt(2 * weighted.ess)[:, None]).all()
    np.testing.assert_allclose(plain.ess, DRAWS)
    assert (weighted.ess < DRAWS * (1 + 1e-9)).all() and weighted.ess[4] == pytest.approx(DRAWS)


def test_weights_correct_a_displaced_posterior(linear):
    model, X, exact = linear
    q = exact.independent()
    q.mean = q.mean + 0.5 * q.std
    weighted = model.predictive(X, importance_samples=DRAWS, posterior=q)
    off = np.abs(model.reconstruct(X, posterior=q) - exact.mean)
    assert np.abs(weighted.mean - exact.mean).mean() < 0.25 * off.mean()
    holes = np.isnan(X)
    filled = model.impute(X, importance_samples=DRAWS, posterior=q)
    assert np.array_equal(filled[holes], weighted.mean[holes]) and np.array_equal(filled[~holes], X[~holes])


def test_the_bound_rises_towards_the_evidence(linear):
    model, X, exact = linear
    q = exact.independent()
    many = Posterior(
        *(t.repeat(20, *[1] * (t.dim() - 1)) for t in (q.mean, q.std, q.elbo, q.converged)), torch.arange(240)
    )
    rows = np.tile(X, (20, 1))
    means = [model.score(rows, importance_samples=draws, posterior=many).mean() for draws in (1, 8, 64)]
    assert means == sorted(means) and abs(model.score(rows, posterior=many).mean() - means[0]) < 0.2
    bound = model.score(X, importance_samples=DRAWS, posterior=q)
    ess = model.predictive(X, importance_samples=DRAWS, posterior=q).ess
    error = np.sqrt(np.maximum(0, 1 / ess - 1 / DRAWS))  # standard error of the log of a mean weight
    assert (np.abs(bound - exact.evidence) < 5 * error + 1e-4).all() and error.max() < 0.1
    assert bound.dtype == np.float32 and bound[4] == 0, "of a row with nothing observed q is the prior"


def test_mean_at_the_mean_and_mean_of_f_differ_where_f_bends():
    model = RVI(**SMALL | {"epochs": 60, "lr": 2e-2}, groups=(4,)).fit(table())
    posterior = model.posterior_
    posterior.std = posterior.std + 1
    found = model.predictive(table(), n_samples=200, posterior=posterior)
    assert np.array_equal(found.at_mean, model.reconstruct())
    assert np.abs(found.mean - found.at_mean).max() > 0.1
    draws = model.impute(table(), n_samples=200, posterior=posterior)
    holes = np.isnan(table())
    np.testing.assert_allclose(draws.mean(0)[holes], found.mean[holes], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(draws.std(0)[holes], found.std[holes], rtol=1e-6)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("likelihood", [Gaussian(0.3), Bernoulli()])
def test_draw_by_draw_equals_the_equations(weighted, likelihood):
    model = VAD(**SMALL, likelihood=likelihood).fit(table(binary=True)).model_.double()
    generator = torch.Generator().manual_seed(0)
    mean, noises = torch.randn(5, LATENTS, generator=generator).double(), torch.randn(7, 5, LATENTS).double()
    std = torch.rand(5, LATENTS, generator=generator).double() + 0.1
    x = torch.from_numpy(table(5, binary=True))
    mask = ~x.isnan()
    xhat, log_weight = (torch.stack(t) for t in zip(*weighted_draws(model, x, mask, mean, std, noises), strict=True))
    p = torch.distributions.Normal(0, 1).log_prob(mean + std * noises).sum(2)
    q = torch.distributions.Normal(mean, std).log_prob(mean + std * noises).sum(2)
    nll = torch.stack([model.likelihood.nll(f, x, mask) for f in xhat])
    torch.testing.assert_close(log_weight, p - q - nll)
    log_weight = log_weight if weighted else torch.zeros_like(log_weight)
    of_cells = model.likelihood.mean(xhat), model.likelihood.variance(xhat)
    truth = reference.predictive_moments(*of_cells, log_weight)
    found = running_moments(model, zip(xhat, log_weight, strict=True), weighted)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("likelihood", [Gaussian(0.3), Gaussian("learned"), Bernoulli()])
def test_variance_is_that_of_draws(likelihood):
    likelihood.bind(4)
    xhat = torch.randn(4, generator=torch.Generator().manual_seed(0)).expand(40_000, 4)
    x = likelihood.draw(xhat, torch.randn(xhat.shape, generator=torch.Generator().manual_seed(1)))
    variance = likelihood.variance(xhat)
    assert variance.shape == xhat.shape
    torch.testing.assert_close(x.var(0), variance[0], rtol=0.04, atol=0.0)


@pytest.mark.parametrize("kind", [RVI, VAD, VAE])
def test_bernoulli_cells_are_probabilities(kind):
    X = table(binary=True)
    model = kind(**SMALL, likelihood=Bernoulli()).fit(X)
    new = table(7, binary=True, seed=2)
    found = model.predictive(new, importance_samples=20, steps=5)
    for p in (found.mean, found.at_mean, model.impute(new, importance_samples=20, steps=5)):
        assert ((p >= 0) & (p <= 1)).all()
    np.testing.assert_allclose(found.std_with_noise**2, found.mean * (1 - found.mean), rtol=1e-5)
    draws = model.impute(new, n_samples=3, noise=True, steps=5)
    assert set(np.unique(draws)) <= {0.0, 1.0}
    assert (found.ess >= 1 - 1e-9).all() and (found.ess <= 20 + 1e-9).all() and len(found) == 7


def test_noisy_draws_have_the_predictive_spread_in_the_users_units():
    X = 1000 * table()
    X[:, 4] = np.where(np.isnan(X[:, 4]), np.nan, 42.5)
    model = RVI(**SMALL, groups=(4,)).fit(X)
    draws = model.impute(n_samples=400, noise=True)
    found, holes = model.predictive(n_samples=400), np.isnan(X)
    assert (found.std[:, 4] == 0).all() and (found.std_with_noise[:, 4] == 0).all() and (found.mean[:, 4] == 42.5).all()
    assert (draws[:, ~holes] == X[~holes]).all() and (draws[:, :, 4] == 42.5).all()
    holes[:, 4] = False
    ratio = draws.std(0)[holes] / found.std_with_noise[holes]
    assert ratio.min() > 0.8 and ratio.max() < 1.2 and abs(ratio.mean() - 1) < 0.01
    assert (found.std_with_noise >= found.std).all()


def test_draws_do_not_depend_on_how_many_there_are():
    model = RVI(**SMALL, groups=(4,)).fit(table())
    assert np.array_equal(model.impute(n_samples=2, noise=True), model.impute(n_samples=5, noise=True)[:2])


def test_weights_below_the_range_of_floats_are_no_nan():
    model = VAD(**SMALL, likelihood=Gaussian(0.3)).fit(table()).model_
    x, mean = torch.full((2, COLUMNS), 1e30), torch.zeros(2, LATENTS)
    noises = torch.randn(4, 2, LATENTS, generator=torch.Generator().manual_seed(0))
    found = running_moments(model, weighted_draws(model, x, x > 0, mean, mean + 1, noises), weighted=True)
    assert all(t.isfinite().all() for t in found) and (found.ess >= 1).all()


def test_weighted_fillings_of_frames_images_and_into_memory(tmp_path):
    X = table()
    model = RVI(**SMALL, groups=(4,)).fit(X)
    filled = model.impute(importance_samples=5)
    assert np.array_equal(model.impute(importance_samples=5, out=np.empty_like(X)), filled)
    frame = pd.DataFrame(X, index=np.arange(len(X)) * 2)
    of_frame = RVI(**SMALL, groups=(4,)).fit(frame).impute(importance_samples=5)
    assert isinstance(of_frame, pd.DataFrame) and np.array_equal(of_frame.to_numpy(), filled)
    model.save(tmp_path)
    again = RVI.load(tmp_path).predictive(X, importance_samples=5, posterior=model.posterior_)
    assert np.array_equal(again.mean, model.predictive(importance_samples=5).mean)
    pixels, mask = np.random.default_rng(0).integers(0, 256, (40, 16), dtype=np.uint8), X[:40, :1] > 0
    images = RVI(**SMALL, groups=(4,)).fit(pixels, mask | (np.arange(16) % 2 == 0))
    found = images.predictive(n_samples=20)
    assert 20 < np.median(found.std_with_noise) < 500, "in the images' own units"


@pytest.mark.parametrize(
    "call, error, match",
    [
        (
            lambda m, X: m.impute(X, importance_samples=0),
            ValueError,
            "importance_samples must be a positive int or None",
        ),
        (lambda m, X: m.impute(X, importance_samples=2.5), ValueError, "importance_samples must be a positive int"),
        (lambda m, X: m.score(X, importance_samples="all"), ValueError, "importance_samples must be a positive int"),
        (lambda m, X: m.score(X, importance_samples=True), ValueError, "importance_samples must be a positive int"),
        (lambda m, X: m.score(X, importance_samples=70_000), ValueError, "importance_samples must be at most 65,536"),
        (lambda m, X: m.impute(X, n_samples=70_000), ValueError, "n_samples must be at most 65,536; got 70,000"),
        (lambda m, X: m.impute(X, n_samples=2, importance_samples=2), TypeError, "drop one of them"),
        (lambda m, X: m.impute(X, noise=True), TypeError, "noise=True needs n_samples"),
        (lambda m, X: m.impute(X, n_samples=2, noise="yes"), ValueError, "noise must be one of True, False"),
        (lambda m, X: m.predictive(X), TypeError, "predictive needs n_samples .* or importance_samples"),
        (lambda m, X: m.predictive(X, n_samples=2, importance_samples=2), TypeError, "one of them"),
        (lambda m, X: m.predictive(X, n_samples=-1), ValueError, "n_samples must be a positive int"),
        (lambda m, X: m.predictive(X, n_samples=2, stepz=3), TypeError, "infer has no argument 'stepz'"),
        (lambda m, X: m.predictive(X[:, :3], n_samples=2), ValueError, "X has 3 columns"),
        (lambda m, X: m.infer(X, start="ridge"), ValueError, "start must be one of 'linear', 'prior'; got 'ridge'"),
        (lambda m, X: m.infer(X, stop_early=1), ValueError, "stop_early must be one of True, False; got 1"),
    ],
)
@pytest.mark.parametrize("kind", [RVI, VAE])
def test_bad_calls_say_so(kind, call, error, match):
    model = kind(**SMALL).fit(table())
    with pytest.raises(error, match=match):
        call(model, table(3))
    with pytest.raises(RuntimeError, match="is not fitted"):
        kind(**SMALL).predictive(table(3), n_samples=2)
