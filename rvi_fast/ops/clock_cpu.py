"""A clock's arithmetic on a CPU, by NumPy: on a batch's few hundred numbers torch takes three times as long a call.

The equations are those of AdamClock and reference.gauss_nodes; history is a clock's, float64 [6, capacity].
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..clock import AdamClock
from ..reference import Missed

LOG_DECAY, LR = 4, 5  # rows of a clock's history, after the moments F0..F3


def missed(clock: AdamClock, last: Tensor) -> Missed:
    """What rows with `last` (int32 [B]) need, as AdamClock.missed: float64 [B] each."""
    history, at = clock.history.numpy(), last.numpy()
    log_decay = history[LOG_DECAY]
    age = (clock.index - at).astype(np.float64)
    log_beta1, log_beta2 = clock.hyper.logs()
    with np.errstate(invalid="ignore"):  # a beta of 0 has the log -inf, and 0 * -inf is no number
        decays = [np.where(age > 0, np.exp(age * log), 1.0) for log in (log_beta1, log_beta2)]
    decay = np.exp(log_decay[clock.index] - log_decay[at])
    return Missed(*map(torch.from_numpy, (*gauss_nodes(history[:4].take(at, axis=1)), decay, *decays)))


def gauss_nodes(f: np.ndarray) -> tuple[np.ndarray, ...]:
    """reference.gauss_nodes."""
    a, second, third = f[1:] / np.where(f[0] > 0, f[0], 1.0)
    square = a * a
    var = second - square
    one = (var <= 1e-12 * square) | (f[0] <= 0)
    spread = np.where(one, 1.0, var)
    h = (third - 3 * a * second + 2 * a * square) / (2 * spread)
    r = np.sqrt(h * h + spread)
    w1 = np.where(one, f[0], f[0] * (h + r) / (2 * r))
    return w1, np.where(one, a, a + h - r), f[0] - w1, np.where(one, a, a + h + r)


def advance(clock: AdamClock, lr: float, weight_decay: float) -> None:
    """AdamClock.advance of a history that has room."""
    history, now = clock.history.numpy(), clock.index + 1
    log_decay = history[LOG_DECAY]
    log_decay[now] = log_decay[now - 1] + math.log1p(-lr * weight_decay)
    history[LR, now] = lr
    clock.counters[0] = now
    clock.replayed(1)
    if clock.window and clock.closed_form:
        first = max(0, now - clock.window)
        regrow = np.exp(log_decay[first:now] - log_decay[now])
        history[:4, first:now] += clock.step_weights(lr).numpy()[:, first - now :] * regrow
