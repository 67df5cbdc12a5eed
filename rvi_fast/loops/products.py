"""Products of rows by weights that stay, by the BLAS that PyTorch is linked to.

So many rows at a time, always, that a row's bits do not depend on how many there are.
"""

from __future__ import annotations

import numpy as np
from numba import types

from .jit import compiled
from .linked import linked
from .memory import LINE

HAS_BLAS = linked("sgemm_", "dgemm_")
PACKING = "sgemm_pack_get_size_", "sgemm_pack_", "sgemm_compute_"  # MKL's, of float32: weights as it reads them
HAS_PACKING = HAS_BLAS and linked(*PACKING)


def _function(name: str, arguments: int, returns: types.Type = types.void) -> types.ExternalFunction:
    return types.ExternalFunction(f"rvi_fast.{name}", returns(*(types.intp,) * arguments))  # all are addresses


SINGLE, DOUBLE = _function("sgemm_", 13), _function("dgemm_", 13)
PACKED_SIZE, PACK, COMPUTE = _function(PACKING[0], 4, types.intp), _function(PACKING[1], 9), _function(PACKING[2], 12)


@compiled
def multiply(block, a, b, transposed, packed, out):
    """out [M, n] += a [M, k] @ b [k, n], or b.T of b [n, k], `block` rows at a time, then those that are left.

    packed: b as of `pack`, or empty. A row's numbers lie together; BLAS counts columns first, so that it sees
    out.T += b.T @ a.T.
    """
    sizes = np.array((out.shape[1], block, a.shape[1], stride(b), stride(a), stride(out)), np.int32)
    multiply_blocks(a, b, packed, out, sizes, np.ones(1, out.dtype), letters(transposed))


@compiled
def multiply_blocks(a, b, packed, out, sizes, one, kinds):
    """sizes, one and kinds are arguments because BLAS takes addresses, which keep nothing alive."""
    size, kind, unit, block = sizes.ctypes.data, kinds.ctypes.data, one.ctypes.data, sizes[1]
    for start in range(0, len(out), block):
        sizes[1] = min(block, len(out) - start)
        rows, to = a[start:].ctypes.data, out[start:].ctypes.data
        factors = b.ctypes.data, size + 12, rows, size + 16, unit, to, size + 20
        if len(packed) and sizes[1] == block:
            COMPUTE(kind + 2, kind + 1, size, size + 4, size + 8, packed.ctypes.data, *factors[1:])
        elif out.itemsize == 4:
            SINGLE(kind, kind + 1, size, size + 4, size + 8, unit, *factors)
        else:
            DOUBLE(kind, kind + 1, size, size + 4, size + 8, unit, *factors)


@compiled
def pack(block, b, transposed):
    """float32 b for `multiply`."""
    inner, width = (b.shape[1], b.shape[0]) if transposed else b.shape
    sizes = np.array((width, block, inner, stride(b)), np.int32)
    return packed_by(b, sizes, np.ones(1, b.dtype), letters(transposed))


@compiled
def packed_by(b, sizes, one, kinds):
    """As multiply_blocks."""
    size, kind, unit = sizes.ctypes.data, kinds.ctypes.data, one.ctypes.data
    room = np.empty(PACKED_SIZE(kind + 3, size, size + 4, size + 8) // b.itemsize + LINE, b.dtype)
    packed = room[-room.ctypes.data % LINE // b.itemsize :]
    PACK(kind + 3, kind, size, size + 4, size + 8, unit, b.ctypes.data, size + 12, packed.ctypes.data)
    return packed


@compiled
def letters(transposed):
    """BLAS's words for: b as it is or transposed, a as it is, packed, the first factor."""
    return np.array((ord("T") if transposed else ord("N"), ord("N"), ord("P"), ord("A")), np.uint8)


@compiled
def stride(rows):
    """Numbers from one row to the next, no less than BLAS allows where there is no next."""
    return max(rows.strides[0] // rows.itemsize, rows.shape[1], 1)
