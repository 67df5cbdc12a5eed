"""Losses of the observed entries.

All take x [B, D] of any dtype, multiplied by x_scale, and its holes in one of three forms: mask bool [B, D], True =
observed; mask uint8 [B, ceil(D / 8)], the same in bits, the lowest first; or mask None, and NaN in x is missing. What x
holds elsewhere is never used.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, reference
from .checks import check_float, check_one_device, check_shape, values_at_hand
from .registry import below_autograd, differentiable_once, operator

WIDEST_LAYER = 256  # features that the fused linear layer's kernels hold on chip


def check_x(x: Tensor, mask: Tensor | None, x_scale: float, sizes: dict[str, int]) -> None:
    check_shape("x", x, ("B", "D"), sizes)
    if not isinstance(x_scale, Real):
        raise TypeError(f"x_scale must be a number; got {type(x_scale).__name__}")
    if mask is None:
        if not x.is_floating_point():
            raise TypeError(f"mask=None takes NaN in x as missing, and {x.dtype} holds no NaN; pass a mask")
        return
    if isinstance(mask, Tensor) and mask.dtype == torch.uint8:
        expected = [sizes["B"], -(-sizes["D"] // 8)]
        if list(mask.shape) != expected:
            raise ValueError(
                f"mask as uint8 holds bits, so it must have shape [B, ceil(D / 8)] = {expected}; got "
                f"{list(mask.shape)}; use mask.bool() if it holds an entry in each byte"
            )
        return
    check_shape("mask", mask, ("B", "D"), sizes)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, True = observed, or its bits (uint8), or None; got {mask.dtype}")


def twin_x(x: Tensor, mask: Tensor | None, x_scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and mask as the twins take them: scaled, of `dtype`, and bool [B, D]."""
    if mask is None:
        mask = ~x.isnan()
    elif mask.dtype == torch.uint8:
        bit = torch.arange(8, dtype=torch.uint8, device=mask.device)
        mask = (mask[:, :, None] >> bit & 1).bool().flatten(1)[:, : x.shape[1]]
    x = x.to(dtype)
    return (x if x_scale == 1 else x * x_scale), mask


def _as_scale(scale: Tensor | float, like: Tensor, columns: int) -> Tensor:
    """scale as a tensor on the device of `like`, in the dtype that its losses are computed in."""
    if not isinstance(scale, Tensor | Real):
        raise TypeError(f"scale must be a number or a torch tensor; got {type(scale).__name__}")
    dtype = torch.promote_types(like.dtype, torch.float32)
    if isinstance(scale, Real):
        if not scale > 0:
            raise ValueError(f"scale must be above 0; got {scale}")
        return torch.full((), float(scale), dtype=dtype, device=like.device)  # no copy from host to device
    scale = scale.to(like.device, dtype)
    if scale.dim() > 1 or (scale.dim() == 1 and scale.shape[0] not in (1, columns)):
        raise ValueError(f"scale must be one number or one per column ({columns}); got shape {list(scale.shape)}")
    if values_at_hand(scale) and (scale <= 0).any():
        raise ValueError(f"scale must be above 0; got {float(scale.detach().min())}")
    return scale


def _use_kernel(idea: str, x: Tensor, unsupported: str | None = None) -> bool:
    return dispatch.use_triton(idea, x.device, "gradients to x" if x.requires_grad else unsupported)


def _as_loss(nll: Tensor, output: Tensor) -> Tensor:
    """A kernel's loss in the dtype that the twin's has: the decoder output's, or float32 under autocast."""
    return nll if torch.is_autocast_enabled(output.device.type) else nll.to(output.dtype)


def _times_rows(unit: Tensor, grad: Tensor) -> Tensor:
    """unit [B, D] times the rows' incoming gradient [B], in the dtype of unit and in one pass."""
    return torch.mul(unit, grad[:, None], out=torch.empty_like(unit))


# --- Gaussian ---


def masked_gaussian_nll(
    xhat: Tensor, x: Tensor, mask: Tensor | None, scale: Tensor | float, *, x_scale: float = 1.0
) -> Tensor:
    """Negative log-likelihood of the observed entries of x under N(xhat, scale^2), in nats (eq. 2, first term).

    xhat, x [B, D]; mask: bool [B, D], True = observed (x elsewhere is never used and may be NaN), or its bits (uint8
    [B, ceil(D / 8)], the lowest first), or None: NaN in x is missing; scale: a number, [] or [D], > 0; x_scale: what x
    is multiplied by, such as 1 / 255 for bytes. Returns [B]. Gradients to xhat and scale.
    """
    sizes: dict[str, int] = {}
    check_shape("xhat", xhat, ("B", "D"), sizes)
    check_x(x, mask, x_scale, sizes)
    check_float("xhat", xhat)
    check_one_device(xhat=xhat, x=x, mask=mask)
    scale = _as_scale(scale, xhat, sizes["D"])
    if _use_kernel("masked_gaussian_nll", x):
        nll, _ = _masked_gaussian_nll(xhat, x, mask, scale.expand(sizes["D"]), float(x_scale), False)
        return _as_loss(nll, xhat)
    return reference.masked_gaussian_nll(xhat, *twin_x(x, mask, x_scale, xhat.dtype), scale.to(xhat.dtype))


def _run_gaussian(
    xhat: Tensor, x: Tensor, mask: Tensor | None, scale: Tensor, x_scale: float, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    if dispatch.use_triton("masked_gaussian_nll", xhat.device):
        from ..kernels.masked_gaussian_nll import masked_gaussian_nll as kernel

        nll, dxhat = kernel(xhat, x, mask, scale, x_scale, with_gradient)
        return nll, xhat.new_empty(0) if dxhat is None else dxhat
    wide, cells = xhat.to(scale.dtype), twin_x(x, mask, x_scale, scale.dtype)
    nll = reference.masked_gaussian_nll(wide, *cells, scale)
    return nll, _derivatives(wide, *cells, scale)[0].to(xhat.dtype) if with_gradient else xhat.new_empty(0)


def _derivatives(xhat: Tensor, x: Tensor, mask: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Of each entry's Gaussian loss, by xhat and by its scale: [B, D] each. Below autograd the twin cannot tell."""
    r = mask * (xhat - reference.without_holes(x, mask)) / scale
    return r / scale, mask * (1 - r * r) / scale


def _fake_nll(output: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    nll = output.new_empty(output.shape[0], dtype=torch.promote_types(output.dtype, torch.float32))
    return nll, output.new_empty(output.shape if with_gradient else 0)


def _run_gaussian_by_scale(
    grad: Tensor, xhat: Tensor, x: Tensor, mask: Tensor | None, scale: Tensor, x_scale: float
) -> Tensor:
    if dispatch.use_triton("masked_gaussian_nll", xhat.device):
        from ..kernels.masked_gaussian_nll import masked_gaussian_nll_by_scale as kernel

        return kernel(grad, xhat, x, mask, scale, x_scale)
    _, by_scale = _derivatives(xhat.to(scale.dtype), *twin_x(x, mask, x_scale, scale.dtype), scale)
    return (grad[:, None] * by_scale).sum(0)


class _MaskedGaussianNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, xhat: Tensor, x: Tensor, mask: Tensor | None, scale: Tensor, x_scale: float, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        by_xhat, by_scale = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        with below_autograd():
            nll, dxhat = _masked_gaussian_nll(xhat, x, mask, scale, x_scale, with_gradient or by_xhat)
        ctx.mark_non_differentiable(dxhat)
        ctx.set_materialize_grads(False)
        ctx.x_scale = x_scale
        ctx.save_for_backward(dxhat if by_xhat else None, *((xhat, x, mask, scale) if by_scale else ()))
        return nll, dxhat

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        dxhat, *inputs = ctx.saved_tensors
        by_scale = _masked_gaussian_nll_by_scale(grad, *inputs, ctx.x_scale) if inputs else None
        return None if dxhat is None else _times_rows(dxhat, grad), None, None, by_scale, None, None


_masked_gaussian_nll = operator(
    "masked_gaussian_nll(Tensor xhat, Tensor x, Tensor? mask, Tensor scale, float x_scale, bool with_gradient) "
    "-> (Tensor nll, Tensor dxhat)",
    _run_gaussian,
    lambda xhat, x, mask, scale, x_scale, with_gradient: _fake_nll(xhat, with_gradient),
    function=_MaskedGaussianNll,
)
_masked_gaussian_nll_by_scale = operator(
    "masked_gaussian_nll_by_scale(Tensor grad, Tensor xhat, Tensor x, Tensor? mask, Tensor scale, float x_scale) "
    "-> Tensor",
    _run_gaussian_by_scale,
    lambda grad, xhat, x, mask, scale, x_scale: scale.new_empty(scale.shape),
)


# --- Bernoulli ---


def masked_bernoulli_nll(logits: Tensor, x: Tensor, mask: Tensor | None, *, x_scale: float = 1.0) -> Tensor:
    """Negative log-likelihood of the observed entries of x in [0, 1] under Bernoulli(sigmoid(logits)), in nats.

    logits, x [B, D]; mask and x_scale as in masked_gaussian_nll. Returns [B]. Gradient to logits.
    """
    sizes: dict[str, int] = {}
    check_shape("logits", logits, ("B", "D"), sizes)
    check_x(x, mask, x_scale, sizes)
    check_float("logits", logits)
    check_one_device(logits=logits, x=x, mask=mask)
    use_kernel = _use_kernel("masked_bernoulli_nll", x)
    if values_at_hand(x) or not use_kernel:
        cells, observed = twin_x(x, mask, x_scale, logits.dtype)
        if values_at_hand(x):
            low, high = torch.aminmax(reference.without_holes(cells, observed))
            if not (low >= 0 and high <= 1):
                raise ValueError(f"x must lie in [0, 1] where it is observed; got {float(low)} .. {float(high)}")
    if use_kernel:
        return _as_loss(_masked_bernoulli_nll(logits, x, mask, float(x_scale), False)[0], logits)
    return reference.masked_bernoulli_nll(logits, cells, observed)


def _run_bernoulli(
    logits: Tensor, x: Tensor, mask: Tensor | None, x_scale: float, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    if dispatch.use_triton("masked_bernoulli_nll", logits.device):
        from ..kernels.masked_bernoulli_nll import masked_bernoulli_nll as kernel

        nll, dlogits = kernel(logits, x, mask, x_scale, with_gradient)
        return nll, logits.new_empty(0) if dlogits is None else dlogits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    x, mask = twin_x(x, mask, x_scale, wide.dtype)
    nll = reference.masked_bernoulli_nll(wide, x, mask)
    residual = (mask * (torch.sigmoid(wide) - reference.without_holes(x, mask))).to(logits.dtype)
    return nll, residual if with_gradient else logits.new_empty(0)


class _MaskedBernoulliNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, x: Tensor, mask: Tensor | None, x_scale: float, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        with below_autograd():
            nll, dlogits = _masked_bernoulli_nll(logits, x, mask, x_scale, with_gradient or ctx.needs_input_grad[0])
        ctx.mark_non_differentiable(dlogits)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dlogits)
        return nll, dlogits

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        (dlogits,) = ctx.saved_tensors
        return None if grad is None else _times_rows(dlogits, grad), None, None, None, None


_masked_bernoulli_nll = operator(
    "masked_bernoulli_nll(Tensor logits, Tensor x, Tensor? mask, float x_scale, bool with_gradient) "
    "-> (Tensor nll, Tensor dlogits)",
    _run_bernoulli,
    lambda logits, x, mask, x_scale, with_gradient: _fake_nll(logits, with_gradient),
    function=_MaskedBernoulliNll,
)


# --- a linear layer and its Gaussian loss ---


def linear_masked_gaussian_nll(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    mask: Tensor | None,
    scale: Tensor | float,
    *,
    x_scale: float = 1.0,
) -> Tensor:
    """masked_gaussian_nll of a linear layer's output h weight' + bias; its kernels never write that output to memory.

    h [B, H], weight [D, H], bias [D]; x [B, D], mask, scale and x_scale as in masked_gaussian_nll. Returns [B]: the sum
    over observed entries of 0.5 ((x - xhat)/scale)^2 + log(scale) + 0.5 log(2 pi). Gradients to h, weight, bias, scale.
    """
    sizes: dict[str, int] = {}
    for name, tensor, shape in (("h", h, "BH"), ("weight", weight, "DH"), ("bias", bias, "D")):
        check_shape(name, tensor, shape, sizes)
    check_x(x, mask, x_scale, sizes)
    check_float("h", h)
    if torch.is_autocast_enabled(h.device.type):
        h = h.to(weight.dtype)  # a layer before this one gave it another; the loss needs the parameters' own
    check_float("weight", weight, h)
    check_float("bias", bias, h)
    check_one_device(h=h, x=x, mask=mask)
    scale = _as_scale(scale, h, sizes["D"])
    if _use_kernel("linear_masked_gaussian_nll", x, _beyond_linear_kernel(h)):
        columns_scale = scale.expand(sizes["D"])
        return _linear_masked_gaussian_nll(h, weight, bias, x, mask, columns_scale, float(x_scale))
    x, mask = twin_x(x, mask, x_scale, h.dtype)
    return reference.linear_masked_gaussian_nll(h, weight, bias, x, mask, scale.to(h.dtype))


def _beyond_linear_kernel(h: Tensor) -> str | None:
    if h.dtype not in (torch.float32, torch.float64):
        return f"{h.dtype} layers"
    return f"layers of more than {WIDEST_LAYER} features" if h.shape[1] > WIDEST_LAYER else None


def _run_linear(
    h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, mask: Tensor | None, scale: Tensor, x_scale: float
) -> Tensor:
    if dispatch.use_triton("linear_masked_gaussian_nll", h.device):
        from ..kernels.linear_masked_gaussian_nll import linear_masked_gaussian_nll as kernel

        return kernel(h, weight, bias, x, mask, scale, x_scale)
    return reference.linear_masked_gaussian_nll(h, weight, bias, *twin_x(x, mask, x_scale, h.dtype), scale)


def _run_linear_backward(
    grad: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    x_scale: float,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    if dispatch.use_triton("linear_masked_gaussian_nll", h.device):
        from ..kernels import linear_masked_gaussian_nll as kernels

        arguments = (grad, h, weight, bias, x, mask, scale, x_scale)
        by_h, *by_layer = needed
        dh = kernels.linear_masked_gaussian_nll_by_h(*arguments) if by_h else None
        grads = [dh, *kernels.linear_masked_gaussian_nll_by_layer(*arguments, *by_layer)]
    else:
        by_xhat, by_scale = _derivatives(h @ weight.T + bias, *twin_x(x, mask, x_scale, h.dtype), scale)
        by_xhat, by_scale = grad[:, None] * by_xhat, grad[:, None] * by_scale
        all_grads = by_xhat @ weight, by_xhat.T @ h, by_xhat.sum(0), by_scale.sum(0)
        grads = [found if n else None for found, n in zip(all_grads, needed, strict=True)]
    return tuple(h.new_empty(0) if found is None else found for found in grads)


def _fake_linear_backward(
    grad: Tensor, h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, mask: Tensor | None, scale: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    _, needed = rest
    return tuple(t.new_empty(t.shape if n else 0) for t, n in zip((h, weight, bias, scale), needed, strict=True))


class _LinearMaskedGaussianNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor,
        x: Tensor,
        mask: Tensor | None,
        scale: Tensor,
        x_scale: float,
    ) -> Tensor:
        ctx.save_for_backward(h, weight, bias, x, mask, scale)
        ctx.x_scale = x_scale
        with below_autograd():
            return _linear_masked_gaussian_nll(h, weight, bias, x, mask, scale, x_scale)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = [ctx.needs_input_grad[i] for i in (0, 1, 2, 5)]
        grads = _linear_masked_gaussian_nll_backward(grad, *ctx.saved_tensors, ctx.x_scale, needed)
        dh, dweight, dbias, dscale = (found if n else None for found, n in zip(grads, needed, strict=True))
        return dh, dweight, dbias, None, None, dscale, None


_LINEAR_ARGUMENTS = "Tensor h, Tensor weight, Tensor bias, Tensor x, Tensor? mask, Tensor scale, float x_scale"
_linear_masked_gaussian_nll = operator(
    f"linear_masked_gaussian_nll({_LINEAR_ARGUMENTS}) -> Tensor",
    _run_linear,
    lambda h, weight, bias, x, mask, scale, x_scale: h.new_empty(h.shape[0]),
    function=_LinearMaskedGaussianNll,
)
_linear_masked_gaussian_nll_backward = operator(
    f"linear_masked_gaussian_nll_backward(Tensor grad, {_LINEAR_ARGUMENTS}, bool[4] needed) "
    "-> (Tensor dh, Tensor dweight, Tensor dbias, Tensor dscale)",
    _run_linear_backward,
    _fake_linear_backward,
)
