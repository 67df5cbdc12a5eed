"""The keyed noise on a CPU: its equations in place, by NumPy, in less than half the time that torch takes."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .. import reference
from ..reference import PHILOX_MULTIPLIERS, PHILOX_ROUNDS, PHILOX_WEYL, WORD

LOW, HALF = np.uint64(WORD), np.uint64(32)


def philox(key: tuple[int, int], counter: tuple[np.ndarray | int, ...]) -> tuple[np.ndarray, ...]:
    """reference.philox: four uint64 arrays of 32-bit words, in the shape that the counter's words broadcast to."""
    c0, c1, c2, c3 = np.array(np.broadcast_arrays(*counter), np.uint64)
    p0, p1 = np.empty_like(c0), np.empty_like(c0)
    m0, m1 = (np.uint64(m) for m in PHILOX_MULTIPLIERS)
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        np.multiply(c0, m0, out=p0)
        np.multiply(c2, m1, out=p1)
        _mix(p1, c1, k0, out=c0)
        _mix(p0, c3, k1, out=c2)
        np.bitwise_and(p1, LOW, out=c1)
        np.bitwise_and(p0, LOW, out=c3)
        k0, k1 = k0 + PHILOX_WEYL[0] & WORD, k1 + PHILOX_WEYL[1] & WORD
    return c0, c1, c2, c3


def _mix(product: np.ndarray, word: np.ndarray, key: int, out: np.ndarray) -> None:
    np.right_shift(product, HALF, out=out)
    np.bitwise_xor(out, word, out=out)
    np.bitwise_xor(out, np.uint64(key), out=out)


def philox_normal(seed: int, stream: str, step: int, row_ids: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """reference.philox_normal, to the bit. row_ids: int64 [B] on the CPU. Returns [B, dim]."""
    blocks = -(-dim // 4)
    ids = row_ids.numpy().view(np.uint64)[:, None]
    latent_block = np.arange(blocks, dtype=np.uint64) | np.uint64(reference.STREAMS[stream] << 28)
    key = seed & WORD, seed >> 32 & WORD
    words = philox(key, (ids & LOW, ids >> HALF, step & WORD, latent_block))
    uniform = torch.from_numpy(np.stack((words[0], words[2], words[1], words[3]), dtype=np.float32, casting="unsafe"))
    radius, angle = uniform.add_(0.5).mul_(2.0**-32).to(dtype).split(2)
    radius = torch.log(radius).mul_(-2.0).sqrt_()
    angle = 2 * math.pi * angle
    first, second = (radius * torch.cos(angle)).numpy(), (radius * torch.sin(angle)).numpy()
    normals = np.empty((len(row_ids), blocks, 4), first.dtype)
    for at, of_a_pair in enumerate((first[0], second[0], first[1], second[1])):
        normals[:, :, at] = of_a_pair
    return torch.from_numpy(normals).flatten(1)[:, :dim]
