"""Gaussian loss of the observed entries and its gradient in one pass (reference.masked_gaussian_nll)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .likelihood import dense_rows, gaussian, gaussian_by_scale, load_observed, observed_arguments, split

TILE = 1024  # entries that a program holds at once: 8 a thread
PROGRAMS_BY_SCALE = 1056  # small ones: eight for each multiprocessor of an H100


@triton.jit(do_not_specialize=["B", "tiles"])
def masked_gaussian_nll_kernel(
    xhat_ptr, x_ptr, mask_ptr, scale_ptr,  # [B, D], [B, D], see load_observed, [D]
    nll_ptr, dxhat_ptr,  # [splits, B], [B, D] or None
    B, D, tiles,  # tiles: of columns, in one split
    xhat_stride, x_stride, mask_stride, scale_stride,
    x_scale: tl.float64,
    MASK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """nll_i = sum over observed j of 0.5 ((x_ij - xhat_ij) / scale_j)^2 + log(scale_j) + 0.5 log(2 pi), and its
    gradient to xhat."""
    dtype: tl.constexpr = nll_ptr.dtype.element_ty
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]  # int64: B * D may pass 2**31
    part = tl.program_id(1).to(tl.int64)
    total = tl.zeros([ROWS, BLOCK], dtype)
    for tile in range(part * tiles, tl.minimum((part + 1) * tiles, tl.cdiv(D, BLOCK))):
        column = (tile * BLOCK + tl.arange(0, BLOCK))[None, :]
        inside = (row < B) & (column < D)
        x, observed = load_observed(
            x_ptr, mask_ptr, row, column, inside, x_stride, mask_stride, x_scale, MASK, dtype
        )  # fmt: skip
        xhat = tl.load(xhat_ptr + row * xhat_stride + column, mask=inside, other=0).to(dtype)
        scale = tl.load(scale_ptr + column * scale_stride, mask=column < D, other=1).to(dtype)
        nll, dxhat = gaussian(xhat, x, scale)
        total += tl.where(observed, nll, 0.0)
        if dxhat_ptr is not None:
            tl.store(dxhat_ptr + row * D + column, tl.where(observed, dxhat, 0.0), mask=inside)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(nll_ptr + part * B + row, tl.sum(total, axis=1), mask=row < B)


@triton.jit(do_not_specialize=["B", "tiles"])
def masked_gaussian_nll_by_scale_kernel(
    grad_ptr, xhat_ptr, x_ptr, mask_ptr, scale_ptr,  # [B], [B, D], [B, D], see load_observed, [D]
    dscale_ptr,  # [splits, D]
    B, D, tiles,  # tiles: of rows, in one split
    grad_stride, xhat_stride, x_stride, mask_stride, scale_stride,
    x_scale: tl.float64,
    MASK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dscale_j = sum over rows i that observe j of grad_i (1 - ((x_ij - xhat_ij) / scale_j)^2) / scale_j."""
    dtype: tl.constexpr = dscale_ptr.dtype.element_ty
    part = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    scale = tl.load(scale_ptr + column * scale_stride, mask=column < D, other=1).to(dtype)
    total = tl.zeros([ROWS, BLOCK], dtype)
    for tile in range(part * tiles, tl.minimum((part + 1) * tiles, tl.cdiv(B, ROWS))):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < B) & (column < D)
        x, observed = load_observed(
            x_ptr, mask_ptr, row, column, inside, x_stride, mask_stride, x_scale, MASK, dtype
        )  # fmt: skip
        xhat = tl.load(xhat_ptr + row * xhat_stride + column, mask=inside, other=0).to(dtype)
        grad = tl.load(grad_ptr + row * grad_stride, mask=row < B, other=0).to(dtype)
        total += tl.where(observed, grad * gaussian_by_scale(xhat, x, scale), 0.0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(dscale_ptr + part * D + column, tl.sum(total, axis=0), mask=column < D)


def masked_gaussian_nll(
    xhat: Tensor, x: Tensor, mask: Tensor | None, scale: Tensor, x_scale: float, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """nll [B] and, if wanted, its gradient to xhat [B, D]. scale: [D], any stride.

    A program takes whole rows (13 bytes an entry in float32 with a byte mask, 4 of them the gradient) unless there are
    too few of them: then columns are split over programs, and the parts of a row's sum are added in their order.
    """
    B, D = xhat.shape
    dxhat = torch.empty(B, D, dtype=xhat.dtype, device=xhat.device) if with_gradient else None
    dtype = torch.promote_types(xhat.dtype, torch.float32)  # of all arithmetic
    if xhat.numel() == 0:
        return torch.zeros(B, dtype=dtype, device=xhat.device), dxhat
    xhat = dense_rows(xhat)
    x, mask, x_stride, mask_stride, kind = observed_arguments(x, mask)
    block = min(triton.next_power_of_2(D), TILE)
    rows = TILE // block
    row_blocks = triton.cdiv(B, rows)
    splits, tiles = split(triton.cdiv(D, block), row_blocks)
    nll = torch.empty(splits, B, dtype=dtype, device=xhat.device)
    with torch.cuda.device_of(xhat):
        masked_gaussian_nll_kernel[(row_blocks, splits)](
            xhat, x, mask, scale, nll, dxhat, B, D, tiles,
            xhat.stride(0), x_stride, mask_stride, scale.stride(0), float(x_scale),
            MASK=kind, ROWS=rows, BLOCK=block, enable_fp_fusion=True,
        )  # fmt: skip
    return nll[0] if splits == 1 else nll.sum(0), dxhat


def masked_gaussian_nll_by_scale(
    grad: Tensor, xhat: Tensor, x: Tensor, mask: Tensor | None, scale: Tensor, x_scale: float
) -> Tensor:
    """The gradient to scale [D] for the rows' incoming gradient grad [B].

    A program takes a block of columns and a part of the rows; the parts are added in their order.
    """
    B, D = xhat.shape
    if xhat.numel() == 0:
        return torch.zeros_like(scale)
    xhat = dense_rows(xhat)
    x, mask, x_stride, mask_stride, kind = observed_arguments(x, mask)
    block = min(triton.next_power_of_2(D), TILE // 8)
    rows = TILE // block
    column_blocks = triton.cdiv(D, block)
    splits, tiles = split(triton.cdiv(B, rows), column_blocks, PROGRAMS_BY_SCALE)
    dscale = torch.empty(splits, D, dtype=torch.promote_types(xhat.dtype, torch.float32), device=xhat.device)
    with torch.cuda.device_of(xhat):
        masked_gaussian_nll_by_scale_kernel[(splits, column_blocks)](
            grad, xhat, x, mask, scale, dscale, B, D, tiles,
            grad.stride(0), xhat.stride(0), x_stride, mask_stride, scale.stride(0), float(x_scale),
            MASK=kind, ROWS=rows, BLOCK=block, enable_fp_fusion=True,
        )  # fmt: skip
    return dscale.sum(0).to(scale.dtype)
