import numpy as np
import pytest

from rvi_fast import masks
from rvi_fast.bench import imputation
from rvi_fast.bench.peers.knn import knn_impute


def test_rvi_with_its_defaults_fills_breast_cancer_well():
    """The bound that the defaults were chosen for, on one mask of five."""
    pytest.importorskip("sklearn")
    mse = {result.method: result.mse for result in imputation.compare("breast_cancer", 0.5, mask=0)}
    assert 0.9 < mse["column means"] < 1.1 and mse["kNN"] < 0.6
    assert mse["RVI"] < mse["RVI, one member"] < 0.28


def test_knn_does_not_depend_on_units():
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    X = rng.normal(size=(80, 2)) @ rng.normal(size=(2, 5))
    observed = masks.mcar(X.shape, 0.3, seed=0)
    holed, units = np.where(observed, X, np.nan), np.array([1, 1e4, 1e-4, 1, 50])
    filled = knn_impute(holed)
    assert np.array_equal(filled[observed], X[observed])
    assert np.allclose(knn_impute(holed * units), filled * units)
    assert ((filled - X)[~observed] ** 2).mean() < 0.5 * X.var()
