import copy
import dataclasses
import os
import signal
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rvi_fast import RVI, VAD, VAE, Posterior
from rvi_fast.likelihoods import Bernoulli, Gaussian

SMALL = dict(latent_dim=4, hidden=(8,), batch_size=16, epochs=3, progress=False)
RELAYS = dict(groups=(5, 10), active=0.5)
KINDS = [(RVI, SMALL | RELAYS), (VAD, SMALL), (VAE, SMALL)]
ROW_KINDS = KINDS[:2]


def table(n=50, d=6, rate=0.3, seed=0, rank=2):
    """Rows by the seed, from one distribution: a low-rank table whose columns differ in place and size."""
    columns, rng = np.random.default_rng(7), np.random.default_rng(seed)
    mix, size, place = columns.normal(size=(rank, d)), 10 ** columns.uniform(-2, 3, d), columns.normal(size=d) * 100
    X = rng.normal(size=(n, rank)) @ mix * size + place
    return np.where(rng.random((n, d)) < rate, np.nan, X)


def fitted(cls, kw, X=None, **fit):
    return cls(**kw).fit(table() if X is None else X, **fit)


@pytest.mark.parametrize("cls, kw", KINDS)
def test_every_result_has_its_shape_and_is_finite(cls, kw):
    X, new = table(), table(n=70, seed=1)
    model = fitted(cls, kw, X)
    assert model.embed().shape == (50, 4)
    assert model.embed(new, steps=5).shape == (70, 4)
    assert model.reconstruct(new, steps=5).shape == (70, 6)
    assert model.score().shape == (50,) and np.isfinite(model.score()).all()
    assert model.score(new, steps=5).shape == (70,)
    assert model.sample(7).shape == model.sample(7, source="posterior", noise=True).shape == (7, 6)
    assert model.impute(new, n_samples=3, steps=5).shape == (3, 70, 6)
    posterior = model.infer(new, steps=5)
    assert isinstance(posterior, Posterior) and len(posterior) == 70
    assert posterior.elbo.shape == posterior.converged.shape == (70,)
    for values in (
        model.impute(),
        model.impute(new, posterior=posterior),
        posterior.mean,
        posterior.elbo,
        model.sample(3),
    ):
        assert np.isfinite(np.asarray(values)).all()
    assert len(model.history_["loss"]) == 3 and model.n_steps_ == 12 and model.stopped_ == "completed"


@pytest.mark.parametrize("cls, kw", KINDS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_observed_cells_come_back_bit_for_bit(cls, kw, dtype):
    X = table(rank=1).astype(dtype)
    X[np.isinf(X)] = np.nan
    filled = fitted(cls, kw, X).impute()
    seen = ~np.isnan(X)
    assert filled.dtype == dtype and not np.isnan(filled.astype(float)).all(0).any()
    assert np.array_equal(filled[seen].view(np.uint8), X[seen].view(np.uint8))
    assert not np.isnan(filled).any()


def test_containers_come_back_as_they_were(tmp_path):
    X = table()
    array = fitted(RVI, SMALL | RELAYS, X).impute()
    tensor = fitted(RVI, SMALL | RELAYS, torch.from_numpy(X)).impute()
    assert isinstance(tensor, torch.Tensor) and np.array_equal(tensor.numpy(), array)

    frame = pd.DataFrame(X, columns=list("abcdef"), index=np.arange(50) * 3)
    filled = fitted(RVI, SMALL | RELAYS, frame).impute()
    assert isinstance(filled, pd.DataFrame) and filled.index.equals(frame.index) and list(filled) == list(frame)
    assert np.array_equal(filled.to_numpy(), array)
    draws = fitted(RVI, SMALL | RELAYS, frame).impute(n_samples=2)
    assert [type(d) for d in draws] == [pd.DataFrame] * 2

    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert np.array_equal(fitted(RVI, SMALL | RELAYS, mapped).impute(), array)


def test_a_mask_and_nan_say_the_same():
    X = table()
    mask = ~np.isnan(X)
    by_nan = fitted(RVI, SMALL | RELAYS, X).impute()
    by_mask = RVI(**SMALL, **RELAYS).fit(np.where(mask, X, 1e30), mask).impute()
    assert np.array_equal(by_nan, by_mask)


def test_uint8_images_with_a_mask():
    rng = np.random.default_rng(0)
    X, mask = rng.integers(0, 256, (40, 16), dtype=np.uint8), rng.random((40, 16)) > 0.5
    model = RVI(**{**SMALL, **RELAYS, "epochs": 60, "lr": 0.02}).fit(X, mask)
    filled = model.impute()
    assert filled.dtype == np.float32 and np.array_equal(filled[mask], X[mask]) and not model.standardize_
    assert 50 < filled[~mask].mean() < 205, "in the images' own units"


@pytest.mark.parametrize("cls, kw", KINDS)
def test_the_seed_decides_everything(cls, kw):
    X = table()
    first, again, other = (fitted(cls, kw | {"seed": s}, X) for s in (3, 3, 4))
    assert np.array_equal(first.embed(), again.embed()) and np.array_equal(first.impute(), again.impute())
    assert not np.array_equal(first.embed(), other.embed())
    torch.manual_seed(0)
    state = torch.get_rng_state()
    fitted(cls, kw, X)
    assert torch.equal(state, torch.get_rng_state()), "fit must leave the global generator alone"


@pytest.mark.parametrize("cls, kw", KINDS)
def test_training_lowers_the_loss_and_beats_the_mean(cls, kw):
    truth = table(n=200, rate=0)
    holes = np.random.default_rng(5).random(truth.shape) < 0.3
    model = cls(**{**kw, "epochs": 60, "lr": 1e-2}).fit(np.where(holes, np.nan, truth))
    assert model.history_["loss"][-1] < model.history_["loss"][0] - 1
    error = ((model.impute() - truth) / truth.std(0))[holes]
    assert (error**2).mean() < 0.6, "guessing the column mean gives 1"


# what must work


@pytest.mark.parametrize("cls, kw", KINDS)
def test_edge_cases_of_the_data(cls, kw):
    X = table()
    X[7] = np.nan  # a row with nothing observed
    X[:, 2] = np.where(np.isnan(X[:, 2]), np.nan, 42.5)  # a constant column
    model = fitted(cls, kw, X)
    filled = model.impute()
    assert np.isfinite(filled).all() and (filled[:, 2] == 42.5).all()
    assert np.isfinite(fitted(cls, kw, X[:1, :][:, ~np.isnan(X[0])]).impute()).all(), "N = 1"
    small = fitted(cls, kw | {"batch_size": 4096}, X)
    assert small.batch_size_ == 50 and small.n_steps_ == 3


@pytest.mark.parametrize("cls, kw", ROW_KINDS)
def test_a_row_with_nothing_observed_gets_the_prior(cls, kw):
    X = table()
    X[7] = np.nan
    model = fitted(cls, kw, X)
    for posterior, row in ((model.posterior_, 7), (model.infer(X[7:8], steps=4), 0)):
        assert torch.equal(posterior.mean[row], torch.zeros(4)) and torch.equal(posterior.std[row], torch.ones(4))
    assert model.score(X[7:8], steps=4) == 0


def test_an_empty_column_is_an_error_unless_kept():
    X = table()
    X[:, 3] = np.nan
    with pytest.raises(
        ValueError, match=r"column 3 of X has nothing observed; drop it, or set keep_empty_columns=True"
    ):
        fitted(RVI, SMALL | RELAYS, X)
    filled = fitted(RVI, SMALL | RELAYS | {"keep_empty_columns": True}, X).impute()
    assert (filled[:, 3] == 0).all() and np.isfinite(filled).all()
    frame = pd.DataFrame(X, columns=list("abcdef"))
    with pytest.raises(ValueError, match=r"column 3 \('d'\)"):
        fitted(RVI, SMALL | RELAYS, frame)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_shapes_and_holes(data):
    n, d = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 7))
    X = (
        np.random.default_rng(data.draw(st.integers(0, 99)))
        .normal(size=(n, d))
        .astype(data.draw(st.sampled_from("fd")))
    )
    X[np.array(data.draw(st.lists(st.booleans(), min_size=n * d, max_size=n * d))).reshape(n, d)] = np.nan
    cls, kw = data.draw(st.sampled_from(KINDS))
    model = cls(**{**kw, "epochs": 1, "keep_empty_columns": True, "batch_size": data.draw(st.integers(1, 5))}).fit(X)
    filled, seen = model.impute(X, steps=2), ~np.isnan(X)
    assert np.isfinite(filled).all() and np.array_equal(filled[seen], X[seen])
    assert np.isfinite(model.embed()).all()


# bad input: one sentence that names the argument, and the model as it was


def _inf(X):
    X = X.copy()
    X[3, 1] = np.inf
    return X


BAD_FITS = {
    "infinity": (lambda X: (_inf(X),), ValueError, r"X\[3, 1\] is inf; replace infinities"),
    "three axes": (lambda X: (X[None],), ValueError, r"X must have shape \[N, D\]; got \[1, 50, 6\]"),
    "one row": (
        lambda X: (X[0],),
        ValueError,
        r"got \[6\]; give one row as X\[None\] \(a list as \[X\]\), one column as",
    ),
    "a Series": (
        lambda X: (pd.Series(X[0]),),
        ValueError,
        r"got \[6\]; give one row of a DataFrame as X.to_frame\(\).T",
    ),
    "an empty list": (lambda X: ([],), ValueError, "at least one row"),
    "no rows": (lambda X: (X[:0],), ValueError, "at least one row"),
    "complex": (lambda X: (X.astype(complex),), TypeError, "X must hold bool, integer or float numbers"),
    "complex, its remedy": (lambda X: (X.astype(complex),), TypeError, r"give X.real, or both parts as columns"),
    "complex column": (lambda X: (pd.DataFrame(X).astype({2: complex}),), TypeError, "give its .real and .imag as two"),
    "None": (lambda X: ([[1.0, None], [2.0, 3.0]],), TypeError, r"dtype object; np.asarray\(X, dtype=float\) reads"),
    "text": (lambda X: (X.astype(str),), TypeError, "X must hold bool, integer or float numbers"),
    "text column": (lambda X: (pd.DataFrame(X).astype({2: str}),), TypeError, "column 2 has dtype"),
    "objects that are numbers": (
        lambda X: (pd.DataFrame(X, columns=list("abcdef")).astype({"c": object}),),
        TypeError,
        r"column 'c' has dtype object; where it holds numbers use X\['c'\] = pd.to_numeric\(X\['c'\]\), else drop it",
    ),
    "ragged": (lambda X: ([[1.0, 2.0], [3.0]],), ValueError, "X must be rectangular"),
    "NaN under mask True": (lambda X: (X, np.ones(X.shape, bool)), ValueError, "is NaN but mask says observed"),
    "a masked array": (lambda X: (np.ma.masked_invalid(X),), TypeError, "X is a masked array"),
    "nothing": (lambda X: (None,), TypeError, "X must be a dense array, tensor or DataFrame"),
    "sparse": (lambda X: (torch.from_numpy(X).to_sparse(),), TypeError, "tensor of layout torch.sparse_coo"),
    "huge integers": (lambda X: (np.full(X.shape, 2**60 + 1),), ValueError, "integers beyond 2"),
    "mask with NA": (
        lambda X: (X, pd.DataFrame(~np.isnan(X)).astype("boolean").mask(np.eye(*X.shape, dtype=bool))),
        ValueError,
        r"mask must be True \(observed\) or False in every cell, but has NA; use mask.fillna\(False\)",
    ),
    "mask of ints": (lambda X: (X, np.isnan(X).astype(int)), TypeError, "mask must be bool"),
    "mask with columns in another order": (
        lambda X: (pd.DataFrame(X, columns=list("abcdef")), pd.DataFrame(~np.isnan(X), columns=list("fedcba"))),
        ValueError,
        r"mask's columns must be X's, in the same order; give mask.loc\[X.index, X.columns\]",
    ),
    "mask with rows in another order": (
        lambda X: (pd.DataFrame(X), pd.DataFrame(~np.isnan(X)).iloc[::-1]),
        ValueError,
        "mask's index must be X's",
    ),
    "mask of another shape": (lambda X: (X, ~np.isnan(X)[:4]), ValueError, r"mask must have X's shape \[50, 6\]"),
}


@pytest.mark.parametrize("name", BAD_FITS)
@pytest.mark.parametrize("cls, kw", KINDS[:1])
def test_bad_data_leave_the_model_as_it_was(cls, kw, name):
    make, error, match = BAD_FITS[name]
    model = fitted(cls, kw)
    before = model.embed().copy()
    with pytest.raises(error, match=match):
        model.fit(*make(table()))
    assert np.array_equal(model.embed(), before)
    if len(make(table())) == 1:
        with pytest.raises(error, match=match):
            model.infer(*make(table()), steps=2)


@pytest.mark.parametrize(
    "kw, error, match",
    [
        ({"groups": ()}, ValueError, "groups must be one or more positive ints"),
        ({"groups": (5, 0)}, ValueError, "groups must be a sequence of positive ints"),
        ({"groups": 5}, ValueError, "groups must be a sequence of positive ints"),
        ({"groups": (5,), "active": 6}, ValueError, "active=6 is out of range for a group of 5 relays"),
        ({"active": 0.0}, ValueError, r"share in \(0, 1\]"),
        ({"active": 1.5}, ValueError, r"share in \(0, 1\]"),
        ({"active": (0.5,)}, ValueError, "active has 1 entries for 3 groups"),
        ({"latents": 3}, TypeError, "RVI has no argument 'latents'; did you mean 'latent_dim'"),
        ({"latent_dim": 0}, ValueError, "latent_dim must be a positive int"),
        ({"hidden": "big"}, ValueError, "hidden must be a sequence of positive ints"),
        ({"lr": -1.0}, ValueError, "lr must be a number of at least 0"),
        ({"row_lr": float("nan")}, ValueError, "row_lr must be a number of at least 0"),
        ({"kl_weight": -1}, ValueError, "kl_weight must be"),
        ({"schedule": "step"}, ValueError, "schedule must be"),
        ({"likelihood": "poisson"}, TypeError, "likelihood must be 'auto' or one of"),
        ({"optimizer_mode": "sparse"}, ValueError, "optimizer_mode must be one of 'dense', 'lazy'"),
        ({"coefficients": "sigmoid"}, ValueError, "coefficients must be"),
        ({"batch_size": 2.5}, ValueError, "batch_size must be"),
        ({"epochs": True}, ValueError, "epochs must be"),
        ({"seed": "a"}, ValueError, "seed must be an int"),
        ({"activation": "swoosh"}, ValueError, "activation must be one of"),
        ({"standardize": "yes"}, ValueError, "standardize must be one of True, False, 'auto'"),
        ({"device": "abacus"}, ValueError, "device must be 'auto' or a torch device"),
        ({"hidden": 64}, ValueError, "hidden must be a sequence of positive ints"),
        ({"hidden": None}, ValueError, "hidden must be a sequence of positive ints"),
        ({"log_std": float("nan")}, ValueError, "log_std must be a number between"),
        ({"log_std": 200}, ValueError, "log_std must be a number between"),
        ({"lr": np.array([1.0])}, ValueError, "lr must be a number of at least 0"),
        ({"latent_dim": np.array([1])}, ValueError, "latent_dim must be a positive int"),
        ({"seed": 2**70}, ValueError, "seed must be an int in 0"),
        ({"seed": -1}, ValueError, "seed must be an int in 0"),
        ({"schedule": ["x"]}, ValueError, "schedule must be one of"),
        ({"keep_empty_columns": "no"}, ValueError, "keep_empty_columns must be one of True, False"),
        ({"progress": "x"}, ValueError, "progress must be one of True, False"),
    ],
)
def test_bad_arguments(kw, error, match):
    with pytest.raises(error, match=match):
        RVI(**kw)


@pytest.mark.parametrize(
    "kw, fit, error, match",
    [
        ({"weight_decay": 200.0}, {}, ValueError, r"lr \* weight_decay must be below 1"),
        ({"row_lr": 1e30}, {}, FloatingPointError, r"training diverged at step \d+; lower lr or row_lr"),
        ({}, {"callbacks": [3]}, TypeError, "callbacks must be a sequence of functions"),
        ({}, {"callbacks": print}, TypeError, "callbacks must be a sequence of functions"),
        ({}, {"max_steps": 2.5}, ValueError, "max_steps must be a positive int or None"),
        ({}, {"checkpoint_every": 0, "checkpoint_dir": "x"}, ValueError, "checkpoint_every must be a positive int"),
        ({}, {"checkpoint_dir": __file__}, NotADirectoryError, "is a file, or lies under one; give a folder"),
        ({}, {"val_cells": "a"}, ValueError, "val_cells must be a share"),
        ({"device": "cuda:99"}, {}, ValueError, "device 'cuda:99' cannot be used here"),
        ({"epochs": 0}, {}, ValueError, "epochs must be a positive int"),
    ],
)
def test_a_refused_fit_leaves_the_model_as_it_was(kw, fit, error, match):
    model = fitted(RVI, SMALL | RELAYS)
    embedding, steps = model.embed().copy(), model.n_steps_
    for name, value in kw.items():
        setattr(model, name, value)
    with pytest.raises(error, match=match):
        model.fit(table(n=33), **fit)
    assert model.n_rows_ == 50 and model.n_steps_ == steps
    assert np.array_equal(model.embed(), embedding) and np.isfinite(model.impute()).all()


def test_an_exception_in_a_callback_leaves_a_usable_model():
    def fail(model, logs):
        if logs["step"] == 8:
            raise KeyError("mine")

    X = table()
    X[7] = np.nan
    model = RVI(**SMALL, **RELAYS)
    with pytest.raises(KeyError, match="mine"):
        model.fit(X, callbacks=[fail])
    assert model.n_steps_ == 8 and model.stopped_ == "failed" and not model.model_.training
    assert np.isfinite(model.impute()).all()


def test_numpy_numbers_are_numbers(tmp_path):
    kw = dict(
        latent_dim=np.int64(4), hidden=np.array([8]), groups=range(5, 7), active=np.float32(0.5), seed=np.int64(3)
    )
    model = RVI(**{**SMALL, **kw, "lr": np.float32(1e-3), "epochs": np.int32(2)}).fit(table())
    model.save(tmp_path)
    assert np.array_equal(RVI.load(tmp_path).embed(), model.embed())


def test_large_integers_keep_their_digits():
    """int32 seconds since 1970 that differ by less than float32 can tell apart."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 200, (60, 1))
    X = np.hstack([x, 2 * x, 3 * x, x + 7]) + 1_600_000_000
    mask = rng.random(X.shape) > 0.2
    kw = {**SMALL, **RELAYS, "epochs": 20, "lr": 1e-2}
    of_int32 = RVI(**kw).fit(X.astype(np.int32), mask).impute()
    assert np.array_equal(of_int32, RVI(**kw).fit(X.astype(np.int64), mask).impute())


def test_statistics_do_not_see_hidden_cells():
    X = np.random.default_rng(0).normal(size=(40, 3))
    model = RVI(**SMALL, **RELAYS).fit(X, val_cells=0.5)
    from rvi_fast.observations import HiddenCells, Observations

    seen = ~HiddenCells(Observations(X), 0.5, seed=0).read(slice(None))
    assert np.allclose(model.units_.shift, np.where(seen, X, np.nan).mean(0, where=seen))


@pytest.mark.parametrize("seed", range(4))
def test_hidden_cells_do_not_make_a_column_empty_or_constant(seed):
    X = np.random.default_rng(0).normal(size=(30, 4))
    X[2:, 1] = np.nan  # two observed cells
    X[:, 2] = 0
    X[4, 2] = 1  # one that differs
    model = RVI(**{**SMALL, **RELAYS, "seed": seed}).fit(X, val_cells=0.5)
    assert not model.units_.constant.any() and np.isfinite(model.impute()).all()


def test_score_looks_at_the_data_it_is_given():
    X = table()
    model = fitted(RVI, SMALL | RELAYS, X)
    posterior = model.infer(X, steps=5)
    same, other = model.score(X, posterior=posterior), model.score(X + 5 * np.nanstd(X, 0), posterior=posterior)
    assert (other < same).all() and np.abs(same - posterior.elbo.numpy()).mean() < 2
    with pytest.raises(ValueError, match="X has 2 columns"):
        model.score(X[:, :2], posterior=posterior)


def test_a_fit_that_fails_midway_keeps_the_old_model(monkeypatch):
    model = fitted(RVI, SMALL | RELAYS)
    embedding = model.embed().copy()
    monkeypatch.setattr("rvi_fast.train.Trainer.close_epoch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.fit(table(n=33))
    assert model.n_rows_ == 50 and model.stopped_ == "completed" and np.array_equal(model.embed(), embedding)


def test_training_does_not_see_hidden_cells():
    """Whatever stands in a hidden cell, the model comes out the same."""
    from rvi_fast.observations import HiddenCells, Observations

    X = np.random.default_rng(0).normal(size=(40, 3))
    other = np.where(HiddenCells(Observations(X), 0.3, seed=0).read(slice(None)), X + 5, X)
    kw = {**SMALL, **RELAYS, "epochs": 2}
    assert np.array_equal(RVI(**kw).fit(X, val_cells=0.3).embed(), RVI(**kw).fit(other, val_cells=0.3).embed())


def test_sklearn_clones_the_estimators():
    clone = pytest.importorskip("sklearn.base").clone
    assert clone(RVI(latent_dim=3, groups=[4, 5])).get_params() == RVI(latent_dim=3, groups=[4, 5]).get_params()


def test_bad_calls():
    model = RVI(**SMALL, **RELAYS)
    with pytest.raises(RuntimeError, match="this RVI is not fitted"):
        model.embed(table())
    model.fit(table())
    with pytest.raises(ValueError, match="X has 5 columns, but the model was fitted on 6"):
        model.impute(table(d=5))
    for kw, match in (
        ({"steps": 0}, "steps must be a positive int"),
        ({"lr": 0}, "lr must be a number above 0"),
        ({"protocol": "rows"}, "protocol must be"),
        ({"row_ids": [1, 2]}, r"row_ids must be int64 \[50\]"),
    ):
        with pytest.raises(ValueError, match=match):
            model.infer(table(), **kw)
    with pytest.raises(ValueError, match="val_cells must be a share"):
        model.fit(table(), val_cells=1.0)
    with pytest.raises(ValueError, match=r"up_to_group must lie in 0 \.\. 2"):
        model.reconstruct(up_to_group=3)
    with pytest.raises(ValueError, match="posterior has 50 rows, but X has 3"):
        model.impute(table()[:3], posterior=model.posterior_)
    with pytest.raises(TypeError, match="steps has no effect beside posterior"):
        model.impute(table(), posterior=model.posterior_, steps=3)
    with pytest.raises(TypeError, match="mask needs X beside it"):
        model.embed(mask=~np.isnan(table()))
    for result in (model.embed, model.reconstruct, model.score):
        with pytest.raises(ValueError, match="posterior has 50 rows, but X has 3"):
            result(table()[:3], posterior=model.posterior_)
    with pytest.raises(TypeError, match="posterior must be what infer or posterior_ gave; got int"):
        model.impute(table(), posterior=5)
    other = RVI(**{**SMALL, **RELAYS, "latent_dim": 7}).fit(table())
    with pytest.raises(ValueError, match="posterior has 7 latents, but the model has 4"):
        model.impute(table(), posterior=other.posterior_)
    for kw, match in (
        ({"stepz": 3}, "infer has no argument 'stepz'; did you mean 'steps'"),
        ({"nsamples": 3}, "infer has no argument 'nsamples'; did you mean 'n_samples'"),
        ({"whatever": 3}, "infer has no argument 'whatever'; it takes steps, lr, "),
    ):
        for X in (table(), None):
            with pytest.raises(TypeError, match=match):
                model.impute(X, **kw)
    with pytest.raises(TypeError, match="infer has no argument 'n_samples'; it takes steps"):
        model.embed(table(), n_samples=3)
    with pytest.raises(ValueError, match="seed must be an int"):
        model.sample(3, seed="a")
    with pytest.raises(ValueError, match="has a value too far from the training data"):
        model.infer(table() * 1e300, steps=2)
    with pytest.raises(ValueError, match="n must be a positive int"):
        model.sample(0)
    with pytest.raises(TypeError, match="relays; VAD has none"):
        fitted(VAD, SMALL).reconstruct(residual=False)
    frame = pd.DataFrame(table(), columns=list("abcdef"))
    with pytest.raises(ValueError, match="column 0 is 'f', but the model was fitted with 'a' there"):
        fitted(RVI, SMALL | RELAYS, frame).impute(frame[list("fedcba")])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda X: X.drop(columns="a"),
            "X has 5 columns, but the model was fitted on 6: it lacks 'a'; give the columns of",
        ),
        (lambda X: X.assign(h=1.0, g=1.0), "X has 8 columns, .* on 6: it also has 'g', 'h'; give"),
        (
            lambda X: X.rename(columns=str.upper).assign(a=1.0),
            "it lacks 'b', 'c', 'd', 'e', 'f' and also has .* 1 more; ",
        ),
        (lambda X: X[list("abcdeff")], "X has 7 columns, .* on 6: it has names twice; give"),
        (lambda X: X.to_numpy()[:, 1:], "X has 5 columns, .* on 6; give the columns of the fit, in their order"),
    ],
)
def test_columns_that_are_lacking_or_too_many_are_named(change, match):
    frame = pd.DataFrame(table(), columns=list("abcdef"))
    with pytest.raises(ValueError, match=match):
        fitted(RVI, SMALL | RELAYS, frame).impute(change(frame))


def test_bernoulli_needs_the_unit_interval():
    rng = np.random.default_rng(0)
    X = (rng.random((30, 8)) < 0.3).astype(np.float32)
    model = RVI(likelihood=Bernoulli(), **SMALL, **RELAYS).fit(X)
    assert not model.standardize_ and (model.reconstruct() >= 0).all() and (model.reconstruct() <= 1).all()
    assert set(np.unique(model.sample(5, noise=True))) <= {0.0, 1.0}
    with pytest.raises(ValueError, match=r"Bernoulli needs X in \[0, 1\], but column 0 spans"):
        RVI(likelihood=Bernoulli(), **SMALL, **RELAYS).fit(3 * X + 1 + rng.random((30, 8)))
    for new in (255 * X, X - 3):
        with pytest.raises(ValueError, match=r"Bernoulli needs X in \[0, 1\], but column 0 spans"):
            model.infer(new)
    with pytest.raises(ValueError, match="standardize=True does not go with Bernoulli"):
        RVI(likelihood=Bernoulli(), standardize=True, **SMALL, **RELAYS).fit(X)


# fitting


def test_auto_is_resolved_and_the_arguments_stay():
    model = RVI(epochs=1, progress=False).fit(table())
    assert model.hidden == "auto" and model.hidden_ and model.linear_path_ is True and model.standardize_ is True
    assert model.likelihood_.learned and model.likelihood_.scale().shape == (6,)
    assert RVI(epochs=1, hidden=(), lr=0.5, progress=False).fit(table()).lr_ == 0.5


def test_a_narrow_table_has_no_more_latents_than_columns_and_few_columns_take_more_passes():
    fits = {d: RVI(progress=False).fit(table(d=d), max_steps=1) for d in (4, 10, 20)}
    assert [fits[d].latent_dim_ for d in (4, 10, 20)] == [4, 10, 16]
    assert fits[4].epochs_ > fits[10].epochs_ == fits[20].epochs_


def test_paper_settings_and_overrides():
    model = RVI.paper(epochs=2, groups=(4, 6), progress=False)
    assert model.hidden == (64, 64) and model.lr == 1e-3 and model.epochs == 2 and model.schedule == "constant"
    model.fit(table())
    assert (
        model.likelihood_.scale().item() == pytest.approx(0.02**0.5)
        and not model.linear_path_
        and not model.standardize_
    )


def test_callbacks_see_every_epoch_and_can_stop():
    seen = []

    def callback(model, logs):
        seen.append((logs["step"], len(model.history_["loss"]), np.isfinite(model.embed()).all()))
        return len(seen) == 2

    model = fitted(RVI, SMALL | RELAYS, callbacks=[callback])
    assert seen == [(4, 1, True), (8, 2, True)] and model.stopped_ == "callback" and model.n_steps_ == 8


def test_max_steps_bounds_the_work():
    assert fitted(RVI, SMALL | RELAYS, max_steps=5).n_steps_ == 5


def test_early_stopping_hides_cells_and_keeps_the_best():
    X = np.random.default_rng(0).normal(size=(60, 8))  # nothing to learn: the error on hidden cells rises soon
    model = RVI(**{**SMALL, **RELAYS, "epochs": 200, "lr": 0.03, "schedule": "constant"}).fit(X, val_cells=0.2)
    errors = model.history_["val_mse"]
    assert model.stopped_ == "early" and len(errors) < 200 and min(errors) < errors[-1]


def test_hidden_cells_do_not_reach_training():
    from rvi_fast.observations import HiddenCells, Observations

    data = Observations(table(n=400, d=9))
    hidden = HiddenCells(data, 0.25, seed=0).read(slice(None))
    observed = data.read(slice(None))[1]
    assert not (hidden & ~observed).any() and 0.2 < hidden[observed].mean() < 0.3
    assert np.array_equal(HiddenCells(data, 0.25, seed=0).read(np.array([5, 2])), hidden[[5, 2]])


def test_ctrl_c_that_is_ignored_stays_so(set_ctrl_c):
    set_ctrl_c(signal.SIG_IGN)
    model = fitted(RVI, SMALL | RELAYS, callbacks=[lambda *_: signal.raise_signal(signal.SIGINT)])
    assert model.stopped_ == "completed" and signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_ctrl_c_leaves_a_usable_model(set_ctrl_c):
    set_ctrl_c(signal.default_int_handler)
    model = RVI(**{**SMALL, **RELAYS, "epochs": 100_000})
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.warns(UserWarning, match=r"fit was interrupted after step \d+ of 400000; the model is usable"):
        assert model.fit(table()) is model
    assert model.stopped_ == "interrupted" and 0 < model.n_steps_ < 400_000
    assert np.isfinite(model.impute()).all()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    "kw", [{"optimizer_mode": "lazy"}, {"coefficients": "softmax"}, {"active": 1}, {"row_lr": 0.1}]
)
def test_variants_train(kw):
    model = fitted(RVI, SMALL | RELAYS | kw)
    assert np.isfinite(model.impute()).all()


def test_partial_reconstruction_adds_up():
    model = fitted(RVI, SMALL | RELAYS)
    whole = model.reconstruct()
    assert np.array_equal(model.reconstruct(up_to_group=2), whole)
    parts = [model.reconstruct(up_to_group=g, residual=False) for g in (0, 1, 2)]
    assert not np.allclose(parts[0], parts[1]) and not np.allclose(parts[1], parts[2])
    assert np.allclose(parts[0], parts[0][0]), "no relays and no residual: every row decodes the origin"


@pytest.mark.parametrize("cls, kw", KINDS)
def test_draws_spread_around_the_mean(cls, kw):
    X = table(n=20)
    draws = fitted(cls, kw, X).impute(n_samples=5)
    holes = np.isnan(X)
    assert (draws[:, ~holes] == X[~holes]).all() and (draws.std(0)[holes] > 0).all()


def test_scale_is_in_the_users_units():
    X = table(rate=0)
    small, large = fitted(RVI, SMALL | RELAYS, X), fitted(RVI, SMALL | RELAYS, X * 1000)
    assert small.scale_.shape == (6,) and np.allclose(large.scale_, 1000 * small.scale_, rtol=1e-3)
    fixed = RVI(**SMALL, **RELAYS, likelihood=Gaussian(0.5)).fit(X)
    assert np.allclose(fixed.scale_, 0.5 * X.std(0))


def test_weight_decay_leaves_the_learned_scale_alone():
    model = RVI(**SMALL, **RELAYS)
    model.fit(table())
    for group in model._parameter_groups():
        decays = group.get("weight_decay", 0) > 0
        names = {n for n, p in model.model_.named_parameters() if any(p is q for q in group["params"])}
        assert decays == any(n.startswith("decoder") or n.endswith("relays") for n in names)
        assert not decays or not any("table" in n or "scale" in n for n in names)


def test_deepcopy_and_get_params():
    model = fitted(RVI, SMALL | RELAYS)
    twin = copy.deepcopy(model)
    assert np.array_equal(twin.embed(), model.embed())
    assert RVI(**model.get_params()).get_params() == model.get_params()
    assert repr(RVI(latent_dim=3)) == "RVI(latent_dim=3)"


def test_posterior_is_a_plain_record():
    posterior = fitted(RVI, SMALL | RELAYS).posterior_
    assert [f.name for f in dataclasses.fields(posterior)] == [
        "mean",
        "std",
        "elbo",
        "converged",
        "row_ids",
        "parameters",
    ]


def test_no_warning_in_an_ordinary_fit():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(RVI, SMALL | RELAYS).impute()
    assert isinstance(RVI(likelihood=Gaussian(0.5)).likelihood, Gaussian)


def test_what_a_callback_does_to_the_model_is_heeded():
    X = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    frozen = {}

    def freeze(model, logs):
        if not frozen:
            model.model_.decoder.requires_grad_(False)
            frozen.update({name: value.clone() for name, value in model.model_.decoder.state_dict().items()})

    model = RVI(epochs=4, latent_dim=3, progress=False).fit(X, callbacks=[freeze])
    assert all(torch.equal(value, frozen[name]) for name, value in model.model_.decoder.state_dict().items())
    model = RVI(epochs=2, latent_dim=3, progress=False).fit(X, callbacks=[lambda m, _: not m.model_.double().float()])
    assert len(model.history_["loss"]) == 2 and np.isfinite(model.history_["loss"]).all()


def test_a_fitted_models_weights_have_memory_of_their_own():
    model = RVI(epochs=1, latent_dim=3, progress=False).fit(np.random.default_rng(0).normal(size=(60, 5)))
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.model_.decoder.parameters())


def test_fits_in_threads_start_as_alone_and_leave_the_default_generator():
    X = np.random.default_rng(0).normal(size=(40, 6))

    def embedding(_):
        return RVI(**SMALL, **RELAYS, seed=3).fit(X).embed()

    alone, before, interval = embedding(0), torch.get_rng_state(), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            together = list(pool.map(embedding, range(12)))
    finally:
        sys.setswitchinterval(interval)
    for found in together:
        np.testing.assert_allclose(found, alone, atol=1e-3)
    assert torch.equal(torch.get_rng_state(), before)
