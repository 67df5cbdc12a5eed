"""Bringing rows up to date on the device, for every kernel that reads a table (reference.gauss_nodes, catch_up).

A clock lives on the device, so that a CUDA graph replays with its present state (AdamClock in rvi_fast.clock):
    history    float64 [6, capacity]: F0..F3, log of the accumulated weight decay, learning rate (rvi_fast.clock)
    counters   int64 [4]: index, Adam's step number less the index, window, early (see follow)
    constants  float64 [5]: beta1, beta2, their logs, eps
    rates      float64 [2]: learning rate and weight decay of the step to come
`last` is int64 [R] throughout. What concerns whole rows is computed in float64 once, by missed_by and step_sizes; what
concerns entries, in the table's dtype, by follow and stepped, which a kernel may call on some columns at a time.
"""

import triton
import triton.language as tl

EPS_MEETS_GRADIENT = tl.constexpr(10.0)  # as in rvi_fast.clock
LOG_DECAY, LR = tl.constexpr(4), tl.constexpr(5)  # rows of a clock's history, after the moments F0..F3


@triton.jit
def load_columns(row_ptr, slot_stride, column, inside):
    """p, m, v [R, BLOCK] of some columns of rows; zeros where they are not inside."""
    p = tl.load(row_ptr + column, mask=inside, other=0.0)
    m = tl.load(row_ptr + slot_stride + column, mask=inside, other=0.0)
    return p, m, tl.load(row_ptr + 2 * slot_stride + column, mask=inside, other=0.0)


@triton.jit
def one_minus_exp(x):
    """1 - exp(x) for float64 x <= 0, without cancellation near 0."""
    near = tl.maximum(x, -1e-2)
    series = -near * (1.0 + near * (0.5 + near * (1.0 / 6 + near * (1.0 / 24 + near * (1.0 / 120 + near / 720)))))
    return tl.where(x >= -1e-2, series, 1.0 - tl.exp(x))


@triton.jit
def gauss_nodes(f0, f1, f2, f3):
    """Two-node Gauss rule (w1, e1, w2, e2) of the measure with moments F0..F3; e = 1, w = 0 where it is empty.

    float64 [R] each.
    """
    empty = f0 <= 0
    scale = 1.0 / tl.where(empty, 1.0, f0)
    a, second, third = tl.where(empty, 1.0, f1 * scale), f2 * scale, f3 * scale
    var = second - a * a
    skew = third - 3 * a * second + 2 * a * a * a
    one = empty | (var <= 1e-12 * a * a)
    spread = tl.where(one, 1.0, var)
    h = skew / (2 * spread)
    r = tl.sqrt(h * h + spread)
    w1 = tl.where(one, f0, f0 * (h + r) / (2 * r))
    return w1, tl.where(one, a, a + h - r), f0 - w1, tl.where(one, a, a + h + r)


@triton.jit
def missed_by(last, history_ptr, capacity, counters_ptr, constants_ptr, CLOSED_FORM: tl.constexpr, dtype: tl.constexpr):
    """What rows last touched at `last` need by now: nodes (w1, eps e1, w2, eps e2), decays of p, m, v, to be summed?

    [R] of dtype each; computed in float64. To be summed: bool [R], whether two nodes may not do for some entries.
    """
    now, offset, early = tl.load(counters_ptr), tl.load(counters_ptr + 1), tl.load(counters_ptr + 3)
    log_beta1, log_beta2, eps = tl.load(constants_ptr + 2), tl.load(constants_ptr + 3), tl.load(constants_ptr + 4)
    last = tl.minimum(last, now)  # a LazyClock stands at 0: its rows are never behind
    f0, f1 = tl.load(history_ptr + last), tl.load(history_ptr + capacity + last)
    f2, f3 = tl.load(history_ptr + 2 * capacity + last), tl.load(history_ptr + 3 * capacity + last)
    w1, e1, w2, e2 = gauss_nodes(f0, f1, f2, f3)
    log_decay_ptr = history_ptr + capacity * LOG_DECAY
    decay = tl.exp(tl.load(log_decay_ptr + now) - tl.load(log_decay_ptr + last))
    behind = last < now
    age = tl.where(behind, now - last, 1).to(tl.float64)  # a beta of 0 has the log -inf, and 0 * -inf is no number
    decay_m = tl.where(behind, tl.exp(age * log_beta1), 1.0)
    decay_v = tl.where(behind, tl.exp(age * log_beta2), 1.0)
    nodes = w1.to(dtype), (e1 * eps).to(dtype), w2.to(dtype), (e2 * eps).to(dtype)
    summed = behind
    if CLOSED_FORM:
        summed = behind & (last + offset < early)
    return nodes, (decay.to(dtype), decay_m.to(dtype), decay_v.to(dtype)), summed


@triton.jit
def displacement(m, root, nodes):
    """How far zero gradients have moved p [R, C] since the row was touched, by two nodes; root = sqrt(v)."""
    w1, e1, w2, e2 = nodes
    moved = w1[:, None] / (root + e1[:, None]) + w2[:, None] / (root + e2[:, None])
    return tl.where(m != 0, m * moved, 0.0)


@triton.jit
def summed_displacement(moved, m, root, wanted, last, history_ptr, capacity, counters_ptr, constants_ptr):
    """moved, and in the `wanted` entries (bool [R, C]) the same summed over every missed step."""
    now, offset, window = tl.load(counters_ptr), tl.load(counters_ptr + 1), tl.load(counters_ptr + 2)
    beta1, beta2 = tl.load(constants_ptr), tl.load(constants_ptr + 1)
    log_beta1, log_beta2 = tl.load(constants_ptr + 2), tl.load(constants_ptr + 3)
    eps = tl.load(constants_ptr + 4).to(m.dtype)
    log_decay_ptr, lr_ptr = history_ptr + capacity * LOG_DECAY, history_ptr + capacity * LR
    log_decay = tl.load(log_decay_ptr + last)
    row_wanted = tl.max(wanted.to(tl.int32), axis=1) > 0
    longest = tl.minimum(tl.max(tl.where(row_wanted, now - last, 0), axis=0), window)
    moved = tl.where(wanted, 0.0, moved)
    step = (last + offset).to(tl.float64)
    some = tl.maximum(step, 1.0)  # as in missed_by
    until1 = tl.where(step > 0, tl.exp(some * log_beta1), 1.0)  # beta^(steps until the row was touched)
    until2 = tl.where(step > 0, tl.exp(some * log_beta2), 1.0)
    since1, since2 = tl.full(last.shape, 1.0, tl.float64), tl.full(last.shape, 1.0, tl.float64)
    for j in range(1, longest + 1):
        since1, since2 = since1 * beta1, since2 * beta2
        at = tl.minimum(last + j, now)
        lr = tl.where(last + j <= now, tl.load(lr_ptr + at), 0.0)
        size = (lr * tl.exp(log_decay - tl.load(log_decay_ptr + at))).to(m.dtype)
        weight = size * since1.to(m.dtype) / (1.0 - until1 * since1).to(m.dtype)
        shrink = tl.sqrt(since2.to(m.dtype) / (1.0 - until2 * since2).to(m.dtype))
        moved += tl.where(wanted, weight[:, None] * m / (root * shrink[:, None] + eps), 0.0)
    return moved


@triton.jit
def follow(p, m, v, last, missed, history_ptr, capacity, counters_ptr, constants_ptr, CLOSED_FORM: tl.constexpr):
    """Some columns p, m, v [R, C] of rows as dense AdamW would have left them; missed: by `missed_by`.

    Entries whose gradients met eps, which only those of rows last touched before Adam's step `early` can, are summed
    exactly over (the first `window` of) the missed steps; so is everything where CLOSED_FORM is False.
    """
    nodes, decays, summed = missed
    decay, decay_m, decay_v = decays
    root = tl.sqrt(v)
    moved = displacement(m, root, nodes)
    if tl.max(summed.to(tl.int32), axis=0) > 0:
        wanted = summed[:, None] & (m != 0)
        if CLOSED_FORM:
            wanted = wanted & (root < nodes[3][:, None] * EPS_MEETS_GRADIENT)
        moved = summed_displacement(moved, m, root, wanted, last, history_ptr, capacity, counters_ptr, constants_ptr)
    return (p - moved) * decay[:, None], m * decay_m[:, None], v * decay_v[:, None]


@triton.jit
def step_sizes(step, constants_ptr, rates_ptr, dtype: tl.constexpr):
    """What AdamW's step number `step` (float64, [] or [R, 1]) needs: how far p, m, v move. Computed in float64."""
    beta1, beta2 = tl.load(constants_ptr), tl.load(constants_ptr + 1)
    log_beta1, log_beta2, eps = tl.load(constants_ptr + 2), tl.load(constants_ptr + 3), tl.load(constants_ptr + 4)
    lr, weight_decay = tl.load(rates_ptr), tl.load(rates_ptr + 1)
    size = (lr / one_minus_exp(step * log_beta1)).to(dtype)
    stretch = (1.0 / tl.sqrt(one_minus_exp(step * log_beta2))).to(dtype)
    keep = (1.0 - lr * weight_decay).to(dtype)
    return size, stretch, keep, (1.0 - beta1).to(dtype), (1.0 - beta2).to(dtype), eps.to(dtype)


@triton.jit
def stepped(p, m, v, grad, sizes):
    """One AdamW step of p, m, v with grad [R, C] (reference.adamw_step); sizes: by `step_sizes`."""
    size, stretch, keep, gain1, gain2, eps = sizes
    m += gain1 * (grad - m)
    v += gain2 * (grad * grad - v)
    return p * keep - size * m / (tl.sqrt(v) * stretch + eps), m, v
