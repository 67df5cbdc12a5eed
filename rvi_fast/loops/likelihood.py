"""Losses of the observed cells on a CPU, and their gradients (reference.masked_gaussian_nll, masked_bernoulli_nll)."""

from __future__ import annotations

import numpy as np

from .jit import compiled

ROWS_AT_ONCE = 32  # summed in float32 (counted in 8 bits) before float64 takes over


@compiled
def read_cells(x, x_scale, mask, row, cells, observed):
    """A row's x as cells [D], of the model's dtype and 0 in its holes, and observed [D], 1 or 0.

    mask: uint8 [.., D], or its bits [.., ceil(D / 8)], the lowest first, or None (NaN is missing).
    """
    number = cells.dtype.type
    scale, columns = number(x_scale), len(cells)
    if mask is None:
        for d in range(columns):
            observed[d] = x[row, d] == x[row, d]
    elif mask.shape[1] == columns:
        for d in range(columns):
            observed[d] = mask[row, d]
    else:
        for byte in range(mask.shape[1]):
            for bit in range(min(8, columns - 8 * byte)):
                observed[8 * byte + bit] = mask[row, byte] >> bit & 1
    for d in range(columns):
        value = number(x[row, d]) * scale
        cells[d] = value if observed[d] else number(0)


@compiled
def gaussian(xhat, x, x_scale, mask, rows, inverse_scale, factor, squares, count, by_bias):
    """The gradient factor [D] * r replaces xhat [B, D], where r = (xhat - x) * inverse_scale [D], of observed cells.

    Columns' sums: of r^2 into squares [D] and of observed cells into count [D], both float64; of the gradient into
    by_bias [D].
    """
    columns, zero = xhat.shape[1], xhat.dtype.type(0)
    cells, observed = np.empty(columns, xhat.dtype), np.empty(columns, np.uint8)
    some_squares, some_count = np.zeros(columns, xhat.dtype), np.zeros(columns, np.uint8)
    squares[:], count[:], by_bias[:] = 0, 0, 0
    for b in range(len(xhat)):
        read_cells(x, x_scale, mask, rows[b], cells, observed)
        row = xhat[b]
        for d in range(columns):
            r = (row[d] - cells[d]) * inverse_scale[d]
            row[d] = r if observed[d] else zero
        for d in range(columns):
            some_squares[d] += row[d] * row[d]
        for d in range(columns):
            some_count[d] += observed[d]
        for d in range(columns):
            row[d] *= factor[d]
        for d in range(columns):
            by_bias[d] += row[d]
        if b % ROWS_AT_ONCE == 0 or b == len(xhat) - 1:
            move(some_squares, squares)
            move(some_count, count)


@compiled
def move(some, total):
    """Add up what was summed over a few rows in the type of its terms."""
    for d in range(len(total)):
        total[d] += some[d]
        some[d] = 0


@compiled
def bernoulli(logits, softplus, sigmoid, x, x_scale, mask, rows, share, by_bias):
    """The gradient share * (sigmoid - x) of observed cells replaces logits [B, D]; its columns' sums go to by_bias.

    Returns the sum of nll, softplus - x * logit.
    """
    columns, total = logits.shape[1], 0.0
    share, zero = logits.dtype.type(share), logits.dtype.type(0)
    cells, observed = np.empty(columns, logits.dtype), np.empty(columns, np.uint8)
    by_bias[:] = 0
    for b in range(len(logits)):
        read_cells(x, x_scale, mask, rows[b], cells, observed)
        nll = zero
        for d in range(columns):
            nll += softplus[b, d] - logits[b, d] * cells[d] if observed[d] else zero
            logits[b, d] = (sigmoid[b, d] - cells[d]) * share if observed[d] else zero
            by_bias[d] += logits[b, d]
        total += nll
    return total
