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

import numba
import numpy as np
import torch

from rvi_fast import reference
from rvi_fast.clock import EPS_MEETS_GRADIENT, AdamClock
from rvi_fast.loops import adam, likelihood, relays
from rvi_fast.ops import elbo_cpu, table_cpu
from rvi_fast.ops.elbo import ElboModel, SharedState
from rvi_fast.reference import AdamHyper

BATCH, WIDTH, COLUMNS, LATENTS, ROWS = 256, 303, 784, 64, 6_000
GROUPS, ACTIVE = (25, 50, 100), (13, 25, 50)
HYPER, LR, SCALE = AdamHyper(0.9, 0.999, 1e-8), 1e-3, 0.3
STEPS, CALLS = 600, 300  # that the clock has counted; that are timed

Part = tuple[str, Callable[[], Any], Callable[[], Any]]


def parts() -> list[Part]:
    """Name, as the equations have it, as the step takes it."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    model = ElboModel(GROUPS, ACTIVE, (64, 64), False, "relu", "gaussian", SCALE, False, 1.0)
    shared = sum(torch.Size(shape).numel() for shape in model.shared_shapes(LATENTS, COLUMNS))
    nothing = torch.empty(0)
    state = SharedState(normal(3, shared), nothing, nothing, nothing, shared, nothing)
    a = elbo_cpu.Arrays(BATCH, WIDTH, COLUMNS, state, model)
    rows = torch.randperm(ROWS, generator=generator)[:BATCH]
    return [*_of_rows(a, rows, normal, generator), *_of_cells(a, rows, normal, model)]


def _of_rows(a: elbo_cpu.Arrays, rows: torch.Tensor, normal: Callable[..., torch.Tensor], generator: Any) -> list[Part]:
    values = normal(ROWS, 3, WIDTH)
    values[:, 2].square_().mul_(normal(ROWS, WIDTH) > 0)  # half of v is 0, as of coefficients never selected
    last = torch.randint(300, STEPS, (ROWS,), generator=generator, dtype=torch.int32)
    clock, clock_too = (AdamClock(HYPER) for _ in range(2))
    for each in (clock, clock_too):
        each.reserve(STEPS + 4 * CALLS)
        for _ in range(STEPS):
            each.advance(LR)
    flat, grad = values.flatten(1).numpy(), normal(BATCH, WIDTH)
    factors = table_cpu.adam_factors(STEPS, LR, 0.0, HYPER)

    def read() -> None:
        at, before, of_exact = rows.numpy(), last.numpy(), (clock_too.inexact_before, EPS_MEETS_GRADIENT)
        scalars = STEPS, *HYPER.logs(), HYPER.eps, reference.least_root(values.dtype)
        adam.read_rows(1, flat, at, before, clock_too.history.numpy(), *scalars, *of_exact, *a.moving, a.apart)

    def equations_read() -> None:
        p, m, v = values[rows].unbind(1)
        clock.catch_up(p, m, v, last[rows])

    def equations_step() -> None:
        p, m, v = values[rows].unbind(1)
        values[rows] = torch.stack(reference.adamw_step(p, m, v, grad, STEPS, LR, HYPER), dim=1)

    return [
        ("rows gathered and caught up", equations_read, read),
        (
            "Adam's step of rows, scattered",
            equations_step,
            lambda: adam.step_rows(1, flat, last.numpy(), rows.numpy(), *a.moving, grad.numpy(), factors, STEPS),
        ),
        ("the clock's step", lambda: clock.advance(LR), lambda: table_cpu.advance(clock_too, LR, 0.0)),
    ]


def _of_cells(
    a: elbo_cpu.Arrays, rows: torch.Tensor, normal: Callable[..., torch.Tensor], model: ElboModel
) -> list[Part]:
    p = torch.from_numpy(a.arrays.p).copy_(normal(BATCH, WIDTH))
    x, mask, xhat = normal(ROWS, COLUMNS), normal(ROWS, COLUMNS) > 0, normal(BATCH, COLUMNS)
    factor = np.full(COLUMNS, 1 / SCALE, np.float32)
    cells = x.numpy(), 1.0, mask.view(torch.uint8).numpy(), rows.numpy()
    everyone, of_groups = (0, 0, BATCH), (a.arrays.groups, a.arrays.active, a.arrays.guesses)
    sums = a.squares, a.count, a.by_last_bias
    leaf = xhat.clone().requires_grad_()

    def equations_loss() -> None:
        with torch.enable_grad():
            nll = reference.masked_gaussian_nll(leaf, x[rows], mask[rows], torch.tensor(SCALE))
            torch.autograd.grad(nll.mean(), leaf)

    return [
        (
            "selection",
            lambda: reference.selected(p[:, : sum(GROUPS)], GROUPS, ACTIVE),
            lambda: relays.select(everyone, a.arrays.p_bits, *of_groups, a.arrays.weight_bits, a.arrays.kept),
        ),
        (
            "noise",
            lambda: reference.philox_normal(0, "train", 7, rows, LATENTS),
            lambda: a.draw(0, "train", 7, rows, 0),
        ),
        (
            "cells gathered, loss and gradient",
            equations_loss,
            lambda: likelihood.gaussian(1, xhat.numpy(), *cells, factor, factor, *sums),
        ),
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
    print(
        f"one thread of {os.cpu_count()} cores; load {load:.1f}; torch {torch.__version__}, numba {numba.__version__}"
    )
    found = measure()
    for name, before, after in found:
        print(f"{name:<38} {before:7.0f} us as an equation, {after:6.0f} us in the step")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("part", "equations_us", "step_us", "load", "torch", "numba"))
            writer.writerows(
                (n, f"{b:.1f}", f"{a:.1f}", f"{load:.2f}", torch.__version__, numba.__version__) for n, b, a in found
            )


if __name__ == "__main__":
    main()
