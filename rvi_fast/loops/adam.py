"""Dense-equivalent Adam on a CPU: reference.catch_up, gauss_nodes, adamw_step, and the clock's step."""

from __future__ import annotations

import math

import numpy as np

from .jit import compiled, exact
from .memory import copy, prefetch_next
from .threads import share

LOG_DECAY, LR = 4, 5  # rows of a clock's history, after the moments F0..F3


@exact
def missed(history, index, last, log_beta1, log_beta2):
    """What a row touched at `last` needs (reference.Missed), as float64: two nodes and three decays."""
    age = index - last
    decay = math.exp(history[LOG_DECAY, index] - history[LOG_DECAY, last])
    decay_m, decay_v = (math.exp(age * log_beta1), math.exp(age * log_beta2)) if age > 0 else (1.0, 1.0)
    f0 = history[0, last]
    divisor = f0 if f0 > 0 else 1.0
    a, second, third = history[1, last] / divisor, history[2, last] / divisor, history[3, last] / divisor
    var = second - a * a
    if var <= 1e-12 * a * a or f0 <= 0:
        return f0, a, 0.0, a, decay, decay_m, decay_v
    h = (third - 3 * a * second + 2 * a * a * a) / (2 * var)
    r = math.sqrt(h * h + var)
    w1 = f0 * (h + r) / (2 * r)
    return w1, a + h - r, f0 - w1, a + h + r, decay, decay_m, decay_v


@compiled
def read_rows(
    threads, values, rows, last, history, index, log_beta1, log_beta2, eps, least, limit, margin, p, m, v, apart
):
    """p, m, v [B, C] of `rows` in values [N, 3C] as they are after step `index` of the clock.

    apart [B]: whether two nodes are not exact enough for a row. Those last touched before `limit` are looked at: they
    are not where m != 0 and sqrt(v) < margin eps times the larger node.
    """
    clock = history, index, log_beta1, log_beta2
    share(read_part, threads, len(rows), (values, rows, last, clock, eps, least, limit, margin, p, m, v, apart))


@compiled
def read_part(part, values, rows, last, clock, eps, least, limit, margin, p, m, v, apart):
    _, begin, end = part
    history, index, log_beta1, log_beta2 = clock
    width = p.shape[1]
    for b in range(begin, end):
        prefetch_next(values, rows, b)
        at = last[rows[b]]
        w1, e1, w2, e2, decay, decay_m, decay_v = missed(history, index, at, log_beta1, log_beta2)
        copy(values[rows[b], :width], p[b])
        copy(values[rows[b], width : 2 * width], m[b])
        copy(values[rows[b], 2 * width :], v[b])
        floor = max((margin * eps * e2) ** 2, np.finfo(v.dtype).tiny)
        apart[b] = at < limit and any_below(m[b], v[b], floor)
        catch_up(p[b], m[b], v[b], w1, max(eps * e1, least), w2, max(eps * e2, least), decay, decay_m, decay_v)


@compiled
def any_below(m, v, floor):
    """Whether v < floor at any m != 0 of [C]."""
    count, floor = np.int32(0), v.dtype.type(floor)
    for c in range(len(m)):
        count += np.int32((m[c] != 0) & (v[c] < floor))
    return count > 0


@compiled
def catch_up(p, m, v, w1, e1, w2, e2, decay, decay_m, decay_v):
    """reference.catch_up of [C], in place; nodes are scaled by eps."""
    number = p.dtype.type
    w1, e1, w2, e2 = number(w1), number(e1), number(w2), number(e2)
    decay, decay_m, decay_v = number(decay), number(decay_m), number(decay_v)
    for c in range(len(p)):
        root = math.sqrt(v[c])
        p[c] = (p[c] - m[c] * (w1 / (root + e1) + w2 / (root + e2))) * decay
        m[c] *= decay_m
        v[c] *= decay_v


@compiled
def step(p, m, v, grad, size, root, keep, beta1, beta2, eps):
    """reference.adamw_step of [C], in place. size: lr / bc1; root: 1 / sqrt(bc2); keep: 1 - lr * weight_decay."""
    number = p.dtype.type
    size, root, keep, eps = number(size), number(root), number(keep), number(eps)
    take_m, take_v = number(1 - beta1), number(1 - beta2)
    for c in range(len(p)):
        m[c] += take_m * (grad[c] - m[c])
        v[c] += take_v * (grad[c] * grad[c] - v[c])
        p[c] = p[c] * keep - size * m[c] / (math.sqrt(v[c]) * root + eps)


@compiled
def step_all(threads, p, m, v, grad, factors):
    """`step` of [n]; factors: its numbers."""
    share(step_all_part, threads, len(p), (p, m, v, grad, factors))


@compiled
def step_all_part(part, p, m, v, grad, factors):
    _, begin, end = part
    step(p[begin:end], m[begin:end], v[begin:end], grad[begin:end], *factors)


@compiled
def step_rows(threads, values, last, rows, p, m, v, grad, factors, touched):
    """`step` of p, m, v and grad [B, C], into `rows` of values [N, 3C]; `touched` into their `last`."""
    share(step_part, threads, len(rows), (values, last, rows, p, m, v, grad, factors, touched))


@compiled
def step_part(part, values, last, rows, p, m, v, grad, factors, touched):
    _, begin, end = part
    width = grad.shape[1]
    for b in range(begin, end):
        prefetch_next(values, rows, b)
        step(p[b], m[b], v[b], grad[b], *factors)
        copy(p[b], values[rows[b], :width])
        copy(m[b], values[rows[b], width : 2 * width])
        copy(v[b], values[rows[b], 2 * width :])
        last[rows[b]] = touched


@exact
def advance(history, now, window, lr, weight_decay, bc1, bc2, log_beta1, log_beta2):
    """The clock's step number `now`: its decay and lr, and what it adds to the moments of the window before it."""
    history[LOG_DECAY, now] = history[LOG_DECAY, now - 1] + math.log1p(-lr * weight_decay)
    history[LR, now] = lr
    for s in range(max(0, now - window), now):
        age = now - s
        term = lr / bc1 * math.exp(age * log_beta1 + history[LOG_DECAY, s] - history[LOG_DECAY, now])
        inverse_shrink = math.sqrt(bc2) * math.exp(-0.5 * age * log_beta2)
        for order in range(4):
            term *= inverse_shrink
            history[order, s] += term
