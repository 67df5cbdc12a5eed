"""Inference of a block of rows, fused: every row's own parameters fitted by Adam, relays and decoder frozen."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch, reference
from ..reference import AdamHyper
from . import fit_rows_cpu
from .checks import check_float, check_one_device, check_shape, checked_int
from .elbo import WIDEST, ElboModel, shared_views
from .likelihoods import check_x, twin_x
from .noise import as_int64
from .registry import operator

MOST_GROUPS, MOST_RELAYS = 6, 512  # that the kernel counts at once, and that it has registers for
LOOPED = (torch.float32, torch.float64)  # dtypes of compiled loops
PRECISIONS = ("float32", "tf32", "bfloat16")  # of the kernel's products


class FittedRows(NamedTuple):
    """What fit_rows found."""

    parameters: Tensor  # [M, C]
    second: Tensor  # [M, C]: Adam's second moments
    elbo: Tensor  # [M]: mean over draws, in nats
    grad_norm: Tensor  # [M]: of the gradient that the last step followed


def unsupported(dtype: torch.dtype, device: torch.device, latent_dim: int, model: ElboModel) -> str | None:
    """What keeps the kernel from rows of such a model, if anything does."""
    compiled = device.type == "cuda"  # Triton 3.6 fails on tl.dot of float64
    if dtype not in ((torch.float32,) if compiled else (torch.float32, torch.float64)):
        return f"{dtype} rows"
    if max(latent_dim, *model.hidden, 0) > WIDEST:
        return f"latent_dim or hidden layers above {WIDEST}"
    if len(model.groups) > MOST_GROUPS or sum(model.groups) > MOST_RELAYS:
        return f"more than {MOST_GROUPS} groups or {MOST_RELAYS} relays"
    return None


def fit_rows(
    start: Tensor,
    row_ids: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    model: ElboModel,
    rates: Tensor,
    hyper: AdamHyper,
    *,
    seed: int,
    draws: int = 1,
    x_scale: float = 1.0,
    precision: str | None = None,
) -> FittedRows:
    """len(rates) steps of Adam on each row's -log p(x_observed | z) + kl_weight KL, and the ELBO after them.

    start [M, C]: coefficients, residual and log_std to start from; row_ids: int64 [M]; x [M, D] of any dtype, times
    x_scale; mask bool, or its bits, or None (NaN is missing); weights: relays, decoder and learned scale, flat (see
    ElboModel.shared_shapes); rates: a learning rate for each step, float [steps]. Noise is that of stream "infer", draw
    0 of every step; the ELBO's is draw 1 .. `draws` of step 0. precision: of products on a GPU, "float32", "tf32" or
    "bfloat16"; None follows torch.set_float32_matmul_precision.
    """
    sizes = {"K": sum(model.groups)}
    check_shape("start", start, ("M", "C"), sizes)
    check_float("start", start)
    check_shape("row_ids", row_ids, ("M",), sizes)
    if row_ids.dtype != torch.int64:
        raise TypeError(f"row_ids must be int64; got {row_ids.dtype}")
    cells = {"B": sizes["M"]}
    check_x(x, mask, x_scale, cells)
    latent_dim, odd = divmod(sizes["C"] - sizes["K"], 2)
    if odd or latent_dim < 1:
        raise ValueError(f"start must have K + 2 T columns, with K = {sizes['K']} relays; got {sizes['C']}")
    check_shape("weights", weights, ("P",), sizes)
    check_float("weights", weights, like=start)
    wanted = sum(torch.Size(shape).numel() for shape in model.shared_shapes(latent_dim, cells["D"]))
    if len(weights) != wanted:
        raise ValueError(f"weights must hold {wanted} numbers for this model and D = {cells['D']}; got {len(weights)}")
    check_shape("rates", rates, ("steps",), sizes)
    check_float("rates", rates)
    check_one_device(start=start, row_ids=row_ids, x=x, mask=mask, weights=weights, rates=rates)
    draws = checked_int("draws", draws, 1, (1 << 16) - 1)
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, or None; got {precision!r}")
    tensors = start.detach().contiguous(), row_ids.contiguous(), x.detach(), mask, weights.detach(), rates.double()
    seed = as_int64(checked_int("seed", seed))
    kernel = dispatch.use_triton("fit_rows", start.device, unsupported(start.dtype, start.device, latent_dim, model))
    run = _fit_rows if kernel else _run  # the equations differentiate, which an operator's inside cannot
    return FittedRows(*run(*tensors, *hyper, seed, draws, float(x_scale), precision, *model))


def _run(*args: Any) -> tuple[Tensor, ...]:
    start, row_ids, x, mask, weights, rates = args[:6]
    hyper, (seed, draws, x_scale, precision), model = AdamHyper(*args[6:9]), args[9:13], ElboModel(*args[13:])
    latent_dim = (start.shape[1] - sum(model.groups)) // 2
    frozen = _frozen(weights, model, latent_dim, x.shape[1])
    if dispatch.use_triton("fit_rows", start.device, unsupported(start.dtype, start.device, latent_dim, model)):
        return _launch(start, row_ids, x, mask, x_scale, *frozen, rates, hyper, seed, draws, precision)
    if dispatch.use_numba(start.device) and start.dtype in LOOPED:
        of_model = weights, *frozen[2:], rates.tolist(), hyper, seed, draws
        return fit_rows_cpu.fit_rows(start, row_ids, x, mask, x_scale, *of_model)
    x, mask = twin_x(x, mask, x_scale, start.dtype)
    return _equations(start, row_ids, x, mask, *frozen, rates, hyper, seed, draws)


def _frozen(
    weights: Tensor, model: ElboModel, latent_dim: int, columns: int
) -> tuple[Tensor, list[Tensor], Tensor, ElboModel]:
    """Relays, the decoder's layers, the likelihood's scale, and the model."""
    relays, *layers = shared_views(weights, model.shared_shapes(latent_dim, columns))
    scale = weights.new_full((), model.scale)
    if model.learned:
        scale = torch.sqrt(scale**2 + torch.exp(2 * layers.pop()))
    return relays, layers, scale, model


def row_gradients(
    p: Tensor,
    row_ids: Tensor,
    x: Tensor,
    mask: Tensor,
    weights: Tensor,
    model: ElboModel,
    *,
    seed: int,
    draws: Sequence[int],
) -> Tensor:
    """The gradient [M, C] of each row's -log p(x_observed | z) + kl_weight KL at p [M, C], its mean over draws of z.

    Arguments as of fit_rows, x in the model's units and mask bool; draws: their numbers, of step 0.
    """
    latent_dim = (p.shape[1] - sum(model.groups)) // 2
    frozen = _frozen(weights, model, latent_dim, x.shape[1])
    if dispatch.use_numba(p.device) and p.dtype in LOOPED:
        return fit_rows_cpu.row_gradients(p, row_ids, x, mask, 1.0, weights, *frozen[2:], seed, draws)
    x, mask = twin_x(x, mask, 1.0, p.dtype)
    losses = _losses_of(row_ids, x, mask, *frozen, seed)

    def loss(p: Tensor, draw: int) -> Tensor:
        nll, kl = losses(p, 0, draw)
        return nll + model.kl_weight * kl

    total = torch.zeros_like(p)
    for draw in draws:
        total += reference.row_gradient(p, loss, draw)
    return total / len(draws)


def _launch(
    start: Tensor, row_ids: Tensor, x: Tensor, mask: Tensor | None, x_scale: float,
    relays: Tensor, layers: list[Tensor], scale: Tensor, model: ElboModel,
    rates: Tensor, hyper: AdamHyper, seed: int, draws: int, precision: str | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    from ..kernels.fit_rows import fit_rows as kernel

    first, second = hyper.bias_corrections(torch.arange(1, len(rates) + 1, device=rates.device))
    sizes = torch.stack((rates / first, second.rsqrt()), dim=1)
    return kernel(
        start, row_ids, x, mask, x_scale, relays, layers, scale, model.groups, model.active,
        model.activation, model.linear_path, model.likelihood, model.kl_weight, seed, sizes, hyper, draws, precision,
    )  # fmt: skip


def _equations(
    start: Tensor, row_ids: Tensor, x: Tensor, mask: Tensor,
    relays: Tensor, layers: list[Tensor], scale: Tensor, model: ElboModel,
    rates: Tensor, hyper: AdamHyper, seed: int, draws: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    losses = _losses_of(row_ids, x, mask, relays, layers, scale, model, seed)

    def loss(p: Tensor, step: int) -> Tensor:
        nll, kl = losses(p, step)
        return nll + model.kl_weight * kl

    before = reference.FitStep(start.clone(), torch.zeros_like(start), torch.zeros_like(start))
    (fit,) = collections.deque(reference.fit_rows(start, loss, rates.tolist(), hyper), maxlen=1) or (before,)
    elbo = start.new_zeros(len(start))
    for draw in range(1, draws + 1):
        nll, kl = losses(fit.p, 0, draw)
        elbo -= (nll + kl) / draws
    return fit.p, fit.v, elbo, fit.grad.norm(dim=1)


def _losses_of(
    row_ids: Tensor, x: Tensor, mask: Tensor,
    relays: Tensor, layers: list[Tensor], scale: Tensor, model: ElboModel, seed: int,
) -> Callable[..., tuple[Tensor, Tensor]]:  # fmt: skip
    """nll and kl [M] as a function of p, step and draw."""
    pairs = list(zip(layers[::2], layers[1::2], strict=True))

    def losses(p: Tensor, step: int, draw: int = 0) -> tuple[Tensor, Tensor]:
        noise = reference.philox_normal(seed, "infer", step, row_ids, relays.shape[1], draw, p.dtype)
        return reference.row_losses(
            p, noise, x, mask, relays, pairs, scale, model.groups, model.active,
            model.activation, model.linear_path, model.likelihood,
        )  # fmt: skip

    return losses


def _fake(start: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(start), torch.empty_like(start), start.new_empty(len(start)), start.new_empty(len(start))


_fit_rows = operator(
    "fit_rows(Tensor start, Tensor row_ids, Tensor x, Tensor? mask, Tensor weights, Tensor rates, "
    "float beta1, float beta2, float eps, int seed, int draws, float x_scale, str? precision, "
    "int[] groups, int[] active, int[] hidden, bool linear_path, str activation, str likelihood, "
    "float scale, bool learned, float kl_weight) -> (Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
