"""Asking for memory ahead of its use: a batch's rows lie anywhere, so that the processor cannot guess the next."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .jit import compiled

LINE = 64  # bytes that come at once
READ, TO_SECOND_LEVEL, DATA = 0, 2, 1  # the first level is too small for a row, and takes fewer requests at a time


@intrinsic
def touch(typingctx: Any, array: Any, index: Any) -> Any:
    """Ask for the line of memory that holds array[index], of a contiguous [C]."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), cgutils.voidptr_t)
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [place, *(number(value) for value in (READ, TO_SECOND_LEVEL, DATA))])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@compiled
def copy(source, target):
    for i in range(len(target)):
        target[i] = source[i]


@compiled
def prefetch_next(values, rows, b):
    """Ask for values [N, C] of the row that follows rows[b], if one does."""
    if b + 1 < len(rows):
        row = values[rows[b + 1]]
        for c in range(0, len(row), LINE // row.itemsize):
            touch(row, c)
