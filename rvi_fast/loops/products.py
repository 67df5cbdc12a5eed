"""Products of rows by weights, by the BLAS that PyTorch is linked to, so many rows at a time that a row's bits do not
depend on how many there are."""

from __future__ import annotations

import numpy as np
from numba import types

from .jit import compiled
from .linked import linked

HAS_BLAS = linked("sgemm_", "dgemm_")
ARGUMENTS = (types.intp,) * 13  # addresses: transa, transb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc
SINGLE, DOUBLE = (types.ExternalFunction(f"rvi_fast.{name}", types.void(*ARGUMENTS)) for name in ("sgemm_", "dgemm_"))


@compiled
def multiply(block, a, b, transposed, out):
    """out [M, n] += a [M, k] @ b [k, n], or b.T of b [n, k], `block` rows at a time, then those that are left.

    A row's numbers lie together; BLAS counts columns first, so that it sees out.T += b.T @ a.T.
    """
    item, inner, width = out.itemsize, a.shape[1], out.shape[1]
    sizes = np.array((width, block, inner, stride(b), stride(a), stride(out)), np.int32)
    one, kinds = np.ones(1, out.dtype), np.array((ord("T") if transposed else ord("N"), ord("N")), np.uint8)
    size, kind, unit = sizes.ctypes.data, kinds.ctypes.data, one.ctypes.data
    for start in range(0, len(out), block):
        sizes[1] = min(block, len(out) - start)
        arguments = (
            kind, kind + 1, size, size + 4, size + 8, unit, b.ctypes.data, size + 12,
            a[start:].ctypes.data, size + 16, unit, out[start:].ctypes.data, size + 20,
        )  # fmt: skip
        if item == 4:
            SINGLE(*arguments)
        else:
            DOUBLE(*arguments)


@compiled
def stride(rows):
    """Numbers from one row to the next, no less than BLAS allows where there is no next."""
    return max(rows.strides[0] // rows.itemsize, rows.shape[1], 1)
