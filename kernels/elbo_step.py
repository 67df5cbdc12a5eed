"""A whole training step of a model with relays and an MLP decoder in two launches (its equations: rvi_fast.ops.elbo).

The first launch takes the rows through everything: catch-up, selection, relays, sample, decoder, likelihood, all the
gradients, and the rows' own Adam step. The reconstruction never leaves the chip. The second sums what the programs of
the first found for the shared parameters, steps these, and advances the clocks.

Shared parameters lie flat, [P]: relays [K, T]; weight [OUT, IN] and bias [OUT] of every hidden layer; the head's
weight [D, F] and bias [D]; with a learned scale, its logarithm [D]. The head's F features are the last hidden layer's
outputs, and behind them z where it has a linear path.

A program keeps `SLOTS` + layers blocks [R, W] of its rows in memory of its own: posterior mean, sigma * noise, z, and
what each hidden layer gives before its activation. W is the widest of them, padded.
"""

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .advance import BLOCK as CLOCK_BLOCK
from .advance import advance_clock
from .catch_up import follow, load_columns, missed_by, step_sizes, stepped
from .device import multiprocessors
from .likelihood import bernoulli, gaussian, gaussian_by_scale, load_observed, observed_arguments
from .mlp import activate, activation_slope, add_to, add_weight_gradient, dense, weight_tile
from .philox import normals
from .precision import dot_precision
from .relays import coefficients, layout, select_coefficients

MEAN, DEVIATION, PRE, SLOTS = (tl.constexpr(i) for i in range(4))  # blocks of a program's memory; the first PRE is z


@triton.jit
def catch_up_rows(
    row_ptr, inside, last, columns,  # pointers [R, 1] to rows of the table
    history_ptr, capacity, counters_ptr, constants_ptr,
    COLUMNS: tl.constexpr, CLOSED_FORM: tl.constexpr,
):  # fmt: skip
    """Rows p, m, v [3, C] as dense AdamW would have left them by now, in place."""
    dtype: tl.constexpr = row_ptr.dtype.scalar.element_ty
    missed = missed_by(last, history_ptr, capacity, counters_ptr, constants_ptr, CLOSED_FORM, dtype)
    for start in range(0, columns, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        here = inside[:, None] & (column < columns)
        p, m, v = load_columns(row_ptr, columns, column, here)
        p, m, v = follow(p, m, v, last, missed, history_ptr, capacity, counters_ptr, constants_ptr, CLOSED_FORM)
        tl.store(row_ptr + column, p, mask=here)
        tl.store(row_ptr + columns + column, m, mask=here)
        tl.store(row_ptr + 2 * columns + column, v, mask=here)


@triton.jit
def select_rows(
    values_ptr, kept_ptr, rows_ptr, inside_until, row_stride, K,  # [N, 3, C], int8 [R, K] and int64 [R] of this block
    table_ptr, groups,  # as relays.Layout has them
    R: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Which coefficients of a block's rows are selected (eq. 5), ROWS rows and GROUPS groups at a time."""
    for top in range(0, R, ROWS):
        r = (top + tl.arange(0, ROWS)).to(tl.int64)
        here = r < inside_until
        row = tl.load(rows_ptr + r, mask=here, other=0).to(tl.int64)
        for group in range(0, groups, GROUPS):
            k, exists = coefficients(table_ptr, groups, group, GROUPS, SIZE)
            inside = here[:, None] & exists[None, :]
            coef = tl.load(values_ptr + row[:, None] * row_stride + k[None, :], mask=inside, other=0.0)
            kept = select_coefficients(coef, exists, table_ptr, groups, group, GROUPS, SIZE)
            tl.store(kept_ptr + r[:, None] * K + k[None, :], kept.to(tl.int8), mask=inside)


@triton.jit
def relay_tile(coef_at, kept_at, relays_ptr, inside, start, K, T, KT: tl.constexpr, W: tl.constexpr):
    """Relays start .. start + KT: their coefficients [R, KT], which of these are selected, themselves [KT, T]."""
    k, t = start + tl.arange(0, KT), tl.arange(0, W)
    here = inside[:, None] & (k < K)[None, :]
    coef = tl.load(coef_at + k[None, :], mask=here, other=0.0)
    kept = tl.load(kept_at + k[None, :], mask=here, other=0) != 0
    relays = tl.load(relays_ptr + k[:, None] * T + t[None, :], mask=(k < K)[:, None] & (t < T)[None, :], other=0.0)
    return coef, kept, relays


@triton.jit
def posterior_rows(
    coef_at, kept_at, relays_ptr, saved_at, row, inside,  # pointers to rows [R, 1], their ids [R]
    K, T, seed, noise_step,
    KT: tl.constexpr, R: tl.constexpr, W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z = mean + sigma * noise [R, T] and KL(q || N(0, I)) [R] (eqs. 2 to 6). Mean, sigma * noise and z are saved."""
    t = tl.arange(0, W)
    here = inside[:, None] & (t < T)[None, :]
    mean = tl.load(coef_at + K + t[None, :], mask=here, other=0.0)  # the residual
    log_std = tl.load(coef_at + K + T + t[None, :], mask=here, other=0.0)
    for start in range(0, K, KT):
        coef, kept, relays = relay_tile(coef_at, kept_at, relays_ptr, inside, start, K, T, KT, W)
        mean += tl.dot(tl.where(kept, coef, 0.0), relays, input_precision=PRECISION)
    std = tl.exp(log_std)
    noise = normals(seed, tl.full([], 0, tl.uint32), noise_step, row, tl.arange(0, W // 4), mean.dtype)
    deviation = tl.where(here, std * noise, 0.0)
    kl = tl.sum(tl.where(here, 0.5 * (mean * mean + std * std - 1) - log_std, 0.0), axis=1)
    z = mean + deviation
    tl.store(saved_at + t[None, :] + R * W * MEAN, mean)
    tl.store(saved_at + t[None, :] + R * W * DEVIATION, deviation)
    tl.store(saved_at + t[None, :] + R * W * PRE, z)
    return z, kl


@triton.jit
def decoder_forward(
    z, saved_at, weights_ptr, widths_ptr, layers, K, T,  # widths: int32 [layers + 1], T first, by ALIGN
    R: tl.constexpr, W: tl.constexpr, ALIGN: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The last hidden layer's outputs [R, W], and where the head starts, by ALIGN. Saves what activations get.

    Widths and places are counted by ALIGN, which divides them all: a product by it tells the compiler so.
    """
    w = tl.arange(0, W)
    place, width = tl.full([], 0, tl.int64) + K * (T // ALIGN), tl.full([], 0, tl.int32) + T // ALIGN
    h = z
    for layer in range(layers):
        width_out = tl.load(widths_ptr + layer + 1)
        at, n_in, n_out = place * ALIGN, width * ALIGN, width_out * ALIGN
        bias = tl.load(weights_ptr + at + n_out * n_in + w, mask=w < n_out, other=0.0)
        pre = dense(h, weight_tile(weights_ptr + at, w, w, n_in, n_out, n_in), bias, PRECISION)
        tl.store(saved_at + w[None, :] + (layer + 1 + PRE) * (R * W), pre)
        h = activate(pre, ACTIVATION)
        place += width_out * (n_in + 1)
        width = width_out
    return h, place


@triton.jit
def entry_losses(
    xhat, x, observed, log_scale_ptr, d_log_scale_ptr, d, D, scale, row_weight, first,
    LIKELIHOOD: tl.constexpr, LEARNED: tl.constexpr,
):  # fmt: skip
    """Losses of the observed entries [R, DT], their derivatives by xhat times row_weight; adds a learned scale's."""
    if LIKELIHOOD == "bernoulli":
        loss, slope = bernoulli(xhat, x)
    elif LEARNED:
        free = tl.load(log_scale_ptr + d, mask=d < D, other=0.0)
        square = tl.exp(2 * free)
        spread = tl.sqrt(tl.full([], scale, x.dtype) * tl.full([], scale, x.dtype) + square)  # scale: the least one
        loss, slope = gaussian(xhat, x, spread[None, :])
        by_scale = tl.where(observed, gaussian_by_scale(xhat, x, spread[None, :]), 0.0)
        add_to(d_log_scale_ptr + d, tl.sum(by_scale, axis=0) * row_weight * square / spread, d < D, first)
    else:
        loss, slope = gaussian(xhat, x, tl.full([1, 1], scale, x.dtype))
    return tl.where(observed, loss, 0.0), tl.where(observed, slope * row_weight, 0.0)


@triton.jit
def head_loss_and_gradients(
    h, z, saved_at, head_ptr, d_head_ptr, layers, n_h, T, D,  # [R, W], [R, W]; weight [D, F], bias, log scale
    x_ptr, mask_ptr, x_row, inside, x_stride, mask_stride, x_scale, scale, row_weight, first,
    R: tl.constexpr, W: tl.constexpr, DT: tl.constexpr, CHUNK: tl.constexpr, ACTIVATION: tl.constexpr,
    LINEAR_PATH: tl.constexpr, LIKELIHOOD: tl.constexpr, LEARNED: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """-log p(x_observed | z) [R]; d loss by h and, by the linear path, z [R, W]; adds the head's gradients."""
    w = tl.arange(0, W)
    nll = tl.zeros([R], h.dtype)
    dh, dz = tl.zeros_like(h), tl.zeros_like(z)
    F = n_h
    if LINEAR_PATH:
        F += T
    bias_at = tl.full([], 0, tl.int64) + D * F
    for start in range(0, D, DT):
        column, left = tl.arange(0, DT), D - start
        d = start + column
        row_at = tl.full([], F, tl.int64) * start  # the tile's rows of the weight
        weight = weight_tile(head_ptr + row_at, w, column, n_h, left, F)  # [W, DT]
        xhat = dense(h, weight, tl.load(head_ptr + bias_at + d, mask=d < D, other=0.0), PRECISION)
        if LINEAR_PATH:
            path = weight_tile(head_ptr + row_at + n_h, w, column, T, left, F)
            xhat += tl.dot(z, path, input_precision=PRECISION)
        cells = inside[:, None] & (d < D)[None, :]
        x, observed = load_observed(
            x_ptr, mask_ptr, x_row[:, None], d[None, :], cells, x_stride, mask_stride, x_scale, MASK, h.dtype
        )
        loss, dxhat = entry_losses(
            xhat, x, observed, head_ptr + bias_at + D, d_head_ptr + bias_at + D, d, D, scale, row_weight, first,
            LIKELIHOOD, LEARNED,
        )  # fmt: skip
        nll += tl.sum(loss, axis=1)
        dh += tl.dot(dxhat, tl.trans(weight), input_precision=PRECISION)
        add_to(d_head_ptr + bias_at + d, tl.sum(dxhat, axis=0), d < D, first)
        add_weight_gradient(
            d_head_ptr + row_at, dxhat, column, left, saved_at + (layers + PRE) * (R * W), n_h, layers > 0, F, first,
            CHUNK, ACTIVATION, PRECISION,
        )  # fmt: skip
        if LINEAR_PATH:
            dz += tl.dot(dxhat, tl.trans(path), input_precision=PRECISION)
            add_weight_gradient(
                d_head_ptr + row_at + n_h, dxhat, column, left, saved_at + R * W * PRE, T, False, F, first,
                CHUNK, ACTIVATION, PRECISION,
            )  # fmt: skip
    return nll, dh, dz


@triton.jit
def decoder_backward(
    dh, saved_at, weights_ptr, grads_ptr, place, widths_ptr, layers, first,  # place: of the head, by ALIGN
    R: tl.constexpr, W: tl.constexpr, ALIGN: tl.constexpr, CHUNK: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """d loss / d z [R, W] from that by the hidden layers' outputs; adds the layers' gradients."""
    w = tl.arange(0, W)
    for back in range(layers):
        layer = layers - 1 - back
        width_out = tl.load(widths_ptr + layer + 1)
        n_in, n_out = tl.load(widths_ptr + layer) * ALIGN, width_out * ALIGN
        place -= width_out * (n_in + 1)
        at = place * ALIGN
        saved = saved_at + (layer + PRE) * (R * W)
        dpre = dh * activation_slope(tl.load(saved + w[None, :] + R * W), ACTIVATION)
        add_to(grads_ptr + at + n_out * n_in + w, tl.sum(dpre, axis=0), w < n_out, first)
        add_weight_gradient(
            grads_ptr + at, dpre, w, n_out, saved, n_in, layer > 0, n_in, first, CHUNK, ACTIVATION, PRECISION
        )
        weight = weight_tile(weights_ptr + at, w, w, n_in, n_out, n_in)
        dh = tl.dot(dpre, tl.trans(weight), input_precision=PRECISION)
    return dh


@triton.jit
def decoder_loss_and_gradients(
    z, saved_at, weights_ptr, grads_ptr, widths_ptr, layers, K, T, n_h, D,
    x_ptr, mask_ptr, x_row, inside, x_stride, mask_stride, x_scale, scale, row_weight, first,
    R: tl.constexpr, W: tl.constexpr, DT: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
    ACTIVATION: tl.constexpr, LINEAR_PATH: tl.constexpr, LIKELIHOOD: tl.constexpr, LEARNED: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """-log p(x_observed | z) [R] and d loss / d z [R, W]; adds the gradients of decoder and scale."""
    h, head = decoder_forward(z, saved_at, weights_ptr, widths_ptr, layers, K, T, R, W, ALIGN, ACTIVATION, PRECISION)
    tl.debug_barrier()
    nll, dh, dz = head_loss_and_gradients(
        h, z, saved_at, weights_ptr + head * ALIGN, grads_ptr + head * ALIGN, layers, n_h, T, D,
        x_ptr, mask_ptr, x_row, inside, x_stride, mask_stride, x_scale, scale, row_weight, first,
        R, W, DT, CHUNK, ACTIVATION, LINEAR_PATH, LIKELIHOOD, LEARNED, MASK, PRECISION,
    )  # fmt: skip
    dz += decoder_backward(
        dh, saved_at, weights_ptr, grads_ptr, head, widths_ptr, layers, first,
        R, W, ALIGN, CHUNK, ACTIVATION, PRECISION,
    )  # fmt: skip
    return nll, dz


@triton.jit
def count_steps(steps_ptr, n_steps, STEPS: tl.constexpr):
    """Each of steps [n_steps] plus 1."""
    i = tl.arange(0, STEPS)
    tl.store(steps_ptr + i, tl.load(steps_ptr + i, mask=i < n_steps, other=0) + 1, mask=i < n_steps)


@triton.jit
def update_tile(row_ptr, columns, column, grad, inside, sizes):
    """AdamW's step of some columns of p, m, v, which lie `columns` apart; sizes: by `step_sizes`."""
    p, m, v = load_columns(row_ptr, columns, column, inside)
    p, m, v = stepped(p, m, v, grad, sizes)
    tl.store(row_ptr + column, p, mask=inside)
    tl.store(row_ptr + columns + column, m, mask=inside)
    tl.store(row_ptr + 2 * columns + column, v, mask=inside)


@triton.jit
def update_rows(
    dz, coef_at, kept_at, relays_ptr, d_relays_ptr, saved_at, inside, K, T, kl_weight, sizes, first,
    KT: tl.constexpr, R: tl.constexpr, W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Steps log_std, residual and coefficients, given d loss / d z [R, W]; adds the relays' gradient."""
    columns = K + 2 * T
    t = tl.arange(0, W)
    here = inside[:, None] & (t < T)[None, :]
    dmean = dz + kl_weight * tl.load(saved_at + t[None, :] + R * W * MEAN)
    deviation = tl.load(saved_at + t[None, :] + R * W * DEVIATION)
    std = tl.exp(tl.load(coef_at + K + T + t[None, :], mask=here, other=0.0))
    dlog_std = dz * deviation + kl_weight * (std * std - 1)
    update_tile(coef_at, columns, K + t[None, :], dmean, here, sizes)
    update_tile(coef_at, columns, K + T + t[None, :], dlog_std, here, sizes)
    for start in range(0, K, KT):  # apart from the next loop for its layout, and ahead of the coefficients' step
        k = start + tl.arange(0, KT)
        coef, kept, _ = relay_tile(coef_at, kept_at, relays_ptr, inside, start, K, T, KT, W)
        drelays = tl.dot(tl.trans(tl.where(kept, coef, 0.0)), dmean, input_precision=PRECISION)
        add_to(d_relays_ptr + k[:, None] * T + t[None, :], drelays, (k < K)[:, None] & (t < T)[None, :], first)
    tl.debug_barrier()
    for start in range(0, K, KT):
        k = start + tl.arange(0, KT)
        _, kept, relays = relay_tile(coef_at, kept_at, relays_ptr, inside, start, K, T, KT, W)
        dcoef = tl.where(kept, tl.dot(dmean, tl.trans(relays), input_precision=PRECISION), 0.0)
        update_tile(coef_at, columns, k[None, :], dcoef, inside[:, None] & (k < K)[None, :], sizes)


@triton.jit(do_not_specialize=["seed", "first_block"])
def elbo_rows_kernel(
    values_ptr, last_ptr,  # [N, 3, C], int32 [N]; C = K + 2 T: coefficients, residual, log_std
    history_ptr, counters_ptr, constants_ptr, rates_ptr,  # the rows' clock (catch_up.py)
    rows_ptr, count_ptr, noise_step_ptr,  # int64 [B], [], []: only the first `count` rows are there
    x_ptr, mask_ptr, groups_ptr, widths_ptr,  # [N, D], its mask, relays.Layout.table, see decoder_forward
    weights_ptr, weight_steps_ptr, n_steps,  # [P], float32 [n_steps]: each counted up
    partials_ptr, losses_ptr,  # [programs, P], float64 [programs, 2]: nll and kl
    saved_ptr, kept_ptr,  # [programs, SLOTS + layers, R, W], int8 [programs, R, K]
    capacity, x_stride, mask_stride, K, T, n_h, D, P, groups, layers, first_block,  # n_h: the last width
    seed: tl.uint64, kl_weight: tl.float64, x_scale: tl.float64, scale: tl.float64,
    R: tl.constexpr, W: tl.constexpr, KT: tl.constexpr, DT: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
    SELECT_ROWS: tl.constexpr, SELECT_GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, STEPS: tl.constexpr,
    ALIGN: tl.constexpr,  # divides all widths
    CLOSED_FORM: tl.constexpr, GATHERED: tl.constexpr, ACTIVATION: tl.constexpr, LINEAR_PATH: tl.constexpr,
    LIKELIHOOD: tl.constexpr, LEARNED: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of R rows: loss, gradients of what is shared (added to those of the launches before), the rows' step.

    x, mask: [N, D], or [B, D] where GATHERED; kl_weight: of the KL term; scale: a fixed one, or the least of LEARNED.
    """
    program = tl.program_id(0).to(tl.int64)
    block = first_block + program
    first = first_block == 0
    batch = tl.load(count_ptr)
    here = block * R < batch
    if not here:
        return
    dtype = values_ptr.dtype.element_ty
    row_weight = (1.0 / tl.maximum(batch, 1).to(tl.float64)).to(dtype)
    columns = K + 2 * T
    now = tl.load(counters_ptr)
    sizes = step_sizes((now + tl.load(counters_ptr + 1) + 1).to(tl.float64), constants_ptr, rates_ptr, dtype)
    if block == 0:  # nobody else reads these steps in this launch, and nobody writes them in the next
        count_steps(weight_steps_ptr, n_steps, STEPS)
    grads_ptr = partials_ptr + program * P
    r = tl.arange(0, R)
    saved_at = saved_ptr + (program * (layers + SLOTS) * R + r[:, None]) * W
    kept_of_program = kept_ptr + program * R * K
    kept_at = kept_of_program + r[:, None] * K
    position = block * R + r
    inside = position < batch
    row = tl.load(rows_ptr + position, mask=inside, other=0).to(tl.int64)
    last = tl.load(last_ptr + row, mask=inside, other=0).to(tl.int64)
    coef_at = values_ptr + row[:, None] * (3 * columns)
    catch_up_rows(
        coef_at, inside, last, columns, history_ptr, capacity, counters_ptr, constants_ptr, COLUMNS, CLOSED_FORM
    )
    tl.debug_barrier()
    select_rows(
        values_ptr, kept_of_program, rows_ptr + block * R, batch - block * R, 3 * columns, K,
        groups_ptr, groups, R, SELECT_ROWS, SELECT_GROUPS, GROUP_SIZE,
    )  # fmt: skip
    tl.debug_barrier()
    z, kl = posterior_rows(
        coef_at, kept_at, weights_ptr, saved_at, row, inside, K, T, seed, tl.load(noise_step_ptr), KT, R, W, PRECISION
    )
    nll, dz = decoder_loss_and_gradients(
        z, saved_at, weights_ptr, grads_ptr, widths_ptr, layers, K, T, n_h, D,
        x_ptr, mask_ptr, position if GATHERED else row, inside, x_stride, mask_stride, x_scale,
        scale, row_weight, first,
        R, W, DT, CHUNK, ALIGN, ACTIVATION, LINEAR_PATH, LIKELIHOOD, LEARNED, MASK, PRECISION,
    )  # fmt: skip
    update_rows(
        dz, coef_at, kept_at, weights_ptr, grads_ptr, saved_at, inside, K, T,
        tl.full([], kl_weight, dtype) * row_weight, sizes, first, KT, R, W, PRECISION,
    )  # fmt: skip
    tl.store(last_ptr + row, (tl.zeros_like(row) + now + 1).to(tl.int32), mask=inside)
    add_to(losses_ptr + 2 * program, tl.sum(nll.to(tl.float64), axis=0), here, first)
    add_to(losses_ptr + 2 * program + 1, tl.sum(tl.where(inside, kl, 0.0).to(tl.float64), axis=0), here, first)


@triton.jit
def summed(partials_ptr, i, P, programs, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum over programs of partials [programs, P] at i (int [BLOCK]), in an order that is always the same."""
    total = tl.zeros([BLOCK], partials_ptr.dtype.element_ty)
    for start in range(0, programs, AT_ONCE):
        program = (start + tl.arange(0, AT_ONCE)).to(tl.int64)[:, None]
        inside = (program < programs) & (i < P)[None, :]
        total += tl.sum(tl.load(partials_ptr + program * P + i[None, :], mask=inside, other=0.0), axis=0)
    return total


@triton.jit
def add_losses(losses_ptr, loss_ptr, noise_step_ptr, batch, programs):
    """Sums of nll, kl and rows of this step, and of all steps since someone cleared these: loss [2, 3]. Counts on."""
    for loss in tl.static_range(2):
        total = tl.full([], 0, tl.float64)
        for program in range(programs):
            total += tl.load(losses_ptr + 2 * program + loss)
        tl.store(loss_ptr + loss, total)
        tl.store(loss_ptr + 3 + loss, tl.load(loss_ptr + 3 + loss) + total)
    tl.store(loss_ptr + 2, batch.to(tl.float64))
    tl.store(loss_ptr + 5, tl.load(loss_ptr + 5) + batch.to(tl.float64))
    tl.store(noise_step_ptr, tl.load(noise_step_ptr) + 1)


@triton.jit
def step_weights(
    weights_ptr, partials_ptr, constants_ptr, rates_ptr, steps_ptr, block, P, second, programs,
    AT_ONCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """AdamW's step of a block of the shared parameters; those from `second` on have the second pair of rates."""
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = summed(partials_ptr, i, P, programs, AT_ONCE, BLOCK)
    rates = rates_ptr + 2 * (i >= second).to(tl.int32)
    sizes = step_sizes(tl.load(steps_ptr).to(tl.float64), constants_ptr, rates, grad.dtype)
    update_tile(weights_ptr, P, i, grad, i < P, sizes)


@triton.jit
def elbo_finish_kernel(
    weights_ptr, partials_ptr, losses_ptr, loss_ptr,  # [3, P], [programs, P], float64 [programs, 2], float64 [2, 3]
    weight_constants_ptr, weight_rates_ptr, weight_steps_ptr,  # float64 [5], [2, 2], float32 [n_steps]
    history_ptr, counters_ptr, constants_ptr, rates_ptr,  # the rows' clock
    noise_step_ptr, count_ptr,
    capacity, P, second, most_programs,
    R: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr, CLOCK_BLOCK: tl.constexpr,
    CLOSED_FORM: tl.constexpr,
):  # fmt: skip
    """Program 0 adds up the losses and advances clock and noise; the others step the shared parameters."""
    program = tl.program_id(0)
    batch = tl.load(count_ptr)
    if batch == 0:  # then nobody has counted Adam's step either, whose number the update divides by
        return
    programs = tl.minimum(tl.cdiv(batch, R), most_programs).to(tl.int32)  # those that had rows
    if program == 0:
        add_losses(losses_ptr, loss_ptr, noise_step_ptr, batch, programs)
        advance_clock(history_ptr, capacity, counters_ptr, constants_ptr, rates_ptr, CLOSED_FORM, CLOCK_BLOCK)
    else:
        step_weights(
            weights_ptr, partials_ptr, weight_constants_ptr, weight_rates_ptr, weight_steps_ptr,
            program - 1, P, second, programs, AT_ONCE, BLOCK,
        )  # fmt: skip


ROWS = 16  # of a block
RELAYS = 32  # of a tile
CHUNK = 32  # inputs of a layer for which its weight's gradient is found at once
ROW_COLUMNS = 64  # parameters of a row that are brought up to date at once
SELECT_PLACES = 2048  # coefficients of a selection tile
PARTIAL_BYTES = 1 << 30  # at most, of all programs together
FINISH_BLOCK = 128


@functools.cache  # never dropped: a CUDA graph may hold its address
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32).to(device)


def elbo_rows(
    values: Tensor, last: Tensor, clock: Sequence[Tensor], closed_form: bool, noise_step: Tensor, seed: int,
    rows: Tensor, count: Tensor, x: Tensor, mask: Tensor | None, x_scale: float, gathered: bool,
    weights: Tensor, weight_steps: Tensor,
    groups: Sequence[int], active: Sequence[int], hidden: Sequence[int], linear_path: bool, activation: str,
    likelihood: str, scale: float, learned: bool, kl_weight: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The first launch of a step: rows and weight_steps in place; returns the programs' gradients and losses."""
    num_relays, columns = sum(groups), values.shape[2]
    latent_dim = (columns - num_relays) // 2
    widths = latent_dim, *hidden
    unit = math.gcd(16, *widths)
    parts = layout(tuple(groups), tuple(active), values.device)
    width = max(16, triton.next_power_of_2(max(widths)))
    blocks, num_weights = triton.cdiv(len(rows), ROWS), weights.shape[1]
    affordable = max(1, PARTIAL_BYTES // (num_weights * weights.itemsize))
    programs = min(blocks, multiprocessors(values.device), affordable)
    select_rows, select_groups = parts.tile(ROWS, SELECT_PLACES)
    x, mask, x_stride, mask_stride, mask_kind = observed_arguments(x, mask)
    partials = values.new_empty(programs, num_weights)
    losses = values.new_empty(programs, 2, dtype=torch.float64)
    saved = values.new_empty(programs, SLOTS.value + len(hidden), ROWS, width)
    kept = values.new_empty(programs, ROWS, num_relays, dtype=torch.int8)
    with torch.cuda.device_of(values):
        for first_block in range(0, blocks, programs):
            elbo_rows_kernel[(programs,)](
                values, last, *clock, rows, count, noise_step, x, mask, parts.table,
                _on_device(tuple(n // unit for n in widths), values.device), weights, weight_steps, len(weight_steps),
                partials, losses, saved, kept,
                clock[0].shape[1], x_stride, mask_stride,
                num_relays, latent_dim, widths[-1], x.shape[1], num_weights, parts.groups, len(hidden),
                first_block,
                seed % 2**64, kl_weight, x_scale, scale,
                R=ROWS, W=width, KT=RELAYS, DT=32 if linear_path else 64, CHUNK=CHUNK, COLUMNS=ROW_COLUMNS,
                SELECT_ROWS=select_rows, SELECT_GROUPS=select_groups, GROUP_SIZE=parts.size,
                ALIGN=unit, STEPS=triton.next_power_of_2(len(weight_steps)),
                CLOSED_FORM=closed_form, GATHERED=gathered,
                ACTIVATION=activation, LINEAR_PATH=linear_path, LIKELIHOOD=likelihood, LEARNED=learned,
                MASK=mask_kind, PRECISION=dot_precision(values.dtype),
                num_warps=8, num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip
    return partials, losses


def elbo_finish(
    partials: Tensor, losses: Tensor, clock: Sequence[Tensor], closed_form: bool, noise_step: Tensor, count: Tensor,
    weights: Tensor, weight_constants: Tensor, weight_rates: Tensor, weight_steps: Tensor, second: int, loss: Tensor,
) -> None:  # fmt: skip
    """The second launch: steps weights [3, P], adds to loss, advances the clock and noise_step, all in place."""
    programs, num_weights = partials.shape
    with torch.cuda.device_of(weights):
        elbo_finish_kernel[(1 + triton.cdiv(num_weights, FINISH_BLOCK),)](
            weights, partials, losses, loss, weight_constants, weight_rates, weight_steps,
            *clock, noise_step, count,
            clock[0].shape[1], num_weights, second, programs,
            R=ROWS, AT_ONCE=16, BLOCK=FINISH_BLOCK, CLOCK_BLOCK=CLOCK_BLOCK, CLOSED_FORM=closed_form,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
