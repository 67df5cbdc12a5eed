"""Modules: tables of rows, the posteriors built from them, and the decoder."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments, ops
from .clock import Clock
from .row_store import ReadRows, RowStore

__all__ = ["MLPDecoder", "MeanFieldPosterior", "RelayPosterior", "RowTable"]

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh, "gelu": nn.GELU}

# draws of the "init" noise stream, one for each thing that is initialised
DRAW_ROWS, DRAW_RELAYS = 0, 1


DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _size(name: str, size: int) -> int:
    arguments.positive_int(name, size)
    return int(size)


def _std_by_column(std: float | Mapping[str, float], widths: Mapping[str, int]) -> dict[str, float]:
    stds = dict(std) if isinstance(std, Mapping) else dict.fromkeys(widths, std)
    if stds.keys() != widths.keys():
        raise ValueError(f"init_std must name the columns {', '.join(widths)}; got {', '.join(stds) or 'none'}")
    stop = 0
    for name, width in widths.items():
        if not isinstance(stds[name], Real) or not 0 <= stds[name] < math.inf:
            raise ValueError(f"init_std of {name!r} must be a finite number, 0 or above; got {stds[name]!r}")
        stop += width
        if stds[name] and stop > ops.MAX_LATENTS:
            raise ValueError(
                f"dim of a RowTable must be at most {ops.MAX_LATENTS:,} where init_std is not 0 (the keyed noise has "
                f"no more latents); got {sum(widths.values()):,}"
            )
    return stds


class RowTable(nn.Module):
    """A table [num_rows, dim] read by row, like nn.Embedding, and trained by rvi_fast.optim.RowAdam.

    num_rows, dim: sizes. dtype: of the rows (default: torch's default dtype). columns: names and widths of column
    ranges that sum to dim, each a parameter of its own (so that it can have its own learning rate); default one,
    "weight". init_std: of the normal initial values, a number or one for each name. seed: of the initial values.
    moments: whether to keep room for Adam's moments beside each row from the start (a RowAdam makes room where there
    is none).

    Rows that no batch touched of late are stored behind the optimiser's steps; every read through the module
    (table(rows), table.weight, state_dict) gives them up to date, and writes nothing. To write rows use assign.
    """

    def __init__(
        self,
        num_rows: int,
        dim: int,
        dtype: torch.dtype | None = None,
        *,
        columns: Mapping[str, int] | None = None,
        init_std: float | Mapping[str, float] = 1.0,
        seed: int = 0,
        moments: bool = True,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        num_rows, dim = _size("num_rows", num_rows), _size("dim", dim)
        columns = {"weight": dim} if columns is None else columns
        widths = {name: _size(f"the width of column {name!r}", width) for name, width in columns.items()}
        if sum(widths.values()) != dim:
            raise ValueError(f"columns must sum to dim={dim}; got {widths}")
        dtype = dtype or torch.get_default_dtype()
        if dtype not in DTYPES:
            raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}; got {dtype}")
        stds = _std_by_column(init_std, widths)
        self.store = RowStore(num_rows, widths, dtype, torch.device(device or "cpu"), moments)
        for name, parameter in zip(widths, self.store.parameters, strict=True):
            self._parameters[name] = parameter  # not register_parameter: `weight` is a property here
        self._fill_normal(stds, seed)

    @property
    def num_rows(self) -> int:
        return self.store.num_rows

    @property
    def dim(self) -> int:
        return self.store.dim

    @torch.no_grad()
    def _fill_normal(self, stds: Mapping[str, float], seed: int) -> None:
        store = self.store
        for block in store.blocks():
            rows = torch.arange(block.start, block.stop, device=store.values.device)
            for name, span in zip(store.names, store.slices, strict=True):
                if stds[name]:
                    noise = ops.philox_normal(seed, "init", 0, rows, span.stop, draw=DRAW_ROWS)[:, span]
                    store.values[block, 0, span] = (noise * stds[name]).to(store.values.dtype)

    def forward(self, rows: Tensor) -> Tensor:
        """rows: int64, any shape [...], in 0 .. num_rows - 1. Returns [..., dim], up to date."""
        self.check_read(rows)
        flat = rows.reshape(-1).long()
        if self._needs_grad():
            values = ReadRows.apply(self.store, flat, *self.store.parameters)
        else:
            values = self.store.read(flat)
        return values.view(*rows.shape, self.dim)

    def check_read(self, rows: Tensor) -> None:
        """Raise unless rows can be read as they are, and trained if their gradient is wanted."""
        ops.check_rows(rows, self.num_rows)
        ops.check_one_device(table=self.store.values, rows=rows)
        if not torch.compiler.is_compiling():
            self._check_memory()
        if self._needs_grad():
            self._check_optimizer()

    def _needs_grad(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.store.parameters)

    def _check_memory(self) -> None:
        for index, (name, parameter) in enumerate(zip(self.store.names, self.store.parameters, strict=True)):
            if self._parameters[name] is not parameter or not self.store.in_own_memory(index):
                raise RuntimeError(
                    f"the parameter {name!r} of this RowTable was replaced, or its memory was (by p.data = ..., "
                    "torch.func.functional_call or the like), but rows are read from the table's own memory: write "
                    "values with table.assign(values, name)"
                )

    def _check_optimizer(self) -> None:
        for index, parameter in enumerate(self.store.parameters):
            if parameter.requires_grad and self.store.owner(index) is None:
                raise RuntimeError(
                    f"no RowAdam trains the column range {self.store.names[index]!r} of this RowTable, and no other "
                    "optimiser can: make rvi_fast.optim.RowAdam(model.parameters()) before the first forward and keep "
                    "it, freeze the range with requires_grad_(False), or read under torch.no_grad()"
                )

    @property
    def weight(self) -> Tensor:
        """All rows [num_rows, dim], up to date, differentiable where the rows require grad (an L2 term, tied weights).

        Before a RowAdam trains the table this is the parameter itself, if there is one alone (nn.init can fill it).
        From then on it is a copy, and writing into it is lost: use assign.
        """
        if not self.store.modes and len(self.store.parameters) == 1:
            return self.store.parameters[0]
        if self._needs_grad():
            return ReadRows.apply(self.store, None, *self.store.parameters)
        return self.store.read_all(0)

    def read(self, name: str) -> Tensor:
        """One column range of all rows, up to date, as a copy [num_rows, width]."""
        return self.store.read_all(0, self._index(name))

    def assign(self, values: Tensor, name: str | None = None) -> None:
        """Overwrite all rows, or one column range of them, with values [num_rows, width]; Adam's moments stay."""
        indices = range(len(self.store.names)) if name is None else [self._index(name)]
        width = self.dim if name is None else self.store.parameters[self._index(name)].shape[1]
        if tuple(values.shape) != (self.num_rows, width):
            raise ValueError(f"values must have shape [{self.num_rows}, {width}]; got {list(values.shape)}")
        for index in indices:
            self._parameters[self.store.names[index]] = self.store.parameters[index]
            span = self.store.slices[index]
            self.store.assign(index, values[:, span] if name is None else values)

    def _index(self, name: str) -> int:
        if name not in self.store.names:
            raise KeyError(f"this RowTable has the columns {', '.join(self.store.names)}; got {name!r}")
        return self.store.names.index(name)

    def drop_moments(self) -> None:
        """Give the memory of Adam's moments back (two thirds of the table); a new RowAdam then starts afresh."""
        self.store.drop_moments()

    def extra_repr(self) -> str:
        widths = ", ".join(f"{n}={s.stop - s.start}" for n, s in zip(self.store.names, self.store.slices, strict=True))
        return f"{self.num_rows}, {self.dim}" + (f", {widths}" if len(self.store.names) > 1 else "")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RowTable:
        self.store.apply(fn)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for index, name in enumerate(self.store.names):
            destination[prefix + name] = self.store.read_all(0, index)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for index, (name, parameter) in enumerate(zip(self.store.names, self.store.parameters, strict=True)):
            values = state_dict.get(prefix + name)
            if prefix + name not in state_dict:
                missing_keys.append(prefix + name)
            elif not isinstance(values, Tensor):
                error_msgs.append(f"{prefix + name}: expected a tensor, found {type(values).__name__}")
            elif values.shape != parameter.shape:
                error_msgs.append(
                    f"{prefix + name}: expected shape {list(parameter.shape)}, found {list(values.shape)}"
                )
            else:
                self.store.assign(index, values)
        own = {prefix + name for name in self.store.names}
        unexpected_keys.extend(k for k in state_dict if strict and k.startswith(prefix) and k not in own)


class _RowPosterior(nn.Module):
    """What both posteriors share: a table of rows, keyed noise, and reading without a sample."""

    def __init__(self, table: RowTable, latent_dim: int, seed: int):
        super().__init__()
        self.table = table
        self.latent_dim = latent_dim
        self.seed = seed

    @property
    def num_rows(self) -> int:
        return self.table.num_rows

    @property
    def step(self) -> Tensor:
        """Steps taken by RowAdam, int64 [] on the table's device: the noise's step number."""
        return self.table.store.step

    def get_extra_state(self) -> Tensor:
        return self.step.clone()

    def set_extra_state(self, state: Tensor) -> None:
        self.step.copy_(state)

    def forward(
        self, rows: Tensor, *, sample: bool | None = None, seed: int | None = None, step: int | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """z [B, T] ~ q(z|x_rows) and KL(q || N(0, I)) [B], in nats.

        rows: int64 [B]. sample: False gives the mean; None follows self.training. seed, step: of the keyed noise; None
        takes the module's seed and the number of steps that RowAdam has taken. A row's noise depends on these and on
        its index alone.
        """
        return self.sample_values(
            self._read(rows),
            row_ids=rows,
            stream="train",
            step=self.step if step is None else step,
            sample=self.training if sample is None else sample,
            seed=seed,
        )

    def _read(self, rows: Tensor) -> Tensor:
        self._check_rows(rows)
        return self.table(rows)

    def _check_rows(self, rows: Tensor) -> None:
        ops.check_rows(rows, self.num_rows)
        if rows.dim() != 1:
            raise ValueError(f"rows must have shape [B]; got {list(rows.shape)}")

    def noise(
        self, row_ids: Tensor, stream: str, step: int | Tensor, *, seed: int | None = None, draw: int = 0
    ) -> Tensor:
        """The keyed standard normals of rows, [B, T]."""
        seed = self.seed if seed is None else seed
        dtype = self.table.store.values.dtype
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{type(self).__name__} samples in float32 or float64, not in {dtype}: keep it in float32 and use "
                "torch.autocast around the rest of the model"
            )
        return ops.philox_normal(seed, stream, step, row_ids.long(), self.latent_dim, draw=draw, dtype=dtype)

    def sample_values(
        self,
        values: Tensor,
        *,
        row_ids: Tensor,
        stream: str,
        step: int | Tensor = 0,
        sample: bool = True,
        seed: int | None = None,
        draw: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """z [B, T] and kl [B] of row parameters `values` [B, C], of this table or of new rows."""
        noise = self.noise(row_ids, stream, step, seed=seed, draw=draw) if sample else None
        return self._sample(values, noise)

    def _sample(self, values: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def mean_of(self, values: Tensor) -> Tensor:
        """Posterior mean [B, T] of row parameters [B, C]."""
        return self._sample(values, None)[0]

    def log_std_of(self, values: Tensor) -> Tensor:
        """Log of the posterior's standard deviation [B, T], of row parameters [B, C]."""
        return values[:, self.table.store.slices[-1]]

    def moved(self, values: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
        """Row parameters like `values` [B, C], of the posteriors N(mean, exp(log_std)^2) [B, T]; coefficients stay."""
        values = values.clone()
        *_, residual, spread = self.table.store.slices
        values[:, residual] += mean - self.mean_of(values)
        values[:, spread] = log_std
        return values

    def initial_values(self, row_ids: Tensor) -> Tensor:
        """Row parameters [B, C] from which a new row with this id (int64 [B]) starts."""
        raise NotImplementedError

    def set_prior(self, rows: Tensor) -> None:
        """Give rows (int64 [B]) the prior N(0, I): all of a row's parameters are zero there."""
        self.table.store.assign_rows(rows, self.table.store.values.new_zeros(len(rows), self.table.dim))

    def mean(self, rows: Tensor) -> Tensor:
        """Posterior mean [B, T] of rows (int64 [B])."""
        return self.mean_of(self._read(rows))

    def log_std(self, rows: Tensor) -> Tensor:
        """Log of the posterior's standard deviation [B, T] of rows (int64 [B])."""
        return self.log_std_of(self._read(rows))

    def distribution(self, rows: Tensor) -> torch.distributions.Normal:
        """q(z|x_rows) as a torch distribution over [B, T]."""
        values = self._read(rows)
        return torch.distributions.Normal(self.mean_of(values), self.log_std_of(values).exp())


class SampleRows(torch.autograd.Function):
    """z and KL straight from a posterior's table in one launch, with gradients that hold the batch's rows alone."""

    @staticmethod
    def forward(
        ctx: Any,
        posterior: RelayPosterior,
        clock: Clock | None,
        rows: Tensor,
        seed: int,
        step: int | Tensor,
        sample: bool,
        relays: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        store, groups, active = posterior.table.store, posterior.groups, posterior.active
        z, kl, sampled = ops.relay_sample_rows(
            store.values, store.last, rows, clock, relays, groups, active, seed, step, sample
        )
        ctx.save_for_backward(relays, *sampled)
        ctx.store, ctx.groups, ctx.active, ctx.seed, ctx.sample = store, groups, active, seed, sample
        ctx.set_materialize_grads(False)
        return z, kl

    @staticmethod
    @ops.differentiable_once
    def backward(ctx: Any, grad_z: Tensor | None, grad_kl: Tensor | None) -> Any:
        relays, *sampled = ctx.saved_tensors
        needs_relays, *needs_rows = ctx.needs_input_grad[6:]
        needed = any(needs_rows), needs_relays
        by_rows, by_relays = ops.relay_sample_rows_backward(
            grad_z, grad_kl, ops.SampledRows(*sampled), relays, ctx.groups, ctx.active, ctx.seed, ctx.sample, needed
        )
        by_columns: list[Tensor | None] = [None] * len(needs_rows)
        if by_rows is not None:
            by_columns = ctx.store.row_grads(sampled[0], by_rows, needs_rows)
        return *(None,) * 6, by_relays, *by_columns


class RelayPosterior(_RowPosterior):
    """q(z|x_i) = N(mu_i, diag(sigma_i^2)) with mu_i = sum of a_ik r_k over the selected relays + e_i (eqs. 3 to 5).

    num_rows, latent_dim: N and T. groups: relays in each group. active: |B| of each group, an int (a count) or a float
    in (0, 1] (a share), or one for each group; 1 is the clustering form, 1.0 takes all relays. coefficients: "linear",
    or "softmax" (the mixture form). relay_std, coef_std, residual_std, log_std: initial values; seed: of initial
    values and noise.
    """

    def __init__(
        self,
        num_rows: int,
        latent_dim: int,
        groups: Sequence[int] = (25, 50, 100),
        active: int | float | Sequence[int | float] = 0.5,
        *,
        coefficients: str = "linear",
        relay_std: float = 1.0,
        coef_std: float = 0.1,
        residual_std: float = 0.01,
        log_std: float = -2.0,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        moments: bool = True,
    ):
        latent_dim = _size("latent_dim", latent_dim)
        groups = ops.check_groups(groups)
        counts = ops.active_counts(groups, active)
        if coefficients not in ops.COEFFICIENTS:
            raise ValueError(f"coefficients must be 'linear' or 'softmax'; got {coefficients!r}")
        num_relays = sum(groups)
        widths = {"coef": num_relays, "residual": latent_dim, "log_std": latent_dim}
        init_std = {"coef": coef_std, "residual": residual_std, "log_std": 0.0}
        table = RowTable(
            num_rows, sum(widths.values()), dtype, columns=widths, init_std=init_std, seed=seed, moments=moments
        )
        super().__init__(table, latent_dim, seed)
        self.groups, self.active, self.coefficients = groups, counts, coefficients
        self.init_std, self.init_log_std = init_std, float(log_std)
        table.store.values[:, 0, table.store.slices[2]] = self.init_log_std
        relays = ops.philox_normal(seed, "init", 0, torch.arange(num_relays), latent_dim, draw=DRAW_RELAYS)
        self.relays = nn.Parameter((relay_std * relays).to(table.store.values.dtype))

    def forward(
        self, rows: Tensor, *, sample: bool | None = None, seed: int | None = None, step: int | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        store = self.table.store
        alike, clock = store.one_clock()
        if not (alike and ops.samples_in_one_launch(store.values, self.coefficients)):
            return super().forward(rows, sample=sample, seed=seed, step=step)
        self._check_rows(rows)
        self.table.check_read(rows)
        seed = self.seed if seed is None else seed
        step = self.step if step is None else step
        sample = self.training if sample is None else sample
        return SampleRows.apply(self, clock, rows.long(), seed, step, sample, self.relays, *store.parameters)

    forward.__doc__ = _RowPosterior.forward.__doc__

    def _sample(self, values: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        coef, residual, log_std = (values[:, span] for span in self.table.store.slices)
        return ops.relay_sample(
            coef, residual, log_std, self.relays, self.groups, self.active, noise, self.coefficients
        )

    def initial_values(self, row_ids: Tensor) -> Tensor:
        num_relays = self.relays.shape[0]
        noise = ops.philox_normal(self.seed, "init", 0, row_ids, num_relays + self.latent_dim, draw=DRAW_ROWS)
        coef, residual = noise.split([num_relays, self.latent_dim], dim=1)
        log_std = torch.full_like(residual, self.init_log_std)
        values = torch.cat((self.init_std["coef"] * coef, self.init_std["residual"] * residual, log_std), dim=1)
        return values.to(self.relays.dtype)

    def partial_mean_of(self, values: Tensor, up_to_group: int | None, residual: bool) -> Tensor:
        """The mean [B, T] from the first `up_to_group` groups only (None: all), with or without the residual."""
        used = len(self.groups) if up_to_group is None else up_to_group
        if not 0 <= used <= len(self.groups):
            raise ValueError(f"up_to_group must lie in 0 .. {len(self.groups)}; got {up_to_group}")
        coef, rest, _ = (values[:, span] for span in self.table.store.slices)
        mean = rest if residual else torch.zeros_like(rest)
        if used:
            width = sum(self.groups[:used])
            args = (self.relays[:width], self.groups[:used], self.active[:used], self.coefficients)
            mean = mean + ops.relay_mean(coef[:, :width], *args)
        return mean

    def extra_repr(self) -> str:
        return f"latent_dim={self.latent_dim}, groups={self.groups}, active={self.active}"


class MeanFieldPosterior(_RowPosterior):
    """q(z|x_i) = N(mu_i, diag(sigma_i^2)) with mu_i free: the variational auto-decoder (VAD), RVI without relays.

    mean_std, log_std: initial values; seed: of initial values and noise.
    """

    def __init__(
        self,
        num_rows: int,
        latent_dim: int,
        *,
        mean_std: float = 0.01,
        log_std: float = -2.0,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        moments: bool = True,
    ):
        latent_dim = _size("latent_dim", latent_dim)
        widths = {"mean": latent_dim, "log_std": latent_dim}
        init_std = {"mean": mean_std, "log_std": 0.0}
        table = RowTable(num_rows, 2 * latent_dim, dtype, columns=widths, init_std=init_std, seed=seed, moments=moments)
        super().__init__(table, latent_dim, seed)
        self.init_std, self.init_log_std = init_std, float(log_std)
        table.store.values[:, 0, table.store.slices[1]] = self.init_log_std

    def _sample(self, values: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        mean, log_std = (values[:, span] for span in self.table.store.slices)
        return ops.gaussian_sample(mean, log_std, noise)

    def initial_values(self, row_ids: Tensor) -> Tensor:
        noise = ops.philox_normal(self.seed, "init", 0, row_ids, self.latent_dim, draw=DRAW_ROWS)
        values = torch.cat((self.init_std["mean"] * noise, torch.full_like(noise, self.init_log_std)), dim=1)
        return values.to(self.table.store.values.dtype)

    def extra_repr(self) -> str:
        return f"latent_dim={self.latent_dim}"


class MLPDecoder(nn.Module):
    """z [B, T] -> xhat [B, D] through hidden layers, and beside them a linear path from z if asked for.

    hidden: widths, () for a linear decoder. linear_path: the last layer also sees z itself. activation: "relu", "silu",
    "tanh" or "gelu". The last layer, `head`, is applied to features(z).
    """

    def __init__(
        self,
        latent_dim: int,
        out_dim: int,
        hidden: Sequence[int] = (64, 64),
        *,
        linear_path: bool = False,
        activation: str = "relu",
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        latent_dim, out_dim = _size("latent_dim", latent_dim), _size("out_dim", out_dim)
        widths = (latent_dim, *(_size("hidden", width) for width in hidden))
        self.linear_path = linear_path and bool(hidden)
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(widths):
            layers += [nn.Linear(n_in, n_out), ACTIVATIONS[activation]()]
        self.mlp = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1] + (latent_dim if self.linear_path else 0), out_dim)

    def features(self, z: Tensor) -> Tensor:
        """The last layer's input [B, H]."""
        h = self.mlp(z)
        return torch.cat((h, z), dim=1) if self.linear_path else h

    def forward(self, z: Tensor) -> Tensor:
        return self.head(self.features(z))
