"""A table's rows on a CPU, in compiled loops: read up to date, stepped, and the clock's own step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .. import reference
from ..clock import EPS_MEETS_GRADIENT, AdamClock


def read_rows(
    values: Tensor, last: Tensor, rows: Tensor, clock: AdamClock, now: Sequence[np.ndarray], apart: np.ndarray
) -> None:
    """p, m and v [B, C] of rows into `now`, brought up to date (reference.catch_up); apart: bool [B], to work in."""
    from ..loops import adam, threads

    hyper, least = clock.hyper, reference.least_root(values.dtype)
    if clock.closed_form:
        adam.read_rows(
            threads.available(), values.flatten(1).numpy(), rows.numpy(), last.numpy(),
            clock.history.numpy(), clock.index, *hyper.logs(), hyper.eps, least, clock.inexact_before,
            EPS_MEETS_GRADIENT, *now, apart,
        )  # fmt: skip
    else:
        apart[:] = True
    if apart.any():
        left = apart.nonzero()[0]
        at = rows[left]
        p, m, v = values[at].unbind(1)
        for to, caught_up in zip(now, clock.catch_up(p, m, v, last[at]), strict=True):
            to[left] = caught_up.numpy()


def step_rows(
    values: Tensor, last: Tensor, rows: Tensor, now: Sequence[np.ndarray], grad: np.ndarray, clock: AdamClock,
    lr: float, weight_decay: float,
) -> None:  # fmt: skip
    """Adam's step of the rows, of which `now` holds p, m and v [B, C], by grad [B, C], into the table."""
    from ..loops import adam, threads

    factors = adam_factors(clock.steps + 1, lr, weight_decay, clock.hyper)
    at = values.flatten(1).numpy(), last.numpy(), rows.numpy()
    adam.step_rows(threads.available(), *at, *now, grad, factors, clock.index + 1)
    for written in (values, last):
        torch.autograd.graph.increment_version(written)  # of which NumPy knows nothing


def advance(clock: AdamClock, lr: float, weight_decay: float) -> None:
    """AdamClock.advance of a history that has room."""
    from ..loops import adam

    clock.replayed(1)
    clock.counters.numpy()[0] = clock.index
    window = (clock.window or 0) if clock.closed_form else 0
    corrections = clock.hyper.bias_corrections_at(clock.steps)
    adam.advance(clock.history.numpy(), clock.index, window, lr, weight_decay, *corrections, *clock.hyper.logs())


def adam_factors(number: int, lr: float, weight_decay: float, hyper: reference.AdamHyper) -> tuple[float, ...]:
    """What loops.adam.step takes besides arrays, of Adam's step `number`."""
    bc1, bc2 = hyper.bias_corrections_at(number)
    return lr / bc1, bc2**-0.5, 1 - lr * weight_decay, *hyper
