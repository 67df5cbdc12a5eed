"""RVIImputer and RVIEmbedding: RVI as scikit-learn's transformers (extra [sklearn])."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from numbers import Real
from typing import Any, Self

import numpy as np
import torch

from . import arguments
from .defaults import FILLING_KL_WEIGHT, FILLING_WEIGHT_DECAY
from .estimators import RVI

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, OneToOneFeatureMixin, TransformerMixin
    from sklearn.impute import MissingIndicator
    from sklearn.utils import check_random_state
    from sklearn.utils._set_output import _get_output_config  # the only way to learn what set_output asks for
    from sklearn.utils.validation import FLOAT_DTYPES, check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "rvi_fast.sklearn needs scikit-learn 1.6 or newer; run pip install 'rvi_fast[sklearn]'"
    ) from error

__all__ = ["RVIEmbedding", "RVIImputer"]

MEMBERS, SMALL_TABLE = 3, 1 << 17  # as many RVIs fill a table of up to so many cells


class _RVITransformer(TransformerMixin, BaseEstimator):
    """What both share: columns with nothing observed are left out, all others are an RVI's."""

    n_components: int | str
    hidden: Sequence[int] | str
    groups: Sequence[int]
    active: int | float | Sequence[int | float]
    kl_weight: float
    lr: float | str
    row_lr: float | None
    weight_decay: float | str
    batch_size: int | str
    epochs: int | str
    max_steps: int | None
    infer_steps: int
    transductive: bool
    random_state: Any
    device: str | torch.device
    verbose: int

    rvi_: RVI
    n_iter_: int

    def _fit_rvi(self, X: np.ndarray) -> None:
        """Train on X, float [N, D] with NaN in its holes."""
        arguments.positive_int("n_components", self.n_components, "auto")
        arguments.positive_int("infer_steps", self.infer_steps)
        arguments.one_of("transductive", self.transductive, (True, False))
        self._kept = ~np.isnan(X).all(axis=0)
        if not self._kept.any():
            raise ValueError("X has no observed cell: every cell is missing")
        self.rvi_ = self._fitted(X[:, self._kept], self._seed())
        self.n_iter_ = len(self.rvi_.history_["loss"])

    def _fitted(self, table: np.ndarray, seed: int) -> RVI:
        """The RVI of the arguments, trained on the kept columns."""
        return RVI(
            latent_dim=self.n_components,
            hidden=self.hidden,
            groups=self.groups,
            active=self.active,
            kl_weight=self.kl_weight,
            lr=self.lr,
            row_lr=self.row_lr,
            weight_decay=self.weight_decay,
            batch_size=self.batch_size,
            epochs=self.epochs,
            seed=seed,
            device=self.device,
            progress=bool(self.verbose),
        ).fit(table, max_steps=self.max_steps)

    def _seed(self) -> int:
        if arguments.is_int(self.random_state):
            arguments.seed("random_state", self.random_state)
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))

    def _values(self, X: Any, reset: bool) -> np.ndarray:
        """X as floats [N, D] with NaN in its holes."""
        return self._validated(X, reset, ensure_all_finite="allow-nan")

    def _validated(self, X: Any, reset: bool, **checks: Any) -> np.ndarray:
        try:
            return validate_data(self, X, reset=reset, dtype=FLOAT_DTYPES, **checks)
        except ValueError as error:
            if "could not convert" not in str(error) or (column := _column_of_text(X)) is None:
                raise
            raise ValueError(
                f"{error} in X's column {column!r}; encode it as numbers first (OrdinalEncoder, OneHotEncoder), or "
                "drop it"
            ) from None

    def score(self, X: Any, y: Any = None) -> float:
        """Mean over rows of the ELBO of their observed cells, in nats, columns standardised as in fit; y is ignored."""
        check_is_fitted(self)
        values = self._values(X, reset=False)
        return float(self.rvi_.score(values[:, self._kept], steps=self.infer_steps).mean(dtype=np.float64))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _column_of_text(X: Any) -> Any:
    """The first column of a DataFrame that is no numbers; None if there is none, or X has no columns."""
    for name in getattr(X, "columns", ()):
        try:
            np.asarray(X[name], dtype=float)
        except (TypeError, ValueError):
            return name
    return None


class RVIImputer(OneToOneFeatureMixin, _RVITransformer):
    """Fills the holes of a table by Relay Variational Inference. Observed cells come back bit for bit.

    transform fits each row that has holes to decoder and relays, which stay as trained: a row's result depends neither
    on the other rows of the call nor on their order.

    missing_values: what marks a hole: NaN, or a number (then NaN is an error). members: how many RVIs, alike but for
    their seed, are fitted; holes get the mean of their fillings. "auto": 3 for tables of up to 131,072 cells, where
    what one decoder learns is much chance, else 1; the time is as many times one RVI's. n_components: latent dimension.
    kl_weight, weight_decay: 0.7 and 0.2, by which hidden training cells of most tables were filled better than by RVI's
    own (docs/tables.md); below a kl_weight of 1 draws vary less, and what is maximised is not score, the ELBO. hidden,
    groups, active, lr, row_lr, batch_size, epochs, device: as in rvi_fast.RVI.
    max_steps: an upper bound of the training steps. infer_steps: Adam steps a row in transform. transductive:
    fit_transform takes the rows' own posteriors from training (faster) instead of fitting them anew as
    fit(X).transform(X) does. sample_posterior: fill with one draw of p(missing | observed) under rvi_ instead of the
    mean; impute_samples gives several, from all members. clip: hold filled cells between the least and the largest
    observed cell of the column in fit. round_integers: round filled cells of columns whose observed cells in fit are
    all integers. add_indicator: append a MissingIndicator's columns. keep_empty_features: columns with nothing observed
    in fit are filled with 0 instead of dropped. random_state: int, RandomState or None; an int is the seed of the RVI.
    verbose: 1 shows a progress bar.

    After fit: rvi_ (the RVI of random_state, the first of members_; rvi_.impute() fills the fitted rows by their own
    posteriors; it holds X), members_ (all RVIs), n_iter_ (passes over the rows), n_features_in_, feature_names_in_
    (where X has names), indicator_ (None without add_indicator).
    """

    missing_values: float
    members: int | str
    sample_posterior: bool
    clip: bool
    round_integers: bool
    add_indicator: bool
    keep_empty_features: bool

    members_: list[RVI]
    indicator_: MissingIndicator | None

    def __init__(
        self,
        n_components: int | str = "auto",
        *,
        missing_values: float = np.nan,
        members: int | str = "auto",
        hidden: Sequence[int] | str = "auto",
        groups: Sequence[int] = (25, 50, 100),
        active: int | float | Sequence[int | float] = 0.5,
        kl_weight: float = FILLING_KL_WEIGHT,
        lr: float | str = "auto",
        row_lr: float | None = None,
        weight_decay: float | str = FILLING_WEIGHT_DECAY,
        batch_size: int | str = "auto",
        epochs: int | str = "auto",
        max_steps: int | None = None,
        infer_steps: int = 250,
        transductive: bool = False,
        sample_posterior: bool = False,
        clip: bool = False,
        round_integers: bool = False,
        add_indicator: bool = False,
        keep_empty_features: bool = False,
        random_state: Any = None,
        device: str | torch.device = "auto",
        verbose: int = 0,
    ):
        self.n_components = n_components
        self.missing_values = missing_values
        self.members = members
        self.hidden = hidden
        self.groups = groups
        self.active = active
        self.kl_weight = kl_weight
        self.lr = lr
        self.row_lr = row_lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.epochs = epochs
        self.max_steps = max_steps
        self.infer_steps = infer_steps
        self.transductive = transductive
        self.sample_posterior = sample_posterior
        self.clip = clip
        self.round_integers = round_integers
        self.add_indicator = add_indicator
        self.keep_empty_features = keep_empty_features
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train on the observed cells of X, [N, D] array or DataFrame of numbers; y is ignored.

        Raises ValueError on infinity, on NaN where missing_values is a number, and if nothing at all is observed.
        """
        self._fit(X)
        return self

    def fit_transform(self, X: Any, y: Any = None) -> Any:
        """fit(X).transform(X); with transductive=True by the rows' own posteriors from training."""
        values = self._fit(X)
        return self._transform(X, values, self.transductive)

    def transform(self, X: Any) -> Any:
        """Fill the holes of X, [M, D] with the columns of fit.

        Returns the filled columns in X's float type (float64 for integers), then the indicator's. With
        set_output(transform="pandas") a DataFrame keeps its index and the dtypes that can hold the result: whole
        numbers for integer columns without holes, and for those with holes under round_integers.
        """
        check_is_fitted(self)
        return self._transform(X, self._values(X, reset=False), trained=False)

    def impute_samples(self, X: Any, n_samples: int = 20) -> np.ndarray:
        """Several fillings [n_samples, M, columns] of X: draws of p(missing | observed), in turn under each member.

        Their spread is the uncertainty of z given the row's observed cells, the likelihood's noise and the difference
        between members; observed cells do not vary. Draws are keyed by random_state and the row's content: equal rows
        get equal draws. Without the indicator's columns. Raises ValueError if n_samples is not a positive int.
        """
        check_is_fitted(self)
        arguments.positive_int("n_samples", n_samples)
        values = self._values(X, reset=False)
        return np.stack([self._finish(values, draw) for draw in self._fillings(values, n_samples)])

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Names of the columns that transform returns, object array: X's without dropped ones, then the indicator's."""
        check_is_fitted(self)
        names = super().get_feature_names_out(input_features)
        filled = names[self._returned]
        if self.indicator_ is None:
            return filled
        return np.concatenate([filled, self.indicator_.get_feature_names_out(names)])

    def _fit(self, X: Any) -> np.ndarray:
        for name in ("sample_posterior", "clip", "round_integers", "add_indicator", "keep_empty_features"):
            arguments.one_of(name, getattr(self, name), (True, False))
        arguments.positive_int("members", self.members, "auto")
        if not arguments.is_number(self.missing_values) and not self._missing_is_nan():
            raise ValueError(f"missing_values must be NaN or a finite number; got {self.missing_values!r}")
        values = self._values(X, reset=True)
        self._fit_rvi(values)
        self.members_ = [self.rvi_, *self._other_members(values[:, self._kept])]
        empty = np.flatnonzero(~self._kept)
        if len(empty) and not self.keep_empty_features:
            warnings.warn(
                f"columns {empty.tolist()} of X have nothing observed and are dropped; keep_empty_features=True fills "
                "them with 0",
                stacklevel=3,
            )
        self._returned = self._kept | self.keep_empty_features
        observed = values[:, self._kept].astype(np.float64)
        self._low, self._high = np.nanmin(observed, axis=0), np.nanmax(observed, axis=0)
        self._integral = ((observed == np.rint(observed)) | np.isnan(observed)).all(axis=0)
        self.indicator_ = None
        if self.add_indicator:
            self.indicator_ = MissingIndicator(error_on_new=False).set_output(transform="default").fit(values)
        return values

    def _other_members(self, table: np.ndarray) -> list[RVI]:
        members = self.members
        if isinstance(members, str):
            members = MEMBERS if table.size <= SMALL_TABLE else 1
        seeds = np.random.SeedSequence(self.rvi_.seed).generate_state(members - 1, np.uint32)
        return [self._fitted(table, int(seed)) for seed in seeds]

    def _values(self, X: Any, reset: bool) -> np.ndarray:
        if self._missing_is_nan():
            return super()._values(X, reset)
        values = self._validated(X, reset)
        return np.where(values == values.dtype.type(self.missing_values), values.dtype.type(np.nan), values)

    def _missing_is_nan(self) -> bool:
        return isinstance(self.missing_values, Real) and math.isnan(self.missing_values)

    def _transform(self, X: Any, values: np.ndarray, trained: bool) -> Any:
        (filling,) = self._fillings(values, 1 if self.sample_posterior else None, trained)
        filled = self._finish(values, filling)
        indicated = np.empty((len(filled), 0)) if self.indicator_ is None else self.indicator_.transform(values)
        if hasattr(X, "iloc") and _get_output_config("transform", self)["dense"] == "pandas":
            return self._frame(X, values, filled, indicated)
        return np.hstack((filled, indicated.astype(filled.dtype)))

    def _fillings(self, values: np.ndarray, n_samples: int | None, trained: bool = False) -> list[np.ndarray]:
        """Tables [M, kept columns] whose cells in the holes of values are filled; n_samples=None: one, of means."""
        table = values[:, self._kept]
        rows = slice(None) if trained else np.flatnonzero(np.isnan(table).any(axis=1))
        fillings = [table.copy() for _ in range(n_samples or 1)]
        if len(table[rows]) == 0:
            return fillings
        holed = table[rows]
        mean = 0.0
        for first, rvi in enumerate(self.members_[:n_samples]):
            posterior = rvi.posterior_ if trained else rvi.infer(holed, steps=self.infer_steps)
            if n_samples is None:
                mean = mean + rvi.impute(holed, posterior=posterior) / len(self.members_)
                continue
            own = fillings[first :: len(self.members_)]
            draws = rvi.impute(holed, posterior=posterior, n_samples=len(own), noise=True)
            for filling, draw in zip(own, draws, strict=True):
                filling[rows] = draw
        if n_samples is None:
            fillings[0][rows] = mean
        return fillings

    def _finish(self, values: np.ndarray, filling: np.ndarray) -> np.ndarray:
        """The returned columns: observed cells as in values, filled ones clipped and rounded on request."""
        if self.clip:
            filling = filling.clip(self._low, self._high)
        if self.round_integers:
            filling = np.where(self._integral, np.rint(filling), filling)
        filled = np.zeros_like(values)
        filled[:, self._kept] = filling
        return np.where(np.isnan(values), filled, values)[:, self._returned]

    def _frame(self, X: Any, values: np.ndarray, filled: np.ndarray, indicated: np.ndarray) -> Any:
        """A DataFrame with X's index, and with its dtypes where they can hold what was filled."""
        import pandas as pd

        is_whole = np.ones(values.shape[1], dtype=bool)  # columns left empty are filled with 0
        is_whole[self._kept] = self._integral & self.round_integers
        columns = []
        for number, cells in zip(np.flatnonzero(self._returned), filled.T, strict=True):
            given, column = X.iloc[:, number], pd.Series(cells, index=X.index)
            is_integer = pd.api.types.is_integer_dtype(given.dtype)
            if pd.api.types.is_numeric_dtype(given.dtype) and not np.isnan(values[:, number]).any():
                column = given
            elif is_integer and is_whole[number]:
                limits = np.iinfo(getattr(given.dtype, "numpy_dtype", given.dtype))
                column = column.clip(limits.min, limits.max).astype(given.dtype)
            elif pd.api.types.is_float_dtype(given.dtype):
                column = column.astype(given.dtype)
            columns.append(column)
        columns += [pd.Series(cells.astype(filled.dtype), index=X.index) for cells in indicated.T]
        return pd.concat(columns, axis=1).set_axis(self.get_feature_names_out(), axis=1)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = self._missing_is_nan()
        return tags


class RVIEmbedding(ClassNamePrefixFeaturesOutMixin, _RVITransformer):
    """Latent vectors of rows with any holes, by Relay Variational Inference: the means of their posteriors.

    transform fits each row to decoder and relays, which stay as trained: a row's result depends neither on the other
    rows of the call nor on their order. NaN means missing; columns with nothing observed in fit have no influence.

    n_components: latent dimension. transductive: fit_transform returns the rows' own posterior means from training
    (faster) instead of fitting them anew as fit(X).transform(X) does. Other arguments as in RVIImputer.

    After fit: rvi_ (the RVI; rvi_.embed() gives the fitted rows' own means; it holds X), n_iter_ (passes over the
    rows), n_features_in_, feature_names_in_ (where X has names).
    """

    def __init__(
        self,
        n_components: int | str = "auto",
        *,
        hidden: Sequence[int] | str = "auto",
        groups: Sequence[int] = (25, 50, 100),
        active: int | float | Sequence[int | float] = 0.5,
        kl_weight: float = 1.0,
        lr: float | str = "auto",
        row_lr: float | None = None,
        weight_decay: float | str = "auto",
        batch_size: int | str = "auto",
        epochs: int | str = "auto",
        max_steps: int | None = None,
        infer_steps: int = 250,
        transductive: bool = False,
        random_state: Any = None,
        device: str | torch.device = "auto",
        verbose: int = 0,
    ):
        self.n_components = n_components
        self.hidden = hidden
        self.groups = groups
        self.active = active
        self.kl_weight = kl_weight
        self.lr = lr
        self.row_lr = row_lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.epochs = epochs
        self.max_steps = max_steps
        self.infer_steps = infer_steps
        self.transductive = transductive
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train on the observed cells of X, [N, D] array or DataFrame of numbers; NaN = missing; y is ignored.

        Raises ValueError on infinity and if nothing at all is observed.
        """
        self._fit_rvi(self._values(X, reset=True))
        return self

    def fit_transform(self, X: Any, y: Any = None) -> np.ndarray:
        """fit(X).transform(X); with transductive=True the rows' own posterior means from training."""
        values = self._values(X, reset=True)
        self._fit_rvi(values)
        if self.transductive:
            return self.rvi_.embed().astype(values.dtype, copy=False)
        return self._embed(values)

    def transform(self, X: Any) -> np.ndarray:
        """Posterior means [M, n_components] of rows [M, D] with the columns of fit, in X's float type."""
        check_is_fitted(self)
        return self._embed(self._values(X, reset=False))

    def _embed(self, values: np.ndarray) -> np.ndarray:
        embedding = self.rvi_.embed(values[:, self._kept], steps=self.infer_steps)
        return embedding.astype(values.dtype, copy=False)

    @property
    def _n_features_out(self) -> int:
        return self.rvi_.latent_dim_
