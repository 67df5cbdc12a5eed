"""A batch's rows on a CPU: to what the decoder says of them, and back; then the step of what they share."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import adam
from .decoder import by_weight, decode, decoder_gradient
from .exponential import exp
from .jit import compiled
from .memory import copy
from .products import multiply_columns
from .relays import keep, sample, sample_gradients, select
from .threads import share


class Batch(NamedTuple):
    """Arrays of B rows. Bits are integers in the same memory.

    Where a size has a star, a row takes whole lines of memory: BLAS may give a row other bits if it begins elsewhere in
    a line.
    """

    p: np.ndarray  # [B, C]: coefficients, residual, log_std
    p_bits: np.ndarray
    groups: np.ndarray  # int64 [G], of relays
    active: np.ndarray  # int64 [G]
    guesses: np.ndarray  # int64 [B, G], as of `select`
    weight: np.ndarray  # [B, K*]: selected coefficients
    weight_bits: np.ndarray
    kept: np.ndarray  # [B, K], as of `select`
    mean: np.ndarray  # [B, T*]
    sigma: np.ndarray  # [B, T]
    radius: np.ndarray  # [B, P], as the next two, of noise: see `sample`
    cosine: np.ndarray
    sine: np.ndarray
    spread: np.ndarray  # [B, T]
    kl: np.ndarray  # [B]
    before: np.ndarray  # [B, H*], and after [B, (H + T)*]: see `decode`
    after: np.ndarray
    xhat: np.ndarray  # [B, D*], and then the gradient by it
    by_after: np.ndarray  # gradients by other arrays, each as large as that
    by_mean: np.ndarray
    by_coef: np.ndarray
    by_coef_bits: np.ndarray
    grad: np.ndarray  # [B, C], by p
    grad_bits: np.ndarray


@compiled
def forward(threads, batch, weights):
    """z, kl and xhat of p and of the noise."""
    share(forward_part, threads, len(batch.p), (batch, weights))


@compiled
def forward_part(part, batch, weights):
    _, begin, end = part
    (relays, latents), (first, _) = weights.shapes[0], weights.inputs[1]
    select(part, batch.p_bits, batch.groups, batch.active, batch.guesses, batch.weight_bits, batch.kept)
    p, mean, sigma, after = batch.p[begin:end], batch.mean[begin:end], batch.sigma[begin:end], batch.after[begin:end]
    for b in range(len(p)):
        copy(p[b, relays : relays + latents], mean[b, :latents])
        exp(1, p[b, relays + latents :], sigma[b])
    by_weight(weights, 0, False, batch.weight[begin:end, :relays], mean[:, :latents])
    noise = batch.radius[begin:end], batch.cosine[begin:end], batch.sine[begin:end]
    sample(mean, p, sigma, *noise, batch.spread[begin:end], after, first, batch.kl[begin:end])
    decode(weights, batch.before[begin:end], after, batch.xhat[begin:end])


@compiled
def backward(threads, batch, weights, kl_weight):
    """grad by p of a loss, of which `xhat` has the gradient, plus kl_weight * kl."""
    share(backward_part, threads, len(batch.p), (batch, weights, kl_weight))


@compiled
def backward_part(part, batch, weights, kl_weight):
    _, begin, end = part
    (relays, latents), (first, _) = weights.shapes[0], weights.inputs[1]
    by_after, by_mean, by_coef = batch.by_after[begin:end], batch.by_mean[begin:end], batch.by_coef[begin:end]
    decoder_gradient(weights, batch.xhat[begin:end], batch.before[begin:end], batch.after[begin:end], by_after)
    sampled = batch.mean[begin:end], batch.sigma[begin:end], batch.spread[begin:end]
    sample_gradients(by_after, first, *sampled, kl_weight, by_mean, batch.grad[begin:end])
    by_coef[:] = 0
    by_weight(weights, 0, True, by_mean[:, :latents], by_coef[:, :relays])
    keep(batch.by_coef_bits[begin:end], batch.kept[begin:end], batch.grad_bits[begin:end])


@compiled
def step_shared(threads, batch, weights, moving, grad, factors, factors_of_rest):
    """Adam's step of moving [3, P]: p, m and v of relays, decoder and the rest, after `backward`. grad [P] holds the
    gradients of the last bias and of the rest, and takes the others."""
    share(shared_part, threads, len(grad), (batch, weights, moving, grad, factors, factors_of_rest))


@compiled
def shared_part(part, batch, weights, moving, grad, factors, factors_of_rest):
    """A thread's relays, units of each layer, and its part of the rest."""
    (relays, latents), last = weights.shapes[0], len(weights.shapes) - 1
    begin, end = span(part, grad, relays)
    by_mean = batch.by_mean[:, :latents]
    step_weight(begin, end, weights, 0, batch.weight[:, begin:end], by_mean, moving, grad, factors)
    for layer in range(1, last + 1):
        left, right = weights.inputs[layer]
        start, n_out = weights.outputs[layer, 0], weights.shapes[layer, 0]
        begin, end = span(part, grad, n_out)
        by_out = (batch.by_after if layer < last else batch.xhat)[:, start + begin : start + end]
        step_weight(begin, end, weights, layer, by_out, batch.after[:, left:right], moving, grad, factors)
        first = weights.starts[layer] + n_out * weights.shapes[layer, 1]  # of the biases
        if layer < last:
            column_sums(by_out, grad[first + begin : first + end])
        step_span(first + begin, first + end, moving, grad, factors)
    rest = first + n_out
    begin, end = span(part, grad, len(grad) - rest)
    step_span(rest + begin, rest + end, moving, grad, factors_of_rest)


@compiled
def span(part, grad, units):
    """Where a thread's units begin and end."""
    _, begin, end = part
    return units * begin // len(grad), units * end // len(grad)


@compiled
def step_weight(begin, end, weights, number, by_out, inputs, moving, grad, factors):
    """The step of rows begin .. end of a matrix, whose gradient is by_out.T @ inputs."""
    n_in = weights.shapes[number, 1]
    start, stop = weights.starts[number] + begin * n_in, weights.starts[number] + end * n_in
    multiply_columns(weights.blas, by_out, inputs, grad[start:stop].reshape((end - begin, n_in)))
    step_span(start, stop, moving, grad, factors)


@compiled
def step_span(start, stop, moving, grad, factors):
    p, m, v = moving[0, start:stop], moving[1, start:stop], moving[2, start:stop]
    adam.step(p, m, v, grad[start:stop], *factors)


@compiled
def column_sums(a, out):
    out[:] = 0
    for b in range(len(a)):
        for i in range(len(out)):
            out[i] += a[b, i]
