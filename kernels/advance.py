"""The clock's own step: what rows that were not touched will have missed (AdamClock.advance in rvi_fast.clock)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .catch_up import LOG_DECAY, LR, one_minus_exp

BLOCK = 512  # past steps at once: one pass over the 374 that betas (0.9, 0.999) change


@triton.jit
def log_one_plus(x):
    """log(1 + x) for float64 x > -1, without cancellation near 0."""
    rounded = 1.0 + x
    error = tl.where(rounded == 1.0, 1.0, rounded - 1.0)
    return tl.where(rounded == 1.0, x, tl.log(rounded) * (x / error))


@triton.jit
def advance_clock(
    history_ptr, capacity, counters_ptr, constants_ptr, rates_ptr,  # as in kernels/catch_up.py
    CLOSED_FORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count one step at the present rates; one program alone may do so, after all that read the clock.

    F_i[s] += lr b1^j / bc1 (bc2 / b2^j)^((i + 1) / 2) exp(logD[s] - logD[u]) for the steps s = u - j of the window.
    """
    index, offset, window = tl.load(counters_ptr), tl.load(counters_ptr + 1), tl.load(counters_ptr + 2)
    log_beta1, log_beta2 = tl.load(constants_ptr + 2), tl.load(constants_ptr + 3)
    lr, weight_decay = tl.load(rates_ptr), tl.load(rates_ptr + 1)
    log_decay_ptr = history_ptr + capacity * LOG_DECAY
    log_decay = tl.load(log_decay_ptr + index) + log_one_plus(-lr * weight_decay)
    now = index + 1
    if CLOSED_FORM:
        step = (now + offset).to(tl.float64)
        size = lr / one_minus_exp(step * log_beta1)
        root = tl.sqrt(one_minus_exp(step * log_beta2))
        for start in range(tl.maximum(now - window, 0), now, BLOCK):
            s = start + tl.arange(0, BLOCK)
            inside = s < now
            age = tl.where(inside, now - s, 1).to(tl.float64)
            regrow = tl.exp(tl.load(log_decay_ptr + s, mask=inside, other=0.0) - log_decay)
            weight = size * tl.exp(age * log_beta1) * regrow
            for order in tl.static_range(4):
                weight *= root * tl.exp(-0.5 * age * log_beta2)
                moment_ptr = history_ptr + capacity * order + s
                tl.store(moment_ptr, tl.load(moment_ptr, mask=inside, other=0.0) + weight, mask=inside)
    tl.store(log_decay_ptr + now, log_decay)
    tl.store(history_ptr + capacity * LR + now, lr)
    tl.debug_barrier()  # every warp has read the index
    tl.store(counters_ptr, now)


@triton.jit(do_not_specialize=["capacity"])
def advance_kernel(
    history_ptr, counters_ptr, constants_ptr, rates_ptr,  # float64 [6, capacity], int64 [4], float64 [5], float64 [2]
    capacity,
    CLOSED_FORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    advance_clock(history_ptr, capacity, counters_ptr, constants_ptr, rates_ptr, CLOSED_FORM, BLOCK)


def advance(history: Tensor, counters: Tensor, constants: Tensor, rates: Tensor, closed_form: bool) -> None:
    """Advance a clock by one step at `rates`, in place. The history must have room for it."""
    with torch.cuda.device_of(history):
        advance_kernel[(1,)](
            history, counters, constants, rates, history.shape[1], CLOSED_FORM=closed_form, BLOCK=BLOCK,
            num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
