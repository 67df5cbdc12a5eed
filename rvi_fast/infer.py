"""Posteriors of new rows: relays and decoder frozen, each row's own parameters fitted by Adam."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch, reference
from .clock import AdamClock
from .elbo_step import form_of, shared_parameters
from .likelihoods import Bernoulli, Gaussian, Likelihood
from .linearization import Linearization
from .model import RowModel
from .nn import MLPDecoder, RelayPosterior
from .observations import ColumnUnits, Observations
from .one_thread import one_thread, stay_alone
from .ops import fit_rows_cpu
from .ops.fit_rows import fit_rows, row_gradients, unsupported
from .progress import progress_bar
from .reference import AdamHyper
from .row_products import row_products
from .starts import LinearStart
from .train.plan import SCHEDULES

BLOCK = 64  # rows that PyTorch fits together, always exactly so many: a row's bits do not depend on their call
BLOCKS_AT_ONCE = 16  # that a thread takes at most
ROWS_OF_LOOPS = 512  # that the CPU's loops step together at most: a call costs nearly as much for a few
CELLS_OF_LAUNCH, ROWS_OF_LAUNCH = 1 << 26, 1 << 17  # at most, where a kernel fits rows, which share nothing there
LAUNCHES_AT_ONCE = 2  # one is read while the other is fitted
ROWS_OF_PRODUCTS = 1 << 12  # that PyTorch's products see together then, always exactly so many
ELBO_DRAWS = 8  # samples of z in the ELBO that is reported
OTHER_DRAWS = range(ELBO_DRAWS + 1, 2 * ELBO_DRAWS + 1)
CONVERGED = 0.01  # a row has converged if PROBES more steps at the full rate would not raise its ELBO by a larger share
PROBES = (1, 10)
IMPROBABLE = 4.5  # nats a cell beyond the least: of a Gaussian, off by three scales in the root mean square
FIRST_ROUND = 0.25  # of the steps; only rows that have not converged then take the others, and start again at last,
LEAST_ROUND = 40  # unless they are fewer than this

TRAINING_ADAM = AdamHyper(0.9, 0.999, 1e-8)
ROW_ADAM = AdamHyper(0.5, 0.999, 1e-8)  # with less momentum a descent gets as far in 60 steps as with 0.9 in 100
PROTOCOLS = ("row", "epochs")
STARTS = ("linear", "prior")
ROW_LR, ROW_SCHEDULE = 0.1, "cosine"  # of protocol "row"; docs/inference.md has the times


class Parts(NamedTuple):
    """How rows are cut for a function: `most` rows at a time, filled up with zeros to a multiple of `unit`."""

    most: int
    unit: int


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
    """How new rows are fitted. missed: the steps of the table between two visits of a row (protocol "epochs"). start:
    "linear" (LinearStart), "prior" (the values that training rows start from), or None (where they are). stop_early:
    whether rows that have converged after the first round take no further steps, and rows that stick start again.
    hyper: of the rows' Adam."""

    steps: int
    lr: float
    schedule: str
    seed: int
    missed: int = 0
    start: str | None = "prior"
    stop_early: bool = False
    hyper: AdamHyper = ROW_ADAM

    def adam_step(self, visit: int) -> int:
        """Adam's step number of a visit of the row (from 0)."""
        return 1 + visit * (self.missed + 1)

    def lr_at(self, step: int) -> float:
        return self.lr * SCHEDULES[self.schedule](step / self.steps)

    def rounds(self) -> list[InferencePlan]:
        """A first descent for all rows; then, for those that have not converged by then or are improbable, a second one
        from where they are, and for those that still are, all steps again from the other start."""
        first = round(FIRST_ROUND * self.steps)
        if not self.stop_early or min(first, self.steps - first) < LEAST_ROUND:
            return [self]
        (other,) = set(STARTS) - {self.start}
        return [
            dataclasses.replace(self, steps=first),
            dataclasses.replace(self, steps=self.steps - first, start=None),
            dataclasses.replace(self, start=other),
        ]


def fit_new_rows(
    model: RowModel, data: Observations, units: ColumnUnits, row_ids: Tensor, plan: InferencePlan, show_progress: bool
) -> Posterior:
    """Fit the rows of `data`, many at a time. Each result depends on its row and row id alone.

    row_ids: int64 [M]. A row with nothing observed gets the prior.
    """
    fits: Fits = FusedFits(model, plan.seed) if FusedFits.can_take(model, plan) else Fits(model, plan)
    with one_thread():  # its products' bits would depend on how many there are
        linear = any(of_round.start == "linear" for of_round in plan.rounds())
        start = LinearStart(model, Linearization.of(model)) if linear else None
    weight, latent_dim = model.decoder.head.weight, model.posterior.latent_dim
    best = Found.none(len(data), model.posterior.table.dim, latent_dim, weight.dtype)

    def fit(of_round: InferencePlan, left: Tensor, block: slice) -> tuple[Any, Found]:
        rows: Any = block if len(left) == len(data) else left[block].numpy()  # files are quick at what adjoins
        x, mask = units.to_model(*data.read(rows))
        given = (t.to(weight.device) for t in (best.parameters[rows], row_ids[rows], x, mask))
        return rows, Found(*(t.cpu() for t in _fit(fits, start, of_round, *given)))

    with progress_bar(show_progress, weight.device, total=0, unit="block") as bar:
        for of_round in plan.rounds():
            left = best.left.nonzero()[:, 0]
            if not len(left):
                break
            size, workers = fits.rows_together(data.num_columns, len(left))
            bar.total += -(-len(left) // size)
            for rows, found in map_blocks(functools.partial(fit, of_round, left), len(left), size, workers):
                best.replace(rows, found)
                bar.update()
    return Posterior(best.mean, best.std, best.elbo, best.converged, row_ids, best.parameters)


class Found(NamedTuple):
    """What is known of rows."""

    parameters: Tensor  # [M, C]
    mean: Tensor  # [M, T]
    std: Tensor  # [M, T]
    elbo: Tensor  # [M]; NaN of rows that have not been fitted
    converged: Tensor  # bool [M]
    left: Tensor  # bool [M]: whether another round may end better

    @classmethod
    def none(cls, rows: int, width: int, latent_dim: int, dtype: torch.dtype) -> Found:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype)

        mean, std, elbo = zeros(rows, latent_dim), zeros(rows, latent_dim), zeros(rows) * torch.nan
        converged = zeros(rows).bool()
        return cls(zeros(rows, width), mean, std, elbo, converged, left=~converged)

    def replace(self, rows: Any, found: Found) -> None:
        """Take what was found of rows (slice or indices), where it is better: a second descent may end below the
        first."""
        better = (found.elbo > self.elbo[rows]) | self.elbo[rows].isnan()
        for known, new in zip(self, found, strict=True):
            at = better.view(-1, *[1] * (new.ndim - 1))
            known[rows] = torch.where(at, new, known[rows])


def _fit(
    fits: Fits, start: LinearStart | None, plan: InferencePlan, p: Tensor, ids: Tensor, x: Tensor, mask: Tensor
) -> Found:
    """Rows in the model's units after a round; p: where an earlier one has left them."""
    posterior = fits.model.posterior
    seen = mask.any(1)
    rows = ids[seen], x[seen], mask[seen]
    elbo, converged, left = p.new_zeros(len(p)), ~seen, seen.clone()  # the prior is the optimum of empty rows: p = 0
    p = p.clone() if plan.start is None else torch.zeros_like(p)  # the caller's is what is known so far
    if seen.any():
        begin = p[seen] if plan.start is None else posterior.initial_values(rows[0]).to(p)
        if plan.start == "linear":
            assert start is not None
            at_once = min(fits.parts_of_products.most, start.rows_at_once)
            (begin,) = by_parts(lambda *given: (start(*given),), Parts(at_once, at_once), begin, *rows[1:])
        found, v, reached = by_parts(functools.partial(fits.fit, plan), fits.parts_of_fit, begin, *rows)
        if plan.start == "linear":  # which may be the optimum itself, around which steps wander
            (at_start,) = by_parts(fits.elbo, fits.parts_of_fit, begin, *rows)
            fell = (at_start > reached) | reached.isnan()
            found = torch.where(fell[:, None], begin, found)
            reached = torch.where(fell, at_start, reached)
        p[seen], elbo[seen] = found, reached
        converged[seen] = stays = _cannot_gain(fits, plan, found, v, reached, *rows)
        left[seen] = ~stays | _improbable(fits.model.likelihood, reached, *rows[1:])
    with torch.no_grad():
        (mean,) = by_parts(lambda p: (posterior.mean_of(p),), fits.parts_of_products, p)
        return Found(p, mean, posterior.log_std_of(p).exp(), elbo, converged, left)


def _cannot_gain(fits: Fits, plan: InferencePlan, p: Tensor, v: Tensor, elbo: Tensor, *rows: Tensor) -> Tensor:
    """Which rows more steps at the full rate would not improve (a rate gone to 0 proves nothing), bool [B]."""
    (grad,) = by_parts(fits.gradient, fits.parts_of_gradient, p, *rows)
    bc2 = plan.hyper.bias_corrections(plan.adam_step(plan.steps - 1))[1].to(v)
    direction = plan.lr * grad / ((v / bc2).sqrt() + plan.hyper.eps)
    gains = []
    for steps in PROBES:
        (there,) = by_parts(fits.elbo, fits.parts_of_fit, p - steps * direction, *rows)
        gains.append(there - elbo)
    return torch.stack(gains).amax(0) <= CONVERGED * (1 + elbo.abs())


def _improbable(likelihood: Likelihood, elbo: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Rows that may have converged in a bad place, bool [B]: a cell costs them far more nats than it need."""
    least = likelihood.nll(x, x, mask) if isinstance(likelihood, Gaussian) else 0.0
    return -elbo - least > IMPROBABLE * mask.sum(1)


def by_parts(function: Callable[..., tuple[Tensor, ...]], parts: Parts, *rows: Tensor) -> tuple[Tensor, ...]:
    """function of the rows, a part at a time."""
    found = []
    for first in range(0, len(rows[0]), parts.most):
        part = [t[first : first + parts.most] for t in rows]
        size = len(part[0])
        whole = -(-size // parts.unit) * parts.unit
        found.append([t[:size] for t in function(*(padded_block(t, whole) for t in part))])
    return tuple(torch.cat(results) for results in zip(*found, strict=True))


def map_blocks(
    function: Callable[[slice], Any], num_rows: int, size: int = BLOCK, workers: int | None = None
) -> Iterator[Any]:
    """function(block) for blocks of `size` rows, in order: one thread a block, blocks in parallel.

    Matmuls change bits with the shape of the batch, with their thread count and maybe with a row's place; here they do
    not.
    """

    def of_block(block: slice) -> Any:
        stay_alone()
        with row_products():
            return function(block)

    blocks = [slice(start, start + size) for start in range(0, num_rows, size)]
    threads = torch.get_num_threads()
    with one_thread():
        pool = ThreadPoolExecutor(min(workers or threads, len(blocks)))
        try:
            futures = [pool.submit(contextvars.copy_context().run, of_block, block) for block in blocks]
            yield from (future.result() for future in futures)
        finally:
            pool.shutdown(cancel_futures=True)  # an error or Ctrl-C waits for the blocks at work only


def padded_block(t: Tensor, size: int = BLOCK) -> Tensor:
    """t with zero rows added up to a full block."""
    return torch.cat((t, t.new_zeros(size - len(t), *t.shape[1:]))) if len(t) < size else t


def clocks_between_visits(plan: InferencePlan, device: torch.device) -> list[AdamClock] | None:
    """For protocol "epochs": the steps of dense Adam between a row's visits, which age it. One clock a visit."""
    if plan.missed == 0:
        return None
    clocks = []
    window = plan.hyper.window() or 0
    for visit in range(plan.steps):
        clock = AdamClock(plan.hyper, steps=plan.adam_step(visit), device=device)
        for _ in range(min(plan.missed, window)):  # momentum is spent after `window` steps
            clock.advance(plan.lr_at(visit))
        clocks.append(clock)
    return clocks


class Fits:
    """Fits, ELBOs and gradients of a block of rows by autograd: for any decoder and both protocols."""

    parts_of_fit = parts_of_products = parts_of_gradient = Parts(BLOCK, BLOCK)

    def __init__(self, model: RowModel, plan: InferencePlan):
        self.model, self.seed = model, plan.seed
        self.clocks = clocks_between_visits(plan, model.decoder.head.weight.device)

    def rows_together(self, columns: int, rows: int) -> tuple[int, int]:
        """Rows that a thread takes, in whole blocks; threads."""
        threads = torch.get_num_threads()
        blocks = min(BLOCKS_AT_ONCE, -(-rows // (BLOCK * threads)))
        return BLOCK * blocks, threads

    def fit(self, plan: InferencePlan, p: Tensor, ids: Tensor, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """The rows' parameters after the plan's steps from p [B, C], their second moments, and ELBO [B]."""
        *_, (p, v) = trajectory(self.model, x, mask, ids, plan, self.clocks, start=p)
        return p, v, *self.elbo(p, ids, x, mask)

    @torch.no_grad()
    def elbo(self, p: Tensor, ids: Tensor, x: Tensor, mask: Tensor) -> tuple[Tensor]:
        """Mean over fixed draws of z of the rows' ELBO [B]."""
        total = p.new_zeros(len(p))
        for draw in range(1, ELBO_DRAWS + 1):
            z, kl = self.model.posterior.sample_values(p, row_ids=ids, stream="infer", seed=self.seed, draw=draw)
            total -= self.model.likelihood.nll(self.model.decoder(z), x, mask) + kl
        return (total / ELBO_DRAWS,)

    def gradient(self, p: Tensor, ids: Tensor, x: Tensor, mask: Tensor) -> tuple[Tensor]:
        """The loss's mean gradient [B, C] over draws of z, others than those of the ELBO: any row can gain on draws
        that it is fitted to."""
        total, loss = torch.zeros_like(p), functools.partial(_loss, self.model, self.seed, x, mask, ids)
        for draw in OTHER_DRAWS:
            total += reference.row_gradient(p, loss, 0, draw)
        return (total / ELBO_DRAWS,)


class FusedFits(Fits):
    """The same for models of which ops.fit_rows has a kernel, or compiled loops: all steps in one call."""

    def __init__(self, model: RowModel, seed: int):
        self.model, self.seed, self.form = model, seed, form_of(model)
        self.weights = torch.cat([parameter.detach().reshape(-1) for parameter in shared_parameters(model)])
        self.by_kernel = not dispatch.use_numba(self.weights.device)
        if self.by_kernel:  # rows share nothing in it
            self.parts_of_fit = Parts(ROWS_OF_LAUNCH, 1)
            self.parts_of_products = self.parts_of_gradient = Parts(ROWS_OF_PRODUCTS, ROWS_OF_PRODUCTS)
        else:
            self.parts_of_fit = self.parts_of_gradient = Parts(ROWS_OF_LOOPS, fit_rows_cpu.BLOCK)

    @staticmethod
    def can_take(model: RowModel, plan: InferencePlan) -> bool:
        posterior, weight = model.posterior, model.decoder.head.weight
        linear = not isinstance(posterior, RelayPosterior) or posterior.coefficients == "linear"
        known = type(model.decoder) is MLPDecoder and type(model.likelihood) in (Gaussian, Bernoulli)
        if plan.missed or not (linear and known) or weight.dtype not in (torch.float32, torch.float64):
            return False
        reason = unsupported(weight.dtype, weight.device, posterior.latent_dim, form_of(model))
        kernel = reason is None and dispatch.use_triton("fit_rows", weight.device)
        return kernel or dispatch.use_numba(weight.device)

    def rows_together(self, columns: int, rows: int) -> tuple[int, int]:
        if self.by_kernel:
            return max(1, min(ROWS_OF_LAUNCH, CELLS_OF_LAUNCH // columns)), LAUNCHES_AT_ONCE
        return super().rows_together(columns, rows)

    def fit(self, plan: InferencePlan, p: Tensor, ids: Tensor, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        rates = torch.tensor([plan.lr_at(step) for step in range(plan.steps)], dtype=torch.float64).to(p.device)
        form, hyper = self.form, plan.hyper
        fitted = fit_rows(p, ids, x, mask, self.weights, form, rates, hyper, seed=self.seed, draws=ELBO_DRAWS)
        return fitted.parameters, fitted.second, fitted.elbo

    def elbo(self, p: Tensor, ids: Tensor, x: Tensor, mask: Tensor) -> tuple[Tensor]:
        no_steps = torch.empty(0, dtype=torch.float64, device=p.device)  # so that no hyper matters
        fitted = fit_rows(
            p, ids, x, mask, self.weights, self.form, no_steps, ROW_ADAM, seed=self.seed, draws=ELBO_DRAWS
        )
        return (fitted.elbo,)

    def gradient(self, p: Tensor, ids: Tensor, x: Tensor, mask: Tensor) -> tuple[Tensor]:
        return (row_gradients(p, ids, x, mask, self.weights, self.form, seed=self.seed, draws=OTHER_DRAWS),)


def trajectory(
    model: RowModel,
    x: Tensor,
    mask: Tensor,
    ids: Tensor,
    plan: InferencePlan,
    clocks: list[AdamClock] | None,
    start: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows' parameters and their second moments, [B, C] each, after every step of the plan.

    x [B, D] in the model's units and mask, bool [B, D]; ids int64 [B]; clocks: clocks_between_visits(plan, device);
    start [B, C]: None for the values that training rows start from.
    """

    def age(step: int, p: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (p, m, v) if clocks is None else _age(p, m, v, clocks[step], plan.missed)

    if start is None:
        start = model.posterior.initial_values(ids).to(x.device)
    loss = functools.partial(_loss, model, plan.seed, x, mask, ids)
    rates = [plan.lr_at(step) for step in range(plan.steps)]
    for fit in reference.fit_rows(start, loss, rates, plan.hyper, plan.missed, age):
        yield fit.p, fit.v


def _loss(
    model: RowModel, seed: int, x: Tensor, mask: Tensor, ids: Tensor, p: Tensor, step: int, draw: int = 0
) -> Tensor:
    """Each row's own loss [B]."""
    z, kl = model.posterior.sample_values(p, row_ids=ids, stream="infer", step=step, seed=seed, draw=draw)
    return model.row_loss(model.likelihood.nll(model.decoder(z), x, mask), kl)


def _age(p: Tensor, m: Tensor, v: Tensor, clock: AdamClock, missed: int) -> tuple[Tensor, Tensor, Tensor]:
    p_now, m_now, v_now = clock.catch_up(p, m, v, torch.zeros(len(p), dtype=torch.int32, device=p.device))
    beyond = missed - clock.index
    return p_now, m_now * clock.hyper.beta1**beyond, v_now * clock.hyper.beta2**beyond
