"""The equations of Relay Variational Inference in plain PyTorch: the specification that every kernel is tested against.

Equation numbers are those of docs/math.md. Everything works in float32 and float64 and is differentiable by autograd
where a gradient makes sense. Nothing here checks its input; `ops` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)

STREAMS = {"train": 0, "infer": 1, "impute": 2, "init": 3, "permutation": 4}

PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


# --- noise: a pure function of (seed, stream, step, row id, latent index) ---


def philox(key: tuple[int, int], counter: Sequence[Tensor | int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10. key: two 32-bit words; counter: four int64 tensors (or ints) of 32-bit words that broadcast.

    Returns four int64 tensors of 32-bit words. int64 products wrap, which leaves all 64 bits of a 32 x 32 product
    right.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c) for c in _on_one_device(counter)))
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & WORD) ^ c1 ^ k0, p1 & WORD, (p0 >> 32 & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = k0 + PHILOX_WEYL[0] & WORD, k1 + PHILOX_WEYL[1] & WORD
    return c0, c1, c2, c3


def _on_one_device(counter: Sequence[Tensor | int]) -> list[Tensor | int]:
    device = next(c.device for c in counter if isinstance(c, Tensor))
    return [c if isinstance(c, Tensor) else torch.tensor(c, device=device) for c in counter]


def philox_words(seed: int, stream: str, step: Tensor | int, row_ids: Tensor, blocks: int, draw: int = 0) -> Tensor:
    """Random 32-bit words: row_ids int64 [B] -> int64 [B, blocks, 4]."""
    latent_block = torch.arange(blocks, device=row_ids.device)
    low, high = row_ids[:, None] & WORD, row_ids[:, None] >> 32 & WORD
    key = (seed & WORD, seed >> 32 & WORD)
    c3 = latent_block | draw << 12 | STREAMS[stream] << 28
    return torch.stack(philox(key, (low, high, step & WORD, c3)), dim=2)


def philox_normal(
    seed: int,
    stream: str,
    step: Tensor | int,
    row_ids: Tensor,
    dim: int,
    draw: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals by Box-Muller from Philox words: row_ids int64 [B] -> [B, dim]."""
    words = philox_words(seed, stream, step, row_ids, blocks=-(-dim // 4), draw=draw)
    uniform = ((words.float() + 0.5) * 2.0**-32).to(dtype)
    radius = torch.sqrt(-2.0 * torch.log(uniform[..., 0::2]))
    angle = 2 * math.pi * uniform[..., 1::2]
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=3)  # [B, blocks, 2, 2]
    return pairs.flatten(1)[:, :dim]


def permutation(seed: int, epoch: int, n: int, block: int = 1 << 16, draw: int = 0) -> Tensor:
    """The order of n rows in an epoch: int64 [n] on the CPU, the rows sorted by a keyed 63-bit word."""
    order_key = torch.empty(n, dtype=torch.int64)
    for start in range(0, n, block):
        rows = torch.arange(start, min(start + block, n))
        words = philox_words(seed, "permutation", epoch, rows, blocks=1, draw=draw)[:, 0]
        order_key[start : start + block] = words[:, 0] << 31 | words[:, 1] >> 1
    return torch.argsort(order_key, stable=True)


def block_permutation(seed: int, epoch: int, n: int, block_rows: int, buffer_blocks: int) -> Tensor:
    """The order of n rows that are read in blocks of R consecutive rows, G of them shuffled together: int64 [n].

    The blocks 0 .. ceil(n / R) - 1 are permuted too, with rank(j) the place of block j. Row i is read into buffer
    b(i) = floor(rank(floor(i / R)) / G), and the order is that of `permutation`, sorted by b: with a single buffer it
    is `permutation` itself.
    """
    blocks = permutation(seed, epoch, -(-n // block_rows), draw=1)
    buffer = torch.empty_like(blocks)
    buffer[blocks] = torch.arange(len(blocks)) // buffer_blocks
    order = permutation(seed, epoch, n)
    return order[torch.argsort(buffer[order // block_rows], stable=True)]


# --- the approximate posterior ---


def select(coef: Tensor, active: int) -> Tensor:
    """B_i: the `active` coefficients that are largest in absolute value, ties to the lower index (eq. 5).

    coef: [B, K]. Returns bool [B, K].
    """
    largest = torch.sort(coef.detach().abs(), dim=1, descending=True, stable=True).indices[:, :active]
    return torch.zeros_like(coef, dtype=torch.bool).scatter_(1, largest, True)


def relay_weights(coef: Tensor, groups: Sequence[int], active: Sequence[int], coefficients: str = "linear") -> Tensor:
    """a_i on B_i and 0 elsewhere, group by group; "softmax" (the mixture form) normalises a group before selection.

    coef: [B, K_total]. Returns [B, K_total]; gradient reaches selected weights only.
    """
    kept = []
    for a, n_active in zip(coef.split(list(groups), dim=1), active, strict=True):
        weight = a.softmax(1) if coefficients == "softmax" else a
        kept.append(weight * select(weight, n_active))
    return torch.cat(kept, dim=1)


def selected(coef: Tensor, groups: Sequence[int], active: Sequence[int]) -> Tensor:
    """B_i of every group: coef [B, K_total] -> bool [B, K_total]."""
    per_group = zip(coef.split(list(groups), dim=1), active, strict=True)
    return torch.cat([select(a, n_active) for a, n_active in per_group], dim=1)


def selected_bits(coef: Tensor, groups: Sequence[int], active: Sequence[int]) -> Tensor:
    """The same as bits, the lowest first, every group from a byte of its own: uint8 [B, bytes]."""
    packed = []
    for kept in selected(coef, groups, active).split(list(groups), dim=1):
        eights = torch.nn.functional.pad(kept, (0, -kept.shape[1] % 8)).unflatten(1, (-1, 8))
        packed.append((eights << torch.arange(8, device=coef.device)).sum(2))
    return torch.cat(packed, dim=1).to(torch.uint8)


def relay_mean(
    coef: Tensor, relays: Tensor, groups: Sequence[int], active: Sequence[int], coefficients: str = "linear"
) -> Tensor:
    """mu_i^R = sum over groups g, over k in B_i^g, of a_ik r_k (eq. 4).

    coef: [B, K_total]; relays: [K_total, T]; groups sum to K_total. Returns [B, T].
    """
    return relay_weights(coef, groups, active, coefficients) @ relays


def gaussian_sample(mean: Tensor, log_std: Tensor, noise: Tensor) -> Tensor:
    """z = mu + sigma * lambda (eq. 6). All [B, T]."""
    return mean + log_std.exp() * noise


def gaussian_kl(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, I)), summed over latents (eq. 2, second term). [B, T], [B, T] -> [B]."""
    return (0.5 * (mean * mean + (2 * log_std).exp() - 1.0) - log_std).sum(1)


# --- the decoder ---

ACTIVATIONS = {
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
    "gelu": torch.nn.functional.gelu,
}


def mlp_decoder(z: Tensor, layers: Sequence[tuple[Tensor, Tensor]], activation: str, linear_path: bool) -> Tensor:
    """z [B, T] -> xhat [B, D]. layers: weight [OUT, IN] and bias [OUT] of each, the head last.

    With a linear path the head sees the last hidden layer's outputs and z beside them.
    """
    h = z
    for weight, bias in layers[:-1]:
        h = ACTIVATIONS[activation](h @ weight.T + bias)
    weight, bias = layers[-1]
    return (torch.cat((h, z), dim=1) if linear_path else h) @ weight.T + bias


class SampleGradients(NamedTuple):
    """Of the inputs of a sample and its KL; that of the residual is the mean's."""

    coef: Tensor
    mean: Tensor
    log_std: Tensor
    relays: Tensor
    noise: Tensor


def relay_sample_gradients(
    by_z: Tensor,
    by_kl: Tensor,
    coef: Tensor,
    mean: Tensor,
    log_std: Tensor,
    relays: Tensor,
    noise: Tensor,
    groups: Sequence[int],
    active: Sequence[int],
) -> SampleGradients:
    """Gradients of sum(by_z z) + sum(by_kl KL), by_z [B, T], by_kl [B], by the rules of eqs. 2 to 6."""
    sigma, by_kl = log_std.exp(), by_kl[:, None]
    by_mean = by_z + by_kl * mean
    kept = selected(coef, groups, active)
    return SampleGradients(
        coef=kept * (by_mean @ relays.T),
        mean=by_mean,
        log_std=by_z * sigma * noise + by_kl * (sigma * sigma - 1.0),
        relays=(kept * coef).T @ by_mean,
        noise=by_z * sigma,
    )


# --- likelihoods of the observed entries ---


INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes


def without_holes(x: Tensor, mask: Tensor) -> Tensor:
    """x with 0 in its holes, whatever stood there. On a CPU torch.where takes five times as long as its bits do."""
    if x.requires_grad or x.device.type != "cpu":
        return torch.where(mask, x, 0.0)
    bits = INTEGERS[x.itemsize]
    return (x.view(bits) & -mask.to(bits)).view(x.dtype)


def masked_gaussian_nll(xhat: Tensor, x: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
    """Negative log-likelihood of the observed entries under N(xhat, scale^2), summed over columns (eq. 2, first term).

    xhat, x: [B, D]; mask: [B, D] bool, True = observed; scale: [D] or [], > 0. Returns [B].
    """
    m = mask.to(xhat.dtype)
    r = m * (without_holes(x, mask) - xhat) / scale
    return 0.5 * (r * r).sum(1) + (m * (scale.log() + HALF_LOG_2PI)).sum(1)


def masked_bernoulli_nll(logits: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood of the observed entries under Bernoulli(sigmoid(logits)); x in [0, 1].

    logits, x: [B, D]; mask: [B, D] bool, True = observed. Returns [B].
    """
    nll = torch.logaddexp(logits, torch.zeros_like(logits)) - logits * without_holes(x, mask)  # log(1 + e^l) - l x
    return (mask * nll).sum(1)


def linear_masked_gaussian_nll(
    h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, mask: Tensor, scale: Tensor
) -> Tensor:
    """masked_gaussian_nll of xhat = h W' + b. h: [B, H]; weight: [D, H]; bias: [D]. Returns [B]."""
    return masked_gaussian_nll(torch.nn.functional.linear(h, weight, bias), x, mask, scale)


# --- the loss of rows, given all that they share ---


def row_losses(
    p: Tensor,
    noise: Tensor,
    x: Tensor,
    mask: Tensor,
    relays: Tensor,
    layers: Sequence[tuple[Tensor, Tensor]],
    scale: Tensor,
    groups: Sequence[int],
    active: Sequence[int],
    activation: str,
    linear_path: bool,
    likelihood: str,
) -> tuple[Tensor, Tensor]:
    """-log p(x_observed | z) and KL(q || N(0, I)) of rows (eqs. 2 to 6), [B] each.

    p [B, K + 2 T]: coefficients, residual and log_std; noise [B, T]; relays [K, T], of no groups where a row's residual
    is its mean; layers: as of mlp_decoder; scale: of likelihood "gaussian", not of "bernoulli".
    """
    num_relays, latent_dim = relays.shape
    coef, mean, log_std = p.split([num_relays, latent_dim, latent_dim], dim=1)
    if groups:
        mean = mean + relay_mean(coef, relays, groups, active)
    xhat = mlp_decoder(gaussian_sample(mean, log_std, noise), layers, activation, linear_path)
    if likelihood == "bernoulli":
        nll = masked_bernoulli_nll(xhat, x, mask)
    else:
        nll = masked_gaussian_nll(xhat, x, mask, scale)
    return nll, gaussian_kl(mean, log_std)


# --- Adam over rows: one step, and the closed form of the steps that a row missed (docs/math.md) ---


class AdamHyper(NamedTuple):
    """Adam's decay rates and epsilon."""

    beta1: float
    beta2: float
    eps: float

    def bias_corrections(self, u: Tensor | int | float) -> tuple[Tensor, Tensor]:
        """1 - beta^u for both betas, as float64 without cancellation. u: step numbers >= 1."""
        u = torch.as_tensor(u, dtype=torch.float64)
        return -torch.expm1(u * _log(self.beta1)), -torch.expm1(u * _log(self.beta2))

    def bias_corrections_at(self, u: int) -> tuple[float, float]:
        """The same for one step number that the host knows."""
        return -math.expm1(u * _log(self.beta1)), -math.expm1(u * _log(self.beta2))

    def window(self) -> int | None:
        """Steps after which a row's momentum no longer moves it (relative 1e-16); None where it does not die out."""
        rho = self.beta1 / math.sqrt(self.beta2) if self.beta2 > 0 else math.inf
        if rho == 0:
            return 0
        return math.ceil(math.log(1e-16 * (1 - rho)) / math.log(rho)) if rho < 1 else None

    def logs(self) -> tuple[float, float]:
        """The logarithms of both betas; -inf for 0."""
        return _log(self.beta1), _log(self.beta2)

    def closed_form(self) -> bool:
        """Whether two Gauss nodes are exact enough; else every missed step is summed."""
        return self.beta1 < self.beta2**2


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def adamw_step(
    p: Tensor,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    u: Tensor | int,
    lr: float,
    hyper: AdamHyper,
    weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW's step number u (an int, or float64 [B]: one per row) of rows p, m, v, grad [B, C]. Returns new p, m, v."""
    bc1, bc2 = hyper.bias_corrections(u)
    size, root = _per_row(lr / bc1, p), _per_row(bc2.sqrt(), p)
    m = torch.lerp(m, grad, 1 - hyper.beta1)
    v = torch.lerp(v, grad * grad, 1 - hyper.beta2)  # b2 v + (1 - b2) g^2 would round b2 to float32 at every step
    return p * (1 - lr * weight_decay) - size * m / (v.sqrt() / root + hyper.eps), m, v


def skipped_weights(hyper: AdamHyper, age: Tensor) -> Tensor:
    """b1^j / b2^(j (i+1) / 2) for i in 0..3: what the moments of a step keep after j = `age` steps. [W] -> [4, W]."""
    half_orders = 0.5 * torch.arange(1, 5, dtype=torch.float64, device=age.device)
    return torch.exp(age * (_log(hyper.beta1) - half_orders[:, None] * _log(hyper.beta2)))


class Missed(NamedTuple):
    """All that a row needs to be brought up to date: two Gauss nodes and three decays, float64 [B] each."""

    weight1: Tensor
    node1: Tensor
    weight2: Tensor
    node2: Tensor
    decay: Tensor
    decay_m: Tensor
    decay_v: Tensor


def gauss_nodes(f: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two-node Gauss rule (w1, e1, w2, e2) of the measure with moments F0..F3. f: float64 [4, B]."""
    f0 = torch.where(f[0] > 0, f[0], 1.0)
    a, second, third = f[1] / f0, f[2] / f0, f[3] / f0
    var = second - a * a
    skew = third - 3 * a * second + 2 * a**3
    one = (var <= 1e-12 * a * a) | (f[0] <= 0)
    h = skew / (2 * torch.where(one, 1.0, var))
    r = torch.sqrt(h * h + torch.where(one, 1.0, var))
    w1 = torch.where(one, f[0], f[0] * (h + r) / (2 * r))
    return w1, torch.where(one, a, a + h - r), f[0] - w1, torch.where(one, a, a + h + r)


def least_root(dtype: torch.dtype) -> float:
    """Below the square root of any number above 0, and its inverse is finite."""
    return min(torch.finfo(dtype).tiny ** 0.75, 1e-4)


def catch_up(p: Tensor, m: Tensor, v: Tensor, missed: Missed, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows p, m, v [B, C] as dense AdamW would have left them after the missed steps, all with zero gradient."""
    w1, e1, w2, e2, decay, decay_m, decay_v = (_per_row(c, p) for c in missed)
    root = v.sqrt()
    least = least_root(p.dtype)  # only where nothing was missed, or moved, is there a 0
    moved = w1 / (root + eps * e1).clamp_min(least) + w2 / (root + eps * e2).clamp_min(least)
    return (p - m * moved) * decay, m * decay_m, v * decay_v


def missed_steps(age: Tensor, step: Tensor, lr: Tensor, regrow: Tensor, hyper: AdamHyper) -> tuple[Tensor, Tensor]:
    """What every single missed step needs, where two nodes are not enough: gradients that meet eps.

    age: [J], steps since the row was touched; step, lr, regrow: float64 [B, J], the step's number, its learning rate (0
    where the row missed fewer steps) and exp(logD[touched] - logD[step]). Returns weight and shrink, float64 [B, J].
    """
    bc1, bc2 = hyper.bias_corrections(step)
    return lr * regrow * hyper.beta1**age / bc1, torch.sqrt(hyper.beta2**age / bc2)


def missed_displacement(m: Tensor, v: Tensor, weight: Tensor, shrink: Tensor, eps: float) -> Tensor:
    """The displacement, float64 [E], of entries m, v [E], summed over the steps they missed. weight, shrink: [E, J]."""
    m, root = m.double()[:, None], v.double().sqrt()[:, None]
    return (weight * m / (root * shrink + eps)).sum(1)


def _per_row(value: Tensor, like: Tensor) -> Tensor:
    """float64 scalars, [] or [B], as a factor of `like` [B, C]: powers are taken in float64 and cast only here."""
    return value.to(like.dtype)[..., None] if value.ndim else value.to(like.dtype)


# --- the posterior predictive: draws of z ~ q, weighted by how much more the model believes in them ---


class PredictiveMoments(NamedTuple):
    """Of each cell, over draws of z [B, D]; and what the draws are worth [B]."""

    mean: Tensor  # E[f(z)]
    variance: Tensor  # Var[f(z)]
    noise: Tensor  # E[Var(x | z)]
    ess: Tensor  # effective number of draws
    log_mean_weight: Tensor  # log (1/L) sum of w_l: a lower bound of log p(x_observed), in expectation


def log_importance_weight(nll: Tensor, z: Tensor, log_std: Tensor, noise: Tensor) -> Tensor:
    """log w = log p(x_observed | z) + log p(z) - log q(z) of z = mu + sigma * noise (eq. 21).

    nll [B]: -log p(x_observed | z); z, log_std, noise: [B, T]. Returns [B].
    """
    return (0.5 * (noise * noise - z * z) + log_std).sum(1) - nll


def predictive_moments(f: Tensor, cell_variance: Tensor, log_weight: Tensor) -> PredictiveMoments:
    """Under self-normalised weights (eqs. 22 to 24).

    f, cell_variance [L, B, D]: E[x | z] and Var[x | z] of L draws; log_weight [L, B]: zeros for plain means under q.
    """
    share = log_weight.softmax(0)[:, :, None]
    mean = (share * f).sum(0)
    return PredictiveMoments(
        mean,
        (share * (f - mean).square()).sum(0),
        (share * cell_variance).sum(0),
        1 / share.square().sum(0)[:, 0],
        log_weight.logsumexp(0) - math.log(len(f)),
    )


# --- inference: rows fitted by themselves, all that they share being frozen ---


class FitStep(NamedTuple):
    """Rows after a step of their fit, [B, C] each."""

    p: Tensor
    v: Tensor  # second moments
    grad: Tensor  # that the step followed


def row_gradient(p: Tensor, loss: Callable[..., Tensor], *of: int) -> Tensor:
    """The gradient of each row's own loss [B, C]: rows do not see each other. loss: (p [B, C], *of) -> [B]."""
    with torch.enable_grad():
        p = p.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss(p, *of).sum(), p)
    return grad


def fit_rows(
    p: Tensor,
    loss: Callable[[Tensor, int], Tensor],
    rates: Sequence[float],
    hyper: AdamHyper,
    missed: int = 0,
    age: Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None,
) -> Iterator[FitStep]:
    """Every row's descent of its own loss by Adam, with one learning rate a step.

    p [B, C]: where it starts; loss: (p, number of the step, from 0) -> [B]. Between two steps the rows may miss some
    of Adam's, which age(step before, p, m, v) makes up for.
    """
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step, lr in enumerate(rates):
        if age is not None and step:
            p, m, v = age(step - 1, p, m, v)
        grad = row_gradient(p, loss, step)
        p, m, v = adamw_step(p, m, v, grad, 1 + step * (missed + 1), lr, hyper)
        yield FitStep(p, v, grad)
