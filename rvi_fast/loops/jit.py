"""How the loops are compiled: once for each combination of dtypes, and kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def _compiler(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    def compile_later(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, nogil=True, error_model="numpy", **options)(function)
        except RuntimeError:  # no folder to keep it in can be written
            return numba.njit(nogil=True, error_model="numpy", **options)(function)

    return compile_later


# Sums may be reordered and products fused into them, or nothing is vectorised; NaN and infinity keep their meaning.
# LLVM vectorises a loop where a few comparisons of addresses show that what it writes is read nowhere else: in place,
# or between few arrays.
compiled = _compiler(fastmath={"reassoc", "contract"})
exact = _compiler()  # to the bit as written
