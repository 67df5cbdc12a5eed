"""A whole training step, fused: the negative ELBO of a batch, its gradients, and Adam of everything that they move."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch, reference
from ..clock import AdamClock
from ..reference import AdamHyper
from . import elbo_cpu
from .checks import check_distinct_rows, check_one_device, values_at_hand
from .likelihoods import check_x, twin_x
from .registry import operator

WIDEST = 128  # latent dimensions and hidden units that a block of rows has room for


class ElboModel(NamedTuple):
    """What a step needs to know of a model whose rows have an MLP decoder, besides its tensors."""

    groups: tuple[int, ...]  # of relays; none: a row's residual is its mean
    active: tuple[int, ...]
    hidden: tuple[int, ...]
    linear_path: bool
    activation: str
    likelihood: str  # "gaussian" or "bernoulli"
    scale: float  # of a Gaussian: the fixed one, or the least of learned ones
    learned: bool  # a scale for every column, sqrt(scale^2 + exp(2 s))
    kl_weight: float

    def shared_shapes(self, latent_dim: int, columns: int) -> list[tuple[int, ...]]:
        """Of the shared parameters as they lie in memory: relays, then weight and bias by layer, then a learned s."""
        features = self.hidden[-1] + latent_dim if self.linear_path else (latent_dim, *self.hidden)[-1]
        widths = [*itertools.pairwise((latent_dim, *self.hidden)), (features, columns)]
        layers = [shape for n_in, n_out in widths for shape in ((n_out, n_in), (n_out,))]
        return [(sum(self.groups), latent_dim), *layers, *([(columns,)] if self.learned else [])]


class RowState(NamedTuple):
    """A table of rows, its clock (kernels/catch_up.py) and its noise."""

    values: Tensor  # [N, 3, C]: p, m, v of coefficients, residual and log_std
    last: Tensor  # int32 [N]
    history: Tensor
    counters: Tensor
    constants: Tensor
    rates: Tensor
    closed_form: bool
    noise_step: Tensor  # int64 []
    seed: int


class Batch(NamedTuple):
    """What a step is taken on."""

    rows: Tensor  # int64 [B], in the table
    present: Tensor  # int64 []: how many of them are there, 1 or more
    x: Tensor  # [N, D], or the batch's own [B, D]
    mask: Tensor | None
    x_scale: float
    gathered: bool


class SharedState(NamedTuple):
    """The parameters that all rows share, flat, and how Adam moves them."""

    weights: Tensor  # [3, P]: p, m, v
    constants: Tensor  # float64 [5], as of a clock
    rates: Tensor  # float64 [2, 2]: lr and weight decay up to parameter `second`, and from there on
    steps: Tensor  # float32 [n]: Adam's step count, in one copy for each parameter as torch's Adam has them
    second: int
    loss: Tensor  # float64 [2, 3]: nll, kl and rows of this step, and summed over all steps


def shared_views(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The pieces of flat [P], in their shapes."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    return [piece.view(shape) for piece, shape in zip(flat.split(sizes), shapes, strict=True)]


def unsupported(values: Tensor, latent_dim: int, model: ElboModel) -> str | None:
    """What keeps the fused step from a model with such a table, if anything does."""
    compiled = values.device.type == "cuda"  # Triton 3.6 fails on tl.dot of float64
    if values.dtype not in ((torch.float32,) if compiled else (torch.float32, torch.float64)):
        return f"{values.dtype} tables"
    kernels = values.device.type != "cpu" or dispatch.use_triton("elbo_step", values.device)
    if kernels and not model.groups:
        return "rows without relays"
    if kernels and max(latent_dim, *model.hidden, 0) > WIDEST:
        return f"latent_dim or hidden layers above {WIDEST}"
    return None


def elbo_step_(
    table: RowState, batch: Batch, shared: SharedState, model: ElboModel, kept: dict[Any, Any] | None = None
) -> None:
    """One step on the mean over rows of -log p(x_observed | z) + kl_weight KL, in place (eq. 2; docs/math.md).

    batch: rows without repeats; x and mask of all rows of the data, read at `rows`, or the batch's own, `gathered`; x
    of any dtype, times x_scale; mask bool, or its bits, or None (NaN is missing). Moves the rows, the shared
    parameters, the clock, the noise's step number, and `shared.loss`. kept: a dict of the caller's, for what
    steps of the same parameters need not make anew.
    """
    columns = shared_columns(shared, table, model)
    cells = len(batch.rows) if batch.gathered else table.values.shape[0]
    check_x(batch.x, batch.mask, batch.x_scale, {"B": cells, "D": columns})
    tensors = {"rows": batch.rows, "count": batch.present, "x": batch.x, "mask": batch.mask}
    check_one_device(table=table.values, weights=shared.weights, **tensors)
    rows = batch.rows
    if values_at_hand(rows):
        if not 1 <= int(batch.present) <= len(rows):
            raise ValueError(f"count must lie in 1 .. {len(rows)}, the number of rows; got {int(batch.present)}")
        rows = rows[: int(batch.present)]
    check_distinct_rows(rows, table.values.shape[0])
    if len(batch.rows):
        batch = batch._replace(rows=batch.rows.long().contiguous())
        if torch.compiler.is_compiling() or batch.rows.is_cuda:
            _elbo_step_(*table, *batch, *shared, *model)
        else:
            _take(table, batch, shared, model, {} if kept is None else kept)  # the boundary is dear: 36 arguments


def shared_columns(shared: SharedState, table: RowState, model: ElboModel) -> int:
    """D, from the number of shared parameters."""
    fixed, one = _shared_sizes(model, (table.values.shape[2] - sum(model.groups)) // 2)
    return (shared.weights.shape[1] - fixed) // one


@functools.lru_cache(maxsize=16)
def _shared_sizes(model: ElboModel, latent_dim: int) -> tuple[int, int]:
    """Shared parameters of a model of no columns, and those that one more column adds."""
    none, one = (sum(torch.Size(s).numel() for s in model.shared_shapes(latent_dim, d)) for d in (0, 1))
    return none, one - none


def _run(*args: Any) -> None:
    _take(RowState(*args[:9]), Batch(*args[9:15]), SharedState(*args[15:21]), ElboModel(*args[21:]), {})


def _take(table: RowState, batch: Batch, shared: SharedState, model: ElboModel, kept: dict[Any, Any]) -> None:
    latent_dim = (table.values.shape[2] - sum(model.groups)) // 2
    if dispatch.use_triton("elbo_step", table.values.device, unsupported(table.values, latent_dim, model)):
        launch(table, batch, shared, model)
    elif dispatch.use_numba(table.values.device):
        elbo_cpu.step(table, batch, shared, model, kept)
    else:
        _equations(table, batch, shared, model)


def launch(table: RowState, batch: Batch, shared: SharedState, model: ElboModel) -> None:
    from ..kernels.elbo_step import elbo_finish, elbo_rows

    clock = (table.history, table.counters, table.constants, table.rates)
    closed_form, noise_step = table.closed_form, table.noise_step
    rows = table.values, table.last, clock, closed_form, noise_step, table.seed
    partials, losses = elbo_rows(*rows, *batch, shared.weights, shared.steps, **model._asdict())
    elbo_finish(partials, losses, clock, closed_form, noise_step, batch.present, *shared)


def _equations(table: RowState, batch: Batch, shared: SharedState, model: ElboModel) -> None:
    rows = batch.rows[: int(batch.present)]
    at = slice(len(rows)) if batch.gathered else rows
    mask = None if batch.mask is None else batch.mask[at]
    x, mask = twin_x(batch.x[at], mask, batch.x_scale, table.values.dtype)
    clock = AdamClock.of(table.history, table.counters, table.constants, table.rates)
    last = table.last[rows]
    p, m, v = table.values[rows].unbind(1)
    p, m, v = clock.catch_up(p, m, v, last)
    leaves = p.detach().requires_grad_(), shared.weights[0].detach().clone().requires_grad_()
    with torch.enable_grad():
        nll, kl = _losses(*leaves, table, rows, x, mask, model)
        d_rows, d_shared = torch.autograd.grad((nll + model.kl_weight * kl).mean(), leaves)
    with torch.no_grad():
        lr, weight_decay = table.rates.tolist()
        stepped = reference.adamw_step(p, m, v, d_rows, clock.next_step(last), lr, clock.hyper, weight_decay)
        table.values[rows] = torch.stack(stepped, dim=1)
        table.last[rows] = torch.as_tensor(clock.touched(last), dtype=torch.int32, device=last.device)
        clock.advance(lr, weight_decay)
        table.noise_step.add_(1)
        _step_shared(shared, d_shared)
        sums = torch.stack((nll.sum(), kl.sum(), nll.new_tensor(len(rows)))).double()
        shared.loss[0] = sums
        shared.loss[1] += sums


def _losses(
    row: Tensor, flat: Tensor, table: RowState, rows: Tensor, x: Tensor, mask: Tensor, model: ElboModel
) -> tuple[Tensor, Tensor]:
    """nll [B] and kl [B] of rows with parameters `row` [B, C] under the shared parameters flat [P]."""
    latent_dim = (row.shape[1] - sum(model.groups)) // 2
    relays, *layers = shared_views(flat, model.shared_shapes(latent_dim, x.shape[1]))
    noise = reference.philox_normal(table.seed, "train", table.noise_step, rows, latent_dim, dtype=row.dtype)
    scale = torch.full((), model.scale, dtype=row.dtype, device=row.device)
    if model.learned:
        scale = torch.sqrt(scale**2 + torch.exp(2 * layers.pop()))
    pairs = list(zip(layers[::2], layers[1::2], strict=True))
    return reference.row_losses(
        row, noise, x, mask, relays, pairs, scale, model.groups, model.active,
        model.activation, model.linear_path, model.likelihood,
    )  # fmt: skip


def _step_shared(shared: SharedState, grad: Tensor) -> None:
    shared.steps.add_(1)
    beta1, beta2, _, _, eps = shared.constants.tolist()
    hyper, step = AdamHyper(beta1, beta2, eps), int(shared.steps[0])
    for span, (lr, weight_decay) in zip(
        (slice(shared.second), slice(shared.second, None)), shared.rates.tolist(), strict=True
    ):
        p, m, v = (block[None] for block in shared.weights[:, span])
        stepped = reference.adamw_step(p, m, v, grad[None, span], step, lr, hyper, weight_decay)
        shared.weights[:, span] = torch.cat(stepped)


_elbo_step_ = operator(
    "elbo_step_(Tensor(a!) values, Tensor(b!) last, Tensor(c!) history, Tensor(d!) counters, Tensor constants, "
    "Tensor rates, bool closed_form, Tensor(e!) noise_step, int seed, "
    "Tensor rows, Tensor count, Tensor x, Tensor? mask, float x_scale, bool gathered, "
    "Tensor(f!) weights, Tensor weight_constants, Tensor weight_rates, Tensor(g!) weight_steps, int second, "
    "Tensor(h!) loss, int[] groups, int[] active, int[] hidden, bool linear_path, str activation, str likelihood, "
    "float scale, bool learned, float kl_weight) -> ()",
    _run,
    lambda *args: None,
)
