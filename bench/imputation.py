"""Error on hidden cells of small tables: RVIImputer with its defaults beside what else fills holes.

    python -m rvi_fast.bench.imputation
    python -m rvi_fast.bench.imputation --data wine digits --rates 0.5 --csv FILE
    python -m rvi_fast.bench.imputation --methods RVI "RVI, one member"
    python -m rvi_fast.bench.imputation --quick

Cells are hidden completely at random, five masks a rate. The error is the mean squared difference on hidden cells,
columns divided by the standard deviation of the complete data (for the metric only). `mse`: every method is fitted on
all rows' observed cells and fills these rows (RVI by their own trained posteriors). `new_rows_mse`: fitted on 80 % of
the rows, it fills the other 20 %; empty where a method cannot. RVI appears twice: as RVIImputer fills, by the mean of
its members, and by the first member alone. kNN and IterativeImputer see z-scored columns; trees are
IterativeImputer with ExtraTrees, for tables of up to 20 columns. A method without a result has no line. The file is
replaced as a whole after every table and rate, and docs/tables.md has the rows of `docs_table`.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rvi_fast import data, masks

from . import results
from .peers.low_rank import low_rank_impute

NEW_ROWS = 0.2
TREES, TREE_ROUNDS, TREE_COLUMNS = 30, 5, 20  # wider tables would take hours
TABLES = ("digits", "breast_cancer", "wine", "diabetes", "iris")
RATES = (0.3, 0.5, 0.7)
METHODS = ("column means", "kNN", "IterativeImputer", "trees", "low-rank EM", "RVI", "RVI, one member")
COMPARED = METHODS[1:-1]  # in the docs
KEY = ("data", "rate", "mask", "method")

Filled = np.ndarray | None


class Result(NamedTuple):
    """One method on one mask. Seconds include fitting."""

    data: str
    rate: float
    mask: int
    method: str
    mse: float
    new_rows_mse: float | None
    seconds: float
    new_rows_seconds: float | None


def table(name: str) -> np.ndarray:
    """A complete table of scikit-learn, float64 [N, D]."""
    return data.digits()[0].astype(np.float64) if name == "digits" else data.load_table(name)[0]


def methods(seed: int) -> dict[str, Callable[[np.ndarray, np.ndarray | None], Filled]]:
    """What fills holes, in the order in which it is run: of the fitted rows, or of new ones where these are given."""
    from sklearn.ensemble import ExtraTreesRegressor
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer

    from rvi_fast.sklearn import RVIImputer

    rvi = RVIImputer(transductive=True, random_state=seed)

    def one_member(fitted: np.ndarray, new: np.ndarray | None) -> Filled:
        """Of those that RVI has just fitted."""
        return rvi.rvi_.impute(new)

    def trees(fitted: np.ndarray, new: np.ndarray | None) -> Filled:
        if fitted.shape[1] > TREE_COLUMNS:
            return None
        forest = ExtraTreesRegressor(TREES, random_state=seed)
        return _fill(IterativeImputer(forest, max_iter=TREE_ROUNDS, random_state=seed), fitted, new)

    def low_rank(fitted: np.ndarray, new: np.ndarray | None) -> Filled:
        return low_rank_impute(fitted, seed=seed) if new is None else None

    fills: tuple[Callable[[np.ndarray, np.ndarray | None], Filled], ...] = (
        lambda fitted, new: _fill(SimpleImputer(), fitted, new),
        lambda fitted, new: _fill_standardized(KNNImputer(), fitted, new),
        lambda fitted, new: _fill_standardized(IterativeImputer(random_state=seed), fitted, new),
        trees,
        low_rank,
        lambda fitted, new: _fill(rvi, fitted, new),
        one_member,
    )
    return dict(zip(METHODS, fills, strict=True))


def _fill(imputer: Any, fitted: np.ndarray, new: np.ndarray | None) -> np.ndarray:
    return imputer.fit_transform(fitted) if new is None else imputer.fit(fitted).transform(new)


def _fill_standardized(imputer: Any, fitted: np.ndarray, new: np.ndarray | None) -> np.ndarray:
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(fitted)
    filled = _fill(imputer, scaler.transform(fitted), None if new is None else scaler.transform(new))
    return scaler.inverse_transform(filled)


def compare(name: str, rate: float, mask: int, chosen: Sequence[str] = METHODS) -> list[Result]:
    """The chosen methods on one table with one mask."""
    X = table(name)
    observed = masks.mcar(X.shape, rate, seed=mask)
    holed = np.where(observed, X, np.nan)
    scale = np.where(X.std(0) > 0, X.std(0), 1.0)
    is_new = np.zeros(len(X), dtype=bool)
    is_new[np.random.default_rng(mask).permutation(len(X))[: round(NEW_ROWS * len(X))]] = True

    def measure(fill: Callable, fitted: np.ndarray, new: np.ndarray | None, rows: Any) -> tuple[Any, Any]:
        started = time.perf_counter()
        filled = fill(fitted, new)
        seconds = time.perf_counter() - started
        if filled is None:
            return None, None
        return float((((filled - X[rows]) / scale)[~observed[rows]] ** 2).mean()), seconds

    fills = {method: fill for method, fill in methods(seed=mask).items() if method in chosen}
    known = {method: measure(fill, holed, None, slice(None)) for method, fill in fills.items()}
    found = []
    for method, fill in fills.items():
        mse, seconds = known[method]
        if mse is None:
            continue
        new_mse, new_seconds = measure(fill, holed[~is_new], holed[is_new], is_new)
        found.append(Result(name, rate, mask, method, mse, new_mse, seconds, new_seconds))
    return found


def summary(found: Sequence[Result]) -> str:
    """Means over masks with standard errors, and median seconds, a line for each table, rate and method."""
    lines = [["data", "rate", "method", "MSE", "+-", "s", "MSE, new rows", "+-", "s"]]
    for name, rate, method in dict.fromkeys((r.data, r.rate, r.method) for r in found):
        chosen = [r for r in found if (r.data, r.rate, r.method) == (name, rate, method)]
        known = _mean_and_error([r.mse for r in chosen], [r.seconds for r in chosen])
        new = [r for r in chosen if r.new_rows_mse is not None]
        fresh = _mean_and_error([r.new_rows_mse for r in new], [r.new_rows_seconds for r in new]) if new else ["-"] * 3
        lines.append([name, str(rate), method, *known, *fresh])
    return results.table(lines)


def docs_table(lines: Sequence[dict[str, str]], column: str) -> list[str]:
    """The rows of a table in the docs, all rates in a cell: means over masks, or medians of seconds."""
    rows = []
    for name in TABLES:
        texts = [name.replace("_", " ")]
        for method in COMPARED:
            at = [line for line in lines if (line["data"], line["method"]) == (name, method) and line[column]]
            found = [[float(line[column]) for line in at if float(line["rate"]) == rate] for rate in RATES]
            numbers = [
                f"{np.median(each):.1f}" if "seconds" in column else f"{np.mean(each):.3f}" for each in found if each
            ]
            texts.append(" / ".join(numbers) or "-")
        rows.append(f"| {' | '.join(texts)} |")
    return rows


def _mean_and_error(errors: Sequence[Any], seconds: Sequence[Any]) -> list[str]:
    spread = np.std(errors, ddof=1) / np.sqrt(len(errors)) if len(errors) > 1 else float("nan")
    return [f"{np.mean(errors):.4f}", f"{spread:.4f}", f"{np.median(seconds):.1f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--masks", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="one member needs RVI beside it")
    parser.add_argument("--quick", action="store_true", help="iris and wine, half of the cells hidden, two masks")
    parser.add_argument("--csv", type=Path, help="the file of results; default imputation.csv in bench/results/cpu")
    given = parser.parse_args(arguments)
    if given.quick:
        given.data, given.rates, given.masks = ("iris", "wine"), (0.5,), 2
    path = given.csv or results.default_folder("cpu") / "imputation.csv"

    for name in given.data:
        for rate in given.rates:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "(?s).*Early stopping criterion not reached")
                found = [result for mask in range(given.masks) for result in compare(name, rate, mask, given.methods)]
            facts = {"device": "cpu", **results.facts("cpu")}
            results.merge(path, [{**result._asdict(), **facts} for result in found], KEY)
            print(summary(found), flush=True)


if __name__ == "__main__":
    main()
