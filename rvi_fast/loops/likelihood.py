"""Losses of the observed cells on a CPU, and their gradients (reference.masked_gaussian_nll, masked_bernoulli_nll)."""

from __future__ import annotations

import numpy as np

from .exponential import softplus_and_sigmoid
from .jit import compiled
from .memory import prefetch_next
from .threads import share

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
            observed[d] = mask[row, d] & 1  # one column's bits have the shape of its bytes
    else:
        for byte in range(mask.shape[1]):
            for bit in range(min(8, columns - 8 * byte)):
                observed[8 * byte + bit] = mask[row, byte] >> bit & 1
    for d in range(columns):
        value = number(x[row, d]) * scale
        cells[d] = value if observed[d] else number(0)


@compiled
def gaussian(threads, xhat, x, x_scale, mask, rows, inverse_scale, factor, squares, count, by_bias):
    """The gradient factor [D] * r replaces xhat, where r = (xhat - x) * inverse_scale [D], of observed cells.

    xhat [B, ..] has D columns or more. Their sums: of r^2 into squares [D] and of observed cells into count [D], both
    float64; of the gradient into by_bias [D].
    """
    columns = len(inverse_scale)
    each_squares, each_count = np.zeros((threads, columns)), np.zeros((threads, columns))
    each_by_bias = np.zeros((threads, columns), by_bias.dtype)
    sums = each_squares, each_count, each_by_bias
    share(gaussian_part, threads, len(xhat), (xhat, x, x_scale, mask, rows, inverse_scale, factor, sums))
    add_up(each_squares, squares)
    add_up(each_count, count)
    add_up(each_by_bias, by_bias)


@compiled
def gaussian_part(part, xhat, x, x_scale, mask, rows, inverse_scale, factor, sums):
    number, begin, end = part
    squares, count, by_bias = sums[0][number], sums[1][number], sums[2][number]
    columns = len(inverse_scale)
    cells, observed = np.empty(columns, xhat.dtype), np.empty(columns, np.uint8)
    some_squares, some_count = np.zeros(columns, xhat.dtype), np.zeros(columns, np.uint8)
    for b in range(begin, end):
        prefetch_next(x, rows, b)
        read_cells(x, x_scale, mask, rows[b], cells, observed)
        row = xhat[b, :columns]
        residual(row, cells, observed, inverse_scale)
        for d in range(columns):
            some_squares[d] += row[d] * row[d]
        for d in range(columns):
            some_count[d] += observed[d]
        multiply(row, factor)
        for d in range(columns):
            by_bias[d] += row[d]
        if b % ROWS_AT_ONCE == 0 or b == end - 1:
            move(some_squares, squares)
            move(some_count, count)


@compiled
def add_up(each, total):
    """each [threads, D] into total [D]."""
    total[:] = each[0]
    for number in range(1, len(each)):
        for d in range(len(total)):
            total[d] += each[number, d]


@compiled
def move(some, total):
    """Add up what was summed over a few rows in the type of its terms."""
    for d in range(len(total)):
        total[d] += some[d]
        some[d] = 0


@compiled
def bernoulli(threads, logits, x, x_scale, mask, rows, weight, by_bias):
    """The gradient weight * (sigmoid - x) of observed cells replaces logits, [B, D] or wider; its columns' sums go to
    by_bias [D].

    Returns the sum of nll, softplus - x * logit.
    """
    each_total, each_by_bias = np.zeros(threads), np.zeros((threads, len(by_bias)), logits.dtype)
    sums, weight = (each_total, each_by_bias), logits.dtype.type(weight)
    share(bernoulli_part, threads, len(logits), (logits, x, x_scale, mask, rows, weight, sums))
    add_up(each_by_bias, by_bias)
    return each_total.sum()


@compiled
def bernoulli_part(part, logits, x, x_scale, mask, rows, weight, sums):
    number, begin, end = part
    by_bias, columns, total = sums[1][number], sums[1].shape[1], 0.0
    cells, observed = np.empty(columns, logits.dtype), np.empty(columns, np.uint8)
    softplus, sigmoid = np.empty_like(cells), np.empty_like(cells)
    for b in range(begin, end):
        prefetch_next(x, rows, b)
        read_cells(x, x_scale, mask, rows[b], cells, observed)
        row = logits[b, :columns]
        softplus_and_sigmoid(row, softplus, sigmoid)
        total += cross_entropy(row, softplus, cells, observed)
        difference(sigmoid, cells, observed, row)
        for d in range(columns):
            row[d] *= weight
        for d in range(columns):
            by_bias[d] += row[d]
    sums[0][number] = total


@compiled
def read_rows(x, x_scale, mask, rows, cells, observed):
    """read_cells of rows [B], into cells and observed [B, D]."""
    for b in range(len(rows)):
        read_cells(x, x_scale, mask, rows[b], cells[b], observed[b])


@compiled
def gaussian_rows(xhat, cells, observed, inverse_scale, nll):
    """Each row's gradient of nll replaces the first D columns of xhat; nll [B], but for the scales' own terms."""
    half = xhat.dtype.type(0.5)
    for b in range(len(xhat)):
        row = xhat[b, : cells.shape[1]]
        residual(row, cells[b], observed[b], inverse_scale)
        nll[b] = half * sum_of_squares(row)
        multiply(row, inverse_scale)


@compiled
def residual(xhat, cells, observed, inverse_scale):
    zero = xhat.dtype.type(0)
    for d in range(len(xhat)):
        r = (xhat[d] - cells[d]) * inverse_scale[d]
        xhat[d] = r if observed[d] else zero


@compiled
def sum_of_squares(a):
    total = a.dtype.type(0)
    for i in range(len(a)):
        total += a[i] * a[i]
    return total


@compiled
def multiply(a, factor):
    for i in range(len(a)):
        a[i] *= factor[i]


@compiled
def bernoulli_rows(logits, cells, observed, nll):
    """Each row's gradient of nll replaces the first D columns of logits; nll [B]."""
    softplus, sigmoid = np.empty((2, cells.shape[1]), logits.dtype)
    for b in range(len(logits)):
        row = logits[b, : cells.shape[1]]
        softplus_and_sigmoid(row, softplus, sigmoid)
        nll[b] = cross_entropy(row, softplus, cells[b], observed[b])
        difference(sigmoid, cells[b], observed[b], row)


@compiled
def cross_entropy(logits, softplus, cells, observed):
    total = zero = logits.dtype.type(0)
    for d in range(len(logits)):
        term = softplus[d] - logits[d] * cells[d]
        total += term if observed[d] else zero
    return total


@compiled
def difference(sigmoid, cells, observed, out):
    zero = out.dtype.type(0)
    for d in range(len(out)):
        r = sigmoid[d] - cells[d]
        out[d] = r if observed[d] else zero
