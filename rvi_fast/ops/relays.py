"""Relay combination and sampling of the approximate posterior."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import arguments, dispatch, reference
from ..clock import AdamClock, Clock
from .checks import check_float, check_one_device, check_rows, check_shape, checked_int
from .noise import as_int64, checked_step
from .registry import below_autograd, differentiable_once, operator
from .rows import Columns, read_rows

COEFFICIENTS = ("linear", "softmax")


def active_counts(groups: Sequence[int], active: int | float | Sequence[int | float]) -> tuple[int, ...]:
    """|B| of every group. active: an int (a count), a float in (0, 1] (a share, rounded half up), or one a group."""
    per_group: list[Any] = list(active) if isinstance(active, list | tuple) else [active] * len(groups)
    if len(per_group) != len(groups):
        raise ValueError(
            f"active has {len(per_group)} entries for {len(groups)} groups; give one each or a single number"
        )
    return tuple(_active_count(k, b) for k, b in zip(groups, per_group, strict=True))


def _active_count(group: int, active: int | float) -> int:
    if isinstance(active, bool) or not isinstance(active, Real):
        raise TypeError(f"active must be an int (a count) or a float in (0, 1] (a share); got {active!r}")
    if not arguments.is_int(active):
        if not 0 < active <= 1:
            raise ValueError(f"active as a float is a share in (0, 1]; got {active}")
        return max(1, int(active * group + 0.5))
    if not 1 <= active <= group:
        raise ValueError(f"active={active} is out of range for a group of {group} relays; it must be 1 to {group}")
    return int(active)


def check_groups(groups: Sequence[int]) -> tuple[int, ...]:
    groups = tuple(groups)
    if not groups or not all(arguments.is_int(k) and k > 0 for k in groups):
        raise ValueError(
            f"groups must be one or more positive ints (relays per group), such as (25, 50, 100); got {groups}"
        )
    return tuple(int(k) for k in groups)


def _check_relays(
    coef: Tensor, relays: Tensor, groups: Sequence[int], active: Sequence[int | float], coefficients: str
) -> tuple[int, ...]:
    """Returns |B| of every group."""
    sizes = {"K": sum(check_groups(groups))}
    check_shape("coef", coef, ("B", "K"), sizes)
    check_shape("relays", relays, ("K", "T"), sizes)
    check_float("coef", coef)
    check_float("relays", relays, coef)
    if coefficients not in COEFFICIENTS:
        raise ValueError(f"coefficients must be 'linear' or 'softmax'; got {coefficients!r}")
    return active_counts(groups, active)


def relay_mean(
    coef: Tensor, relays: Tensor, groups: Sequence[int], active: Sequence[int], coefficients: str = "linear"
) -> Tensor:
    """Sum, over groups, of the `active` largest coefficients (in absolute value) times their relays (eq. 4).

    coef [B, K_total], relays [K_total, T] of one floating dtype and device; groups: ints that sum to K_total; active:
    one int a group. Returns [B, T]. Gradient reaches selected coefficients and the relays; ties go to the lower index.
    """
    counts = _check_relays(coef, relays, groups, active, coefficients)
    return reference.relay_mean(coef, relays, groups, counts, coefficients)


def gaussian_sample(mean: Tensor, log_std: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """z = mean + exp(log_std) noise [B, T], and KL(N(mean, std^2) || N(0, I)) [B]. All [B, T]; noise None: z = mean."""
    z = mean if noise is None else reference.gaussian_sample(mean, log_std, noise)
    return z, reference.gaussian_kl(mean, log_std)


def relay_sample(
    coef: Tensor,
    residual: Tensor,
    log_std: Tensor,
    relays: Tensor,
    groups: Sequence[int],
    active: Sequence[int],
    noise: Tensor | None = None,
    coefficients: str = "linear",
) -> tuple[Tensor, Tensor]:
    """A reparameterised sample of q(z|x_i) and its KL to the prior (eqs. 2 to 6).

    coef [B, K_total]; residual, log_std [B, T]; relays [K_total, T]; noise: standard normals [B, T], or None for the
    mean. Returns z [B, T] and kl [B].
    """
    counts = _check_relays(coef, relays, groups, active, coefficients)
    sizes = {"B": coef.shape[0], "T": relays.shape[1]}
    for name, tensor in (("residual", residual), ("log_std", log_std), ("noise", noise)):
        if tensor is not None:
            check_shape(name, tensor, ("B", "T"), sizes)
            check_float(name, tensor, coef)
    if use_kernel(coef, coefficients):
        return _relay_sample(coef, residual, log_std, relays, noise, groups, counts)[:2]
    mean = reference.relay_mean(coef, relays, groups, counts, coefficients) + residual
    return gaussian_sample(mean, log_std, noise)


def samples_in_one_launch(values: Tensor, coefficients: str) -> bool:
    """Whether relay_sample_rows runs its kernel on a table's values [N, 3, C]."""
    return use_kernel(values, coefficients)


def use_kernel(values: Tensor, coefficients: str = "linear") -> bool:
    unsupported = None
    if coefficients != "linear":
        unsupported = f"coefficients={coefficients!r}"
    elif values.dtype not in (torch.float32, torch.float64):
        unsupported = str(values.dtype)
    return dispatch.use_triton("relay_sample", values.device, unsupported)


def _run(
    coef: Tensor,
    residual: Tensor,
    log_std: Tensor,
    relays: Tensor,
    noise: Tensor | None,
    groups: Sequence[int],
    active: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if use_kernel(coef):
        from ..kernels.relay_sample import relay_sample as kernel

        return kernel(coef, residual, log_std, relays, tuple(groups), tuple(active), noise)
    mean = reference.relay_mean(coef, relays, groups, active) + residual
    z, kl = gaussian_sample(mean, log_std, noise)
    bits = reference.selected_bits(coef, groups, active)
    return (z, kl, mean, bits) if noise is not None else (z, kl, mean.new_empty(0), bits)


def _mask_bytes(groups: Sequence[int]) -> int:
    return sum(-(-k // 8) for k in groups)


def _fake(
    coef: Tensor,
    residual: Tensor,
    log_std: Tensor,
    relays: Tensor,
    noise: Tensor | None,
    groups: Sequence[int],
    active: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T = residual.shape
    bits = coef.new_empty(B, _mask_bytes(groups), dtype=torch.uint8)
    return coef.new_empty(B, T), coef.new_empty(B), coef.new_empty((B, T) if noise is not None else 0), bits


class RelaySample(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        coef: Tensor,
        residual: Tensor,
        log_std: Tensor,
        relays: Tensor,
        noise: Tensor | None,
        groups: Sequence[int],
        active: Sequence[int],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with below_autograd():
            z, kl, mean, bits = _relay_sample(coef, residual, log_std, relays, noise, groups, active)
        ctx.mark_non_differentiable(mean, bits)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(coef, z if noise is None else mean, log_std, relays, noise, bits)
        ctx.groups, ctx.active = groups, active
        return z, kl, mean, bits

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_z: Tensor | None, grad_kl: Tensor | None, *_: Any) -> Any:
        needed = ctx.needs_input_grad[:5]
        if grad_z is None and grad_kl is None:
            return (None,) * 7
        grads = _relay_sample_backward(grad_z, grad_kl, *ctx.saved_tensors, ctx.groups, ctx.active, needed)
        return *(grad if n else None for grad, n in zip(grads, needed, strict=True)), None, None


def _twin_gradients(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    coef: Tensor,
    mean: Tensor,
    log_std: Tensor,
    relays: Tensor,
    noise: Tensor | None,
    groups: Sequence[int],
    active: Sequence[int],
) -> reference.SampleGradients:
    """None stands for zeros."""
    grad_z = torch.zeros_like(mean) if grad_z is None else grad_z
    grad_kl = mean.new_zeros(len(mean)) if grad_kl is None else grad_kl
    noise = torch.zeros_like(mean) if noise is None else noise
    return reference.relay_sample_gradients(grad_z, grad_kl, coef, mean, log_std, relays, noise, groups, active)


def _needed(grads: Sequence[Tensor | None], needed: Sequence[bool], like: Tensor) -> tuple[Tensor, ...]:
    """An operator returns tensors alone: empty ones stand for gradients that nobody needs."""
    return tuple(like.new_empty(0) if grad is None or not n else grad for grad, n in zip(grads, needed, strict=True))


def _run_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    coef: Tensor,
    mean: Tensor,
    log_std: Tensor,
    relays: Tensor,
    noise: Tensor | None,
    bits: Tensor,
    groups: Sequence[int],
    active: Sequence[int],
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    groups, active = tuple(groups), tuple(active)
    if use_kernel(coef):
        from ..kernels.relay_sample import relay_sample_backward as kernel

        grads = kernel(grad_z, grad_kl, coef, mean, log_std, relays, noise, bits, groups, active, tuple(needed))
    else:
        grads = list(_twin_gradients(grad_z, grad_kl, coef, mean, log_std, relays, noise, groups, active))
    return _needed(grads, needed, coef)


def _fake_backward(
    grad_z, grad_kl, coef, mean, log_std, relays, noise, bits, groups, active, needed
) -> tuple[Tensor, ...]:
    inputs = zip((coef, mean, log_std, relays, noise), needed, strict=True)
    return tuple(coef.new_empty(t.shape if n else 0) for t, n in inputs)


_relay_sample = operator(
    "relay_sample(Tensor coef, Tensor residual, Tensor log_std, Tensor relays, Tensor? noise, int[] groups, "
    "int[] active) -> (Tensor z, Tensor kl, Tensor mean, Tensor bits)",
    _run,
    _fake,
    function=RelaySample,
    autocast=torch.float32,
)
_relay_sample_backward = operator(
    "relay_sample_backward(Tensor? grad_z, Tensor? grad_kl, Tensor coef, Tensor mean, Tensor log_std, Tensor relays, "
    "Tensor? noise, Tensor bits, int[] groups, int[] active, bool[5] needed) "
    "-> (Tensor coef, Tensor residual, Tensor log_std, Tensor relays, Tensor noise)",
    _run_backward,
    _fake_backward,
)


# --- the rows of a table: read, brought up to date and sampled at once ---


class SampledRows(NamedTuple):
    """What the backward of relay_sample_rows needs; nothing of it changes when the table or its clock does."""

    rows: Tensor  # int64 [B]
    state: Tensor  # [B, C]: coef | mean | log_std, up to date
    bits: Tensor  # uint8 [B, bytes]: what is selected (reference.selected_bits)
    step: Tensor  # int64 []: of the noise


def relay_sample_rows(
    values: Tensor,
    last: Tensor,
    rows: Tensor,
    clock: Clock | None,
    relays: Tensor,
    groups: Sequence[int],
    active: Sequence[int],
    seed: int,
    step: int | Tensor,
    sample: bool,
) -> tuple[Tensor, Tensor, SampledRows]:
    """relay_sample of rows (int64 [B]) of a table, brought up to date, with the keyed noise of the "train" stream.

    values [N, 3, C]: p, m, v of a row together, of columns coef | residual | log_std (C = K + 2 T); last [N] int32;
    clock: of all columns, or None if no row is behind (then values may be [N, 1, C]). sample False: z is the mean.
    Returns z [B, T], kl [B], and what the backward needs. Not differentiable by itself; nothing is written.
    """
    counts = _check_table(values, last, rows, relays, groups, active)
    seed, step, rows = as_int64(checked_int("seed", seed)), _as_step(step, rows.device), rows.long()
    if clock is not None and clock.by_row:
        clock = None  # it counts a row's own steps, so no row is behind
    if use_kernel(values):
        tensors = (None,) * 3 if clock is None else (clock.history, clock.counters, clock.constants)
        closed_form = clock is None or clock.closed_form
        z, kl, state, bits, drawn_at = _relay_sample_rows(
            values, last, rows, *tensors, closed_form, relays, list(groups), list(counts), seed, step, sample
        )
    else:
        z, kl, state, bits = _twin_of_rows(values, last, rows, clock, relays, groups, counts, seed, step, sample)
        drawn_at = step.clone()
    return z, kl, SampledRows(rows, state, bits, drawn_at)


def relay_sample_rows_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    sampled: SampledRows,
    relays: Tensor,
    groups: Sequence[int],
    active: Sequence[int],
    seed: int,
    sample: bool,
    needed: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the rows [B, C] (zero at coefficients that are not selected) and of the relays [K, T].

    grad_z [B, T] and grad_kl [B] may be None; the rest is as relay_sample_rows took and returned it. None where not
    needed.
    """
    if grad_z is None and grad_kl is None:
        return None, None
    grads = _relay_sample_rows_backward(
        grad_z, grad_kl, *sampled, relays, list(groups), list(active), as_int64(seed), sample, list(needed)
    )
    by_rows, by_relays = (grad if n else None for grad, n in zip(grads, needed, strict=True))
    return by_rows, by_relays


def _check_table(
    values: Tensor, last: Tensor, rows: Tensor, relays: Tensor, groups: Sequence[int], active: Sequence[int | float]
) -> tuple[int, ...]:
    """Returns |B| of every group."""
    sizes = {"K": sum(check_groups(groups))}
    check_shape("relays", relays, ("K", "T"), sizes)
    if not isinstance(values, Tensor) or values.dim() != 3 or values.shape[2] != sizes["K"] + 2 * sizes["T"]:
        raise ValueError(
            f"values must have shape [N, 3, K + 2 T = {sizes['K'] + 2 * sizes['T']}]; got "
            f"{list(values.shape) if isinstance(values, Tensor) else type(values).__name__}"
        )
    if values.stride(2) != 1:
        raise ValueError("values must have the columns of a row side by side in memory; pass values.contiguous()")
    check_float("values", values)
    check_float("relays", relays, values)
    check_shape("last", last, ("N",), {"N": values.shape[0]})
    check_shape("rows", rows, ("B",), sizes)
    check_one_device(values=values, last=last, rows=rows)
    check_rows(rows, values.shape[0])
    return active_counts(groups, active)


def _as_step(step: int | Tensor, device: torch.device) -> Tensor:
    step = checked_step(step, device)
    return step if isinstance(step, Tensor) else torch.full((), step, dtype=torch.int64, device=device)


def _twin_of_rows(
    values: Tensor,
    last: Tensor,
    rows: Tensor,
    clock: Clock | None,
    relays: Tensor,
    groups: Sequence[int],
    active: Sequence[int],
    seed: int,
    step: Tensor,
    sample: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, kl, state and bits."""
    K, T = relays.shape
    if clock is None:
        state = values[rows, 0]
    else:
        state = read_rows(values, last, rows, [Columns(0, values.shape[2], clock)])[0].clone()
    coef, residual, log_std = state.split([K, T, T], dim=1)
    residual += reference.relay_mean(coef, relays, groups, active)  # in place: now the mean
    noise = reference.philox_normal(seed, "train", step, rows, T, dtype=values.dtype) if sample else None
    z, kl = gaussian_sample(residual, log_std, noise)
    return (z if sample else z.clone()), kl, state, reference.selected_bits(coef, groups, active)


def _run_rows(
    values: Tensor,
    last: Tensor,
    rows: Tensor,
    history: Tensor | None,
    counters: Tensor | None,
    constants: Tensor | None,
    closed_form: bool,
    relays: Tensor,
    groups: Sequence[int],
    active: Sequence[int],
    seed: int,
    step: Tensor,
    sample: bool,
) -> tuple[Tensor, ...]:
    groups, active = tuple(groups), tuple(active)
    if use_kernel(values):
        from ..kernels.relay_sample import Drawn, Table
        from ..kernels.relay_sample import relay_sample_rows as kernel

        table = Table(values, last, rows, history, counters, constants, closed_form)
        return kernel(table, relays, groups, active, Drawn(rows, step, seed, TRAIN_TAG) if sample else None)
    clock = None
    if history is not None and counters is not None and constants is not None:
        clock = AdamClock.of(history, counters, constants, constants.new_zeros(2))
    found = _twin_of_rows(values, last, rows, clock, relays, groups, active, seed, step, sample)
    return *found, step.clone()


def _fake_rows(
    values, last, rows, history, counters, constants, closed_form, relays, groups, active, seed, step, sample
):
    B, T = len(rows), relays.shape[1]
    bits = values.new_empty(B, _mask_bytes(groups), dtype=torch.uint8)
    return values.new_empty(B, T), values.new_empty(B), values.new_empty(B, values.shape[2]), bits, step.new_empty(())


def run_rows_backward(
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
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    groups, active = tuple(groups), tuple(active)
    if use_kernel(state):
        from ..kernels.relay_sample import Drawn
        from ..kernels.relay_sample import relay_sample_rows_backward as kernel

        drawn = Drawn(rows, step, seed, TRAIN_TAG) if sample else None
        by_rows, by_relays = kernel(grad_z, grad_kl, state, relays, bits, groups, active, drawn, (needed[0], needed[1]))
    else:
        K, T = relays.shape
        coef, mean, log_std = state.split([K, T, T], dim=1)
        noise = reference.philox_normal(seed, "train", step, rows, T, dtype=state.dtype) if sample else None
        by = _twin_gradients(grad_z, grad_kl, coef, mean, log_std, relays, noise, groups, active)
        by_rows, by_relays = torch.cat((by.coef, by.mean, by.log_std), dim=1), by.relays
    return _needed((by_rows, by_relays), needed, state)


TRAIN_TAG = reference.STREAMS["train"] << 28
_relay_sample_rows = operator(
    "relay_sample_rows(Tensor values, Tensor last, Tensor rows, Tensor? history, Tensor? counters, Tensor? constants, "
    "bool closed_form, Tensor relays, int[] groups, int[] active, int seed, Tensor step, bool sample) "
    "-> (Tensor z, Tensor kl, Tensor state, Tensor bits, Tensor drawn_at)",
    _run_rows,
    _fake_rows,
)
_relay_sample_rows_backward = operator(
    "relay_sample_rows_backward(Tensor? grad_z, Tensor? grad_kl, Tensor rows, Tensor state, Tensor bits, Tensor step, "
    "Tensor relays, int[] groups, int[] active, int seed, bool sample, bool[2] needed) "
    "-> (Tensor rows, Tensor relays)",
    run_rows_backward,
    lambda grad_z, grad_kl, rows, state, bits, step, relays, groups, active, seed, sample, needed: tuple(
        state.new_empty(t.shape if n else 0) for t, n in zip((state, relays), needed, strict=True)
    ),
)
