"""Tables whose rows are behind by different numbers of steps, for tests of what reads and steps them."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from conftest import INTERPRETED
from torch import Tensor

import rvi_fast
from rvi_fast.functional import AdamClock, AdamHyper, Columns, LazyClock

BETAS = [(0.9, 0.999), (0.9, 0.9), (0.0, 0.999), (0.99, 0.999)]


class Table(NamedTuple):
    values: Tensor  # [N, 3, C]
    last: Tensor
    columns: list[Columns]

    def snapshot(self) -> list[Tensor]:
        """Everything that a step or a read may change, copied to the CPU."""
        clocks = [t for column in self.columns for t in (column.clock.history, column.clock.counters)]
        return [t.cpu().clone() for t in (self.values, self.last, *clocks)]


def aged_table(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    rows: int = 11,
    spans: tuple[tuple[int, int], ...] = ((0, 5),),
    width: int = 5,
    betas: tuple[float, float] = (0.9, 0.999),
    steps: int = 30,
    lazy: bool = False,
    scale: float = 1.0,
) -> Table:
    """A table that has seen `steps` steps, a clock for each span of its columns; some entries never had a gradient."""
    noise = torch.Generator().manual_seed(steps)
    values = torch.randn(rows, 3, width, dtype=torch.float64, generator=noise)
    values[:, 1] *= scale * (torch.rand(rows, width, generator=noise) < 0.7)
    values[:, 2] = values[:, 1] ** 2 * torch.rand(rows, width, dtype=torch.float64, generator=noise)
    last = torch.randint(0, steps + 1, (rows,), dtype=torch.int32, generator=noise)
    last[0], last[-1] = 0, steps
    columns = []
    for number, (start, stop) in enumerate(spans):
        hyper = AdamHyper(*betas, 1e-8)
        clock = LazyClock(hyper, steps, device) if lazy else AdamClock(hyper, number, device)  # steps before the flush
        with rvi_fast.backend("torch"):
            for t in range(0 if lazy else steps):
                clock.advance(1e-2 * (number + 1) / (1 + t), 0.1 * number)
        columns.append(Columns(start, stop, clock))
    return Table(values.to(device, dtype), last.to(device), columns)


@pytest.fixture
def tall_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows a program: the interpreter's cost is that of its programs."""
    if INTERPRETED:
        from rvi_fast.kernels import read_rows, row_adam_

        monkeypatch.setattr(read_rows, "ROWS", 16)
        monkeypatch.setattr(row_adam_, "ROWS", 16)


def sparse_rows_tensor(rows: int, width: int, stride: int) -> Tensor:
    """float32 [rows, 3, width] with `stride` numbers between rows: more than 2^31 of them cost no memory untouched."""
    storage = torch.empty(rows * stride, dtype=torch.float32)
    return storage.as_strided((rows, 3, width), (stride, width, 1))
