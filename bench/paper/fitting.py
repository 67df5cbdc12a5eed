"""What happens in one run: data and holes, a fit that is measured on its way, test rows by both protocols."""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rvi_fast import RVI, VAD, VAE, data, defaults, masks
from rvi_fast.estimators import Estimator, RowEstimator
from rvi_fast.infer import TRAINING_ADAM, InferencePlan, clocks_between_visits, trajectory
from rvi_fast.likelihoods import Gaussian
from rvi_fast.model import EncoderModel, RowModel

from ..peers.low_rank import low_rank_impute
from .runs import Point, Result, Run, Size, machine, now

ESTIMATORS: dict[str, Callable[..., Estimator]] = {"RVI": RVI, "VAD": VAD, "VAE": VAE}
IMAGES = ("mnist", "fashion")
LINEAR = {"low-rank": False, "PPCA": True}  # and whether all columns share one noise variance
EPOCHS = (1, 2, 3, 5, 8, 12, 16, 20, 30, 40, 50)  # a curve is measured after these, and at the end
INFERENCE_STEPS = (50, 100, 250)
TEST_MASKS = 1_000  # added to a run's seed for the holes of test rows
HIDDEN_MASKS = 2_000  # and for hidden training cells
LOW_RANKS = (2, 5, 10, 20, 40)  # of the low-rank peer on images
BLOCK = 1_000  # rows decoded together


@functools.cache
def rows_of(name: str, train_rows: int, test_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and test rows [N, D]: the first of each split; tables have training rows alone."""
    if name in IMAGES:
        load = data.mnist if name == "mnist" else data.fashion_mnist
        return load("train")[0][:train_rows], load("test")[0][:test_rows]
    if name == "artificial":
        make = functools.partial(data.artificial, nonlinearity="tanh")
        return make(train_rows), make(test_rows, split="test")
    X = data.digits()[0] if name == "digits" else data.load_table(name)[0].astype(np.float32)
    return X, X[:0]


def metric_scale(name: str, X: np.ndarray) -> np.ndarray:
    """What a cell's error is divided by: images count in [0, 1], columns of tables by their standard deviation."""
    if name in IMAGES:
        return np.full(X.shape[1], 255.0)
    if name == "artificial":
        return np.ones(X.shape[1])
    std = X.std(0, dtype=np.float64)
    return np.where(std > 0, std, 1.0)


class Cells:
    """The errors on some rows: on cells that were seen, on holes, on cells hidden to choose by."""

    def __init__(self, X: np.ndarray, scale: np.ndarray, observed: np.ndarray, hidden: np.ndarray):
        self.scale = torch.from_numpy(scale.astype(np.float32))
        self.x = torch.from_numpy(X.astype(np.float32)) / self.scale
        cells = {"observed": observed & ~hidden, "missing": ~observed, "hidden": hidden}
        self.masks = {name: torch.from_numpy(where).float() for name, where in cells.items()}
        self.counts = {name: int(where.sum()) for name, where in cells.items()}

    def errors(self, xhat: Tensor) -> dict[str, float]:
        """xhat float32 [N, D] in the data's units -> elastic errors, and the squared error on holes."""
        r = (self.x - xhat / self.scale).abs()
        square = r * r
        found = {name: self._mean(r + square, name) for name in self.masks}
        return found | {"mse": self._mean(square, "missing")}

    def _mean(self, values: Tensor, name: str) -> float:
        count = self.counts[name]
        total = torch.linalg.vecdot(values, self.masks[name]).double().sum()  # rows in float32, their sum in float64
        return float(total) / count if count else float("nan")


def execute(run: Run, size: Size) -> Result:
    """Fit and measure."""
    started = time.perf_counter()
    X, X_test = rows_of(run.data, size.train_rows, size.test_rows)
    observed = masks.mcar(X.shape, run.missing, seed=run.seed) if run.missing else np.ones(X.shape, dtype=bool)
    hidden = np.zeros_like(observed)
    if run.hidden:
        hidden = observed & ~masks.mcar(X.shape, run.hidden, seed=HIDDEN_MASKS + run.seed)
    scale = metric_scale(run.data, X)
    cells = Cells(X, scale, observed, hidden)
    if run.method in LINEAR:
        points = _fit_linear(run, X, observed, cells)
    else:
        model = estimator(run, size)
        points = _fit(model, X, observed & ~hidden, cells, run.missing)
        diverged = math.isnan(points[-1].observed)
        for rate in () if diverged else run.test:
            points += _test(model, X_test, rate, run.seed, scale)
    return Result(tuple(points), time.perf_counter() - started, now(), machine())


def estimator(run: Run, size: Size) -> Estimator:
    """The run's estimator, with the arguments of its base that it takes."""
    cls = ESTIMATORS[run.method]
    takes = inspect.signature(cls).parameters
    settings: dict[str, Any] = {}
    if run.base == "paper":
        settings = {k: v for k, v in defaults.PAPER.items() if k in takes}
        settings |= {"likelihood": Gaussian(defaults.PAPER_SCALE)}
    if run.base == "paper" or run.data in IMAGES:
        settings["epochs"] = size.epochs
    settings |= {k: v for k, v in run.settings if k != "scale"}
    if "scale" in dict(run.settings):
        settings["likelihood"] = Gaussian(dict(run.settings)["scale"])
    return cls(**settings, seed=run.seed, progress=False)


def _fit(model: Estimator, X: np.ndarray, mask: np.ndarray, cells: Cells, rate: float) -> list[Point]:
    points: list[Point] = []

    def measure(model: Estimator, logs: dict[str, float]) -> None:
        epoch = len(model.history_["loss"])
        if epoch in EPOCHS or epoch == model.epochs_:
            xhat = _reconstruction(model, _training_means(model, X, mask))
            points.append(Point("train", "", rate, epoch, **cells.errors(xhat)))

    try:
        model.fit(X, mask, callbacks=[measure])
    except FloatingPointError:  # diverged: the curve ends in NaN, which is never best
        points.append(Point("train", "", rate, points[-1].step + 1 if points else 1, *[math.nan] * 4))
    return points


@torch.no_grad()
def _training_means(model: Estimator, X: np.ndarray, mask: np.ndarray) -> Tensor:
    if isinstance(model.model_, RowModel):
        return model.model_.posterior.mean(torch.arange(len(X)))
    return _encoded_means(model, X, mask)


@torch.no_grad()
def _encoded_means(model: Estimator, X: np.ndarray, mask: np.ndarray) -> Tensor:
    assert isinstance(model.model_, EncoderModel)
    return model.model_.encoder(*model.units_.to_model(X, mask))[0]


@torch.no_grad()
def _reconstruction(model: Estimator, means: Tensor) -> Tensor:
    """The decoder's output at posterior means [N, T], float32 [N, D], in the data's units."""
    network = model.model_
    xhat = torch.cat([network.likelihood.mean(network.decoder(z)) for z in means.split(BLOCK)])
    return torch.from_numpy(model.units_.to_user(xhat.numpy())).float()


def _test(model: Estimator, X: np.ndarray, rate: float, seed: int, scale: np.ndarray) -> list[Point]:
    """New rows with holes of their own: both protocols of inference, or the encoder."""
    mask = masks.mcar(X.shape, rate, seed=TEST_MASKS + seed)
    cells = Cells(X, scale, mask, np.zeros_like(mask))
    if not isinstance(model, RowEstimator):
        xhat = _reconstruction(model, _encoded_means(model, X, mask))
        return [Point("test", "encoder", rate, 0, **cells.errors(xhat))]
    x, observed = model.units_.to_model(X, mask)
    points = []
    for protocol in ("row", "epochs"):
        for step, xhat in _inferred(model, x, observed, protocol):
            points.append(Point("test", protocol, rate, step, **cells.errors(xhat)))
    return points


def _inferred(model: RowEstimator, x: Tensor, mask: Tensor, protocol: str) -> list[tuple[int, Tensor]]:
    """Reconstructions after some of the steps of inference; all rows at once, for rows do not see each other."""
    network = model.model_
    assert isinstance(network, RowModel)
    missed = -(-len(x) // model.batch_size_) - 1 if protocol == "epochs" else 0
    lr = model._row_lr()
    plan = InferencePlan(max(INFERENCE_STEPS), lr, model.schedule_, model.seed, missed, hyper=TRAINING_ADAM)
    clocks = clocks_between_visits(plan, x.device)
    steps = trajectory(network, x, mask, torch.arange(len(x)), plan, clocks)
    found = []
    for step, (p, _) in enumerate(steps, start=1):
        if step in INFERENCE_STEPS:
            with torch.no_grad():
                found.append((step, _reconstruction(model, network.posterior.mean_of(p))))
    return found


def _fit_linear(run: Run, X: np.ndarray, observed: np.ndarray, cells: Cells) -> list[Point]:
    """A linear peer; it chooses rank and steps on observed cells that it hides itself."""
    holed = np.where(observed, X, np.nan)
    images = run.data in IMAGES
    fill = functools.partial(low_rank_impute, holed, shared_noise=LINEAR[run.method], seed=run.seed)
    filled = fill(LOW_RANKS, standardize=False) if images else fill()
    errors = cells.errors(torch.from_numpy(filled).float())
    return [Point("train", "", run.missing, 0, **errors | {"observed": float("nan")})]
