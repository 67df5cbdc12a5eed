"""Products on a CPU in which a row's bits do not depend on its place.

Some BLAS (MKL on AMD's processors) adds a row's terms in another order where the row begins elsewhere in a line of
memory. Rows that are filled up to whole lines all begin alike.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

LINE = 64  # bytes
SIZES = ((13, 7), (7, 13), (14, 5), (33, 19))  # of products that tell; rows of none of them are whole lines


@contextlib.contextmanager
def row_products() -> Iterator[None]:
    """Within: matrix products of this thread, those of autograd included, for which a row's place does not matter."""
    with contextlib.nullcontext() if _anywhere_alike() else _WholeLines():
        yield


@functools.cache
def _anywhere_alike() -> bool:
    """Whether this BLAS gives rows the same bits anyway."""
    generator = torch.Generator().manual_seed(0)
    for inner, columns in SIZES:
        rows, weight = torch.randn(32, inner, generator=generator), torch.randn(inner, columns, generator=generator)
        found = rows @ weight
        if any(not torch.equal(rows.roll(n, 0) @ weight, found.roll(n, 0)) for n in range(1, len(rows))):
            return False
    return True


class _WholeLines(TorchDispatchMode):
    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func in (aten.mm.default, aten.bmm.default) and args[0].device.type == "cpu":
            return _product(*args)
        if func in (aten.addmm.default, aten.baddbmm.default) and args[0].device.type == "cpu":
            start, a, b = args
            return given.get("beta", 1) * start + given.get("alpha", 1) * _product(a, b)
        return func(*args, **given)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [.., M, k] @ b [.., k, n]."""
    columns, line = b.shape[-1], LINE // a.element_size()
    inner, beside = -a.shape[-1] % line, -columns % line
    pad = torch.nn.functional.pad
    return (pad(a, (0, inner)) @ pad(b, (0, beside, 0, inner)))[..., :columns].contiguous()
