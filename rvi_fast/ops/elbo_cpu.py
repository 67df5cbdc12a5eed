"""The fused training step on a CPU: its backward by hand, products by BLAS, the rest in compiled loops.

What it computes stands in `elbo._equations`. Between steps the caches fill with a batch's data, so that a call of
PyTorch costs several times what it does in a loop of its own: whatever stays from step to step is made once, in
`Arrays`, views of the parameters too. docs/performance.md has the times.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..clock import AdamClock
from ..reference import HALF_LOG_2PI, AdamHyper
from .rows_cpu import Decoder, Rows
from .table_cpu import adam_factors, advance, read_rows, step_rows

if TYPE_CHECKING:
    from .elbo import Batch, ElboModel, RowState, SharedState

SIZES = 2  # of batches that arrays are kept for: an epoch's, and its last one


class Arrays(Rows):
    """Memory for batches of one size, and views of it and of the shared parameters."""

    def __init__(self, batch: int, width: int, columns: int, shared: SharedState, model: ElboModel):
        from .elbo import shared_views

        shapes = model.shared_shapes((width - sum(model.groups)) // 2, columns)
        self.shared_grad = torch.empty_like(shared.weights[0])
        relays, *layers = shared_views(shared.weights[0], shapes)
        self.by_relays, *self.by_layers = shared_views(self.shared_grad, shapes)
        self.log_scale = layers.pop() if model.learned else None
        super().__init__(batch, width, relays, model)
        self.decoder = Decoder(batch, layers, model)
        self.apart, self.in_order = np.empty(batch, bool), np.arange(batch)
        self.by_last_bias = self.by_layers[2 * len(model.hidden) + 1].numpy()
        self.fixed_scale = np.full(columns, model.scale, self.kl.dtype)
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

    at, now = (table.values, table.last, rows), a.moving()
    read_rows(*at, clock, now, a.apart)
    nll, kl = _losses_and_gradients(table, batch, rows, model, a)
    lr, weight_decay = table.rates.tolist()
    step_rows(*at, now, a.arrays.grad, clock, lr, weight_decay)
    advance(clock, lr, weight_decay)
    table.noise_step.add_(1)
    _step_shared(shared, a)
    loss = shared.loss.numpy()
    loss[0] = nll, kl, len(rows)
    loss[1] += loss[0]


def _losses_and_gradients(
    table: RowState, batch: Batch, rows: Tensor, model: ElboModel, a: Arrays
) -> tuple[float, float]:
    """Sums of nll and kl; gradients of the mean over rows into a.grad and a.shared_grad."""
    a.sample(table.seed, "train", int(table.noise_step), rows)
    a.decoder.decode(a.z)
    nll = _loss(batch, rows, model, a)
    a.gradient(a.decoder.gradient(a.by_layers), model.kl_weight / len(rows))
    torch.mm(a.weight.T, a.by_mean, out=a.by_relays)
    return nll, float(a.kl.sum(dtype=np.float64))


def _loss(batch: Batch, rows: Tensor, model: ElboModel, a: Arrays) -> float:
    """The sum of nll; the gradient of its mean over rows replaces xhat, and its sum over rows is the last bias's."""
    from ..loops import likelihood, threads

    x, mask, at = batch.x, batch.mask, rows.numpy()
    if batch.gathered:
        at = a.in_order
    if x.dtype not in (a.p.dtype, torch.uint8):
        x, mask, at = x[at].to(a.p.dtype), None if mask is None else mask[at], a.in_order
    cells = x.numpy(), batch.x_scale, None if mask is None else mask.view(torch.uint8).numpy(), at
    xhat, by_bias, share, at_once = a.decoder.xhat_array, a.by_last_bias, 1 / len(rows), threads.available()
    if model.likelihood == "bernoulli":
        softplus, sigmoid = a.decoder.softplus_and_sigmoid()
        return likelihood.bernoulli(at_once, xhat, softplus, sigmoid, *cells, share, by_bias)
    if a.log_scale is None:
        scale = a.fixed_scale
        likelihood.gaussian(at_once, xhat, *cells, 1 / scale, share / scale, a.squares, a.count, by_bias)
        return 0.5 * a.squares.sum() + a.count.sum() * (math.log(model.scale) + HALF_LOG_2PI)
    exponent = torch.exp(2 * a.log_scale)
    by_scale = torch.sqrt(model.scale**2 + exponent)
    scale = by_scale.numpy()
    likelihood.gaussian(at_once, xhat, *cells, 1 / scale, share / scale, a.squares, a.count, by_bias)
    by_log = (a.count - a.squares) / scale * (exponent.numpy() / scale * share)
    a.by_layers[-1].copy_(torch.from_numpy(by_log))
    return 0.5 * a.squares.sum() + a.count @ (np.log(scale.astype(np.float64)) + HALF_LOG_2PI)


def _step_shared(shared: SharedState, a: Arrays) -> None:
    from ..loops import adam, threads

    shared.steps.add_(1)
    beta1, beta2, _, _, eps = shared.constants.tolist()
    hyper, number = AdamHyper(beta1, beta2, eps), int(shared.steps[0])
    weights, grad = shared.weights.numpy(), a.arrays.shared_grad
    spans = slice(shared.second), slice(shared.second, None)
    for span, (lr, weight_decay) in zip(spans, shared.rates.tolist(), strict=True):
        factors = adam_factors(number, lr, weight_decay, hyper)
        adam.step_all(threads.available(), *weights[:, span], grad[span], factors)
