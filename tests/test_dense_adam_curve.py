import numpy as np
import pytest

from rvi_fast import data
from rvi_fast.bench import dense_adam_curve


def observed(X, rate=0.5):
    return np.where(np.random.default_rng(0).random(X.shape) < rate, np.nan, X).astype(np.float32)


def assert_within_rounding(X, steps, **settings):
    """Our float32 run is about as close to the float64 truth as the eager peer's own float32 run."""
    differences = dense_adam_curve.relative_differences(dense_adam_curve.curves(X, steps, **settings))
    assert differences["rvi_fast float32"] <= 4 * differences["eager float32"] + 1e-6
    assert differences["rvi_fast float32"] < 1e-5


def test_the_loss_curve_is_dense_adams_on_random_rows():
    X = np.random.default_rng(1).random((300, 40))
    assert_within_rounding(observed(X), 60, batch_size=16, hidden=(16, 16), groups=(6, 11), latent_dim=7)


@pytest.mark.parametrize("missing", [0.0, 0.5])
def test_the_loss_curve_is_dense_adams_in_the_paper_setting(missing):
    try:
        X, _ = data.fashion_mnist()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert_within_rounding(observed(X[:4000] / np.float32(255), missing), 40)


def test_lazy_adam_is_another_algorithm():
    X = observed(np.random.default_rng(1).random((300, 40)))
    losses = dense_adam_curve.curves(X, 60, batch_size=16, hidden=(16, 16), optimizer_mode="lazy")
    assert dense_adam_curve.relative_differences(losses)["rvi_fast float32"] > 1e-3
