"""Posteriors of new rows: relays and decoder frozen, each row's own parameters fitted by Adam."""

from __future__ import annotations

import collections
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import reference
from .clock import AdamClock
from .model import RowModel
from .observations import ColumnUnits, Observations
from .reference import AdamHyper
from .train.plan import SCHEDULES
from .train.trainer import BAR_DELAY_S

BLOCK = 64  # rows fitted together, always exactly so many: a row's bits do not depend on the call it came in
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
    clocks = clocks_between_visits(plan, model.decoder.head.weight.device)
    bar = tqdm(total=-(-len(data) // BLOCK), delay=BAR_DELAY_S, disable=not show_progress, unit="block", leave=False)

    def fit(block: slice) -> tuple[Tensor, ...]:
        return _fit_block(model, data, units, row_ids, block, plan, clocks)

    blocks = []
    with bar:
        for block in map_blocks(fit, len(data)):
            blocks.append(block)
            bar.update()
    mean, std, elbo, converged, parameters = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return Posterior(mean, std, elbo, converged, row_ids, parameters)


def map_blocks(function: Callable[[slice], Any], num_rows: int) -> Iterator[Any]:
    """function(block) for blocks of 64 rows, in order: one thread a block, blocks in parallel.

    Matmuls change bits with the shape of the batch and with their thread count; both are fixed here.
    """
    blocks = [slice(start, start + BLOCK) for start in range(0, num_rows, BLOCK)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pool = ThreadPoolExecutor(min(threads, len(blocks)))
        try:
            futures = [pool.submit(contextvars.copy_context().run, function, block) for block in blocks]
            yield from (future.result() for future in futures)
        finally:
            pool.shutdown(cancel_futures=True)  # an error or Ctrl-C waits for the blocks at work only
    finally:
        torch.set_num_threads(threads)


def padded_block(t: Tensor) -> Tensor:
    """t with zero rows added up to a full block."""
    return torch.cat((t, t.new_zeros(BLOCK - len(t), *t.shape[1:]))) if len(t) < BLOCK else t


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


def _fit_block(
    model: RowModel,
    data: Observations,
    units: ColumnUnits,
    row_ids: Tensor,
    block: slice,
    plan: InferencePlan,
    clocks: list[AdamClock] | None,
) -> tuple[Tensor, ...]:
    x, mask = units.to_model(*data.read(block))
    size = len(x)
    device = model.decoder.head.weight.device
    x, mask, ids = (padded_block(t).to(device) for t in (x, mask, row_ids[block]))
    posterior = model.posterior
    p, v = collections.deque(trajectory(model, x, mask, ids, plan, clocks), maxlen=1).pop()
    empty = ~mask.any(1)
    p = _prior_where(posterior, p, empty)
    elbo = _elbo(model, p, x, mask, ids, plan.seed)
    converged = empty | _cannot_gain(model, p, v, elbo, x, mask, ids, plan)
    with torch.no_grad():
        mean, std = posterior.mean_of(p), posterior.log_std_of(p).exp()
    return tuple(t[:size].cpu() for t in (mean, std, elbo, converged, p))


def trajectory(
    model: RowModel, x: Tensor, mask: Tensor, ids: Tensor, plan: InferencePlan, clocks: list[AdamClock] | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows' parameters and their second moments, [B, C] each, after every step of the plan.

    x [B, D] in the model's units and mask, bool [B, D]; ids int64 [B]; clocks: clocks_between_visits(plan, device).
    """
    p = model.posterior.initial_values(ids).to(x.device)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step in range(plan.steps):
        grad = _gradient(model, p, x, mask, ids, step, plan.seed)
        p, m, v = reference.adamw_step(p, m, v, grad, plan.adam_step(step), plan.lr_at(step), HYPER)
        yield p, v
        if clocks is not None and step < plan.steps - 1:
            p, m, v = _age(p, m, v, clocks[step], plan.missed)


def _gradient(
    model: RowModel, p: Tensor, x: Tensor, mask: Tensor, ids: Tensor, step: int, seed: int, draw: int = 0
) -> Tensor:
    """Gradient of each row's own loss [B, C]: rows do not see each other."""
    with torch.enable_grad():
        p = p.detach().requires_grad_()
        z, kl = model.posterior.sample_values(p, row_ids=ids, stream="infer", step=step, seed=seed, draw=draw)
        loss = model.row_loss(model.likelihood.nll(model.decoder(z), x, mask), kl)
        (grad,) = torch.autograd.grad(loss.sum(), p)
    return grad


def _cannot_gain(
    model: RowModel, p: Tensor, v: Tensor, elbo: Tensor, x: Tensor, mask: Tensor, ids: Tensor, plan: InferencePlan
) -> Tensor:
    """Which rows more steps at the full rate would not improve (a rate gone to 0 proves nothing), bool [B]."""
    draws = range(ELBO_DRAWS + 1, 2 * ELBO_DRAWS + 1)  # not those that judge: any row can gain on draws it is fitted to
    grad = sum(_gradient(model, p, x, mask, ids, 0, plan.seed, draw) for draw in draws) / ELBO_DRAWS
    bc2 = HYPER.bias_corrections(plan.adam_step(plan.steps - 1))[1].to(v)
    direction = plan.lr * grad / ((v / bc2).sqrt() + HYPER.eps)
    gains = [_elbo(model, p - steps * direction, x, mask, ids, plan.seed) - elbo for steps in PROBES]
    return torch.stack(gains).amax(0) <= CONVERGED * (1 + elbo.abs())


def _age(p: Tensor, m: Tensor, v: Tensor, clock: AdamClock, missed: int) -> tuple[Tensor, Tensor, Tensor]:
    p_now, m_now, v_now = clock.catch_up(p, m, v, torch.zeros(len(p), dtype=torch.int32, device=p.device))
    beyond = missed - clock.index
    return p_now, m_now * HYPER.beta1**beyond, v_now * HYPER.beta2**beyond


def _prior_where(posterior: torch.nn.Module, p: Tensor, empty: Tensor) -> Tensor:
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
