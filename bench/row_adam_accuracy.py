"""How far RowAdam strays from dense AdamW: the largest error of a displacement over the largest displacement.

    python -m rvi_fast.bench.row_adam_accuracy --csv row_adam_accuracy.csv

Truth is torch.optim.AdamW in float64 on an nn.Embedding. Rows differ in how often they are touched and in the scale of
their gradients; half of them are touched late for the first time, and 40 % of the gradients' entries are zero. The
learning rate follows a cosine. float32 has torch's own float32 AdamW beside it.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rvi_fast.nn import RowTable
from rvi_fast.optim import RowAdam

GAPS = (4, 40, 400)  # mean number of steps between the touches of a row
SCALES = (1.0, 1e-4, 1e-7, 1e-9)
BETAS = ((0.9, 0.999), (0.9, 0.99), (0.0, 0.999), (0.99, 0.999))
WEIGHT_DECAYS = (0.0, 0.01)
LR = 1e-3
ZERO_ENTRIES = 0.4
DIM = 8
CHECKS = 20  # times at which a run is compared with the truth


class Errors(NamedTuple):
    """Errors of one setting, relative to its largest displacement."""

    beta1: float
    beta2: float
    weight_decay: float
    gap: int
    scale: float
    rows64: float  # RowAdam in float64
    rows32: float
    torch32: float  # torch's AdamW in float32


class Contestant:
    """A table and its optimiser, driven by given gradients."""

    def __init__(self, table: RowTable | nn.Embedding, optimizer: torch.optim.Optimizer):
        self.table = table
        self.optimizer = optimizer

    def step(self, rows: Tensor, grad: Tensor, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        values = self.table(rows)
        (values * grad.to(values.dtype)).sum().backward()
        self.optimizer.step()

    def weight(self) -> Tensor:
        return self.table.weight.detach().double()


def _rows(start: Tensor, dtype: torch.dtype, **settings: Any) -> Contestant:
    table = RowTable(len(start), DIM, dtype)
    table.assign(start)
    return Contestant(table, RowAdam(table.parameters(), **settings))


def _embedding(start: Tensor, dtype: torch.dtype, **settings: Any) -> Contestant:
    table = nn.Embedding.from_pretrained(start.to(dtype, copy=True), freeze=False)
    return Contestant(table, torch.optim.AdamW(table.parameters(), **settings))


def measure(
    betas: tuple[float, float],
    weight_decay: float,
    *,
    steps: int = 5000,
    rows_each: int = 20,
    gaps: Sequence[int] = GAPS,
    scales: Sequence[float] = SCALES,
    seed: int = 0,
) -> list[Errors]:
    """The errors of every gap and gradient scale, with `rows_each` rows for each pair."""
    noise = torch.Generator().manual_seed(seed)
    settings = list(itertools.product(gaps, scales))
    gap, scale = torch.tensor(settings, dtype=torch.float64).repeat_interleave(rows_each, dim=0).unbind(1)
    first = torch.randint(0, steps - steps // 10, gap.shape, generator=noise)
    first[::2] = 0
    start = 0.1 * torch.randn(len(gap), DIM, dtype=torch.float64, generator=noise).float().double()
    adam = {"betas": betas, "weight_decay": weight_decay}
    truth = _embedding(start, torch.float64, **adam)
    others = [
        _rows(start, torch.float64, **adam),
        _rows(start, torch.float32, **adam),
        _embedding(start, torch.float32, **adam),
    ]

    error = torch.zeros(len(others), len(settings), dtype=torch.float64)
    largest = torch.zeros(len(settings), dtype=torch.float64)
    check_every = max(1, steps // CHECKS)
    for t in range(steps):
        chance = torch.rand(gap.shape, dtype=torch.float64, generator=noise)
        rows = ((chance * gap < 1) & (t > first) | (t == first)).nonzero()[:, 0]
        grad = torch.randn(len(rows), DIM, dtype=torch.float64, generator=noise) * scale[rows, None]
        grad *= torch.rand(grad.shape, generator=noise) >= ZERO_ENTRIES
        lr = 0.5 * LR * (1 + math.cos(math.pi * t / steps))
        for contestant in (truth, *others):
            contestant.step(rows, grad, lr)
        if (t + 1) % check_every == 0:
            right = truth.weight()
            largest = torch.maximum(largest, _worst(right - start, rows_each))
            for i, contestant in enumerate(others):
                error[i] = torch.maximum(error[i], _worst(contestant.weight() - right, rows_each))
    relative = (error / largest).T.tolist()
    return [Errors(*betas, weight_decay, *s, *e) for s, e in zip(settings, relative, strict=True)]


def _worst(difference: Tensor, rows_each: int) -> Tensor:
    """The largest absolute entry of each setting's rows."""
    return difference.abs().amax(1).view(-1, rows_each).amax(1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--rows", type=int, default=20, help="rows for each gap and scale")
    parser.add_argument("--csv", help="write the errors to this file")
    args = parser.parse_args(arguments)

    found: list[Errors] = []
    print("betas          wd    gap  scale   float64  float32  torch's float32")
    for betas, weight_decay in itertools.product(BETAS, WEIGHT_DECAYS):
        for e in measure(betas, weight_decay, steps=args.steps, rows_each=args.rows):
            found.append(e)
            print(
                f"{f'{e.beta1}, {e.beta2}':13}  {e.weight_decay:<4}  {e.gap:3}  {e.scale:<5.0e}"
                f"   {e.rows64:7.1e}  {e.rows32:7.1e}  {e.torch32:7.1e}",
                flush=True,
            )
    rows64, rows32, torch32 = (max(column) for column in zip(*(e[-3:] for e in found), strict=True))
    print(f"largest: float64 {rows64:.1e} (bound 1e-6), float32 {rows32:.1e}, torch's float32 {torch32:.1e}")
    print(f"largest ratio of float32 to torch's float32: {max(e.rows32 / e.torch32 for e in found):.2f}")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(Errors._fields)
            writer.writerows(found)


if __name__ == "__main__":
    main()
