"""Ways to take an optimisation step on a batch: in parts for any model, fused, or as a CUDA graph of the fused one.

Each is called with the batch's rows, int64 [B] on the CPU, and its cells on the model's device. Each keeps nll, kl and
rows of the steps taken in `sums`, float64 [3], on the device: nothing waits for a step to end.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..elbo_step import ElboStep
from ..model import LatentModel, RowModel
from ..optim import RowAdam
from .cells import Cells


class SeparateStep:
    """The model's forward, autograd's backward, the optimiser's step."""

    def __init__(self, model: LatentModel, optimizer: RowAdam, device: torch.device):
        self.model, self.optimizer = model, optimizer
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def __call__(self, rows: Tensor, cells: Cells) -> None:
        rows = rows.to(self.sums.device, non_blocking=True)
        self.optimizer.zero_grad()
        nll, kl = self.model(rows, *cells.at(rows))
        self.sums += torch.stack((nll.detach().sum(), kl.detach().sum(), nll.new_tensor(len(rows)))).double()
        self.model.row_loss(nll, kl).mean().backward()
        self.optimizer.step()


class FusedStep:
    """All of it in one call (two launches on a GPU)."""

    def __init__(self, model: RowModel, optimizer: RowAdam):
        self.elbo_step = ElboStep(model, optimizer)
        self.sums = self.elbo_step.sums

    def __call__(self, rows: Tensor, cells: Cells) -> None:
        rows = rows.to(self.sums.device, non_blocking=True)
        self.elbo_step.step(rows, cells.x, cells.mask, x_scale=cells.x_scale, gathered=cells.gathered)


def cuda_graph(launch: Callable[[], None]) -> Callable[[], None]:
    """Capture what `launch` puts on the current device; what is returned does it again. Nothing happens at the capture,
    and other threads may use the device meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        launch()
    return graph.replay


class CapturedStep:
    """The fused step as a graph, replayed on batches of resident cells, a last partial one included.

    The first step is taken without it, which compiles the kernels. What a graph holds fast (memory that moved, a
    kl_weight that changed) is looked at before each replay, and captured anew where it is no longer so.
    """

    def __init__(
        self,
        model: RowModel,
        optimizer: RowAdam,
        cells: Cells,
        batch_size: int,
        capture: Callable[[Callable[[], None]], Callable[[], None]] = cuda_graph,
    ):
        self.elbo_step, self.cells, self.capture = ElboStep(model, optimizer), cells, capture
        self.sums = self.elbo_step.sums
        self.rows = torch.zeros(batch_size, dtype=torch.int64, device=cells.x.device)
        self.count = torch.zeros((), dtype=torch.int64, device=cells.x.device)
        self.present = 0
        self.replay: Callable[[], None] | None = None
        self.frozen: tuple = ()

    def __call__(self, rows: Tensor, cells: Cells) -> None:
        self.rows[: len(rows)].copy_(rows, non_blocking=True)
        if len(rows) != self.present:
            self.count.fill_(len(rows))
            self.present = len(rows)
        self.elbo_step.prepare()
        frozen = self.elbo_step.frozen()
        if not self.frozen:
            self._launch()
        else:
            if self.replay is None or frozen != self.frozen:
                self.replay = self._captured()
            self.replay()
        self.frozen = frozen
        self.elbo_step.replayed(1)

    def _captured(self) -> Callable[[], None]:
        try:
            with torch.cuda.device_of(self.rows):
                return self.capture(self._launch)
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
            warnings.warn(f"training goes on without a CUDA graph, which could not be captured: {why}", stacklevel=2)
            self.capture = lambda launch: launch
            return self._launch

    def _launch(self) -> None:
        x, mask, x_scale, gathered = self.cells
        self.elbo_step.launch(self.rows, x, mask, count=self.count, x_scale=x_scale, gathered=gathered)


def fusable(model: LatentModel, optimizer: RowAdam) -> bool:
    return type(model) is RowModel and ElboStep.supports(model, optimizer) is None
