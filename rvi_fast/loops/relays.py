"""Relays on a CPU: selection and the sample of z, with their gradients (reference.selected, gaussian_sample)."""

from __future__ import annotations

import numpy as np

from .jit import compiled
from .memory import copy


@compiled
def select(part, coef, groups, active, guesses, weight, kept):
    """kept [B, K]: the |B| largest of each group by absolute value, ties to the lower index; weight: coef there, in its
    first K columns. part: number, begin and end of the rows to do it for.

    All are integers: coef [B, C] begins with the bits of the coefficients, which without the sign order absolute
    values; weight takes bits; kept has all bits where a coefficient is kept, or none. guesses: int64 [B, G], where to
    look for the groups' thresholds first, which are left there.
    """
    _, begin, end = part
    sign = np.iinfo(coef.dtype).max
    strides = np.zeros(len(groups), np.int64)
    scratch = np.empty(kept.shape[1], coef.dtype)
    for b in range(begin, end):
        start = 0
        for g in range(len(groups)):
            stop, magnitude = start + groups[g], scratch[start : start + groups[g]]
            without_sign(coef[b, start:stop], sign, magnitude)
            threshold, extra, strides[g] = threshold_of(magnitude, active[g], guesses[b, g], strides[g])
            guesses[b, g] = threshold
            reach(magnitude, threshold, kept[b, start:stop])
            if extra:
                drop_ties(magnitude, threshold, extra, kept[b, start:stop])
            start = stop
        only(coef[b, :start], kept[b], weight[b, :start])


@compiled
def without_sign(bits, sign, magnitude):
    for k in range(len(bits)):
        magnitude[k] = bits[k] & sign


@compiled
def reach(magnitude, threshold, kept):
    threshold, all_bits, none = kept.dtype.type(threshold), kept.dtype.type(-1), kept.dtype.type(0)
    for k in range(len(kept)):
        kept[k] = all_bits if magnitude[k] >= threshold else none


@compiled
def only(bits, kept, out):
    for k in range(len(kept)):
        out[k] = bits[k] & kept[k]


@compiled
def threshold_of(magnitude, active, guess, stride):
    """t so that `active` of magnitude [K] are at least t, and 0; in a tie the |B|-th value, and how many too many.

    Any t between the |B|-th value and the next will do, so it is sought by counting: from `guess` by `stride` for each
    that is counted too many or too few, then between what lies on either side. Returns the stride that would have been
    right, too.
    """
    size = len(magnitude)
    if active == size:
        return 0, 0, stride
    low, high, of_low, of_high = 0, largest(magnitude) + 1, size, 0
    at, turn = min(max(guess, 1), high - 1), 0
    stride = max(stride, (high >> 12) + 1)
    while high - low > 1:
        count = at_least(magnitude, at)
        if count == active:
            return at, 0, stride
        if count > active:
            low, of_low = at, count
        else:
            high, of_high = at, count
        turn += 1
        if (turn > 8 and turn % 2) or turn > 16:
            at = low + (high - low) // 2
        elif of_low == size or of_high == 0:
            at += (count - active) * stride
        else:
            stride = np.int64((high - low) * (1.0 / (of_low - of_high))) + 1
            at = low + (of_low - active) * stride
        at = min(max(at, low + 1), high - 1)
    return low, of_low - active, stride


@compiled
def largest(magnitude):
    most = magnitude[0]
    for k in range(1, len(magnitude)):
        most = max(most, magnitude[k])
    return np.int64(most)


@compiled
def at_least(magnitude, threshold):
    """How many of [K] reach the threshold."""
    count, threshold = np.int32(0), magnitude.dtype.type(threshold)
    for k in range(len(magnitude)):
        count += np.int32(magnitude[k] >= threshold)
    return count


@compiled
def drop_ties(magnitude, least, extra, kept):
    for k in range(len(kept) - 1, -1, -1):
        if extra and magnitude[k] == least:
            kept[k] = 0
            extra -= 1


@compiled
def sample(mean, rows, sigma, radius, cosine, sine, spread, after, first, kl):
    """spread [B, T] = sigma * noise, of noise by Box-Muller, and z = mean + spread; kl [B]: KL(q || N(0, I)).

    radius, cosine, sine: [B, P], of pairs of latents; log_std stands at the end of rows [B, C], sigma is its exp. The
    mean is that of the first T columns; z goes to the columns of `after` from the `first` on.
    """
    half, latents = mean.dtype.type(0.5), sigma.shape[1]
    for b in range(len(rows)):
        log_std, of_row = rows[b, rows.shape[1] - latents :], mean[b, :latents]
        for t in range(latents):
            noise = radius[b, t // 2] * (sine[b, t // 2] if t & 1 else cosine[b, t // 2])
            spread[b, t] = sigma[b, t] * noise
        add(of_row, spread[b], after[b, first : first + latents])
        kl[b] = half * (squares(of_row, sigma[b]) - latents) - sum_of(log_std)


@compiled
def add(a, b, out):
    for i in range(len(out)):
        out[i] = a[i] + b[i]


@compiled
def squares(a, b):
    total = a.dtype.type(0)
    for i in range(len(a)):
        total += a[i] * a[i] + b[i] * b[i]
    return total


@compiled
def sum_of(a):
    total = a.dtype.type(0)
    for i in range(len(a)):
        total += a[i]
    return total


@compiled
def sample_gradients(by_after, first, mean, sigma, spread, weight, by_mean, grad):
    """Gradients of nll + weight * KL by mean and log_std [B, T], the end of grad [B, C], and that by the mean apart;
    from that of nll by z, which stands in by_after as z does in `sample`."""
    weight, latents, width = mean.dtype.type(weight), sigma.shape[1], grad.shape[1]
    for b in range(len(sigma)):
        by_z, by_log_std = by_after[b, first : first + latents], grad[b, width - latents :]
        of_mean(by_z, mean[b, :latents], weight, by_mean[b, :latents])
        copy(by_mean[b, :latents], grad[b, width - 2 * latents : width - latents])
        of_log_std(by_z, spread[b], sigma[b], weight, by_log_std)


@compiled
def of_mean(by_z, mean, weight, out):
    for t in range(len(out)):
        out[t] = by_z[t] + weight * mean[t]


@compiled
def of_log_std(by_z, spread, sigma, weight, out):
    for t in range(len(out)):
        out[t] = by_z[t] * spread[t] + (weight * (sigma[t] * sigma[t]) - weight)


@compiled
def keep(by_coef, kept, grad):
    """Only selected coefficients have a gradient: of the bits of by_coef, those of kept [B, K] begin grad [B, C]."""
    relays = kept.shape[1]
    for b in range(len(kept)):
        only(by_coef[b, :relays], kept[b], grad[b, :relays])
