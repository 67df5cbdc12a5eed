"""Losses of the observed entries."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from .. import reference
from .checks import check_float, check_shape, values_at_hand


def _check_observed(name: str, output: Tensor, x: Tensor, mask: Tensor) -> None:
    sizes: dict[str, int] = {}
    for argument, tensor in ((name, output), ("x", x), ("mask", mask)):
        check_shape(argument, tensor, ("B", "D"), sizes)
    check_float(name, output)
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
    if values_at_hand(scale) and (scale <= 0).any():
        raise ValueError(f"scale must be above 0; got {float(scale.detach().min())}")
    return scale


def masked_bernoulli_nll(logits: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood of the observed entries of x in [0, 1] under Bernoulli(sigmoid(logits)), in nats.

    logits, x [B, D]; mask [B, D] bool, True = observed. Returns [B]. Gradient to logits.
    """
    _check_observed("logits", logits, x, mask)
    x = x.to(logits.dtype)
    if values_at_hand(x):
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
        check_shape(name, tensor, shape, sizes)
    check_float("h", h)
    check_float("weight", weight, h)
    check_float("bias", bias, h)
    _check_mask(mask)
    scale = _as_scale(scale, h, x.shape[1])
    return reference.linear_masked_gaussian_nll(h, weight, bias, x.to(h.dtype), mask, scale)
