"""New rows: rows a second, ELBO and error on hidden cells, by start, steps and protocol, beside an encoder.

    python -m rvi_fast.bench.inference [--data mnist] [--missing 0.9] [--model paper] [--quick] [-o FOLDER]

A model is fitted to the first rows of the training images, with holes; then rows of the test images, with holes of
their own, are given to it. "eager" is the loop that published code runs, a minibatch at a time: autograd and
torch.optim.Adam, with the same start, learning rates and steps as `prior`. "encoder" is a VAE with the same decoder and
as many epochs. The elastic error is at the posterior mean, over all missing cells of the new rows (`missing_error`) or
all observed ones. Lines go to bench/results/<device>/inference.csv.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rvi_fast
from rvi_fast import RVI, VAE, data, masks, metrics
from rvi_fast.estimators import Estimator
from rvi_fast.infer import ROW_LR, ROW_SCHEDULE, InferencePlan, Posterior
from rvi_fast.model import RowModel

from . import load, results

KEY = ("data", "missing", "model", "way", "steps", "threads", "device")
STEPS, FEWEST = (50, 100, 250, 1000), (10, 25)
BATCH = 256  # of the eager loop
LOADERS = {"mnist": data.mnist, "fashion-mnist": data.fashion_mnist}


def split(name: str, train: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, 784] of the training and of the test images."""
    return LOADERS[name]("train")[0][:train], LOADERS[name]("test")[0][:new]


def eager(model: RVI, X: np.ndarray, mask: np.ndarray, steps: int) -> Tensor:
    """Row parameters [M, C], one minibatch after the other."""
    module, found = model.model_, []
    assert isinstance(module, RowModel)
    plan = InferencePlan(steps, ROW_LR, ROW_SCHEDULE, model.seed)
    ids = torch.arange(len(X))
    for start in range(0, len(X), BATCH):
        part = slice(start, start + BATCH)
        x = torch.from_numpy(X[part].astype(np.float32)) * float(np.float32(1 / 255))
        seen = torch.from_numpy(mask[part])
        p = torch.nn.Parameter(module.posterior.initial_values(ids[part]))
        adam = torch.optim.Adam([p], lr=ROW_LR)
        for step in range(steps):
            adam.param_groups[0]["lr"] = plan.lr_at(step)
            adam.zero_grad()
            z, kl = module.posterior.sample_values(p, row_ids=ids[part], stream="infer", step=step, seed=model.seed)
            module.row_loss(module.likelihood.nll(module.decoder(z), x, seen), kl).sum().backward()
            adam.step()
        found.append(p.detach())
    return torch.cat(found)


def ways(model: RVI, quick: bool) -> dict[tuple[str, int], dict[str, Any]]:
    """Arguments of infer by name and steps."""
    found: dict[tuple[str, int], dict[str, Any]] = {("default", 250): {}}
    for start in ("prior", "linear"):
        for steps in (25, 100) if quick else (*FEWEST, *STEPS):
            found[start, steps] = {"steps": steps, "start": start, "stop_early": False}
    for steps in (25,) if quick else STEPS:
        found["epochs", steps] = {"steps": steps, "protocol": "epochs"}
    return found


def line(
    model: Estimator, way: str, steps: int, seconds: float, posterior: Posterior | Tensor, cells: Any
) -> results.Line:
    """What was found: rows a second, ELBO where it is known, errors."""
    X, mask = cells
    if isinstance(posterior, Tensor):
        assert isinstance(model.model_, RowModel)
        mean = model.model_.posterior.mean_of(posterior).detach()
        posterior = Posterior(mean, mean, mean.new_zeros(0), mean.new_zeros(0), torch.arange(len(X)))
    filled = model.reconstruct(X, mask, posterior=posterior) / 255
    truth = X.astype(np.float32) / 255
    return {
        "way": way,
        "steps": steps,
        "rows_per_s": len(X) / seconds,
        "elbo": float(posterior.elbo.mean()) if len(posterior.elbo) else None,
        "converged": float(posterior.converged.float().mean()) if len(posterior.converged) else None,
        "missing_error": metrics.elastic(truth, filled, where=~mask),
        "observed_error": metrics.elastic(truth, filled, where=mask),
    }


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def measure(model: Estimator, encoder: Estimator | None, cells: Any, quick: bool) -> list[results.Line]:
    assert isinstance(model, RVI)
    X, mask = cells
    model.infer(X[:64], mask[:64], steps=2)  # compiles
    lines = []
    for (way, steps), arguments in ways(model, quick).items():
        seconds, posterior = timed(functools.partial(model.infer, X, mask, **arguments))
        lines.append(line(model, way, steps, seconds, posterior, cells))
        print(lines[-1], flush=True)
    with rvi_fast.backend("torch"):
        seconds, p = timed(functools.partial(eager, model, X, mask, 25 if quick else 250))
    lines.append(line(model, "eager", 25 if quick else 250, seconds, p, cells))
    print(lines[-1], flush=True)
    if encoder is not None:
        seconds, posterior = timed(functools.partial(encoder.infer, X, mask))
        lines.append(line(encoder, "encoder", 1, seconds, posterior, cells))
        print(lines[-1], flush=True)
    return lines


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=LOADERS, default="fashion-mnist")
    parser.add_argument("--missing", type=float, default=0.5)
    parser.add_argument("--model", choices=("default", "paper"), default="default")
    parser.add_argument("--quick", action="store_true", help="few rows and epochs: the numbers mean nothing")
    parser.add_argument("-o", "--out", type=Path, metavar="FOLDER")
    arguments = parser.parse_args(given)
    quick, device = arguments.quick, "cuda" if torch.cuda.is_available() else "cpu"
    train, new = split(arguments.data, *((512, 70) if quick else (10_000, 2_000)))
    observed = masks.mcar(train.shape, arguments.missing, seed=0)
    cells = new, masks.mcar(new.shape, arguments.missing, seed=1)
    common: dict[str, Any] = {"seed": 0, "progress": False} | ({"epochs": 2} if quick else {})
    model = (RVI.paper if arguments.model == "paper" else RVI)(**common).fit(train, observed)
    encoder = VAE(**common).fit(train, observed) if arguments.model == "default" else None
    before = load.ticks()
    lines = measure(model, encoder, cells, quick)
    busy = load.foreign(before, load.ticks())
    about = {
        "data": arguments.data,
        "missing": arguments.missing,
        "model": arguments.model,
        "threads": torch.get_num_threads(),
        "rows": len(new),
        "train_rows": len(train),
        "epochs": model.epochs_,
        "others_took": busy,
        "device": device,
        "state": "dry" if quick else "loaded" if load.objection(busy) else "quiet",
    }
    folder = arguments.out or results.default_folder(device)
    results.merge(folder / "inference.csv", [about | found | results.facts(device) for found in lines], KEY)
    print(f"-> {folder / 'inference.csv'}")


if __name__ == "__main__":
    main()
