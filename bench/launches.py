"""Launches of a training step, counted without a GPU: python -m rvi_fast.bench.launches [--csv FILE]

Every operation of a step that would launch a kernel or a copy on a GPU is counted once: views, bookkeeping and empty
tensors launch none. A foreach operation counts as one, though it launches a kernel for every few dozen tensors, so the
count is low for the peers. Kernels are counted at their launchers, compiled for sm_90 and not run. It is a static
estimate: a profiler on a GPU has the last word.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rvi_fast import dispatch
from rvi_fast.train.cells import Cells
from rvi_fast.train.steps import CapturedStep, FusedStep

from .static import compiled_for
from .steps import Data, DenseAdamStep, RowAdamStep, Sizes

SIZES = Sizes(1024, 784, 64, (64, 64), (25, 50, 100), (13, 25, 50), 0.3)
BATCH = 256
LAUNCH_NOTHING = {"detach", "alias", "empty", "empty_like", "empty_strided", "new_empty", "_local_scalar_dense"}
LAUNCH_NOTHING.add("aminmax")  # rows are looked at on the CPU alone


class Operations(TorchDispatchMode):
    """Counts what computes or copies."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func._schema.name.split("::")
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if space == "aten" and not is_view and name not in LAUNCH_NOTHING:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def of_peer(step: Callable[[torch.Tensor], Any]) -> Counter[str]:
    """What the third step launches: the first ones set up the optimiser's state."""
    rows = torch.arange(BATCH)
    for _ in range(2):
        step(rows)
    with Operations() as operations:
        step(rows)
    return operations.counts


def of_ours(captured: bool) -> Counter[str]:
    """What a step on resident cells launches by itself, as the engine takes it, with a new learning rate."""
    peer = RowAdamStep(SIZES, Data(SIZES), fused=False)
    model, optimizer, _ = peer.make(torch.device("cpu"))
    cells = Cells(*Data(SIZES).on(torch.device("cpu")), 1.0, gathered=False)
    graphs: list[Callable[[], None]] = []

    def capture(launch: Callable[[], None]) -> Callable[[], None]:
        launch()  # its kernels are compiled, and counted as one replay
        graphs.append(launch)
        return lambda: None

    step = CapturedStep(model, optimizer, cells, BATCH, capture) if captured else FusedStep(model, optimizer)
    rows = torch.arange(BATCH)
    with mock.patch.object(dispatch, "use_triton", lambda *_: True), compiled_for("sm_90") as kernels:
        for _ in range(3):
            kernels_before = len(kernels)
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
            with Operations() as operations:
                step(rows, cells)
        found = operations.counts
        found.update({"graph": 1} if captured else Counter(name for name, *_ in kernels[kernels_before:]))
        if captured:
            found.update({f"in the graph: {name}": 1 for name in sorted({name for name, *_ in kernels})})
    return found


def count() -> dict[str, Counter[str]]:
    """By contestant, how often a step launches what."""
    return {
        "eager, dense Adam (foreach)": of_peer(DenseAdamStep(SIZES, Data(SIZES), None, adam="foreach")),
        "eager, dense Adam (fused)": of_peer(DenseAdamStep(SIZES, Data(SIZES), None)),
        "rvi_fast, model(...), backward(), RowAdam.step(), torch backend": of_peer(
            RowAdamStep(SIZES, Data(SIZES), fused=False)
        ),
        "rvi_fast, ElboStep": of_ours(captured=False),
        "rvi_fast, fit on a GPU: ElboStep as a CUDA graph": of_ours(captured=True),
    }


def launched(counts: Counter[str]) -> int:
    """By the host; what a graph launches is not."""
    return sum(times for name, times in counts.items() if not name.startswith("in the graph"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    found = count()
    for name, counts in found.items():
        print(f"{launched(counts):4}  {name}: " + ", ".join(f"{times} {op}" for op, times in counts.most_common(8)))
    if arguments.csv:
        lines = [(name, op, times) for name, counts in found.items() for op, times in sorted(counts.items())]
        with arguments.csv.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("step", "operation", "launches"), *lines])


if __name__ == "__main__":
    main()
