"""Drives the runs: those that are not measured yet, in parallel, one thread each; then figures and page."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .experiments import EXPERIMENTS
from .fitting import execute
from .runs import SIZES, Result, Results, Run, Size


def run_paper(
    out: str | os.PathLike[str], size: str, only: Sequence[str] = (), workers: int | None = None, draw: bool = True
) -> Path:
    """Run what `out` does not hold yet of the experiments `only` (default: all), draw it; returns the page's path."""
    results = Results(out)
    names = list(only or EXPERIMENTS)
    unknown = set(names) - set(EXPERIMENTS)
    if unknown:
        raise ValueError(f"--only takes {', '.join(EXPERIMENTS)}; got {min(unknown)!r}")
    measure(results, names, SIZES[size], workers or os.cpu_count() or 1)
    if not draw:
        return results.folder
    from .page import write_page  # matplotlib and scipy are extras

    return write_page(results, names, size)


def wanted(results: Results, names: Sequence[str], size: Size) -> list[Run]:
    """Runs that are still to be measured, each once."""
    runs = [run for name in names for run in EXPERIMENTS[name](results, size)]
    return [run for run in dict.fromkeys(runs) if run not in results]


def measure(results: Results, names: Sequence[str], size: Size, workers: int) -> None:
    """Runs are independent processes' work; results are written as they come, so a kill loses the runs at work only."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _prepare_worker) as pool, tqdm(unit="run", smoothing=0) as bar:
        while runs := wanted(results, names, size):
            bar.total = bar.n + len(runs)
            futures: dict[Future[Result], Run] = {pool.submit(execute, run, size): run for run in runs}
            try:
                for future in as_completed(futures):
                    results.add(futures[future], future.result())
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _prepare_worker() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # momentum of relays that were never selected becomes denormal, and slow
