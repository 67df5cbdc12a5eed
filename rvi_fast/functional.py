"""The library's ideas as functions of tensors."""

from .ops import (
    linear_masked_gaussian_nll,
    masked_bernoulli_nll,
    masked_gaussian_nll,
    philox_normal,
    relay_mean,
    relay_sample,
    row_adam_,
)

__all__ = [
    "linear_masked_gaussian_nll",
    "masked_bernoulli_nll",
    "masked_gaussian_nll",
    "philox_normal",
    "relay_mean",
    "relay_sample",
    "row_adam_",
]
