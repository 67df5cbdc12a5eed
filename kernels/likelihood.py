"""Losses of single entries with their gradients, and x read with its holes, for every kernel with a likelihood."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS_WANTED = 264  # two for each multiprocessor of an H100
HALF_LOG_2PI = tl.constexpr(0.5 * math.log(2 * math.pi))


@triton.jit
def load_observed(
    x_ptr, mask_ptr,  # [N, D] of any dtype, and its mask: see MASK
    row, column, inside,  # int64 [R, 1], int32 [1, C], bool [R, C]
    x_stride, mask_stride,  # from row to row, in elements
    x_scale,  # what x is multiplied by; declare it tl.float64 in the kernel, or float64 x loses digits
    MASK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """x_scale times the cells x[row, column] as `dtype`, 0 where missing, and which are observed: [R, C] each.

    MASK: "bytes", mask [N, D] bool or uint8, not 0 = observed; "bits", mask uint8 [N, ceil(D / 8)], the lowest bit
    first; "nan", no mask (mask_ptr is not read): NaN in x is a hole. Cells not inside are missing.
    """
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0).to(dtype)  # behind a hole it may be anything
    if MASK == "nan":
        observed = inside & (x == x)
    elif MASK == "bits":
        byte = tl.load(mask_ptr + row * mask_stride + column // 8, mask=inside, other=0)
        observed = ((byte.to(tl.int32) >> (column % 8)) & 1) != 0
    else:
        observed = tl.load(mask_ptr + row * mask_stride + column, mask=inside, other=0) != 0
    return tl.where(observed, x * tl.full([], x_scale, dtype), 0.0), observed


@triton.jit
def gaussian(xhat, x, scale):
    """-log N(x; xhat, scale^2) and its derivative by xhat. scale may be of fewer entries ([1, C]) that broadcast."""
    weight = 1.0 / scale
    r = (x - xhat) * weight
    return 0.5 * r * r + (tl.log(scale) + HALF_LOG_2PI), -r * weight


@triton.jit
def gaussian_by_scale(xhat, x, scale):
    """The derivative of -log N(x; xhat, scale^2) by scale."""
    weight = 1.0 / scale
    r = (x - xhat) * weight
    return (1.0 - r * r) * weight


@triton.jit
def log1p(u):
    """log(1 + u) for u in [0, 1] with a small relative error: 2 artanh(u / (2 + u)) as a series."""
    s = u / (2.0 + u)  # at most 1/3
    square = s * s
    TERMS: tl.constexpr = 17 if u.dtype == tl.float64 else 8
    series = tl.zeros_like(u)
    for k in tl.static_range(TERMS):
        series = series * square + 1.0 / (2 * (TERMS - 1 - k) + 1)
    return 2.0 * s * series


@triton.jit
def bernoulli(logit, x):
    """-log of p^x (1 - p)^(1 - x), p = sigmoid(logit), and its derivative by the logit. x in [0, 1]."""
    e = tl.exp(-tl.abs(logit))
    nll = tl.maximum(logit, 0.0) + log1p(e) - logit * x  # log(1 + e^l) - l x
    return nll, tl.where(logit >= 0, 1.0, e) / (1.0 + e) - x


def observed_arguments(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, int, int, str]:
    """x, mask, their row strides and MASK as load_observed takes them. mask: bool [N, D], uint8 bits, or None: NaN."""
    kind = "nan" if mask is None else "bits" if mask.dtype == torch.uint8 else "bytes"
    x = dense_rows(x.view(torch.uint8) if x.dtype == torch.bool else x)
    mask = x if mask is None else dense_rows(mask.view(torch.uint8))
    return x, mask, x.stride(0), mask.stride(0), kind


def dense_rows(tensor: Tensor) -> Tensor:
    """tensor [N, D] with neighbouring columns next to each other; its rows may lie anywhere, even all in one place."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def split(pieces: int, programs: int, wanted: int = PROGRAMS_WANTED) -> tuple[int, int]:
    """How many ways to split a loop over `pieces` that `programs` programs would run, and the pieces in one part.

    As many as make `wanted` programs or a little more, none of them empty. No GPU is asked, so every one sums alike.
    """
    parts = max(1, min(pieces, triton.cdiv(wanted, programs)))
    in_one = triton.cdiv(pieces, parts)
    return triton.cdiv(pieces, in_one), in_one
