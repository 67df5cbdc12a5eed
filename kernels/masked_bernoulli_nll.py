"""Bernoulli loss of the observed entries and its gradient in one pass (reference.masked_bernoulli_nll)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .likelihood import bernoulli, dense_rows, load_observed, observed_arguments, split

TILE = 1024  # entries that a program holds at once: 8 a thread


@triton.jit(do_not_specialize=["B", "tiles"])
def masked_bernoulli_nll_kernel(
    logits_ptr, x_ptr, mask_ptr,  # [B, D], [B, D], see load_observed
    nll_ptr, dlogits_ptr,  # [splits, B], [B, D] or None
    B, D, tiles,  # tiles: of columns, in one split
    logits_stride, x_stride, mask_stride,
    x_scale: tl.float64,
    MASK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """nll_i = sum over observed j of log(1 + exp(l_ij)) - l_ij x_ij, and its gradient to the logits l."""
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
        logits = tl.load(logits_ptr + row * logits_stride + column, mask=inside, other=0).to(dtype)
        nll, dlogits = bernoulli(logits, x)
        total += tl.where(observed, nll, 0.0)
        if dlogits_ptr is not None:
            tl.store(dlogits_ptr + row * D + column, tl.where(observed, dlogits, 0.0), mask=inside)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(nll_ptr + part * B + row, tl.sum(total, axis=1), mask=row < B)


def masked_bernoulli_nll(
    logits: Tensor, x: Tensor, mask: Tensor | None, x_scale: float, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """nll [B] and, if wanted, its gradient to logits [B, D].

    A program takes whole rows unless there are too few of them: then columns are split over programs, and the parts of
    a row's sum are added in their order.
    """
    B, D = logits.shape
    dlogits = torch.empty(B, D, dtype=logits.dtype, device=logits.device) if with_gradient else None
    dtype = torch.promote_types(logits.dtype, torch.float32)  # of all arithmetic
    if logits.numel() == 0:
        return torch.zeros(B, dtype=dtype, device=logits.device), dlogits
    logits = dense_rows(logits)
    x, mask, x_stride, mask_stride, kind = observed_arguments(x, mask)
    block = min(triton.next_power_of_2(D), TILE)
    rows = TILE // block
    row_blocks = triton.cdiv(B, rows)
    splits, tiles = split(triton.cdiv(D, block), row_blocks)
    nll = torch.empty(splits, B, dtype=dtype, device=logits.device)
    with torch.cuda.device_of(logits):
        masked_bernoulli_nll_kernel[(row_blocks, splits)](
            logits, x, mask, nll, dlogits, B, D, tiles,
            logits.stride(0), x_stride, mask_stride, float(x_scale),
            MASK=kind, ROWS=rows, BLOCK=block, enable_fp_fusion=True,
        )  # fmt: skip
    return nll[0] if splits == 1 else nll.sum(0), dlogits
