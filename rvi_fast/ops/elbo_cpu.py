"""The fused training step on a CPU: its backward by hand, products by BLAS, arrays that stay from step to step.

What it computes stands in `elbo._equations`. Elementwise work is in place: an array of a batch's cells that is made
anew costs more in page faults than the arithmetic on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import reference
from ..clock import AdamClock
from ..reference import HALF_LOG_2PI, AdamHyper
from .likelihoods import twin_x

if TYPE_CHECKING:
    from .elbo import Batch, ElboModel, RowState, SharedState

aten = torch.ops.aten
KEPT = WeakTensorKeyDictionary()  # by a model's weights, arrays for the sizes of its batches
SIZES = 2  # at most: an epoch's batches, and its last one

DERIVATIVES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {  # of (gradient, input, output)
    "relu": lambda g, a, h: aten.threshold_backward(g, h, 0),
    "tanh": lambda g, a, h: aten.tanh_backward(g, h),
    "silu": lambda g, a, h: aten.silu_backward(g, a),
    "gelu": lambda g, a, h: aten.gelu_backward(g, a),
}


class Arrays:
    """Memory for one size of batch."""

    def __init__(
        self, dtype: torch.dtype, batch: int, columns: int, width: int, relays: int, features: int, shared: int
    ):
        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype)

        self.state, self.grad = empty(batch, 3, width), empty(batch, width)
        self.root, self.moved = empty(batch, width), empty(batch, width)
        self.weight, self.kept = empty(batch, relays), empty(batch, relays)
        self.features = empty(batch, features)
        self.x, self.mask, self.xhat = empty(batch, columns), empty(batch, columns), empty(batch, columns)
        self.shared_grad, self.shared_root = empty(shared), empty(shared)


def _arrays(weights: Tensor, *sizes: int) -> Arrays:
    kept = KEPT.setdefault(weights, {})
    if sizes not in kept:
        if len(kept) == SIZES:
            kept.clear()
        kept[sizes] = Arrays(weights.dtype, *sizes)
    return kept[sizes]


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def step(table: RowState, batch: Batch, shared: SharedState, model: ElboModel) -> None:
    """As elbo_step_, on rows in memory that the CPU reaches."""
    rows = batch.rows[: int(batch.present)]
    num_relays, width = sum(model.groups), table.values.shape[2]
    latent_dim = (width - num_relays) // 2
    columns = batch.x.shape[1]
    shapes = model.shared_shapes(latent_dim, columns)
    sizes = len(rows), columns, width, num_relays, shapes[-2 - model.learned][1], shared.weights.shape[1]
    a = _arrays(shared.weights, *sizes)
    clock = AdamClock.of(table.history, table.counters, table.constants, table.rates)
    last = table.last[rows]

    _read_rows(table, rows, last, clock, a)
    nll, kl = _losses_and_gradients(table, batch, rows, shared, model, shapes, a)
    lr, weight_decay = table.rates.tolist()
    p, m, v = a.state.unbind(1)
    number = clock.next_step(last)
    _adam(p, m, v, a.grad, a.root, number, lr, weight_decay, clock.hyper)
    table.values.index_copy_(0, rows, a.state)
    table.last[rows] = clock.touched(last)
    clock.advance(lr, weight_decay)
    table.noise_step.add_(1)
    _step_shared(shared, a)
    for at, value in zip(shared.loss[0], (nll, kl, float(len(rows))), strict=True):
        at.fill_(value)
    shared.loss[1] += shared.loss[0]


def _read_rows(table: RowState, rows: Tensor, last: Tensor, clock: AdamClock, a: Arrays) -> None:
    """The rows' p, m and v into a.state, brought up to date (reference.catch_up)."""
    torch.index_select(table.values, 0, rows, out=a.state)
    if clock.index == 0:
        return
    p, m, v = a.state.unbind(1)
    missed = clock.missed(last)
    exact = clock.exact_entries(p, m, v, last, missed)
    w1, e1, w2, e2, decay, decay_m, decay_v = (c.to(p.dtype)[:, None] for c in missed)
    eps, least = clock.hyper.eps, reference.least_root(p.dtype)
    torch.sqrt(v, out=a.root)
    torch.add(a.root, e1 * eps, out=a.moved).clamp_min_(least)
    a.root.add_(e2 * eps).clamp_min_(least)
    torch.div(w1, a.moved, out=a.moved)
    torch.div(w2, a.root, out=a.root)
    p.addcmul_(m, a.moved.add_(a.root), value=-1).mul_(decay)
    m.mul_(decay_m)
    v.mul_(decay_v)
    for at, values in exact:
        p[at] = values


def _losses_and_gradients(
    table: RowState,
    batch: Batch,
    rows: Tensor,
    shared: SharedState,
    model: ElboModel,
    shapes: list[tuple[int, ...]],
    a: Arrays,
) -> tuple[float, float]:
    """Sums of nll and kl; gradients of the mean over rows into a.grad and a.shared_grad."""
    from .elbo import shared_views

    num_relays, latent_dim = shapes[0]
    spans = [num_relays, latent_dim, latent_dim]
    coef, residual, log_std = a.state[:, 0].split(spans, dim=1)
    by_coef, by_mean, by_log_std = a.grad.split(spans, dim=1)
    relays, *layers = shared_views(shared.weights[0], shapes)
    by_relays, *by_layers = shared_views(a.shared_grad, shapes)

    _select(coef, model, a.kept)
    torch.mul(coef, a.kept, out=a.weight)
    mean = torch.addmm(residual, a.weight, relays)
    noise = reference.philox_normal(table.seed, "train", table.noise_step, rows, latent_dim, dtype=coef.dtype)
    sigma = log_std.exp()
    spread = sigma * noise
    z = mean + spread

    nll, by_z = _decode(z, batch, rows, model, layers, by_layers, a)
    share = model.kl_weight / len(rows)
    variance = sigma.square_()
    kl = float((0.5 * (mean.square() + variance) - log_std).sum(1).double().sum()) - 0.5 * mean.numel()
    torch.add(by_z, mean, alpha=share, out=by_mean)
    torch.mul(by_z, spread, out=by_log_std)
    by_log_std.add_(variance.sub_(1), alpha=share)
    torch.mul(by_mean @ relays.T, a.kept, out=by_coef)
    torch.mm(a.weight.T, by_mean, out=by_relays)
    return nll, kl


def _select(coef: Tensor, model: ElboModel, kept: Tensor) -> None:
    """1 at the selected coefficients, else 0: those of at least the |B|-th absolute value, where there are no ties."""
    magnitude, start = coef.abs().numpy(), 0
    for size, active in zip(model.groups, model.active, strict=True):
        span = slice(start, start + size)
        group = magnitude[:, span]
        threshold = np.partition(group, size - active, axis=1)[:, size - active]
        chosen = group >= threshold[:, None]
        if (np.count_nonzero(chosen, axis=1) == active).all():
            kept[:, span] = torch.from_numpy(chosen)
        else:  # ties, or NaN
            kept[:, span] = reference.select(coef[:, span], active)
        start += size


def _decode(
    z: Tensor,
    batch: Batch,
    rows: Tensor,
    model: ElboModel,
    layers: list[Tensor],
    by_layers: list[Tensor],
    a: Arrays,
) -> tuple[float, Tensor]:
    """The sum of nll, and the gradient of its mean by z [B, T]; those of the layers into by_layers."""
    depth = len(model.hidden)
    activation = reference.ACTIVATIONS[model.activation]
    inputs, before = [z], []
    for weight, bias in zip(layers[: 2 * depth : 2], layers[1 : 2 * depth : 2], strict=True):
        before.append(torch.addmm(bias, inputs[-1], weight.T))
        inputs.append(activation(before[-1]))
    features = torch.cat((inputs[-1], z), dim=1, out=a.features) if model.linear_path else inputs[-1]
    weight, bias = layers[2 * depth : 2 * depth + 2]
    torch.addmm(bias, features, weight.T, out=a.xhat)
    nll = _loss(batch, rows, model, layers, by_layers, a)  # a.xhat now holds the gradient
    torch.mm(a.xhat.T, features, out=by_layers[2 * depth])
    torch.sum(a.xhat, dim=0, out=by_layers[2 * depth + 1])
    grad = a.xhat @ weight
    by_linear = None
    if model.linear_path:
        grad, by_linear = grad[:, : grad.shape[1] - z.shape[1]], grad[:, grad.shape[1] - z.shape[1] :]
    for i in reversed(range(depth)):
        grad = DERIVATIVES[model.activation](grad, before[i], inputs[i + 1])
        torch.mm(grad.T, inputs[i], out=by_layers[2 * i])
        torch.sum(grad, dim=0, out=by_layers[2 * i + 1])
        grad = grad @ layers[2 * i]
    return nll, grad if by_linear is None else grad + by_linear


def _loss(
    batch: Batch, rows: Tensor, model: ElboModel, layers: list[Tensor], by_layers: list[Tensor], a: Arrays
) -> float:
    """The sum of nll; the gradient of its mean over rows replaces a.xhat."""
    at = slice(len(rows)) if batch.gathered else rows
    x, mask = twin_x(batch.x[at], None if batch.mask is None else batch.mask[at], batch.x_scale, a.x.dtype)
    bits = reference.INTEGERS[x.itemsize]
    torch.bitwise_and(x.contiguous().view(bits), mask.to(bits).neg_(), out=a.x.view(bits))  # 0 in holes, all else kept
    a.mask.copy_(mask)
    share = 1 / len(rows)
    if model.likelihood == "bernoulli":
        nll = _dot(torch.nn.functional.softplus(a.xhat).addcmul_(a.xhat, a.x, value=-1), a.mask)
        a.xhat.sigmoid_().sub_(a.x).mul_(a.mask).mul_(share)
        return nll
    r = a.xhat.sub_(a.x).mul_(a.mask)
    if not model.learned:
        r.mul_(1 / model.scale)
        nll = 0.5 * _dot(r, r) + int(torch.count_nonzero(mask)) * (math.log(model.scale) + HALF_LOG_2PI)
        r.mul_(share / model.scale)
        return nll
    exponent = torch.exp(2 * layers[-1])
    scale = torch.sqrt(model.scale**2 + exponent)
    r.div_(scale)
    squares = torch.einsum("bd,bd->d", r, r)
    count = a.mask.sum(0)
    torch.mul((count - squares) / scale, exponent / scale * share, out=by_layers[-1])
    r.mul_(share / scale)
    return 0.5 * float(squares.double().sum()) + float(torch.dot(count.double(), (scale.log() + HALF_LOG_2PI).double()))


def _dot(a: Tensor, b: Tensor) -> float:
    """The sum of a b, [B, D] each, whose rows are added up in float64: one float32 sum would lose the last digits."""
    return float(torch.linalg.vecdot(a, b).double().sum())


def _adam(
    p: Tensor,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    root: Tensor,
    number: int,
    lr: float,
    weight_decay: float,
    hyper: AdamHyper,
) -> None:
    """reference.adamw_step, in place; grad and root are used up."""
    bc1, bc2 = (float(c) for c in hyper.bias_corrections(number))
    m.lerp_(grad, 1 - hyper.beta1)
    v.lerp_(grad.square_(), 1 - hyper.beta2)
    torch.sqrt(v, out=root).mul_(1 / math.sqrt(bc2)).add_(hyper.eps)
    if weight_decay:
        p.mul_(1 - lr * weight_decay)
    p.addcdiv_(m, root, value=-lr / bc1)


def _step_shared(shared: SharedState, a: Arrays) -> None:
    shared.steps.add_(1)
    beta1, beta2, _, _, eps = shared.constants.tolist()
    hyper, number = AdamHyper(beta1, beta2, eps), int(shared.steps[0])
    spans = slice(shared.second), slice(shared.second, None)
    for span, (lr, weight_decay) in zip(spans, shared.rates.tolist(), strict=True):
        p, m, v = shared.weights[:, span]
        _adam(p, m, v, a.shared_grad[span], a.shared_root[span], number, lr, weight_decay, hyper)
