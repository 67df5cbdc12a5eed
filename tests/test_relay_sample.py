"""relay_sample: z and KL against torch.distributions and the mean's own operator."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rvi_fast.functional import relay_mean, relay_sample

GROUPS, ACTIVE = (3, 1), (2, 1)
NAMES = ("coef", "residual", "log_std", "relays", "noise")


def example(rows: int = 3, dim: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    shapes = {"coef": (rows, 4), "relays": (4, dim)}
    return {n: torch.randn(shapes.get(n, (rows, dim)), dtype=dtype, generator=noise) for n in NAMES}


def sample(tensors: dict[str, Tensor], **changed: object) -> tuple[Tensor, Tensor]:
    return relay_sample(**{**tensors, "groups": GROUPS, "active": ACTIVE, **changed})


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 4),
    dim=st.integers(1, 7),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    coefficients=st.sampled_from(["linear", "softmax"]),
)
def test_equals_the_distribution(rows, dim, seed, dtype, coefficients):
    tensors = example(rows, dim, seed)
    z, kl = sample({n: t.to(dtype) for n, t in tensors.items()}, coefficients=coefficients)
    mean = relay_mean(tensors["coef"], tensors["relays"], GROUPS, ACTIVE, coefficients) + tensors["residual"]
    posterior = torch.distributions.Normal(mean, tensors["log_std"].exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean), 1.0)
    assert z.dtype == kl.dtype == dtype and z.shape == (rows, dim) and kl.shape == (rows,)
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(z.double(), mean + posterior.stddev * tensors["noise"], **tolerance)
    torch.testing.assert_close(kl.double(), torch.distributions.kl_divergence(posterior, prior).sum(1), **tolerance)


def test_no_noise_gives_the_mean():
    tensors = example()
    z, kl = sample(tensors, noise=None)
    mean = relay_mean(tensors["coef"], tensors["relays"], GROUPS, ACTIVE) + tensors["residual"]
    assert torch.equal(z, mean)
    assert torch.equal(kl, sample(tensors)[1])


def test_the_prior_has_no_divergence():
    tensors = {name: torch.zeros_like(t) for name, t in example().items()}
    assert not sample(tensors)[1].any()


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("coefficients", ["linear", "softmax"])
def test_gradcheck(rows, coefficients):
    tensors = example(rows)
    inputs = [t.requires_grad_() for t in tensors.values()]

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return sample(dict(zip(NAMES, values, strict=True)), coefficients=coefficients)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("needed", ["coef", "residual", "log_std", "relays"])
def test_gradient_of_one_input(needed):
    grads = []
    for names in (NAMES, (needed,)):
        tensors = {n: t.requires_grad_(n in names) for n, t in example().items()}
        z, kl = sample(tensors)
        (2 * z.sum() + (kl * torch.arange(3)).sum()).backward()
        assert [n for n, t in tensors.items() if t.grad is not None] == list(names)
        grads.append(tensors[needed].grad)
    assert torch.equal(*grads)


def test_gradient_reaches_selected_coefficients_only():
    tensors = {n: t.requires_grad_(n == "coef") for n, t in example().items()}
    z, kl = sample(tensors)
    (z.sum() + kl.sum()).backward()
    smallest = tensors["coef"][:, :3].abs().argmin(1)
    expected = torch.ones(3, 4, dtype=torch.bool).scatter_(1, smallest[:, None], False)
    assert torch.equal(tensors["coef"].grad != 0, expected)


@pytest.mark.parametrize("name", ["residual", "log_std", "noise"])
@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        (torch.ones(3, 4, dtype=torch.float64), ValueError, r"must have shape \[B = 3, T = 5\]; got \[3, 4\]"),
        (torch.ones(2, 5, dtype=torch.float64), ValueError, r"must have shape \[B = 3, T = 5\]; got \[2, 5\]"),
        (torch.ones(3, 5), TypeError, "must be torch.float64"),
        (torch.ones(3, 5, dtype=torch.int64), TypeError, "must be a floating-point tensor"),
    ],
)
def test_bad_input(name, tensor, error, message):
    with pytest.raises(error, match=f"{name} {message}"):
        sample(example(), **{name: tensor})
