"""Posteriors of new rows: relays and decoder frozen, each row's own parameters fitted by Adam."""

from __future__ import annotations

import collections
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import dispatch, reference
from .clock import AdamClock
from .elbo_step import _form, _shared_parameters
from .likelihoods import Bernoulli, Gaussian
from .model import RowModel
from .nn import MLPDecoder, RelayPosterior
from .observations import ColumnUnits, Observations
from .ops.fit_rows import FittedRows, fit_rows, unsupported
from .reference import AdamHyper
from .train.plan import SCHEDULES
from .train.trainer import BAR_DELAY_S

BLOCK = 64  # rows fitted together, always exactly so many: a row's bits do not depend on the call it came in
CELLS_OF_LAUNCH, ROWS_OF_LAUNCH = 1 << 26, 1 << 17  # at most, where a kernel fits rows, which share nothing there
LAUNCHES_AT_ONCE = 2  # one is read while the other is fitted
ROWS_OF_TEST = 1 << 14  # whose convergence is tested together then, always exactly so many
ELBO_DRAWS = 8  # samples of z in the ELBO that is reported
CONVERGED = 0.01  # a row has converged if PROBES more steps at the full rate would not raise its ELBO by a larger share
PROBES = (1, 10)

HYPER = AdamHyper(0.9, 0.999, 1e-8)
PROTOCOLS = ("row", "epochs")


@dataclasses.dataclass
class Posterior:
    """q(z|x) of M rows.

    mean, std: [M, T]; elbo: [M], nats, in the model's units; converged: bool [M]; row_ids: int64 [M], what the rows'
    noise is keyed by; parameters: the rows' own parameters [M, C] (coefficients, residual, log std), None for a VAE.
    """

    mean: Tensor
    std: Tensor
    elbo: Tensor
    converged: Tensor
    row_ids: Tensor
    parameters: Tensor | None = None

    def __len__(self) -> int:
        return len(self.mean)


@dataclasses.dataclass
class InferencePlan:
    """How new rows are fitted. missed: the steps of the table between two visits of a row (protocol "epochs")."""

    steps: int
    lr: float
    schedule: str
    seed: int
    missed: int = 0

    def adam_step(self, visit: int) -> int:
        """Adam's step number of a visit of the row (from 0)."""
        return 1 + visit * (self.missed + 1)

    def lr_at(self, step: int) -> float:
        return self.lr * SCHEDULES[self.schedule](step / self.steps)


def fit_new_rows(
    model: RowModel, data: Observations, units: ColumnUnits, row_ids: Tensor, plan: InferencePlan, show_progress: bool
) -> Posterior:
    """Fit the rows of `data` block by block. Each result depends on its row and row id alone.

    row_ids: int64 [M]. A row with nothing observed gets the prior.
    """
    launch = one_launch(model, plan)
    if launch is None:
        clocks = clocks_between_visits(plan, model.decoder.head.weight.device)
        size, workers, fit_block = BLOCK, torch.get_num_threads(), functools.partial(_fit_block, clocks)
    else:
        size = max(1, min(ROWS_OF_LAUNCH, CELLS_OF_LAUNCH // data.num_columns))
        workers, fit_block = LAUNCHES_AT_ONCE, functools.partial(_fit_in_one_launch, launch)
    bar = tqdm(total=-(-len(data) // size), delay=BAR_DELAY_S, disable=not show_progress, unit="block", leave=False)

    def fit(block: slice) -> tuple[Tensor, ...]:
        return fit_block(model, data, units, row_ids, block, plan)

    blocks = []
    with bar:
        for block in map_blocks(fit, len(data), size, workers):
            blocks.append(block)
            bar.update()
    mean, std, elbo, converged, parameters = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return Posterior(mean, std, elbo, converged, row_ids, parameters)


def map_blocks(
    function: Callable[[slice], Any], num_rows: int, size: int = BLOCK, workers: int | None = None
) -> Iterator[Any]:
    """function(block) for blocks of `size` rows, in order: one thread a block, blocks in parallel.

    Matmuls change bits with the shape of the batch and with their thread count; both are fixed here.
    """
    blocks = [slice(start, start + size) for start in range(0, num_rows, size)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pool = ThreadPoolExecutor(min(workers or threads, len(blocks)))
        try:
            futures = [pool.submit(contextvars.copy_context().run, function, block) for block in blocks]
            yield from (future.result() for future in futures)
        finally:
            pool.shutdown(cancel_futures=True)  # an error or Ctrl-C waits for the blocks at work only
    finally:
        torch.set_num_threads(threads)


def padded_block(t: Tensor, size: int = BLOCK) -> Tensor:
    """t with zero rows added up to a full block."""
    return torch.cat((t, t.new_zeros(size - len(t), *t.shape[1:]))) if len(t) < size else t


def clocks_between_visits(plan: InferencePlan, device: torch.device) -> list[AdamClock] | None:
    """For protocol "epochs": the steps of dense Adam between a row's visits, which age it. One clock a visit."""
    if plan.missed == 0:
        return None
    clocks = []
    window = HYPER.window() or 0
    for visit in range(plan.steps):
        clock = AdamClock(HYPER, steps=plan.adam_step(visit), device=device)
        for _ in range(min(plan.missed, window)):  # momentum is spent after `window` steps
            clock.advance(plan.lr_at(visit))
        clocks.append(clock)
    return clocks


def one_launch(model: RowModel, plan: InferencePlan) -> Callable[..., FittedRows] | None:
    """ops.fit_rows for this model and plan, but for start, row_ids, x and mask; None where its kernel cannot run."""
    posterior, device = model.posterior, model.decoder.head.weight.device
    linear = not isinstance(posterior, RelayPosterior) or posterior.coefficients == "linear"
    known = type(model.decoder) is MLPDecoder and type(model.likelihood) in (Gaussian, Bernoulli)
    if plan.missed or not (linear and known):
        return None
    form, dtype = _form(model), model.decoder.head.weight.dtype
    if unsupported(dtype, device, posterior.latent_dim, form) or not dispatch.use_triton("fit_rows", device):
        return None
    weights = torch.cat([parameter.detach().reshape(-1) for parameter in _shared_parameters(model)])
    rates = torch.tensor([plan.lr_at(step) for step in range(plan.steps)], dtype=torch.float64, device=device)
    return functools.partial(
        fit_rows, weights=weights, model=form, rates=rates, hyper=HYPER, seed=plan.seed, draws=ELBO_DRAWS
    )


def _fit_in_one_launch(
    launch: Callable[..., FittedRows],
    model: RowModel,
    data: Observations,
    units: ColumnUnits,
    row_ids: Tensor,
    block: slice,
    plan: InferencePlan,
) -> tuple[Tensor, ...]:
    device = model.decoder.head.weight.device
    x, mask = units.to_model(*data.read(block))
    x, mask, ids = (t.to(device) for t in (x, mask, row_ids[block]))
    fit = launch(model.posterior.initial_values(ids), ids, x, mask)
    empty = ~mask.any(1)
    p = _prior_where(fit.parameters, empty)
    no_steps = torch.empty(0, dtype=torch.float64, device=device)

    def elbo_at(p: Tensor) -> Tensor:
        return launch(p, ids, x, mask, rates=no_steps).elbo

    elbo = torch.where(empty, 0.0, fit.elbo)  # the prior's
    grad = _mean_gradient(model, p, x, mask, ids, plan.seed, ROWS_OF_TEST)
    converged = empty | _cannot_gain(p, fit.second, grad, elbo, elbo_at, plan)
    return _results(model, p, elbo, converged)


def _fit_block(
    clocks: list[AdamClock] | None,
    model: RowModel,
    data: Observations,
    units: ColumnUnits,
    row_ids: Tensor,
    block: slice,
    plan: InferencePlan,
) -> tuple[Tensor, ...]:
    x, mask = units.to_model(*data.read(block))
    size = len(x)
    device = model.decoder.head.weight.device
    x, mask, ids = (padded_block(t).to(device) for t in (x, mask, row_ids[block]))
    p, v = collections.deque(trajectory(model, x, mask, ids, plan, clocks), maxlen=1).pop()
    empty = ~mask.any(1)
    p = _prior_where(p, empty)
    elbo_at = functools.partial(_elbo, model, x=x, mask=mask, ids=ids, seed=plan.seed)
    elbo = elbo_at(p)
    grad = _mean_gradient(model, p, x, mask, ids, plan.seed, BLOCK)
    converged = empty | _cannot_gain(p, v, grad, elbo, elbo_at, plan)
    return tuple(t[:size] for t in _results(model, p, elbo, converged))


@torch.no_grad()
def _results(model: RowModel, p: Tensor, elbo: Tensor, converged: Tensor) -> tuple[Tensor, ...]:
    mean, std = model.posterior.mean_of(p), model.posterior.log_std_of(p).exp()
    return tuple(t.cpu() for t in (mean, std, elbo, converged, p))


def trajectory(
    model: RowModel, x: Tensor, mask: Tensor, ids: Tensor, plan: InferencePlan, clocks: list[AdamClock] | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows' parameters and their second moments, [B, C] each, after every step of the plan.

    x [B, D] in the model's units and mask, bool [B, D]; ids int64 [B]; clocks: clocks_between_visits(plan, device).
    """

    def age(step: int, p: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (p, m, v) if clocks is None else _age(p, m, v, clocks[step], plan.missed)

    start = model.posterior.initial_values(ids).to(x.device)
    loss = functools.partial(_loss, model, plan.seed, x, mask, ids)
    rates = [plan.lr_at(step) for step in range(plan.steps)]
    for fit in reference.fit_rows(start, loss, rates, HYPER, plan.missed, age):
        yield fit.p, fit.v


def _loss(
    model: RowModel, seed: int, x: Tensor, mask: Tensor, ids: Tensor, p: Tensor, step: int, draw: int = 0
) -> Tensor:
    """Each row's own loss [B]."""
    z, kl = model.posterior.sample_values(p, row_ids=ids, stream="infer", step=step, seed=seed, draw=draw)
    return model.row_loss(model.likelihood.nll(model.decoder(z), x, mask), kl)


def _mean_gradient(model: RowModel, p: Tensor, x: Tensor, mask: Tensor, ids: Tensor, seed: int, rows: int) -> Tensor:
    """The mean of the loss's gradient [B, C] over draws of z, `rows` rows at a time.

    Other draws than those that the ELBO is judged by: any row can gain on draws that it is fitted to.
    """
    means = []
    for first in range(0, len(p), rows):
        part = slice(first, first + rows)
        of_part, x_part, mask_part, ids_part = (padded_block(t[part], rows) for t in (p, x, mask, ids))
        loss = functools.partial(_loss, model, seed, x_part, mask_part, ids_part)
        total = torch.zeros_like(of_part)
        for draw in range(ELBO_DRAWS + 1, 2 * ELBO_DRAWS + 1):
            total += reference.row_gradient(of_part, loss, 0, draw)
        means.append((total / ELBO_DRAWS)[: len(p[part])])
    return torch.cat(means)


def _cannot_gain(
    p: Tensor, v: Tensor, grad: Tensor, elbo: Tensor, elbo_at: Callable[[Tensor], Tensor], plan: InferencePlan
) -> Tensor:
    """Which rows more steps at the full rate would not improve (a rate gone to 0 proves nothing), bool [B]."""
    bc2 = HYPER.bias_corrections(plan.adam_step(plan.steps - 1))[1].to(v)
    direction = plan.lr * grad / ((v / bc2).sqrt() + HYPER.eps)
    gains = [elbo_at(p - steps * direction) - elbo for steps in PROBES]
    return torch.stack(gains).amax(0) <= CONVERGED * (1 + elbo.abs())


def _age(p: Tensor, m: Tensor, v: Tensor, clock: AdamClock, missed: int) -> tuple[Tensor, Tensor, Tensor]:
    p_now, m_now, v_now = clock.catch_up(p, m, v, torch.zeros(len(p), dtype=torch.int32, device=p.device))
    beyond = missed - clock.index
    return p_now, m_now * HYPER.beta1**beyond, v_now * HYPER.beta2**beyond


def _prior_where(p: Tensor, empty: Tensor) -> Tensor:
    """Rows with nothing observed have the prior as their exact optimum: zero mean, unit standard deviation."""
    return torch.where(empty[:, None], torch.zeros_like(p), p)


@torch.no_grad()
def _elbo(model: RowModel, p: Tensor, x: Tensor, mask: Tensor, ids: Tensor, seed: int) -> Tensor:
    """Mean over fixed draws of z of the rows' ELBO [B]."""
    total = torch.zeros(len(p), device=p.device)
    for draw in range(1, ELBO_DRAWS + 1):
        z, kl = model.posterior.sample_values(p, row_ids=ids, stream="infer", seed=seed, draw=draw)
        total -= model.likelihood.nll(model.decoder(z), x, mask) + kl
    return total / ELBO_DRAWS
