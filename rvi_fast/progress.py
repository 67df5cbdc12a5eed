"""Progress bars."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from tqdm.auto import tqdm

from .dispatch import use_numba

DELAY_S = 2.0  # work shorter than this shows no bar


@contextlib.contextmanager
def progress_bar(shown: bool, device: torch.device, **options: Any) -> Iterator[tqdm]:
    """A bar for work on `device`, and a line before it where that work begins with the compilation of loops."""
    with contextlib.ExitStack() as stack:
        if shown and use_numba(device):
            from .loops.jit import compilation_announced

            stack.enter_context(compilation_announced())
        yield stack.enter_context(tqdm(delay=DELAY_S, disable=not shown, leave=False, **options))
