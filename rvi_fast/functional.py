"""The library's ideas as functions of tensors."""

from .clock import AdamClock, LazyClock
from .ops import (
    Columns,
    linear_masked_gaussian_nll,
    masked_bernoulli_nll,
    masked_gaussian_nll,
    philox_normal,
    relay_mean,
    relay_sample,
    row_adam_,
)
from .reference import AdamHyper

__all__ = [
    "AdamClock",
    "AdamHyper",
    "Columns",
    "LazyClock",
    "linear_masked_gaussian_nll",
    "masked_bernoulli_nll",
    "masked_gaussian_nll",
    "philox_normal",
    "relay_mean",
    "relay_sample",
    "row_adam_",
]
