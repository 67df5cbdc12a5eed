"""Who takes part in the race of training steps: their names, what algorithm each one is, how it is made."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch

from .peers.decoder import DecoderStep
from .peers.kept import KeptGradientsStep
from .peers.sparse import SparseAdamStep
from .peers.vae import VAEStep
from .steps import Data, DenseAdamStep, Peer, RowAdamStep, Sizes

DENSE, LAZY, NONE = "dense Adam", "lazy Adam, a different algorithm", "no table of rows"
OURS, APART, DECODER = "rvi_fast, fused", "rvi_fast, apart", "decoder alone"
EAGER, EAGER_FOREACH, COMPILED = "eager, Adam(fused)", "eager, Adam(foreach)", "torch.compile, Adam(fused)"
KEPT = "eager, kept gradients, Adam(fused)"
SPARSE, JAX, VAE = "SparseAdam", "JAX, jit of lax.scan", "VAE"
Make = Callable[[Sizes, Data, torch.device, bool], Peer]


class Entry(NamedTuple):
    """A contestant. copies: of the table of rows that it holds at most, moments and gradients included."""

    name: str
    algorithm: str
    copies: float
    make: Make
    package: str = "torch"

    @property
    def checked(self) -> bool:
        """Whether it must show the loss curve of dense Adam before it is timed."""
        return self.algorithm == DENSE

    def absent(self) -> str:
        return "" if importlib.util.find_spec(self.package) else f"{self.package} is not installed"

    def needs(self, sizes: Sizes, data_bytes: int) -> int:
        """Bytes that it holds at most, the data that all share apart."""
        return int(self.copies * sizes.num_rows * sizes.width * 4) + (data_bytes if self.name == JAX else 0)


def _compiled(sizes: Sizes, data: Data, device: torch.device, dry: bool) -> Peer:
    if dry:
        return DenseAdamStep(sizes, data, "eager")
    return DenseAdamStep(sizes, data, "inductor", mode="reduce-overhead" if device.type == "cuda" else None)


def _jax(sizes: Sizes, data: Data, device: torch.device, dry: bool) -> Peer:
    from .peers.jax_scan import JaxScanStep

    return JaxScanStep(sizes, data)


ENTRIES = (
    Entry(OURS, DENSE, 3, lambda s, d, device, dry: RowAdamStep(s, d, fused=True)),
    Entry(DECODER, NONE, 0, lambda s, d, device, dry: DecoderStep(s, d)),
    Entry(APART, DENSE, 3, lambda s, d, device, dry: RowAdamStep(s, d, fused=False)),
    Entry(EAGER_FOREACH, DENSE, 6, lambda s, d, device, dry: DenseAdamStep(s, d, None, adam="foreach")),
    Entry(EAGER, DENSE, 4, lambda s, d, device, dry: DenseAdamStep(s, d, None)),
    Entry(KEPT, DENSE, 4, lambda s, d, device, dry: KeptGradientsStep(s, d, None)),
    Entry(COMPILED, DENSE, 4, _compiled),
    Entry(JAX, DENSE, 5, _jax, "jax"),
    Entry(SPARSE, LAZY, 3, lambda s, d, device, dry: SparseAdamStep(s, d, None)),
    Entry(VAE, NONE, 0, lambda s, d, device, dry: VAEStep(s, d)),
)
REFERENCES = (OURS, DECODER)  # take part in every race: ratios are to these


def entry(name: str) -> Entry:
    return next(e for e in ENTRIES if e.name == name)


def chosen(only: tuple[str, ...]) -> list[Entry]:
    """All, or the references and those whose name contains one of the words."""
    for word in only:
        if not any(word in e.name for e in ENTRIES):
            raise ValueError(f"no contestant is called {word!r}; there are {'; '.join(e.name for e in ENTRIES)}")
    return [e for e in ENTRIES if not only or e.name in REFERENCES or any(word in e.name for word in only)]
