"""Philox-4x32-10 and Box-Muller on the device, for every kernel that draws its own noise (reference.philox_normal)."""

import math

import triton
import triton.language as tl

TWO_PI = tl.constexpr(2 * math.pi)
TWO_TO_MINUS_32 = tl.constexpr(2.0**-32)


@triton.jit
def philox(k0, k1, c0, c1, c2, c3):
    """Philox-4x32-10: key and counter as uint32 that broadcast -> four uint32 words."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniform(word, dtype: tl.constexpr):
    """(0, 1] from a uint32 word; rounded in float32 whatever the dtype, so that every backend sees the same number."""
    return ((word.to(tl.float32) + 0.5) * TWO_TO_MINUS_32).to(dtype)


@triton.jit
def box_muller(word0, word1, dtype: tl.constexpr):
    """r cos, r sin: two standard normals of `dtype` from two uint32 words."""
    square = -2.0 * tl.log(uniform(word0, dtype))
    radius = tl.sqrt_rn(square) if dtype == tl.float32 else tl.sqrt(square)  # float64 has only the exact one
    angle = TWO_PI * uniform(word1, dtype)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def normals(seed, tag, step, row_id, block, dtype: tl.constexpr):
    """Standard normals of latents 4 * block .. 4 * block + 3.

    seed: uint64; tag: uint32, stream << 28 | draw << 12; step: int; row_id: int64 [R]; block: int32 [L], neighbours.
    Returns [R, 4 * L].
    """
    seed = seed.to(tl.uint64)  # the interpreter types a scalar by its value
    row = row_id.to(tl.uint64)[:, None]
    c0, c1 = row.to(tl.uint32), (row >> 32).to(tl.uint32)
    c3 = block.to(tl.uint32)[None, :] | tag.to(tl.uint32)
    w0, w1, w2, w3 = philox(seed.to(tl.uint32), (seed >> 32).to(tl.uint32), c0, c1, step.to(tl.uint32), c3)
    cos0, sin0 = box_muller(w0, w1, dtype)
    cos1, sin1 = box_muller(w2, w3, dtype)
    return tl.interleave(tl.interleave(cos0, cos1), tl.interleave(sin0, sin1))
