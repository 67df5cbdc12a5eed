"""Whole training steps of the paper's model, by several ways, called with rows of data that lie on the device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rvi_fast.elbo_step import ElboStep
from rvi_fast.likelihoods import Gaussian
from rvi_fast.model import RowModel
from rvi_fast.nn import MLPDecoder, RelayPosterior
from rvi_fast.optim import RowAdam

from .peers.eager import EagerRVI

LR = 1e-3
STEPS_AHEAD = 1 << 16  # a captured step must find room for all its replays


class Sizes:
    """A model and its data: latents, groups of relays, hidden layers, columns, rows."""

    def __init__(
        self,
        num_rows: int,
        columns: int,
        latents: int,
        hidden: Sequence[int],
        groups: Sequence[int],
        active: Sequence[int],
        scale: float,
    ):
        self.num_rows, self.columns, self.latents, self.hidden = num_rows, columns, latents, hidden
        self.groups, self.active, self.scale = groups, active, scale

    @property
    def shared(self) -> int:
        """Parameters of relays and decoder."""
        widths = (self.latents, *self.hidden, self.columns)
        return sum(self.groups) * self.latents + sum((i + 1) * o for i, o in itertools.pairwise(widths))


class Data:
    """All rows of x and their masks, made when first drawn from."""

    def __init__(self, sizes: Sizes):
        self.shape = (sizes.num_rows, sizes.columns)
        self._made: tuple[Tensor, Tensor] | None = None

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._made is None:
            self._made = torch.randn(self.shape, device=device), torch.rand(self.shape, device=device) < 0.5
        return self._made


class RowAdamStep:
    """rvi_fast's model and optimiser: in the two launches of ElboStep, or operator by operator."""

    def __init__(self, sizes: Sizes, data: Data, fused: bool):
        self.sizes, self.data, self.fused = sizes, data, fused
        self._made: tuple[RowModel, RowAdam, ElboStep | None] | None = None

    def make(self, device: torch.device) -> tuple[RowModel, RowAdam, ElboStep | None]:
        if self._made is None:
            s = self.sizes
            posterior = RelayPosterior(s.num_rows, s.latents, s.groups, s.active, coef_std=0.0, residual_std=0.0)
            posterior.table.store.values[:, 0, : sum(s.groups)].normal_(std=0.1)  # sooner than keyed noise
            decoder = MLPDecoder(s.latents, s.columns, s.hidden)
            model = RowModel(posterior, decoder, Gaussian(s.scale), kl_weight=1.0).to(device).train()
            optimizer = RowAdam(model.parameters(), lr=LR)
            step = ElboStep(model, optimizer) if self.fused else None
            if step:
                step.make_room(STEPS_AHEAD)
            self._made = model, optimizer, step
        return self._made

    def __call__(self, rows: Tensor) -> Any:
        model, optimizer, step = self.make(rows.device)
        x, mask = self.data.on(rows.device)
        if step:
            return step.step(rows, x, mask)
        optimizer.zero_grad()
        nll, kl = model(rows, x[rows], mask[rows])
        model.row_loss(nll, kl).mean().backward()
        optimizer.step()
        model.posterior.table.store.columns[0].clock.reserve(STEPS_AHEAD)  # replays of a graph cannot ask for room


class DenseAdamStep:
    """The published algorithm: embeddings under torch's fused Adam over all rows; its model compiled or not."""

    def __init__(self, sizes: Sizes, data: Data, compiler: str | None):
        self.sizes, self.data, self.compiler = sizes, data, compiler
        self._made: tuple[Any, torch.optim.Optimizer] | None = None

    def make(self, device: torch.device) -> tuple[Any, torch.optim.Optimizer]:
        if self._made is None:
            s = self.sizes
            with device:
                peer = EagerRVI(s.num_rows, s.columns, s.latents, s.hidden, s.groups, s.active, s.scale)
            nn.init.normal_(peer.relays)
            adam = torch.optim.Adam(peer.parameters(), lr=LR, fused=True, capturable=device.type == "cuda")
            model = torch.compile(peer, backend=self.compiler, dynamic=False) if self.compiler else peer
            self._made = model, adam
        return self._made

    def __call__(self, rows: Tensor) -> None:
        model, adam = self.make(rows.device)
        x, mask = self.data.on(rows.device)
        adam.zero_grad()
        noise = torch.randn(len(rows), self.sizes.latents, device=rows.device)
        model(rows, x[rows], mask[rows], noise).backward()
        adam.step()
