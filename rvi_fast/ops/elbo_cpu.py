"""The fused training step on a CPU: its backward by hand, products by BLAS, all in compiled loops.

What it computes stands in `elbo._equations`; docs/performance.md has the times.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..clock import AdamClock
from ..reference import HALF_LOG_2PI, AdamHyper
from .rows_cpu import Rows, weights_of
from .table_cpu import adam_factors, advance, read_rows, step_rows

if TYPE_CHECKING:
    from .elbo import Batch, ElboModel, RowState, SharedState

SIZES = 2  # of batches that arrays are kept for: an epoch's, and its last one


class Arrays(Rows):
    """Memory for batches of one size, and for gradients of the shared parameters."""

    def __init__(self, batch: int, width: int, columns: int, shared: SharedState, model: ElboModel):
        latent_dim = (width - sum(model.groups)) // 2
        self.shared = shared.weights.numpy()
        super().__init__(batch, latent_dim, columns, weights_of(self.shared[0], model, latent_dim, columns), model)
        self.by_shared = np.empty_like(self.shared[0])
        rest = len(self.by_shared) - (columns if model.learned else 0)
        self.by_last_bias, self.by_log_scale = self.by_shared[rest - columns : rest], self.by_shared[rest:]
        self.log_scale = shared.weights[0, rest:]
        self.apart, self.in_order = np.empty(batch, bool), np.arange(batch)
        self.fixed_scale = np.full(columns, model.scale, self.shared.dtype)
        self.squares, self.count = np.empty(columns), np.empty(columns)


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def step(table: RowState, batch: Batch, shared: SharedState, model: ElboModel, kept: dict[tuple, Arrays]) -> None:
    """As elbo_step_, on rows in memory that the CPU reaches. kept: arrays of earlier steps of the same parameters."""
    rows = batch.rows[: int(batch.present)]
    size, form = (len(rows), table.values.shape[2], batch.x.shape[1]), model._replace(kl_weight=0.0)
    if (size, form) not in kept:
        if len(kept) == SIZES:
            kept.clear()
        kept[size, form] = Arrays(*size, shared, model)
    a = kept[size, form]
    clock = AdamClock.of(table.history, table.counters, table.constants, table.rates)
    if clock.index + 1 >= clock.history.shape[1]:
        raise IndexError(
            f"history has room for {clock.history.shape[1] - 1} steps, all taken; call make_room(steps) of the ElboStep"
        )

    at = table.values, table.last, rows
    read_rows(*at, clock, a.moving, a.apart)
    a.forward(table.seed, "train", int(table.noise_step), rows)
    nll, kl = _loss(batch, rows, model, a), float(a.arrays.kl.sum(dtype=np.float64))
    a.backward(model.kl_weight / len(rows))
    lr, weight_decay = table.rates.tolist()
    step_rows(*at, a.moving, a.arrays.grad, clock, lr, weight_decay)
    advance(clock, lr, weight_decay)
    table.noise_step.add_(1)
    _step_shared(shared, a)
    loss = shared.loss.numpy()
    loss[0] = nll, kl, len(rows)
    loss[1] += loss[0]


def _loss(batch: Batch, rows: Tensor, model: ElboModel, a: Arrays) -> float:
    """The sum of nll; the gradient of its mean over rows replaces xhat, and its sum over rows is the last bias's."""
    from ..loops import likelihood, threads

    x, mask, at, dtype = batch.x, batch.mask, rows.numpy(), a.log_scale.dtype
    if batch.gathered:
        at = a.in_order
    if x.dtype not in (dtype, torch.uint8):
        x, mask, at = x[at].to(dtype), None if mask is None else mask[at], a.in_order
    cells = x.numpy(), batch.x_scale, None if mask is None else mask.view(torch.uint8).numpy(), at
    xhat, by_bias, share, at_once = a.arrays.xhat, a.by_last_bias, 1 / len(rows), threads.available()
    if model.likelihood == "bernoulli":
        return likelihood.bernoulli(at_once, xhat, *cells, share, by_bias)
    if not model.learned:
        scale = a.fixed_scale
        likelihood.gaussian(at_once, xhat, *cells, 1 / scale, share / scale, a.squares, a.count, by_bias)
        return 0.5 * a.squares.sum() + a.count.sum() * (math.log(model.scale) + HALF_LOG_2PI)
    exponent = torch.exp(2 * a.log_scale)
    scale = torch.sqrt(model.scale**2 + exponent).numpy()
    likelihood.gaussian(at_once, xhat, *cells, 1 / scale, share / scale, a.squares, a.count, by_bias)
    a.by_log_scale[:] = (a.count - a.squares) / scale * (exponent.numpy() / scale * share)
    return 0.5 * a.squares.sum() + a.count @ (np.log(scale.astype(np.float64)) + HALF_LOG_2PI)


def _step_shared(shared: SharedState, a: Arrays) -> None:
    from ..loops import rows, threads

    shared.steps.add_(1)
    beta1, beta2, _, _, eps = shared.constants.tolist()
    hyper, number = AdamHyper(beta1, beta2, eps), int(shared.steps[0])
    factors = (adam_factors(number, lr, weight_decay, hyper) for lr, weight_decay in shared.rates.tolist())
    rows.step_shared(threads.available(), a.arrays, a.weights, a.shared, a.by_shared, *factors)
