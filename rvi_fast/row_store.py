"""RowStore: the memory of one table of rows, with Adam's moments beside each row, and the parameters that view it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import large_pages, ops
from .clock import AdamClock, Clock, LazyClock
from .ops import Columns
from .reference import AdamHyper
from .row_grad import RowGrad, sum_repeats

ELEMENTS_AT_ONCE = 1 << 20  # whole-table work goes in blocks of about this many numbers
MAX_STEPS_BEHIND = (1 << 20) - 1  # then every row is brought up to date and the clocks start again


class Movement(NamedTuple):
    """By which optimiser group, and how, a column range moves."""

    group: int
    hyper: AdamHyper


class RowParameter(nn.Parameter):
    """The parameter of one column range of a table: a view [N, width] of the table's memory.

    What it shows is the stored value, which is behind for rows not touched of late; the table reads them up to date.
    """

    store: RowStore
    index: int  # type: ignore[assignment]  # Tensor.index is nothing that a parameter needs

    def __deepcopy__(self, memo: dict) -> RowParameter:
        return copy.deepcopy(self.store, memo).parameters[self.index]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _parameter_of, (self.store, self.index)


def _parameter_of(store: RowStore, index: int) -> RowParameter:
    return store.parameters[index]


class RowStore:
    """values [N, 3, C] holds a row's parameters p and moments m, v together; last [N] int32 its clock reading.

    Column ranges ("coef", "residual", ...) are parameters of their own, so that an optimiser can give each its
    settings. They advance together; when the set of ranges that move changes, all rows are first brought up to date.
    """

    def __init__(
        self, num_rows: int, widths: Mapping[str, int], dtype: torch.dtype, device: torch.device, moments: bool
    ):
        self.names = tuple(widths)
        stops = torch.tensor(list(widths.values())).cumsum(0).tolist()
        self.slices = tuple(slice(stop - width, stop) for stop, width in zip(stops, widths.values(), strict=True))
        self.values = large_pages.zeros((num_rows, 3 if moments else 1, stops[-1]), dtype, device)
        self.last = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)  # steps of this table, on its device
        self.steps = [0] * len(widths)  # Adam's step count of each range, at the last flush
        self.moving: dict[int, Movement] = {}
        self.columns: list[Columns] = []
        self.modes: dict[int, str] = {}  # of the ranges that have moments
        self.trained: dict[int, weakref.ref] = {}  # by which RowAdam; a copy has none until one is copied with it
        self._make_parameters([True] * len(widths))

    def _make_parameters(self, requires_grad: list[bool]) -> None:
        self.parameters = []
        for index, needs_grad in enumerate(requires_grad):
            parameter = RowParameter(self._stored(index), needs_grad)
            parameter.store, parameter.index = self, index
            self.parameters.append(parameter)

    def _stored(self, index: int) -> Tensor:
        return self.values[:, 0, self.slices[index]]

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["parameters"] = [p.requires_grad for p in self.parameters]
        state["trained"] = {}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        requires_grad = state.pop("parameters")
        self.__dict__.update(state)
        self._make_parameters(requires_grad)

    @property
    def num_rows(self) -> int:
        return self.values.shape[0]

    @property
    def dim(self) -> int:
        return self.values.shape[2]

    def up_to_date(self) -> bool:
        """Whether what is stored is what a read would give, for every row; in a CUDA graph, at its replays too."""
        return all(column.clock.index == 0 for column in self.columns) and not (self.columns and self._in_graph())

    def _in_graph(self) -> bool:
        compiling = torch.compiler.is_compiling()
        return self.values.is_cuda and not compiling and torch.cuda.is_current_stream_capturing()

    def blocks(self) -> Iterator[slice]:
        """All rows, in slices of bounded size."""
        size = max(1, ELEMENTS_AT_ONCE // self.dim)
        return (slice(start, min(start + size, self.num_rows)) for start in range(0, self.num_rows, size))

    def in_own_memory(self, index: int) -> bool:
        """Whether the parameter of a column range still is a view of `values`."""
        offset = self.slices[index].start * self.values.itemsize
        return self.parameters[index].data_ptr() == self.values.data_ptr() + offset

    def _rows(self, block: slice) -> Tensor:
        return torch.arange(block.start, block.stop, device=self.values.device)

    def read(self, rows: Tensor) -> Tensor:
        """Rows (int64 [B]) brought up to date, [B, C]. Writes nothing."""
        if self.up_to_date():
            return self.values[rows, 0]
        return ops.read_rows(self.values, self.last, rows, self.columns, moments=False)[0]

    def one_clock(self) -> tuple[bool, Clock | None]:
        """Whether one clock tells how far behind all columns are, and that clock; None if no row is behind."""
        if self.up_to_date():
            return True, None
        start, stop, clock = self.columns[0]
        return (start, stop) == (0, self.dim), clock

    def row_grads(self, rows: Tensor, grad: Tensor, needed: Sequence[bool]) -> list[RowGrad | None]:
        """The gradient [B, C] of rows as that of each column range that needs it."""
        rows = rows.clone()  # the caller may fill its own anew before the step
        return [
            RowGrad(rows, grad[:, span].contiguous().clone(), self.num_rows) if n else None
            for span, n in zip(self.slices, needed, strict=True)
        ]

    def read_all(self, which: int, index: int | None = None) -> Tensor:
        """p, m or v (which = 0, 1, 2) of every row, up to date, as a fresh tensor [N, width]."""
        span = slice(None) if index is None else self.slices[index]
        if self.up_to_date():
            return self.values[:, which, span].clone()
        out = torch.empty_like(self.values[:, which, span], memory_format=torch.contiguous_format)
        for block in self.blocks():
            now = ops.read_rows(self.values, self.last, self._rows(block), self.columns, moments=which > 0)
            out[block] = now[which][:, span]
        return out

    @torch.no_grad()
    def flush(self) -> None:
        """Bring every row up to date in place; the clocks start again from here."""
        if not self.up_to_date():
            for block in self.blocks():
                now = ops.read_rows(self.values, self.last, self._rows(block), self.columns)
                for slot, values in enumerate(now):
                    self.values[block, slot] = values
            self.last.zero_()
        for index in self.moving:
            self.steps[index] = self.steps_of(index)
        self._start_clocks()

    def steps_of(self, index: int) -> int:
        """Adam's step count of a column range."""
        for column in self.columns:
            if column.start <= self.slices[index].start < column.stop:
                return column.clock.steps
        return self.steps[index]

    def _start_clocks(self) -> None:
        """One clock for each run of neighbouring ranges that move alike."""
        runs: list[list[int]] = []
        for index in sorted(self.moving):
            alike = runs and runs[-1][-1] == index - 1 and self._kind(index) == self._kind(index - 1)
            if alike:
                runs[-1].append(index)
            else:
                runs.append([index])
        self.columns = [
            Columns(self.slices[run[0]].start, self.slices[run[-1]].stop, self._new_clock(run[0])) for run in runs
        ]

    def _kind(self, index: int) -> tuple[Movement, int]:
        return self.moving[index], self.steps[index]

    def _new_clock(self, index: int) -> AdamClock | LazyClock:
        hyper = self.moving[index].hyper
        if self.modes[index] == "lazy":
            return LazyClock(hyper, self.steps[index], self.values.device)
        return AdamClock(hyper, self.steps[index], self.values.device)

    def own(self, index: int, optimizer: Any) -> None:
        self.trained[index] = weakref.ref(optimizer)

    def owner(self, index: int) -> Any:
        """The RowAdam that trains a column range, None if there is none (any more)."""
        return self.trained[index]() if index in self.trained else None

    def check_modes(self, added: Mapping[int, str]) -> None:
        """Raise unless all ranges have one mode after `attach` of the ranges in `added`."""
        modes = set({**self.modes, **added}.values())
        if len(modes) > 1:
            raise ValueError(
                f"all columns of a RowTable need the same mode; got {' beside '.join(map(repr, sorted(modes)))} "
                "(after table.drop_moments() both can start afresh)"
            )

    def attach(self, index: int, mode: str, optimizer: Any) -> None:
        """Let a RowAdam train a column range, from fresh moments."""
        self.flush()
        self._make_room_for_moments()
        self.values[:, 1:, self.slices[index]] = 0
        self.last.zero_()
        self.moving, self.columns = {}, []
        self.steps[index] = 0
        self.modes[index] = mode
        self.own(index, optimizer)

    def _make_room_for_moments(self) -> None:
        if self.values.shape[1] == 1:
            values = large_pages.zeros((self.num_rows, 3, self.dim), self.values.dtype, self.values.device)
            values[:, 0] = self.values[:, 0]
            self._replace(values)

    def drop_moments(self) -> None:
        """Bring every row up to date and give Adam's two thirds of the memory back; a RowAdam then starts afresh."""
        self.flush()
        self.moving, self.columns, self.modes, self.trained = {}, [], {}, {}
        self._replace(self.values[:, :1].clone())

    def _replace(self, values: Tensor) -> None:
        self.values = values
        for index, parameter in enumerate(self.parameters):
            parameter.data = self._stored(index)

    def apply(self, fn: Any) -> None:
        """What nn.Module._apply does to a parameter: move or convert the memory, keep the parameters' identity."""
        values = fn(self.values)
        if values.is_meta:
            raise NotImplementedError("a RowTable cannot move to the meta device; build it on the device that it needs")
        grads = [p.grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        self._replace(values)
        self.last, self.step = fn(self.last), fn(self.step)
        for column in self.columns:
            column.clock.to(self.values.device)
        for parameter, grad in zip(self.parameters, grads, strict=True):
            if isinstance(grad, RowGrad):
                parameter.grad = RowGrad(fn(grad.rows), fn(grad.values), self.num_rows)

    @torch.no_grad()
    def assign(self, index: int, values: Tensor) -> None:
        """Overwrite one column range of every row; the moments stay. Its parameter views the table again."""
        self.flush()
        self.values[:, 0, self.slices[index]] = values
        self.parameters[index].data = self._stored(index)

    @torch.no_grad()
    def assign_rows(self, rows: Tensor, values: Tensor) -> None:
        """Overwrite whole rows (int64 [B]) with values [B, C], at rest: their moments become zero."""
        self.flush()
        self.values[rows] = 0
        self.values[rows, 0] = values

    def restart(self, moving: dict[int, Movement], steps: list[int]) -> None:
        """Take up the movement and the step counts of a saved run; the clocks start empty."""
        self.moving, self.steps = moving, list(steps)
        self._start_clocks()

    @torch.no_grad()
    def assign_moments(self, index: int, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor) -> None:
        """Overwrite Adam's state of one column range, as read from torch's own Adam."""
        self.flush()
        self.values[:, 1, self.slices[index]] = exp_avg
        self.values[:, 2, self.slices[index]] = exp_avg_sq
        if self.modes[index] == "lazy":
            self.last.copy_(step.expand(self.num_rows))
        self.steps[index] = int(step.max())
        self.moving, self.columns = {}, []

    def prepare(self, moving: dict[int, Movement]) -> None:
        """Make ready for a step of the ranges in `moving`, or raise, before anything is changed."""
        for index in moving:
            if not isinstance(self.parameters[index].grad, RowGrad):
                raise TypeError(
                    "a RowTable's gradient must come from reading the table in forward, table(rows); "
                    f"the parameter {self.names[index]!r} was given a dense one"
                )
        if moving == self.moving and self.columns[0].clock.index < MAX_STEPS_BEHIND:
            return
        if "lazy" in self.modes.values():
            interrupted = bool(self.moving) and set(moving) != set(self.moving)
            if interrupted or len({self.steps_of(index) for index in moving}) > 1:
                raise ValueError(
                    "mode='lazy' counts steps by row, so the same columns of a RowTable must move at every step"
                )
        self.flush()
        self.moving = moving
        self._start_clocks()

    def take_step(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Adam's step of the ranges that `prepare` was given, with lr and weight_decay of the optimiser's `groups`."""
        rows, grad = self._collect_grads()
        first = [next(i for i in self.moving if self.slices[i].start == column.start) for column in self.columns]
        settings = [groups[self.moving[i].group] for i in first]
        lr, weight_decay = ([group[name] for group in settings] for name in ("lr", "weight_decay"))
        ops.row_adam_(self.values, self.last, rows, grad, self.columns, lr, weight_decay)
        self.step += 1

    def _collect_grads(self) -> tuple[Tensor, Tensor]:
        """The rows with a gradient, without repeats, and their gradients [B, C]. A GPU is not waited for."""
        grads = [cast(RowGrad, self.parameters[index].grad) for index in self.moving]
        rows = grads[0].rows
        at_hand = rows.device.type == "cpu"
        same_rows = all(grad.rows is rows or (at_hand and torch.equal(grad.rows, rows)) for grad in grads)
        if not same_rows:
            rows = torch.cat([grad.rows for grad in grads])
        values = self.values.new_zeros(len(rows), self.dim)
        start = 0
        for index, grad in zip(self.moving, grads, strict=True):
            values[start : start + len(grad.rows), self.slices[index]] = grad.values
            start += 0 if same_rows else len(grad.rows)
        if not at_hand:
            return sum_repeats(rows, values)
        total = RowGrad(rows, values, self.num_rows).merge_()
        return total.rows, total.values


class ReadRows(torch.autograd.Function):
    """Rows of a table (None: all), up to date, with gradients that hold the batch's rows alone."""

    @staticmethod
    def forward(ctx: Any, store: RowStore, rows: Tensor | None, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.store = store
        return store.read_all(0) if rows is None else store.read(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        store: RowStore = ctx.store
        if rows is None:
            rows = torch.arange(store.num_rows, device=grad.device)
        return None, None, *store.row_grads(rows, grad, ctx.needs_input_grad[2:])
