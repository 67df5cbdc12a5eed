"""Exact selection of the largest coefficients of every group at once (reference.select), and its bit mask.

A group's places are split in two axes, parts and lanes, with the groups between them: then a warp's threads hold
neighbouring places of one group, and a count needs no exchange between warps.
"""

import triton
import triton.language as tl

DIGIT_BITS = tl.constexpr(2)  # settled a step: 16 dependent steps in float32, not 31; the counts of one are independent
COUNT_BITS = tl.constexpr(10)  # three counts of at most 1,023 are summed as one integer


@triton.jit
def magnitude(weight):
    """Unsigned integers [..] in the order of |weight|, float32 or float64: its bits without the sign."""
    if weight.dtype == tl.float64:
        key = weight.to(tl.uint64, bitcast=True) << 1
    else:
        key = weight.to(tl.uint32, bitcast=True) << 1
    return key


@triton.jit
def group_sum(x):
    """Sums over the groups' places: int32 [R, P, G, L] -> [R, G]."""
    return tl.sum(tl.sum(x, axis=1), axis=2)


@triton.jit
def digit_of_smallest(key, smallest, shift, active):
    """The next digit (0 to 3, at bits `shift`) of the smallest selected key, int32 [R, G].

    It is the number of candidates that leave `active` keys or more at or above them.
    """
    unit = tl.full(smallest.shape, 1, smallest.dtype) << shift
    first = (key >= (smallest | unit)[:, None, :, None]).to(tl.int32)
    second = (key >= (smallest | unit * 2)[:, None, :, None]).to(tl.int32)
    third = (key >= (smallest | unit * 3)[:, None, :, None]).to(tl.int32)
    if key.shape[1] * key.shape[3] < 2**COUNT_BITS:
        counts = group_sum(first + (second << COUNT_BITS) + (third << 2 * COUNT_BITS))
        count1, count2 = counts & (2**COUNT_BITS - 1), counts >> COUNT_BITS & (2**COUNT_BITS - 1)
        count3 = counts >> 2 * COUNT_BITS
    else:
        count1, count2, count3 = group_sum(first), group_sum(second), group_sum(third)
    enough = (count1 >= active[None, :]).to(tl.int32) + (count2 >= active[None, :]).to(tl.int32)
    return enough + (count3 >= active[None, :]).to(tl.int32)


@triton.jit
def select(weight, inside, active):
    """B_i: the `active` weights of a group that are largest in absolute value, ties to the lower place (eq. 5).

    weight: [R, P, G, L], place p * L + l of G groups; inside: bool [1, P, G, L], False in the padding; active: int32
    [G]. Returns bool [R, P, G, L]. The smallest key that is selected is found from its highest digit down.
    """
    key = magnitude(weight)
    key = tl.where(inside, key, tl.zeros_like(key))  # below every candidate
    bits: tl.constexpr = key.dtype.primitive_bitwidth
    smallest = tl.zeros_like(tl.max(tl.max(key, axis=1), axis=2))  # [R, G]
    for step in range(bits // DIGIT_BITS):
        shift = bits - DIGIT_BITS * (step + 1)
        smallest |= digit_of_smallest(key, smallest, shift, active).to(key.dtype) << shift
    above = inside & (key > smallest[:, None, :, None])
    tied = inside & (key == smallest[:, None, :, None])
    room = active[None, :] - group_sum(above.to(tl.int32))
    return above | (tied & (rank(tied) <= room[:, None, :, None]))


@triton.jit
def rank(bit):
    """How many of a group's bits [R, P, G, L] are set up to each place, itself included: int32."""
    ones = bit.to(tl.int32)
    of_parts = tl.sum(ones, axis=3)
    before = tl.cumsum(of_parts, axis=1) - of_parts
    return tl.cumsum(ones, axis=3) + before[:, :, :, None]


@triton.jit
def pack_bits(bit):
    """bool [R, C] -> uint8 [R, C // 8], the lowest bit first."""
    eights = tl.reshape(bit.to(tl.int32), [bit.shape[0], bit.shape[1] // 8, 8])
    return tl.sum(eights << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)
