"""Products of matrices, by the BLAS that PyTorch is linked to, or in loops where that cannot be called."""

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
def multiply(blas, block, a, b, transposed, packed, out):
    """out [M, n] += a [M, k] @ b [k, n], or b.T of b [n, k]. `block` rows at a time, then those that are left, so that
    a row's bits do not depend on how many there are; or all at once if `block` is 0.

    blas: HAS_BLAS. packed: b as of `pack`, or empty. A row's numbers lie together; BLAS counts columns first, so that
    it sees out.T += b.T @ a.T.
    """
    if blas:
        sizes = np.array((out.shape[1], block or len(out), a.shape[1], stride(b), stride(a), stride(out)), np.int32)
        multiply_blocks(a, b, packed, out, sizes, np.ones(1, out.dtype), letters(transposed))
    elif transposed:
        for m in range(len(a)):
            for n in range(len(b)):
                out[m, n] += dot(a[m], b[n])
    else:
        for m in range(len(a)):
            for k in range(len(b)):
                add_multiple(a[m, k], b[k], out[m])


@compiled
def dot(a, b):
    total = a.dtype.type(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@compiled
def add_multiple(factor, a, out):
    for i in range(len(out)):
        out[i] += factor * a[i]


@compiled
def multiply_blocks(a, b, packed, out, sizes, one, kinds):
    """sizes, one and kinds are arguments because BLAS takes addresses, which keep nothing alive."""
    size, kind, unit, block = sizes.ctypes.data, kinds.ctypes.data, one.ctypes.data, max(sizes[1], 1)
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
def multiply_columns(blas, a, b, out):
    """out [k, n] = a.T @ b, of a [M, k] and b [M, n]."""
    if blas:
        sizes = np.array((out.shape[1], len(out), len(a), stride(b), stride(a), stride(out)), np.int32)
        multiply_all_columns(a, b, out, sizes, np.array((1, 0), out.dtype), letters(True))
    else:
        out[:] = 0
        for m in range(len(a)):
            for k in range(len(out)):
                add_multiple(a[m, k], b[m], out[k])


@compiled
def multiply_all_columns(a, b, out, sizes, one_and_zero, kinds):
    """As multiply_blocks."""
    size, kind, unit = sizes.ctypes.data, kinds.ctypes.data, one_and_zero.ctypes.data
    factors = b.ctypes.data, size + 12, a.ctypes.data, size + 16, unit + out.itemsize, out.ctypes.data, size + 20
    if out.itemsize == 4:
        SINGLE(kind + 1, kind, size, size + 4, size + 8, unit, *factors)
    else:
        DOUBLE(kind + 1, kind, size, size + 4, size + 8, unit, *factors)


@compiled
def packed_size(block, b, transposed):
    """Numbers that `pack` takes, in whole lines of memory."""
    return packed_size_of(sizes_of(block, b, transposed), b.itemsize, letters(transposed))


@compiled
def packed_size_of(sizes, itemsize, kinds):
    """As multiply_blocks."""
    size = sizes.ctypes.data
    return -(-PACKED_SIZE(kinds.ctypes.data + 3, size, size + 4, size + 8) // LINE) * (LINE // itemsize)


@compiled
def pack(block, b, transposed, out):
    """float32 b for `multiply` into out [packed_size], which begins with a line of memory."""
    packed_by(b, sizes_of(block, b, transposed), np.ones(1, b.dtype), letters(transposed), out)


@compiled
def packed_by(b, sizes, one, kinds, out):
    """As multiply_blocks."""
    size, kind, unit = sizes.ctypes.data, kinds.ctypes.data, one.ctypes.data
    PACK(kind + 3, kind, size, size + 4, size + 8, unit, b.ctypes.data, size + 12, out.ctypes.data)


@compiled
def sizes_of(block, b, transposed):
    inner, width = (b.shape[1], b.shape[0]) if transposed else b.shape
    return np.array((width, block, inner, stride(b)), np.int32)


@compiled
def letters(transposed):
    """BLAS's words for: b as it is or transposed, a as it is, packed, the first factor."""
    return np.array((ord("T") if transposed else ord("N"), ord("N"), ord("P"), ord("A")), np.uint8)


@compiled
def stride(rows):
    """Numbers from one row to the next, no less than BLAS allows where there is no next."""
    return max(rows.strides[0] // rows.itemsize, rows.shape[1], 1)
