"""Dense layers and activations on the device, for a block of rows (nn.MLPDecoder).

A layer's weight [OUT, IN] is row-major, its bias [OUT] follows it in memory. Tiles are padded to powers of two of at
least 16, which tl.dot needs; the padding of weights and inputs is 0, and every activation takes 0 to 0.
"""

import math

import triton
import triton.language as tl

ONE_BY_SQRT_2 = tl.constexpr(1 / math.sqrt(2))
ONE_BY_SQRT_2_PI = tl.constexpr(1 / math.sqrt(2 * math.pi))


@triton.jit
def activate(pre, ACTIVATION: tl.constexpr):
    """h = f(pre): "relu", "silu", "tanh" or "gelu"."""
    if ACTIVATION == "relu":
        h = tl.where(pre < 0, 0.0, pre)  # NaN stays NaN
    elif ACTIVATION == "silu":
        h = pre * tl.sigmoid(pre)
    elif ACTIVATION == "tanh":
        h = 2 * tl.sigmoid(2 * pre) - 1
    else:
        h = pre * 0.5 * (1 + tl.erf(pre * ONE_BY_SQRT_2))
    return h


@triton.jit
def activation_slope(pre, ACTIVATION: tl.constexpr):
    """f'(pre)."""
    if ACTIVATION == "relu":
        slope = tl.where(pre > 0, 1.0, 0.0).to(pre.dtype)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(pre)
        slope = s * (1 + pre * (1 - s))
    elif ACTIVATION == "tanh":
        h = 2 * tl.sigmoid(2 * pre) - 1
        slope = 1 - h * h
    else:
        density = ONE_BY_SQRT_2_PI * tl.exp(-0.5 * pre * pre)
        slope = 0.5 * (1 + tl.erf(pre * ONE_BY_SQRT_2)) + pre * density
    return slope


@triton.jit
def weight_tile(weight_ptr, i, o, n_in, n_out, row_stride):
    """W' [IN, OUT] of a layer from row weight_ptr on: its inputs i (int32 [IN]) and outputs o (int32 [OUT])."""
    inside = (i < n_in)[:, None] & (o < n_out)[None, :]
    return tl.load(weight_ptr + (o[None, :] * row_stride + i[:, None]), mask=inside, other=0.0)


@triton.jit
def dense(h, transposed, bias, PRECISION: tl.constexpr):
    """h W' + b: [R, IN], [IN, OUT], [OUT] -> [R, OUT]."""
    return tl.dot(h, transposed, input_precision=PRECISION) + bias[None, :]


@triton.jit
def saved_inputs(saved_at, i, n_in, activated, ACTIVATION: tl.constexpr):
    """Inputs i (int32 [IN]) of a layer [R, IN], from what was saved: z, or what the layer before gave to f."""
    saved = tl.load(saved_at + i[None, :], mask=i[None, :] < n_in, other=0.0)
    return tl.where(activated, activate(saved, ACTIVATION), saved)


@triton.jit
def add_to(ptr, value, inside, first):
    """ptr += value, or ptr = value at the first time."""
    so_far = tl.load(ptr, mask=inside & (not first), other=0.0)
    tl.store(ptr, so_far + value, mask=inside)


@triton.jit
def add_weight_gradient(
    grad_ptr, dy, o, n_out, saved_at, n_in, activated, row_stride, first,  # [OUT, IN]; dy [R, OUT]
    CHUNK: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d W += dy' h with the saved inputs h.

    By chunks of the inputs: products in one region of the code share a layout, and this one is tall where others are
    wide.
    """
    for start in range(0, n_in, CHUNK):
        i = start + tl.arange(0, CHUNK)
        h = saved_inputs(saved_at, i, n_in, activated, ACTIVATION)
        inside = (o < n_out)[:, None] & (i < n_in)[None, :]
        at = grad_ptr + (o[:, None] * row_stride + i[None, :])
        add_to(at, tl.dot(tl.trans(dy), h, input_precision=PRECISION), inside, first)
