"""The training loop: keyed permutations, batches, steps, schedules, early stopping, interruption."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import reference
from .model import LatentModel
from .observations import ColumnUnits, HiddenCells, Observations
from .optim import RowAdam
from .row_store import RowParameter

BAR_DELAY_S = 2.0  # work shorter than this shows no bar
NUMBERS_FOR_THREADS = 1 << 18  # a batch with fewer numbers (its cells and its rows' parameters) trains on one thread
VALIDATION_ROWS = 4096  # early stopping looks at hidden cells of at most this many rows

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}


@dataclasses.dataclass
class Plan:
    """How long, how fast and in what order to train."""

    batch_size: int
    epochs: int
    max_steps: int | None
    schedule: str
    seed: int
    device: torch.device
    patience: int
    buffer: tuple[int, int] | None = None  # rows a block, blocks shuffled together; None: all rows

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


class Trainer:
    """Trains a model on the observed cells. `progress` can be saved and given back, to go on from there."""

    def __init__(
        self,
        model: LatentModel,
        optimizer: RowAdam,
        data: Observations,
        units: ColumnUnits,
        plan: Plan,
        hidden: HiddenCells | None = None,
    ):
        self.model, self.optimizer, self.data, self.units = model, optimizer, data, units
        self.plan, self.hidden = plan, hidden
        self.progress = Progress()
        self.base_lr = [group["lr"] for group in optimizer.param_groups]
        self.best: tuple[float, int, dict[str, Tensor]] | None = None
        self.total = plan.total_steps(len(data))

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """rows, x [B, D] in the model's units and the mask of cells to train on, on the device."""
        values, observed = self.data.read(rows)
        if self.hidden is not None:
            observed = observed & ~self.hidden.read(rows)
        x, mask = self.units.to_model(values, observed)
        device = self.plan.device
        return torch.from_numpy(rows).to(device), x.to(device), mask.to(device)

    def batches(self) -> Iterator[np.ndarray]:
        """The rows of each step that is still to come."""
        n, size = len(self.data), self.plan.batch_size
        per_epoch = self.plan.steps_per_epoch(n)
        order, order_epoch = np.empty(0, dtype=np.int64), -1
        for step in range(self.progress.step, self.total):
            epoch, position = divmod(step, per_epoch)
            if epoch != order_epoch:
                order, order_epoch = self.plan.order(epoch, n), epoch
            yield order[position * size : (position + 1) * size]

    def run(
        self,
        after_epoch: Callable[[dict[str, float]], bool],
        after_step: Callable[[int], None],
        show_progress: bool,
    ) -> None:
        """Train to the end of the plan, or until interrupted or told to stop."""
        progress, per_epoch = self.progress, self.plan.steps_per_epoch(len(self.data))
        if progress.stopped == "early":
            return
        bar = tqdm(
            total=self.total,
            initial=progress.step,
            delay=BAR_DELAY_S,
            disable=not show_progress,
            unit="step",
            leave=False,
        )
        progress.stopped = "running"
        before = progress.history.get("seconds", [0.0])[-1]
        started = time.perf_counter() - before
        self.model.train()
        try:
            with bar, self.threads(), torch.enable_grad(), _interrupt_flag() as interrupted:
                for rows in self.batches():
                    self.step(rows)
                    bar.update()
                    if progress.step % per_epoch == 0 or progress.step == self.total:
                        logs = self.close_epoch(time.perf_counter() - started)
                        bar.set_postfix(loss=f"{logs['loss']:.4g}", refresh=False)
                        if self.exhausted(logs):
                            progress.stopped = "early"
                        if after_epoch(logs) and progress.stopped == "running":
                            progress.stopped = "callback"
                    after_step(progress.step)
                    if interrupted.is_set() and progress.stopped == "running":
                        progress.stopped = "interrupted"
                    if progress.stopped != "running":
                        break
                else:
                    progress.stopped = "completed"
        finally:
            self.optimizer.zero_grad()
            self.model.eval()

    def empty_rows(self) -> Tensor:
        """Training rows with nothing observed, int64."""
        empty = [block.start + np.nonzero(~self.data.read(block)[1].any(1))[0] for block in self.data.blocks()]
        return torch.from_numpy(np.concatenate(empty)).to(self.plan.device)

    @contextlib.contextmanager
    def threads(self) -> Iterator[None]:
        """One thread for small steps on the CPU: there, handing pieces to a second one takes longer than the piece."""
        threads = torch.get_num_threads()
        row_numbers = self.data.num_columns + sum(
            p.shape[1] for p in self.model.parameters() if isinstance(p, RowParameter)
        )
        if self.plan.batch_size * row_numbers < NUMBERS_FOR_THREADS:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def step(self, rows: np.ndarray) -> None:
        """One optimisation step on the mean loss of these rows."""
        self.set_lr()
        index, x, mask = self.batch(rows)
        self.optimizer.zero_grad()
        nll, kl = self.model(index, x, mask)
        nll_sum, kl_sum = torch.stack((nll.detach().sum(), kl.detach().sum())).tolist()
        if not math.isfinite(nll_sum + kl_sum):
            rates = ", ".join(f"{lr:g}" for lr in self.base_lr)
            raise FloatingPointError(
                f"training diverged at step {self.progress.step}; lower lr or row_lr (now {rates})"
            )
        self.model.row_loss(nll, kl).mean().backward()
        self.optimizer.step()
        progress = self.progress
        progress.sums = [total + new for total, new in zip(progress.sums, (nll_sum, kl_sum, len(rows)), strict=True)]
        progress.step += 1

    def set_lr(self) -> None:
        factor = SCHEDULES[self.plan.schedule](self.progress.step / self.total)
        for group, base in zip(self.optimizer.param_groups, self.base_lr, strict=True):
            group["lr"] = base * factor

    def close_epoch(self, seconds: float) -> dict[str, float]:
        """Add this epoch's entry to the history."""
        progress = self.progress
        nll, kl, rows = progress.sums
        logs = {
            "step": progress.step,
            "loss": (nll + self.model.kl_weight * kl) / rows,
            "nll": nll / rows,
            "kl": kl / rows,
        }
        logs |= {"lr": self.optimizer.param_groups[-1]["lr"], "seconds": seconds}
        if self.hidden is not None:
            logs["val_mse"] = self.validate()
        for name, value in logs.items():
            progress.history.setdefault(name, []).append(value)
        progress.sums = [0.0, 0.0, 0.0]
        return logs

    @torch.no_grad()
    def validate(self) -> float:
        """Mean squared error on hidden cells at the posterior mean, in the model's units."""
        assert self.hidden is not None
        rows = self.plan.validation_rows(len(self.data))
        self.model.eval()
        total, count = 0.0, 0
        for start in range(0, len(rows), 1024):
            part = rows[start : start + 1024]
            index, x, mask = self.batch(part)
            truth, target = self.units.to_model(*self.data.read(part))
            target &= torch.from_numpy(self.hidden.read(part))
            z, _ = self.model.sample(index, x, mask)
            error = (self.model.likelihood.mean(self.model.decoder(z)).cpu() - truth)[target]
            total, count = total + float(error.square().sum()), count + error.numel()
        self.model.train()
        return total / count if count else math.nan

    def exhausted(self, logs: dict[str, float]) -> bool:
        """Whether the error on hidden cells has not improved for `patience` epochs; keeps the best state so far."""
        if self.hidden is None or math.isnan(logs["val_mse"]):
            return False
        epoch = len(self.progress.history["val_mse"])
        if self.best is None or logs["val_mse"] < self.best[0]:
            self.best = (logs["val_mse"], epoch, self._snapshot())
        return epoch - self.best[1] >= self.plan.patience

    def _snapshot(self) -> dict[str, Tensor]:
        """A copy of the model's state; of the rows, state_dict makes one anyway."""
        live = {t.data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        return {k: v.clone() if v.data_ptr() in live else v for k, v in self.model.state_dict().items()}

    def restore_best(self) -> None:
        """Give the model the state with the least error on hidden cells, where there are any."""
        if self.best is not None:
            self.model.load_state_dict(self.best[2])


@contextlib.contextmanager
def _interrupt_flag() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag, so that no step is cut in two; the second one interrupts at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def on_interrupt(number: int, frame: Any) -> None:
        flag.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)
