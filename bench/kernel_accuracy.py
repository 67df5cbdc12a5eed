"""How far the kernels, and PyTorch's own float32, are from the float64 equations: every output and gradient.

    python -m rvi_fast.bench.kernel_accuracy [--csv FILE]

Needs a GPU, or TRITON_INTERPRET=1 (then with small sizes).
"""

from __future__ import annotations

import argparse
import csv
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rvi_fast
from rvi_fast import functional
from rvi_fast.functional import AdamClock, AdamHyper, Columns

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
SEEDS = 3


class Size(NamedTuple):
    """A batch and its model."""

    rows: int
    latents: int
    columns: int
    groups: tuple[int, ...]
    active: tuple[int, ...]
    steps: int


PAPER = Size(rows=256, latents=64, columns=784, groups=(25, 50, 100), active=(13, 25, 50), steps=500)
SMALL = Size(rows=24, latents=20, columns=50, groups=(5, 10, 20), active=(3, 5, 10), steps=60)


class Example(NamedTuple):
    """An operator, its float64 inputs, and which of them are differentiated."""

    run: Callable[..., Any]
    inputs: dict[str, Tensor]
    gradients: tuple[str, ...]


def examples(size: Size, seed: int) -> Iterator[tuple[str, Example]]:
    """Every differentiable operator with random inputs."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(DEVICE)

    b, t, d, k = size.rows, size.latents, size.columns, sum(size.groups)
    mask = normal(b, d) > 0
    relay = dict(coef=0.1 * normal(b, k), residual=normal(b, t), log_std=normal(b, t) - 1, relays=normal(k, t))
    yield (
        "relay_sample",
        Example(
            lambda noise, **given: functional.relay_sample(
                **given, groups=size.groups, active=size.active, noise=noise
            ),
            {"noise": normal(b, t), **relay},
            tuple(relay),
        ),
    )
    scale = 0.1 + normal(d).abs()
    x = normal(b, d)
    yield (
        "masked_gaussian_nll",
        Example(
            lambda x, xhat, scale: functional.masked_gaussian_nll(xhat, x, mask, scale),
            {"x": x, "xhat": normal(b, d), "scale": scale},
            ("xhat", "scale"),
        ),
    )
    yield (
        "masked_bernoulli_nll",
        Example(
            lambda x, logits: functional.masked_bernoulli_nll(logits, x, mask),
            {"x": torch.sigmoid(x), "logits": 3 * normal(b, d)},
            ("logits",),
        ),
    )
    head = dict(h=normal(b, t), weight=normal(d, t) / math.sqrt(t), bias=normal(d), scale=scale)
    yield (
        "linear_masked_gaussian_nll",
        Example(
            lambda x, h, weight, bias, scale: functional.linear_masked_gaussian_nll(h, weight, bias, x, mask, scale),
            {"x": x, **head},
            tuple(head),
        ),
    )


def evaluated(example: Example, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """Outputs and gradients (of a random weighting of the outputs) in float64 numbers."""
    inputs = {n: v.to(dtype).requires_grad_(n in example.gradients) for n, v in example.inputs.items()}
    with rvi_fast.backend(backend):
        outputs = example.run(**inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = sum((out * _weights(out)).sum() for out in outputs)
        grads = torch.autograd.grad(total, [inputs[n] for n in example.gradients])
    found = {f"output {i}": out for i, out in enumerate(outputs)}
    found |= {f"d {n}": grad for n, grad in zip(example.gradients, grads, strict=True)}
    return {n: v.detach().double() for n, v in found.items()}


def _weights(out: Tensor) -> Tensor:
    return torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view(out.shape).to(out.dtype)


def adam(size: Size, seed: int, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """Parameters and moments of a table after many steps that touch a third of its rows each."""
    draw = torch.Generator().manual_seed(seed)
    n, c = 3 * size.rows, 33
    values = torch.zeros(n, 3, c, dtype=torch.float64)
    values[:, 0] = torch.randn(n, c, generator=draw, dtype=torch.float64)
    values, last = values.to(DEVICE, dtype), torch.zeros(n, dtype=torch.int32, device=DEVICE)
    columns = [Columns(0, c, AdamClock(AdamHyper(0.9, 0.999, 1e-8), device=DEVICE))]
    with rvi_fast.backend(backend):
        for step in range(size.steps):
            rows = torch.randperm(n, generator=draw)[: size.rows].sort().values.to(DEVICE)
            grad = torch.randn(size.rows, c, generator=draw, dtype=torch.float64).to(DEVICE, dtype)
            lr = 1e-2 * (1 + math.cos(math.pi * step / size.steps))
            functional.row_adam_(values, last, rows, grad, columns, [lr], [1e-2])
        from rvi_fast.ops import read_rows

        now = read_rows(values, last, torch.arange(n, device=DEVICE), columns)
    return {name: v.double() for name, v in zip(("p", "m", "v"), now, strict=True)}


def error(found: Tensor, truth: Tensor) -> float:
    """Largest error, relative to the largest number of the truth."""
    return float((found - truth).abs().max() / truth.abs().max().clamp_min(1e-300))


def table(size: Size) -> list[dict[str, Any]]:
    """One row for each output of each operator: the worst over seeds, ours beside PyTorch's own."""
    worst: dict[tuple[str, str], list[float]] = {}
    for seed in range(SEEDS):
        runs = {name: [evaluated(example, *how) for how in _ways()] for name, example in examples(size, seed)} | {
            f"row_adam_, {size.steps} steps": [adam(size, seed, *how) for how in _ways()]
        }
        for name, (truth, torchs, ours) in runs.items():
            for what in truth:
                entry = worst.setdefault((name, what), [0.0, 0.0])
                entry[0] = max(entry[0], error(ours[what], truth[what]))
                entry[1] = max(entry[1], error(torchs[what], truth[what]))
    return [
        {"operator": name, "what": what, "kernel_error": ours, "torch_error": torchs}
        for (name, what), (ours, torchs) in worst.items()
    ]


def _ways() -> list[tuple[torch.dtype, str]]:
    return [(torch.float64, "torch"), (torch.float32, "torch"), (torch.float32, "triton")]


def main() -> None:
    parser = argparse.ArgumentParser(description="Errors of the kernels and of torch's float32 from float64.")
    parser.add_argument("--csv", help="also write the table here")
    arguments = parser.parse_args()
    rows = table(SMALL if INTERPRETED else PAPER)
    print(f"largest error / largest value, worst of {SEEDS} seeds, on {'the interpreter' if INTERPRETED else DEVICE}")
    for row in rows:
        print(
            f"{row['operator']:<28} {row['what']:<10} kernel {row['kernel_error']:.1e}  torch {row['torch_error']:.1e}"
        )
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
