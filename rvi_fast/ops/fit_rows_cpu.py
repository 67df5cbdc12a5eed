"""Inference of blocks of rows on a CPU: relays and decoder frozen, so that a step goes back no further than to z."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..reference import HALF_LOG_2PI, AdamHyper
from .rows_cpu import Decoder, Rows
from .table_cpu import adam_factors

if TYPE_CHECKING:
    from .elbo import ElboModel


BLOCK = 32  # rows that a product takes at a time, so that a row's bits do not depend on the others


class BlockProducts:
    """rows_cpu.Product, a block at a time, by weights that stay as they are."""

    def __init__(self) -> None:
        self.weights: dict[tuple, tuple[np.ndarray, bool, np.ndarray]] = {}

    def __call__(self, a: Tensor, b: Tensor, out: Tensor, start: Tensor | None = None) -> Tensor:
        from ..loops import products

        if start is None:
            out.zero_()
        else:
            out.copy_(start)
        if products.HAS_BLAS:
            key = b.data_ptr(), b.shape, b.stride()
            if key not in self.weights:
                self.weights[key] = self._packed(b)
            products.multiply(BLOCK, a.numpy(), *self.weights[key], out.numpy())
        else:
            for part, rows in zip(out.split(BLOCK), a.split(BLOCK), strict=True):
                part.addmm_(rows, b)
        return out

    @staticmethod
    def _packed(b: Tensor) -> tuple[np.ndarray, bool, np.ndarray]:
        """b or b.T, which of them, and it in the order that BLAS reads it in, which it would otherwise make for every
        block."""
        from ..loops import products

        transposed = b.stride(1) != 1
        weight = (b.T if transposed else b).numpy()
        packs = products.HAS_PACKING and weight.size and weight.dtype == np.float32
        return weight, transposed, products.pack(BLOCK, weight, transposed) if packs else np.empty(0, weight.dtype)


class Blocks(Rows):
    """Rows that are fitted together. Each result is its own row's alone, to the bit where they are whole blocks."""

    def __init__(
        self, start: Tensor, row_ids: Tensor, x: Tensor, mask: Tensor | None, x_scale: float,
        relays: Tensor, layers: list[Tensor], scale: Tensor, model: ElboModel, seed: int,
    ):  # fmt: skip
        from ..loops import likelihood

        size, columns = x.shape
        product = BlockProducts()
        super().__init__(size, start.shape[1], relays, model, product)
        self.p.copy_(start)
        self.m.zero_(), self.v.zero_(), self.grad.zero_()
        self.row_ids, self.model, self.seed = row_ids, model, seed
        self.decoder = Decoder(size, layers, model, product)
        self.cells, self.observed = np.empty((size, columns), self.kl.dtype), np.empty((size, columns), np.uint8)
        x = x if x.dtype in (start.dtype, torch.uint8) else x.to(start.dtype)
        holes = None if mask is None else mask.view(torch.uint8).numpy()
        likelihood.read_rows(x.numpy(), x_scale, holes, np.arange(size), self.cells, self.observed)
        scales = scale.expand(columns).contiguous().numpy()
        self.inverse_scale = 1 / scales
        self.of_scales = self.observed @ (np.log(scales, dtype=np.float64) + HALF_LOG_2PI)
        self.nll = np.empty(size, self.kl.dtype)

    def losses(self, step: int, draw: int = 0) -> None:
        """nll [B] (of a Gaussian without its scales' terms) and kl [B] of one draw of z; the gradient of nll replaces
        xhat."""
        from ..loops import likelihood

        self.sample(self.seed, "infer", step, self.row_ids, draw)
        self.decoder.decode(self.z)
        xhat = self.decoder.xhat_array
        if self.model.likelihood == "bernoulli":
            softplus, sigmoid = self.decoder.softplus_and_sigmoid()
            likelihood.bernoulli_rows(xhat, softplus, sigmoid, self.cells, self.observed, self.nll)
        else:
            likelihood.gaussian_rows(xhat, self.cells, self.observed, self.inverse_scale, self.nll)

    def descend(self, step: int, lr: float, hyper: AdamHyper) -> None:
        """Step number `step`, from 0, of Adam on each row's own loss."""
        from ..loops import adam, threads

        self.losses(step)
        self.gradient(self.decoder.gradient(), self.model.kl_weight)
        moving = (a.reshape(-1) for a in (*self.moving(), self.arrays.grad))
        adam.step_all(threads.available(), *moving, adam_factors(step + 1, lr, 0.0, hyper))

    def elbo(self, draws: int) -> np.ndarray:
        """Mean over draws 1 .. `draws` [B]."""
        total = np.zeros(len(self.kl))
        for draw in range(1, draws + 1):
            self.losses(0, draw)
            total -= self.nll + self.kl
        total /= draws
        return total if self.model.likelihood == "bernoulli" else total - self.of_scales


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def fit_rows(
    start: Tensor, row_ids: Tensor, x: Tensor, mask: Tensor | None, x_scale: float,
    relays: Tensor, layers: list[Tensor], scale: Tensor, model: ElboModel,
    rates: Sequence[float], hyper: AdamHyper, seed: int, draws: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As ops.fit_rows, of rows in memory that the CPU reaches."""
    blocks = Blocks(start, row_ids, x, mask, x_scale, relays, layers, scale, model, seed)
    for step, lr in enumerate(rates):
        blocks.descend(step, lr, hyper)
    grad_norm = blocks.grad.norm(dim=1)
    return blocks.p, blocks.v, torch.from_numpy(blocks.elbo(draws)).to(start.dtype), grad_norm


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def row_gradients(
    p: Tensor, row_ids: Tensor, x: Tensor, mask: Tensor | None, x_scale: float,
    relays: Tensor, layers: list[Tensor], scale: Tensor, model: ElboModel, seed: int, draws: Sequence[int],
) -> Tensor:  # fmt: skip
    """As ops.fit_rows's."""
    blocks = Blocks(p, row_ids, x, mask, x_scale, relays, layers, scale, model, seed)
    total = torch.zeros_like(p)
    for draw in draws:
        blocks.losses(0, draw)
        blocks.gradient(blocks.decoder.gradient(), model.kl_weight)
        total += blocks.grad
    return total / len(draws)
