"""What every operator is timed on: its inputs, the ways to do the same work, and the least that must be moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import rvi_fast
from rvi_fast import functional, ops, reference
from rvi_fast.functional import AdamClock, AdamHyper, Columns
from rvi_fast.ops.elbo import ElboModel, shared_views
from rvi_fast.ops.fit_rows import PRECISIONS
from rvi_fast.ops.fit_rows import fit_rows as fit_new_rows

from . import steps

FLOAT = 4  # bytes
STEPS = 300  # that a table's clock has counted before it is timed


class Model(NamedTuple):
    """The sizes of a relay posterior and its decoder."""

    groups: tuple[int, ...]
    active: tuple[int, ...]
    latents: int

    @property
    def relays(self) -> int:
        return sum(self.groups)

    @property
    def width(self) -> int:
        """Columns of a table of rows: coefficients, residual, log std."""
        return self.relays + 2 * self.latents


PAPER = Model((25, 50, 100), (13, 25, 50), 64)
WIDE = Model((128, 256, 640), (64, 128, 320), 256)
HIDDEN, PIXELS, MANY_COLUMNS, SCALE = 64, 784, 20_000, 0.3
STEP_BATCHES = {256: 256, 65_536: 16_384}  # a whole step's batch, where it is another
FIT_STEPS = {256: 250, 65_536: 250}  # of new rows; otherwise a few


class Workload(NamedTuple):
    """An operator at one setting. ours, twin and the peers take the drawn inputs by name."""

    operator: str
    setting: str
    draw: Callable[[Draw, int], dict[str, Tensor]]  # of one input set, by its number
    ours: Callable[..., Any]
    twin: Callable[..., Any]
    bytes: int  # the least that a call must read and write
    peers: Mapping[str, Callable[..., Any]] = {}
    wrt: tuple[str, ...] = ()  # inputs that are differentiated: the backward pass is then part of a call
    flops: int = 0
    compiled: bool = True  # whether the twin under torch.compile takes part
    precision: str = "highest"  # of float32 products, on every side


class Draw:
    """Random inputs on a device."""

    def __init__(self, device: torch.device, seed: int = 0):
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def mask(self, *shape: int) -> Tensor:
        """Half of the entries."""
        return torch.randint(2, shape, generator=self.generator, device=self.device, dtype=torch.int8).bool()

    def rows(self, n: int, table: int) -> Tensor:
        return torch.randperm(table, generator=self.generator, device=self.device)[:n].sort().values


def differentiated(f: Callable[..., Any], inputs: dict[str, Tensor], wrt: Sequence[str]) -> Callable[[], Any]:
    """f(**inputs), and its gradients to `wrt` for gradients of the outputs that are drawn once."""
    if not wrt:
        return lambda: f(**inputs)
    given = {name: x.detach().requires_grad_(name in wrt) for name, x in inputs.items()}
    leaves = [given[name] for name in wrt]
    grads: list[Tensor] = []

    def call() -> tuple[Tensor, ...]:
        outputs = f(**given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not grads:
            grads.extend(torch.randn_like(out) for out in outputs)
        return torch.autograd.grad(outputs, leaves, grads)

    return call


def workloads(batches: Sequence[int], full: bool) -> Iterator[Workload]:
    """All workloads, the paper's sizes first. full: the large models and problems too."""
    for b in batches:
        yield philox_normal(b)
        for model in (PAPER, WIDE) if full else (PAPER,):
            yield relay_sample(b, model)
        yield relay_sample_rows(b)
        yield masked_gaussian_nll(b)
        yield masked_bernoulli_nll(b)
        for d in (PIXELS, MANY_COLUMNS) if full else (PIXELS,):
            for precision in ("highest", "high") if b > 1000 else ("highest",):
                yield linear_masked_gaussian_nll(b, d, precision)
        yield read_rows(b)
        yield row_adam(b)
        for precision in ("highest", "high") if b > 1000 else ("highest",):
            yield elbo_step(STEP_BATCHES.get(b, b), precision, compiler="inductor" if full else "eager")
        for products in PRECISIONS if b > 1000 else PRECISIONS[:1]:
            yield fit_rows(b, products, compiler="inductor" if full else "eager")


def philox_normal(b: int) -> Workload:
    t = PAPER.latents

    def draw(draw: Draw, number: int) -> dict[str, Tensor]:
        return {"rows": draw.rows(b, 4 * b), "step": torch.tensor(number, device=draw.device)}

    return Workload(
        "philox_normal", f"B={b} T={t}", draw,
        ours=lambda rows, step: functional.philox_normal(0, "train", step, rows, t),
        twin=lambda rows, step: reference.philox_normal(0, "train", step, rows, t),
        peers={"torch.randn (not keyed)": lambda rows, step: torch.randn(b, t, device=rows.device)},
        bytes=b * (t * FLOAT + 8),
    )  # fmt: skip


def relay_sample(b: int, model: Model) -> Workload:
    k, t = model.relays, model.latents
    wrt = ("coef", "residual", "log_std", "relays")

    def draw(draw: Draw, number: int) -> dict[str, Tensor]:
        shapes = {"coef": (b, k), "residual": (b, t), "log_std": (b, t), "relays": (k, t), "noise": (b, t)}
        return {name: draw.normal(*shape) for name, shape in shapes.items()}

    def sampled(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return reference.gaussian_sample(mean, log_std, noise), reference.gaussian_kl(mean, log_std)

    def ours(coef: Tensor, residual: Tensor, log_std: Tensor, relays: Tensor, noise: Tensor) -> Any:
        return functional.relay_sample(coef, residual, log_std, relays, model.groups, model.active, noise)

    def twin(coef: Tensor, residual: Tensor, log_std: Tensor, relays: Tensor, noise: Tensor) -> Any:
        mean = reference.relay_mean(coef, relays, model.groups, model.active) + residual
        return sampled(mean, log_std, noise)

    def largest(coef: Tensor) -> Tensor:
        """Columns of the active coefficients by topk: [B, sum of active]."""
        split = zip(coef.detach().abs().split(model.groups, 1), model.active, range(len(model.groups)), strict=True)
        firsts = [sum(model.groups[:g]) for g in range(len(model.groups))]
        return torch.cat([a.topk(n, 1, sorted=False).indices + firsts[g] for a, n, g in split], 1)

    def masked_mm(coef: Tensor, residual: Tensor, log_std: Tensor, relays: Tensor, noise: Tensor) -> Any:
        kept = coef * torch.zeros_like(coef).scatter_(1, largest(coef), 1.0)
        return sampled(kept @ relays + residual, log_std, noise)

    def bag(coef: Tensor, residual: Tensor, log_std: Tensor, relays: Tensor, noise: Tensor) -> Any:
        at = largest(coef)
        mean = F.embedding_bag(at, relays, per_sample_weights=coef.gather(1, at), mode="sum")
        return sampled(mean + residual, log_std, noise)

    return Workload(
        "relay_sample", f"B={b} K={k} T={t}", draw, ours, twin, wrt=wrt,
        peers={"topk, masked mm": masked_mm, "topk, F.embedding_bag": bag},
        bytes=FLOAT * (3 * b * k + 10 * b * t + 3 * k * t + 2 * b),
        flops=6 * b * k * t,
    )  # fmt: skip


def relay_sample_rows(b: int) -> Workload:
    """The form that reads, catches up and draws noise for the rows of a table, with the gradient of the rows."""
    k, t, width, n = PAPER.relays, PAPER.latents, PAPER.width, table_rows(b)
    tables, seed = (Table(n), Table(n)), 0

    def draw(draw: Draw, number: int) -> dict[str, Tensor]:
        given = drawn_rows(b, tables)(draw, number) | {
            "relays": draw.normal(k, t),
            "step": torch.tensor(number, device=draw.device),
        }
        return given | {"grad_z": draw.normal(b, t), "grad_kl": draw.normal(b)}

    def on(table: Table) -> Callable[..., Any]:
        def call(rows: Tensor, relays: Tensor, step: Tensor, grad_z: Tensor, grad_kl: Tensor) -> Any:
            given = (relays, PAPER.groups, PAPER.active, seed)
            values, last, clock = table.of(rows.device)
            z, kl, sampled = ops.relay_sample_rows(values, last, rows, clock, *given, step, sample=True)
            return z, kl, ops.relay_sample_rows_backward(grad_z, grad_kl, sampled, *given, sample=True)

        return call

    return Workload(
        "relay_sample", f"B={b} of a table, N={n} K={k} T={t}", draw, on(tables[0]), on(tables[1]),
        bytes=FLOAT * (6 * b * width + 2 * b * t + 3 * k * t + 2 * b) + 8 * b + 4 * b,
        flops=6 * b * k * t, compiled=False,
    )  # fmt: skip


def _observed(b: int, d: int) -> Callable[[Draw, int], dict[str, Tensor]]:
    def draw(draw: Draw, number: int) -> dict[str, Tensor]:
        x, scale = draw.normal(b, d).sigmoid(), torch.full((d,), SCALE, device=draw.device)
        return {"xhat": draw.normal(b, d), "x": x, "mask": draw.mask(b, d), "scale": scale}

    return draw


def _observed_bytes(b: int, d: int) -> int:
    """Output, x and mask read in both passes, the output's gradient written, a loss a row written and weighted."""
    return b * d * (5 * FLOAT + 2) + 2 * b * FLOAT + 2 * d * FLOAT


def masked_gaussian_nll(b: int) -> Workload:
    return Workload(
        "masked_gaussian_nll", f"B={b} D={PIXELS}", _observed(b, PIXELS),
        ours=functional.masked_gaussian_nll, twin=reference.masked_gaussian_nll,
        peers={
            "F.mse_loss, masked": lambda xhat, x, mask, scale: (
                (F.mse_loss(xhat, x, reduction="none") * mask).sum(1)
            )
        },
        wrt=("xhat",), bytes=_observed_bytes(b, PIXELS),
    )  # fmt: skip


def masked_bernoulli_nll(b: int) -> Workload:
    return Workload(
        "masked_bernoulli_nll", f"B={b} D={PIXELS}", _observed(b, PIXELS),
        ours=lambda xhat, x, mask, scale: functional.masked_bernoulli_nll(xhat, x, mask),
        twin=lambda xhat, x, mask, scale: reference.masked_bernoulli_nll(xhat, x, mask),
        peers={
            "F.binary_cross_entropy_with_logits": lambda xhat, x, mask, scale: (
                F.binary_cross_entropy_with_logits(xhat, x, weight=mask, reduction="none").sum(1)
            )
        },
        wrt=("xhat",), bytes=_observed_bytes(b, PIXELS),
    )  # fmt: skip


def linear_masked_gaussian_nll(b: int, d: int, precision: str) -> Workload:
    def draw(draw: Draw, number: int) -> dict[str, Tensor]:
        head = {"h": draw.normal(b, HIDDEN), "weight": draw.normal(d, HIDDEN) / 8, "bias": draw.normal(d)}
        scale = torch.full((d,), SCALE, device=draw.device)
        return {**head, "x": draw.normal(b, d), "mask": draw.mask(b, d), "scale": scale}

    parameters = b * HIDDEN + d * HIDDEN + d
    return Workload(
        "linear_masked_gaussian_nll", f"B={b} H={HIDDEN} D={d}", draw,
        ours=functional.linear_masked_gaussian_nll, twin=reference.linear_masked_gaussian_nll,
        peers={
            "F.linear, F.mse_loss": lambda h, weight, bias, x, mask, scale: (
                (F.mse_loss(F.linear(h, weight, bias), x, reduction="none") * mask).sum(1)
            )
        },
        wrt=("h", "weight", "bias"), precision=precision,
        bytes=b * d * (2 * FLOAT + 2) + FLOAT * (3 * parameters + 2 * b + 2 * d),
        flops=6 * b * HIDDEN * d,
    )  # fmt: skip


class Table:
    """A table of rows with a clock that has counted some steps, both made when first drawn from."""

    def __init__(self, num_rows: int):
        self.num_rows = num_rows
        self._made: tuple[Tensor, Tensor, AdamClock] | None = None

    def of(self, device: torch.device) -> tuple[Tensor, Tensor, AdamClock]:
        """values [N, 3, C], last [N] and the clock of all columns."""
        if self._made is None:
            values = Draw(device).normal(self.num_rows, 3, PAPER.width)
            values[:, 1] *= 1e-2
            values[:, 2].square_().mul_(1e-4)
            clock = AdamClock(AdamHyper(0.9, 0.999, 1e-8), device=device)
            clock.reserve(STEPS + steps.STEPS_AHEAD)
            with rvi_fast.backend("torch"):  # no kernel is compiled before its first call is timed
                for _ in range(STEPS):
                    clock.advance(steps.LR)
            self._made = values, torch.randint(STEPS, (self.num_rows,), device=device, dtype=torch.int32), clock
        return self._made

    def read(self, rows: Tensor) -> Any:
        values, last, clock = self.of(rows.device)
        return ops.read_rows(values, last, rows, [Columns(0, PAPER.width, clock)])

    def step(self, rows: Tensor, grad: Tensor) -> None:
        values, last, clock = self.of(rows.device)
        functional.row_adam_(values, last, rows, grad, [Columns(0, PAPER.width, clock)], [steps.LR], [0.0])


def drawn_rows(b: int, tables: Sequence[Table], grad: bool = False) -> Callable[[Draw, int], dict[str, Tensor]]:
    """Rows of the tables, which are made; and their gradient."""

    def draw(draw: Draw, number: int) -> dict[str, Tensor]:
        for table in tables:
            table.of(draw.device)
        drawn = {"rows": draw.rows(b, tables[0].num_rows)}
        return drawn | {"grad": draw.normal(b, PAPER.width)} if grad else drawn

    return draw


class TorchAdam:
    """One of torch's optimisers on a dense table; rows None: on a table of just the batch."""

    def __init__(self, num_rows: int | None, sparse: bool = False):
        self.num_rows, self.sparse = num_rows, sparse
        self.made: dict[int, torch.optim.Optimizer] = {}  # of a batch's own table, by its rows

    def __call__(self, rows: Tensor, grad: Tensor) -> None:
        key = rows.data_ptr() if self.num_rows is None else 0
        if key not in self.made:
            self.made[key] = self._make(grad)
        if self.sparse:
            table = self.made[key].param_groups[0]["params"][0]
            table.grad = torch.sparse_coo_tensor(
                rows[None], grad, table.shape, is_coalesced=True, check_invariants=False
            )
        self.made[key].step()

    def _make(self, grad: Tensor) -> torch.optim.Optimizer:
        table = torch.randn(self.num_rows or len(grad), grad.shape[1], device=grad.device).requires_grad_()
        if self.sparse:
            return torch.optim.SparseAdam([table], lr=steps.LR)
        table.grad = torch.randn_like(table)
        return torch.optim.Adam([table], lr=steps.LR, fused=True, capturable=grad.is_cuda)


def table_rows(b: int) -> int:
    """The paper's 60,000 rows for its batch, otherwise four batches."""
    return 60_000 if b == 256 else 4 * b


def read_rows(b: int) -> Workload:
    n, width = table_rows(b), PAPER.width
    ours, twin = tables = (Table(n), Table(n))
    return Workload(
        "read_rows", f"B={b} N={n} C={width}", drawn_rows(b, tables), ours.read, twin.read,
        peers={"index_select (no catch-up)": _Gather(n)},
        bytes=b * (2 * 3 * width * FLOAT + 8 + 4), compiled=False,
    )  # fmt: skip


class _Gather:
    """Rows of a table as they lie there."""

    def __init__(self, num_rows: int):
        self.num_rows = num_rows
        self.table: Tensor | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.randn(self.num_rows, 3 * PAPER.width, device=rows.device)
        return self.table.index_select(0, rows)


def row_adam(b: int) -> Workload:
    n, width = table_rows(b), PAPER.width
    ours, twin = tables = (Table(n), Table(n))
    return Workload(
        "row_adam_", f"B={b} N={n} C={width}", drawn_rows(b, tables, grad=True), ours.step, twin.step,
        peers={
            "Adam(fused), a table of B rows": TorchAdam(None),
            "Adam(fused), all N rows": TorchAdam(n),
            "SparseAdam (another algorithm)": TorchAdam(n, sparse=True),
        },
        bytes=b * (7 * width * FLOAT + 8 + 2 * 4), compiled=False,
    )  # fmt: skip


def elbo_step(b: int, precision: str, compiler: str) -> Workload:
    """A whole training step of the paper's model on rows of x in memory."""
    n = table_rows(b)
    sizes = steps.Sizes(n, PIXELS, PAPER.latents, (HIDDEN, HIDDEN), PAPER.groups, PAPER.active, SCALE)
    data = steps.Data(sizes)
    ours, twin, parts = (steps.RowAdamStep(sizes, data, fused) for fused in (True, True, False))

    def draw(draw: Draw, number: int) -> dict[str, Tensor]:
        data.on(draw.device)
        with rvi_fast.backend("torch"):
            for step in (ours, twin, parts):
                step.make(draw.device)
        return {"rows": draw.rows(b, n)}

    return Workload(
        "elbo_step", f"B={b} N={n} D={PIXELS}", draw, ours, twin,
        peers={
            "rvi_fast, operator by operator": parts,
            "dense Adam(fused)": steps.DenseAdamStep(sizes, data, None),
            "dense Adam(fused), torch.compile": steps.DenseAdamStep(sizes, data, compiler),
        },
        bytes=sizes.step_bytes(b, FLOAT), flops=sizes.step_flops(b), compiled=False, precision=precision,
    )  # fmt: skip


def fit_rows(b: int, products: str, compiler: str) -> Workload:
    """New rows of the paper's model, all of their steps and the ELBO after them."""
    steps_of_fit = FIT_STEPS.get(b, 10)
    model = ElboModel(PAPER.groups, PAPER.active, (HIDDEN, HIDDEN), False, "relu", "gaussian", SCALE, False, 1.0)
    shared = sum(torch.Size(shape).numel() for shape in model.shared_shapes(PAPER.latents, PIXELS))

    def draw(draw: Draw, number: int) -> dict[str, Tensor]:
        rates = torch.linspace(0.1, 0.0, steps_of_fit, dtype=torch.float64, device=draw.device)
        return {
            "start": 0.1 * draw.normal(b, PAPER.width), "row_ids": torch.arange(b, device=draw.device) + b * number,
            "x": draw.normal(b, PIXELS), "mask": draw.mask(b, PIXELS), "weights": 0.1 * draw.normal(shared),
            "rates": rates,
        }  # fmt: skip

    def fit(start: Tensor, row_ids: Tensor, x: Tensor, mask: Tensor, weights: Tensor, rates: Tensor) -> Tensor:
        given = start, row_ids, x, mask, weights, model, rates, AdamHyper(0.9, 0.999, 1e-8)
        return fit_new_rows(*given, seed=0, draws=8, precision=products).elbo

    return Workload(
        "fit_rows", f"B={b} D={PIXELS} {steps_of_fit} steps {products}", draw, fit, fit,
        peers={
            "a loop of steps, Adam(fused)": FitLoop(model, None),
            "a loop of steps, Adam(fused), torch.compile": FitLoop(model, compiler),
        },
        bytes=b * (PIXELS * (FLOAT + 1) + 3 * PAPER.width * FLOAT) + shared * FLOAT,
        flops=4 * b * steps_of_fit * shared, compiled=False,  # each weight once forwards, once back
        precision="highest" if products == "float32" else "high",
    )  # fmt: skip


class FitLoop:
    """What published code does for new rows, all of them in one batch: autograd and torch's Adam, step by step."""

    def __init__(self, model: ElboModel, compiler: str | None):
        self.model = model
        self.loss = self._loss if compiler is None else torch.compile(self._loss, backend=compiler, dynamic=False)

    def _loss(self, p: Tensor, noise: Tensor, x: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
        model = self.model
        relays, *layers = shared_views(weights, model.shared_shapes(noise.shape[1], x.shape[1]))
        pairs = list(zip(layers[::2], layers[1::2], strict=True))
        nll, kl = reference.row_losses(
            p, noise, x, mask, relays, pairs, torch.full((), model.scale, device=p.device), model.groups, model.active,
            model.activation, model.linear_path, model.likelihood,
        )  # fmt: skip
        return (nll + model.kl_weight * kl).sum()

    def __call__(
        self, start: Tensor, row_ids: Tensor, x: Tensor, mask: Tensor, weights: Tensor, rates: Tensor
    ) -> Tensor:
        p = start.clone().requires_grad_()
        adam = torch.optim.Adam([p], lr=0.1, fused=True, capturable=p.is_cuda)
        for _ in range(len(rates)):
            adam.zero_grad()
            self.loss(p, torch.randn(len(p), PAPER.latents, device=p.device), x, mask, weights).backward()
            adam.step()
        return p.detach()
