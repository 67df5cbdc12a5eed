"""Bringing rows up to date on the device, for every kernel that reads a table (reference.gauss_nodes, catch_up).

A clock lives on the device, so that a CUDA graph replays with its present state:
    history    float64 [6, capacity]: F0..F3, log of the accumulated weight decay, learning rate (rvi_fast.clock)
    counters   int64 [4]: index, Adam's step number less the index, window, early (see catch_up)
    constants  float64 [5]: beta1, beta2, their logs, eps
    rates      float64 [2]: learning rate and weight decay of the step to come
"""

import triton
import triton.language as tl

EPS_MEETS_GRADIENT = tl.constexpr(10.0)  # as in rvi_fast.clock
LOG_DECAY, LR = tl.constexpr(4), tl.constexpr(5)  # rows of a clock's history, after the moments F0..F3


@triton.jit
def one_minus_exp(x):
    """1 - exp(x) for float64 x <= 0, without cancellation near 0."""
    series = -x * (1.0 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720))))))
    return tl.where(x > -1e-2, series, 1.0 - tl.exp(x))


@triton.jit
def gauss_nodes(f0, f1, f2, f3):
    """Two-node Gauss rule (w1, e1, w2, e2) of the measure with moments F0..F3. float64 [R] each."""
    total = tl.where(f0 > 0, f0, 1.0)
    a, second, third = f1 / total, f2 / total, f3 / total
    var = second - a * a
    skew = third - 3 * a * second + 2 * a * a * a
    one = (var <= 1e-12 * a * a) | (f0 <= 0)
    spread = tl.where(one, 1.0, var)
    h = skew / (2 * spread)
    r = tl.sqrt(h * h + spread)
    w1 = tl.where(one, f0, f0 * (h + r) / (2 * r))
    return w1, tl.where(one, a, a + h - r), f0 - w1, tl.where(one, a, a + h + r)


@triton.jit
def missed_by(last, history_ptr, capacity, now, log_beta1, log_beta2):
    """What rows last touched at `last` (int64 [R]) need by `now`: w1, e1, w2, e2, decay, decay_m, decay_v.

    float64 [R] each.
    """
    f0, f1 = tl.load(history_ptr + last), tl.load(history_ptr + capacity + last)
    f2, f3 = tl.load(history_ptr + 2 * capacity + last), tl.load(history_ptr + 3 * capacity + last)
    w1, e1, w2, e2 = gauss_nodes(f0, f1, f2, f3)
    log_decay_ptr = history_ptr + capacity * LOG_DECAY
    decay = tl.exp(tl.load(log_decay_ptr + now) - tl.load(log_decay_ptr + last))
    behind = last < now
    age = tl.where(behind, now - last, 1).to(tl.float64)  # a beta of 0 has the log -inf, and 0 * -inf is no number
    decay_m = tl.where(behind, tl.exp(age * log_beta1), 1.0)
    decay_v = tl.where(behind, tl.exp(age * log_beta2), 1.0)
    return w1, e1, w2, e2, decay, decay_m, decay_v


@triton.jit
def displacement(m, v, w1, e1, w2, e2, eps):
    """How far zero gradients have moved p [R, C] since the row was touched, by two nodes; w, e: float64 [R]."""
    root = tl.sqrt(v)
    near = root + (e1 * eps).to(m.dtype)[:, None]
    far = root + (e2 * eps).to(m.dtype)[:, None]
    moved = w1.to(m.dtype)[:, None] / tl.where(near > 0, near, 1.0)
    moved += w2.to(m.dtype)[:, None] / tl.where(far > 0, far, 1.0)
    return m * tl.where(m != 0, moved, 0.0)


@triton.jit
def summed_displacement(m, v, wanted, last, history_ptr, capacity, counters_ptr, constants_ptr):
    """The same for the `wanted` entries (bool [R, C]), summed over every missed step."""
    now, offset, window = tl.load(counters_ptr), tl.load(counters_ptr + 1), tl.load(counters_ptr + 2)
    log_beta1, log_beta2 = tl.load(constants_ptr + 2), tl.load(constants_ptr + 3)
    eps = tl.load(constants_ptr + 4).to(m.dtype)
    log_decay_ptr, lr_ptr = history_ptr + capacity * LOG_DECAY, history_ptr + capacity * LR
    log_decay = tl.load(log_decay_ptr + last)
    age = now - last
    row_wanted = tl.max(wanted.to(tl.int32), axis=1) > 0
    longest = tl.minimum(tl.max(tl.where(row_wanted, age, 0), axis=0), window)
    root = tl.sqrt(v)
    moved = tl.zeros_like(m)
    for j in range(1, longest + 1):
        at = tl.minimum(last + j, now)
        lr = tl.where(j <= age, tl.load(lr_ptr + at), 0.0)
        step = (at + offset).to(tl.float64)
        regrow = tl.exp(log_decay - tl.load(log_decay_ptr + at) + j * log_beta1)
        weight = lr * regrow / one_minus_exp(step * log_beta1)
        shrink = tl.sqrt(tl.exp(j * log_beta2) / one_minus_exp(step * log_beta2))
        bottom = root * shrink.to(m.dtype)[:, None] + eps
        moved += tl.where(wanted, weight.to(m.dtype)[:, None] * m / bottom, 0.0)
    return moved


@triton.jit
def catch_up(p, m, v, last, history_ptr, capacity, counters_ptr, constants_ptr, CLOSED_FORM: tl.constexpr):
    """Rows p, m, v [R, C] last touched at `last` (int64 [R]) as dense AdamW would have left them by now.

    Entries whose gradients met eps, which only those of rows last touched before Adam's step `early` can, are summed
    exactly over (the first `window` of) the missed steps; so is everything where CLOSED_FORM is False.
    """
    now, offset, early = tl.load(counters_ptr), tl.load(counters_ptr + 1), tl.load(counters_ptr + 3)
    log_beta1, log_beta2, eps = tl.load(constants_ptr + 2), tl.load(constants_ptr + 3), tl.load(constants_ptr + 4)
    w1, e1, w2, e2, decay, decay_m, decay_v = missed_by(last, history_ptr, capacity, now, log_beta1, log_beta2)
    wanted = (last < now)[:, None] & (m != 0)
    moved = tl.zeros_like(m)
    if CLOSED_FORM:
        moved = displacement(m, v, w1, e1, w2, e2, eps)
        floor = (e2 * eps * EPS_MEETS_GRADIENT).to(v.dtype)
        wanted = wanted & (last + offset < early)[:, None] & (tl.sqrt(v) < floor[:, None])
    exact = summed_displacement(m, v, wanted, last, history_ptr, capacity, counters_ptr, constants_ptr)
    p = (p - tl.where(wanted, exact, moved)) * decay.to(p.dtype)[:, None]
    return p, m * decay_m.to(m.dtype)[:, None], v * decay_v.to(v.dtype)[:, None]


@triton.jit
def adamw_step(p, m, v, grad, step, constants_ptr, rates_ptr):
    """AdamW's step number `step` (float64, [] or [R, 1]) of p, m, v with grad [R, C] (reference.adamw_step)."""
    beta1, beta2 = tl.load(constants_ptr), tl.load(constants_ptr + 1)
    log_beta1, log_beta2, eps = tl.load(constants_ptr + 2), tl.load(constants_ptr + 3), tl.load(constants_ptr + 4)
    lr, weight_decay = tl.load(rates_ptr), tl.load(rates_ptr + 1)
    size = (lr / one_minus_exp(step * log_beta1)).to(p.dtype)
    root = tl.sqrt(one_minus_exp(step * log_beta2)).to(p.dtype)
    m += (1.0 - beta1).to(p.dtype) * (grad - m)
    v += (1.0 - beta2).to(p.dtype) * (grad * grad - v)
    p = p * (1.0 - lr * weight_decay).to(p.dtype) - size * m / (tl.sqrt(v) / root + eps.to(p.dtype))
    return p, m, v
