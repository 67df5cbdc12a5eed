"""Rows shared among threads: those of PyTorch's own OpenMP, because a second pool would wait on the same cores.

Only loops that take a tenth of a millisecond are shared: a thread that had nothing to do must first be woken.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .linked import linked

PARALLEL, NUMBER, THREADS = "GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"
INT, ADDRESS = ir.IntType(32), cgutils.voidptr_t
HAS_MXCSR = platform.machine().lower() in ("x86_64", "amd64")  # the register that says what becomes of denormals


HAS_OPENMP = linked(PARALLEL, NUMBER, THREADS)


def available() -> int:
    """How many threads loops may use: as many as PyTorch's operators do, or 1 where these are not OpenMP's."""
    return torch.get_num_threads() if HAS_OPENMP else 1


@intrinsic
def share(typingctx: Any, loop: Any, threads: Any, rows: Any, arguments: Any) -> Any:
    """loop(part, *arguments) for each part (number, begin, end) of `rows` rows, one a thread.

    threads: `available()`, no fewer: OpenMP ends those that it is not asked for, and may give less than that. Denormals
    are treated as by the caller.
    """
    called = loop.get_call_type(typingctx, (types.UniTuple(types.intp, 3), *arguments.types), {})

    def call(context: Any, builder: Any, part: list[Any], packed: Any) -> None:
        function = context.declare_function(builder.module, loop.dispatcher.overloads[called.args].fndesc)
        values = [context.make_tuple(builder, called.args[0], part), *cgutils.unpack_tuple(builder, packed)]
        context.call_conv.call_function(builder, function, called.return_type, called.args, values)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _, threads, rows, packed = values
        zero, one = threads.type(0), threads.type(1)
        context.active_code_library.add_linking_library(loop.dispatcher.overloads[called.args].library)
        with builder.if_else(builder.icmp_signed("==", threads, one)) as (alone, together):
            with alone:
                call(context, builder, [zero, zero, rows], packed)
            with together:
                job = cgutils.make_anonymous_struct(builder, [rows, packed, _modes(builder)])
                place = cgutils.alloca_once_value(builder, job)
                body = _body(builder.module, job.type, lambda inside, part, packed: call(context, inside, part, packed))
                arguments = [body, builder.bitcast(place, ADDRESS), builder.trunc(threads, INT), INT(0)]
                _call(builder, f"rvi_fast.{PARALLEL}", ir.VoidType(), arguments)
        return context.get_dummy_value()

    return types.void(loop, threads, rows, arguments), generate


def _body(module: Any, job: Any, call: Any) -> Any:
    """void (void *) of what one thread does of a `job`: rows, arguments, modes."""
    body = ir.Function(module, ir.FunctionType(ir.VoidType(), [ADDRESS]), module.get_unique_name("part_of_rows"))
    body.linkage = "internal"
    inside = ir.IRBuilder(body.append_basic_block())
    pointer = inside.bitcast(body.args[0], job.as_pointer())
    rows, packed, modes = cgutils.unpack_tuple(inside, inside.load(pointer), 3)
    number, threads = (inside.sext(_call(inside, f"rvi_fast.{name}", INT, []), rows.type) for name in (NUMBER, THREADS))
    ends = number, inside.add(number, rows.type(1))
    begin, end = (inside.sdiv(inside.mul(rows, n), threads) for n in ends)
    before = _modes(inside)
    _set_modes(inside, modes)
    call(inside, [number, begin, end], packed)
    _set_modes(inside, before)
    inside.ret_void()
    return body


def _modes(builder: Any) -> Any:
    """How this thread computes: what it rounds to, and whether denormals count as 0."""
    place = cgutils.alloca_once(builder, INT)
    if HAS_MXCSR:
        _call(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), [builder.bitcast(place, ADDRESS)])
    else:
        builder.store(INT(0), place)
    return builder.load(place)


def _set_modes(builder: Any, modes: Any) -> None:
    if HAS_MXCSR:
        place = cgutils.alloca_once_value(builder, modes)
        _call(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), [builder.bitcast(place, ADDRESS)])


def _call(builder: Any, name: str, returns: Any, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(returns, [value.type for value in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)
