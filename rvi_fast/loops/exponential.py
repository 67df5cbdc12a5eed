"""e^x and what is made of it, as loops that vectorise, which calls of the C library for every number do not.

A number's bits do not depend on where it stands, as those of PyTorch's vectorised operators may.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .jit import exact

LN2 = math.log(2)
LN2_HIGH = float.fromhex("0x1.62ep-1")  # of so few digits that its multiples are exact
LN2_LOW = float.fromhex("0x1.0bfbe8e7bcd5ep-15")  # the rest of log 2
SERIES = tuple(1 / math.factorial(k) for k in range(13, -1, -1))  # enough for |x| <= log(2) / 2 in float64


ATANH = tuple(1 / k for k in range(33, 0, -2))  # of x^2, enough for x <= 1 / 3


@intrinsic
def power_of_two(typingctx: Any, shifted: Any, bias: Any) -> Any:
    """2^n in the type of `shifted`, whose lowest bits are n's; bias: that of an exponent, int64."""
    digits = {types.float32: 23, types.float64: 52}[shifted]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole = ir.IntType(signature.return_type.bitwidth)
        to_bias = arguments[1] if whole.width == 64 else builder.trunc(arguments[1], whole)
        exponent = builder.add(builder.bitcast(arguments[0], whole), to_bias)
        return builder.bitcast(builder.shl(exponent, whole(digits)), arguments[0].type)

    return shifted(shifted, types.int64), generate


@exact
def exp(sign, a, out):
    """out = e^(sign a) of [n] to a unit in the last place, but infinite from half the largest float on, and 0 where it
    would be denormal. sign: 1 or -1."""
    info, number = np.finfo(a.dtype), a.dtype.type
    least, most = number((info.minexp - 1) * LN2), number(info.maxexp * LN2)
    sign, turns, high, low = number(sign), number(1 / LN2), number(LN2_HIGH), number(LN2_LOW)
    shift = number(1.5 * 2.0**info.nmant)  # added, it leaves no digit behind the point
    for i in range(len(a)):
        x = min(max(sign * a[i], least), most)
        shifted = x * turns + shift
        n = shifted - shift
        r = (x - n * high) - n * low
        total = number(0)
        for coefficient in SERIES:
            total = total * r + number(coefficient)
        out[i] = total * power_of_two(shifted, np.int64(info.maxexp - 1))


@exact
def softplus_and_sigmoid(a, softplus, sigmoid):
    """log(1 + e^a) and 1 / (1 + e^-a) of [n]."""
    number = a.dtype.type
    zero, one, two = number(0), number(1), number(2)
    for i in range(len(a)):
        softplus[i] = abs(a[i])
    exp(-1, softplus, sigmoid)
    for i in range(len(a)):
        small = sigmoid[i]
        x = small / (two + small)  # log(1 + small) = 2 atanh(x)
        total = zero
        for coefficient in ATANH:
            total = total * (x * x) + number(coefficient)
        softplus[i] = max(a[i], zero) + two * x * total
        sigmoid[i] = (one if a[i] > 0 else small) / (one + small)
