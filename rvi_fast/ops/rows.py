"""Rows of a table: reading them up to date, and their Adam step."""

# No `from __future__ import annotations`: pdoc cannot tell what the strings of a NamedTuple that is public stand for.
from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from .. import dispatch, reference
from ..clock import AdamClock, Clock, LazyClock
from .checks import check_distinct_rows, check_float, check_one_device, check_shape
from .registry import operator
from .table_cpu import advance
from .table_cpu import read_rows as read_by_loops
from .table_cpu import step_rows as step_by_loops


class Columns(NamedTuple):
    """Columns start .. stop of a table that move together, by one clock of their own."""

    start: int
    stop: int
    clock: Clock


def _use_kernel(op: str, values: Tensor) -> bool:
    unsupported = None
    if values.dtype not in (torch.float32, torch.float64):
        unsupported = f"{values.dtype} tables"
    elif values.stride(2) != 1:
        unsupported = "tables whose columns are not next to each other"
    return dispatch.use_triton(op, values.device, unsupported)


def _use_loops(values: Tensor, rows: Tensor, columns: Sequence[Columns]) -> bool:
    """Whether compiled loops read and step these rows; those outside of the table are left to the equations, which
    raise."""
    if torch.compiler.is_compiling() or type(values) is not Tensor or not dispatch.use_numba(values.device):
        return False
    moves_as_one = len(columns) == 1 and columns[0][:2] == (0, values.shape[2]) and not columns[0].clock.by_row
    if not moves_as_one or values.dtype not in (torch.float32, torch.float64) or not values.is_contiguous():
        return False
    return rows.dtype == torch.int64 and len(rows) > 0 and int(rows.min()) >= 0 and int(rows.max()) < len(values)


def _read_by_loops(values: Tensor, last: Tensor, rows: Tensor, clock: AdamClock) -> Tensor:
    """p, m and v [3, B, C]."""
    now = values.new_empty(3, len(rows), values.shape[2])
    read_by_loops(values, last, rows, clock, tuple(now.numpy()), np.empty(len(rows), bool))
    return now


def _tensors(columns: Sequence[Columns]) -> tuple[list[int], list[int], list[Tensor], list[Tensor], list[Tensor]]:
    """Starts, stops, and of every clock history, counters and constants: how an operator is given `columns`."""
    clocks = [column.clock for column in columns]
    spans = [column.start for column in columns], [column.stop for column in columns]
    return *spans, [c.history for c in clocks], [c.counters for c in clocks], [c.constants for c in clocks]


def read_rows(
    values: Tensor, last: Tensor, rows: Tensor, columns: Sequence[Columns], *, moments: bool = True
) -> tuple[Tensor, ...]:
    """p, m, v [B, C] (p alone without `moments`) of rows (int64 [B]), brought up to date, as fresh tensors.

    values [N, 3, C]; last [N] int32. On a GPU, rows outside the table are NaN.
    """
    check_one_device(values=values, last=last, rows=rows)
    if _use_kernel("read_rows", values):
        closed_form = [column.clock.closed_form for column in columns]
        return _read_rows(values, last, rows, *_tensors(columns), closed_form, moments).unbind(0)
    if _use_loops(values, rows, columns):
        now = _read_by_loops(values, last, rows.contiguous(), cast(AdamClock, columns[0].clock)).unbind(0)
        return now if moments else now[:1]
    return _read_rows_twin(values, last, rows, columns)[: 3 if moments else 1]


def _read_rows_twin(values: Tensor, last: Tensor, rows: Tensor, columns: Sequence[Columns]) -> tuple[Tensor, ...]:
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


def _run_read_rows(
    values: Tensor,
    last: Tensor,
    rows: Tensor,
    starts: Sequence[int],
    stops: Sequence[int],
    histories: Sequence[Tensor],
    counters: Sequence[Tensor],
    constants: Sequence[Tensor],
    closed_form: Sequence[bool],
    moments: bool,
) -> Tensor:
    if not _use_kernel("read_rows", values):
        clocks = map(AdamClock.of, histories, counters, constants, constants)  # a read needs no rates
        columns = [Columns(*column) for column in zip(starts, stops, clocks, strict=True)]
        return torch.stack(_read_rows_twin(values, last, rows, columns)[: 3 if moments else 1])
    from ..kernels.read_rows import read_rows as kernel

    out = values.new_empty(3 if moments else 1, len(rows), values.shape[2])
    if sum(stops) - sum(starts) < values.shape[2]:  # the other columns rest
        out.copy_(values[rows, : len(out)].transpose(0, 1))
    for start, stop, history, counts, constant, closed in zip(
        starts, stops, histories, counters, constants, closed_form, strict=True
    ):
        span = slice(start, stop)
        kernel(values[:, :, span], last, rows, history, counts, constant, closed, out[:, :, span])
    return out


def _fake_read_rows(
    values: Tensor,
    last: Tensor,
    rows: Tensor,
    starts: Sequence[int],
    stops: Sequence[int],
    histories: Sequence[Tensor],
    counters: Sequence[Tensor],
    constants: Sequence[Tensor],
    closed_form: Sequence[bool],
    moments: bool,
) -> Tensor:
    return values.new_empty(3 if moments else 1, len(rows), values.shape[2])


_read_rows = operator(
    "read_rows(Tensor values, Tensor last, Tensor rows, int[] starts, int[] stops, Tensor[] histories, "
    "Tensor[] counters, Tensor[] constants, bool[] closed_form, bool moments) -> Tensor",
    _run_read_rows,
    _fake_read_rows,
)


def row_adam_(
    values: Tensor,
    last: Tensor,
    rows: Tensor,
    grad: Tensor,
    columns: Sequence[Columns],
    lr: Sequence[float | Tensor],
    weight_decay: Sequence[float | Tensor],
) -> None:
    """One AdamW step of the touched rows, in place, then of the clocks (docs/math.md).

    values [N, 3, C]: p, m, v of a row together; last [N] int32: the clock's reading at a row's last step; rows int64
    [B], without repeats; grad [B, C]; one lr and one weight_decay for each of `columns`. With an AdamClock, rows not
    named here follow the dense trajectory too: the clock remembers the step, and a later read catches them up.

    On a GPU nothing waits for the device: rows are not checked there (those outside the table are left out), and lr
    and weight_decay may be float64 tensors [] on it, which a CUDA graph reads anew at every replay.

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
    check_one_device(values=values, last=last, rows=rows, grad=grad)
    check_float("grad", grad, values)
    check_distinct_rows(rows, values.shape[0])
    if _use_kernel("row_adam_", values):
        clocks = [column.clock for column in columns]
        for clock, rate, decay in zip(clocks, lr, weight_decay, strict=True):
            clock.reserve(1)
            clock.set_rates(rate, decay)
        rates, closed_form = [clock.rates for clock in clocks], [clock.closed_form for clock in clocks]
        _row_adam_(values, last, rows, grad, *_tensors(columns), rates, closed_form, clocks[0].by_row)
        for clock in clocks:
            clock.tick()
        return
    if rows.device.type != "cpu":
        inside = (rows >= 0) & (rows < values.shape[0])
        rows, grad = rows[inside], grad[inside]
    numbers = [float(rate) for rate in lr], [float(decay) for decay in weight_decay]
    if _use_loops(values, rows, columns):
        clock, at = cast(AdamClock, columns[0].clock), (values, last, rows.contiguous())
        clock.reserve(1)
        now, by_row = tuple(_read_by_loops(*at, clock).numpy()), grad.detach().contiguous().numpy()
        step_by_loops(*at, now, by_row, clock, numbers[0][0], numbers[1][0])
        advance(clock, numbers[0][0], numbers[1][0])
        return
    _row_adam_twin(values, last, rows, grad, columns, *numbers)
    for (_, _, clock), rate, decay in zip(columns, *numbers, strict=True):
        clock.advance(rate, decay)


def _row_adam_twin(
    values: Tensor,
    last: Tensor,
    rows: Tensor,
    grad: Tensor,
    columns: Sequence[Columns],
    lr: Sequence[float],
    weight_decay: Sequence[float],
) -> None:
    p, m, v = _read_rows_twin(values, last, rows, columns)
    last_of_rows = last[rows]
    for (start, stop, clock), rate, decay in zip(columns, lr, weight_decay, strict=True):
        span = slice(start, stop)
        p[:, span], m[:, span], v[:, span] = reference.adamw_step(
            p[:, span], m[:, span], v[:, span], grad[:, span], clock.next_step(last_of_rows), rate, clock.hyper, decay
        )
    values[rows] = torch.stack((p, m, v), dim=1)
    last[rows] = columns[0].clock.touched(last_of_rows)


def run_row_adam(
    values: Tensor,
    last: Tensor,
    rows: Tensor,
    grad: Tensor,
    starts: Sequence[int],
    stops: Sequence[int],
    histories: Sequence[Tensor],
    counters: Sequence[Tensor],
    constants: Sequence[Tensor],
    rates: Sequence[Tensor],
    closed_form: Sequence[bool],
    by_row: bool,
) -> None:
    if not _use_kernel("row_adam_", values):
        tensors = zip(histories, counters, constants, rates, strict=True)
        clocks: list[Clock] = [LazyClock.of(*t) if by_row else AdamClock.of(*t) for t in tensors]
        columns = [Columns(*column) for column in zip(starts, stops, clocks, strict=True)]
        lr, weight_decay = torch.stack(tuple(rates), dim=1).tolist()
        return _row_adam_twin(values, last, rows, grad, columns, lr, weight_decay)
    from ..kernels.row_adam_ import row_adam_ as kernel

    for start, stop, history, counts, constant, rate, closed in zip(
        starts, stops, histories, counters, constants, rates, closed_form, strict=True
    ):
        clock, touch = (history, counts, constant, rate), start == starts[-1]
        kernel(values[:, :, start:stop], last, rows, grad[:, start:stop], *clock, closed, by_row, touch)


def _fake_row_adam(
    values: Tensor,
    last: Tensor,
    rows: Tensor,
    grad: Tensor,
    starts: Sequence[int],
    stops: Sequence[int],
    histories: Sequence[Tensor],
    counters: Sequence[Tensor],
    constants: Sequence[Tensor],
    rates: Sequence[Tensor],
    closed_form: Sequence[bool],
    by_row: bool,
) -> None:
    """It returns nothing."""


_row_adam_ = operator(
    "row_adam_(Tensor(a!) values, Tensor(b!) last, Tensor rows, Tensor grad, int[] starts, int[] stops, "
    "Tensor[] histories, Tensor[] counters, Tensor[] constants, Tensor[] rates, bool[] closed_form, bool by_row) -> ()",
    run_row_adam,
    _fake_row_adam,
)
