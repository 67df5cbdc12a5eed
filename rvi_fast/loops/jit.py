"""How the loops are compiled: once for each combination of dtypes, and kept on disk."""

from __future__ import annotations

import numba

# Sums may be reordered and products fused into them, or nothing is vectorised; NaN and infinity keep their meaning.
# LLVM vectorises a loop where a few comparisons of addresses show that what it writes is read nowhere else: in place,
# or between few arrays.
compiled = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})
exact = numba.njit(cache=True, nogil=True, error_model="numpy")  # to the bit as written
