"""Errors of a reconstruction over the entries that count, in float64.

x, x_hat: arrays or tensors of one shape and any real dtype. where: bool of the same shape, True = the entry counts;
None counts all. Entries that do not count are never read, so they may be NaN. All functions return a float and raise
ValueError if the shapes differ, if no entry counts, or if an entry that counts is NaN or infinite; TypeError if x or
x_hat is complex or `where` not boolean.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

__all__ = ["elastic", "mae", "rmse"]

Values = ArrayLike | torch.Tensor


def elastic(x: Values, x_hat: Values, where: Values | None = None) -> float:
    """Elastic error: the mean of |r| + r^2 with r = x - x_hat, over the entries `where`."""
    r = np.abs(_residuals(x, x_hat, where))
    return float(np.mean(r + r * r))


def rmse(x: Values, x_hat: Values, where: Values | None = None) -> float:
    """Root mean squared error over the entries `where`."""
    return float(np.sqrt(np.mean(_residuals(x, x_hat, where) ** 2)))


def mae(x: Values, x_hat: Values, where: Values | None = None) -> float:
    """Mean absolute error over the entries `where`."""
    return float(np.mean(np.abs(_residuals(x, x_hat, where))))


def _residuals(x: Values, x_hat: Values, where: Values | None) -> NDArray[np.float64]:
    """x - x_hat as a vector of the entries that count."""
    x, x_hat = _array(x), _array(x_hat)
    if x.shape != x_hat.shape:
        raise ValueError(f"x and x_hat must have one shape, got {x.shape} and {x_hat.shape}")
    counts = np.ones(x.shape, dtype=bool) if where is None else _array(where)
    if counts.dtype != np.bool_:
        raise TypeError(f"where must be boolean, True for an entry that counts, got dtype {counts.dtype}")
    if counts.shape != x.shape:
        raise ValueError(f"where must have the shape of x, {x.shape}, got {counts.shape}")
    if not counts.any():
        raise ValueError("no entry counts, so there is no error to report; check `where`")
    truth, estimate = x[counts].astype(np.float64), x_hat[counts].astype(np.float64)
    for name, values in (("x", truth), ("x_hat", estimate)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} is NaN or infinite in an entry that counts; leave it out with `where`")
    return truth - estimate


def _array(values: Values) -> NDArray[np.generic]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # numpy has no bfloat16
    array = np.asarray(values)
    if array.dtype.kind == "c":
        raise TypeError(f"x and x_hat must be real, got dtype {array.dtype}; compare their parts")
    return array
