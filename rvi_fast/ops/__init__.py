"""One operator per idea: check the arguments, then run the equations (`reference`) or their kernel."""

from .checks import check_rows
from .likelihoods import linear_masked_gaussian_nll, masked_bernoulli_nll, masked_gaussian_nll
from .noise import MAX_LATENTS, philox_normal
from .relays import COEFFICIENTS, active_counts, check_groups, gaussian_sample, relay_mean, relay_sample
from .rows import Columns, read_rows, row_adam_
