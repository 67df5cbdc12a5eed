import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from rvi_fast.metrics import elastic, mae, rmse

EVERY_METRIC = [elastic, rmse, mae]


def test_values_by_hand():
    x, x_hat = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 2.5], [1.0, 4.0]])
    assert elastic(x, x_hat) == (0.5 + 0.25 + 2.0 + 4.0) / 4
    assert rmse(x, x_hat) == math.sqrt(4.25 / 4)
    assert mae(x, x_hat) == 2.5 / 4
    where = np.array([[False, True], [False, False]])
    assert (elastic(x, x_hat, where), rmse(x, x_hat, where), mae(x, x_hat, where)) == (0.75, 0.5, 0.5)


@settings(max_examples=30, deadline=None)
@given(arrays(np.float32, array_shapes(max_dims=3), elements=st.floats(-100, 100, width=32)), st.integers(0, 99))
def test_properties(x, seed):
    rng = np.random.default_rng(seed)
    x_hat = x + rng.standard_normal(x.shape).astype(np.float32)
    where = rng.random(x.shape) < 0.5
    where.flat[0] = True
    assert mae(x, x_hat, where) <= rmse(x, x_hat, where) * (1 + 1e-12)
    assert math.isclose(
        elastic(x, x_hat, where), mae(x, x_hat, where) + rmse(x, x_hat, where) ** 2, rel_tol=1e-12, abs_tol=1e-300
    )
    for metric in EVERY_METRIC:
        assert metric(x, x, where) == 0.0
        assert metric(x, x_hat, where) == metric(x_hat, x, where)
        assert metric(x, x_hat, where) == metric(x[where], x_hat[where])


@pytest.mark.parametrize("metric", EVERY_METRIC)
def test_entries_that_do_not_count_are_never_read(metric):
    x, x_hat = np.array([1.0, np.nan, 3.0]), np.array([2.0, 5.0, np.inf])
    assert metric(x, x_hat, np.array([True, False, False])) == metric([1.0], [2.0])


@pytest.mark.parametrize("metric", EVERY_METRIC)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_tensors(metric, dtype):
    x = torch.tensor([[1.0, -2.0], [3.0, 7.0]]).to(dtype)
    x_hat = torch.tensor([[2.0, 0.5], [3.0, 5.0]], requires_grad=True)
    where = torch.tensor([[True, True], [False, True]])
    expected = metric(x.double().numpy(), x_hat.detach().double().numpy(), where.numpy())
    found = metric(x, x_hat, where)
    assert type(found) is float and found == expected


def test_float64_and_no_unsigned_wraparound():
    assert mae(np.zeros(3, np.uint8), np.ones(3, np.uint8)) == 1.0
    x = np.full(1 << 16, 1.0 / 3.0, np.float32)
    assert mae(x, np.zeros_like(x)) == pytest.approx(float(np.float32(1.0 / 3.0)), rel=1e-15)
    assert elastic(np.array([300.0], np.float16), np.array([-300.0], np.float16)) == 600.0 + 600.0**2


@pytest.mark.parametrize("metric", EVERY_METRIC)
def test_errors(metric):
    x = np.zeros((2, 3))
    with pytest.raises(ValueError, match="one shape"):
        metric(x, x[0])
    with pytest.raises(ValueError, match="where must have the shape"):
        metric(x, x, np.ones(3, dtype=bool))
    with pytest.raises(TypeError, match="where must be boolean"):
        metric(x, x, np.ones((2, 3)))
    for pair in ((x + 1j, x), (x, x + 1j)):
        with pytest.raises(TypeError, match="must be real, got dtype complex128"):
            metric(*pair)
    with pytest.raises(ValueError, match="no entry counts"):
        metric(x, x, np.zeros((2, 3), dtype=bool))
    with pytest.raises(ValueError, match="no entry counts"):
        metric(x[:0], x[:0])
    for bad in (np.nan, np.inf):
        holed = x.copy()
        holed[1, 2] = bad
        with pytest.raises(ValueError, match=r"^x is NaN or infinite"):
            metric(holed, x)
        with pytest.raises(ValueError, match=r"^x_hat is NaN or infinite"):
            metric(x, holed)
