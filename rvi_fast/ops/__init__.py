"""One operator per idea: check the arguments, then run the equations (`reference`) or their kernel."""

from .checks import check_one_device, check_rows
from .likelihoods import linear_masked_gaussian_nll, masked_bernoulli_nll, masked_gaussian_nll
from .noise import MAX_LATENTS, philox_normal
from .registry import differentiable_once
from .relay_step import relay_step_
from .relays import (
    COEFFICIENTS,
    SampledRows,
    active_counts,
    check_groups,
    gaussian_sample,
    relay_mean,
    relay_sample,
    relay_sample_rows,
    relay_sample_rows_backward,
    samples_in_one_launch,
)
from .rows import Columns, read_rows, row_adam_
