"""Relay combination and sampling of the approximate posterior."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from .. import arguments, reference
from .checks import check_float, check_shape

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
    mean = reference.relay_mean(coef, relays, groups, counts, coefficients) + residual
    return gaussian_sample(mean, log_std, noise)
