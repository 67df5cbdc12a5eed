import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rvi_fast.bench.peers.low_rank import low_rank_impute
from rvi_fast.data import artificial, load_table
from rvi_fast.masks import mar, mcar


def hidden_error(X, rate, seed=0, **options):
    """Squared error over hidden entries, in units of the columns' variance: 1 is as good as the mean."""
    scale = X.std(0)
    Z = (X - X.mean(0)) / np.where(scale > 0, scale, 1.0)
    mask = mcar(Z, rate, seed=seed)
    filled = low_rank_impute(np.where(mask, Z, np.nan), **options)
    assert np.array_equal(filled[mask], Z[mask])
    return float(np.mean((filled - Z)[~mask] ** 2))


def test_breast_cancer_figure():
    pytest.importorskip("sklearn")
    X, _ = load_table("breast_cancer")
    assert hidden_error(X, 0.5, ranks=(12,), seed=1) < 0.24


def test_recovers_exact_low_rank_data():
    X = artificial(400, 30, n_sources=3).astype(np.float64)
    assert hidden_error(X, 0.5, ranks=(1, 2, 3, 4, 6)) < 0.005
    assert hidden_error(X, 0.5, ranks=(1,)) > 0.2


@pytest.mark.parametrize("seed", range(3))
def test_pure_noise_is_filled_with_about_the_mean(seed):
    assert 0.9 < hidden_error(np.random.default_rng(seed).standard_normal((100, 20)), 0.5, seed=seed) < 1.1


def test_means_are_not_biased_by_what_is_missing():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((2000, 1)) + 0.5 * rng.standard_normal((2000, 6))
    mask = mar(X, 0.7, kept=0.2)
    filled = low_rank_impute(np.where(mask, X, np.nan))
    for j in np.flatnonzero(~mask.all(0)):
        seen, hidden = X[mask[:, j], j], X[~mask[:, j], j]
        assert abs(seen.mean() - hidden.mean()) > 1.0
        assert abs(filled[~mask[:, j], j].mean() - hidden.mean()) < 0.15


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1e-6, 1.0, 1e6]), st.booleans())
def test_follows_shift_and_scale(seed, scale, standardize):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((60, 2)) @ rng.standard_normal((2, 6)) + 0.1 * rng.standard_normal((60, 6))
    X[~mcar(X, 0.3, seed=seed)] = np.nan
    options = {"ranks": (1, 2), "standardize": standardize}
    expected = low_rank_impute(X, **options) * scale + 5 * scale
    np.testing.assert_allclose(low_rank_impute(X * scale + 5 * scale, **options), expected, rtol=1e-6)


def test_one_scale_for_all_columns_lets_wide_columns_decide():
    factors = np.random.default_rng(0).standard_normal((400, 2))
    X = np.hstack([np.repeat(factors[:, :1], 3, 1), 0.01 * np.repeat(factors[:, 1:], 9, 1)])
    mask = mcar(X, 0.3)

    def explained(standardize):
        filled = low_rank_impute(np.where(mask, X, np.nan), ranks=(1,), standardize=standardize)
        error = np.where(mask, 0.0, (filled - X) ** 2) / X.var(0)
        return [error[:, part].sum() / (~mask[:, part]).sum() < 0.2 for part in (slice(0, 3), slice(3, 12))]

    assert explained(standardize=False) == [True, False]
    assert explained(standardize=True) == [False, True]


def test_input_is_left_alone_and_results_repeat():
    X = artificial(50, 8, n_sources=2).astype(np.float64)
    X[~mcar(X, 0.4)] = np.nan
    before = X.copy()
    first = low_rank_impute(X)
    np.testing.assert_array_equal(X, before)
    np.testing.assert_array_equal(first, low_rank_impute(X))


def test_degenerate_tables():
    complete = np.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(low_rank_impute(complete), complete)
    one_row = np.array([[1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(low_rank_impute(one_row), one_row)
    X = artificial(40, 5, n_sources=2).astype(np.float64)
    X[:, 1] = 0.1 + 0.2  # constant, with a mean that rounds
    X[3] = np.nan  # nothing observed
    X[1:, 4] = np.nan  # one entry observed
    X[10:, 1] = np.nan
    filled = low_rank_impute(X)
    assert np.isfinite(filled).all()
    assert (filled[:, 1] == 0.1 + 0.2).all() and (filled[:, 4] == X[0, 4]).all()
    np.testing.assert_allclose(filled[3], np.nanmean(X, 0), atol=0.3)


@pytest.mark.parametrize(
    ("X", "ranks", "message"),
    [
        (np.zeros(3), (1,), "one row and one column"),
        (np.array([[1.0, np.inf]]), (1,), "infinity"),
        (np.array([[1.0, np.nan], [2.0, np.nan]]), (1,), r"columns \[1\] of X have nothing observed"),
        (np.ones((3, 3)), (), "ranks must be"),
        (np.ones((3, 3)), (0, 2), "ranks must be"),
    ],
)
def test_errors(X, ranks, message):
    with pytest.raises(ValueError, match=message):
        low_rank_impute(X, ranks=ranks)
