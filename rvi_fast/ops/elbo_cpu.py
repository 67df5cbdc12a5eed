"""The fused training step on a CPU: its backward by hand, products by BLAS, the rest in compiled loops.

What it computes stands in `elbo._equations`. Between steps the caches fill with a batch's data, so that a call of
PyTorch costs several times what it does in a loop of its own: whatever stays from step to step is made once, in
`Arrays`, views of the parameters too. docs/performance.md has the times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .. import reference
from ..clock import EPS_MEETS_GRADIENT, AdamClock
from ..reference import HALF_LOG_2PI, AdamHyper

if TYPE_CHECKING:
    from .elbo import Batch, ElboModel, RowState, SharedState

aten = torch.ops.aten
SIZES = 2  # of batches that arrays are kept for: an epoch's, and its last one

DERIVATIVES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {  # of (gradient, input, output)
    "relu": lambda g, a, h: aten.threshold_backward(g, h, 0),
    "tanh": lambda g, a, h: aten.tanh_backward(g, h),
    "silu": lambda g, a, h: aten.silu_backward(g, a),
    "gelu": lambda g, a, h: aten.gelu_backward(g, a),
}


class Arrays:
    """Memory for batches of one size, and views of it and of the shared parameters."""

    def __init__(self, batch: int, width: int, columns: int, shared: SharedState, model: ElboModel):
        from .elbo import shared_views

        num_relays = sum(model.groups)
        latent_dim = (width - num_relays) // 2
        shapes = model.shared_shapes(latent_dim, columns)

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=shared.weights.dtype)

        self.groups, self.active = np.array(model.groups, np.int64), np.array(model.active, np.int64)
        self.p, self.m, self.v, self.grad = (empty(batch, width) for _ in range(4))
        self.apart = np.empty(batch, np.int64)  # rows that the loops leave to the equations
        spans = [num_relays, latent_dim, latent_dim]
        _, self.residual, self.log_std = self.p.split(spans, dim=1)
        self.by_coef, self.by_mean, _ = self.grad.split(spans, dim=1)
        self.bits = self.p.view(reference.INTEGERS[self.p.itemsize]).numpy()
        self.weight, self.kept = empty(batch, num_relays), np.empty((batch, num_relays), bool)
        self.radius, self.angle, self.cosine = (empty(batch, 2 * -(-latent_dim // 4)) for _ in range(3))
        self.mean, self.sigma, self.spread, self.z = (empty(batch, latent_dim) for _ in range(4))
        self.features, self.xhat = empty(batch, shapes[-2 - model.learned][1]), empty(batch, columns)
        self.squares, self.count, self.in_order = np.empty(columns), np.empty(columns), np.arange(batch)
        self.shared_grad = torch.empty_like(shared.weights[0])
        self.relays, *self.layers = shared_views(shared.weights[0], shapes)
        self.by_relays, *self.by_layers = shared_views(self.shared_grad, shapes)

    def moving(self) -> tuple[np.ndarray, ...]:
        """The rows' p, m and v."""
        return self.p.numpy(), self.m.numpy(), self.v.numpy()


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def step(
    table: RowState, batch: Batch, shared: SharedState, model: ElboModel, kept: dict[tuple[int, ...], Arrays]
) -> None:
    """As elbo_step_, on rows in memory that the CPU reaches. kept: arrays of earlier steps of the same parameters."""
    rows = batch.rows[: int(batch.present)]
    size = len(rows), table.values.shape[2], batch.x.shape[1]
    if size not in kept:
        if len(kept) == SIZES:
            kept.clear()
        kept[size] = Arrays(*size, shared, model)
    a = kept[size]
    clock = AdamClock.of(table.history, table.counters, table.constants, table.rates)

    _read_rows(table, rows, clock, a)
    nll, kl = _losses_and_gradients(table, batch, rows, model, a)
    lr, weight_decay = table.rates.tolist()
    _step_rows(table, rows, clock, lr, weight_decay, a)
    _advance(clock, lr, weight_decay)
    table.noise_step.add_(1)
    _step_shared(shared, a)
    loss = shared.loss.numpy()
    loss[0] = nll, kl, len(rows)
    loss[1] += loss[0]


def _read_rows(table: RowState, rows: Tensor, clock: AdamClock, a: Arrays) -> None:
    """The rows' p, m and v into a.p, a.m and a.v, brought up to date (reference.catch_up)."""
    from ..loops import adam

    hyper, least = clock.hyper, reference.least_root(table.values.dtype)
    found = len(rows)
    if clock.closed_form:
        found = adam.read_rows(
            table.values.flatten(1).numpy(), rows.numpy(), table.last.numpy(), clock.history.numpy(), clock.index,
            *hyper.logs(), hyper.eps, least, clock.inexact_before, EPS_MEETS_GRADIENT, *a.moving(), a.apart,
        )  # fmt: skip
    else:
        a.apart[:] = a.in_order
    if found:
        apart = torch.from_numpy(a.apart[:found])
        at = rows[apart]
        p, m, v = table.values[at].unbind(1)
        caught_up = clock.catch_up(p, m, v, table.last[at])
        for kept, values in zip((a.p, a.m, a.v), caught_up, strict=True):
            kept[apart] = values


def _losses_and_gradients(
    table: RowState, batch: Batch, rows: Tensor, model: ElboModel, a: Arrays
) -> tuple[float, float]:
    """Sums of nll and kl; gradients of the mean over rows into a.grad and a.shared_grad."""
    from ..loops import relays as loops

    loops.select(a.p.numpy(), a.bits, a.groups, a.active, a.weight.numpy(), a.kept)
    torch.addmm(a.residual, a.weight, a.relays, out=a.mean)
    noise = box_muller(table.seed, "train", int(table.noise_step), rows, a)
    mean, sigma, spread = a.mean.numpy(), a.sigma.numpy(), a.spread.numpy()
    np.exp(a.log_std.numpy(), out=sigma)
    kl = loops.sample(mean, a.p.numpy(), sigma, *noise, spread, a.z.numpy())

    nll, by_z = _decode(batch, rows, model, a)
    share, by_mean = model.kl_weight / len(rows), a.by_mean
    loops.sample_gradients(by_z.numpy(), mean, sigma, spread, share, a.grad.numpy())
    torch.mm(by_mean, a.relays.T, out=a.by_coef)
    loops.keep(a.grad.numpy(), a.kept)
    torch.mm(a.weight.T, by_mean, out=a.by_relays)
    return nll, kl


def box_muller(
    seed: int, stream: str, step: int, row_ids: Tensor, a: Arrays, draw: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """radius, cosine and sine [B, P] by whose products reference.philox_normal has its normals, to the bit."""
    from ..loops.philox import uniforms

    number = reference.STREAMS[stream] << 28 | draw << 12
    ids = row_ids.numpy().view(np.uint64)
    uniforms(np.uint64(int(seed) % 2**64), np.uint64(step), np.uint64(number), ids, a.radius.numpy(), a.angle.numpy())
    cosine, sine = torch.cos(a.angle, out=a.cosine), a.angle.sin_()
    return a.radius.log_().mul_(-2.0).sqrt_().numpy(), cosine.numpy(), sine.numpy()


def _decode(batch: Batch, rows: Tensor, model: ElboModel, a: Arrays) -> tuple[float, Tensor]:
    """The sum of nll, and the gradient of its mean by z [B, T]; those of the layers into a.by_layers."""
    depth, layers, by_layers = len(model.hidden), a.layers, a.by_layers
    activation = reference.ACTIVATIONS[model.activation]
    inputs, before = [a.z], []
    for weight, bias in zip(layers[: 2 * depth : 2], layers[1 : 2 * depth : 2], strict=True):
        before.append(torch.addmm(bias, inputs[-1], weight.T))
        inputs.append(activation(before[-1]))
    features = torch.cat((inputs[-1], a.z), dim=1, out=a.features) if model.linear_path else inputs[-1]
    weight, bias = layers[2 * depth : 2 * depth + 2]
    torch.addmm(bias, features, weight.T, out=a.xhat)
    nll = _loss(batch, rows, model, a)  # a.xhat now holds the gradient
    torch.mm(a.xhat.T, features, out=by_layers[2 * depth])
    grad = a.xhat @ weight
    by_linear = None
    if model.linear_path:
        grad, by_linear = grad[:, : -a.z.shape[1]], grad[:, -a.z.shape[1] :]
    for i in reversed(range(depth)):
        grad = DERIVATIVES[model.activation](grad, before[i], inputs[i + 1])
        torch.mm(grad.T, inputs[i], out=by_layers[2 * i])
        torch.sum(grad, dim=0, out=by_layers[2 * i + 1])
        grad = grad @ layers[2 * i]
    return nll, grad if by_linear is None else grad + by_linear


def _loss(batch: Batch, rows: Tensor, model: ElboModel, a: Arrays) -> float:
    """The sum of nll; the gradient of its mean over rows replaces a.xhat, and its sum goes to the last bias."""
    from ..loops import likelihood

    x, mask, at = batch.x, batch.mask, rows.numpy()
    if batch.gathered:
        at = a.in_order
    if x.dtype not in (a.xhat.dtype, torch.uint8):
        x, mask, at = x[at].to(a.xhat.dtype), None if mask is None else mask[at], a.in_order
    cells = x.numpy(), batch.x_scale, None if mask is None else mask.view(torch.uint8).numpy(), at
    xhat, by_bias, share = a.xhat.numpy(), a.by_layers[2 * len(model.hidden) + 1].numpy(), 1 / len(rows)
    if model.likelihood == "bernoulli":
        softplus, sigmoid = torch.nn.functional.softplus(a.xhat).numpy(), torch.sigmoid(a.xhat).numpy()
        return likelihood.bernoulli(xhat, softplus, sigmoid, *cells, share, by_bias)
    if not model.learned:
        scale = np.full(xhat.shape[1], model.scale, xhat.dtype)
        likelihood.gaussian(xhat, *cells, 1 / scale, share / scale, a.squares, a.count, by_bias)
        return 0.5 * a.squares.sum() + a.count.sum() * (math.log(model.scale) + HALF_LOG_2PI)
    exponent = torch.exp(2 * a.layers[-1])
    by_scale = torch.sqrt(model.scale**2 + exponent)
    scale = by_scale.numpy()
    likelihood.gaussian(xhat, *cells, 1 / scale, share / scale, a.squares, a.count, by_bias)
    by_log = (a.count - a.squares) / scale * (exponent.numpy() / scale * share)
    a.by_layers[-1].copy_(torch.from_numpy(by_log))
    return 0.5 * a.squares.sum() + a.count @ (np.log(scale.astype(np.float64)) + HALF_LOG_2PI)


def _step_rows(table: RowState, rows: Tensor, clock: AdamClock, lr: float, weight_decay: float, a: Arrays) -> None:
    """Adam's step of the rows by a.grad, into the table."""
    from ..loops import adam

    factors = adam_factors(clock.steps + 1, lr, weight_decay, clock.hyper)
    values, last = table.values.flatten(1).numpy(), table.last.numpy()
    adam.step_rows(values, last, rows.numpy(), *a.moving(), a.grad.numpy(), *factors, clock.index + 1)
    torch.autograd.graph.increment_version(table.values)  # of which NumPy knows nothing


def adam_factors(number: int, lr: float, weight_decay: float, hyper: AdamHyper) -> tuple[float, ...]:
    """What loops.adam.step takes besides arrays."""
    bc1, bc2 = hyper.bias_corrections_at(number)
    return lr / bc1, 1 / math.sqrt(bc2), 1 - lr * weight_decay, *hyper


def _advance(clock: AdamClock, lr: float, weight_decay: float) -> None:
    """AdamClock.advance of a history that has room."""
    from ..loops import adam

    clock.replayed(1)
    clock.counters.numpy()[0] = clock.index
    window = (clock.window or 0) if clock.closed_form else 0
    corrections = clock.hyper.bias_corrections_at(clock.steps)
    adam.advance(clock.history.numpy(), clock.index, window, lr, weight_decay, *corrections, *clock.hyper.logs())


def _step_shared(shared: SharedState, a: Arrays) -> None:
    from ..loops import adam

    shared.steps.add_(1)
    beta1, beta2, _, _, eps = shared.constants.tolist()
    hyper, number = AdamHyper(beta1, beta2, eps), int(shared.steps[0])
    weights, grad = shared.weights.numpy(), a.shared_grad.numpy()
    spans = slice(shared.second), slice(shared.second, None)
    for span, (lr, weight_decay) in zip(spans, shared.rates.tolist(), strict=True):
        adam.step(*weights[:, span], grad[span], *adam_factors(number, lr, weight_decay, hyper))
