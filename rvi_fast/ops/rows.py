"""Rows of a table: reading them up to date, and their Adam step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..clock import Clock
from .checks import check_rows, check_shape


class Columns(NamedTuple):
    """Columns start .. stop of a table that move together, by one clock of their own."""

    start: int
    stop: int
    clock: Clock


def read_rows(values: Tensor, last: Tensor, rows: Tensor, columns: Sequence[Columns]) -> tuple[Tensor, Tensor, Tensor]:
    """p, m, v [B, C] of rows (int64 [B]), brought up to date. values [N, 3, C]; last [N] int32. Writes nothing."""
    p, m, v = values[rows].unbind(1)
    last_of_rows = last[rows]
    for start, stop, clock in columns:
        span = slice(start, stop)
        now = clock.catch_up(p[:, span], m[:, span], v[:, span], last_of_rows)
        if stop - start == p.shape[1]:
            return now
        for block, caught_up in zip((p, m, v), now, strict=True):
            block[:, span] = caught_up
    return p, m, v


def _check_step_rows(rows: Tensor, num_rows: int) -> None:
    """rows must lie in the table and not repeat. Ascending ones, as in a merged gradient, need no sort."""
    ascending = rows if (rows[1:] > rows[:-1]).all() else torch.unique(rows)
    check_rows(torch.cat((ascending[:1], ascending[-1:])).cpu(), num_rows)
    if len(ascending) < len(rows):
        raise ValueError("rows must not repeat within a step; sum the gradients of a repeated row first")


def row_adam_(
    values: Tensor,
    last: Tensor,
    rows: Tensor,
    grad: Tensor,
    columns: Sequence[Columns],
    lr: Sequence[float],
    weight_decay: Sequence[float],
) -> None:
    """One AdamW step of the touched rows, in place, then of the clocks (docs/math.md).

    values [N, 3, C]: p, m, v of a row together; last [N] int32: the clock's reading at a row's last step; rows int64
    [B], without repeats; grad [B, C]; one lr and one weight_decay for each of `columns`. With an AdamClock, rows not
    named here follow the dense trajectory too: the clock remembers the step, and a later read catches them up.

    >>> import torch
    >>> from rvi_fast.functional import AdamClock, AdamHyper, Columns, row_adam_
    >>> values, last = torch.zeros(1000, 3, 2), torch.zeros(1000, dtype=torch.int32)
    >>> columns = [Columns(0, 2, AdamClock(AdamHyper(beta1=0.9, beta2=0.999, eps=1e-8)))]
    >>> row_adam_(values, last, torch.tensor([7]), torch.ones(1, 2), columns, lr=[0.5], weight_decay=[0.0])
    >>> values[7, 0]
    tensor([-0.5000, -0.5000])
    """
    sizes: dict[str, int] = {}
    check_shape("values", values, ("N", 3, "C"), sizes)
    for name, tensor, shape in (("last", last, "N"), ("rows", rows, "B"), ("grad", grad, "BC")):
        check_shape(name, tensor, shape, sizes)
    _check_step_rows(rows, values.shape[0])
    p, m, v = read_rows(values, last, rows, columns)
    last_of_rows = last[rows]
    for (start, stop, clock), rate, decay in zip(columns, lr, weight_decay, strict=True):
        span = slice(start, stop)
        p[:, span], m[:, span], v[:, span] = reference.adamw_step(
            p[:, span], m[:, span], v[:, span], grad[:, span], clock.next_step(last_of_rows), rate, clock.hyper, decay
        )
    values[rows] = torch.stack((p, m, v), dim=1)
    last[rows] = columns[0].clock.touched(last_of_rows)
    for (_, _, clock), rate, decay in zip(columns, lr, weight_decay, strict=True):
        clock.advance(rate, decay)
