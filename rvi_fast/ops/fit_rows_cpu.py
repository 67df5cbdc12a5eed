"""Inference of blocks of rows on a CPU: relays and decoder frozen, so that a step goes back no further than to z."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..reference import HALF_LOG_2PI, AdamHyper
from .rows_cpu import Rows, weights_of
from .table_cpu import adam_factors

if TYPE_CHECKING:
    from .elbo import ElboModel


BLOCK = 32  # rows that a product takes at a time, so that a row's bits do not depend on the others


class Blocks(Rows):
    """Rows that are fitted together. Each result is its own row's alone, to the bit where they are whole blocks."""

    def __init__(
        self, start: Tensor, row_ids: Tensor, x: Tensor, mask: Tensor | None, x_scale: float,
        weights: Tensor, scale: Tensor, model: ElboModel, seed: int,
    ):  # fmt: skip
        from ..loops import likelihood

        size, columns = x.shape
        latent_dim = (start.shape[1] - sum(model.groups)) // 2
        frozen = weights_of(weights.contiguous().numpy(), model, latent_dim, columns, BLOCK)
        super().__init__(size, latent_dim, columns, frozen, model)
        for values, first in zip((*self.moving, self.arrays.grad), (start.numpy(), 0, 0, 0), strict=True):
            values[:] = first
        self.row_ids, self.model, self.seed = row_ids, model, seed
        self.cells = np.empty((size, columns), self.arrays.kl.dtype)
        self.observed = np.empty((size, columns), np.uint8)
        x = x if x.dtype in (start.dtype, torch.uint8) else x.to(start.dtype)
        holes = None if mask is None else mask.view(torch.uint8).numpy()
        likelihood.read_rows(x.numpy(), x_scale, holes, np.arange(size), self.cells, self.observed)
        scales = scale.expand(columns).contiguous().numpy()
        self.inverse_scale = 1 / scales
        self.of_scales = self.observed @ (np.log(scales, dtype=np.float64) + HALF_LOG_2PI)
        self.nll = np.empty(size, self.arrays.kl.dtype)

    def losses(self, step: int, draw: int = 0) -> None:
        """nll [B] (of a Gaussian without its scales' terms) and kl [B] of one draw of z; the gradient of nll replaces
        xhat."""
        from ..loops import likelihood

        self.forward(self.seed, "infer", step, self.row_ids, draw)
        xhat, cells = self.arrays.xhat, (self.cells, self.observed)
        if self.model.likelihood == "bernoulli":
            likelihood.bernoulli_rows(xhat, *cells, self.nll)
        else:
            likelihood.gaussian_rows(xhat, *cells, self.inverse_scale, self.nll)

    def descend(self, step: int, lr: float, hyper: AdamHyper) -> None:
        """Step number `step`, from 0, of Adam on each row's own loss."""
        from ..loops import adam, threads

        self.losses(step)
        self.backward(self.model.kl_weight)
        moving = (a.reshape(-1) for a in (*self.moving, self.arrays.grad))
        adam.step_all(threads.available(), *moving, adam_factors(step + 1, lr, 0.0, hyper))

    def elbo(self, draws: int) -> np.ndarray:
        """Mean over draws 1 .. `draws` [B]."""
        total = np.zeros(len(self.nll))
        for draw in range(1, draws + 1):
            self.losses(0, draw)
            total -= self.nll + self.arrays.kl
        total /= draws
        return total if self.model.likelihood == "bernoulli" else total - self.of_scales


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def fit_rows(
    start: Tensor, row_ids: Tensor, x: Tensor, mask: Tensor | None, x_scale: float,
    weights: Tensor, scale: Tensor, model: ElboModel,
    rates: Sequence[float], hyper: AdamHyper, seed: int, draws: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As ops.fit_rows, of rows in memory that the CPU reaches."""
    blocks = Blocks(start, row_ids, x, mask, x_scale, weights, scale, model, seed)
    for step, lr in enumerate(rates):
        blocks.descend(step, lr, hyper)
    grad_norm = torch.from_numpy(blocks.arrays.grad).norm(dim=1)
    p, _, v = map(torch.from_numpy, blocks.moving)
    return p, v, torch.from_numpy(blocks.elbo(draws)).to(start.dtype), grad_norm


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def row_gradients(
    p: Tensor, row_ids: Tensor, x: Tensor, mask: Tensor | None, x_scale: float,
    weights: Tensor, scale: Tensor, model: ElboModel, seed: int, draws: Sequence[int],
) -> Tensor:  # fmt: skip
    """As ops.fit_rows's."""
    blocks = Blocks(p, row_ids, x, mask, x_scale, weights, scale, model, seed)
    total = torch.zeros_like(p)
    for draw in draws:
        blocks.losses(0, draw)
        blocks.backward(model.kl_weight)
        total += torch.from_numpy(blocks.arrays.grad)
    return total / len(draws)
