"""Rows of a table, brought up to date, in a copy (reference.catch_up)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .catch_up import follow, load_columns, missed_by

ROWS = 1  # of a program, which is one warp: their float64 scalars are every lane's
BYTES = 512  # of p, of m, of v at once: 16 a lane


@triton.jit(do_not_specialize=["B", "N", "capacity"])
def read_rows_kernel(
    values_ptr, last_ptr, rows_ptr,  # [N, 3, C]: p, m, v; int32 [N]; int64 [B]
    history_ptr, counters_ptr, constants_ptr,  # the clock, as in kernels/catch_up.py
    out_ptr,  # [S, B, C]: p, and m and v where MOMENTS
    capacity, B, N, C, row_stride, slot_stride, out_stride, out_slot_stride,
    CLOSED_FORM: tl.constexpr, MOMENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row by one warp. What lies outside the table reads as NaN."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # int64: row * stride may pass 2**31
    row = tl.load(rows_ptr + i, mask=i < B, other=-1).to(tl.int64)
    in_table = (row >= 0) & (row < N)
    row_ptr, p_ptr = values_ptr + row[:, None] * row_stride, out_ptr + i[:, None] * out_stride
    m_ptr = p_ptr + out_slot_stride
    v_ptr = m_ptr + out_slot_stride  # twice the stride may pass 2**31
    columns = tl.arange(0, BLOCK)[None, :]
    p, m, v = load_columns(row_ptr, slot_stride, columns, in_table[:, None] & (columns < C))
    last = tl.load(last_ptr + row, mask=in_table, other=0).to(tl.int64)
    missed = missed_by(last, history_ptr, capacity, counters_ptr, constants_ptr, CLOSED_FORM, p.dtype)
    for start in range(0, C, BLOCK):
        at, coming = start + columns, start + BLOCK + columns
        ahead = load_columns(row_ptr, slot_stride, coming, in_table[:, None] & (coming < C))  # arrives meanwhile
        p, m, v = follow(p, m, v, last, missed, history_ptr, capacity, counters_ptr, constants_ptr, CLOSED_FORM)
        there = (i < B)[:, None] & (at < C)
        tl.store(p_ptr + at, tl.where(in_table[:, None], p, float("nan")), mask=there)
        if MOMENTS:
            tl.store(m_ptr + at, tl.where(in_table[:, None], m, float("nan")), mask=there)
            tl.store(v_ptr + at, tl.where(in_table[:, None], v, float("nan")), mask=there)
        p, m, v = ahead


def read_rows(
    values: Tensor, last: Tensor, rows: Tensor,
    history: Tensor, counters: Tensor, constants: Tensor,
    closed_form: bool, out: Tensor,
) -> None:  # fmt: skip
    """Write p (and m, v) of values [N, 3, C] at rows int [B] to out [1 or 3, B, C]; last int32 [N]."""
    if out.numel() == 0:
        return
    with torch.cuda.device_of(values):
        read_rows_kernel[(triton.cdiv(len(rows), ROWS),)](
            values, last, rows.contiguous(), history, counters, constants, out,
            history.shape[1], len(rows), values.shape[0], out.shape[2],
            values.stride(0), values.stride(1), out.stride(1), out.stride(0),
            CLOSED_FORM=closed_form, MOMENTS=out.shape[0] == 3, ROWS=ROWS, BLOCK=BYTES // values.itemsize,
            num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
