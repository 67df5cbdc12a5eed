"""Whether intervals for hidden cells cover: the share of them in 50 % and 90 % intervals, by draws weighted or not.

    python -m rvi_fast.bench.calibration [--data wine digits] [--seeds 5] [--quick] [-o FOLDER]

RVI with its defaults is fitted to the first part of a shuffled table's rows (of Fashion-MNIST: the first images), half
of the cells hidden completely at random; then the other rows, with holes of their own, are given to `infer`. The
interval of a cell is mean -+ c std of `predictive`, c of the normal distribution. `coverage`: with the likelihood's
noise (`std_with_noise`), over hidden cells; `observed_coverage`: over observed ones; `z_coverage`: of hidden cells,
without noise (`std`); `fitted_coverage_90`: of a table's fitted rows' hidden cells. Columns that do not
vary in the fitted rows are left out. `mse`: on hidden cells at E[f(z)], `mse_at_mean` at f(mean); cells are divided by
their column's standard deviation (pixels by 255). Lines go to
bench/results/<device>/calibration.csv, and docs/inference.md has the rows of `table`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rvi_fast import RVI, data, masks
from rvi_fast.predictive import Predictive

from . import imputation, results

KEY = ("data", "missing", "seed", "draws", "weights", "device")
TABLES = ("breast_cancer", "diabetes", "wine", "digits")
IMAGES = "fashion-mnist"
MISSING, DRAWS, SEEDS = 0.5, 500, 3
NEW_ROWS, IMAGE_ROWS, NEW_IMAGES = 0.2, 4_000, 500
FACTORS = {"50": 0.6744897501960817, "90": 1.6448536269514722}  # standard deviations of a normal interval
COLUMNS = {"cells": ",.0f", "coverage_50": ".3f", "coverage_90": ".3f", "fitted_coverage_90": ".3f"}  # of the docs
COLUMNS |= {
    "observed_coverage_90": ".3f",
    "z_coverage_90": ".3f",
    "mse": ".4f",
    "ess_median": ".0f",
    "ess_tenth": ".0f",
}
WEIGHTS = {"none": "n_samples", "importance": "importance_samples"}


def rows_of(name: str, seed: int, quick: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit and new ones [N, D]; only tables are shuffled by the seed."""
    if name == IMAGES:
        X, new = data.fashion_mnist("train")[0], data.fashion_mnist("test")[0]
        return X[: 300 if quick else IMAGE_ROWS], new[: 20 if quick else NEW_IMAGES]
    X = imputation.table(name)
    X = X[np.random.default_rng(seed).permutation(len(X))]
    first_new = len(X) - round(NEW_ROWS * len(X))
    return X[:first_new], X[first_new:]


def measure(name: str, seed: int, quick: bool) -> list[results.Line]:
    """A line for draws that are not weighted and one for those that are."""
    X, new = rows_of(name, seed, quick)
    mask, new_mask = masks.mcar(X.shape, MISSING, seed=2 * seed), masks.mcar(new.shape, MISSING, seed=2 * seed + 1)
    model = RVI(seed=seed, progress=False, epochs=2 if quick else "auto").fit(X, mask)
    posterior = model.infer(new, new_mask)
    draws = 10 if quick else DRAWS
    scale = np.full(X.shape[1], 255.0) if name == IMAGES else X.std(0)
    varies = ~model.units_.constant & (scale > 0)
    fitted = None  # of thousands of images it takes minutes
    if name != IMAGES:
        fitted = coverage(model.predictive(n_samples=draws), X, mask, varies, scale)["coverage_90"]
    lines = []
    for weights, argument in WEIGHTS.items():
        found = model.predictive(new, new_mask, posterior=posterior, **{argument: draws})
        about = {
            "data": name,
            "missing": MISSING,
            "seed": seed,
            "weights": weights,
            "draws": draws,
            "train_rows": len(X),
            "rows": len(new),
            "epochs": model.epochs_,
            "train_steps": model.n_steps_,
            "fitted_coverage_90": fitted,
        }
        lines.append(about | coverage(found, new, new_mask, varies, scale))
    return lines


def coverage(found: Predictive, X: np.ndarray, mask: np.ndarray, varies: np.ndarray, scale: np.ndarray) -> results.Line:
    """Shares of cells of columns that vary (bool [D]) in their intervals, errors, and what the draws were worth."""
    hidden, observed = ~mask & varies, mask & varies
    gap = np.abs(X - found.mean)
    line: results.Line = {"cells": int(hidden.sum())}
    for name, spread, where in (
        ("coverage", found.std_with_noise, hidden),
        ("observed_coverage", found.std_with_noise, observed),
        ("z_coverage", found.std, hidden),
    ):
        line |= {f"{name}_{share}": float((gap <= c * spread)[where].mean()) for share, c in FACTORS.items()}
    scale = np.where(varies, scale, 1.0)
    line["mse"] = float(((gap / scale)[hidden] ** 2).mean())
    line["mse_at_mean"] = float((((X - found.at_mean) / scale)[hidden] ** 2).mean())
    return line | {"ess_median": float(np.median(found.ess)), "ess_tenth": float(np.quantile(found.ess, 0.1))}


def table(lines: Sequence[dict[str, str]]) -> list[str]:
    """The rows of the docs' table: means over seeds, with standard deviations beside the coverage of hidden cells."""
    rows = []
    for name, weights in dict.fromkeys((line["data"], line["weights"]) for line in lines):
        chosen = [line for line in lines if (line["data"], line["weights"]) == (name, weights)]
        texts = [name, weights]
        for column, form in COLUMNS.items():
            found = np.array([float(line[column] or "nan") for line in chosen])
            spread = f" ± {found.std(ddof=1):.3f}" if column.startswith("coverage") and len(found) > 1 else ""
            texts.append("-" if np.isnan(found).any() else format(found.mean(), form) + spread)
        rows.append(f"| {' | '.join(texts)} |")
    return rows


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=(*TABLES, IMAGES), default=(*TABLES, IMAGES))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--quick", action="store_true", help="few epochs and draws: the numbers mean nothing")
    parser.add_argument("-o", "--out", type=Path, metavar="FOLDER")
    arguments = parser.parse_args(given)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = (arguments.out or results.default_folder(device)) / "calibration.csv"
    about = {"device": device, "state": "dry" if arguments.quick else ""}
    for name in arguments.data:
        for seed in range(arguments.seeds):
            lines = [line | about | results.facts(device) for line in measure(name, seed, arguments.quick)]
            results.merge(path, lines, KEY)
    print("\n".join(table(results.read(path))))


if __name__ == "__main__":
    main()
