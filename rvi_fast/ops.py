"""One operator per idea: check the arguments, then run the equations (`reference`) or their kernel."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import arguments, dispatch, reference
from .clock import Clock

MAX_LATENTS = 4 * 4096  # the noise counter has 12 bits for latent // 4
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


def _checked_int(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    if not arguments.is_int(value):
        raise TypeError(f"{name} must be an int; got {value!r}")
    value = int(value)
    if low is not None and high is not None and not low <= value <= high:
        raise ValueError(f"{name} must lie in {low} .. {high}; got {value}")
    return value


def _values_at_hand(tensor: Tensor) -> bool:
    """Whether looking at a tensor's values costs no wait: on the CPU, and not in a graph that is being compiled."""
    return tensor.device.type == "cpu" and tensor.numel() > 0 and not torch.compiler.is_compiling()


def check_rows(rows: Tensor, num_rows: int, name: str = "rows") -> None:
    """rows must be integer indices into num_rows rows. Values are checked on the CPU only: a GPU would have to wait."""
    if not isinstance(rows, Tensor) or rows.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"{name} must be an int64 tensor of row indices; got {getattr(rows, 'dtype', type(rows).__name__)}"
        )
    if _values_at_hand(rows):
        low, high = (int(v) for v in torch.aminmax(rows))
        if low < 0 or high >= num_rows:
            raise IndexError(f"{name} must lie in 0 .. {num_rows - 1}; got {low if low < 0 else high}")


def _check_shape(name: str, tensor: Tensor, shape: Sequence[int | str], sizes: dict[str, int]) -> None:
    """Raise unless tensor has `shape`; a letter takes its size from the first tensor that has it."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch tensor; got {type(tensor).__name__}")
    wanted = [sizes.setdefault(s, n) if isinstance(s, str) else s for s, n in zip(shape, tensor.shape, strict=False)]
    if tensor.dim() != len(shape) or list(tensor.shape) != wanted:
        expected = ", ".join(f"{s} = {sizes[s]}" if s in sizes else str(s) for s in shape)
        raise ValueError(f"{name} must have shape [{expected}]; got {list(tensor.shape)}")


def _check_float(name: str, tensor: Tensor, like: Tensor | None = None) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor; got {tensor.dtype}")
    if like is not None and (tensor.dtype != like.dtype or tensor.device != like.device):
        raise TypeError(
            f"{name} must be {like.dtype} on {like.device} as the first argument is; "
            f"got {tensor.dtype} on {tensor.device}"
        )


def _check_relays(
    coef: Tensor, relays: Tensor, groups: Sequence[int], active: Sequence[int | float], coefficients: str
) -> tuple[int, ...]:
    """Returns |B| of every group."""
    sizes = {"K": sum(check_groups(groups))}
    _check_shape("coef", coef, ("B", "K"), sizes)
    _check_shape("relays", relays, ("K", "T"), sizes)
    _check_float("coef", coef)
    _check_float("relays", relays, coef)
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
            _check_shape(name, tensor, ("B", "T"), sizes)
            _check_float(name, tensor, coef)
    mean = reference.relay_mean(coef, relays, groups, counts, coefficients) + residual
    return gaussian_sample(mean, log_std, noise)


def _check_observed(name: str, output: Tensor, x: Tensor, mask: Tensor) -> None:
    sizes: dict[str, int] = {}
    for argument, tensor in ((name, output), ("x", x), ("mask", mask)):
        _check_shape(argument, tensor, ("B", "D"), sizes)
    _check_float(name, output)
    _check_mask(mask)


def _check_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, True = observed; got {mask.dtype}")


def masked_gaussian_nll(xhat: Tensor, x: Tensor, mask: Tensor, scale: Tensor | float) -> Tensor:
    """Negative log-likelihood of the observed entries of x under N(xhat, scale^2), in nats (eq. 2, first term).

    xhat, x [B, D]; mask [B, D] bool, True = observed (x elsewhere is never used and may be NaN); scale: a number, [] or
    [D], > 0. Returns [B]. Gradients to xhat and scale.
    """
    _check_observed("xhat", xhat, x, mask)
    return reference.masked_gaussian_nll(xhat, x.to(xhat.dtype), mask, _as_scale(scale, xhat, x.shape[1]))


def _as_scale(scale: Tensor | float, like: Tensor, columns: int) -> Tensor:
    if not isinstance(scale, Tensor | Real):
        raise TypeError(f"scale must be a number or a torch tensor; got {type(scale).__name__}")
    if isinstance(scale, Real) and not scale > 0:
        raise ValueError(f"scale must be above 0; got {scale}")
    scale = torch.as_tensor(scale, dtype=like.dtype, device=like.device)
    if scale.dim() > 1 or (scale.dim() == 1 and scale.shape[0] not in (1, columns)):
        raise ValueError(f"scale must be one number or one per column ({columns}); got shape {list(scale.shape)}")
    if _values_at_hand(scale) and (scale <= 0).any():
        raise ValueError(f"scale must be above 0; got {float(scale.detach().min())}")
    return scale


def masked_bernoulli_nll(logits: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood of the observed entries of x in [0, 1] under Bernoulli(sigmoid(logits)), in nats.

    logits, x [B, D]; mask [B, D] bool, True = observed. Returns [B]. Gradient to logits.
    """
    _check_observed("logits", logits, x, mask)
    x = x.to(logits.dtype)
    if _values_at_hand(x):
        low, high = torch.aminmax(torch.where(mask, x, 0.0))
        if not (low >= 0 and high <= 1):
            raise ValueError(f"x must lie in [0, 1] where it is observed; got {float(low)} .. {float(high)}")
    return reference.masked_bernoulli_nll(logits, x, mask)


def linear_masked_gaussian_nll(
    h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, mask: Tensor, scale: Tensor | float
) -> Tensor:
    """masked_gaussian_nll of a linear layer's output h weight' + bias.

    h [B, H], weight [D, H], bias [D], x [B, D], mask [B, D] bool. Returns [B]: the sum over observed entries of
    0.5 ((x - xhat)/scale)^2 + log(scale) + 0.5 log(2 pi). Gradients to h, weight, bias and scale.
    """
    sizes: dict[str, int] = {}
    for name, tensor, shape in (
        ("h", h, "BH"),
        ("weight", weight, "DH"),
        ("bias", bias, "D"),
        ("x", x, "BD"),
        ("mask", mask, "BD"),
    ):
        _check_shape(name, tensor, shape, sizes)
    _check_float("h", h)
    _check_float("weight", weight, h)
    _check_float("bias", bias, h)
    _check_mask(mask)
    scale = _as_scale(scale, h, x.shape[1])
    return reference.linear_masked_gaussian_nll(h, weight, bias, x.to(h.dtype), mask, scale)


def philox_normal(
    seed: int,
    stream: str,
    step: int | Tensor,
    row_ids: Tensor,
    dim: int,
    *,
    draw: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals that depend on (seed, stream, draw, step, row id, latent index) alone: Philox-4x32-10.

    seed: 64-bit int; stream: "train", "infer", "impute" or "init"; step: int, 0 to 2^32 - 1, or int64 tensor [];
    row_ids: int64 [B], global; dim: latents, at most 16,384; draw: 0 to 65,535. Returns [B, dim] on the device of
    row_ids.
    """
    if stream not in reference.STREAMS:
        raise ValueError(f"stream must be one of {', '.join(reference.STREAMS)}; got {stream!r}")
    seed = _checked_int("seed", seed)
    draw = _checked_int("draw", draw, 0, (1 << 16) - 1)
    dim = _checked_int("dim", dim, 0, MAX_LATENTS)
    if not isinstance(row_ids, Tensor):
        raise TypeError(f"row_ids must be an int64 tensor [B]; got {type(row_ids).__name__}")
    if row_ids.dtype != torch.int64 or row_ids.dim() != 1:
        raise TypeError(f"row_ids must be an int64 tensor [B]; got {row_ids.dtype} {list(row_ids.shape)}")
    if not isinstance(step, Tensor):
        step = _checked_int("step", step, 0, reference.WORD)
    elif step.dtype != torch.int64 or step.dim() != 0:
        raise TypeError(f"step must be an int or an int64 tensor []; got {step.dtype} {list(step.shape)}")
    else:
        step = step.to(row_ids.device)
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float32 or torch.float64; got {dtype}")
    if dispatch.use_triton("philox_normal", row_ids.device):
        from .kernels.philox_normal import philox_normal as kernel

        return kernel(seed, reference.STREAMS[stream], step, row_ids, dim, draw, dtype)
    return reference.philox_normal(seed, stream, step, row_ids, dim, draw, dtype)


class Columns(NamedTuple):
    """Columns start .. stop of a table that move together, by one clock of their own."""

    start: int
    stop: int
    clock: Clock


def read_rows(values: Tensor, last: Tensor, rows: Tensor, columns: Sequence[Columns]) -> tuple[Tensor, Tensor, Tensor]:
    """p, m, v [B, C] of rows (int64 [B]), brought up to date. values [N, 3, C]; last [N] int32. Writes nothing."""
    p, m, v = values[rows].unbind(1)
    last_of_rows = last[rows]
    for start, stop, clock in columns:
        span = slice(start, stop)
        now = clock.catch_up(p[:, span], m[:, span], v[:, span], last_of_rows)
        if stop - start == p.shape[1]:
            return now
        for block, caught_up in zip((p, m, v), now, strict=True):
            block[:, span] = caught_up
    return p, m, v


def _check_step_rows(rows: Tensor, num_rows: int) -> None:
    """rows must lie in the table and not repeat. Ascending ones, as in a merged gradient, need no sort."""
    ascending = rows if (rows[1:] > rows[:-1]).all() else torch.unique(rows)
    check_rows(torch.cat((ascending[:1], ascending[-1:])).cpu(), num_rows)
    if len(ascending) < len(rows):
        raise ValueError("rows must not repeat within a step; sum the gradients of a repeated row first")


def row_adam_(
    values: Tensor,
    last: Tensor,
    rows: Tensor,
    grad: Tensor,
    columns: Sequence[Columns],
    lr: Sequence[float],
    weight_decay: Sequence[float],
) -> None:
    """One AdamW step of the touched rows, in place, then of the clocks (docs/math.md).

    values [N, 3, C]: p, m, v of a row together; last [N] int32: the clock's reading at a row's last step; rows int64
    [B], without repeats; grad [B, C]; one lr and one weight_decay for each of `columns`. With an AdamClock, rows not
    named here follow the dense trajectory too: the clock remembers the step, and a later read catches them up.

    >>> import torch
    >>> from rvi_fast.functional import AdamClock, AdamHyper, Columns, row_adam_
    >>> values, last = torch.zeros(1000, 3, 2), torch.zeros(1000, dtype=torch.int32)
    >>> columns = [Columns(0, 2, AdamClock(AdamHyper(beta1=0.9, beta2=0.999, eps=1e-8)))]
    >>> row_adam_(values, last, torch.tensor([7]), torch.ones(1, 2), columns, lr=[0.5], weight_decay=[0.0])
    >>> values[7, 0]
    tensor([-0.5000, -0.5000])
    """
    sizes: dict[str, int] = {}
    _check_shape("values", values, ("N", 3, "C"), sizes)
    for name, tensor, shape in (("last", last, "N"), ("rows", rows, "B"), ("grad", grad, "BC")):
        _check_shape(name, tensor, shape, sizes)
    _check_step_rows(rows, values.shape[0])
    p, m, v = read_rows(values, last, rows, columns)
    last_of_rows = last[rows]
    for (start, stop, clock), rate, decay in zip(columns, lr, weight_decay, strict=True):
        span = slice(start, stop)
        p[:, span], m[:, span], v[:, span] = reference.adamw_step(
            p[:, span], m[:, span], v[:, span], grad[:, span], clock.next_step(last_of_rows), rate, clock.hyper, decay
        )
    values[rows] = torch.stack((p, m, v), dim=1)
    last[rows] = columns[0].clock.touched(last_of_rows)
    for (_, _, clock), rate, decay in zip(columns, lr, weight_decay, strict=True):
        clock.advance(rate, decay)
