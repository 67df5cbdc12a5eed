"""Does RVI with row Adam follow the published algorithm, dense Adam over all rows? Paper setting, Fashion-MNIST.

    python -m rvi_fast.bench.dense_adam_curve [--rows 10000] [--steps 100] [--missing 0.5]

Trains rvi_fast in float32 and the eager peer in float32 and float64 from the same values, on the same batches with the
same noise, and prints the largest relative difference of the loss from the float64 one, for both.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rvi_fast import RVI, data, masks
from rvi_fast.likelihoods import Gaussian
from rvi_fast.model import RowModel
from rvi_fast.observations import Observations
from rvi_fast.train import Trainer

from .peers.eager import EagerRVI


def curves(X: np.ndarray, steps: int, **settings: Any) -> dict[str, list[float]]:
    """Losses of the first steps: ours in float32, the peer in float32 and in float64."""
    ours = RVI.paper(progress=False, **settings)
    trainer = prepared_trainer(ours, X)
    model = trainer.model
    assert isinstance(model, RowModel) and isinstance(model.likelihood, Gaussian)
    peer32 = EagerRVI.copy_of(model, X.shape[1], ours.hidden_, model.likelihood.fixed)
    peers = {"eager float32": peer32, "eager float64": copy.deepcopy(peer32).double()}
    adams = {name: torch.optim.Adam(peer.parameters(), lr=ours.lr_) for name, peer in peers.items()}
    losses: dict[str, list[float]] = {name: [] for name in ("rvi_fast float32", *peers)}
    batches = trainer.batches()
    for _ in range(steps):
        rows = next(batches)
        index, (x, mask) = torch.from_numpy(rows), trainer.source.read(rows)
        noise = model.posterior.noise(index, "train", model.posterior.step)
        for name, peer in peers.items():
            losses[name].append(_peer_step(peer, adams[name], index, x, mask, noise))
        losses["rvi_fast float32"].append(_our_step(trainer, rows))
    return losses


def prepared_trainer(estimator: RVI, X: np.ndarray) -> Trainer:
    """The trainer of an estimator on X, before its first step."""
    estimator.fit(X, max_steps=1, callbacks=())  # resolves settings; a second build starts over
    estimator._build(len(X), None)
    trainer = estimator._trainer(Observations(X), None, None)
    trainer.model.train()
    return trainer


def _peer_step(peer: EagerRVI, adam: torch.optim.Adam, rows: Tensor, x: Tensor, mask: Tensor, noise: Tensor) -> float:
    dtype = peer.relays.dtype
    adam.zero_grad()
    loss = peer(rows, x.to(dtype), mask, noise.to(dtype))
    loss.backward()
    adam.step()
    return loss.item()


def _our_step(trainer: Trainer, rows: np.ndarray) -> float:
    before = list(trainer.progress.sums)
    trainer.step(rows)
    nll, kl, count = (now - then for now, then in zip(trainer.progress.sums, before, strict=True))
    return (nll + trainer.model.kl_weight * kl) / count


def relative_differences(losses: dict[str, list[float]]) -> dict[str, float]:
    """Largest |loss - truth| / |truth| over the steps, truth being the float64 peer."""
    truth = np.array(losses["eager float64"])
    return {name: float(np.max(np.abs(np.array(curve) - truth) / np.abs(truth))) for name, curve in losses.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Row Adam against dense Adam: the loss curve of the paper setting.")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--missing", type=float, default=0.5)
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    X = data.fashion_mnist()[0][: arguments.rows].astype(np.float32) / 255
    X[~masks.mcar(X.shape, arguments.missing, seed=0)] = np.nan
    losses = curves(X, arguments.steps)
    for name, curve in losses.items():
        print(f"{name:<18} loss at step 1: {curve[0]:.6f}, at step {len(curve)}: {curve[-1]:.6f}")
    for name, difference in relative_differences(losses).items():
        print(f"{name:<18} largest relative difference from float64: {difference:.2e}")


if __name__ == "__main__":
    main()
