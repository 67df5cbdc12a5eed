"""Keyed standard normals (reference.philox_normal)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox import normals

TILE = 128  # Philox calls a program: one a thread


@triton.jit(do_not_specialize=["seed", "tag", "B"])
def philox_normal_kernel(
    row_ids_ptr, step_ptr,  # int64 [B], int64 []
    out_ptr,  # [B, dim]
    seed: tl.uint64, tag: tl.uint32,
    B, dim,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # int64: B * dim may pass 2**31
    row_id = tl.load(row_ids_ptr + row, mask=row < B, other=0)
    step = tl.load(step_ptr)
    for start in range(0, tl.cdiv(dim, 4), BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        latent = 4 * start + tl.arange(0, 4 * BLOCKS)
        noise = normals(seed, tag, step, row_id, block, out_ptr.dtype.element_ty)  # [ROWS, 4 * BLOCKS]
        inside = (row < B)[:, None] & (latent < dim)[None, :]
        tl.store(out_ptr + row[:, None] * dim + latent[None, :], noise, mask=inside)


def philox_normal(
    seed: int, stream: int, step: Tensor, row_ids: Tensor, dim: int, draw: int, dtype: torch.dtype
) -> Tensor:
    """Standard normals keyed by (seed, stream, draw, step, row id, latent): row_ids int64 [B] -> [B, dim] of dtype.

    seed: its low 64 bits count. step: int64 [] on the device of row_ids, read by the kernel: a CUDA graph replays with
    its present value.
    """
    out = torch.empty(len(row_ids), dim, dtype=dtype, device=row_ids.device)
    if out.numel() == 0:
        return out
    blocks = min(triton.next_power_of_2(triton.cdiv(dim, 4)), TILE)
    rows = TILE // blocks
    grid = (triton.cdiv(len(row_ids), rows),)
    tag = stream << 28 | draw << 12
    with torch.cuda.device_of(row_ids):
        philox_normal_kernel[grid](
            row_ids.contiguous(), step, out, seed % 2**64, tag, len(row_ids), dim, ROWS=rows, BLOCKS=blocks,
            enable_fp_fusion=True,  # Triton's own default depends on its version
        )  # fmt: skip
    return out
