"""What training steps are timed on: the paper's setting, and one thing changed at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rvi_fast import ops
from rvi_fast.defaults import PAPER, PAPER_SCALE

from .steps import Data, Sizes

PAPER_ROWS, PIXELS = 60_000, 784
WIDE_GROUPS, WIDE_COLUMNS, WIDE_ROWS = (128, 256, 640), 20_000, 10_000


class Setting(NamedTuple):
    """A model, its data and its batch."""

    name: str
    axis: str  # what differs from the paper's setting
    num_rows: int = PAPER_ROWS
    columns: int = PIXELS
    groups: tuple[int, ...] = PAPER["groups"]
    active: float = PAPER["active"]
    batch: int = PAPER["batch_size"]
    missing: float = 0.5
    dtype: str = "float32"  # of x
    latents: int = PAPER["latent_dim"]
    hidden: tuple[int, ...] = PAPER["hidden"]
    scale: float = PAPER_SCALE

    def sizes(self, num_rows: int | None = None) -> Sizes:
        active = ops.active_counts(self.groups, self.active)
        rows = self.num_rows if num_rows is None else num_rows
        return Sizes(rows, self.columns, self.latents, self.hidden, self.groups, active, self.scale)

    def data(self) -> Data:
        return Data(self.sizes(), self.missing, getattr(torch, self.dtype))

    @property
    def data_bytes(self) -> int:
        """Of x and its mask."""
        return self.num_rows * self.columns * (getattr(torch, self.dtype).itemsize + 1)


def settings(device: str) -> list[Setting]:
    """In the order in which they are run: what matters most comes first."""
    gpu = device == "cuda"
    rows = {"1e4": 10_000, "6e4": 60_000, "3e5": 300_000, "1e6": 1_000_000} | ({"1e7": 10_000_000} if gpu else {})
    batches = (64, 1024, 4096, 16_384, *((65_536,) if gpu else ()))
    return [
        Setting("paper", "none"),
        *(Setting(f"rows-{name}", "rows", num_rows=n, dtype="uint8") for name, n in rows.items()),
        *(Setting(f"batch-{b}", "batch", num_rows=max(PAPER_ROWS, 4 * b), batch=b) for b in batches),
        Setting("columns-30", "columns", columns=30),
        Setting("columns-20000", "columns", columns=WIDE_COLUMNS, num_rows=WIDE_ROWS),
        *(Setting(f"active-{share}", "active", active=share) for share in (0.1, 0.9)),
        Setting("relays-1024", "relays", groups=WIDE_GROUPS),
        *(Setting(f"missing-{share:g}", "missing", missing=share) for share in (0.0, 0.9)),
    ]


DRY = Setting("dry", "none", 96, 12, (3, 5), 0.5, 16, latents=6, hidden=(8, 8))


def setting(name: str, device: str) -> Setting:
    return next(s for s in (*settings(device), DRY) if s.name == name)


def chosen(words: tuple[str, ...], device: str) -> list[Setting]:
    """All, or those whose names begin with one of the words."""
    found = settings(device)
    for word in words:
        if not any(s.name.startswith(word) for s in found):
            raise ValueError(f"no workload is called {word!r}; there are {', '.join(s.name for s in found)}")
    return [s for s in found if not words or s.name.startswith(words)]
