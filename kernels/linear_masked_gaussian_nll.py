"""A linear layer and the Gaussian loss of its output, which stays on chip (reference.linear_masked_gaussian_nll)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .likelihood import dense_rows, gaussian, gaussian_by_scale, load_observed, observed_arguments, split
from .precision import add_product, dot_precision

ROWS = 16  # where it owns columns
MIN_DOT = 16  # tl.dot takes no smaller tile


@triton.jit
def inner_products(
    a_ptr, i, rows_a, a_stride,  # [rows_a, H], int [R, 1]
    b_ptr, j, rows_b, b_stride,  # [rows_b, H], int [1, C]
    H, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a_i . b_j: [R, C], 0 outside the matrices."""
    total = tl.zeros([i.shape[0], j.shape[1]], a_ptr.dtype.element_ty)
    for start in range(0, H, CHUNK):
        feature = start + tl.arange(0, CHUNK)
        right, down = feature[None, :], feature[:, None]
        a = tl.load(a_ptr + i.to(tl.int64) * a_stride + right, mask=(i < rows_a) & (right < H), other=0.0)
        b = tl.load(b_ptr + j.to(tl.int64) * b_stride + down, mask=(j < rows_b) & (down < H), other=0.0)
        total = add_product(total, a, b, PRECISION)
    return total


@triton.jit
def load_whole(ptr, i, rows, stride, H, WIDTH: tl.constexpr):
    """Rows i (int [R]) of ptr [rows, H], padded with zeros to WIDTH features: [R, WIDTH]."""
    feature = tl.arange(0, WIDTH)[None, :]
    return tl.load(
        ptr + i[:, None].to(tl.int64) * stride + feature, mask=(i < rows)[:, None] & (feature < H), other=0.0
    )


@triton.jit
def losses_of_rows(
    h_ptr, weight_ptr, bias_ptr, x_ptr, mask_ptr, scale_ptr,  # as the kernels take them
    row, column, B, D, H,  # int [R, 1], int [1, C]
    h_stride, weight_stride, bias_stride, x_stride, mask_stride, scale_stride, x_scale,
    MASK: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Losses of a tile's entries, their derivatives by xhat, and which are observed: [R, C] each."""
    x, observed = load_observed(
        x_ptr, mask_ptr, row, column, (row < B) & (column < D), x_stride, mask_stride, x_scale, MASK, dtype
    )  # fmt: skip
    bias = tl.load(bias_ptr + column * bias_stride, mask=column < D, other=0.0)
    scale = tl.load(scale_ptr + column * scale_stride, mask=column < D, other=1.0)
    xhat = bias + inner_products(
        h_ptr, row, B, h_stride, weight_ptr, column, D, weight_stride, H, CHUNK, PRECISION
    )  # fmt: skip
    nll, dxhat = gaussian(xhat, x, scale)
    return nll, dxhat, observed


@triton.jit(do_not_specialize=["B", "tiles"])
def linear_masked_gaussian_nll_kernel(
    h_ptr, weight_ptr, bias_ptr, x_ptr, mask_ptr, scale_ptr,  # [B, H], [D, H], [D], [B, D], see load_observed, [D]
    nll_ptr,  # [splits, B]
    B, D, H, tiles,  # tiles: of columns, in one split
    h_stride, weight_stride, bias_stride, x_stride, mask_stride, scale_stride,
    x_scale: tl.float64,
    MASK: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """nll_i = sum over observed j of -log N(x_ij; h_i . weight_j + bias_j, scale_j^2)."""
    dtype: tl.constexpr = nll_ptr.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # int64: B * D may pass 2**31
    part = tl.program_id(1).to(tl.int64)
    total = tl.zeros([ROWS], dtype)
    row = i[:, None]
    for tile in range(part * tiles, tl.minimum((part + 1) * tiles, tl.cdiv(D, COLUMNS))):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        nll, _, observed = losses_of_rows(
            h_ptr, weight_ptr, bias_ptr, x_ptr, mask_ptr, scale_ptr, row, column, B, D, H,
            h_stride, weight_stride, bias_stride, x_stride, mask_stride, scale_stride, x_scale,
            MASK, PRECISION, CHUNK, dtype,
        )  # fmt: skip
        total += tl.sum(tl.where(observed, nll, 0.0), axis=1)
    tl.store(nll_ptr + part * B + i, total, mask=i < B)


@triton.jit(do_not_specialize=["B", "tiles"])
def linear_masked_gaussian_nll_by_h_kernel(
    grad_ptr,  # [B]
    h_ptr, weight_ptr, bias_ptr, x_ptr, mask_ptr, scale_ptr,  # [B, H], [D, H], [D], [B, D], see load_observed, [D]
    dh_ptr,  # [splits, B, H]
    B, D, H, tiles,  # tiles: of columns, in one split
    grad_stride, h_stride, weight_stride, bias_stride, x_stride, mask_stride, scale_stride,
    x_scale: tl.float64,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dh_i = grad_i sum over j of dxhat_ij weight_j, where dxhat_ij = d nll_i / d xhat_ij."""
    dtype: tl.constexpr = dh_ptr.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # int64: B * D may pass 2**31
    part = tl.program_id(1).to(tl.int64)
    dh = tl.zeros([ROWS, WIDTH], dtype)
    row = i[:, None]
    for tile in range(part * tiles, tl.minimum((part + 1) * tiles, tl.cdiv(D, COLUMNS))):
        j = tile * COLUMNS + tl.arange(0, COLUMNS)
        column = j[None, :]
        _, dxhat, observed = losses_of_rows(
            h_ptr, weight_ptr, bias_ptr, x_ptr, mask_ptr, scale_ptr, row, column, B, D, H,
            h_stride, weight_stride, bias_stride, x_stride, mask_stride, scale_stride, x_scale,
            MASK, PRECISION, CHUNK, dtype,
        )  # fmt: skip
        weight = load_whole(weight_ptr, j, D, weight_stride, H, WIDTH)
        dh = add_product(dh, tl.where(observed, dxhat, 0.0), weight, PRECISION)
    dh *= tl.load(grad_ptr + row * grad_stride, mask=row < B, other=0.0)
    feature = tl.arange(0, WIDTH)[None, :]
    tl.store(dh_ptr + (part * B + row) * H + feature, dh, mask=(row < B) & (feature < H))


@triton.jit(do_not_specialize=["B", "tiles"])
def linear_masked_gaussian_nll_by_layer_kernel(
    grad_ptr,  # [B]
    h_ptr, weight_ptr, bias_ptr, x_ptr, mask_ptr, scale_ptr,  # [B, H], [D, H], [D], [B, D], see load_observed, [D]
    dweight_ptr, dbias_ptr, dscale_ptr,  # [splits, D, H], [splits, D], [splits, D]; None: not wanted
    B, D, H, tiles,  # tiles: of rows, in one split
    grad_stride, h_stride, weight_stride, bias_stride, x_stride, mask_stride, scale_stride,
    x_scale: tl.float64,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dweight_j = sum over i of grad_i dxhat_ij h_i; dbias_j and dscale_j: sums of grad_i dxhat_ij and of grad_i
    d nll_i / d scale_j. Tiles are [COLUMNS, ROWS] here."""
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(0).to(tl.int64)
    column = j[:, None]
    bias = tl.load(bias_ptr + column * bias_stride, mask=column < D, other=0.0)
    scale = tl.load(scale_ptr + column * scale_stride, mask=column < D, other=1.0)
    dweight = tl.zeros([COLUMNS, WIDTH], dtype)
    dbias = tl.zeros([COLUMNS], dtype)
    dscale = tl.zeros([COLUMNS], dtype)
    for tile in range(part * tiles, tl.minimum((part + 1) * tiles, tl.cdiv(B, ROWS))):
        i = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)  # int64: B * D may pass 2**31
        row = i[None, :]
        x, observed = load_observed(
            x_ptr, mask_ptr, row, column, (row < B) & (column < D), x_stride, mask_stride, x_scale, MASK, dtype
        )  # fmt: skip
        xhat = bias + inner_products(
            weight_ptr, column, D, weight_stride, h_ptr, row, B, h_stride, H, CHUNK, PRECISION
        )  # fmt: skip
        grad = tl.load(grad_ptr + row * grad_stride, mask=row < B, other=0.0)
        _, dxhat = gaussian(xhat, x, scale)
        dxhat = tl.where(observed, grad * dxhat, 0.0)
        if dweight_ptr is not None:
            h = load_whole(h_ptr, i, B, h_stride, H, WIDTH)
            dweight = add_product(dweight, dxhat, h, PRECISION)
        if dbias_ptr is not None:
            dbias += tl.sum(dxhat, axis=1)
        if dscale_ptr is not None:
            by_scale = tl.where(observed, grad * gaussian_by_scale(xhat, x, scale), 0.0)
            dscale += tl.sum(by_scale, axis=1)
    at = part * D + j
    if dweight_ptr is not None:
        feature = tl.arange(0, WIDTH)[None, :]
        tl.store(dweight_ptr + at[:, None] * H + feature, dweight, mask=(column < D) & (feature < H))
    if dbias_ptr is not None:
        tl.store(dbias_ptr + at, dbias, mask=j < D)
    if dscale_ptr is not None:
        tl.store(dscale_ptr + at, dscale, mask=j < D)


def linear_masked_gaussian_nll(
    h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, mask: Tensor | None, scale: Tensor, x_scale: float
) -> Tensor:
    """nll [B]. scale: [D], any stride.

    A program takes 64 rows and all columns: x and its mask are read once (5 bytes an entry), weight once a program.
    Below 264 programs (16,896 rows) columns are split over more of them, and the parts of a sum added in their order.
    """
    (B, H), D = h.shape, len(weight)
    if B == 0 or D == 0:
        return h.new_zeros(B)
    h, weight = dense_rows(h), dense_rows(weight)
    x, mask, x_stride, mask_stride, kind = observed_arguments(x, mask)
    tile = _tile(1, h.dtype)  # nothing is as wide as the features
    row_blocks = triton.cdiv(B, tile.side)
    splits, tiles = split(triton.cdiv(D, tile.columns), row_blocks)
    nll = torch.empty(splits, B, dtype=h.dtype, device=h.device)
    with torch.cuda.device_of(h):
        linear_masked_gaussian_nll_kernel[(row_blocks, splits)](
            h, weight, bias, x, mask, scale, nll, B, D, H, tiles,
            h.stride(0), weight.stride(0), bias.stride(0), x_stride, mask_stride, scale.stride(0), float(x_scale),
            MASK=kind, PRECISION=dot_precision(h.dtype), ROWS=tile.side, COLUMNS=tile.columns,
            CHUNK=_tile(H, h.dtype).chunk, enable_fp_fusion=True,
        )  # fmt: skip
    return nll[0] if splits == 1 else nll.sum(0)


def linear_masked_gaussian_nll_by_h(
    grad: Tensor, h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, mask: Tensor | None, scale: Tensor, x_scale: float
) -> Tensor:
    """The gradient to h [B, H] for the rows' incoming gradient grad [B]. Programs are split as in the forward pass.

    The parts hold at most (B + 16,896) H numbers, whatever D.
    """
    (B, H), D = h.shape, len(weight)
    if B == 0 or D == 0:
        return torch.zeros_like(h)
    h, weight = dense_rows(h), dense_rows(weight)
    x, mask, x_stride, mask_stride, kind = observed_arguments(x, mask)
    tile = _tile(H, h.dtype)
    row_blocks = triton.cdiv(B, tile.side)
    splits, tiles = split(triton.cdiv(D, tile.columns), row_blocks)
    dh = torch.empty(splits, B, H, dtype=h.dtype, device=h.device)
    with torch.cuda.device_of(h):
        linear_masked_gaussian_nll_by_h_kernel[(row_blocks, splits)](
            grad, h, weight, bias, x, mask, scale, dh, B, D, H, tiles,
            grad.stride(0), h.stride(0), weight.stride(0), bias.stride(0), x_stride, mask_stride, scale.stride(0),
            float(x_scale), MASK=kind, PRECISION=dot_precision(h.dtype),
            ROWS=tile.side, COLUMNS=tile.columns, CHUNK=tile.chunk, WIDTH=tile.width,
            num_warps=tile.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return dh[0] if splits == 1 else dh.sum(0)


def linear_masked_gaussian_nll_by_layer(
    grad: Tensor, h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, mask: Tensor | None, scale: Tensor,
    x_scale: float, by_weight: bool, by_bias: bool, by_scale: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients that are wanted, to weight [D, H], bias [D] and scale [D], for the incoming gradient grad [B].

    A program takes 64 columns and a part of the rows: as many parts as make 264 programs (21 for 784 columns, 1 for
    20,000), added in their order. They hold at most (D + 16,896) H numbers, whatever B.
    """
    (B, H), D = h.shape, len(weight)
    wanted = (by_weight, weight.shape), (by_bias, bias.shape), (by_scale, scale.shape)
    if B == 0 or D == 0 or not (by_weight or by_bias or by_scale):
        return tuple(h.new_zeros(shape) if w else None for w, shape in wanted)  # type: ignore[return-value]
    h, weight = dense_rows(h), dense_rows(weight)
    x, mask, x_stride, mask_stride, kind = observed_arguments(x, mask)
    tile = _tile(H, h.dtype)
    column_blocks = triton.cdiv(D, tile.side)
    splits, tiles = split(triton.cdiv(B, ROWS), column_blocks)
    parts = [torch.empty(splits, *shape, dtype=h.dtype, device=h.device) if w else None for w, shape in wanted]
    with torch.cuda.device_of(h):
        linear_masked_gaussian_nll_by_layer_kernel[(splits, column_blocks)](
            grad, h, weight, bias, x, mask, scale, *parts, B, D, H, tiles,
            grad.stride(0), h.stride(0), weight.stride(0), bias.stride(0), x_stride, mask_stride, scale.stride(0),
            float(x_scale), MASK=kind, PRECISION=dot_precision(h.dtype),
            ROWS=ROWS, COLUMNS=tile.side, CHUNK=tile.chunk, WIDTH=tile.width,
            num_warps=tile.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return tuple(None if part is None else part.sum(0) for part in parts)  # type: ignore[return-value]


class _Tile(NamedTuple):
    side: int  # rows or columns that a program owns
    columns: int  # multiplied at once, where it owns rows
    width: int  # features, padded
    chunk: int  # features multiplied at once
    warps: int


def _tile(features: int, dtype: torch.dtype) -> _Tile:
    """As much as the registers of a backward kernel hold without spilling (bench/static.py)."""
    width = max(triton.next_power_of_2(features), MIN_DOT)
    if dtype == torch.float64:
        return _Tile(16, 16, width, 16, 4 if width <= 64 else 8)
    return _Tile(64 if width <= 128 else 32, 32, width, min(width, 32), 4 if width <= 64 else 8)
