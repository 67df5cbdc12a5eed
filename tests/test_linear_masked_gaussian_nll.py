"""linear_masked_gaussian_nll against a loop over rows, columns and features."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rvi_fast.functional import linear_masked_gaussian_nll, masked_gaussian_nll

LEARNED = ("h", "weight", "bias", "scale")


def loop(h, weight, bias, x, mask, scale) -> np.ndarray:
    nll = np.zeros(len(x))
    for i, j in zip(*np.nonzero(mask), strict=True):
        xhat = bias[j] + sum(h[i, k] * weight[j, k] for k in range(h.shape[1]))
        nll[i] += 0.5 * ((x[i, j] - xhat) / scale[j]) ** 2 + math.log(scale[j]) + 0.5 * math.log(2 * math.pi)
    return nll


def example(rows=4, columns=3, width=5, seed=0, dtype=torch.float64) -> dict[str, Tensor]:
    """Tensors by argument name, x with NaN behind the mask."""
    noise = torch.Generator().manual_seed(seed)
    shapes = {"h": (rows, width), "weight": (columns, width), "bias": (columns,), "x": (rows, columns)}
    tensors = {name: torch.randn(shape, dtype=dtype, generator=noise) for name, shape in shapes.items()}
    mask = torch.rand(rows, columns, generator=noise) < 0.6
    scale = 0.1 + torch.rand(columns, dtype=dtype, generator=noise)
    return {**tensors, "x": torch.where(mask, tensors["x"], math.nan), "mask": mask, "scale": scale}


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 4),
    columns=st.integers(1, 7),
    width=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equals_a_loop(rows, columns, width, seed, dtype):
    tensors = example(rows, columns, width, seed, dtype)
    nll = linear_masked_gaussian_nll(**tensors)
    assert nll.dtype == dtype
    expected = loop(**{n: (t if t.dtype == torch.bool else t.double()).numpy() for n, t in tensors.items()})
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-11}
    np.testing.assert_allclose(nll, expected, **tolerance)


@pytest.mark.parametrize("weight", ["expanded", "twice", "rows"])
def test_gradients_equal_the_composition(weight):
    def grads(fused: bool) -> list[Tensor]:
        tensors = {n: t.requires_grad_(n in LEARNED) for n, t in example().items()}
        if fused:
            nll = linear_masked_gaussian_nll(**tensors)
        else:
            xhat = torch.nn.functional.linear(tensors["h"], tensors["weight"], tensors["bias"])
            nll = masked_gaussian_nll(xhat, tensors["x"], tensors["mask"], tensors["scale"])
        loss = {"expanded": nll.sum(), "twice": 2 * nll.sum(), "rows": (nll * torch.arange(4)).sum()}[weight]
        loss.backward()
        return [tensors[name].grad for name in LEARNED]

    torch.testing.assert_close(grads(True), grads(False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rows", "columns", "width"), [(0, 3, 5), (1, 1, 1), (4, 3, 5)])
def test_gradcheck(rows, columns, width):
    tensors = example(rows, columns, width)
    inputs = [tensors[name].requires_grad_() for name in LEARNED]

    def function(*learned: Tensor) -> Tensor:
        return linear_masked_gaussian_nll(**{**tensors, **dict(zip(LEARNED, learned, strict=True))})

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("needed", LEARNED)
def test_gradient_of_one_input(needed):
    grads = []
    for names in (LEARNED, (needed,)):
        tensors = {n: t.requires_grad_(n in names) for n, t in example().items()}
        linear_masked_gaussian_nll(**tensors).sum().backward()
        assert {n for n, t in tensors.items() if t.grad is not None} == set(names)
        grads.append(tensors[needed].grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("scale", [0.3, torch.tensor(0.3, dtype=torch.float64)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_scale_keeps_the_precision_of_h(scale, dtype):
    tensors = example() | {"x": torch.ones(4, 3, dtype=dtype)}
    rounded = linear_masked_gaussian_nll(**tensors | {"scale": torch.full((3,), 0.3).double()})
    exact = linear_masked_gaussian_nll(**tensors | {"scale": torch.full((3,), 0.3, dtype=torch.float64)})
    torch.testing.assert_close(linear_masked_gaussian_nll(**tensors | {"scale": scale}), exact, rtol=1e-13, atol=0)
    assert not torch.allclose(exact, rounded, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.ones(3, 4).double()}, ValueError, r"weight must have shape \[D = 3, H = 5\]; got \[3, 4\]"),
        ({"weight": torch.ones(3, 5)}, TypeError, "weight must be torch.float64"),
        ({"bias": torch.ones(4).double()}, ValueError, r"bias must have shape \[D = 3\]"),
        ({"bias": torch.ones(3)}, TypeError, "bias must be torch.float64"),
        ({"h": torch.ones(4, 5, dtype=torch.int64)}, TypeError, "h must be a floating-point tensor"),
        ({"x": torch.ones(3, 3)}, ValueError, r"x must have shape \[B = 4, D = 3\]"),
        ({"mask": torch.ones(4, 3)}, TypeError, "mask must be a bool tensor"),
        ({"scale": torch.ones(4)}, ValueError, r"scale must be one number or one per column \(3\)"),
        ({"scale": -1.0}, ValueError, "scale must be above 0"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        linear_masked_gaussian_nll(**example() | change)
