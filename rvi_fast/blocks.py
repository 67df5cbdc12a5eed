"""Rows of containers larger than memory (np.memmap, h5py, zarr, parquet, ...), read by slices through a buffer."""

from __future__ import annotations

import mmap
import threading
import warnings
from collections import OrderedDict
from typing import Any

import numpy as np

BLOCK_BYTES = 4 << 20  # consecutive rows read together: long enough for a disk to stream
BUFFER_BYTES = 256 << 20  # blocks kept together; what fits in as a whole is shuffled as a whole


def is_read_by_slices(X: Any) -> bool:
    """Whether X is a memmap beyond the buffer, or has shape, dtype and X[a:b] without being an array in memory."""
    if isinstance(X, np.ndarray):
        return isinstance(X, np.memmap) and X.nbytes > BUFFER_BYTES
    if any(hasattr(X, name) for name in ("__array_interface__", "__dlpack__")):
        return False
    try:
        np.dtype(X.dtype)
    except (AttributeError, TypeError):
        return False
    return hasattr(X, "shape") and hasattr(X, "__getitem__")


def shape_and_dtype(X: Any, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype, in native byte order, that a container read by slices gives itself."""
    try:
        return tuple(int(size) for size in X.shape), np.dtype(X.dtype).newbyteorder("=")
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} must have a shape of ints and a NumPy dtype; got shape {X.shape!r} and dtype {X.dtype!r}"
        ) from None


class BlockReader:
    """A container of rows [N, D] that can do no more than shape, dtype and X[a:b], read through a buffer of blocks.

    Indexing by a slice of step 1 or by int64 rows gives an ndarray. A block is block_rows consecutive rows: about
    BLOCK_BYTES, in whole chunks where the container has any. The `capacity` blocks used last are kept, no more than
    BUFFER_BYTES. `partner`: another reader whose blocks these shall be. Threads may share a reader.
    """

    def __init__(self, container: Any, name: str, partner: BlockReader | None = None):
        self.container, self.name = container, name
        self.shape, self.dtype = shape_and_dtype(container, name)
        if partner is None:
            self.block_rows, self.capacity = self._geometry()
        else:
            self.block_rows, self.capacity = partner.block_rows, partner.capacity
        self._blocks: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self._read(0, 1)  # a container that cannot be read says so now

    def __len__(self) -> int:
        return self.shape[0]

    def _geometry(self) -> tuple[int, int]:
        """Rows a block, blocks in the buffer."""
        row_bytes = self.shape[1] * self.dtype.itemsize
        chunks = getattr(self.container, "chunks", None)
        chunk_rows = chunks[0] if isinstance(chunks, tuple) and isinstance(chunks[0], int) else 1
        if chunk_rows > 1 and min(chunk_rows, len(self)) * row_bytes > BUFFER_BYTES:
            warnings.warn(
                f"{self.name} lies in chunks (parquet: row groups) of {chunk_rows} rows, more than the buffer of "
                f"{BUFFER_BYTES >> 20} MiB holds, and is read several times over; write it with fewer rows a chunk",
                stacklevel=6,
            )
            return max(1, BUFFER_BYTES // row_bytes), 1
        block_rows = chunk_rows * max(1, BLOCK_BYTES // (chunk_rows * row_bytes))
        return block_rows, max(1, BUFFER_BYTES // (block_rows * row_bytes))

    def __getitem__(self, rows: Any) -> np.ndarray:
        with self._lock:
            return self._slice(*rows.indices(len(self))[:2]) if isinstance(rows, slice) else self._gather(rows)

    def forget(self) -> None:
        """Empty the buffer."""
        with self._lock:
            self._blocks.clear()

    def _slice(self, start: int, stop: int) -> np.ndarray:
        out = np.empty((max(0, stop - start), self.shape[1]), self.dtype)
        size = self.block_rows
        for number in range(start // size, -(-stop // size)):
            low, high = max(start, number * size), min(stop, (number + 1) * size)
            out[low - start : high - start] = self._block(number)[low - number * size : high - number * size]
        return out

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), self.shape[1]), self.dtype)
        block_of = rows // self.block_rows
        # Blocks at hand come first: reading another may push them out.
        for number in sorted(np.unique(block_of).tolist(), key=lambda number: number not in self._blocks):
            here = np.nonzero(block_of == number)[0]
            out[here] = self._block(number)[rows[here] - number * self.block_rows]
        return out

    def _block(self, number: int) -> np.ndarray:
        if number not in self._blocks:
            while len(self._blocks) >= self.capacity:
                self._blocks.popitem(last=False)
            start = number * self.block_rows
            self._blocks[number] = self._read(start, min(start + self.block_rows, len(self)))
        self._blocks.move_to_end(number)
        return self._blocks[number]

    def _read(self, start: int, stop: int) -> np.ndarray:
        where = f"{self.name}[{start}:{stop}]"
        try:
            found = self.container[start:stop]
        except Exception as error:  # each library has its own
            raise OSError(f"{where} cannot be read ({error}); is its file still open and whole?") from error
        if isinstance(found, np.ma.MaskedArray):
            raise TypeError(f"{where} is a masked array; let it give NaN for missing cells, or pass mask")
        values = np.asarray(found, order="C")
        if not values.flags.owndata:
            values = values.copy()  # a view would keep pages of the file
        if values.shape != (stop - start, self.shape[1]) or values.dtype.newbyteorder("=") != self.dtype:
            raise TypeError(
                f"{where} must be an array of {self.dtype} [{stop - start}, {self.shape[1]}], as {self.name}'s shape "
                f"and dtype say; got {values.dtype} {list(values.shape)}"
            )
        release(self.container)
        return values.astype(self.dtype, copy=False)


def release(X: Any) -> None:
    """Give back the pages that X, a memmap of a file, has touched: the file keeps what they hold.

    They count as resident memory although the kernel could drop them. Those of mode "c" hold changes that no file has.
    """
    if not isinstance(X, np.memmap) or X.mode == "c" or not hasattr(mmap, "MADV_DONTNEED"):
        return
    base: Any = X
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)
