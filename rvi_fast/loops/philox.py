"""Keyed noise: the uniforms of reference.philox_normal, to the bit."""

from __future__ import annotations

import math

import numpy as np

from ..reference import PHILOX_MULTIPLIERS, PHILOX_ROUNDS, PHILOX_WEYL, WORD
from .jit import exact

M0, M1 = (np.uint64(m) for m in PHILOX_MULTIPLIERS)
WEYL0, WEYL1 = (np.uint64(w) for w in PHILOX_WEYL)
LOW, HALF = np.uint64(WORD), np.uint64(32)


@exact
def uniforms(seed, step, stream_and_draw, row_ids, radius, angle):
    """Of u in (0, 1): radius [B, P] takes those that make lengths, angle [B, P] those that make directions, times 2 pi.

    seed, step, stream_and_draw: uint64; row_ids: uint64 [B]; P: pairs of latents, an even number.
    """
    number = radius.dtype.type
    turn = number(2 * math.pi)
    for b in range(len(row_ids)):
        low, high = row_ids[b] & LOW, row_ids[b] >> HALF
        for block in range(radius.shape[1] // 2):
            c0, c1, c2, c3 = low, high, step & LOW, np.uint64(block) | stream_and_draw
            k0, k1 = seed & LOW, seed >> HALF
            for _ in range(PHILOX_ROUNDS):
                p0, p1 = c0 * M0, c2 * M1
                c0, c1, c2, c3 = p1 >> HALF ^ c1 ^ k0, p1 & LOW, p0 >> HALF ^ c3 ^ k1, p0 & LOW
                k0, k1 = (k0 + WEYL0) & LOW, (k1 + WEYL1) & LOW
            radius[b, 2 * block], radius[b, 2 * block + 1] = number(uniform(c0)), number(uniform(c2))
            angle[b, 2 * block], angle[b, 2 * block + 1] = turn * number(uniform(c1)), turn * number(uniform(c3))


@exact
def uniform(word):
    return (np.float32(word) + np.float32(0.5)) * np.float32(2.0**-32)
