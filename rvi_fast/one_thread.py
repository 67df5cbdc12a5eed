"""PyTorch's operators on one thread for a while, also where several threads of a program ask for it at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_lock = threading.Lock()
_inside, _threads = 0, 1  # how many ask for it now, and what PyTorch had before


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within: operators of this thread, and of threads that begin meanwhile, take one thread each."""
    global _inside, _threads
    with _lock:
        if _inside == 0:
            _threads = torch.get_num_threads()
        _inside += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            torch.set_num_threads(_threads)


def stay_alone() -> None:
    """In a thread that began within: the number is the whole process's until a thread asks for it, and another one may
    have given it back by then."""
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
