"""z and KL of a batch of rows, given as matrices or as a table to read them from (reference.relay_mean and on).

A program first marks what its rows select, as bits in memory, and then multiplies what is marked: so neither the number
of relays nor that of latents is limited by what fits in registers.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .catch_up import follow, missed_by
from .philox import normals
from .precision import dot_precision
from .relays import coefficients, layout, select_coefficients, selected_bits, store_bits, store_indices

PROGRAMS = 132  # enough to keep a large GPU busy
ROWS_OF_DOT = 16  # tl.dot has at least so many
ROWS_WITHOUT_DOT = 4
# float32 numbers of a tile: what registers hold
PLACES = 2048  # in which coefficients are selected
TERMS = 4096  # in which relays are summed without tl.dot
READ = 1024  # read from a table


@triton.jit
def read_rows(
    values_ptr, last_ptr, rows_ptr, N, row_stride, moment_stride,  # [N, 3, C], [N], [B]
    history_ptr, capacity, counters_ptr, constants_ptr,  # a clock (kernels/catch_up.py), None where nothing is behind
    out_ptr,  # [B, C]
    row, in_batch, C,
    BLOCK_C: tl.constexpr, CLOSED_FORM: tl.constexpr,
):  # fmt: skip
    """Copy rows `row` of the batch from the table, brought up to date; NaN where there is no such row."""
    index = tl.load(rows_ptr + row, mask=in_batch, other=0)
    in_table = in_batch & (index >= 0) & (index < N)
    last = tl.load(last_ptr + index, mask=in_table, other=0).to(tl.int64)
    if history_ptr is not None:
        missed = missed_by(
            last, history_ptr, capacity, counters_ptr, constants_ptr, CLOSED_FORM, values_ptr.dtype.element_ty
        )  # fmt: skip
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        inside = in_table[:, None] & (c < C)[None, :]
        p_ptr = values_ptr + index[:, None] * row_stride + c[None, :]
        p = tl.load(p_ptr, mask=inside, other=float("nan"))
        if history_ptr is not None:
            m = tl.load(p_ptr + moment_stride, mask=inside, other=0.0)
            v = tl.load(p_ptr + 2 * moment_stride, mask=inside, other=0.0)
            p, _, _ = follow(p, m, v, last, missed, history_ptr, capacity, counters_ptr, constants_ptr, CLOSED_FORM)
        tl.store(out_ptr + row[:, None] * C + c[None, :], p, mask=in_batch[:, None] & (c < C)[None, :])


@triton.jit
def mark_selected(
    coef_ptr, coef_stride, bits_ptr, mask_bytes, indices_ptr, active, first_row, B, table_ptr, groups,
    ROWS: tl.constexpr, ROWS_AT_ONCE: tl.constexpr, GROUPS_AT_ONCE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """B_i of ROWS rows, to their bit mask and (unless None) to the list of their indices."""
    for first in range(0, ROWS, ROWS_AT_ONCE):
        row = first_row + first + tl.arange(0, ROWS_AT_ONCE)
        in_batch = row < B
        for group in range(0, groups, GROUPS_AT_ONCE):
            k, inside = coefficients(table_ptr, groups, group, GROUPS_AT_ONCE, GROUP)
            at = coef_ptr + row[:, None] * coef_stride + k[None, :]
            weight = tl.load(at, mask=in_batch[:, None] & inside[None, :], other=0.0)
            selected = select_coefficients(weight, inside, table_ptr, groups, group, GROUPS_AT_ONCE, GROUP)
            store_bits(
                bits_ptr, row, in_batch, selected, mask_bytes, table_ptr, groups, group, GROUPS_AT_ONCE, GROUP
            )  # fmt: skip
            if indices_ptr is not None:
                store_indices(
                    indices_ptr, row, in_batch, selected, active, table_ptr, groups, group, GROUPS_AT_ONCE, GROUP
                )  # fmt: skip


@triton.jit
def relay_mean(
    coef_ptr, coef_stride, bits_ptr, mask_bytes, relays_ptr, row, in_batch, t, K, T, table_ptr, groups,
    BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum over k in B_i of a_ik r_k (eq. 4), all relays multiplied: [R, BLOCK_T]."""
    if DOT:
        mean = tl.zeros([row.shape[0], t.shape[0]], relays_ptr.dtype.element_ty)
    else:
        terms = tl.zeros([row.shape[0], BLOCK_K, t.shape[0]], relays_ptr.dtype.element_ty)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        selected = selected_bits(bits_ptr, mask_bytes, row, in_batch, k, K, table_ptr, groups)
        weight = tl.load(coef_ptr + row[:, None] * coef_stride + k[None, :], mask=selected, other=0.0)
        inside = (k < K)[:, None] & (t < T)[None, :]
        relays = tl.load(relays_ptr + k.to(tl.int64)[:, None] * T + t[None, :], mask=inside, other=0.0)
        if DOT:
            mean = tl.dot(weight, relays, mean, input_precision=PRECISION)
        else:
            terms += weight[:, :, None] * relays[None, :, :]
    if not DOT:
        mean = tl.sum(terms, axis=1)
    return mean


@triton.jit
def gathered_relay_mean(
    coef_ptr, coef_stride, indices_ptr, active, relays_ptr, row, in_batch, t, T, BLOCK_K: tl.constexpr
):  # fmt: skip
    """The same, only the selected relays read."""
    terms = tl.zeros([row.shape[0], BLOCK_K, t.shape[0]], relays_ptr.dtype.element_ty)
    for first in range(0, active, BLOCK_K):
        j = first + tl.arange(0, BLOCK_K)
        inside = in_batch[:, None] & (j < active)[None, :]
        k = tl.load(indices_ptr + row[:, None] * active + j[None, :], mask=inside, other=0).to(tl.int64)
        weight = tl.load(coef_ptr + row[:, None] * coef_stride + k, mask=inside, other=0.0)
        inside_relays = inside[:, :, None] & (t < T)[None, None, :]
        relays = tl.load(relays_ptr + k[:, :, None] * T + t[None, None, :], mask=inside_relays, other=0.0)
        terms += weight[:, :, None] * relays
    return tl.sum(terms, axis=1)


@triton.jit
def noise_of(
    noise_ptr, noise_stride, rows_ptr, step_ptr, seed, tag, row, inside, first,
    BLOCK_T: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """lambda of latents first .. first + BLOCK_T - 1, [R, BLOCK_T]: given, or drawn by the keys of the table's rows."""
    t = first + tl.arange(0, BLOCK_T)
    if noise_ptr is not None:
        noise = tl.load(noise_ptr + row[:, None] * noise_stride + t[None, :], mask=inside, other=0.0)
    else:
        row_id = tl.load(rows_ptr + row, mask=tl.max(inside.to(tl.int32), axis=1) > 0, other=0)
        block = first // 4 + tl.arange(0, BLOCK_T // 4)
        noise = normals(seed, tag, tl.load(step_ptr), row_id, block, dtype)
    return noise


@triton.jit(do_not_specialize=["seed", "tag", "B", "N", "capacity"])
def relay_sample_kernel(
    coef_ptr, residual_ptr, log_std_ptr,  # [B, K], [B, T], [B, T]: given; read from the table where there is one
    coef_stride, residual_stride, log_std_stride,
    values_ptr, last_ptr, rows_ptr,  # [N, 3, C], [N] int32, [B] int64; None
    N, row_stride, moment_stride, C,
    history_ptr, capacity, counters_ptr, constants_ptr,  # the table's clock, None where nothing is behind
    noise_ptr, noise_stride,  # [B, T], None
    step_ptr, drawn_at_ptr, seed: tl.uint64, tag: tl.uint32,  # int64 [], []: where noise is drawn, else None
    relays_ptr, table_ptr,  # [K, T], see relays.layout
    z_ptr, kl_ptr,  # [B, T], [B]
    mean_ptr, mean_stride,  # [B, T]; None
    bits_ptr, indices_ptr,  # uint8 [B, mask_bytes], int32 [B, active] or None: all relays are multiplied
    B, K, T, groups, mask_bytes, active,
    ROWS: tl.constexpr, ROWS_AT_ONCE: tl.constexpr, GROUPS_AT_ONCE: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, CLOSED_FORM: tl.constexpr,
):  # fmt: skip
    """mu = e_i + sum over k in B_i of a_ik r_k; z = mu + sigma lambda; kl = sum (mu^2 + sigma^2 - 1)/2 - log sigma."""
    dtype: tl.constexpr = relays_ptr.dtype.element_ty
    first_row = tl.program_id(0).to(tl.int64) * ROWS  # int64: B * C may pass 2**31
    row = first_row + tl.arange(0, ROWS)
    in_batch = row < B
    if values_ptr is not None:
        read_rows(
            values_ptr, last_ptr, rows_ptr, N, row_stride, moment_stride, history_ptr, capacity, counters_ptr,
            constants_ptr, coef_ptr, row, in_batch, C, BLOCK_C, CLOSED_FORM,
        )  # fmt: skip
        tl.debug_barrier()  # the rows are in memory
    mark_selected(
        coef_ptr, coef_stride, bits_ptr, mask_bytes, indices_ptr, active, first_row, B, table_ptr, groups,
        ROWS, ROWS_AT_ONCE, GROUPS_AT_ONCE, GROUP,
    )  # fmt: skip
    tl.debug_barrier()  # and so is what they select
    kl = tl.zeros([ROWS], dtype)
    for first in range(0, T, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        inside = in_batch[:, None] & (t < T)[None, :]
        if indices_ptr is None:
            mean = relay_mean(
                coef_ptr, coef_stride, bits_ptr, mask_bytes, relays_ptr, row, in_batch, t, K, T, table_ptr, groups,
                BLOCK_K, DOT, PRECISION,
            )  # fmt: skip
        else:
            mean = gathered_relay_mean(
                coef_ptr, coef_stride, indices_ptr, active, relays_ptr, row, in_batch, t, T, BLOCK_K
            )  # fmt: skip
        mean += tl.load(residual_ptr + row[:, None] * residual_stride + t[None, :], mask=inside, other=0.0)
        log_std = tl.load(log_std_ptr + row[:, None] * log_std_stride + t[None, :], mask=inside, other=0.0)
        sigma = tl.exp(log_std)
        kl += tl.sum(tl.where(inside, 0.5 * (mean * mean + sigma * sigma - 1.0) - log_std, 0.0), axis=1)
        if mean_ptr is not None:
            tl.debug_barrier()  # it may lie where the residual did, which threads with a copy of the tile may yet read
            tl.store(mean_ptr + row[:, None] * mean_stride + t[None, :], mean, mask=inside)
        if (noise_ptr is not None) or (step_ptr is not None):
            noise = noise_of(
                noise_ptr, noise_stride, rows_ptr, step_ptr, seed, tag, row, inside, first, BLOCK_T, dtype
            )  # fmt: skip
            mean += sigma * noise
        tl.store(z_ptr + row[:, None] * T + t[None, :], mean, mask=inside)
    tl.store(kl_ptr + row, kl, mask=in_batch)
    if step_ptr is not None:
        tl.store(drawn_at_ptr, tl.load(step_ptr), mask=first_row == 0)  # the step may have moved on by the backward


@triton.jit
def sample_backward(
    grad_z_ptr, grad_z_row, grad_z_latent, grad_kl_ptr, grad_kl_row,  # [B, T], [B]; None
    mean_ptr, mean_stride, log_std_ptr, log_std_stride,  # [B, T], [B, T]
    noise_ptr, noise_stride, rows_ptr, step_ptr, seed, tag,  # as in the forward
    grad_mean_ptr, grad_mean_stride,  # [B, T]
    grad_log_std_ptr, grad_log_std_stride, grad_noise_ptr,  # [B, T], [B, T]; None
    row, in_batch, T,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """dmu = dz + dkl mu; dlog sigma = dz sigma lambda + dkl (sigma^2 - 1); dlambda = dz sigma."""
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    grad_kl = tl.zeros([row.shape[0], 1], dtype)
    if grad_kl_ptr is not None:
        grad_kl = tl.load(grad_kl_ptr + row * grad_kl_row, mask=in_batch, other=0.0)[:, None]
    for first in range(0, T, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        inside = in_batch[:, None] & (t < T)[None, :]
        grad_z = tl.zeros([row.shape[0], BLOCK_T], dtype)
        if grad_z_ptr is not None:
            at = row[:, None] * grad_z_row + t[None, :].to(tl.int64) * grad_z_latent
            grad_z = tl.load(grad_z_ptr + at, mask=inside, other=0.0)
        mean = tl.load(mean_ptr + row[:, None] * mean_stride + t[None, :], mask=inside, other=0.0)
        at = row[:, None] * grad_mean_stride + t[None, :]
        tl.store(grad_mean_ptr + at, grad_z + grad_kl * mean, mask=inside)
        log_std = tl.load(log_std_ptr + row[:, None] * log_std_stride + t[None, :], mask=inside, other=0.0)
        sigma = tl.exp(log_std)
        if grad_log_std_ptr is not None:
            grad_log_std = grad_kl * (sigma * sigma - 1.0)
            if (noise_ptr is not None) or (step_ptr is not None):
                noise = noise_of(
                    noise_ptr, noise_stride, rows_ptr, step_ptr, seed, tag, row, inside, first, BLOCK_T, dtype
                )  # fmt: skip
                grad_log_std += grad_z * sigma * noise
            at = row[:, None] * grad_log_std_stride + t[None, :]
            tl.store(grad_log_std_ptr + at, grad_log_std, mask=inside)
        if grad_noise_ptr is not None:
            tl.store(grad_noise_ptr + row[:, None] * T + t[None, :], grad_z * sigma, mask=inside)


@triton.jit
def by_coefficients(
    grad_mean_ptr, grad_mean_stride, relays_ptr, bits_ptr, mask_bytes, table_ptr, groups, row, in_batch, k, K, T,
    BLOCK_T: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """da_ik = dmu . r_k on B_i, 0 elsewhere: [R, BLOCK_K]."""
    if DOT:
        grad = tl.zeros([row.shape[0], k.shape[0]], relays_ptr.dtype.element_ty)
    else:
        terms = tl.zeros([row.shape[0], k.shape[0], BLOCK_T], relays_ptr.dtype.element_ty)
    for first in range(0, T, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        in_rows, in_relays = in_batch[:, None] & (t < T)[None, :], (k < K)[:, None] & (t < T)[None, :]
        grad_mean = tl.load(grad_mean_ptr + row[:, None] * grad_mean_stride + t[None, :], mask=in_rows, other=0.0)
        relays = tl.load(relays_ptr + k.to(tl.int64)[:, None] * T + t[None, :], mask=in_relays, other=0.0)
        if DOT:
            grad = tl.dot(grad_mean, tl.trans(relays), grad, input_precision=PRECISION)
        else:
            terms += grad_mean[:, None, :] * relays[None, :, :]
    if not DOT:
        grad = tl.sum(terms, axis=2)
    return tl.where(selected_bits(bits_ptr, mask_bytes, row, in_batch, k, K, table_ptr, groups), grad, 0.0)


@triton.jit(do_not_specialize=["seed", "tag", "B"])
def relay_sample_backward_kernel(
    grad_z_ptr, grad_z_row, grad_z_latent, grad_kl_ptr, grad_kl_row,  # [B, T], [B]; None
    mean_ptr, mean_stride, log_std_ptr, log_std_stride,  # [B, T], [B, T]
    noise_ptr, noise_stride,  # [B, T], None
    rows_ptr, step_ptr, seed: tl.uint64, tag: tl.uint32,  # [B] int64, [] int64: where noise was drawn, else None
    relays_ptr, table_ptr, bits_ptr,  # [K, T], see relays.layout, uint8 [B, mask_bytes]
    grad_coef_ptr, grad_coef_stride,  # [B, K]; None
    grad_mean_ptr, grad_mean_stride,  # [B, T]
    grad_log_std_ptr, grad_log_std_stride, grad_noise_ptr,  # [B, T], [B, T]; None
    B, K, T, groups, mask_bytes,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, NOISE_T: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sample_backward, then by_coefficients."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_batch = row < B
    sample_backward(
        grad_z_ptr, grad_z_row, grad_z_latent, grad_kl_ptr, grad_kl_row, mean_ptr, mean_stride, log_std_ptr,
        log_std_stride, noise_ptr, noise_stride, rows_ptr, step_ptr, seed, tag, grad_mean_ptr, grad_mean_stride,
        grad_log_std_ptr, grad_log_std_stride, grad_noise_ptr, row, in_batch, T, NOISE_T,
    )  # fmt: skip
    if grad_coef_ptr is not None:
        tl.debug_barrier()  # dmu is in memory
        for first_k in range(0, K, BLOCK_K):
            k = first_k + tl.arange(0, BLOCK_K)
            grad = by_coefficients(
                grad_mean_ptr, grad_mean_stride, relays_ptr, bits_ptr, mask_bytes, table_ptr, groups, row, in_batch, k,
                K, T, BLOCK_T, DOT, PRECISION,
            )  # fmt: skip
            at = row[:, None] * grad_coef_stride + k[None, :]
            tl.store(grad_coef_ptr + at, grad, mask=in_batch[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=["B", "rows_of_split"])
def relays_grad_kernel(
    coef_ptr, coef_stride, bits_ptr, grad_mean_ptr, grad_mean_stride,  # [B, K], uint8 [B, mask_bytes], [B, T]
    table_ptr, partial_ptr,  # see relays.layout, [splits, K, T]
    B, K, T, groups, mask_bytes, rows_of_split,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dr_k = sum over the rows of a split with k in B_i of a_ik dmu_i."""
    blocks_of_t = tl.cdiv(T, BLOCK_T)
    k = tl.program_id(0) // blocks_of_t * BLOCK_K + tl.arange(0, BLOCK_K)
    t = tl.program_id(0) % blocks_of_t * BLOCK_T + tl.arange(0, BLOCK_T)
    first_row = tl.program_id(1).to(tl.int64) * rows_of_split
    end = tl.minimum(first_row + rows_of_split, B)
    grad = tl.zeros([BLOCK_K, BLOCK_T], partial_ptr.dtype.element_ty)
    for first in range(first_row, end, ROWS):
        row = first + tl.arange(0, ROWS)
        in_split = row < end
        selected = selected_bits(bits_ptr, mask_bytes, row, in_split, k, K, table_ptr, groups)
        weight = tl.load(coef_ptr + row[:, None] * coef_stride + k[None, :], mask=selected, other=0.0)
        at = row[:, None] * grad_mean_stride + t[None, :]
        grad_mean = tl.load(grad_mean_ptr + at, mask=in_split[:, None] & (t < T)[None, :], other=0.0)
        if DOT:
            grad = tl.dot(tl.trans(weight), grad_mean, grad, input_precision=PRECISION)
        else:
            grad += tl.sum(weight[:, :, None] * grad_mean[:, None, :], axis=0)
    at = (tl.program_id(1).to(tl.int64) * K + k)[:, None] * T + t[None, :]
    tl.store(partial_ptr + at, grad, mask=(k < K)[:, None] & (t < T)[None, :])


class Plan(NamedTuple):
    """How a batch is cut into programs."""

    rows: int  # of a program
    dot: bool  # multiply all relays by tl.dot
    gather: bool  # read the selected relays only

    def blocks(self, summed: int, other: int, itemsize: int) -> tuple[int, int]:
        """Sizes of blocks over an index that is summed and over another."""
        if self.dot:
            return 16, _block(other, 16, 64)
        block = _block(other, 4, 64)
        return _block(summed, 1, max(1, 4 * TERMS // (itemsize * self.rows * block))), block


def _block(size: int, low: int, high: int) -> int:
    return min(max(low, triton.next_power_of_2(size)), high)


def plan(B: int, K: int, active: int, dtype: torch.dtype) -> Plan:
    """Few rows a program while that gives every processor one, 16 and tl.dot beyond.

    A row costs K T itemsize / rows bytes of relays if all are multiplied, and active T itemsize bytes if the selected
    ones are gathered: the smaller decides. float64 has no fast tl.dot, and gains less from many rows.
    """
    rows = triton.next_power_of_2(triton.cdiv(B, PROGRAMS))
    if rows > ROWS_WITHOUT_DOT:
        rows = ROWS_OF_DOT if dtype == torch.float32 else ROWS_WITHOUT_DOT
    gather = active * rows < K
    return Plan(rows, rows == ROWS_OF_DOT and not gather, gather)


class Table(NamedTuple):
    """Rows of a table, and its clock (kernels/catch_up.py), None where nothing is behind."""

    values: Tensor  # [N, 3, C]
    last: Tensor  # int32 [N]
    rows: Tensor  # int64 [B]
    history: Tensor | None
    counters: Tensor | None
    constants: Tensor | None
    closed_form: bool


class Drawn(NamedTuple):
    """The keys of noise that a kernel draws."""

    rows: Tensor  # int64 [B]
    step: Tensor  # int64 []
    seed: int
    tag: int  # stream << 28 | draw << 12


Groups = tuple[int, ...]


def _by_row(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _row_stride(matrix: Tensor | None) -> int:
    return 0 if matrix is None else matrix.stride(0)


def _columns(state: Tensor, K: int, T: int) -> tuple[Tensor, Tensor, Tensor]:
    """coef, residual (or the mean) and log_std of rows [B, C]."""
    return state[:, :K], state[:, K : K + T], state[:, K + T :]


def _sample(
    coef: Tensor, residual: Tensor, log_std: Tensor, relays: Tensor, groups: Groups, active: Groups,
    noise: Tensor | None, mean: Tensor | None, table: Table | None, drawn: Drawn | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """z, kl, the mask of what is selected, the step of the noise. Fills mean; coef .. log_std too, if from a table."""
    (B, K), T = coef.shape, relays.shape[1]
    parts = layout(groups, active, relays.device)
    how = plan(B, K, parts.active, relays.dtype)
    z, kl = relays.new_empty(B, T), relays.new_empty(B)
    bits, drawn_at = relays.new_empty(B, parts.bytes, dtype=torch.uint8), relays.new_empty((), dtype=torch.int64)
    if B == 0 or drawn is None:
        drawn_at.zero_()
    if B == 0:
        return z, kl, bits, drawn_at
    indices = relays.new_empty(B, parts.active, dtype=torch.int32) if how.gather else None
    block_k, block_t = how.blocks(parts.active if how.gather else K, T, relays.itemsize)
    rows_at_once, groups_at_once = parts.tile(how.rows, 4 * PLACES // relays.itemsize)
    N, C, row_stride, moment_stride, capacity, closed_form = 0, 0, 0, 0, 0, True
    values = last = rows = history = counters = constants = None
    if table is not None:
        values, last, rows, history, counters, constants, closed_form = table
        rows, (N, _, C), (row_stride, moment_stride, _) = rows.contiguous(), values.shape, values.stride()
        capacity = 0 if history is None else history.shape[1]
    _, step, seed, tag = drawn or (None, None, 0, 0)
    with torch.cuda.device_of(relays):
        relay_sample_kernel[(triton.cdiv(B, how.rows),)](
            coef, residual, log_std, coef.stride(0), residual.stride(0), log_std.stride(0),
            values, last, rows, N, row_stride, moment_stride, C,
            history, capacity, counters, constants,
            noise, _row_stride(noise), step, drawn_at, seed % 2**64, tag,
            relays, parts.table, z, kl, mean, _row_stride(mean), bits, indices,
            B, K, T, parts.groups, parts.bytes, parts.active,
            ROWS=how.rows, ROWS_AT_ONCE=rows_at_once, GROUPS_AT_ONCE=groups_at_once, GROUP=parts.size,
            BLOCK_K=block_k, BLOCK_T=block_t, BLOCK_C=_block(C, 16, max(16, 4 * READ // (relays.itemsize * how.rows))),
            DOT=how.dot, PRECISION=dot_precision(relays.dtype), CLOSED_FORM=closed_form,
            enable_fp_fusion=True,
        )  # fmt: skip
    return z, kl, bits, drawn_at


def relay_sample(
    coef: Tensor, residual: Tensor, log_std: Tensor, relays: Tensor, groups: Groups, active: Groups,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """z [B, T], kl [B], the mean [B, T] (empty where z is the mean), and the mask of what is selected."""
    coef, residual, log_std = _by_row(coef), _by_row(residual), _by_row(log_std)
    noise = None if noise is None else _by_row(noise)
    mean = None if noise is None else relays.new_empty(residual.shape)
    z, kl, bits, _ = _sample(
        coef, residual, log_std, relays.contiguous(), groups, active, noise, mean, None, None
    )  # fmt: skip
    return z, kl, relays.new_empty(0) if mean is None else mean, bits


def relay_sample_rows(
    table: Table, relays: Tensor, groups: Groups, active: Groups, drawn: Drawn | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """z [B, T], kl [B], state [B, C] = coef | mean | log_std up to date, the mask of what is selected, drawn_at []."""
    state = relays.new_empty(len(table.rows), table.values.shape[2])
    coef, mean, log_std = _columns(state, *relays.shape)
    z, kl, bits, drawn_at = _sample(
        coef, mean, log_std, relays.contiguous(), groups, active, None, mean, table, drawn
    )  # fmt: skip
    return z, kl, state, bits, drawn_at


def _backward(
    grad_z: Tensor | None, grad_kl: Tensor | None, coef: Tensor, mean: Tensor, log_std: Tensor, relays: Tensor,
    bits: Tensor, groups: Groups, active: Groups, noise: Tensor | None, drawn: Drawn | None,
    grad_coef: Tensor | None, grad_mean: Tensor, grad_log_std: Tensor | None, grad_noise: Tensor | None,
) -> None:  # fmt: skip
    """Fills the gradients of rows that are not None."""
    (B, K), T = coef.shape, relays.shape[1]
    if B == 0:
        return
    parts = layout(groups, active, relays.device)
    how = plan(B, K, K, relays.dtype)
    block_t, block_k = how.blocks(T, K, relays.itemsize)
    rows, step, seed, tag = drawn or (None, None, 0, 0)
    rows = None if rows is None else rows.contiguous()
    with torch.cuda.device_of(relays):
        relay_sample_backward_kernel[(triton.cdiv(B, how.rows),)](
            grad_z, *((0, 0) if grad_z is None else grad_z.stride()), grad_kl, _row_stride(grad_kl),
            mean, mean.stride(0), log_std, log_std.stride(0), noise, _row_stride(noise), rows, step, seed % 2**64, tag,
            relays, parts.table, bits, grad_coef, _row_stride(grad_coef), grad_mean, grad_mean.stride(0),
            grad_log_std, _row_stride(grad_log_std), grad_noise, B, K, T, parts.groups, parts.bytes,
            ROWS=how.rows, BLOCK_K=block_k, BLOCK_T=block_t, NOISE_T=_block(T, 4, 64),
            DOT=how.dot, PRECISION=dot_precision(relays.dtype), enable_fp_fusion=True,
        )  # fmt: skip


def relays_grad(coef: Tensor, bits: Tensor, grad_mean: Tensor, groups: Groups, active: Groups) -> Tensor:
    """A' dmu [K, T]: every program sums its share of the rows, and the shares are added in order."""
    (B, K), T = coef.shape, grad_mean.shape[1]
    if B == 0:
        return coef.new_zeros(K, T)
    parts = layout(groups, active, coef.device)
    dot = coef.dtype == torch.float32
    block_k, block_t = _block(K, 16, 32 if dot else 16), _block(T, 16, 64 if dot else 16)
    rows = 32 if dot else 8
    blocks = triton.cdiv(K, block_k) * triton.cdiv(T, block_t)
    splits = max(1, min(2 * PROGRAMS // blocks, triton.cdiv(B, 2 * rows)))
    rows_of_split = triton.cdiv(B, splits)
    splits = triton.cdiv(B, rows_of_split)
    partial = coef.new_empty(splits, K, T)
    with torch.cuda.device_of(coef):
        relays_grad_kernel[(blocks, splits)](
            coef, coef.stride(0), bits, grad_mean, grad_mean.stride(0), parts.table, partial,
            B, K, T, parts.groups, parts.bytes, rows_of_split,
            ROWS=rows, BLOCK_K=block_k, BLOCK_T=block_t, DOT=dot,
            PRECISION=dot_precision(coef.dtype), enable_fp_fusion=True,
        )  # fmt: skip
    return partial[0] if splits == 1 else partial.sum(0)


def relay_sample_backward(
    grad_z: Tensor | None, grad_kl: Tensor | None, coef: Tensor, mean: Tensor, log_std: Tensor, relays: Tensor,
    noise: Tensor | None, bits: Tensor, groups: Groups, active: Groups, needed: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of coef, residual, log_std, relays and noise, None where not needed."""
    coef, log_std, relays = _by_row(coef), _by_row(log_std), relays.contiguous()
    noise = None if noise is None else _by_row(noise)
    need_coef, need_residual, need_log_std, need_relays, need_noise = needed
    grad_coef = relays.new_empty(coef.shape) if need_coef else None
    grad_mean = relays.new_empty(mean.shape)
    grad_log_std = relays.new_empty(mean.shape) if need_log_std else None
    grad_noise = relays.new_empty(mean.shape) if need_noise else None
    _backward(
        grad_z, grad_kl, coef, mean, log_std, relays, bits, groups, active, noise, None,
        grad_coef, grad_mean, grad_log_std, grad_noise,
    )  # fmt: skip
    grad_relays = relays_grad(coef, bits, grad_mean, groups, active) if need_relays else None
    return [grad_coef, grad_mean if need_residual else None, grad_log_std, grad_relays, grad_noise]


def relay_sample_rows_backward(
    grad_z: Tensor | None, grad_kl: Tensor | None, state: Tensor, relays: Tensor, bits: Tensor, groups: Groups,
    active: Groups, drawn: Drawn | None, needed: tuple[bool, bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the rows [B, C] and of the relays, None where not needed. state: as relay_sample_rows gave it."""
    relays = relays.contiguous()
    grad = torch.empty_like(state)
    grad_coef, grad_mean, grad_log_std = _columns(grad, *relays.shape)
    need_rows, need_relays = needed
    coef, mean, log_std = _columns(state, *relays.shape)
    _backward(
        grad_z, grad_kl, coef, mean, log_std, relays, bits, groups, active, None, drawn,
        grad_coef if need_rows else None, grad_mean, grad_log_std if need_rows else None, None,
    )  # fmt: skip
    grad_relays = relays_grad(coef, bits, grad_mean, groups, active) if need_relays else None
    return [grad if need_rows else None, grad_relays]
