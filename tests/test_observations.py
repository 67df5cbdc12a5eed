import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rvi_fast.observations import ColumnStatistics, Observations


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_statistics_are_those_of_the_observed_cells(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    n, d, size = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1, 7, 1000]))
    X = rng.normal(size=(n, d)) * 10.0 ** rng.integers(-3, 6, d) + rng.normal(size=d) * 1e3
    X[rng.random((n, d)) < data.draw(st.sampled_from([0.0, 0.4]))] = np.nan
    observations = Observations(X)
    observations.blocks = lambda: (slice(s, min(s + size, n)) for s in range(0, n, size))
    statistics = ColumnStatistics.of(observations)
    for c in range(d):
        seen = X[~np.isnan(X[:, c]), c]
        assert statistics.count[c] == len(seen)
        if len(seen):
            assert statistics.mean[c] == pytest.approx(seen.mean(), rel=1e-12, abs=1e-9)
            assert statistics.std[c] == pytest.approx(seen.std(), rel=1e-8, abs=1e-9)
            assert (statistics.low[c], statistics.high[c]) == (seen.min(), seen.max())


def test_units_go_there_and_back():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(40, 4)) * [1, 1e6, 1e-6, 1] + [0, 1e9, 0, 5]
    X[:, 3] = 5.0
    X[rng.random(X.shape) < 0.3] = np.nan
    observations = Observations(X)
    units = ColumnStatistics.of(observations).units(standardize=True)
    model, mask = units.to_model(*observations.read(slice(None)))
    assert model.dtype == torch.float32 and (model[~mask] == 0).all()
    for c in range(3):
        seen = model[mask[:, c], c]
        assert abs(seen.mean()) < 1e-4 and abs(seen.std(correction=0) - 1) < 1e-4
    assert units.constant.tolist() == [False, False, False, True]
    back = units.to_user(model.double().numpy())
    assert np.allclose(back[mask.numpy()], X[mask.numpy()], rtol=1e-6, atol=1e-8 * 1e6)
    assert (back[:, 3] == 5).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda X: X,
        lambda X: X.tolist(),
        lambda X: torch.from_numpy(X),
        lambda X: np.asfortranarray(X),
        lambda X: np.repeat(X, 2, axis=0)[::2],
        lambda X: pd.DataFrame(X),
        lambda X: pd.DataFrame(X).convert_dtypes(),
        lambda X: pd.DataFrame(X).astype({0: "Float64"}),
    ],
)
def test_every_container_reads_the_same(make):
    X = np.random.default_rng(0).normal(size=(12, 3))
    X[2, 1] = X[5, 0] = np.nan
    values, observed = Observations(make(X)).read(np.array([2, 5, 0]))
    assert np.array_equal(values.astype(float), X[[2, 5, 0]], equal_nan=True)
    assert np.array_equal(observed, ~np.isnan(X[[2, 5, 0]]))


@pytest.mark.parametrize("dtypes", ["boolean", {0: "boolean"}, {}], ids=str)
def test_a_mask_may_be_a_frame_of_nullable_bools(dtypes):
    mask = np.random.default_rng(0).random((12, 3)) < 0.5
    observed = Observations(np.ones((12, 3)), pd.DataFrame(mask).astype(dtypes)).read(slice(None))[1]
    assert observed.dtype == bool and np.array_equal(observed, mask)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.int64])
def test_integers_are_read_exactly(dtype):
    X = np.array([[0, 1], [1, 1]]).astype(dtype)
    values, observed = Observations(X).read(slice(None))
    assert values.dtype == dtype and observed.all()
    assert Observations(X).output_dtype() == (np.float64 if dtype is np.int64 else np.float32)


def test_bfloat16_tensors_are_widened():
    X = torch.randn(4, 2).bfloat16()
    assert np.array_equal(Observations(X).read(slice(None))[0], X.float().numpy())


def test_large_offsets_keep_their_digits():
    """1e9 + small numbers: the mean is taken off in float64, before the cast to float32."""
    X = 1e9 + np.arange(10.0)[:, None]
    observations = Observations(X)
    model, _ = ColumnStatistics.of(observations).units(True).to_model(*observations.read(slice(None)))
    assert torch.allclose(model[:, 0], torch.linspace(-1.5667, 1.5667, 10), atol=1e-3)
