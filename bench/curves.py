"""Do all who claim dense Adam train alike? Loss curves from one file of initial values, batches and noise."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rvi_fast import data, masks
from rvi_fast.functional import philox_normal

from .contestants import APART, EAGER, ENTRIES, JAX, OURS, Make
from .results import Line
from .settings import Setting
from .steps import Data, DenseAdamStep, Peer, Sizes

STEPS, TOLERANCE = 24, 2e-5  # of a check before a time; the largest relative difference of a loss from float64's,
ROUNDING = 1.5  # or as many times that of eager float32, where rounding tips a selection over
DRAWS = 2  # of the data, at most: a contestant that follows dense Adam does so with one of them
CHECK_BATCH, CHECK_EPOCHS = 1024, 6  # rows a batch at most; a row is met in each epoch
LONG_STEPS, LONG_ROWS, LONG_MISSING = 200, 10_000, (0.0, 0.5)
LONG_CONTESTANTS = (OURS, APART, EAGER, JAX)
SEED = 0  # of rvi_fast's own noise, which the others take from the file
CPU = torch.device("cpu")


class Start(NamedTuple):
    """What all contestants of a check begin with, and see."""

    values: dict[str, Tensor]
    x: Tensor  # float32 [N, D]
    mask: Tensor
    rows: Tensor  # int64 [S, B], without repeats in a batch
    noise: Tensor  # [S, B, T]


def make_start(sizes: Sizes, x: Tensor, mask: Tensor, batch: int, steps: int) -> Start:
    """Initial values as the library's, epochs of random batches, keyed noise."""
    draw = torch.Generator().manual_seed(1)

    def normal(std: float, *shape: int) -> Tensor:
        return std * torch.randn(shape, generator=draw)

    def uniform(most: float, *shape: int) -> Tensor:  # as nn.Linear has them
        return most * (2 * torch.rand(shape, generator=draw) - 1)

    n, k, t = sizes.num_rows, sum(sizes.groups), sizes.latents
    values = {"coef": normal(0.1, n, k), "residual": normal(0.01, n, t), "log_std": torch.full((n, t), -2.0)}
    values["relays"] = normal(1.0, k, t)
    for number, (n_in, n_out) in enumerate(sizes.layers):
        values |= {f"weight{number}": uniform(n_in**-0.5, n_out, n_in), f"bias{number}": uniform(n_in**-0.5, n_out)}
    per_epoch = n // batch
    epochs = [torch.randperm(n, generator=draw)[: per_epoch * batch] for _ in range(-(-steps // per_epoch))]
    rows = torch.cat(epochs).view(-1, batch)[:steps]
    noise = torch.stack([philox_normal(SEED, "train", step, rows[step], t) for step in range(steps)])
    return Start(values, x, mask, rows, noise)


def write_start(start: Start, path: Path) -> None:
    arrays = start._asdict() | start.values
    del arrays["values"]
    np.savez(path, **{name: tensor.numpy() for name, tensor in arrays.items()})


def read_start(path: Path, device: torch.device = CPU) -> Start:
    with np.load(path) as file:
        arrays = {name: torch.from_numpy(file[name]).to(device) for name in file.files}
    fields = [arrays.pop(name) for name in Start._fields[1:]]
    return Start(arrays, *fields)


def check_start(setting: Setting) -> Start:
    """The setting's model on few enough rows that every one of them is met again and again."""
    batch = min(setting.batch, CHECK_BATCH)
    rows = batch * STEPS // CHECK_EPOCHS
    sizes = setting.sizes(rows)
    x, mask = Data(sizes, setting.missing).on(CPU)
    return make_start(sizes, x, mask, batch, STEPS)


def train(peer: Peer, start: Start, device: torch.device) -> np.ndarray:
    """The losses of a fresh contestant, float64 [S]."""
    peer.make(device)
    peer.load(start.values)
    return peer.train(start.rows, start.noise).cpu().double().numpy()


def eager(sizes: Sizes, start: Start, dtype: torch.dtype = torch.float64) -> np.ndarray:
    """Losses of the eager model under torch's own Adam; in float64 they are the truth."""
    there = Data.of(sizes, start.x.cpu().to(dtype), start.mask.cpu())
    on_cpu = Start({k: v.cpu() for k, v in start.values.items()}, *(t.cpu() for t in start[1:]))
    return train(DenseAdamStep(sizes, there, None, adam="foreach", dtype=dtype), on_cpu, CPU)


def difference(losses: np.ndarray, truth: np.ndarray) -> float:
    """The largest relative one; inf where a loss is not a number."""
    found = np.max(np.abs(losses - truth) / np.abs(truth))
    return float(found) if np.isfinite(found) else float("inf")


class Checks:
    """Which contestants follow dense Adam, in one setting: all train from the same file."""

    def __init__(self, setting: Setting, path: Path, device: torch.device, dry: bool):
        write_start(check_start(setting), path)
        self.start = read_start(path, device)
        self.sizes = setting.sizes(len(self.start.x))
        self.device, self.dry = device, dry
        self.truth = eager(self.sizes, self.start)

    def difference(self, make: Make) -> float:
        there = Data.of(self.sizes, self.start.x, self.start.mask)
        peer = make(self.sizes, there, self.device, self.dry)
        return difference(train(peer, self.start, self.device), self.truth)

    @functools.cached_property
    def rounding(self) -> float:
        """The difference of eager float32."""
        return difference(eager(self.sizes, self.start, torch.float32), self.truth)

    def objection(self, difference: float) -> str:
        """Why a contestant's time would mean nothing, or nothing."""
        if difference <= TOLERANCE or difference <= ROUNDING * self.rounding:
            return ""
        return f"curve differs by {difference:.1e}, no time"


# the long curves


def images(rows: int, name: str, load: Callable[[], Any]) -> tuple[str, np.ndarray]:
    """What `load` reads if it is at hand, or else scikit-learn's digits: float32 in [0, 1]."""
    try:
        return name, load()[0][:rows].astype(np.float32) / 255
    except FileNotFoundError:
        return "digits", data.digits()[0][:rows]


def long_curves(device: torch.device, folder: Path, small: bool = False) -> list[Line]:
    """200 steps with and without holes: a line for each contestant, which is printed and kept as it comes."""
    name, X = images(200 if small else LONG_ROWS, "fashion-mnist", data.fashion_mnist)
    lines = []
    for missing in LONG_MISSING:
        setting = Setting("curves", "none", len(X), X.shape[1], missing=missing, batch=32 if small else 256)
        mask = torch.from_numpy(masks.mcar(X.shape, missing, seed=0))
        start = make_start(setting.sizes(), torch.from_numpy(X), mask, setting.batch, 30 if small else LONG_STEPS)
        path = folder / "start.npz"
        write_start(start, path)
        for line in _curve_lines(setting, read_start(path, device), device):
            lines.append({"data": name, "missing": missing, "rows": len(X), "steps": len(start.rows), **line})
    return lines


LONG_FIELDS = ("difference", "median_difference", "steps_within")


def _long_difference(losses: np.ndarray, truth: np.ndarray) -> Line:
    """Largest and median relative difference, and how many steps pass before one exceeds the tolerance.

    Rounding decides between coefficients that are nearly equal; from the first such step on a row takes other relays,
    in float32 by anyone.
    """
    relative = np.abs(losses - truth) / np.abs(truth)
    beyond = np.flatnonzero(~(relative <= TOLERANCE))
    within = int(beyond[0]) if len(beyond) else len(losses)
    values = difference(losses, truth), float(np.median(relative)), within
    return dict(zip(LONG_FIELDS, values, strict=True))


def _curve_lines(setting: Setting, start: Start, device: torch.device) -> list[Line]:
    sizes, there = setting.sizes(), Data.of(setting.sizes(), start.x, start.mask)
    exact = eager(sizes, start)
    lines = []
    for entry in ENTRIES:
        if entry.name in LONG_CONTESTANTS:
            found, note = dict.fromkeys(LONG_FIELDS), entry.absent()
            if not note:
                found = _long_difference(train(entry.make(sizes, there, device, False), start, device), exact)
            ends = {"first_loss": exact[0], "last_loss": exact[-1]}
            lines.append({"contestant": entry.name, **found, **ends, "note": note})
    return lines
