"""How the loops are compiled: once for each combination of dtypes, and kept on disk."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from numba.core.event import Listener, install_listener
from tqdm.auto import tqdm


def cache_folder() -> str | None:
    """Where compiled loops are kept; None where that cannot be written.

    In the user's cache, because beside the sources they would outlive an uninstallation and hide a checkout that is
    installed next. One folder for each state of the sources: a loop holds those that it calls, and numba looks for
    changes in the loop's own file only.
    """
    here = Path(__file__).parent
    sources = hashlib.sha256()
    for file in (*sorted(here.glob("*.py")), here.parent / "reference.py"):  # loops take constants from the latter
        sources.update(file.read_bytes())
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(numba.config.CACHE_DIR or user_cache, "rvi_fast", sources.hexdigest()[:16])
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return None
    return folder


FOLDER = cache_folder()


@contextlib.contextmanager
def _kept_in_folder() -> Iterator[None]:
    """numba asks for the folder when a function is decorated. Other libraries' functions stay where they are."""
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, FOLDER
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


def _compiler(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    def compile_later(function: Callable[..., Any]) -> Any:
        with _kept_in_folder():
            return numba.njit(cache=FOLDER is not None, nogil=True, error_model="numpy", **options)(function)

    return compile_later


# Sums may be reordered and products fused into them, or nothing is vectorised; NaN and infinity keep their meaning.
# LLVM vectorises a loop where a few comparisons of addresses show that what it writes is read nowhere else: in place,
# or between few arrays.
compiled = _compiler(fastmath={"reassoc", "contract"})
exact = _compiler()  # to the bit as written


class Announcer(Listener):
    """Hears of what numba compiles, and says so once: it takes longer than all else of a first call."""

    def on_start(self, event: Any) -> None:
        if event.data["dispatcher"].py_func.__module__.startswith(__package__):
            _announce()

    def on_end(self, event: Any) -> None:
        pass


@functools.cache
def _announce() -> None:
    kept = f"kept in {FOLDER}" if FOLDER else "in every process, for no cache folder can be written"
    tqdm.write(f"compiling loops for the CPU ({kept})", file=sys.stderr)


def compilation_announced() -> contextlib.AbstractContextManager[None]:
    """Meanwhile, a line on stderr says that loops are being compiled, if they are."""
    return install_listener("numba:compile", Announcer())
