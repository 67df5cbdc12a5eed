"""How long, how fast and in what order to train, and how far a run has come."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch

from .. import arguments, reference

VALIDATION_ROWS = 4096  # early stopping looks at hidden cells of at most this many rows

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}


@dataclasses.dataclass
class Plan:
    """How long, how fast and in what order to train."""

    batch_size: int = 256
    epochs: int = 100
    max_steps: int | None = None
    schedule: str = "constant"
    seed: int = 0  # of the order of rows
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # a constant
    patience: int = 10  # epochs without a lower error on hidden cells
    buffer: tuple[int, int] | None = None  # rows a block, blocks shuffled together; None: all rows

    def __post_init__(self) -> None:
        self.device = torch.device(self.device)
        for name in ("batch_size", "epochs"):
            arguments.positive_int(name, getattr(self, name))
        arguments.positive_int("max_steps", self.max_steps, None)
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {self.schedule!r}")

    def total_steps(self, num_rows: int) -> int:
        steps = self.epochs * self.steps_per_epoch(num_rows)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def steps_per_epoch(self, num_rows: int) -> int:
        return -(-num_rows // self.batch_size)

    def order(self, epoch: int, num_rows: int) -> np.ndarray:
        """The rows of an epoch: a permutation keyed by (seed, epoch), block by block where the data are read so."""
        if self.buffer is None:
            return reference.permutation(self.seed, epoch, num_rows).numpy()
        return reference.block_permutation(self.seed, epoch, num_rows, *self.buffer).numpy()

    def validation_rows(self, num_rows: int) -> np.ndarray:
        """At most VALIDATION_ROWS rows, spread evenly; as pieces of one buffer's blocks where the data are read so."""
        if self.buffer is None:
            return np.unique(np.linspace(0, num_rows - 1, min(num_rows, VALIDATION_ROWS)).astype(np.int64))
        block_rows, blocks = self.buffer
        starts = np.linspace(0, num_rows - 1, min(blocks, VALIDATION_ROWS)).astype(np.int64) // block_rows * block_rows
        rows = starts[:, None] + np.arange(min(block_rows, max(1, VALIDATION_ROWS // blocks)))
        return np.unique(rows[rows < num_rows])


@dataclasses.dataclass
class Progress:
    """How far a training run has come; `history` has one entry an epoch."""

    step: int = 0
    history: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    sums: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.0, 0.0])  # nll, kl, rows of this epoch
    stopped: str = "running"  # then "completed", "early", "callback", "interrupted" or "failed"
