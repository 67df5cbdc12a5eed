"""New rows: rows a second, ELBO and error on hidden cells, by start, steps and protocol, beside an encoder.

    python -m rvi_fast.bench.inference [--data mnist] [--missing 0.9] [--model paper] [--quick] [-o FOLDER]
    python -m rvi_fast.bench.inference --errors [--data mnist] [--missing 0.9] [--model paper] [--seed 1] [--quick]

A model is fitted to the first rows of the training images, with holes; then rows of the test images, with holes of
their own, are given to it. "eager" is the loop that published code runs, a minibatch at a time: autograd, with relays
and decoder frozen, and torch.optim.Adam(fused), with the same start, learning rates and steps as `prior`. "encoder" is
a VAE with the same decoder and as many epochs. The elastic error is at the posterior mean, over all missing cells of
the new rows (`missing_error`) or all observed ones. Lines go to bench/results/<device>/inference.csv, and
docs/inference.md has the rows of `table`.

With --errors nothing is timed: the test rows are given to `infer` once, with the model's settings, or, where CANDIDATES
has several, with those that have the least error on a tenth of the training rows' observed cells, hidden from a first
fit; the second fit sees all observed cells. Lines go to errors.csv, one a candidate, and docs/inference.md has the rows
of `error_table`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rvi_fast import RVI, VAE, data, masks, metrics
from rvi_fast.estimators import Estimator
from rvi_fast.infer import ROW_LR, ROW_SCHEDULE, InferencePlan, Posterior
from rvi_fast.likelihoods import Gaussian
from rvi_fast.model import RowModel
from rvi_fast.nn import RelayPosterior

from . import load, results

KEY = ("data", "missing", "model", "way", "steps", "threads", "device")
STEPS, FEWEST = (50, 100, 250, 1000), (10, 25)
BATCH = 256  # of the eager loop
HIDDEN, HIDDEN_SEED = 0.1, 2  # share of the observed training cells to choose by
CANDIDATES: dict[str, dict[str, dict[str, Any]]] = {
    "default": {"as they are": {}},
    "chosen": {
        "as they are": {},
        "latent_dim=32, min_scale=0.2": {"latent_dim": 32, "likelihood": Gaussian(min_scale=0.2)},
    },
    "paper": {"variance 0.02": {}, "variance 0.1": {"likelihood": Gaussian(0.1**0.5)}},
}
PPCA = {  # elastic error on missing pixels of 2,000 test rows, fitted to 10,000 training rows
    ("fashion-mnist", "0.5"): 0.0787,
    ("fashion-mnist", "0.9"): 0.1378,
    ("mnist", "0.5"): 0.0674,
    ("mnist", "0.9"): 0.14,
}
ERRORS_KEY = ("data", "missing", "model", "settings", "seed", "device")
LOADERS = {"mnist": data.mnist, "fashion-mnist": data.fashion_mnist}


def split(name: str, train: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, 784] of the training and of the test images."""
    return LOADERS[name]("train")[0][:train], LOADERS[name]("test")[0][:new]


def eager(model: RVI, X: np.ndarray, mask: np.ndarray, steps: int) -> Tensor:
    """Row parameters [M, C], one minibatch after the other, as one would write it in PyTorch."""
    module, found = copy.deepcopy(model.model_).requires_grad_(False), []
    assert isinstance(module, RowModel)
    posterior, likelihood = module.posterior, module.likelihood
    assert isinstance(posterior, RelayPosterior) and isinstance(likelihood, Gaussian)
    groups, spans = list(posterior.groups), [sum(posterior.groups), posterior.latent_dim, posterior.latent_dim]
    plan = InferencePlan(steps, ROW_LR, ROW_SCHEDULE, model.seed)
    ids, generator = torch.arange(len(X)), torch.Generator().manual_seed(model.seed)
    for start in range(0, len(X), BATCH):
        part = slice(start, start + BATCH)
        x = torch.from_numpy(X[part].astype(np.float32)) * float(np.float32(1 / 255))
        weight = torch.from_numpy(mask[part]) / likelihood.scale()
        target = x * weight
        p = torch.nn.Parameter(posterior.initial_values(ids[part]))
        adam = torch.optim.Adam([p], lr=ROW_LR, betas=plan.hyper[:2], fused=True)
        for step in range(steps):
            adam.param_groups[0]["lr"] = plan.lr_at(step)
            adam.zero_grad()
            coef, residual, log_std = p.split(spans, dim=1)
            kept = torch.zeros_like(coef)
            for of_group, to, active in zip(
                coef.split(groups, 1), kept.split(groups, 1), posterior.active, strict=True
            ):
                to.scatter_(1, of_group.detach().abs().topk(active, dim=1).indices, 1.0)
            mean = torch.addmm(residual, coef * kept, posterior.relays)
            std = log_std.exp()
            xhat = module.decoder(mean + std * torch.randn(mean.shape, generator=generator))
            kl = 0.5 * (mean.square().sum() + std.square().sum()) - log_std.sum()
            nll = 0.5 * torch.nn.functional.mse_loss(xhat * weight, target, reduction="sum")
            (nll + module.kl_weight * kl).backward()
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
    seconds, p = timed(functools.partial(eager, model, X, mask, 25 if quick else 250))
    lines.append(line(model, "eager", 25 if quick else 250, seconds, p, cells))
    print(lines[-1], flush=True)
    if encoder is not None:
        seconds, posterior = timed(functools.partial(encoder.infer, X, mask))
        lines.append(line(encoder, "encoder", 1, seconds, posterior, cells))
        print(lines[-1], flush=True)
    return lines


def fit(model: str, settings: dict[str, Any], X: np.ndarray, mask: np.ndarray, quick: bool, seed: int) -> RVI:
    common: dict[str, Any] = {"seed": seed, "progress": False} | ({"epochs": 2} if quick else {})
    return (RVI.paper if model == "paper" else RVI)(**common | settings).fit(X, mask)


def hidden_error(model: RVI, X: np.ndarray, hidden: np.ndarray) -> float:
    """The elastic error of the training rows' own posterior means on hidden cells, as a mean over all of these."""
    total, mean = 0.0, model.posterior_.mean
    for start in range(0, len(X), 1000):
        part = slice(start, start + 1000)
        posterior = Posterior(mean[part], mean[part], mean[part, 0], mean[part, 0] > 0, torch.arange(len(mean[part])))
        filled = model.reconstruct(X[part], posterior=posterior) / 255
        total += metrics.elastic(X[part] / 255, filled, where=hidden[part]) * hidden[part].sum()
    return total / float(hidden.sum())


def errors(
    name: str, train: np.ndarray, observed: np.ndarray, cells: Any, quick: bool, seed: int
) -> list[results.Line]:
    """A line for each candidate: its error on hidden training cells, and on test rows that of the best alone."""
    candidates = CANDIDATES[name]
    hidden = observed & ~masks.mcar(train.shape, HIDDEN, seed=HIDDEN_SEED)
    found: dict[str, float] = {}
    if len(candidates) > 1:
        for settings, arguments in candidates.items():
            first = fit(name, arguments, train, observed & ~hidden, quick, seed)
            found[settings] = hidden_error(first, train, hidden)
    best = min(found, key=lambda settings: found[settings]) if found else next(iter(candidates))
    model = fit(name, candidates[best], train, observed, quick, seed)
    X, mask = cells
    of_test = line(model, best, 250, 1.0, model.infer(X, mask), cells)
    lines: list[results.Line] = []
    for settings in candidates:
        lines.append({"settings": settings, "seed": seed, "hidden_error": found.get(settings)})
        lines[-1] |= {"hidden_cells": int(hidden.sum()) if found else None}
        if settings == best:
            lines[-1] |= {key: of_test[key] for key in ("missing_error", "observed_error", "elbo", "converged")}
            lines[-1] |= {"missing_cells": int((~mask).sum()), "latent_dim": model.latent_dim_}
            lines[-1] |= {"epochs": model.epochs_, "train_steps": model.n_steps_, "protocol": "row", "steps": 250}
            lines[-1] |= {"likelihood": str(model.likelihood_.settings())}
    return lines


def table(lines: Sequence[dict[str, str]]) -> list[str]:
    """The rows of the docs' table of the default model's ways on Fashion-MNIST, half of the pixels missing."""
    rows = []
    for line in lines:
        if (line["data"], line["missing"], line["model"]) == ("fashion-mnist", "0.5", "default"):
            forms = {"elbo": ".1f", "converged": ".2f", "missing_error": ".4f", "observed_error": ".4f"}
            found = [format(float(line[name]), form) if line[name] else "-" for name, form in forms.items()]
            rows.append(f"| {line['way']} | {line['steps']} | {float(line['rows_per_s']):,.0f} | {' | '.join(found)} |")
    return rows


def error_table(lines: Sequence[dict[str, str]]) -> list[str]:
    """The rows of the docs' table: means over seeds ± their standard deviation, and the settings."""
    rows = []
    for (data_name, missing), ppca in PPCA.items():
        texts = [data_name, f"{100 * float(missing):.0f} %", f"{ppca:.4f}"]
        for model in CANDIDATES:
            at = (data_name, missing, model)
            tested = [of for of in lines if (of["data"], of["missing"], of["model"]) == at and of["missing_error"]]
            found = np.array([float(of["missing_error"]) for of in tested])
            spread = f" ± {found.std(ddof=1):.4f}" if len(found) > 1 else ""
            texts.append(f"{found.mean():.4f}{spread} ({', '.join(dict.fromkeys(of['settings'] for of in tested))})")
        rows.append(f"| {' | '.join(texts)} |")
    return rows


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=LOADERS, default="fashion-mnist")
    parser.add_argument("--missing", type=float, default=0.5)
    parser.add_argument("--model", choices=CANDIDATES, default="default", help="chosen: with --errors")
    parser.add_argument("--errors", action="store_true", help="errors alone, of settings chosen on training rows")
    parser.add_argument("--seed", type=int, default=0, help="of the models; the masks stay")
    parser.add_argument("--quick", action="store_true", help="few rows and epochs: the numbers mean nothing")
    parser.add_argument("-o", "--out", type=Path, metavar="FOLDER")
    arguments = parser.parse_args(given)
    if arguments.model == "chosen" and not arguments.errors:
        parser.error("--model chosen goes with --errors")
    quick, device = arguments.quick, "cuda" if torch.cuda.is_available() else "cpu"
    train, new = split(arguments.data, *((512, 70) if quick else (10_000, 2_000)))
    observed = masks.mcar(train.shape, arguments.missing, seed=0)
    cells = new, masks.mcar(new.shape, arguments.missing, seed=1)
    folder = arguments.out or results.default_folder(device)
    about: dict[str, Any] = {"data": arguments.data, "missing": arguments.missing, "model": arguments.model}
    about |= {"rows": len(new), "train_rows": len(train), "device": device}
    if arguments.errors:
        found = errors(arguments.model, train, observed, cells, quick, arguments.seed)
        about |= {"state": "dry" if quick else "", "ppca": PPCA.get((arguments.data, str(arguments.missing)))}
        results.merge(folder / "errors.csv", [about | line | results.facts(device) for line in found], ERRORS_KEY)
        print(f"-> {folder / 'errors.csv'}")
        return
    model = fit(arguments.model, {}, train, observed, quick, arguments.seed)
    few: dict[str, Any] = {"epochs": 2} if quick else {}
    encoder = (
        VAE(seed=arguments.seed, progress=False, **few).fit(train, observed) if arguments.model == "default" else None
    )
    before = load.ticks()
    lines = measure(model, encoder, cells, quick)
    busy = load.foreign(before, load.ticks())
    about |= {
        "threads": torch.get_num_threads(),
        "epochs": model.epochs_,
        "others_took": busy,
        "state": "dry" if quick else "loaded" if load.objection(busy) else "quiet",
    }
    results.merge(folder / "inference.csv", [about | found | results.facts(device) for found in lines], KEY)
    print(f"-> {folder / 'inference.csv'}")


if __name__ == "__main__":
    main()
