"""Rows through an MLP decoder and back, on a CPU (reference.mlp_decoder).

What a row's layers give lies side by side, z last: [h1 | h2 | ... | z], so that a linear path has its inputs together.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .exponential import exp
from .jit import compiled
from .memory import LINE, copy
from .products import multiply, pack, packed_size

ACTIVATIONS = ("relu", "silu", "tanh", "gelu")
RELU, SILU, TANH, GELU = range(len(ACTIVATIONS))
ROOT_HALF, DENSITY = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)  # of the normal at 0


class Weights(NamedTuple):
    """Relays and a decoder of L layers, and how products by them are made."""

    values: np.ndarray  # [P], as of ElboModel.shared_shapes
    shapes: np.ndarray  # int64 [1 + L, 2]: of the relays and of each layer's weight
    starts: np.ndarray  # int64 [1 + L]: where these begin in `values`; a layer's bias follows its weight
    inputs: np.ndarray  # int64 [1 + L, 2]: which columns of `after` a layer takes
    outputs: np.ndarray  # int64 [1 + L, 2]: which columns of `before` it gives; of xhat, the last one
    activation: int  # in ACTIVATIONS
    blas: bool
    block: int  # as of `multiply`
    packed: np.ndarray  # as of `pack`: each for products by it, and by its transpose
    places: np.ndarray  # int64 [3 + 2 L]: where these begin in `packed`, and it ends


@compiled
def decode(weights, before, after, xhat):
    """xhat of z, which stands in `after` where the first layer's inputs are, beside the hidden layers; these without
    their activation are `before`. All of these [B, ..] may be wider than what they hold."""
    last = len(weights.shapes) - 1
    for layer in range(1, last):
        start, stop = weights.outputs[layer]
        affine(weights, layer, after, before)
        for b in range(len(before)):
            activate(weights.activation, before[b, start:stop], after[b, start:stop])
    affine(weights, last, after, xhat)


@compiled
def affine(weights, layer, after, out):
    """A layer's columns of `out`."""
    left, right = weights.inputs[layer]
    start, stop = weights.outputs[layer]
    of_layer = bias(weights, layer)
    for b in range(len(out)):
        copy(of_layer, out[b, start:stop])
    by_weight(weights, layer, False, after[:, left:right], out[:, start:stop])


@compiled
def decoder_gradient(weights, by_xhat, before, after, by_after):
    """by_after of by_xhat: in the columns of z the gradient by it, in those of hidden layers that by `before`."""
    last = len(weights.shapes) - 1
    by_after[:] = 0
    back(weights, last, by_xhat, by_after)
    scratch = np.empty(before.shape[1], before.dtype)
    for layer in range(last - 1, 0, -1):
        start, stop = weights.outputs[layer]
        for b in range(len(before)):
            a, h, by_a = before[b, start:stop], after[b, start:stop], by_after[b, start:stop]
            differentiate(weights.activation, a, h, scratch[start:stop], by_a)
        back(weights, layer, by_after, by_after)


@compiled
def back(weights, layer, by_out, by_after):
    left, right = weights.inputs[layer]
    start, stop = weights.outputs[layer]
    by_weight(weights, layer, True, by_out[:, start:stop], by_after[:, left:right])


@compiled
def by_weight(weights, number, transposed, a, out):
    """out += a @ W.T of a layer's weight, a @ W of relays; or, transposed, the other way round."""
    piece = 2 * number + transposed
    packed = weights.packed[weights.places[piece] : weights.places[piece + 1]]
    multiply(weights.blas, weights.block, a, matrix(weights, number), transposed != (number > 0), packed, out)


@compiled
def matrix(weights, number):
    """A layer's weight [n_out, n_in]; number 0: relays [K, T]."""
    shape, start = (weights.shapes[number, 0], weights.shapes[number, 1]), weights.starts[number]
    return weights.values[start : start + shape[0] * shape[1]].reshape(shape)


@compiled
def bias(weights, layer):
    n_out, n_in = weights.shapes[layer]
    start = weights.starts[layer] + n_out * n_in
    return weights.values[start : start + n_out]


@compiled
def activate(kind, a, h):
    """h of a [n]."""
    number = a.dtype.type
    if kind == RELU:
        for i in range(len(a)):
            h[i] = number(0) if a[i] <= 0 else a[i]
    elif kind == SILU:
        exp(-1, a, h)
        for i in range(len(a)):
            h[i] = a[i] / (number(1) + h[i])
    elif kind == TANH:
        for i in range(len(a)):
            h[i] = math.tanh(a[i])
    else:
        for i in range(len(a)):
            h[i] = a[i] * normal_cdf(a[i])


@compiled
def differentiate(kind, a, h, scratch, grad):
    """grad [n] by h becomes that by a; scratch [n]."""
    number = a.dtype.type
    if kind == RELU:
        for i in range(len(a)):
            grad[i] = grad[i] if h[i] > 0 else number(0)
    elif kind == SILU:
        exp(-1, a, scratch)
        for i in range(len(a)):
            sigmoid = number(1) / (number(1) + scratch[i])
            grad[i] *= sigmoid * (number(1) + a[i] * (number(1) - sigmoid))
    elif kind == TANH:
        for i in range(len(a)):
            grad[i] *= number(1) - h[i] * h[i]
    else:
        for i in range(len(a)):
            grad[i] *= normal_cdf(a[i]) + a[i] * number(DENSITY) * math.exp(-number(0.5) * a[i] * a[i])


@compiled
def normal_cdf(a):
    return 0.5 + 0.5 * math.erf(a * ROOT_HALF)


def packed(weights: Weights) -> Weights:
    """The same, float32, in the order that BLAS reads them in, which it would otherwise make for every block."""
    pieces = [
        (matrix(weights, number), transposed != (number > 0))
        for number in range(len(weights.shapes))
        for transposed in (False, True)
    ]
    sizes = [packed_size(weights.block, *piece) if piece[0].size else 0 for piece in pieces]
    places = np.cumsum([0, *sizes])
    room = np.empty(places[-1] + LINE, np.float32)
    aligned = room[-room.ctypes.data % LINE // room.itemsize :]
    for piece, start, stop in zip(pieces, places, places[1:], strict=False):
        if stop > start:
            pack(weights.block, *piece, aligned[start:stop])
    return weights._replace(packed=aligned, places=places)
