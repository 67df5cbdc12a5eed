"""Likelihood modules against torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rvi_fast import functional
from rvi_fast.likelihoods import KINDS, Bernoulli, Gaussian, Likelihood

B, D = 6, 3


def learned(**settings: float) -> Gaussian:
    likelihood = Gaussian("learned", **settings)
    likelihood.bind(D)
    return likelihood


def example(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """xhat, x with NaN behind the mask, mask."""
    noise = torch.Generator().manual_seed(seed)
    xhat, x = torch.randn(2, B, D, dtype=torch.float64, generator=noise)
    mask = torch.rand(B, D, generator=noise) < 0.6
    return xhat, torch.where(mask, x, math.nan), mask


def observed_sum(log_prob: Tensor, mask: Tensor) -> Tensor:
    return -torch.where(mask, log_prob, 0.0).sum(1)


@pytest.mark.parametrize("scale", [0.1, 3])
def test_fixed_gaussian(scale):
    xhat, x, mask = example()
    expected = torch.distributions.Normal(xhat, scale).log_prob(x.nan_to_num())
    likelihood = Gaussian(scale)
    likelihood.bind(D)
    torch.testing.assert_close(likelihood.nll(xhat, x, mask), observed_sum(expected, mask), rtol=1e-13, atol=1e-13)
    assert not list(likelihood.parameters())


def test_learned_gaussian():
    xhat, x, mask = example()
    likelihood = learned(min_scale=0.05, start=0.8).double()
    torch.testing.assert_close(likelihood.scale(), torch.full((D,), 0.8).double(), rtol=1e-6, atol=0)
    likelihood.log_scale.data = torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64)
    scale = torch.sqrt(0.05**2 + torch.exp(2 * likelihood.log_scale.detach()))
    expected = torch.distributions.Normal(xhat, scale).log_prob(x.nan_to_num())
    torch.testing.assert_close(likelihood.nll(xhat, x, mask), observed_sum(expected, mask))


def test_gradient_of_the_learned_scale():
    xhat, x, mask = example()
    likelihood = learned().double()

    def nll(log_scale: Tensor) -> Tensor:
        return torch.func.functional_call(likelihood, {"log_scale": log_scale}, (xhat, x, mask))

    likelihood.forward = likelihood.nll
    assert torch.autograd.gradcheck(nll, torch.randn(D, dtype=torch.float64, requires_grad=True))


def test_the_learned_scale_finds_the_spread_and_keeps_its_bound():
    torch.manual_seed(0)
    spread = torch.tensor([0.5, 2.0, 0.0])
    x = torch.randn(2000, D) * spread
    likelihood = learned(min_scale=0.1)
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        likelihood.nll(torch.zeros_like(x), x, torch.ones_like(x, dtype=torch.bool)).mean().backward()
        optimizer.step()
    torch.testing.assert_close(likelihood.scale().detach(), torch.tensor([0.5, 2.0, 0.1]), rtol=0.05, atol=0)
    assert (likelihood.scale() > 0.1).all()


def test_bernoulli():
    logits, x, mask = example()
    x = (x > 0).double().where(mask, math.nan)
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(x.nan_to_num())
    torch.testing.assert_close(Bernoulli().nll(logits, x, mask), observed_sum(expected, mask))


@pytest.mark.parametrize(
    "likelihood", [Gaussian(0.3), learned(start=0.3), Bernoulli()], ids=["fixed", "learned", "0/1"]
)
def test_draws_have_the_mean(likelihood):
    noise = torch.Generator().manual_seed(0)
    xhat = torch.tensor([[-2.0, 0.0, 1.0]]).expand(20_000, D)
    with torch.no_grad():
        draws = likelihood.draw(xhat, torch.randn(xhat.shape, generator=noise))
    mean = likelihood.mean(xhat)
    assert draws.shape == xhat.shape and draws.dtype == xhat.dtype
    torch.testing.assert_close(draws.mean(0), mean[0], rtol=0, atol=0.02)
    spread = (mean * (1 - mean))[0].sqrt() if isinstance(likelihood, Bernoulli) else torch.full((D,), 0.3)
    torch.testing.assert_close(draws.std(0), spread, rtol=0.05, atol=0)
    if isinstance(likelihood, Bernoulli):
        assert set(draws.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("name", "likelihood"), [("gaussian", Gaussian(0.3)), ("gaussian", learned(start=2.0)), ("bernoulli", Bernoulli())]
)
def test_settings_and_state_make_the_same_again(name, likelihood: Likelihood):
    again = KINDS[name](**likelihood.settings())
    again.bind(D)
    for parameter in likelihood.parameters():
        parameter.data += 0.1
    again.load_state_dict(likelihood.state_dict())
    xhat, x, mask = example()
    x = x.clamp(0, 1)
    torch.testing.assert_close(again.nll(xhat, x, mask), likelihood.nll(xhat, x, mask), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0.0}, "scale must be a number above 0 or 'learned'"),
        ({"scale": -1.0}, "scale must be a number above 0"),
        ({"scale": math.inf}, "scale must be a number above 0"),
        ({"scale": math.nan}, "scale must be a number above 0"),
        ({"scale": "free"}, "scale must be a number above 0 or 'learned'; got 'free'"),
        ({"min_scale": 0.0}, "min_scale must lie between 0 and start=1.0"),
        ({"min_scale": 1.0}, "min_scale must lie between 0 and start=1.0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Gaussian(**settings)


def test_a_learned_scale_needs_the_number_of_columns():
    with pytest.raises(RuntimeError, match=r"call bind\(num_columns\)"):
        Gaussian("learned").scale()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hole", [torch.nan, torch.inf, "least"])
def test_what_a_hole_holds_is_never_used_and_nan_elsewhere_shows(dtype, hole):
    hole = torch.finfo(dtype).min if hole == "least" else hole
    generator = torch.Generator().manual_seed(0)
    x, xhat = torch.rand(2, 6, 9, generator=generator).to(dtype)
    mask = torch.rand(6, 9, generator=generator) < 0.6
    weight, bias = torch.eye(9, dtype=dtype), torch.zeros(9, dtype=dtype)
    losses = {
        "gaussian": lambda x: functional.masked_gaussian_nll(xhat, x, mask, 0.1),
        "bernoulli": lambda x: functional.masked_bernoulli_nll(xhat, x, mask),
        "linear": lambda x: functional.linear_masked_gaussian_nll(xhat, weight, bias, x, mask, 0.1),
    }
    for name, loss in losses.items():
        assert torch.equal(loss(x.masked_fill(~mask, hole)), loss(x.masked_fill(~mask, 0))), name
        if name != "bernoulli":  # which refuses NaN
            seen = loss(x.masked_fill(mask, torch.nan))
            assert torch.equal(seen.isnan(), mask.any(1)), name
