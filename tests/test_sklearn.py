import os
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from sklearn import config_context
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from rvi_fast import RVI, masks
from rvi_fast.sklearn import RVIEmbedding, RVIImputer

SMALL = dict(n_components=3, hidden=(8,), groups=(5, 10), epochs=4, infer_steps=12, random_state=0)
SAME_RVI = dict(latent_dim=3, hidden=(8,), groups=(5, 10), epochs=4, seed=0, progress=False)
BOTH = [RVIImputer, RVIEmbedding]


def table(n=60, d=5, rate=0.3, seed=0):
    """Rows of rank 2 by the seed, from one distribution; columns differ in place and size."""
    columns, rng = np.random.default_rng(7), np.random.default_rng(seed)
    X = rng.normal(size=(n, 2)) @ columns.normal(size=(2, d)) + 0.1 * rng.normal(size=(n, d))
    X = X * 10 ** columns.uniform(-2, 3, d) + columns.normal(size=d) * 10
    return np.where(rng.random((n, d)) < rate, np.nan, X)


@parametrize_with_checks([RVIImputer(), RVIEmbedding()])
def test_estimators_pass_every_check_with_their_defaults(estimator, check):
    check(estimator)


def test_the_checks_that_need_array_api_dispatch():
    """scikit-learn skips these unless the variable is set before SciPy is imported."""
    code = """
from sklearn.utils.estimator_checks import estimator_checks_generator
from rvi_fast.sklearn import RVIEmbedding, RVIImputer
run = 0
for estimator in (RVIImputer(max_steps=5, infer_steps=5), RVIEmbedding(max_steps=5, infer_steps=5)):
    for estimator, check in estimator_checks_generator(estimator):
        if "array_api" in check.func.__name__:
            check(estimator)
            run += 1
print(run)
"""
    environment = os.environ | {"SCIPY_ARRAY_API": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 2


def test_the_library_does_not_import_sklearn():
    code = "import sys, rvi_fast; sys.exit('sklearn' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# what they return


def test_both_are_the_rvi_of_that_seed():
    X = table()
    rvi, filling = RVI(**SAME_RVI).fit(X), RVI(**SAME_RVI, kl_weight=0.7, weight_decay=0.2).fit(X)
    assert np.array_equal(RVIImputer(**SMALL, members=1).fit_transform(X), filling.impute(X, steps=12))
    assert np.array_equal(RVIImputer(**SMALL, members=1, transductive=True).fit_transform(X), filling.impute())
    assert np.array_equal(RVIEmbedding(**SMALL).fit_transform(X), rvi.embed(X, steps=12))
    assert np.array_equal(RVIEmbedding(**SMALL, transductive=True).fit_transform(X), rvi.embed())
    assert RVIEmbedding(**SMALL).fit(X).score(X) == pytest.approx(rvi.score(X, steps=12).mean())
    assert RVIImputer(**SMALL).fit(X).score(X) == pytest.approx(filling.score(X, steps=12).mean())


def test_members_are_averaged_and_drawn_from_in_turn():
    X = table()
    imputer = RVIImputer(**SMALL, members=2).fit(X)
    first, second = imputer.members_
    assert first is imputer.rvi_ and first.seed == 0 and second.seed not in (0, 1)
    fillings = [rvi.impute(X, steps=12) for rvi in imputer.members_]
    assert not np.allclose(*fillings) and np.allclose(imputer.transform(X), np.mean(fillings, axis=0), rtol=1e-12)
    own = [rvi.impute() for rvi in imputer.members_]
    transductive = RVIImputer(**SMALL, members=2, transductive=True).fit_transform(X)
    assert np.allclose(transductive, np.mean(own, axis=0), rtol=1e-12)

    draws, alone = imputer.impute_samples(X, 3), RVIImputer(**SMALL, members=1).fit(X).impute_samples(X, 2)
    assert np.array_equal(draws[[0, 2]], alone)
    holes = np.isnan(X)
    assert (draws[1] != alone[1])[holes].all()


def test_small_tables_alone_get_several_members(monkeypatch):
    import rvi_fast.sklearn

    X = table()
    assert len(RVIImputer(**SMALL).fit(X).members_) == rvi_fast.sklearn.MEMBERS > 1
    monkeypatch.setattr(rvi_fast.sklearn, "SMALL_TABLE", X.size - 1)
    (only,) = RVIImputer(**SMALL).fit(X).members_
    assert only.seed == 0


@pytest.mark.parametrize("cls", BOTH)
def test_every_argument_reaches_the_rvi(cls):
    given = dict(
        hidden=(6, 5), groups=(4,), active=2, kl_weight=0.5, lr=0.02, row_lr=0.03, weight_decay=0.01, batch_size=16
    )
    model = cls(n_components=2, epochs=3, max_steps=9, random_state=5, device="cpu", **given).fit(table())
    assert {name: model.rvi_.get_params()[name] for name in given} == given
    assert model.rvi_.latent_dim_ == 2 and model.rvi_.seed == 5 and not model.rvi_.progress
    assert model.n_iter_ == 3 and model.rvi_.n_steps_ == 9


@pytest.mark.parametrize("kw", [{}, {"transductive": True}, {"sample_posterior": True}, {"clip": True}])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_observed_cells_come_back_bit_for_bit(dtype, kw):
    X = table().astype(dtype)
    X[0, 0], X[1] = -0.0, np.nan
    filled = RVIImputer(**SMALL, **kw).fit_transform(X)
    seen = ~np.isnan(X)
    assert filled.dtype == dtype and np.isfinite(filled).all()
    assert np.array_equal(filled[seen].view(np.uint8), X[seen].view(np.uint8))


def test_clipping_does_not_touch_observed_cells_outside_the_range():
    imputer = RVIImputer(**SMALL, clip=True).fit(table())
    new = table(seed=1)
    new[0, 1] = 1e6
    assert imputer.transform(new)[0, 1] == 1e6


@pytest.mark.parametrize("cls", BOTH)
def test_a_row_depends_on_no_other_row(cls):
    model = cls(**SMALL, **({"sample_posterior": True} if cls is RVIImputer else {})).fit(table())
    new = table(n=150, seed=1)
    whole, order = model.transform(new), np.random.default_rng(0).permutation(150)
    assert np.array_equal(model.transform(new[order]), whole[order])
    assert np.array_equal(model.transform(new[70:75]), whole[70:75])
    assert not np.array_equal(whole[0], whole[1])


def test_rows_without_holes_are_not_fitted(monkeypatch):
    imputer = RVIImputer(**SMALL).fit(table())
    fitted = []
    infer = imputer.rvi_.infer
    monkeypatch.setattr(imputer.rvi_, "infer", lambda X, **kw: fitted.append(len(X)) or infer(X, **kw))
    new = table(seed=1, rate=0.0)
    assert np.array_equal(imputer.transform(new), new) and fitted == []
    new[[3, 8], 2] = np.nan
    imputer.transform(new)
    assert fitted == [2]


def test_it_fills_well_in_a_pipeline():
    X, y = load_breast_cancer(return_X_y=True)
    observed = masks.mcar(X.shape, 0.5, seed=0)
    holed, train, new = np.where(observed, X, np.nan), np.s_[:400], np.s_[400:]
    pipeline = make_pipeline(RVIImputer(epochs=80, random_state=0), StandardScaler(), LogisticRegression())
    pipeline.fit(holed[train], y[train])
    assert pipeline.score(holed[new], y[new]) > 0.9
    error = (pipeline[0].transform(holed[new]) - X[new]) / X.std(0)
    assert (error[~observed[new]] ** 2).mean() < 0.35


def test_missing_values_may_be_a_number():
    X = table()
    marked = np.where(np.isnan(X), -7, X)
    by_number = RVIImputer(**SMALL, missing_values=-7, add_indicator=True).fit_transform(marked)
    assert np.array_equal(by_number, RVIImputer(**SMALL, add_indicator=True).fit_transform(X))
    counts = np.rint(marked).astype(np.int64)
    filled = RVIImputer(**SMALL, missing_values=-7, round_integers=True).fit_transform(counts)
    assert np.array_equal(filled[counts != -7], counts[counts != -7]) and not np.isnan(filled).any()
    with pytest.raises(ValueError, match="NaN"):
        RVIImputer(**SMALL, missing_values=-7).fit(X)


def test_add_indicator_appends_what_was_missing():
    X = table()
    X[:, 2] = np.arange(60)
    imputer = RVIImputer(**SMALL, add_indicator=True).fit(X)
    found = imputer.transform(X)
    assert np.array_equal(found[:, 5:], np.isnan(X)[:, [0, 1, 3, 4]])
    assert np.array_equal(found[:, :5], RVIImputer(**SMALL).fit_transform(X))
    names = [*(f"x{i}" for i in range(5)), *(f"missingindicator_x{i}" for i in (0, 1, 3, 4))]
    assert list(imputer.get_feature_names_out()) == names
    assert RVIImputer(**SMALL).fit(X).indicator_ is None


def test_empty_features_are_dropped_or_kept():
    X = table()
    X[:, 1] = np.nan
    with pytest.warns(UserWarning, match=r"columns \[1\] of X have nothing observed and are dropped"):
        imputer = RVIImputer(**SMALL).fit(X)
    assert list(imputer.get_feature_names_out()) == ["x0", "x2", "x3", "x4"]
    filled = imputer.transform(X)
    assert np.array_equal(filled, RVIImputer(**SMALL).fit_transform(X[:, [0, 2, 3, 4]]))

    keeping = RVIImputer(**SMALL, keep_empty_features=True).fit(X)
    kept = keeping.transform(X)
    assert (kept[:, 1] == 0).all() and np.array_equal(np.delete(kept, 1, axis=1), filled)
    new = X.copy()
    new[:, 1] = 1e9
    assert np.array_equal(np.delete(keeping.transform(new), 1, axis=1), filled) and keeping.transform(new)[0, 1] == 1e9
    assert np.array_equal(RVIEmbedding(**SMALL).fit_transform(X), RVIEmbedding(**SMALL).fit(X).transform(new))


def test_rounding_and_clipping():
    rng = np.random.default_rng(0)
    X = np.column_stack([rng.integers(0, 3, 200), rng.normal(size=200), rng.integers(0, 3, 200)]).astype(float)
    X[rng.random(X.shape) < 0.4] = np.nan
    X[5] = np.nan
    holes = np.isnan(X)
    plain = RVIImputer(**SMALL, sample_posterior=True).fit_transform(X)
    rounded = RVIImputer(**SMALL, sample_posterior=True, round_integers=True).fit_transform(X)
    clipped = RVIImputer(**SMALL, sample_posterior=True, clip=True).fit_transform(X)
    assert (plain[:, 0] != np.rint(plain[:, 0])).any() and plain[:, 0].min() < 0 < 2 < plain[:, 0].max()
    assert np.array_equal(rounded[:, [0, 2]], np.rint(plain[:, [0, 2]])) and np.array_equal(rounded[:, 1], plain[:, 1])
    low, high = np.nanmin(X, axis=0), np.nanmax(X, axis=0)
    assert np.array_equal(clipped[holes], np.clip(plain, low, high)[holes])


# containers


def frame():
    X = table(d=4)
    counts = np.where(np.isnan(X[:, 0]), np.nan, np.rint(np.nan_to_num(X[:, 0]) * 10))
    index = pd.Index([f"row {i // 2}" for i in range(60)])  # with duplicates
    return pd.DataFrame(
        {
            "count": pd.array(counts, dtype="Int64"),
            "small": X[:, 1].astype(np.float32),
            "wide": X[:, 2],
            "seen": np.arange(60, dtype=np.int16),
            "flag": np.arange(60) % 2 == 0,
        }
    ).set_axis(index, axis=0)


@pytest.mark.parametrize("transductive", [False, True])
def test_dataframes_keep_index_columns_and_dtypes(transductive):
    X = frame()
    imputer = RVIImputer(**SMALL, round_integers=True, transductive=transductive)
    plain = imputer.fit_transform(X)
    assert isinstance(plain, np.ndarray) and plain.dtype == np.float64
    filled = imputer.set_output(transform="pandas").fit_transform(X)
    assert filled.index.equals(X.index) and list(filled) == list(X) and (filled.dtypes == X.dtypes).all()
    assert not filled.isna().any(axis=None)
    assert np.array_equal(filled["wide"], plain[:, 2]) and np.array_equal(filled["count"].astype(float), plain[:, 0])
    for column in X:
        assert (filled[column][X[column].notna().to_numpy()] == X[column].dropna()).all()


def test_an_integer_column_with_filled_fractions_becomes_float():
    X = frame()
    filled = RVIImputer(**SMALL).set_output(transform="pandas").fit_transform(X)
    assert filled["count"].dtype == np.float64 and filled["seen"].dtype == np.int16
    again = RVIImputer(**SMALL).set_output(transform="pandas").fit(X).transform(X.dropna())
    assert again["count"].dtype == "Int64"


def test_rounded_cells_stay_within_the_integer_type():
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"a": pd.array(rng.integers(0, 256, 80), dtype="UInt8"), "b": rng.normal(size=80)})
    X.loc[::3, "a"] = pd.NA
    imputer = RVIImputer(**SMALL, round_integers=True, sample_posterior=True)
    plain = imputer.fit_transform(X)[:, 0]
    assert plain.min() < 0 and plain.max() > 255
    filled = imputer.set_output(transform="pandas").fit_transform(X)["a"]
    assert filled.dtype == "UInt8" and np.array_equal(filled.astype(float), plain.clip(0, 255))


def test_the_indicator_has_names_in_a_dataframe():
    X = frame()
    with config_context(transform_output="pandas"):
        filled = RVIImputer(**SMALL, add_indicator=True).fit_transform(X)
        embedded = RVIEmbedding(**SMALL).fit_transform(X)
    assert list(filled)[5:] == [f"missingindicator_{name}" for name in ("count", "small", "wide")]
    assert np.array_equal(filled["missingindicator_wide"], X["wide"].isna())
    assert list(embedded) == [f"rviembedding{i}" for i in range(3)] and embedded.index.equals(X.index)


def test_columns_in_another_order_are_refused():
    X = frame()
    imputer = RVIImputer(**SMALL).fit(X)
    assert list(imputer.feature_names_in_) == list(X) and imputer.n_features_in_ == 5
    with pytest.raises(ValueError, match="feature names should match"):
        imputer.transform(X[X.columns[::-1]])


def test_polars_in_polars_out():
    polars = pytest.importorskip("polars")
    X = table()
    given = polars.DataFrame(X, schema=list("abcde")).fill_nan(None)
    filled = RVIImputer(**SMALL).set_output(transform="polars").fit_transform(given)
    assert isinstance(filled, polars.DataFrame) and filled.columns == list("abcde")
    assert np.array_equal(filled.to_numpy(), RVIImputer(**SMALL).fit_transform(X))


# scikit-learn's ways


@pytest.mark.parametrize("cls", BOTH)
def test_clone_and_pickle(cls):
    X = table()
    model = cls(**SMALL).fit(X)
    again = clone(model)
    assert again.get_params() == model.get_params() and not hasattr(again, "rvi_")
    assert np.array_equal(again.fit(X).transform(X), model.transform(X))
    assert np.array_equal(pickle.loads(pickle.dumps(model)).transform(X), model.transform(X))


@pytest.mark.parametrize("cls", BOTH)
def test_random_state(cls):
    X = table()

    def run(random_state):
        return cls(**SMALL | {"random_state": random_state}).fit_transform(X)

    assert np.array_equal(run(1), run(1)) and not np.array_equal(run(1), run(2))
    assert np.array_equal(run(np.random.RandomState(1)), run(np.random.RandomState(1)))
    shared = np.random.RandomState(1)
    assert not np.array_equal(run(shared), run(shared))
    assert not np.array_equal(run(None), run(None))


def test_grid_search_through_a_pipeline():
    X = table(n=90)
    y = np.nan_to_num(X[:, 0]) > np.nanmedian(X[:, 0])
    pipeline = make_pipeline(RVIImputer(**SMALL), StandardScaler(), LogisticRegression())
    search = GridSearchCV(pipeline, {"rviimputer__n_components": [1, 2], "rviimputer__clip": [False, True]}, cv=2)
    search.fit(X, y)
    best = search.best_estimator_[0]
    assert best.rvi_.latent_dim_ == search.best_params_["rviimputer__n_components"]
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_the_score_prefers_a_model_that_has_learned():
    X = table(n=120, rate=0.1)
    few, many = {**SMALL, "epochs": 1}, {**SMALL, "epochs": 150, "infer_steps": 100}
    for cls in BOTH:
        assert cls(**many).fit(X[:80]).score(X[80:]) > cls(**few).fit(X[:80]).score(X[80:]) + 1
    search = GridSearchCV(RVIEmbedding(**many), {"epochs": [1, 150]}, cv=2).fit(X)
    assert search.best_params_ == {"epochs": 150}


# draws


def test_draws_are_decided_by_the_seed_and_vary_in_the_holes_alone():
    X = table()
    imputer = RVIImputer(**SMALL).fit(X)
    draws = imputer.impute_samples(X, n_samples=8)
    assert draws.shape == (8, 60, 5) and np.array_equal(draws, imputer.impute_samples(X, n_samples=8))
    assert np.array_equal(np.ptp(draws, axis=0) > 0, np.isnan(X))
    sampling = RVIImputer(**SMALL, sample_posterior=True).fit(X)
    assert np.array_equal(sampling.transform(X), draws[0])
    other = RVIImputer(**SMALL | {"random_state": 1}, sample_posterior=True).fit_transform(X)
    assert not np.array_equal(other, draws[0])


def test_draws_cover_what_was_hidden():
    """Intervals are a little narrow: nothing in them says that decoder and relays are uncertain."""
    columns, rng = np.random.default_rng(7), np.random.default_rng(0)
    X = rng.normal(size=(256, 2)) @ columns.normal(size=(2, 8)) + 0.5 * rng.normal(size=(256, 8))
    hidden = ~masks.mcar(X.shape, 0.3, seed=0)
    holed = np.where(hidden, np.nan, X)
    draws = RVIImputer(infer_steps=500, random_state=0).fit(holed).impute_samples(holed, n_samples=60)
    low, high = np.quantile(draws, [0.05, 0.95], axis=0)
    covered = ((low < X) & (high > X))[hidden].mean()
    assert 0.7 < covered < 0.97


def test_a_constant_column_has_no_noise():
    X = table()
    X[:, 3] = np.where(np.isnan(X[:, 3]), np.nan, 4.0)
    assert (RVIImputer(**SMALL).fit(X).impute_samples(X, n_samples=2)[..., 3] == 4.0).all()


def test_noise_differs_between_columns_beyond_one_step_of_the_keyed_noise(monkeypatch):
    X = np.full((20, 5), np.nan)
    X[:10] = table(n=10, rate=0.0)
    X[10:, 0] = np.arange(10)
    imputer = RVIImputer(**SMALL).fit(X)
    whole = imputer.impute_samples(X, n_samples=1)
    monkeypatch.setattr("rvi_fast.ops.MAX_LATENTS", 4)
    parts = imputer.impute_samples(X, n_samples=1)
    assert np.array_equal(parts[..., :4], whole[..., :4]) and not np.array_equal(parts[..., 4], whole[..., 4])


# bad input


@pytest.mark.parametrize(
    "kw, error, match",
    [
        ({"n_components": 0}, ValueError, "n_components must be a positive int"),
        ({"infer_steps": 0}, ValueError, "infer_steps must be a positive int"),
        ({"epochs": -1}, ValueError, "epochs must be a positive int"),
        ({"max_steps": 0}, ValueError, "max_steps must be a positive int"),
        ({"transductive": "yes"}, ValueError, "transductive must be one of True, False"),
        ({"random_state": -1}, ValueError, "random_state must be an int in 0"),
        ({"random_state": "a"}, ValueError, "cannot be used to seed"),
        ({"clip": 1}, ValueError, "clip must be one of True, False; got 1"),
        ({"members": 0}, ValueError, "members must be a positive int or 'auto'"),
        ({"missing_values": "?"}, ValueError, "missing_values must be NaN or a finite number; got '?'"),
        ({"missing_values": np.inf}, ValueError, "missing_values must be NaN or a finite number; got inf"),
    ],
)
def test_bad_arguments_are_refused_at_fit(kw, error, match):
    imputer = RVIImputer(**SMALL | kw)
    with pytest.raises(error, match=match):
        imputer.fit(table())
    if not kw.keys() & {"clip", "members", "missing_values"}:
        with pytest.raises(error, match=match):
            RVIEmbedding(**SMALL | kw).fit(table())


@pytest.mark.parametrize("cls", BOTH)
def test_bad_tables_are_refused(cls):
    model = cls(**SMALL)
    with pytest.raises(NotFittedError, match="not fitted"):
        model.transform(table())
    with pytest.raises(ValueError, match="every cell is missing"):
        model.fit(np.full((4, 3), np.nan))
    with pytest.raises(ValueError, match="infinity"):
        model.fit(np.array([[1.0, np.inf], [2.0, 3.0]]))
    with pytest.raises(ValueError, match="could not convert string to float"):
        model.fit(pd.DataFrame({"a": ["x", "y"], "b": [1.0, 2.0]}))
    for given in ({}, {"missing_values": -1.0} if cls is RVIImputer else {}):
        with pytest.raises(ValueError, match=r"'x' in X's column 'b'; encode it as numbers first \(OrdinalEncoder"):
            cls(**SMALL, **given).fit(pd.DataFrame({"a": [1.0, 2.0], "b": ["1", "x"]}))
    with pytest.raises(ValueError, match=r"could not convert string to float: 'x'$"):
        model.fit([["x", 1.0], ["y", 2.0]])
    model.fit(table())
    with pytest.raises(ValueError, match=r"X has 4 features, but .* is expecting 5"):
        model.transform(table(d=4))


@pytest.mark.parametrize("n_samples", [0, 1.5, None])
def test_bad_sample_counts_are_refused(n_samples):
    imputer = RVIImputer(**SMALL).fit(table())
    with pytest.raises(ValueError, match="n_samples must be a positive int"):
        imputer.impute_samples(table(), n_samples=n_samples)
