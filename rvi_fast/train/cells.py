"""Where a step finds the cells of its rows: all of them in memory beside the model, or read batch by batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import reference
from ..blocks import BlockReader
from ..observations import ColumnUnits, HiddenCells, Observations
from ..ops.likelihoods import twin_x

AHEAD = 2  # batches read ahead of a GPU
SHARE_OF_DEVICE = 0.5  # of a GPU's free memory that cells may take


class Cells(NamedTuple):
    """x [B, D] of a batch, or x [N, D] of all rows, in the model's units after multiplication by x_scale."""

    x: Tensor
    mask: Tensor | None  # bool, or its bits, the lowest first; None: NaN in x is missing
    x_scale: float
    gathered: bool

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """float32 x [B, D], 0 or anything finite in its holes, and mask bool [B, D]."""
        if self.gathered:
            assert self.mask is not None
            return self.x, self.mask
        x, mask = self.x[rows], None if self.mask is None else self.mask[rows]
        x, mask = twin_x(x, mask, self.x_scale, torch.float32)
        return reference.without_holes(x.contiguous(), mask), mask


class Source:
    """Reads the observed cells to train on, in the model's units."""

    def __init__(self, data: Observations, units: ColumnUnits, hidden: HiddenCells | None, device: torch.device):
        self.data, self.units, self.hidden, self.device = data, units, hidden, device
        self.reads_ahead = device.type != "cpu"  # there a second thread would take what the step needs

    def read(self, rows: np.ndarray | slice) -> tuple[Tensor, Tensor]:
        """x float32 [B, D], 0 in holes, and mask bool [B, D], on the CPU."""
        return self.units.to_model(*self._as_given(rows))

    def _as_given(self, rows: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        """The user's cells [B, D], and which are observed and not hidden."""
        values, observed = self.data.read(rows)
        return values, observed if self.hidden is None else observed & ~self.hidden.read(rows)

    def batch(self, rows: np.ndarray) -> Cells:
        """The cells of some rows, on the device."""
        return self._to_device(self._read_pinned(rows))

    def ahead(self, batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, Cells]]:
        """Every batch's rows and cells; a GPU's are read by another thread while it works on those before."""
        if not self.reads_ahead:
            for rows in batches:
                yield rows, self.batch(rows)
            return
        with ThreadPoolExecutor(1, "rvi_fast-reader") as reader:
            waiting: deque[tuple[np.ndarray, Future]] = deque()
            try:
                for rows in batches:
                    waiting.append((rows, reader.submit(self._read_pinned, rows)))
                    if len(waiting) > AHEAD:
                        yield self._arrived(*waiting.popleft())
                while waiting:
                    yield self._arrived(*waiting.popleft())
            finally:
                for _, future in waiting:
                    future.cancel()

    def _arrived(self, rows: np.ndarray, future: Future) -> tuple[np.ndarray, Cells]:
        return rows, self._to_device(future.result())

    def _read_pinned(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        x, mask = self.read(rows)
        return (x.pin_memory(), mask.pin_memory()) if self.device.type == "cuda" else (x, mask)

    def _to_device(self, cells: tuple[Tensor, Tensor]) -> Cells:
        x, mask = (t.to(self.device, non_blocking=True) for t in cells)
        return Cells(x, mask, 1.0, gathered=True)

    def resident(self) -> Cells | None:
        """All cells beside the model: the user's own memory on a CPU, a copy on a GPU that has room; else None."""
        if self.device.type == "cpu":
            return self._in_place()
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0
        n, d = len(self.data), self.data.num_columns
        as_bytes = self._scale_alone() is not None and self.data.values.dtype == np.uint8
        if n * (d + -(-d // 8) if as_bytes else 4 * d) > SHARE_OF_DEVICE * free:
            return None
        return self._copy_of_bytes() if as_bytes else self._copy_of_numbers()

    def _scale_alone(self) -> float | None:
        """What turns the user's units into the model's, where one factor does."""
        factor = 1 / self.units.scale[0]
        plain = not self.units.shift.any() and (self.units.scale == self.units.scale[0]).all()
        return float(factor) if plain else None

    def _in_place(self) -> Cells | None:
        values, mask, factor = self.data.values, self.data.mask, self._scale_alone()
        if self.hidden is not None or factor is None or values.dtype not in (np.float32, np.uint8):
            return None
        if not isinstance(values, np.ndarray) or isinstance(mask, BlockReader):
            return None
        if not all(_as_torch_has_it(array) for array in (values, mask) if array is not None):
            return None
        observed = None if mask is None else torch.from_numpy(mask)
        if mask is None and values.dtype == np.uint8:
            observed = torch.ones((), dtype=torch.bool).expand(values.shape)
        return Cells(torch.from_numpy(values), observed, factor, gathered=False)

    def _copy_of_bytes(self) -> Cells:
        n, d = len(self.data), self.data.num_columns
        x = torch.empty(n, d, dtype=torch.uint8, device=self.device)
        bits = torch.empty(n, -(-d // 8), dtype=torch.uint8, device=self.device)
        for block in self.data.blocks():
            values, observed = self._as_given(block)
            x[block] = torch.from_numpy(values).to(self.device)
            bits[block] = torch.from_numpy(np.packbits(observed, axis=1, bitorder="little")).to(self.device)
        factor = self._scale_alone()
        assert factor is not None
        return Cells(x, bits, factor, gathered=False)

    def _copy_of_numbers(self) -> Cells:
        x = torch.empty(len(self.data), self.data.num_columns, device=self.device)
        for block in self.data.blocks():
            part, mask = self.read(block)
            part[~mask] = torch.nan
            x[block] = part.to(self.device)
        return Cells(x, None, 1.0, gathered=False)


def _as_torch_has_it(array: np.ndarray) -> bool:
    """Whether torch can share the memory: writable, in the machine's byte order, strides of whole elements >= 0."""
    strided = all(stride >= 0 and stride % array.itemsize == 0 for stride in array.strides)
    return array.flags.writeable and array.dtype.isnative and strided
