"""Parts of the CPU's training step, as the equations have them in PyTorch and as the step takes them.

    python -m rvi_fast.bench.cpu_parts [--csv FILE]

Each part alone, its data in cache, one thread, at the paper setting; medians of calls in turns.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rvi_fast import reference
from rvi_fast.clock import AdamClock
from rvi_fast.ops import clock_cpu, elbo_cpu, noise_cpu
from rvi_fast.ops.elbo import ElboModel
from rvi_fast.reference import AdamHyper

BATCH, WIDTH, COLUMNS, LATENTS, ROWS = 256, 303, 784, 64, 60_000
GROUPS, ACTIVE = (25, 50, 100), (13, 25, 50)
STEPS, CALLS = 600, 300  # that the clock has counted; that are timed

Part = tuple[str, Callable[[], Any], Callable[[], Any]]


def parts() -> list[Part]:
    """Name, as the equations have it, as the step takes it."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    model = ElboModel(GROUPS, ACTIVE, (64, 64), False, "relu", "gaussian", 0.3, False, 1.0)
    arrays = elbo_cpu.Arrays(torch.float32, BATCH, COLUMNS, WIDTH, sum(GROUPS), 64, 1)
    v = normal(BATCH, WIDTH).square() * (normal(BATCH, WIDTH) > 0)  # as of coefficients that were never selected
    x, residual, mask = normal(BATCH, COLUMNS), normal(BATCH, COLUMNS), normal(BATCH, COLUMNS) > 0
    data, coef = normal(ROWS // 10, COLUMNS), normal(BATCH, sum(GROUPS))
    rows = torch.randperm(len(data), generator=generator)[:BATCH]
    last = torch.randint(300, STEPS, (BATCH,), generator=generator, dtype=torch.int32)
    clock, clock_too = (AdamClock(AdamHyper(0.9, 0.999, 1e-8)) for _ in range(2))
    for each in (clock, clock_too):
        each.reserve(STEPS + 4 * CALLS)
        for _ in range(STEPS):
            each.advance(1e-3)
    step = torch.tensor(7)

    def observed() -> None:
        np.negative(mask.numpy().view(np.int8), out=arrays.observed.numpy())
        elbo_cpu._kept_bits(residual, arrays.observed, out=arrays.xhat)

    return [
        ("square root of v, half of it 0", v.sqrt, lambda: elbo_cpu._sqrt(v, arrays.root)),
        ("residual of the observed cells alone", lambda: torch.where(mask, residual, 0.0), observed),
        ("the same by a factor", lambda: residual * mask.float(), observed),
        ("selection", lambda: reference.selected(coef, GROUPS, ACTIVE), lambda: elbo_cpu._select(coef, model, arrays)),
        (
            "noise",
            lambda: reference.philox_normal(0, "train", step, rows, LATENTS),
            lambda: noise_cpu.philox_normal(0, "train", 7, rows, LATENTS, torch.float32),
        ),
        ("what rows have missed", lambda: clock.missed(last), lambda: clock_cpu.missed(clock_too, last)),
        ("the clock's step", lambda: clock.advance(1e-3), lambda: clock_cpu.advance(clock_too, 1e-3, 0.0)),
        ("x of the batch", lambda: data[rows], lambda: torch.index_select(data, 0, rows, out=x)),
    ]


def microseconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)


@torch.no_grad()
def measure() -> list[tuple[str, float, float]]:
    """Name, microseconds of the equations, microseconds of the step."""
    found = []
    for name, equations, ours in parts():
        pairs = [(microseconds(equations), microseconds(ours)) for _ in range(CALLS)][CALLS // 10 :]
        before, after = (statistics.median(times) for times in zip(*pairs, strict=True))
        found.append((name, before, after))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    load = os.getloadavg()[0]
    print(f"one thread of {os.cpu_count()} cores; load {load:.1f}; torch {torch.__version__}, numpy {np.__version__}")
    found = measure()
    for name, before, after in found:
        print(f"{name:<38} {before:7.0f} us as an equation, {after:6.0f} us in the step")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("part", "equations_us", "step_us", "load", "torch", "numpy"))
            writer.writerows(
                (n, f"{b:.1f}", f"{a:.1f}", f"{load:.2f}", torch.__version__, np.__version__) for n, b, a in found
            )


if __name__ == "__main__":
    main()
