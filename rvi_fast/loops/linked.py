"""Functions of the libraries that PyTorch is linked to, for loops to call: its OpenMP and its BLAS."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from llvmlite import binding


def linked(*names: str) -> bool:
    """Make functions known to the compiler as "rvi_fast.<name>"; False where PyTorch has none of these names."""
    found = dict.fromkeys(names, 1)  # a name must lead somewhere, though nobody goes there
    for library in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        try:
            opened = ctypes.CDLL(str(library))  # loaded long ago: its names, and of what it is linked to
            found = {name: ctypes.cast(opened[name], ctypes.c_void_p).value or 1 for name in names}
        except (OSError, AttributeError):
            continue
    for name, address in found.items():
        binding.add_symbol(f"rvi_fast.{name}", address)
    return 1 not in found.values()
