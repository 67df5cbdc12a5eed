"""Drives the runs: those that are not measured yet, in parallel, one thread each; then figures and page."""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .experiments import EXPERIMENTS
from .fitting import execute
from .runs import SIZES, Results, Run, Size

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_paper(
    out: str | os.PathLike[str] | None, size: str, only: Sequence[str] = (), workers: int | None = None
) -> Path:
    """Run what `out` does not hold yet of the experiments `only` (default: all), draw it; returns the page's path."""
    names = list(dict.fromkeys(name.strip() for name in only if name.strip())) or list(EXPERIMENTS)
    unknown = set(names) - set(EXPERIMENTS)
    if unknown:
        raise ValueError(f"--only takes {', '.join(EXPERIMENTS)}; got {min(unknown)!r}")
    lacking = [module for module in ("matplotlib", "scipy", "sklearn") if importlib.util.find_spec(module) is None]
    if lacking:
        raise ImportError(f"the paper's experiments need {', '.join(lacking)}; run pip install 'rvi_fast[paper]'")
    from .page import write_page

    results = Results(out or f"rvi-fast-paper-{size}", size)
    with _alone(results.folder):
        measure(results, names, SIZES[size], workers or os.cpu_count() or 1)
        return write_page(results, names)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time: each writes all results that it knows of."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(
            f"another rvi-fast paper is at work in {folder}; wait for it, or choose another --out"
        ) from None
    finally:
        os.close(handle)


def wanted(results: Results, name: str, size: Size) -> list[Run]:
    """The experiment's runs that can be named by now and are still to be measured, each once."""
    return [run for run in dict.fromkeys(EXPERIMENTS[name](results, size)) if run not in results]


def measure(results: Results, names: Sequence[str], size: Size, workers: int) -> None:
    """One experiment after the other, its runs in parallel. Results are written as they come: a kill loses few."""
    context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    with _single_threaded(), ProcessPoolExecutor(workers, context, _prepare_worker) as pool:
        for name in names:
            with tqdm(desc=name, unit="run", smoothing=0) as bar:
                while runs := wanted(results, name, size):
                    bar.total = bar.n + len(runs)
                    _execute_all(results, runs, size, pool, bar, others)


def _execute_all(
    results: Results, runs: list[Run], size: Size, pool: ProcessPoolExecutor, bar: tqdm, others: set
) -> None:
    try:
        futures = {pool.submit(execute, run, size): run for run in runs}
        for future in as_completed(futures):
            results.add(futures[future], future.result())
            bar.update()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise


@contextlib.contextmanager
def _single_threaded() -> Iterator[None]:
    """Processes started here use one thread each for their products, NumPy's included."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends a fit early, and that is no result
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # momentum of relays that were never selected becomes denormal, and slow


def _end_with_parent() -> None:
    """A killed parent cannot tell its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
