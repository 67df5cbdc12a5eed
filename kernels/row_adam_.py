"""One AdamW step of a batch's rows in place: gather, catch up, step, scatter (reference.catch_up, adamw_step)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .catch_up import follow, load_columns, missed_by, step_sizes, stepped

ROWS = 1  # of a program, which is one warp: their float64 scalars are every lane's
BYTES = 512  # of p, of m, of v at once: 16 a lane


@triton.jit(do_not_specialize=["B", "N", "capacity"])
def row_adam_kernel(
    values_ptr, last_ptr,  # [N, 3, C]: p, m, v; int32 [N]
    rows_ptr, grad_ptr,  # int64 [B], without repeats; [B, C]
    history_ptr, counters_ptr, constants_ptr, rates_ptr,  # the clock, as in kernels/catch_up.py
    capacity, B, N, C, row_stride, slot_stride, grad_stride,
    CLOSED_FORM: tl.constexpr, BY_ROW: tl.constexpr, TOUCH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row by one warp. BY_ROW: `last` counts the row's own steps. TOUCH: set `last` too."""
    dtype: tl.constexpr = values_ptr.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # int64: row * stride may pass 2**31
    row = tl.load(rows_ptr + i, mask=i < B, other=-1).to(tl.int64)
    in_table = (row >= 0) & (row < N)
    row_ptr, row_grad_ptr = values_ptr + row[:, None] * row_stride, grad_ptr + i[:, None] * grad_stride
    columns = tl.arange(0, BLOCK)[None, :]
    p, m, v = load_columns(row_ptr, slot_stride, columns, in_table[:, None] & (columns < C))
    grad = tl.load(row_grad_ptr + columns, mask=in_table[:, None] & (columns < C), other=0.0)
    last = tl.load(last_ptr + row, mask=in_table, other=0).to(tl.int64)
    missed = missed_by(last, history_ptr, capacity, counters_ptr, constants_ptr, CLOSED_FORM, dtype)
    if BY_ROW:
        touched = last + 1
        step = touched[:, None]
    else:
        now = tl.load(counters_ptr) + 1
        touched = tl.zeros_like(last) + now
        step = now + tl.load(counters_ptr + 1)
    sizes = step_sizes(step.to(tl.float64), constants_ptr, rates_ptr, dtype)
    for start in range(0, C, BLOCK):
        at, coming = start + columns, start + BLOCK + columns
        ahead = load_columns(row_ptr, slot_stride, coming, in_table[:, None] & (coming < C))  # arrives meanwhile
        grad_ahead = tl.load(row_grad_ptr + coming, mask=in_table[:, None] & (coming < C), other=0.0)
        p, m, v = follow(p, m, v, last, missed, history_ptr, capacity, counters_ptr, constants_ptr, CLOSED_FORM)
        p, m, v = stepped(p, m, v, grad, sizes)
        tl.store(row_ptr + at, p, mask=in_table[:, None] & (at < C))
        tl.store(row_ptr + slot_stride + at, m, mask=in_table[:, None] & (at < C))
        tl.store(row_ptr + 2 * slot_stride + at, v, mask=in_table[:, None] & (at < C))
        p, m, v = ahead
        grad = grad_ahead
    if TOUCH:
        tl.store(last_ptr + row, touched.to(tl.int32), mask=in_table)


def row_adam_(
    values: Tensor, last: Tensor, rows: Tensor, grad: Tensor,
    history: Tensor, counters: Tensor, constants: Tensor, rates: Tensor,
    closed_form: bool, by_row: bool, touch: bool,
) -> None:  # fmt: skip
    """Step values [N, 3, C] at rows int [B], without repeats, with grad [B, C]. The clock is only read.

    touch: set last int32 [N] of these rows too. Rows outside 0 .. N - 1 are left out.
    """
    if grad.numel() == 0:
        return
    if grad.stride(1) != 1:
        grad = grad.contiguous()
    with torch.cuda.device_of(values):
        row_adam_kernel[(triton.cdiv(len(rows), ROWS),)](
            values, last, rows.contiguous(), grad, history, counters, constants, rates,
            history.shape[1], len(rows), values.shape[0], grad.shape[1],
            values.stride(0), values.stride(1), grad.stride(0),
            CLOSED_FORM=closed_form, BY_ROW=by_row, TOUCH=touch, ROWS=ROWS, BLOCK=BYTES // values.itemsize,
            num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
