"""masked_gaussian_nll against a loop over the observed entries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rvi_fast.functional import masked_gaussian_nll


def loop(xhat, x, mask, scale) -> np.ndarray:
    nll = np.zeros(len(x))
    for i, j in zip(*np.nonzero(mask), strict=True):
        s = scale[j]
        nll[i] += 0.5 * ((x[i, j] - xhat[i, j]) / s) ** 2 + math.log(s) + 0.5 * math.log(2 * math.pi)
    return nll


def example(rows: int = 4, columns: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """xhat, x with NaN behind the mask, mask with a row that has nothing observed, scale."""
    noise = torch.Generator().manual_seed(seed)
    xhat, x = torch.randn(2, rows, columns, dtype=dtype, generator=noise)
    mask = torch.rand(rows, columns, generator=noise) < 0.6
    mask[:1] = False
    scale = 0.1 + torch.rand(columns, dtype=dtype, generator=noise)
    return xhat, torch.where(mask, x, math.nan), mask, scale


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(0, 5),
    columns=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equals_a_loop(rows, columns, seed, dtype):
    xhat, x, mask, scale = example(rows, columns, seed, dtype)
    nll = masked_gaussian_nll(xhat, x, mask, scale)
    assert nll.dtype == dtype
    expected = loop(xhat.double().numpy(), x.double().numpy(), mask.numpy(), scale.double().numpy())
    np.testing.assert_allclose(nll, expected, rtol=2e-5 if dtype == torch.float32 else 1e-12, atol=1e-5)


@pytest.mark.parametrize("scale", [0.3, torch.tensor(0.3), torch.tensor([0.3])], ids=["float", "[]", "[1]"])
def test_one_scale_for_all_columns(scale):
    xhat, x, mask, _ = example()
    torch.testing.assert_close(
        masked_gaussian_nll(xhat, x, mask, scale), masked_gaussian_nll(xhat, x, mask, torch.full((3,), 0.3))
    )


@pytest.mark.parametrize("weight", ["expanded", "twice", "rows"])
def test_gradients(weight):
    xhat, x, mask, scale = example()
    xhat.requires_grad_(), scale.requires_grad_()
    per_row = {"expanded": torch.ones(4), "twice": torch.full((4,), 2.0), "rows": torch.arange(4.0)}[weight].double()
    nll = masked_gaussian_nll(xhat, x, mask, scale)
    (nll.sum() if weight == "expanded" else (nll * per_row).sum()).backward()
    r = torch.where(mask, xhat - x, 0.0)
    torch.testing.assert_close(xhat.grad, per_row[:, None] * r / scale**2)
    torch.testing.assert_close(
        scale.grad, (per_row[:, None] * torch.where(mask, 1 / scale - r**2 / scale**3, 0)).sum(0)
    )


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_gradcheck(rows):
    xhat, x, mask, scale = example(rows)
    inputs = xhat.requires_grad_(), scale.requires_grad_()
    assert torch.autograd.gradcheck(lambda xhat, scale: masked_gaussian_nll(xhat, x, mask, scale), inputs)


@pytest.mark.parametrize("needed", [0, 1])
def test_gradient_of_one_input(needed):
    grads = []
    for wanted in ({0, 1}, {needed}):
        xhat, x, mask, scale = example()
        inputs = [t.requires_grad_(i in wanted) for i, t in enumerate((xhat, scale))]
        masked_gaussian_nll(xhat, x, mask, scale).sum().backward()
        assert {i for i, t in enumerate(inputs) if t.grad is not None} == wanted
        grads.append(inputs[needed].grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float64])
def test_x_of_another_dtype(dtype):
    xhat, x, mask, scale = example(dtype=torch.float32)
    x = (x > 0).to(dtype)
    nll = masked_gaussian_nll(xhat, x, mask, scale)
    assert nll.dtype == torch.float32
    assert torch.equal(nll, masked_gaussian_nll(xhat, x.float(), mask, scale))


def test_strided_and_expanded_input():
    xhat, x, mask, scale = example()
    strided = xhat.T.contiguous().T, x.repeat_interleave(2, dim=1)[:, ::2], mask.T.contiguous().T
    torch.testing.assert_close(masked_gaussian_nll(*strided, scale), masked_gaussian_nll(xhat, x, mask, scale))
    row = (t[2:3] for t in (xhat, x, mask))
    nll = masked_gaussian_nll(*(t.expand(4, 3) for t in row), scale)
    torch.testing.assert_close(nll, masked_gaussian_nll(xhat, x, mask, scale)[2].expand(4))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(4, 2)}, ValueError, r"x must have shape \[B = 4, D = 3\]; got \[4, 2\]"),
        ({"mask": torch.ones(3, 3, dtype=torch.bool)}, ValueError, r"mask must have shape \[B = 4, D = 3\]"),
        ({"mask": torch.ones(4, 3)}, TypeError, "mask must be a bool tensor"),
        ({"xhat": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "xhat must be a floating-point tensor"),
        ({"scale": torch.ones(2)}, ValueError, r"scale must be one number or one per column \(3\)"),
        ({"scale": 0.0}, ValueError, "scale must be above 0"),
        ({"scale": torch.tensor([1.0, 0.0, 2.0])}, ValueError, "scale must be above 0; got 0.0"),
        ({"scale": "1"}, TypeError, "scale must be a number or a torch tensor; got str"),
        ({"x": np.ones((4, 3))}, TypeError, "x must be a torch tensor; got ndarray"),
        ({"mask": np.ones((4, 3), dtype=bool)}, TypeError, "mask must be a torch tensor; got ndarray"),
        ({"scale": math.nan}, ValueError, "scale must be above 0"),
    ],
)
def test_bad_input(change, error, message):
    arguments = dict(zip(("xhat", "x", "mask", "scale"), example(), strict=True))
    with pytest.raises(error, match=message):
        masked_gaussian_nll(**{**arguments, **change})
