"""The backward of relay_sample_rows and the rows' AdamW step in one.

Of the rows' gradients only those of the latents are written, which all coefficients need.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .catch_up import follow, load_columns, missed_by, step_sizes, stepped
from .precision import dot_precision
from .relay_sample import Drawn, Groups, by_coefficients, plan, relays_grad, sample_backward
from .relays import layout

BLOCK = 32  # columns at once: four rows a thread if there are 16
SCALARS = tl.constexpr(7)  # of a row: two nodes (w1, e1, w2, e2), the decays of p, m, v


@triton.jit
def keep_missed(missed_ptr, B, row, in_batch, missed):
    """Put what rows missed into memory [SCALARS, B], where one thread a row has computed it."""
    nodes, decays, _ = missed
    for i in tl.static_range(4):
        tl.store(missed_ptr + row + i * B, nodes[i], mask=in_batch)
    for i in tl.static_range(3):
        tl.store(missed_ptr + row + (4 + i) * B, decays[i], mask=in_batch)


@triton.jit
def kept_missed(missed_ptr, B, row, in_batch, summed):
    """The same again, for all threads: their registers would not hold the float64 arithmetic of many rows."""
    at = missed_ptr + row
    w1, e1 = tl.load(at, mask=in_batch, other=0.0), tl.load(at + B, mask=in_batch, other=1.0)
    w2, e2 = tl.load(at + 2 * B, mask=in_batch, other=0.0), tl.load(at + 3 * B, mask=in_batch, other=1.0)
    decay, decay_m = tl.load(at + 4 * B, mask=in_batch, other=1.0), tl.load(at + 5 * B, mask=in_batch, other=1.0)
    decay_v = tl.load(at + 6 * B, mask=in_batch, other=1.0)
    return (w1, e1, w2, e2), (decay, decay_m, decay_v), summed


@triton.jit
def step_columns(
    grad, row_ptr, slot_stride, column, inside, last, missed, sizes,
    history_ptr, capacity, counters_ptr, constants_ptr, CLOSED_FORM: tl.constexpr,
):  # fmt: skip
    """Some columns of rows, brought up to date and stepped with grad [R, BLOCK], in place."""
    p, m, v = load_columns(row_ptr, slot_stride, column, inside)
    p, m, v = follow(p, m, v, last, missed, history_ptr, capacity, counters_ptr, constants_ptr, CLOSED_FORM)
    p, m, v = stepped(p, m, v, grad, sizes)
    tl.store(row_ptr + column, p, mask=inside)
    tl.store(row_ptr + slot_stride + column, m, mask=inside)
    tl.store(row_ptr + 2 * slot_stride + column, v, mask=inside)


@triton.jit(do_not_specialize=["seed", "tag", "B", "N", "capacity"])
def relay_step_kernel(
    values_ptr, last_ptr, rows_ptr,  # [N, 3, K + 2 T]: p, m, v; int32 [N]; int64 [B], without repeats
    history_ptr, counters_ptr, constants_ptr, rates_ptr,  # the clock, as in kernels/catch_up.py
    grad_z_ptr, grad_z_row, grad_z_latent, grad_kl_ptr, grad_kl_row,  # [B, T], [B]; None
    state_ptr, bits_ptr,  # [B, K + 2 T]: coef | mean | log_std, uint8 [B, mask_bytes]: of the forward
    step_ptr, seed: tl.uint64, tag: tl.uint32,  # int64 []: where noise was drawn, else None
    relays_ptr, table_ptr,  # [K, T], see relays.layout
    missed_ptr, latents_ptr,  # [SCALARS, B], [B, 2 T]: dmu | dlog sigma; written
    capacity, B, N, K, T, row_stride, slot_stride, groups, mask_bytes,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, NOISE_T: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, CLOSED_FORM: tl.constexpr,
):  # fmt: skip
    """sample_backward, by_coefficients, and AdamW's step with BLOCK columns of the rows' gradients at a time."""
    dtype: tl.constexpr = values_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # int64: row * stride may pass 2**31
    in_batch = row < B
    index = tl.load(rows_ptr + row, mask=in_batch, other=-1).to(tl.int64)
    in_table = (index >= 0) & (index < N)
    last = tl.load(last_ptr + index, mask=in_table, other=0).to(tl.int64)
    missed = missed_by(last, history_ptr, capacity, counters_ptr, constants_ptr, CLOSED_FORM, dtype)
    keep_missed(missed_ptr, B, row, in_batch, missed)
    now = tl.load(counters_ptr) + 1
    sizes = step_sizes((now + tl.load(counters_ptr + 1)).to(tl.float64), constants_ptr, rates_ptr, dtype)
    state_of_row_ptr, width = state_ptr + K, K + 2 * T
    sample_backward(
        grad_z_ptr, grad_z_row, grad_z_latent, grad_kl_ptr, grad_kl_row, state_of_row_ptr, width,
        state_of_row_ptr + T, width, None, 0, rows_ptr, step_ptr, seed, tag, latents_ptr, 2 * T,
        latents_ptr + T, 2 * T, None, row, in_batch, T, NOISE_T,
    )  # fmt: skip
    tl.debug_barrier()  # what the rows missed and the gradients of their latents are in memory
    missed = kept_missed(missed_ptr, B, row, in_batch, missed[2])
    blocks_of_k = tl.cdiv(K, BLOCK)
    for block in range(blocks_of_k + tl.cdiv(2 * T, BLOCK)):
        of_coef = block < blocks_of_k
        column = tl.where(of_coef, block * BLOCK, K + (block - blocks_of_k) * BLOCK) + tl.arange(0, BLOCK)
        inside = in_table[:, None] & (column < tl.where(of_coef, K, width))[None, :]
        if of_coef:
            grad = by_coefficients(
                latents_ptr, 2 * T, relays_ptr, bits_ptr, mask_bytes, table_ptr, groups, row, in_batch, column, K, T,
                BLOCK_T, DOT, PRECISION,
            )  # fmt: skip
        else:
            grad = tl.load(latents_ptr + row[:, None] * (2 * T) + (column - K)[None, :], mask=inside, other=0.0)
        step_columns(
            grad, values_ptr + index[:, None] * row_stride, slot_stride, column[None, :], inside, last, missed, sizes,
            history_ptr, capacity, counters_ptr, constants_ptr, CLOSED_FORM,
        )  # fmt: skip
    tl.store(last_ptr + index, (tl.zeros_like(last) + now).to(tl.int32), mask=in_table)


def relay_step_(
    values: Tensor, last: Tensor, rows: Tensor,
    history: Tensor, counters: Tensor, constants: Tensor, rates: Tensor, closed_form: bool,
    grad_z: Tensor | None, grad_kl: Tensor | None, state: Tensor, bits: Tensor,
    relays: Tensor, groups: Groups, active: Groups, drawn: Drawn | None,
) -> Tensor:  # fmt: skip
    """Step the rows of the batch in place; returns the gradient of the relays [K, T]. The clock is only read."""
    B, (K, T), relays, rows = len(rows), relays.shape, relays.contiguous(), rows.contiguous()
    parts = layout(groups, active, relays.device)
    latents, missed = relays.new_empty(B, 2 * T), relays.new_empty(SCALARS.value, B)
    if B == 0:
        return torch.zeros_like(relays)
    how = plan(B, K, K, relays.dtype)
    block_t, _ = how.blocks(T, K, relays.itemsize)
    if how.dot:
        block_t = max(16, min(32, triton.next_power_of_2(T)))  # by registers: bench/static.py
    _, step, seed, tag = drawn or (None, None, 0, 0)
    with torch.cuda.device_of(relays):
        relay_step_kernel[(triton.cdiv(B, how.rows),)](
            values, last, rows, history, counters, constants, rates,
            grad_z, *((0, 0) if grad_z is None else grad_z.stride()),
            grad_kl, 0 if grad_kl is None else grad_kl.stride(0),
            state, bits, step, seed % 2**64, tag, relays, parts.table, missed, latents,
            history.shape[1], B, values.shape[0], K, T, values.stride(0), values.stride(1), parts.groups, parts.bytes,
            ROWS=how.rows, BLOCK=BLOCK, BLOCK_T=block_t, NOISE_T=max(4, min(64, triton.next_power_of_2(T))),
            DOT=how.dot, PRECISION=dot_precision(relays.dtype), CLOSED_FORM=closed_form,
            enable_fp_fusion=True,
        )  # fmt: skip
    return relays_grad(state[:, :K], bits, latents[:, :T], groups, active)
