import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rvi_fast.masks import boxes, mar, mcar, mnar

EVERY_MASK = [mcar, boxes, mar, mnar]


def table(n=4000, d=9, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)) * np.arange(1, d + 1)


def with_holes(X):
    X = X.copy()
    X[::3, 1] = np.nan
    X[5] = np.nan
    X[:, 2] = np.nan
    X[5, [0, 3]] = 1.0
    return X


def correlation(values, hidden):
    return np.corrcoef(values, hidden.astype(float))[0, 1]


@pytest.mark.parametrize("mask_of", EVERY_MASK)
def test_shape_dtype_repeats_and_leaves_its_input_alone(mask_of):
    X = with_holes(table())
    before = X.copy()
    mask = mask_of(X, 0.4, seed=3)
    assert mask.shape == X.shape and mask.dtype == bool
    np.testing.assert_array_equal(X, before)
    np.testing.assert_array_equal(mask, mask_of(X, 0.4, seed=3))
    assert (mask != mask_of(X, 0.4, seed=4)).any()


@pytest.mark.parametrize("mask_of", EVERY_MASK)
def test_nan_is_never_observed_and_rate_zero_hides_nothing(mask_of):
    X = with_holes(table())
    assert not mask_of(X, 0.4)[np.isnan(X)].any()
    np.testing.assert_array_equal(mask_of(X, 0.0), ~np.isnan(X))


@pytest.mark.parametrize("mask_of", EVERY_MASK)
@pytest.mark.parametrize(
    "convert", [torch.from_numpy, pd.DataFrame, np.ndarray.tolist], ids=["tensor", "frame", "list"]
)
def test_same_mask_from_every_kind_of_table(mask_of, convert):
    X = table(50, 9)
    np.testing.assert_array_equal(mask_of(X, 0.4), mask_of(convert(X), 0.4))


@pytest.mark.parametrize("mask_of", EVERY_MASK)
@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_rate_outside_its_range(mask_of, rate):
    with pytest.raises(ValueError, match="rate must be in"):
        mask_of(table(10), rate)


@pytest.mark.parametrize("mask_of", EVERY_MASK)
@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        (np.array([[1.0, np.inf], [0.0, 0.0]]), ValueError, "infinity"),
        (np.zeros(4), ValueError, "one row and one column"),
        ([3, 3], ValueError, r"to pass a shape, give a tuple \(N, D\)"),
        (np.zeros((0, 4)), ValueError, "one row and one column"),
        (np.array([["a", "b"]]), TypeError, "X must be numeric"),
        (np.array([["a", None]], dtype=object), TypeError, "X must be numeric"),
    ],
)
def test_bad_data(mask_of, X, error, message):
    with pytest.raises(error, match=message):
        mask_of(X, 0.5)


@pytest.mark.parametrize("mask_of", [mcar, boxes])
@pytest.mark.parametrize("shape", [(4,), (3, 0), (2, 2, 2), (-1, 4)])
def test_bad_shape(mask_of, shape):
    with pytest.raises(ValueError, match="two positive integers"):
        mask_of(shape, 0.5)


@pytest.mark.parametrize("mask_of", EVERY_MASK)
@pytest.mark.parametrize("seed", [None, -1, 0.5])
def test_bad_seed(mask_of, seed):
    with pytest.raises(ValueError, match="seed must be an int, 0 or above"):
        mask_of(table(10), 0.5, seed=seed)


@pytest.mark.parametrize("mask_of", EVERY_MASK)
def test_nullable_columns_count_as_numbers(mask_of):
    pd = pytest.importorskip("pandas")
    X = np.round(with_holes(table(50)))
    frame = pd.DataFrame(X).astype({0: "Int64", 1: "Float32", 2: "Int64"})
    assert frame.isna().iloc[:, :3].to_numpy().any()
    np.testing.assert_array_equal(mask_of(frame, 0.4), mask_of(X, 0.4))


def test_a_rate_that_is_no_number():
    with pytest.raises(TypeError, match="rate must be a number"):
        mcar((3, 3), "half")  # type: ignore[arg-type]


@settings(max_examples=20, deadline=None)
@given(st.floats(0.0, 0.95), st.integers(0, 2**32))
def test_mcar_rate(rate, seed):
    n = 20_000
    hidden = (~mcar((n, 1), rate, seed=seed)).mean()
    assert abs(hidden - rate) < 6 * np.sqrt(rate * (1 - rate) / n) + 1e-9


def test_mcar_depends_on_the_shape_alone_where_nothing_is_missing():
    X = with_holes(table())
    np.testing.assert_array_equal(mcar(X, 0.3), mcar(X.shape, 0.3) & ~np.isnan(X))


@pytest.mark.parametrize("mask_of", [mcar, mar, mnar])
def test_a_higher_rate_hides_more_of_the_same(mask_of):
    X = table()
    assert not (mask_of(X, 0.6) & ~mask_of(X, 0.2)).any()


def test_noise_is_not_that_of_data_drawn_with_the_same_seed():
    X = np.random.default_rng(7).random((20_000, 1), dtype=np.float32)
    assert abs(correlation(X[:, 0], mcar(X, 0.5, seed=7)[:, 0])) < 0.05


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.0, 0.95), st.integers(0, 1000))
def test_boxes_are_single_rectangles(height, width, rate, seed):
    mask = boxes((40, height * width), rate, image_shape=(height, width), seed=seed)
    for hole in ~mask.reshape(40, height, width):
        rows, columns = hole.any(axis=1), hole.any(axis=0)
        np.testing.assert_array_equal(hole, np.outer(rows, columns))
        for side in (rows, columns):
            assert np.abs(np.diff(side.astype(int), prepend=0, append=0)).sum() <= 2


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.5, 0.9])
def test_boxes_hide_their_share(rate):
    share = 1.0 - boxes((20_000, 100), rate).mean(1)
    assert abs(share.mean() - rate) < 6 * share.std() / np.sqrt(share.size)


def test_boxes_reach_every_pixel_and_many_aspects():
    holes = ~boxes((2000, 64), 0.25, seed=1).reshape(2000, 8, 8)
    assert holes.any(0).all()
    assert len({(int(hole.any(1).sum()), int(hole.any(0).sum())) for hole in holes}) > 8


def test_boxes_need_an_image():
    with pytest.raises(ValueError, match="not a square image; pass image_shape"):
        boxes((5, 12), 0.5)
    with pytest.raises(ValueError, match=r"image_shape \(3, 5\) does not make 12"):
        boxes((5, 12), 0.5, image_shape=(3, 5))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_mar_hides_by_columns_that_stay_observed(rate):
    X = table(20_000, 10)
    mask = mar(X, rate, kept=0.1, seed=2)
    kept = mask.all(0)
    assert kept.sum() == 1
    np.testing.assert_allclose((~mask[:, ~kept]).mean(0), rate, atol=0.02)
    cause = X[:, kept][:, 0]
    for j in np.flatnonzero(~kept):
        assert abs(correlation(cause, ~mask[:, j])) > 0.3
        assert abs(correlation(X[:, j], ~mask[:, j])) < 0.05


def test_mar_share_of_kept_columns_and_what_it_needs():
    X = table(3000, 10)
    assert mar(X, 0.5, kept=0.4).all(0).sum() == 4
    assert mar(X, 0.5, kept=0.999).all(0).sum() == 9
    assert mar(X, 0.5, kept=0.001).all(0).sum() == 1
    with pytest.raises(ValueError, match="kept must be a share"):
        mar(X, 0.5, kept=1.0)
    with pytest.raises(ValueError, match="mar needs two columns"):
        mar(X[:, :1], 0.5)
    with pytest.raises(ValueError, match="mar needs two columns"):
        mar(np.where(np.eye(10, dtype=bool), np.nan, X[:10]), 0.5)


def test_mar_keeps_only_complete_columns():
    X = table(300, 4)
    X[0, :3] = np.nan
    np.testing.assert_array_equal(mar(X, 0.5, kept=0.7).all(0), [False, False, False, True])


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_mnar_hides_large_values(rate):
    X = table(20_000, 4)
    X[:5000, 0] = np.nan
    mask = mnar(X, rate)
    for j in range(4):
        seen = ~np.isnan(X[:, j])
        assert abs((~mask[seen, j]).mean() - rate) < 0.025
        assert correlation(X[seen, j], ~mask[seen, j]) > 0.3


def test_constant_columns_are_hidden_at_random():
    X = np.full((20_000, 3), 0.1)
    for mask in (mar(X, 0.3), mnar(X, 0.3)):
        hidden = (~mask).mean(0)
        np.testing.assert_allclose(hidden[hidden > 0], 0.3, atol=0.02)
