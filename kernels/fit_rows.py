"""Posteriors of new rows under frozen relays and decoder: all steps of Adam in one launch (reference.fit_rows).

A program keeps the parameters of R rows in registers, and their moments too where RESIDENT. At every step it reads
relays and decoder, which stay in the cache, and its rows of x, a tile of columns at a time, and draws the noise
itself. Rows share nothing, so their bits do not depend on each other.

A row's parameters are a tuple: residual and log_std [R, W], then the coefficients in pieces [R, KT], each one operand
of a product. What registers have no room for waits in the program's own memory, in which each of these has a place:
p, m and v unless RESIDENT; for coefficients the threshold at which the next selection starts; and for residual and
log_std the posterior mean and sigma * noise of the step, until the gradient needs them.

What is frozen is packed before the launch, padded with zeros, which every product and activation takes to zero: relays
[K', W]; hidden layers [layers, OUT = W, IN = W] and their biases [layers, W]; the head's rows [D', W], and behind them
those that see z by a linear path; of the columns, bias and scale [2, D'].
"""

# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .catch_up import stepped
from .likelihood import bernoulli, gaussian, load_observed, observed_arguments
from .mlp import activate, activation_slope
from .philox import normals
from .precision import dot_precision

STREAM = tl.constexpr(1 << 28)  # "infer", see reference.philox_words
FIELD = tl.constexpr(10)  # bits of a group's count, of which one integer holds several
CLOSED, TIED, OPEN = (tl.constexpr(i) for i in range(3))  # how far the search for a threshold is
RESIDUAL, LOG_STD, COEFFICIENTS = (tl.constexpr(i) for i in range(3))  # parts of a row's parameters; pieces follow
P, M, V, OTHER = (tl.constexpr(i) for i in range(4))  # what waits in memory of each part


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a b [R, ..], in the dtype of a; b may be narrower, and a is then rounded to it."""
    return tl.dot(a.to(b.dtype), b, input_precision=PRECISION).to(a.dtype)


@triton.jit
def magnitude(weight):
    """Integers in the order of |weight|, float32 or float64: its bits without the sign."""
    if weight.dtype == tl.float64:
        key = weight.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        key = weight.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return key


@triton.jit
def group_count(counts, shift):
    """A group's part of its row's counts, int32."""
    return (counts >> shift & (2**FIELD - 1)).to(tl.int32)


@triton.jit
def counts_from(keys, least, ones, PIECES: tl.constexpr):
    """How many keys of every group are `least` or more: [R, 1], FIELD bits a group."""
    hits = tl.zeros_like(ones[0])
    for piece in tl.static_range(PIECES):
        hits += tl.where(keys[piece] >= least[piece], ones[piece], 0)
    return tl.sum(hits, axis=1)[:, None]


@triton.jit
def kept_of_ties(keys, lows, ones, shifts, actives, PIECES: tl.constexpr):
    """What is selected where `lows` are the smallest selected keys; of equal ones, those of lower index."""
    over = ()
    for piece in tl.static_range(PIECES):
        over += (lows[piece] + 1,)
    above = counts_from(keys, over, ones, PIECES)
    ties_before = tl.zeros_like(above)
    kept = ()
    for piece in tl.static_range(PIECES):
        tie = tl.where(keys[piece] == lows[piece], ones[piece], 0)
        rank = group_count(tl.cumsum(tie, axis=1) + ties_before, shifts[piece])
        ties_before += tl.sum(tie, axis=1)[:, None]
        room = actives[piece] - group_count(above, shifts[piece])
        kept += ((ones[piece] != 0) & ((keys[piece] > lows[piece]) | ((tie != 0) & (rank <= room))),)
    return kept


@triton.jit
def narrowed(low, high, probe, count, one, shift, active, reach):
    """A piece's bracket after a count at `probe`, the next probe, at most `reach` away, and what is left to do."""
    found = group_count(count, shift)
    low = tl.where(found >= active, probe, low)
    high = tl.where(found < active, probe, high)
    state = tl.where(found == active, CLOSED, tl.where(high - low > 1, OPEN, TIED))
    state = tl.where(one != 0, state, CLOSED)
    way = tl.minimum(tl.maximum(low + (high - low) // 2 - probe, -reach), reach)
    return low, high, tl.where(state == OPEN, probe + way, low), state


@triton.jit
def select_near(keys, probes, inside, groups_ptr, KT: tl.constexpr, PIECES: tl.constexpr, COUNT: tl.constexpr):
    """Which coefficients are selected (eq. 5), to the bit, and the thresholds found: PIECES of [R, KT] each.

    A threshold that leaves a group as many keys as it may select settles it. The search gallops from where the last
    step's was and bisects from there on, for all groups of all rows at once; where none settles it, keys are equal.
    """
    HIGHEST: tl.constexpr = 0x7FFFFFFFFFFFFFFF if keys[0].dtype == tl.int64 else 0x7FFFFFFF
    REACH: tl.constexpr = 1 << 45 if keys[0].dtype == tl.int64 else 1 << 16  # a hundredth of a coefficient, or less
    ones, shifts, actives, lows, highs = (), (), (), (), ()
    for piece in tl.static_range(PIECES):
        k = piece * KT + tl.arange(0, KT)
        shift, active = tl.load(groups_ptr + k)[None, :], tl.load(groups_ptr + PIECES * KT + k)[None, :]
        one = tl.full([1, KT], 1, COUNT) << shift
        ones += (tl.where(inside[:, None] & (active > 0), one, 0),)
        shifts += (shift,)
        actives += (active,)
        lows += (tl.zeros_like(keys[piece]),)
        highs += (tl.zeros_like(keys[piece]) + HIGHEST,)
    reach = tl.full([], REACH, keys[0].dtype)
    state = tl.full([], OPEN, tl.int32)
    while state == OPEN:
        count = counts_from(keys, probes, ones, PIECES)
        states = tl.zeros(keys[0].shape, tl.int32)
        new_lows, new_highs, new_probes = (), (), ()
        for piece in tl.static_range(PIECES):
            low, high, probe, left = narrowed(
                lows[piece], highs[piece], probes[piece], count, ones[piece], shifts[piece], actives[piece], reach
            )
            new_lows += (low,)
            new_highs += (high,)
            new_probes += (probe,)
            states = tl.maximum(states, left)
        lows, highs, probes = new_lows, new_highs, new_probes
        state = tl.max(tl.max(states, axis=1), axis=0)
        reach = tl.minimum(reach, HIGHEST // 8) * 4
    kept = ()
    for piece in tl.static_range(PIECES):
        kept += ((keys[piece] >= lows[piece]) & (ones[piece] != 0),)
    if state == TIED:
        kept = kept_of_ties(keys, lows, ones, shifts, actives, PIECES)
    return kept, lows


@triton.jit
def columns_of(part: tl.constexpr, K, T, KT: tl.constexpr):
    """The first of a row's columns in this part of its parameters, and how many are left from there."""
    first, n = (part - COEFFICIENTS) * KT, K - (part - COEFFICIENTS) * KT
    if part == RESIDUAL:
        first, n = K, T
    elif part == LOG_STD:
        first, n = K + T, T
    return first, n


@triton.jit
def cells_of(part: tl.constexpr, row, inside, K, T, KT: tl.constexpr, W: tl.constexpr):
    """Where a part of rows [M, C] lies, and what of it is there: [R, KT] or [R, W] each."""
    WIDTH: tl.constexpr = W if part < COEFFICIENTS else KT
    first, n = columns_of(part, K, T, KT)
    c = tl.arange(0, WIDTH)
    return row[:, None] * (K + 2 * T) + (c + first)[None, :], inside[:, None] & (c < n)[None, :]


@triton.jit
def waiting(
    ptr, what: tl.constexpr, part: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, KT: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Where something of a part waits in the program's memory: pointers [R, KT] or [R, W]."""
    WIDTH: tl.constexpr = W if part < COEFFICIENTS else KT
    BEFORE: tl.constexpr = part * W if part < COEFFICIENTS else COEFFICIENTS * W + (part - COEFFICIENTS) * KT
    ALL: tl.constexpr = COEFFICIENTS * W + PIECES * KT
    return ptr + (what * ALL + BEFORE) * R + tl.arange(0, R)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def relay_piece(relays_ptr, piece, KT: tl.constexpr, W: tl.constexpr):
    k = piece * KT + tl.arange(0, KT)
    return tl.load(relays_ptr + k[:, None] * W + tl.arange(0, W)[None, :])


@triton.jit
def posterior_mean(params, kept, relays_ptr, KT: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr):
    """mu_i [R, W] (eqs. 3 and 4)."""
    mean = params[RESIDUAL]
    for piece in tl.static_range(PIECES):
        coef = tl.where(kept[piece], params[COEFFICIENTS + piece], 0.0)
        mean += product(coef, relay_piece(relays_ptr, piece, KT, mean.shape[1]), PRECISION)
    return mean


@triton.jit
def deviation(log_std, noise_of, tag, step, T):
    """sigma * lambda [R, W] (eq. 6). noise_of: seed and row ids [R]."""
    seed, row_id = noise_of
    W: tl.constexpr = log_std.shape[1]
    noise = normals(seed, tag, step, row_id, tl.arange(0, W // 4), log_std.dtype)
    return tl.where((tl.arange(0, W) < T)[None, :], tl.exp(log_std) * noise, 0.0)


@triton.jit
def weight_rows(weight_ptr, first, OUT: tl.constexpr, W: tl.constexpr):
    """W' [IN = W, OUT] of outputs first .. first + OUT of a layer [.., W]."""
    o = first + tl.arange(0, OUT)
    return tl.load(weight_ptr + (o[None, :] * W + tl.arange(0, W)[:, None]))


@triton.jit
def reconstruct(
    h, z, head, cells, start,  # [R, W], [R, W], see fit_rows_kernel for the tuples
    DT: tl.constexpr, LINEAR_PATH: tl.constexpr, LIKELIHOOD: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Losses of the observed entries of a tile of columns and their derivatives by xhat [R, DT]; the head's tiles."""
    head_ptr, columns_ptr, D_padded = head
    x_ptr, mask_ptr, row, inside, D, x_stride, mask_stride, x_scale = cells
    W: tl.constexpr = h.shape[1]
    d = start + tl.arange(0, DT)
    x, observed = load_observed(
        x_ptr, mask_ptr, row[:, None], d[None, :], inside[:, None] & (d < D)[None, :], x_stride, mask_stride, x_scale,
        MASK, h.dtype,
    )  # fmt: skip
    weight = weight_rows(head_ptr, start, DT, W)
    path = weight
    xhat = product(h, weight, PRECISION) + tl.load(columns_ptr + d)[None, :]
    if LINEAR_PATH:
        path = weight_rows(head_ptr + D_padded * W, start, DT, W)
        xhat += product(z, path, PRECISION)
    if LIKELIHOOD == "bernoulli":
        loss, slope = bernoulli(xhat, x)
    else:
        loss, slope = gaussian(xhat, x, tl.load(columns_ptr + D_padded + d)[None, :])
    return tl.where(observed, loss, 0.0), tl.where(observed, slope, 0.0), weight, path


@triton.jit
def decoder_gradient(
    h, z, layers, head, cells, LAYER: tl.constexpr, LAYERS: tl.constexpr,
    DT: tl.constexpr, ACTIVATION: tl.constexpr, LINEAR_PATH: tl.constexpr, LIKELIHOOD: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d -log p(x_observed | z) by h, what hidden layer LAYER sees, and by z where the head sees it: [R, W] each."""
    W: tl.constexpr = h.shape[1]
    dh, dz = tl.zeros_like(h), tl.zeros_like(h)
    if LAYER == LAYERS:
        for start in range(0, cells[4], DT):
            _, dxhat, weight, path = reconstruct(
                h, z, head, cells, start, DT, LINEAR_PATH, LIKELIHOOD, MASK, PRECISION
            )  # fmt: skip
            dh += product(dxhat, tl.trans(weight), PRECISION)
            if LINEAR_PATH:
                dz += product(dxhat, tl.trans(path), PRECISION)
    else:
        weights_ptr, biases_ptr = layers
        weight_ptr = weights_ptr + LAYER * W * W
        bias = tl.load(biases_ptr + LAYER * W + tl.arange(0, W))
        pre = product(h, weight_rows(weight_ptr, 0, W, W), PRECISION) + bias[None, :]
        dact, dz = decoder_gradient(
            activate(pre, ACTIVATION), z, layers, head, cells, LAYER + 1, LAYERS,
            DT, ACTIVATION, LINEAR_PATH, LIKELIHOOD, MASK, PRECISION,
        )  # fmt: skip
        dpre = dact * activation_slope(pre, ACTIVATION)
        dh = product(dpre, tl.trans(weight_rows(weight_ptr, 0, W, W)), PRECISION)
    return dh, dz


@triton.jit
def decoder_loss(
    z, layers, head, cells, LAYERS: tl.constexpr,
    DT: tl.constexpr, ACTIVATION: tl.constexpr, LINEAR_PATH: tl.constexpr, LIKELIHOOD: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """-log p(x_observed | z) [R]."""
    W: tl.constexpr = z.shape[1]
    weights_ptr, biases_ptr = layers
    h = z
    for layer in range(LAYERS):
        bias = tl.load(biases_ptr + layer * W + tl.arange(0, W))
        pre = product(h, weight_rows(weights_ptr + layer * W * W, 0, W, W), PRECISION) + bias[None, :]
        h = activate(pre, ACTIVATION)
    nll = tl.zeros([z.shape[0]], z.dtype)
    for start in range(0, cells[4], DT):
        loss, _, _, _ = reconstruct(h, z, head, cells, start, DT, LINEAR_PATH, LIKELIHOOD, MASK, PRECISION)
        nll += tl.sum(loss, axis=1)
    return nll


@triton.jit
def posterior_gradient(dz, mean, spread, log_std, kl_weight):
    """d loss by the mean, which is the residual's, and by log_std, from that by z: [R, W] each."""
    std = tl.exp(log_std)
    return dz + kl_weight * mean, dz * spread + kl_weight * (std * std - 1)


@triton.jit
def start_rows(
    start_ptr, memory, row, inside, K, T,
    R: tl.constexpr, W: tl.constexpr, KT: tl.constexpr, PIECES: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Parameters ahead of the first step and their moments, unless they wait in memory."""
    params, ms, vs = (), (), ()
    for part in tl.static_range(PIECES + COEFFICIENTS):
        at, here = cells_of(part, row, inside, K, T, KT, W)
        p = tl.load(start_ptr + at, mask=here, other=0.0)
        none = tl.zeros_like(p)
        if RESIDENT:
            params += (p,)
            ms += (none,)
            vs += (none,)
        else:
            tl.store(waiting(memory, P, part, R, W, KT, PIECES), p)
            tl.store(waiting(memory, M, part, R, W, KT, PIECES), none)
            tl.store(waiting(memory, V, part, R, W, KT, PIECES), none)
        if part >= COEFFICIENTS:
            tl.store(waiting(memory, OTHER, part, R, W, KT, PIECES), none)
    return params, ms, vs


@triton.jit
def waiting_params(memory, R: tl.constexpr, W: tl.constexpr, KT: tl.constexpr, PIECES: tl.constexpr):
    params = ()
    for part in tl.static_range(PIECES + COEFFICIENTS):
        params += (tl.load(waiting(memory, P, part, R, W, KT, PIECES)),)
    return params


@triton.jit
def kept_coefficients(
    params, memory, inside, groups_ptr,
    R: tl.constexpr, W: tl.constexpr, KT: tl.constexpr, PIECES: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Which are selected; the thresholds wait in memory for the next time."""
    kept = ()
    if PIECES > 0:
        keys, probes = (), ()
        for piece in tl.static_range(PIECES):
            before = tl.load(waiting(memory, OTHER, COEFFICIENTS + piece, R, W, KT, PIECES))
            keys += (magnitude(params[COEFFICIENTS + piece]),)
            probes += (magnitude(before),)
        kept, thresholds = select_near(keys, probes, inside, groups_ptr, KT, PIECES, COUNT)
        for piece in tl.static_range(PIECES):
            found = thresholds[piece].to(params[RESIDUAL].dtype, bitcast=True)
            tl.store(waiting(memory, OTHER, COEFFICIENTS + piece, R, W, KT, PIECES), found)
    return kept


@triton.jit
def step_sizes(rate_ptr, constants_ptr):
    """What catch_up.stepped needs. rate: for m and sqrt(v), of a step; constants: keep, gains of m and v, eps."""
    keep, gain1, gain2 = tl.load(constants_ptr), tl.load(constants_ptr + 1), tl.load(constants_ptr + 2)
    return tl.load(rate_ptr), tl.load(rate_ptr + 1), keep, gain1, gain2, tl.load(constants_ptr + 3)


@triton.jit
def step_rows(
    params, ms, vs, kept, by_mean, by_log_std, memory, relays_ptr, sizes,
    R: tl.constexpr, W: tl.constexpr, KT: tl.constexpr, PIECES: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adam's step of all parameters: these and their moments, unless they wait in memory, and squares of the gradient
    [R, W] and [R, KT], whose sum is its norm's.
    """
    square, coef_square = tl.zeros([R, W], by_mean.dtype), tl.zeros([R, KT], by_mean.dtype)
    new_params, new_ms, new_vs = (), (), ()
    for part in tl.static_range(PIECES + COEFFICIENTS):
        if part < COEFFICIENTS:
            grad = by_mean if part == RESIDUAL else by_log_std
            square += grad * grad
        else:
            relays = relay_piece(relays_ptr, part - COEFFICIENTS, KT, W)
            grad = tl.where(kept[part - COEFFICIENTS], product(by_mean, tl.trans(relays), PRECISION), 0.0)
            coef_square += grad * grad
        if RESIDENT:
            p, m, v = stepped(params[part], ms[part], vs[part], grad, sizes)
            new_params += (p,)
            new_ms += (m,)
            new_vs += (v,)
        else:
            p_at = waiting(memory, P, part, R, W, KT, PIECES)
            m_at = waiting(memory, M, part, R, W, KT, PIECES)
            v_at = waiting(memory, V, part, R, W, KT, PIECES)
            p, m, v = stepped(tl.load(p_at), tl.load(m_at), tl.load(v_at), grad, sizes)
            tl.store(p_at, p)
            tl.store(m_at, m)
            tl.store(v_at, v)
    return new_params, new_ms, new_vs, square, coef_square


@triton.jit
def store_rows(
    p_ptr, v_ptr, params, vs, memory, row, inside, K, T,
    R: tl.constexpr, W: tl.constexpr, KT: tl.constexpr, PIECES: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Write parameters and second moments [M, C]."""
    for part in tl.static_range(PIECES + COEFFICIENTS):
        at, here = cells_of(part, row, inside, K, T, KT, W)
        p = params[part] if RESIDENT else tl.load(waiting(memory, P, part, R, W, KT, PIECES))
        v = vs[part] if RESIDENT else tl.load(waiting(memory, V, part, R, W, KT, PIECES))
        tl.store(p_ptr + at, p, mask=here)
        tl.store(v_ptr + at, v, mask=here)


@triton.jit(do_not_specialize=["seed", "steps"])
def fit_rows_kernel(
    start_ptr, row_id_ptr,  # [M, C], int64 [M]; C = K + 2 T: coefficients, residual, log_std
    x_ptr, mask_ptr,  # [M, D] and its mask, see load_observed
    relays_ptr, weights_ptr, biases_ptr, head_ptr, columns_ptr,  # see above
    groups_ptr, rates_ptr, constants_ptr,  # int32 [2, K'], see group_table; [steps, 2] and [5], see step_sizes
    p_ptr, v_ptr, grad_norm_ptr, memory_ptr,  # [M, C], [M, C], [M], and each program's memory
    rows, K, T, D, D_padded, steps, x_stride, mask_stride,
    seed: tl.uint64, x_scale: tl.float64,
    R: tl.constexpr, W: tl.constexpr, KT: tl.constexpr, PIECES: tl.constexpr, DT: tl.constexpr,
    LAYERS: tl.constexpr, COUNT: tl.constexpr, ACTIVATION: tl.constexpr, LINEAR_PATH: tl.constexpr,
    LIKELIHOOD: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """A block of R rows: `steps` steps of Adam."""
    dtype = start_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = row < rows
    noise_of = seed, tl.load(row_id_ptr + row, mask=inside, other=0)
    layers, head = (weights_ptr, biases_ptr), (head_ptr, columns_ptr, D_padded)
    cells = x_ptr, mask_ptr, row, inside, D, x_stride, mask_stride, x_scale
    stream, zero = tl.full([], STREAM, tl.int32), tl.full([], 0, tl.int32)
    memory = memory_ptr + tl.program_id(0).to(tl.int64) * (4 * R * (COEFFICIENTS * W + PIECES * KT))
    params, ms, vs = start_rows(start_ptr, memory, row, inside, K, T, R, W, KT, PIECES, RESIDENT)
    tl.store(grad_norm_ptr + row, tl.zeros([R], dtype), mask=inside)
    for step in tl.range(steps, disable_licm=True):  # invariants would take the registers
        tl.debug_barrier()  # what waits may have been written by another thread
        now = params if RESIDENT else waiting_params(memory, R, W, KT, PIECES)
        kept = kept_coefficients(now, memory, inside, groups_ptr, R, W, KT, PIECES, COUNT)
        mean = posterior_mean(now, kept, relays_ptr, KT, PIECES, PRECISION)
        spread = deviation(now[LOG_STD], noise_of, stream, zero + step, T)
        z = mean + spread
        mean_at = waiting(memory, OTHER, RESIDUAL, R, W, KT, PIECES)
        spread_at = waiting(memory, OTHER, LOG_STD, R, W, KT, PIECES)
        tl.store(mean_at, mean)
        tl.store(spread_at, spread)
        dh, dz = decoder_gradient(
            z, z, layers, head, cells, 0, LAYERS, DT, ACTIVATION, LINEAR_PATH, LIKELIHOOD, MASK, PRECISION
        )
        tl.debug_barrier()
        log_std = now[LOG_STD] if RESIDENT else tl.load(waiting(memory, P, LOG_STD, R, W, KT, PIECES))
        by_mean, by_log_std = posterior_gradient(
            dh + dz, tl.load(mean_at), tl.load(spread_at), log_std, tl.load(constants_ptr + 4)
        )
        sizes = step_sizes(rates_ptr + 2 * step, constants_ptr)
        params, ms, vs, square, coef_square = step_rows(
            params, ms, vs, kept, by_mean, by_log_std, memory, relays_ptr, sizes, R, W, KT, PIECES, RESIDENT, PRECISION
        )
        if step == steps - 1:
            norm = tl.sqrt(tl.sum(square, axis=1) + tl.sum(coef_square, axis=1))
            tl.store(grad_norm_ptr + row, norm, mask=inside)
    tl.debug_barrier()
    store_rows(p_ptr, v_ptr, params, vs, memory, row, inside, K, T, R, W, KT, PIECES, RESIDENT)


@triton.jit(do_not_specialize=["seed", "draws"])
def elbo_of_rows_kernel(
    p_ptr, row_id_ptr, x_ptr, mask_ptr, relays_ptr, weights_ptr, biases_ptr, head_ptr, columns_ptr, groups_ptr,
    elbo_ptr,  # [M]; the others as in fit_rows_kernel
    rows, K, T, D, D_padded, draws, x_stride, mask_stride, seed: tl.uint64, x_scale: tl.float64,
    R: tl.constexpr, W: tl.constexpr, KT: tl.constexpr, PIECES: tl.constexpr, DT: tl.constexpr,
    LAYERS: tl.constexpr, COUNT: tl.constexpr, ACTIVATION: tl.constexpr, LINEAR_PATH: tl.constexpr,
    LIKELIHOOD: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The mean of the ELBO of a block of R rows over draws 1 .. `draws` of step 0."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = row < rows
    noise_of = seed, tl.load(row_id_ptr + row, mask=inside, other=0)
    layers, head = (weights_ptr, biases_ptr), (head_ptr, columns_ptr, D_padded)
    cells = x_ptr, mask_ptr, row, inside, D, x_stride, mask_stride, x_scale
    params, keys, probes, kept = (), (), (), ()
    for part in tl.static_range(PIECES + COEFFICIENTS):
        at, here = cells_of(part, row, inside, K, T, KT, W)
        params += (tl.load(p_ptr + at, mask=here, other=0.0),)
        if part >= COEFFICIENTS:
            keys += (magnitude(params[part]),)
            probes += (tl.zeros_like(keys[part - COEFFICIENTS]),)
    if PIECES > 0:
        kept, _ = select_near(keys, probes, inside, groups_ptr, KT, PIECES, COUNT)
    mean, log_std = posterior_mean(params, kept, relays_ptr, KT, PIECES, PRECISION), params[LOG_STD]
    std = tl.exp(log_std)
    loss = tl.sum(0.5 * (mean * mean + std * std - 1) - log_std, axis=1)
    stream, zero = tl.full([], STREAM, tl.int32), tl.full([], 0, tl.int32)
    for draw in range(1, draws + 1):
        z = mean + deviation(log_std, noise_of, stream | (draw << 12), zero, T)
        nll = decoder_loss(z, layers, head, cells, LAYERS, DT, ACTIVATION, LINEAR_PATH, LIKELIHOOD, MASK, PRECISION)
        loss += nll / draws
    tl.store(elbo_ptr + row, -loss, mask=inside)


class Frozen(NamedTuple):
    """Relays and decoder as the kernel reads them, and their sizes."""

    relays: Tensor
    weights: Tensor
    biases: Tensor
    head: Tensor
    columns: Tensor


def packed(
    relays: Tensor, layers: Sequence[Tensor], scale: Tensor, relay_tile: int, width: int, column_tile: int,
    linear_path: bool, narrow: torch.dtype,
) -> Frozen:  # fmt: skip
    """layers: weight and bias of every layer, the head's last; scale: of the columns, [D] or []. narrow: of weights."""
    *hidden, head, bias = layers
    weights, biases = hidden[::2], hidden[1::2]
    columns, features = head.shape
    latent_dim = relays.shape[1]
    new = functools.partial(torch.zeros, dtype=narrow, device=head.device)
    wide = functools.partial(torch.zeros, dtype=head.dtype, device=head.device)
    padded = triton.cdiv(columns, column_tile) * column_tile
    frozen = Frozen(
        new(triton.cdiv(len(relays), relay_tile) * relay_tile, width),
        new(len(weights), width, width),
        wide(len(weights), width),
        new(1 + linear_path, padded, width),
        wide(2, padded),
    )
    frozen.relays[: len(relays), :latent_dim] = relays
    for layer, (weight, b) in enumerate(zip(weights, biases, strict=True)):
        frozen.weights[layer, : weight.shape[0], : weight.shape[1]] = weight
        frozen.biases[layer, : len(b)] = b
    seen = features - latent_dim if linear_path else features
    frozen.head[0, :columns, :seen] = head[:, :seen]
    if linear_path:
        frozen.head[1, :columns, :latent_dim] = head[:, seen:]
    frozen.columns[0, :columns] = bias
    frozen.columns[1] = 1.0
    frozen.columns[1, :columns] = scale
    return frozen


def tile(size: int, most: int) -> int:
    """A power of two that holds `size`, between 16, which tl.dot needs, and `most`."""
    return min(most, max(16, triton.next_power_of_2(size)))


@functools.cache  # never dropped: a CUDA graph may hold the table's address
def group_table(groups: tuple[int, ...], active: tuple[int, ...], relay_tile: int, device: torch.device) -> Tensor:
    """int32 [2, K'], see `places`: in which bits of a count each coefficient is counted, and its group's |B|."""
    padding = -sum(groups) % relay_tile
    shifts = [FIELD.value * g for g, size in enumerate(groups) for _ in range(size)]
    counts = [n for size, n in zip(groups, active, strict=True) for _ in range(size)]
    rows = [[*numbers, *[0] * padding] for numbers in (shifts, counts)]
    return torch.tensor(rows, dtype=torch.int32).to(device)


ROWS = 16  # of a program
WARPS = 8
ELBO_WARPS = 4  # 8 would be given 128 registers each on sm_80, and spill
RELAYS = 64  # of a piece, at most
COLUMNS = 64  # of a tile, at most
WIDEST = 128  # latent dimensions and hidden units
PRECISIONS = {"float32": "tf32x3", "tf32": "tf32", "bfloat16": "ieee"}  # as tl.dot's input_precision


def fit_rows(
    start: Tensor, row_ids: Tensor, x: Tensor, mask: Tensor | None, x_scale: float,
    relays: Tensor, layers: Sequence[Tensor], scale: Tensor, groups: Sequence[int], active: Sequence[int],
    activation: str, linear_path: bool, likelihood: str, kl_weight: float,
    seed: int, rates: Tensor, hyper: tuple[float, float, float], draws: int, precision: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Parameters and second moments [M, C], the ELBO and the last gradient's norm [M].

    layers: weight and bias of each, the head's last; rates: float64 [steps, 2], what a step multiplies m and sqrt(v)
    by; precision: of products, one of PRECISIONS, or None for torch's own.
    """
    (num_rows, columns), (num_relays, latent_dim) = x.shape, relays.shape
    elbo, grad_norm = start.new_empty(num_rows), start.new_empty(num_rows)
    p, v = torch.empty_like(start), torch.empty_like(start)
    if not num_rows:
        return p, v, elbo, grad_norm
    width = tile(max([latent_dim, *(len(bias) for bias in layers[1:-2:2])]), WIDEST)
    relay_tile, column_tile = tile(num_relays, RELAYS), tile(columns, COLUMNS // 2 if linear_path else COLUMNS)
    narrow = torch.bfloat16 if precision == "bfloat16" else start.dtype
    own = dot_precision(start.dtype)
    dots = own if precision is None or own == "ieee" else PRECISIONS[precision]  # only NVIDIA has others
    frozen = packed(relays, layers, scale, relay_tile, width, column_tile, linear_path, narrow)
    x, mask, x_stride, mask_stride, mask_kind = observed_arguments(x, mask)
    programs, pieces = triton.cdiv(num_rows, ROWS), len(frozen.relays) // relay_tile
    memory = start.new_empty(programs, 4, ROWS * (COEFFICIENTS.value * width + len(frozen.relays)))
    constants = start.new_tensor((1.0, 1 - hyper[0], 1 - hyper[1], hyper[2], kl_weight))
    seed %= 2**64
    of_rows = row_ids, x, mask, *frozen, group_table(tuple(groups), tuple(active), relay_tile, start.device)
    sizes = num_rows, num_relays, latent_dim, columns, frozen.columns.shape[1]
    form = dict(
        R=ROWS, W=width, KT=relay_tile, PIECES=pieces, DT=column_tile,
        LAYERS=len(frozen.weights), COUNT=tl.int32 if len(groups) <= 3 else tl.int64,
        ACTIVATION=activation, LINEAR_PATH=linear_path, LIKELIHOOD=likelihood, MASK=mask_kind, PRECISION=dots,
        num_warps=WARPS, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    with torch.cuda.device_of(start):
        fit_rows_kernel[(programs,)](
            start, *of_rows, rates.to(start.dtype), constants, p, v, grad_norm, memory,
            *sizes, len(rates), x_stride, mask_stride, seed, x_scale, RESIDENT=dots != "tf32x3", **form,
        )  # fmt: skip
        form["num_warps"] = WARPS if dots == "tf32x3" else ELBO_WARPS
        elbo_of_rows_kernel[(programs,)](
            p, *of_rows, elbo, *sizes, draws, x_stride, mask_stride, seed, x_scale, **form
        )  # fmt: skip
    return p, v, elbo, grad_norm
