"""Trainer: the training loop."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model import LatentModel, RowModel
from ..observations import ColumnUnits, HiddenCells, Observations
from ..one_thread import one_thread
from ..optim import RowAdam
from ..progress import progress_bar
from ..row_store import RowParameter
from .cells import Cells, Source
from .plan import SCHEDULES, Plan, Progress
from .steps import CapturedStep, FusedStep, SeparateStep, fusable

NUMBERS_FOR_THREADS = 1 << 18  # a batch with fewer numbers (its cells and its rows' parameters) trains on one thread
STEPS_UNSEEN = 256  # a GPU is asked this often whether its loss is still finite

Step = SeparateStep | FusedStep | CapturedStep


class Trainer:
    """Trains a model on the observed cells. `progress` can be saved and given back, to go on from there.

    data: X, or the Observations of it. units: what turns X's columns into the model's; None if they are the model's.
    """

    def __init__(
        self,
        model: LatentModel,
        optimizer: RowAdam,
        data: Any,
        units: ColumnUnits | None = None,
        plan: Plan | None = None,
        hidden: HiddenCells | None = None,
    ):
        if not isinstance(data, Observations):
            data = Observations(data)
            data.check()
        self.model, self.optimizer, self.data = model, optimizer, data
        self.units = ColumnUnits.identity(data.num_columns) if units is None else units
        self.plan, self.hidden = plan or Plan(), hidden
        self._check_fit()
        self.source = Source(data, self.units, hidden, self.plan.device)
        self.progress = Progress()
        self.base_lr = [group["lr"] for group in optimizer.param_groups]
        self.best: tuple[float, int, dict[str, Tensor]] | None = None
        self.total = self.plan.total_steps(len(data))
        self.resident: Cells | None = None
        self._step: Step | None = None

    def _check_fit(self) -> None:
        """Raise unless data, units and plan fit the model."""
        (n, d), head = (len(self.data), self.data.num_columns), self.model.decoder.head.weight
        rows = self.model.posterior.num_rows if isinstance(self.model, RowModel) else n
        if rows != n:
            raise ValueError(f"X has {n} rows, but the model's table has {rows}; make the posterior for len(X) rows")
        if head.shape[0] != d:
            raise ValueError(f"X has {d} columns, but the model's decoder {head.shape[0]}; make it for X.shape[1]")
        if len(self.units.scale) != d:
            raise ValueError(f"X has {d} columns, but units are of {len(self.units.scale)}")
        if head.device != torch.empty(0, device=self.plan.device).device:
            raise ValueError(f"plan.device is {self.plan.device}, but the model is on {head.device}; move one of them")

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

    def cells(self) -> Generator[tuple[np.ndarray, Cells]]:
        """The same, with where their cells are."""
        if self.resident is None:
            yield from self.source.ahead(self.batches())
            return
        for rows in self.batches():
            yield rows, self.resident

    def run(
        self,
        after_epoch: Callable[[dict[str, float]], bool] = lambda logs: False,
        after_step: Callable[[int], None] = lambda step: None,
        show_progress: bool = True,
    ) -> None:
        """Train to the end of the plan, or until interrupted or told to stop (a true after_epoch(logs)).

        after_epoch may change the model, its optimiser and their settings, but for lr, which every step takes from the
        plan's schedule; after_step only looks at them.
        """
        progress, per_epoch = self.progress, self.plan.steps_per_epoch(len(self.data))
        if progress.stopped == "early":
            return
        bar_shown = progress_bar(show_progress, self.plan.device, total=self.total, initial=progress.step, unit="step")
        progress.stopped = "running"
        before = progress.history.get("seconds", [0.0])[-1]
        started = time.perf_counter() - before
        self.model.train()
        try:
            with (
                bar_shown as bar, self.threads(), torch.enable_grad(), _interrupt_flag() as interrupted,
                self.ready(), contextlib.closing(self.cells()) as cells,
            ):  # fmt: skip
                for rows, where in cells:
                    self.step(rows, where)
                    bar.update()
                    if progress.step % per_epoch == 0 or progress.step == self.total:
                        logs = self.close_epoch(time.perf_counter() - started)
                        bar.set_postfix(loss=f"{logs['loss']:.4g}", refresh=False)
                        if self.exhausted(logs):
                            progress.stopped = "early"
                        if after_epoch(logs) and progress.stopped == "running":
                            progress.stopped = "callback"
                        self.model.train()
                        self.check_step()
                    after_step(progress.step)
                    if interrupted.is_set() and progress.stopped == "running":
                        progress.stopped = "interrupted"
                    if progress.stopped != "running":
                        break
                else:
                    progress.stopped = "completed"
        except FloatingPointError:
            progress.stopped = "failed"
            raise
        finally:
            self.optimizer.zero_grad()
            self.model.eval()

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """The step and its cells, for a run; afterwards parameters have memory of their own."""
        fused = fusable(self.model, self.optimizer)
        if fused or self.plan.device.type != "cpu":
            self.resident = self.source.resident()
        try:
            yield
        finally:
            self._drop_step()
            self.resident = None

    def taken_by(self) -> Step:
        """How steps are taken: as a graph where there is one for the model and the cells lie on a GPU, else fused, else
        in parts."""
        if self._step is None:
            self._step = self._make_step()
            self._step.sums.copy_(torch.tensor(self.progress.sums, dtype=torch.float64))
        return self._step

    def check_step(self) -> None:
        """Take steps anew where a callback froze, thawed or replaced what they need."""
        step = self._step
        if isinstance(step, SeparateStep):
            stale = fusable(self.model, self.optimizer)
        else:
            stale = step is not None and not step.elbo_step.valid()
        if stale:
            self._drop_step()

    def _make_step(self) -> Step:
        if not fusable(self.model, self.optimizer):
            return SeparateStep(self.model, self.optimizer, self.plan.device)
        assert isinstance(self.model, RowModel)
        if self.plan.device.type == "cuda" and self.resident is not None:
            return CapturedStep(self.model, self.optimizer, self.resident, self.plan.batch_size)
        return FusedStep(self.model, self.optimizer)

    def _drop_step(self) -> None:
        if self._step is not None:
            self.progress.sums = self._step.sums.tolist()
            if not isinstance(self._step, SeparateStep):
                self._step.elbo_step.release()
            self._step = None

    def empty_rows(self) -> Tensor:
        """Training rows with nothing observed, int64."""
        empty = [block.start + np.nonzero(~self.data.read(block)[1].any(1))[0] for block in self.data.blocks()]
        return torch.from_numpy(np.concatenate(empty)).to(self.plan.device)

    @contextlib.contextmanager
    def threads(self) -> Iterator[None]:
        """One thread for small steps on the CPU: there, handing pieces to a second one takes longer than the piece.

        Denormal numbers count as 0 meanwhile: moments that die out would each cost a hundred times the arithmetic.
        """
        kept = _keeps_denormals()
        row_numbers = self.data.num_columns + sum(
            p.shape[1] for p in self.model.parameters() if isinstance(p, RowParameter)
        )
        small = self.plan.batch_size * row_numbers < NUMBERS_FOR_THREADS
        torch.set_flush_denormal(True)
        try:
            with one_thread() if small else contextlib.nullcontext():
                yield
        finally:
            torch.set_flush_denormal(not kept)

    def step(self, rows: np.ndarray, cells: Cells | None = None) -> None:
        """One optimisation step on the mean loss of these rows, whose cells are read where they are not given."""
        self.set_lr()
        step, progress = self.taken_by(), self.progress
        step(torch.from_numpy(rows), self.source.batch(rows) if cells is None else cells)
        progress.step += 1
        if self.plan.device.type == "cpu" or progress.step % STEPS_UNSEEN == 0:
            self.collect()

    def collect(self) -> None:
        """Read this epoch's sums back; raises where they are not finite."""
        if self._step is None:
            return
        self.progress.sums = self._step.sums.tolist()
        if not math.isfinite(sum(self.progress.sums)):
            rates = ", ".join(f"{lr:g}" for lr in self.base_lr)
            raise FloatingPointError(
                f"training diverged at step {self.progress.step}; lower lr or row_lr (now {rates})"
            )

    def set_lr(self) -> None:
        factor = SCHEDULES[self.plan.schedule](self.progress.step / self.total)
        for group, base in zip(self.optimizer.param_groups, self.base_lr, strict=True):
            group["lr"] = base * factor

    def close_epoch(self, seconds: float) -> dict[str, float]:
        """Add this epoch's entry to the history."""
        self.collect()
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
        if self._step is not None:
            self._step.sums.zero_()
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
            index = torch.from_numpy(part).to(self.plan.device)
            x, mask = self.source.batch(part).at(index)
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


def _keeps_denormals() -> bool:
    return bool(torch.tensor([1e-39]) * 0.5 != 0)


@contextlib.contextmanager
def _interrupt_flag() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag, so that no step is cut in two; the second one interrupts at once.

    Where it is ignored, as by jobs that a script starts in the background, or handled by no Python, it stays so.
    """
    flag, previous = threading.Event(), signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or previous in (signal.SIG_IGN, None):
        yield flag
        return

    def on_interrupt(number: int, frame: Any) -> None:
        flag.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)
