"""Time to quality: seconds until RVI is as good on missing cells as a tuned VAD in the end, by each implementation.

MNIST (or scikit-learn's digits) with half of the cells missing. VAD, the same model without relays, is trained with
each pair of rates of the grid; the pair with the least error on cells hidden from training gives the target: its error
on missing cells at the end. RVI's pair is the one that soonest has VAD's error on hidden cells. Then every
implementation trains RVI from the same values, on the same batches with the same noise, for at most twice VAD's epochs,
and is timed until it reaches the target. Evaluation is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rvi_fast import data, masks, reference
from rvi_fast.defaults import PAPER_SCALE

from .contestants import APART, DENSE, EAGER, OURS
from .curves import Start, images, make_start, read_start, write_start
from .results import Line
from .settings import Setting
from .steps import LR, Data, DenseAdamStep, Peer, RowAdamStep, Sizes, Values

RATES = ((LR, LR), (3e-3, 3e-3), (1e-2, 1e-2), (1e-2, 1e-3), (3e-2, 3e-3))  # of rows, of decoder and relays
ROWS, EPOCHS, MISSING, HIDDEN = 4_000, 60, 0.5, 0.1
LONGER = 2  # RVI may take so many times VAD's epochs
LOOKS = 2  # times an epoch that the error is taken while we wait for the target
BLOCK = 1000


class Cells(NamedTuple):
    """Data [N, D]; mask: cells to train on; hidden: observed cells that choose the rates; missing: the holes."""

    x: Tensor
    mask: Tensor
    hidden: Tensor
    missing: Tensor


def cells(rows: int) -> tuple[str, Cells]:
    name, X = images(rows, "mnist", data.mnist)
    observed = masks.mcar(X.shape, MISSING, seed=0)
    hidden = observed & ~masks.mcar(X.shape, HIDDEN, seed=1)
    return name, Cells(*map(torch.from_numpy, (X, observed & ~hidden, hidden, ~observed)))


def reconstruction(sizes: Sizes, values: Values) -> Tensor:
    """At the posterior mean, [N, D]."""
    if sizes.groups:
        mean = reference.relay_mean(values["coef"], values["relays"], sizes.groups, sizes.active) + values["residual"]
    else:
        mean = values["mean"]
    layers = [(values[f"weight{i}"], values[f"bias{i}"]) for i in range(len(sizes.layers))]
    return torch.cat([reference.mlp_decoder(z, layers, "relu", False) for z in mean.split(BLOCK)])


@torch.no_grad()
def error(peer: Peer, cells: Cells, where: Tensor) -> float:
    """The elastic error on the cells `where`, rows in float32 and their sum in float64."""
    r = (cells.x - reconstruction(peer.sizes, peer.values())).abs_()
    return float(((r + r * r) * where).sum(1).double().sum() / where.sum())


def tuned_vad(sizes: Sizes, cells: Cells, start: Start) -> tuple[tuple[float, float], float, float]:
    """The pair of rates with the least error on hidden cells after EPOCHS: the pair, that error, that on missing."""
    found = []
    for rates in RATES:
        peer = RowAdamStep(sizes, Data.of(sizes, cells.x, cells.mask), fused=True, rates=rates)
        peer.make(cells.x.device)
        peer.run(start.rows[: len(start.rows) // LONGER])
        found.append((error(peer, cells, cells.hidden), rates, error(peer, cells, cells.missing)))
    least, rates, missing = min(found)
    return rates, least, missing


def fastest_rvi(sizes: Sizes, cells: Cells, start: Start, target: float) -> tuple[float, float]:
    """The pair of rates that soonest has VAD's error on hidden cells, or else the least one in the end."""
    found = []
    for rates in RATES:
        peer = RowAdamStep(sizes, Data.of(sizes, cells.x, cells.mask), fused=True, rates=rates)
        peer.make(cells.x.device)
        peer.load(start.values)
        reached = reach(peer, start, cells, cells.hidden, target)
        found.append((reached.seconds is None, reached.steps, reached.error, rates))
    return min(found)[-1]


class Reached(NamedTuple):
    """Seconds of training until an error was at its target, None where it never was; steps; the error then."""

    seconds: float | None
    steps: int
    error: float


def reach(peer: Peer, start: Start, cells: Cells, where: Tensor, target: float) -> Reached:
    every = max(1, len(cells.x) // start.rows.shape[1] // LOOKS)
    seconds, found = 0.0, float("inf")
    for done in range(0, len(start.rows), every):
        rows, noise = start.rows[done : done + every], start.noise[done : done + every]
        began = time.perf_counter()
        peer.train(rows, noise).sum().item()
        seconds += time.perf_counter() - began
        found = error(peer, cells, where)
        if found <= target:
            return Reached(seconds, done + len(rows), found)
    return Reached(None, len(start.rows), found)


def measure(device: torch.device, folder: Path, dry: bool) -> list[Line]:
    """A line for each implementation."""
    name, found = cells(200 if dry else ROWS)
    setting = Setting("quality", "none", len(found.x), found.x.shape[1], batch=32 if dry else 256)
    sizes = setting.sizes()
    vad = Sizes(sizes.num_rows, sizes.columns, sizes.latents, sizes.hidden, (), (), PAPER_SCALE)
    epochs = 2 if dry else EPOCHS
    steps = LONGER * epochs * (sizes.num_rows // setting.batch)
    write_start(make_start(sizes, found.x, found.mask, setting.batch, steps), folder / "start.npz")
    start, there = read_start(folder / "start.npz", device), Cells(*(t.to(device) for t in found))
    vad_rates, vad_hidden, target = tuned_vad(vad, there, start)
    rates = fastest_rvi(sizes, there, start, vad_hidden)
    lines: list[Line] = []
    ways: dict[str, Callable[[Data], Peer]] = {
        OURS: lambda d: RowAdamStep(sizes, d, fused=True, rates=rates),
        APART: lambda d: RowAdamStep(sizes, d, fused=False, rates=rates),
        EAGER: lambda d: DenseAdamStep(sizes, d, None, rates=rates),
    }
    for way, make in ways.items():
        peer = make(Data.of(sizes, there.x, there.mask))
        peer.make(device)
        _first_call(make, sizes, start, there)
        peer.load(start.values)
        seconds, taken, end = reach(peer, start, there, there.missing, target)
        ours = lines[0]["seconds"] if lines else seconds
        lines.append(
            {
                "data": name,
                "rows": sizes.num_rows,
                "missing": MISSING,
                "implementation": way,
                "algorithm": DENSE,
                "target": target,
                "error": end,
                "seconds": seconds,
                "steps": taken,
                "times_ours": seconds / ours if seconds and ours else None,
                "row_lr": rates[0],
                "lr": rates[1],
                "vad_row_lr": vad_rates[0],
                "vad_lr": vad_rates[1],
                "vad_hidden_error": vad_hidden,
                "epochs": epochs,
            }
        )
        print(f"{way}: {'not reached' if seconds is None else f'{seconds:.2f} s'}", flush=True)
    return lines


def _first_call(make: Callable[[Data], Peer], sizes: Sizes, start: Start, cells: Cells) -> None:
    """One step of another copy: what is compiled or set up once is not part of training."""
    peer = make(Data.of(sizes, cells.x, cells.mask))
    peer.make(cells.x.device)
    peer.load(start.values)
    peer.train(start.rows[:1], start.noise[:1])
