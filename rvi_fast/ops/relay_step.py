"""The backward of relay_sample_rows and the step of its rows at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_distinct_rows
from .noise import as_int64
from .registry import operator
from .relays import TRAIN_TAG, SampledRows, relay_sample_rows_backward, run_rows_backward, use_kernel
from .rows import Columns, row_adam_, run_row_adam


def relay_step_(
    values: Tensor,
    last: Tensor,
    columns: Sequence[Columns],
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    sampled: SampledRows,
    relays: Tensor,
    groups: Sequence[int],
    active: Sequence[int],
    seed: int,
    sample: bool,
    lr: Sequence[float | Tensor],
    weight_decay: Sequence[float | Tensor],
) -> Tensor:
    """relay_sample_rows_backward, then row_adam_ with what it gives the rows; returns the relays' gradient [K, T].

    The rows of `sampled` must not repeat. With one AdamClock for all columns a kernel does both, and the gradients of
    the rows are never in memory: what needs these, such as clipping by their norm, cannot have them.
    """
    whole = len(columns) == 1 and columns[0].stop - columns[0].start == values.shape[2]
    groups, active = list(groups), list(active)
    if not (whole and not columns[0].clock.by_row and use_kernel(values)):
        by_rows, by_relays = relay_sample_rows_backward(grad_z, grad_kl, sampled, relays, groups, active, seed, sample)
        if by_rows is None or by_relays is None:
            by_rows, by_relays = sampled.state.new_zeros(sampled.state.shape), relays.new_zeros(relays.shape)
        row_adam_(values, last, sampled.rows, by_rows, columns, lr, weight_decay)
        return by_relays
    check_distinct_rows(sampled.rows, values.shape[0])
    clock = columns[0].clock
    clock.reserve(1)
    clock.set_rates(lr[0], weight_decay[0])
    tensors = clock.history, clock.counters, clock.constants, clock.rates
    by_relays = _relay_step_(
        values, last, *tensors, clock.closed_form, grad_z, grad_kl, *sampled, relays, groups, active, as_int64(seed),
        sample,
    )  # fmt: skip
    clock.tick()
    return by_relays


def _run(
    values: Tensor,
    last: Tensor,
    history: Tensor,
    counters: Tensor,
    constants: Tensor,
    rates: Tensor,
    closed_form: bool,
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    rows: Tensor,
    state: Tensor,
    bits: Tensor,
    step: Tensor,
    relays: Tensor,
    groups: Sequence[int],
    active: Sequence[int],
    seed: int,
    sample: bool,
) -> Tensor:
    if use_kernel(values):
        from ..kernels.relay_sample import Drawn
        from ..kernels.relay_step import relay_step_ as kernel

        clock = history, counters, constants, rates, closed_form
        drawn = Drawn(rows, step, seed, TRAIN_TAG) if sample else None
        return kernel(
            values, last, rows, *clock, grad_z, grad_kl, state, bits, relays, tuple(groups), tuple(active), drawn
        )
    by_rows, by_relays = run_rows_backward(
        grad_z, grad_kl, rows, state, bits, step, relays, groups, active, seed, sample, (True, True)
    )
    tensors = [history], [counters], [constants], [rates], [closed_form]
    run_row_adam(values, last, rows, by_rows, [0], [values.shape[2]], *tensors, by_row=False)
    return by_relays


_relay_step_ = operator(
    "relay_step_(Tensor(a!) values, Tensor(b!) last, Tensor history, Tensor counters, Tensor constants, Tensor rates, "
    "bool closed_form, Tensor? grad_z, Tensor? grad_kl, Tensor rows, Tensor state, Tensor bits, Tensor step, "
    "Tensor relays, int[] groups, int[] active, int seed, bool sample) -> Tensor",
    _run,
    lambda *arguments: torch.empty_like(arguments[13], memory_format=torch.contiguous_format),  # of the relays
)
