"""Whole training steps of the paper's model, by several ways, called with rows of data that lie on the device."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rvi_fast.elbo_step import ElboStep
from rvi_fast.likelihoods import Gaussian
from rvi_fast.model import RowModel
from rvi_fast.nn import MeanFieldPosterior, MLPDecoder, RelayPosterior
from rvi_fast.optim import RowAdam

from .peers.eager import EagerRVI

LR = 1e-3
STEPS_AHEAD = 1 << 16  # a captured step must find room for all its replays
DRAWN_ROWS = 8192  # of data; larger data repeat them, for which no step is faster or slower
TABLE = ("coef", "residual", "log_std")
Values = Mapping[str, Tensor]  # coef, residual, log_std, relays, weight0, bias0, weight1, ...


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
    def width(self) -> int:
        """Parameters of a row."""
        return sum(self.groups) + 2 * self.latents

    @property
    def layers(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the decoder's layers."""
        return list(itertools.pairwise((self.latents, *self.hidden, self.columns)))

    @property
    def shared(self) -> int:
        """Parameters of relays and decoder."""
        return sum(self.groups) * self.latents + sum((i + 1) * o for i, o in self.layers)

    def step_bytes(self, batch: int, x_bytes: int) -> int:
        """The least that a step moves: rows with moments, x, mask, row number and last step, shared parameters."""
        row = 2 * 3 * self.width * 4 + self.columns * (x_bytes + 1) + 8 + 2 * 4
        return batch * row + 2 * 3 * 4 * self.shared

    def step_flops(self, batch: int) -> int:
        """Of the products: forward, and backward to both sides."""
        return 6 * batch * (self.shared - self.columns - sum(self.hidden))


class Data:
    """All rows of x and their masks, given or made when first drawn from. x times x_scale is in the model's units."""

    def __init__(self, sizes: Sizes, missing: float = 0.5, dtype: torch.dtype = torch.float32):
        self.shape = (sizes.num_rows, sizes.columns)
        self.missing, self.dtype = missing, dtype
        self.x_scale = 1 / 255 if dtype == torch.uint8 else 1.0
        self._made: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, sizes: Sizes, x: Tensor, mask: Tensor) -> Data:
        """x [N, D] in the model's units, mask [N, D]."""
        given = cls(sizes)
        given._made = x, mask
        return given

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._made is None:
            rows, columns = self.shape
            drawn = torch.rand(min(rows, DRAWN_ROWS), columns, device=device)
            mask = torch.rand_like(drawn) >= self.missing
            x = (drawn / self.x_scale).to(self.dtype)
            times = -(-rows // len(x))
            self._made = x.repeat(times, 1)[:rows], mask.repeat(times, 1)[:rows]
        return self._made

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, D] in the model's units and mask [B, D] of rows."""
        x, mask = (t.index_select(0, rows) for t in self.on(rows.device))
        return (x.float().mul_(self.x_scale) if x.dtype == torch.uint8 else x), mask


class Peer:
    """One way to train: a model, its optimiser and the data. rates: learning rates of rows, and of all else."""

    capture = True  # whether a CUDA graph may hold its steps

    def __init__(self, sizes: Sizes, data: Data, rates: tuple[float, float] = (LR, LR)):
        self.sizes, self.data, self.rates = sizes, data, rates
        self._made: Any = None

    def make(self, device: torch.device) -> Any:
        """The model and what trains it, made once."""
        if self._made is None:
            self._made = self._make(device)
        return self._made

    def _make(self, device: torch.device) -> Any:
        raise NotImplementedError

    def __call__(self, rows: Tensor, noise: Tensor | None = None) -> Any:
        """A step on rows [B], with noise [B, T] or drawn. Returns what `loss` makes the loss of."""
        raise NotImplementedError

    def run(self, rows: Tensor) -> None:
        """A step on each of rows [S, B]: what is timed."""
        for batch in rows:
            self(batch)

    def train(self, rows: Tensor, noise: Tensor) -> Tensor:
        """A step on each of rows [S, B], with noise [S, B, T]. Returns the batches' mean losses [S]."""
        return torch.stack([self.loss(self(batch, e), len(batch)) for batch, e in zip(rows, noise, strict=True)])

    def loss(self, result: Any, batch: int) -> Tensor:
        return result.detach().clone()  # a compiled model's graph writes over it

    def load(self, values: Values) -> None:
        """Start from these values; before the first step."""
        raise NotImplementedError

    def values(self) -> Values:
        """The parameters as they are now."""
        raise NotImplementedError

    def replayed(self, steps: int) -> None:
        """Told after a CUDA graph has taken steps."""


class RowAdamStep(Peer):
    """rvi_fast's model and optimiser: in the two launches of ElboStep, or operator by operator.

    Without groups of relays it is VAD. Its noise is its own, keyed by step and row: the noise given to a step is that
    of `rvi_fast.functional.philox_normal` with seed 0.
    """

    def __init__(self, sizes: Sizes, data: Data, fused: bool, rates: tuple[float, float] = (LR, LR)):
        super().__init__(sizes, data, rates)
        self.fused = fused

    def _make(self, device: torch.device) -> tuple[RowModel, RowAdam, ElboStep | None]:
        s = self.sizes
        posterior: RelayPosterior | MeanFieldPosterior
        if s.groups:
            posterior = RelayPosterior(s.num_rows, s.latents, s.groups, s.active, coef_std=0.0, residual_std=0.0)
            posterior.table.store.values[:, 0, : sum(s.groups)].normal_(std=0.1)  # sooner than keyed noise
        else:
            posterior = MeanFieldPosterior(s.num_rows, s.latents)
        decoder = MLPDecoder(s.latents, s.columns, s.hidden)
        model = RowModel(posterior, decoder, Gaussian(s.scale), kl_weight=1.0).to(device).train()
        rows = list(posterior.table.parameters())
        shared = [*([posterior.relays] if s.groups else []), *decoder.parameters()]
        optimizer = RowAdam([{"params": rows, "lr": self.rates[0]}, {"params": shared, "lr": self.rates[1]}])
        step = ElboStep(model, optimizer) if self.fused else None
        if step:
            step.make_room(STEPS_AHEAD)
        return model, optimizer, step

    def __call__(self, rows: Tensor, noise: Tensor | None = None) -> Any:
        model, optimizer, step = self.make(rows.device)
        if step:
            return step.step(rows, *self.data.on(rows.device), x_scale=self.data.x_scale)
        optimizer.zero_grad()
        loss = model.row_loss(*model(rows, *self.data.batch(rows))).mean()
        loss.backward()
        optimizer.step()
        model.posterior.table.store.columns[0].clock.reserve(STEPS_AHEAD)  # replays of a graph cannot ask for room
        return loss

    def loss(self, result: Any, batch: int) -> Tensor:
        return sum(result) / batch if self.fused else super().loss(result, batch)

    def replayed(self, steps: int) -> None:
        if self._made[2]:
            self._made[2].replayed(steps)

    @torch.no_grad()
    def load(self, values: Values) -> None:
        model = self._made[0]
        for name in TABLE:
            model.posterior.table.assign(values[name], name)
        model.posterior.relays.copy_(values["relays"])
        load_layers(model.decoder, values)

    @torch.no_grad()
    def values(self) -> Values:
        model = self._made[0]
        table = model.posterior.table
        rows = {name: table.read(name) for name in table.store.names}
        relays = {"relays": model.posterior.relays.detach()} if self.sizes.groups else {}
        return rows | relays | layer_values(model.decoder)


class DenseAdamStep(Peer):
    """The published algorithm: embeddings under torch's Adam over all rows.

    compiler, mode: of torch.compile, if the model is compiled. adam: which of Adam's forms. dtype: of model and data.
    """

    sparse = False

    def __init__(
        self,
        sizes: Sizes,
        data: Data,
        compiler: str | None,
        *,
        mode: str | None = None,
        adam: str = "fused",
        dtype: torch.dtype = torch.float32,
        rates: tuple[float, float] = (LR, LR),
    ):
        super().__init__(sizes, data, rates)
        self.compiler, self.mode, self.adam, self.dtype = compiler, mode, adam, dtype
        self.capture = mode is None  # or it makes graphs itself

    def _make(self, device: torch.device) -> tuple[Any, EagerRVI, list[torch.optim.Optimizer]]:
        s = self.sizes
        with device:
            peer = EagerRVI(s.num_rows, s.columns, s.latents, s.hidden, s.groups, s.active, s.scale, sparse=self.sparse)
            nn.init.normal_(peer.relays)
            for embedding, (mean, std) in zip(peer.embeddings, ((0, 0.1), (0, 0.01), (-2, 0)), strict=True):
                nn.init.normal_(embedding.weight, mean, std)
        peer.to(self.dtype)
        model: Any = peer
        if self.compiler:
            model = torch.compile(peer, backend=self.compiler, mode=self.mode, dynamic=False)
        return model, peer, self._optimizers(peer, device)

    def _optimizers(self, peer: EagerRVI, device: torch.device) -> list[torch.optim.Optimizer]:
        rows = {"params": [e.weight for e in peer.embeddings], "lr": self.rates[0]}
        shared = {"params": peer.shared_parameters(), "lr": self.rates[1]}
        form: dict[str, Any] = {self.adam: True}
        return [torch.optim.Adam([rows, shared], capturable=device.type == "cuda", **form)]

    def __call__(self, rows: Tensor, noise: Tensor | None = None) -> Any:
        model, _, optimizers = self.make(rows.device)
        x, mask = self.data.batch(rows)
        if noise is None:
            noise = torch.randn(len(rows), self.sizes.latents, device=rows.device)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = model(rows, x.to(self.dtype), mask, noise.to(self.dtype))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss

    @torch.no_grad()
    def load(self, values: Values) -> None:
        peer = self._made[1]
        peer.relays.copy_(values["relays"])
        for name in TABLE:
            getattr(peer, name).weight.copy_(values[name])
        load_layers(peer.decoder, values)

    def values(self) -> Values:
        peer = self._made[1]
        rows = {name: getattr(peer, name).weight.detach() for name in TABLE}
        return rows | {"relays": peer.relays.detach()} | layer_values(peer.decoder)


def _linears(decoder: nn.Module) -> list[nn.Linear]:
    return [layer for layer in decoder.modules() if isinstance(layer, nn.Linear)]


def load_layers(decoder: nn.Module, values: Values) -> None:
    for number, layer in enumerate(_linears(decoder)):
        layer.weight.copy_(values[f"weight{number}"])
        layer.bias.copy_(values[f"bias{number}"])


def layer_values(decoder: nn.Module) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = {}
    for number, layer in enumerate(_linears(decoder)):
        parts |= {f"weight{number}": layer.weight.detach(), f"bias{number}": layer.bias.detach()}
    return parts
