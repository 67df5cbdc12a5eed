"""The fused training step on a CPU: its backward by hand, products by BLAS, arrays that stay from step to step.

What it computes stands in `elbo._equations`. Elementwise work is in place: an array of a batch's cells that is made
anew costs more in page faults than the arithmetic on it. Part of it is NumPy's: torch.sqrt takes forty times as long
where it meets zeros, and a conversion of a random mask, or torch.where, several times as long as arithmetic on its
bits. docs/performance.md has the times.
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
from . import clock_cpu
from .noise_cpu import philox_normal

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
        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype)

        self.state, self.grad = empty(batch, 3, width), empty(batch, width)
        self.root, self.moved = empty(batch, width), empty(batch, width)
        self.chosen, self.kept = empty(batch, relays, dtype=torch.bool), empty(batch, relays, dtype=torch.int8)
        self.weight, self.by_weight = empty(batch, relays), empty(batch, relays)
        self.features = empty(batch, features)
        self.x, self.xhat = empty(batch, columns), empty(batch, columns)
        self.observed = empty(batch, columns, dtype=torch.int8)  # -1, all bits set, or 0
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
    table.values.numpy()[rows.numpy()] = a.state.numpy()
    torch.autograd.graph.increment_version(table.values)  # of which NumPy knows nothing
    table.last.numpy()[rows.numpy()] = clock.touched(last)
    clock_cpu.advance(clock, lr, weight_decay)
    table.noise_step.add_(1)
    _step_shared(shared, a)
    shared.loss[0] = torch.tensor((nll, kl, len(rows)), dtype=torch.float64)
    shared.loss[1] += shared.loss[0]


def _read_rows(table: RowState, rows: Tensor, last: Tensor, clock: AdamClock, a: Arrays) -> None:
    """The rows' p, m and v into a.state, brought up to date (reference.catch_up)."""
    np.take(table.values.numpy(), rows.numpy(), axis=0, out=a.state.numpy(), mode="clip")  # rows were checked
    if clock.index == 0:
        return
    p, m, v = a.state.unbind(1)
    missed = clock_cpu.missed(clock, last)
    exact = clock.exact_entries(p, m, v, last, missed)
    w1, e1, w2, e2, decay, decay_m, decay_v = torch.stack(missed).to(p.dtype)[:, :, None]
    eps, least = clock.hyper.eps, reference.least_root(p.dtype)  # which vanishes beside any root but 0
    _sqrt(v, a.root)
    torch.add(a.root, e1.mul_(eps).clamp_min_(least), out=a.moved)
    a.root.add_(e2.mul_(eps).clamp_min_(least))
    torch.div(w1, a.moved, out=a.moved)
    torch.div(w2, a.root, out=a.root)
    p.addcmul_(m, a.moved.add_(a.root), value=-1)
    if clock.history[clock_cpu.LOG_DECAY, clock.index]:
        p.mul_(decay)
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

    _select(coef, model, a)
    _kept_bits(coef, a.kept, out=a.weight)
    mean = torch.addmm(residual, a.weight, relays)
    noise = philox_normal(table.seed, "train", int(table.noise_step), rows, latent_dim, coef.dtype)
    sigma = torch.from_numpy(np.exp(log_std.numpy()))
    spread = sigma * noise
    z = mean + spread

    nll, by_z = _decode(z, batch, rows, model, layers, by_layers, a)
    share = model.kl_weight / len(rows)
    variance = sigma.square_()
    kl = float((0.5 * (mean.square() + variance) - log_std).sum(1).double().sum()) - 0.5 * mean.numel()
    torch.add(by_z, mean, alpha=share, out=by_mean)
    torch.mul(by_z, spread, out=by_log_std)
    by_log_std.add_(variance.sub_(1), alpha=share)
    torch.mm(by_mean, relays.T, out=a.by_weight)
    _kept_bits(a.by_weight, a.kept, out=by_coef)
    torch.mm(a.weight.T, by_mean, out=by_relays)
    return nll, kl


def _select(coef: Tensor, model: ElboModel, a: Arrays) -> None:
    """-1 in a.kept at the selected coefficients, those of at least the |B|-th absolute value; 0 elsewhere."""
    torch.abs(coef, out=a.weight)
    # order and comparison of numbers of one sign are those of their bits, which NumPy partitions in half the time
    magnitude, chosen = a.weight.view(reference.INTEGERS[coef.itemsize]).numpy(), a.chosen.numpy()
    start = 0
    for size, active in zip(model.groups, model.active, strict=True):
        span = slice(start, start + size)
        threshold = np.partition(magnitude[:, span], size - active, axis=1)[:, size - active]
        np.greater_equal(magnitude[:, span], threshold[:, None], out=chosen[:, span])
        start += size
    if np.count_nonzero(chosen) > len(coef) * sum(model.active):  # ties
        a.chosen.copy_(reference.selected(coef, model.groups, model.active))
    torch.neg(a.chosen.view(torch.int8), out=a.kept)


def _kept_bits(x: Tensor, kept: Tensor, out: Tensor) -> None:
    """x where `kept` is -1, 0 where it is 0, whatever x is there: NumPy widens `kept` with its sign, in its buffers."""
    bits = reference.INTEGERS[x.itemsize]
    np.bitwise_and(x.view(bits).numpy(), kept.numpy(), out=out.view(bits).numpy())


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


def _read_cells(batch: Batch, rows: Tensor, a: Arrays) -> tuple[Tensor, np.ndarray]:
    """x [B, D] of the model's dtype, anything in its holes, and which are observed; these in a.observed, too."""
    x, mask = batch.x, batch.mask
    if batch.gathered:
        x, mask = x[: len(rows)], None if mask is None else mask[: len(rows)]
    else:
        x = torch.index_select(x, 0, rows, out=a.x) if x.dtype == a.x.dtype else x[rows]
        mask = None if mask is None else mask[rows]
    if mask is None:
        observed = np.equal(x.numpy(), x.numpy()) if x.dtype != torch.bfloat16 else (~x.isnan()).numpy()  # no NaN
    elif mask.dtype == torch.uint8:
        observed = np.unpackbits(mask.numpy(), axis=1, count=x.shape[1], bitorder="little").view(bool)
    else:
        observed = mask.numpy()
    np.negative(observed.view(np.int8), out=a.observed.numpy())
    if x.dtype != a.x.dtype or batch.x_scale != 1:
        x = a.x.copy_(x) if batch.x_scale == 1 else a.x.copy_(x).mul_(batch.x_scale)
    return x, observed


def _loss(
    batch: Batch, rows: Tensor, model: ElboModel, layers: list[Tensor], by_layers: list[Tensor], a: Arrays
) -> float:
    """The sum of nll; the gradient of its mean over rows replaces a.xhat."""
    x, observed = _read_cells(batch, rows, a)
    share = 1 / len(rows)
    if model.likelihood == "bernoulli":
        cross_entropy = torch.nn.functional.softplus(a.xhat).addcmul_(a.xhat, x, value=-1)
        _kept_bits(cross_entropy, a.observed, out=cross_entropy)
        r = a.xhat.sigmoid_().sub_(x)
        _kept_bits(r, a.observed, out=r)
        r.mul_(share)
        return float(cross_entropy.sum(1).double().sum())
    r = a.xhat.sub_(x)
    _kept_bits(r, a.observed, out=r)
    if not model.learned:
        nll = 0.5 / model.scale**2 * _sum_of_squares(r)
        r.mul_(share / model.scale**2)
        return nll + int(np.count_nonzero(observed)) * (math.log(model.scale) + HALF_LOG_2PI)
    exponent = torch.exp(2 * layers[-1])
    scale = torch.sqrt(model.scale**2 + exponent)
    r.div_(scale)
    squares = torch.square(r, out=a.x).sum(0)
    count = torch.from_numpy(np.add.reduce(observed.view(np.int8), axis=0, dtype=np.int32)).to(r.dtype)
    torch.mul((count - squares) / scale, exponent / scale * share, out=by_layers[-1])
    r.mul_(share / scale)
    return 0.5 * float(squares.double().sum()) + float(torch.dot(count.double(), (scale.log() + HALF_LOG_2PI).double()))


def _sum_of_squares(a: Tensor) -> float:
    """Of [B, D], whose rows are added up in float64: one float32 sum would lose the last digits."""
    return float(np.vecdot(a.numpy(), a.numpy()).sum(dtype=np.float64))


def _sqrt(v: Tensor, out: Tensor) -> None:
    np.sqrt(v.numpy(), out=out.numpy())


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
    bc1, bc2 = hyper.bias_corrections_at(number)
    m.lerp_(grad, 1 - hyper.beta1)
    v.lerp_(grad.square_(), 1 - hyper.beta2)
    _sqrt(v, root)
    torch.add(torch.tensor(hyper.eps, dtype=root.dtype), root, alpha=1 / math.sqrt(bc2), out=root)
    if weight_decay:
        p.mul_(1 - lr * weight_decay)
    p.addcdiv_(m, root, value=-lr / bc1)


def _step_shared(shared: SharedState, a: Arrays) -> None:
    shared.steps.add_(1)
    beta1, beta2, _, _, eps = shared.constants.tolist()
    hyper, number = AdamHyper(beta1, beta2, eps), int(shared.steps[0])
    spans = [slice(shared.second), *([slice(shared.second, None)] if shared.second < len(a.shared_grad) else [])]
    for span, (lr, weight_decay) in zip(spans, shared.rates.tolist(), strict=False):
        p, m, v = shared.weights[:, span]
        _adam(p, m, v, a.shared_grad[span], a.shared_root[span], number, lr, weight_decay, hyper)
