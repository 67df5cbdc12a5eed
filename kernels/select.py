"""Exact selection of the largest coefficients of every group at once (reference.select), and its bit mask."""

import triton
import triton.language as tl

DIGIT_BITS = tl.constexpr(2)  # settled a step: 16 dependent steps in float32, not 31; the counts of one are independent
DIGITS = tl.constexpr(4)


@triton.jit
def magnitude(weight):
    """Unsigned integers [..] in the order of |weight|, float32 or float64: its bits without the sign."""
    if weight.dtype == tl.float64:
        key = weight.to(tl.uint64, bitcast=True) << 1
    else:
        key = weight.to(tl.uint32, bitcast=True) << 1
    return key


@triton.jit
def select(weight, inside, active):
    """B_i: the `active` weights of a group that are largest in absolute value, ties to the lower index (eq. 5).

    weight: [R, G, K], G groups padded to K each; inside: bool [R, G, K], False in the padding; active: int32 [G].
    Returns bool [R, G, K]. The smallest key that is selected is found from its highest digit down.
    """
    key = magnitude(weight)
    bits: tl.constexpr = key.dtype.primitive_bitwidth
    smallest = tl.zeros_like(tl.max(key, axis=2))  # [R, G]
    for step in range(tl.cdiv(bits, DIGIT_BITS)):
        shift = bits - DIGIT_BITS * (step + 1)
        digit = tl.zeros_like(smallest)
        for candidate in tl.static_range(1, DIGITS):
            at_least = smallest | (tl.full(smallest.shape, candidate, key.dtype) << shift)
            count = tl.sum((inside & (key >= at_least[:, :, None])).to(tl.int32), axis=2)
            digit += (count >= active[None, :]).to(key.dtype)
        smallest |= digit << shift
    above = inside & (key > smallest[:, :, None])
    tied = inside & (key == smallest[:, :, None])
    room = active[None, :] - tl.sum(above.to(tl.int32), axis=2)
    return above | (tied & (tl.cumsum(tied.to(tl.int32), axis=2) <= room[:, :, None]))


@triton.jit
def pack_bits(bit):
    """bool [R, C] -> uint8 [R, C // 8], the lowest bit first."""
    eights = tl.reshape(bit.to(tl.int32), [bit.shape[0], bit.shape[1] // 8, 8])
    return tl.sum(eights << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)
