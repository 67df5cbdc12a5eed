"""RowTable + RowAdam beside nn.Embedding + Adam: one model trained by each, in turns, on the same batches."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rvi_fast.nn import RowTable
from rvi_fast.optim import RowAdam
from rvi_fast.row_grad import RowGrad

TURN = 5  # steps before the next one's turn, so that each has its own data in the caches


class Problem(NamedTuple):
    make_model: Callable[[nn.Module], nn.Module]  # around a table of rows; model(*batch) is the loss
    initial: Tensor  # the rows' first values [N, C]
    batches: Iterator[tuple[Tensor, ...]]
    lr: float


@dataclass
class Contestant:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # a step, by turns

    def take_turn(self, batches: Sequence[tuple[Tensor, ...]]) -> None:
        start = time.perf_counter()
        for batch in batches:
            self.optimizer.zero_grad()
            loss = self.model(*batch)
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.item())
        self.seconds.append((time.perf_counter() - start) / len(batches))

    def megabytes(self) -> float:
        """Of parameters, their gradients and Adam's state."""
        held = [t for state in self.optimizer.state.values() for t in state.values()]
        for p in self.model.parameters():
            held += [p, *((p.grad.rows, p.grad.values) if isinstance(p.grad, RowGrad) else (p.grad,))]
        held += [module.store.last for module in self.model.modules() if isinstance(module, RowTable)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        return sum(storages.values()) / 1e6


def row_table(initial: Tensor) -> RowTable:
    table = RowTable(*initial.shape)
    table.assign(initial)
    return table


def contestants(problem: Problem) -> list[Contestant]:
    """Ours, and nn.Embedding under Adam as it comes and fused; all start alike."""

    def model(table: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        return problem.make_model(table)

    ours = model(row_table(problem.initial))
    default, fused = (model(nn.Embedding.from_pretrained(problem.initial.clone(), freeze=False)) for _ in range(2))
    return [
        Contestant(ours, RowAdam(ours.parameters(), problem.lr)),
        Contestant(default, torch.optim.Adam(default.parameters(), problem.lr)),
        Contestant(fused, torch.optim.Adam(fused.parameters(), problem.lr, fused=True)),
    ]


def race(running: list[Contestant], batches: Iterator[tuple[Tensor, ...]]) -> None:
    while turn := tuple(islice(batches, TURN)):
        for contestant in running:
            contestant.take_turn(turn)


def difference(a: Contestant, b: Contestant) -> float:
    """The largest relative difference of two loss curves."""
    return max(abs(x - y) / abs(y) for x, y in zip(a.losses, b.losses, strict=True))


HEADER = """\
| rows | ours, ms | Adam, ms | Adam(fused), ms | Adam / ours | fused / ours | ours, MB | Adam, MB | loss differs by |
|---|---|---|---|---|---|---|---|---|"""


def line(num_rows: int, running: list[Contestant]) -> str:
    ours, default, fused = running
    own, *others = (1e3 * statistics.median(contestant.seconds) for contestant in running)
    times = " | ".join(f"{time:.1f}" for time in (own, *others, *(other / own for other in others)))
    memory = f"{ours.megabytes():.1f} | {default.megabytes():.1f}"
    return f"| {num_rows:,} | {times} | {memory} | {difference(ours, fused):.1e} |"


def main(train: Callable, problem: Callable, train_steps: int, argv: list[str] | None = None) -> None:
    """train(rows, steps) gives the model's error and a baseline's; the race is on problem(rows, steps)."""
    parser = argparse.ArgumentParser(description="Train, then time against nn.Embedding + Adam.")
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000, 20_000, 200_000], help="sizes to time")
    parser.add_argument("--steps", type=int, default=100, help="steps to time")
    parser.add_argument("--train-steps", type=int, default=train_steps, help="steps to train the first of --rows")
    args = parser.parse_args(argv)
    torch.set_flush_denormal(True)  # Adam's moments of rows long unseen are denormal numbers, slow on many CPUs
    error, baseline = train(args.rows[0], args.train_steps)
    print(f"{args.rows[0]:,} rows, {args.train_steps:,} steps: error {error:.4f}, baseline {baseline:.4f}")
    print(HEADER)
    for num_rows in args.rows:
        of_this_size = problem(num_rows, args.steps)
        running = contestants(of_this_size)
        race(running, of_this_size.batches)
        print(line(num_rows, running), flush=True)
