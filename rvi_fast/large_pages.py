"""Large pages for tables: rows are read in any order, and to look up the address of one costs as much as to read it."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PAGE = 1 << 21  # bytes; 4 KiB otherwise


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The system's call, where it knows of large pages (Linux)."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return call


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros. On a CPU the system is asked for large pages before anything is written; it may have none."""
    values = torch.empty(shape, dtype=dtype, device=device)
    begin, end = -(-values.data_ptr() // PAGE) * PAGE, (values.data_ptr() + values.nbytes) // PAGE * PAGE
    if values.device.type == "cpu" and begin < end and (madvise := _madvise()):
        madvise(begin, end - begin, mmap.MADV_HUGEPAGE)
    return values.zero_()
