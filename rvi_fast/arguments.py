"""Checks of plain arguments: each raises one sentence that names the argument and says what it may be."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np


def is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def positive_int(name: str, value: Any, other: Any = ...) -> None:
    """A positive int, or exactly `other` where one is given ("auto", None)."""
    if _is_other(value, other):
        return
    if not is_int(value) or value < 1:
        raise ValueError(f"{name} must be a positive int{_or(other)}; got {value!r}")


def number(name: str, value: Any, other: Any = ..., *, above_zero: bool = False) -> None:
    """A finite number of at least (or above) zero, or exactly `other`."""
    if _is_other(value, other):
        return
    if not is_number(value) or value < 0 or (above_zero and value == 0):
        bound = "above 0" if above_zero else "of at least 0"
        raise ValueError(f"{name} must be a number {bound}{_or(other)}; got {value!r}")


def seed(name: str, value: Any) -> None:
    if not is_int(value) or not 0 <= value < 1 << 63:
        raise ValueError(f"{name} must be an int in 0 .. 2**63 - 1; got {value!r}")


def one_of(name: str, value: Any, choices: Collection[Any]) -> None:
    value = plain(value)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def widths(name: str, value: Any, other: Any = ...) -> None:
    """A sequence of positive ints, () included, or exactly `other`."""
    if _is_other(value, other):
        return
    is_sequence = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
    if not is_sequence or not all(is_int(w) and w > 0 for w in value):
        raise ValueError(f"{name} must be a sequence of positive ints, such as (64, 64), or () for none; got {value!r}")


def path(name: str, value: Any) -> Path:
    """A file or a folder."""
    try:
        return Path(value)
    except TypeError:
        raise TypeError(f"{name} must be a str or a pathlib.Path; got {value!r}") from None


def plain(value: Any) -> Any:
    """NumPy scalars, ranges and arrays as Python's own numbers and tuples, all else as it is."""
    if isinstance(value, np.ndarray | range | list | tuple):
        return tuple(plain(v) for v in value)
    return value.item() if isinstance(value, np.generic) else value


def _is_other(value: Any, other: Any) -> bool:
    return other is not ... and type(value) is type(other) and value == other


def _or(other: Any) -> str:
    return "" if other is ... else f" or {other!r}"
