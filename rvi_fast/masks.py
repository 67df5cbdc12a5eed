"""Patterns of missing entries. Every mask is a bool array [N, D]: True = observed, False = missing.

Each kind of mask has its own stream of random numbers, so equal seeds never tie two kinds together. With all else
equal, the entries hidden at a lower rate are also hidden at a higher one (boxes apart).
"""

from __future__ import annotations

import math
from numbers import Integral, Real

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

__all__ = ["boxes", "mar", "mcar", "mnar"]

BoolArray = NDArray[np.bool_]

SLOPE = 2.0  # log-odds of being hidden per standard deviation of what decides it, in mar and mnar


def mcar(shape_or_X: ArrayLike | torch.Tensor, rate: float, *, seed: int = 0) -> BoolArray:
    """Missing completely at random: every entry is hidden with probability `rate`, whatever its value.

    shape_or_X: a shape (N, D), or data [N, D] whose NaN entries are missing already and stay so.
    rate: probability in [0, 1). Returns bool [N, D], True = observed.
    Raises ValueError for a rate outside [0, 1), a wrong shape or infinite data; TypeError for data that is not numeric.
    """
    observed = _observed(shape_or_X)
    _check_rate(rate)
    return observed & (_generator("mcar", seed).random(observed.shape, dtype=np.float32) >= rate)


def boxes(
    shape_or_X: ArrayLike | torch.Tensor,
    rate: float,
    *,
    image_shape: tuple[int, int] | None = None,
    seed: int = 0,
) -> BoolArray:
    """One rectangular hole per image, of random aspect and position, that hides the share `rate` of it on average.

    Every rectangle that fits can occur, from full-height strips to full-width ones; the area is `rate` of the image, up
    to a random rounding to whole pixels that leaves the mean exact. The centre is hidden more often than the rim.

    shape_or_X: a shape (N, D), or data [N, D] whose NaN entries are missing already; D pixels, row by row.
    rate: share in [0, 1). image_shape: (height, width); None takes a square of D pixels.
    Returns bool [N, D], True = observed. Raises like `mcar`, and ValueError if D pixels do not make that image.
    """
    observed = _observed(shape_or_X)
    _check_rate(rate)
    n, d = observed.shape
    height, width = _image_shape(image_shape, d)
    rng = _generator("boxes", seed)
    # rate**a * rate**(1 - a) = rate: the aspect is free and the area is not.
    aspect = rng.random(n)
    rows = _random_interval(height, rate**aspect, rng)
    columns = _random_interval(width, rate ** (1.0 - aspect), rng)
    hole = rows[:, :, None] & columns[:, None, :]
    return observed & ~hole.reshape(n, d)


def mar(X: ArrayLike | torch.Tensor, rate: float, *, kept: float = 0.3, seed: int = 0) -> BoolArray:
    """Missing at random: what hides an entry is the value of other columns, which always stay observed.

    A share `kept` of the columns (at least one, at most D - 1) is drawn from those with no NaN and is never hidden.
    Each other column has a random linear combination of them, standardised to s; an entry is hidden with probability
    sigmoid(2 s + b), with b such that the observed entries of the column are hidden with mean probability `rate`.

    X: [N, D] numeric; NaN entries are missing already and stay so. rate: in [0, 1), over the columns that are not kept.
    Returns bool [N, D], True = observed. Raises like `mcar`, and ValueError if kept is not in (0, 1), if X has fewer
    than two columns, or if no column of X is without NaN.
    """
    values, mask = _values_and_observed(X)
    _check_rate(rate)
    if not 0.0 < kept < 1.0:
        raise ValueError(f"kept must be a share of the columns in (0, 1), got {kept!r}")
    d = values.shape[1]
    complete = np.flatnonzero(mask.all(0))
    if d < 2 or complete.size == 0:
        raise ValueError("mar needs two columns in X and one of them without NaN to depend on; use mcar instead")
    rng = _generator("mar", seed)
    n_kept = min(max(1, round(kept * d)), d - 1, complete.size)
    kept_columns = rng.choice(complete, n_kept, replace=False)
    causes = np.stack([_standardize(values[:, j].astype(np.float64)) for j in kept_columns], 1)
    for j in np.setdiff1d(np.arange(d), kept_columns):
        _hide(mask[:, j], _standardize(causes @ rng.standard_normal(n_kept)), rate, rng)
    return mask


def mnar(X: ArrayLike | torch.Tensor, rate: float, *, seed: int = 0) -> BoolArray:
    """Missing not at random: what hides an entry is its own value, and large values are hidden more often.

    An entry is hidden with probability sigmoid(2 z + b), where z is its value standardised over the observed entries
    of its column and b is such that these are hidden with mean probability `rate`.

    X: [N, D] numeric; NaN entries are missing already and stay so. rate: in [0, 1).
    Returns bool [N, D], True = observed. Raises like `mcar`.
    """
    values, mask = _values_and_observed(X)
    _check_rate(rate)
    rng = _generator("mnar", seed)
    for j in range(values.shape[1]):
        seen = mask[:, j]
        score = np.zeros(seen.size)
        score[seen] = _standardize(values[seen, j].astype(np.float64))
        _hide(mask[:, j], score, rate, rng)
    return mask


def _generator(kind: str, seed: int) -> np.random.Generator:
    if not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed must be an int, 0 or above, got {seed!r}")
    return np.random.default_rng([int(seed), *kind.encode()])


def _check_rate(rate: float) -> None:
    if not isinstance(rate, Real):
        raise TypeError(f"rate must be a number in [0, 1), got {type(rate).__name__}")
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"rate must be in [0, 1), the share of entries to hide, got {rate!r}")


def _observed(shape_or_X: ArrayLike | torch.Tensor) -> BoolArray:
    """The entries that can be hidden: all of a shape, the ones that are not NaN of data."""
    if not (isinstance(shape_or_X, tuple) and all(isinstance(size, int | np.integer) for size in shape_or_X)):
        return _values_and_observed(shape_or_X)[1]
    if len(shape_or_X) != 2 or min(shape_or_X) < 1:
        raise ValueError(f"a shape must be two positive integers (N, D), got {shape_or_X}")
    return np.ones(shape_or_X, dtype=bool)


def _values_and_observed(X: ArrayLike | torch.Tensor) -> tuple[NDArray[np.generic], BoolArray]:
    if isinstance(X, torch.Tensor):
        X = X.detach().cpu()
        X = (X.float() if X.dtype == torch.bfloat16 else X).numpy()  # numpy has no bfloat16
    values = np.asarray(X)
    if values.dtype == object:  # a DataFrame of mixed dtypes, or of nullable ones
        try:
            to_numpy = getattr(X, "to_numpy", None)
            values = to_numpy(dtype=np.float64, na_value=np.nan) if to_numpy else values.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(f"X must be numeric with NaN for missing entries: {error}") from error
    if values.dtype.kind not in "fiub":
        raise TypeError(f"X must be numeric with NaN for missing entries, got dtype {values.dtype}")
    if values.ndim != 2 or values.size == 0:
        raise ValueError(
            f"X must be [N, D] with at least one row and one column, got shape {values.shape}; "
            "to pass a shape, give a tuple (N, D)"
        )
    if np.isinf(values).any():
        raise ValueError("X holds infinity; replace it by NaN if the entry is missing")
    return values, ~np.isnan(values)


def _image_shape(image_shape: tuple[int, int] | None, d: int) -> tuple[int, int]:
    side = math.isqrt(d)
    height, width = (side, side) if image_shape is None else image_shape
    if height * width == d and min(height, width) > 0:
        return height, width
    if image_shape is None:
        raise ValueError(f"{d} columns are not a square image; pass image_shape=(height, width)")
    raise ValueError(f"image_shape {image_shape} does not make {d} columns; height * width must equal D")


def _random_interval(size: int, share: NDArray[np.float64], rng: np.random.Generator) -> BoolArray:
    """Per row an interval of `size` cells that covers `share` of them on average, placed uniformly: bool [N, size]."""
    length = np.minimum(np.floor(size * share + rng.random(share.size)), size).astype(np.int64)
    start = rng.integers(0, size - length + 1)
    cells = np.arange(size)
    return (cells >= start[:, None]) & (cells < (start + length)[:, None])


def _standardize(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean 0, standard deviation 1; zeros if all values are equal or there are none."""
    if values.size == 0 or values.min() == values.max():
        return np.zeros_like(values)
    centred = values - values.mean()
    return centred / centred.std()


def _hide(column: BoolArray, score: NDArray[np.float64], rate: float, rng: np.random.Generator) -> None:
    """Hide, in place, observed entries of `column` with probability sigmoid(SLOPE * score + b) of mean `rate`."""
    uniform = rng.random(column.shape)[column]
    logit = SLOPE * score[column]
    if rate == 0.0 or logit.size == 0:
        return
    base = math.log(rate / (1.0 - rate))
    low, high = base - logit.max(), base - logit.min()
    for _ in range(50):  # bisection: the mean probability rises with b
        b = 0.5 * (low + high)
        low, high = (b, high) if _sigmoid(logit + b).mean() < rate else (low, b)
    column[column] = uniform >= _sigmoid(logit + low)


def _sigmoid(t: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 + 0.5 * np.tanh(0.5 * t)  # never overflows
