"""masked_bernoulli_nll against a loop over the observed entries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rvi_fast.functional import masked_bernoulli_nll


def loop(logits, x, mask) -> np.ndarray:
    nll = np.zeros(len(x))
    for i, j in zip(*np.nonzero(mask), strict=True):
        log_p, log_q = (-np.logaddexp(0, -sign * logits[i, j]) for sign in (1, -1))
        nll[i] -= x[i, j] * log_p + (1 - x[i, j]) * log_q
    return nll


def example(rows: int = 4, columns: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """logits of all sizes, x in [0, 1] with NaN behind the mask, mask with a row that has nothing observed."""
    noise = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, columns, dtype=dtype, generator=noise) ** 5
    x = torch.rand(rows, columns, dtype=dtype, generator=noise)
    x = torch.where(torch.rand(rows, columns, generator=noise) < 0.5, x.round(), x)
    mask = torch.rand(rows, columns, generator=noise) < 0.6
    mask[:1] = False
    return logits, torch.where(mask, x, math.nan), mask


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(0, 5),
    columns=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equals_a_loop(rows, columns, seed, dtype):
    logits, x, mask = example(rows, columns, seed, dtype)
    nll = masked_bernoulli_nll(logits, x, mask)
    assert nll.dtype == dtype
    expected = loop(logits.double().numpy(), x.double().numpy(), mask.numpy())
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(nll, expected, **tolerance)


@pytest.mark.parametrize("logit", [0.0, -0.0, 1e-9, 3.0, -40.0, 40.0, -1000.0, 1000.0])
@pytest.mark.parametrize("x", [0.0, 0.25, 1.0])
def test_gradient_is_the_residual_at_any_logit(logit, x):
    logits = torch.tensor([[logit]], dtype=torch.float64, requires_grad=True)
    nll = masked_bernoulli_nll(logits, torch.tensor([[x]]), torch.tensor([[True]]))
    nll.sum().backward()
    assert nll.isfinite().all()
    torch.testing.assert_close(logits.grad, torch.sigmoid(logits.detach()) - x, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("logit", [-30.0, -300.0])
def test_a_sure_guess_that_is_right_costs_its_odds(logit):
    nll = masked_bernoulli_nll(torch.tensor([[logit]]).double(), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
    torch.testing.assert_close(nll.item(), math.exp(logit), rtol=1e-9, atol=0)


@pytest.mark.parametrize("weight", ["expanded", "twice", "rows"])
def test_gradients(weight):
    logits, x, mask = example()
    logits.requires_grad_()
    per_row = {"expanded": torch.ones(4), "twice": torch.full((4,), 2.0), "rows": torch.arange(4.0)}[weight].double()
    nll = masked_bernoulli_nll(logits, x, mask)
    (nll.sum() if weight == "expanded" else (nll * per_row).sum()).backward()
    torch.testing.assert_close(logits.grad, per_row[:, None] * torch.where(mask, torch.sigmoid(logits) - x, 0.0))


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_gradcheck(rows):
    logits, x, mask = example(rows)
    assert torch.autograd.gradcheck(lambda logits: masked_bernoulli_nll(logits, x, mask), logits.requires_grad_())


def test_integer_x_and_strides():
    logits, x, mask = example()
    x = (x > 0.5).to(torch.uint8)
    strided = logits.T.contiguous().T, x.repeat_interleave(2, dim=1)[:, ::2], mask.T.contiguous().T
    torch.testing.assert_close(masked_bernoulli_nll(*strided), masked_bernoulli_nll(logits, x.double(), mask))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(4, 2)}, ValueError, r"x must have shape \[B = 4, D = 3\]; got \[4, 2\]"),
        ({"logits": torch.ones(4)}, ValueError, "logits must have shape"),
        ({"logits": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "logits must be a floating-point tensor"),
        ({"x": torch.full((4, 3), 1.5)}, ValueError, r"x must lie in \[0, 1\] where it is observed; got 0.0 .. 1.5"),
        ({"x": torch.full((4, 3), -0.5)}, ValueError, r"x must lie in \[0, 1\] where it is observed"),
        ({"x": torch.full((4, 3), torch.nan)}, ValueError, r"x must lie in \[0, 1\] where it is observed"),
        ({"logits": np.ones((4, 3))}, TypeError, "logits must be a torch tensor; got ndarray"),
        ({"mask": torch.ones(4, 3)}, TypeError, "mask must be a bool tensor"),
    ],
)
def test_bad_input(change, error, message):
    arguments = dict(zip(("logits", "x", "mask"), example(), strict=True))
    with pytest.raises(error, match=message):
        masked_bernoulli_nll(**{**arguments, **change})
