"""Keyed noise."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, reference
from .checks import checked_int
from .registry import operator

MAX_LATENTS = 4 * 4096  # the noise counter has 12 bits for latent // 4


def philox_normal(
    seed: int,
    stream: str,
    step: int | Tensor,
    row_ids: Tensor,
    dim: int,
    *,
    draw: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals that depend on (seed, stream, draw, step, row id, latent index) alone: Philox-4x32-10.

    seed: 64-bit int; stream: "train", "infer", "impute" or "init"; step: int, 0 to 2^32 - 1, or int64 tensor [];
    row_ids: int64 [B], global; dim: latents, at most 16,384; draw: 0 to 65,535. Returns [B, dim] on the device of
    row_ids.
    """
    if stream not in reference.STREAMS:
        raise ValueError(f"stream must be one of {', '.join(reference.STREAMS)}; got {stream!r}")
    seed = checked_int("seed", seed)
    draw = checked_int("draw", draw, 0, (1 << 16) - 1)
    dim = checked_int("dim", dim, 0, MAX_LATENTS)
    if not isinstance(row_ids, Tensor):
        raise TypeError(f"row_ids must be an int64 tensor [B]; got {type(row_ids).__name__}")
    if row_ids.dtype != torch.int64 or row_ids.dim() != 1:
        raise TypeError(f"row_ids must be an int64 tensor [B]; got {row_ids.dtype} {list(row_ids.shape)}")
    step = checked_step(step, row_ids.device)
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float32 or torch.float64; got {dtype}")
    if dispatch.use_triton("philox_normal", row_ids.device):
        stream_number = reference.STREAMS[stream]
        if not isinstance(step, Tensor):
            step = torch.full((), step, dtype=torch.int64, device=row_ids.device)
        return _philox_normal(as_int64(seed), stream_number, step, row_ids, dim, draw, dtype)
    return reference.philox_normal(seed, stream, step, row_ids, dim, draw, dtype)


def checked_step(step: int | Tensor, device: torch.device) -> int | Tensor:
    """The step number of the noise, an int or an int64 tensor [] on `device`."""
    if not isinstance(step, Tensor):
        return checked_int("step", step, 0, reference.WORD)
    if step.dtype != torch.int64 or step.dim() != 0:
        raise TypeError(f"step must be an int or an int64 tensor []; got {step.dtype} {list(step.shape)}")
    return step.to(device)


def as_int64(seed: int) -> int:
    """The low 64 bits of a seed as an operator's schema holds them: signed."""
    seed %= 1 << 64
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def _run(seed: int, stream: int, step: Tensor, row_ids: Tensor, dim: int, draw: int, dtype: torch.dtype) -> Tensor:
    if dispatch.use_triton("philox_normal", row_ids.device):
        from ..kernels.philox_normal import philox_normal as kernel

        return kernel(seed, stream, step, row_ids, dim, draw, dtype)
    name = next(name for name, number in reference.STREAMS.items() if number == stream)
    return reference.philox_normal(seed, name, step, row_ids, dim, draw, dtype).contiguous()


def _fake(seed: int, stream: int, step: Tensor, row_ids: Tensor, dim: int, draw: int, dtype: torch.dtype) -> Tensor:
    return row_ids.new_empty(len(row_ids), dim, dtype=dtype)


_philox_normal = operator(
    "philox_normal(int seed, int stream, Tensor step, Tensor row_ids, int dim, int draw, ScalarType dtype) -> Tensor",
    _run,
    _fake,
)
