"""Error on hidden cells of small tables: default RVI beside column means, nearest neighbours and a low-rank model.

    python -m rvi_fast.bench.imputation --data breast_cancer digits --masks 5 --csv imputation.csv

Cells are hidden completely at random; every method is fitted on all rows' observed cells. The error is the mean squared
difference on hidden cells, columns divided by the standard deviation of the complete data (for the metric only). RVI
appears twice: filled at the posterior mean, and by the mean of 30 draws of z.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from rvi_fast import RVI, data, masks

from .peers.knn import knn_impute
from .peers.low_rank import low_rank_impute

DRAWS = 30
TABLES = ("breast_cancer", "wine", "diabetes", "iris", "digits")


class Result(NamedTuple):
    """One method on one mask."""

    data: str
    rate: float
    mask: int
    method: str
    mse: float
    seconds: float


def table(name: str) -> np.ndarray:
    """A complete table of scikit-learn, float64 [N, D]."""
    return data.digits()[0].astype(np.float64) if name == "digits" else data.load_table(name)[0]


def methods(holed: np.ndarray, seed: int) -> dict[str, Callable[[], np.ndarray]]:
    """What fills the holes, in the order in which it is run."""
    model = RVI(seed=seed, progress=False)
    return {
        "column means": lambda: np.where(np.isnan(holed), np.nanmean(holed, axis=0), holed),
        "kNN": lambda: knn_impute(holed),
        "low-rank EM": lambda: low_rank_impute(holed, seed=seed),
        "RVI": lambda: model.fit(holed).impute(),
        "RVI, mean of draws": lambda: model.impute(n_samples=DRAWS).mean(axis=0),
    }


def compare(name: str, rate: float, mask: int) -> list[Result]:
    """All methods on one table with one mask."""
    X = table(name)
    observed = masks.mcar(X.shape, rate, seed=mask)
    scale = np.where(X.std(0) > 0, X.std(0), 1.0)
    results = []
    for method, fill in methods(np.where(observed, X, np.nan), seed=mask).items():
        started = time.perf_counter()
        error = (fill() - X) / scale
        mse = float((error[~observed] ** 2).mean())
        results.append(Result(name, rate, mask, method, mse, time.perf_counter() - started))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=TABLES, default=["breast_cancer", "digits"])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.5])
    parser.add_argument("--masks", type=int, default=5)
    parser.add_argument("--csv", help="write every result to this file")
    arguments = parser.parse_args()

    found: list[Result] = []
    print(f"{'data':<14} {'rate':>4}  {'method':<19} {'mean MSE':>8}  {'standard error':>14}  {'seconds':>7}")
    for name in arguments.data:
        for rate in arguments.rates:
            rows = [r for mask in range(arguments.masks) for r in compare(name, rate, mask)]
            for method in dict.fromkeys(r.method for r in rows):
                mse = np.array([r.mse for r in rows if r.method == method])
                seconds = np.median([r.seconds for r in rows if r.method == method])
                error = mse.std(ddof=1) / np.sqrt(len(mse)) if len(mse) > 1 else float("nan")
                print(
                    f"{name:<14} {rate:>4}  {method:<19} {mse.mean():>8.4f}  {error:>14.4f}  {seconds:>7.1f}",
                    flush=True,
                )
            found += rows
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(Result._fields)
            writer.writerows(found)


if __name__ == "__main__":
    main()
