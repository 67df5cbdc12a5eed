"""Drives the runs: those that are not measured yet, in parallel, one thread each; then figures and page."""

from __future__ import annotations

import multiprocessing
import os
import signal
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


def wanted(results: Results, name: str, size: Size) -> list[Run]:
    """The experiment's runs that can be named by now and are still to be measured, each once."""
    return [run for run in dict.fromkeys(EXPERIMENTS[name](results, size)) if run not in results]


def measure(results: Results, names: Sequence[str], size: Size, workers: int) -> None:
    """One experiment after the other, its runs in parallel. Results are written as they come: a kill loses few."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _prepare_worker) as pool:
        for name in names:
            with tqdm(desc=name, unit="run", smoothing=0) as bar:
                while runs := wanted(results, name, size):
                    bar.total = bar.n + len(runs)
                    futures = {pool.submit(execute, run, size): run for run in runs}
                    _collect(results, futures, pool, bar)


def _collect(results: Results, futures: dict[Future[Result], Run], pool: ProcessPoolExecutor, bar: tqdm) -> None:
    try:
        for future in as_completed(futures):
            results.add(futures[future], future.result())
            bar.update()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends a fit early, and that is no result
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # momentum of relays that were never selected becomes denormal, and slow
