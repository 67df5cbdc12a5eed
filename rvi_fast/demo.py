"""rvi-fast demo: handwritten digits with half of the pixels hidden, filled by RVI and by three baselines."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from . import data, masks, metrics
from .bench.peers.knn import knn_impute
from .bench.peers.low_rank import low_rank_impute
from .estimators import RVI

HIDDEN_SHARE = 0.5
SHOWN = 12  # images in the picture
HOLE = "#d95f5f"


def run(out: str, *, seed: int = 0, epochs: int | None = None, progress: bool = True) -> dict[str, float]:
    """Train, compare, save the model and (with matplotlib) a picture under `out`.

    Returns the mean squared error on hidden cells of every method, each column divided by its standard deviation.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    X, _ = data.digits()
    observed = masks.mcar(X.shape, HIDDEN_SHARE, seed=seed)
    holed = np.where(observed, X, np.nan).astype(np.float32)
    print(f"digits: {len(X)} images of 8 x 8 pixels, {HIDDEN_SHARE:.0%} of the pixels hidden (MCAR, seed {seed})\n")

    model = RVI(seed=seed, progress=progress, epochs="auto" if epochs is None else epochs)
    methods: dict[str, Callable[[], np.ndarray]] = {
        "column means": lambda: np.where(observed, X, np.nanmean(holed, axis=0)),
        "5 nearest neighbours": lambda: knn_impute(holed),
        "low-rank EM": lambda: low_rank_impute(holed, seed=seed),
        "RVI": lambda: model.fit(holed).impute(),
    }
    scale = np.where(X.std(0) > 0, X.std(0), 1.0)
    print(f"{'':<22}{'error on hidden pixels':>24}{'seconds':>10}")
    errors = {}
    for name, fill in methods.items():
        started = time.perf_counter()
        filled = fill()
        seconds = time.perf_counter() - started
        errors[name] = metrics.rmse(X / scale, filled / scale, ~observed) ** 2
        print(f"{name:<22}{errors[name]:>24.3f}{seconds:>10.1f}", flush=True)
    print(
        "\nerror: mean squared, every pixel in units of its standard deviation (1 = no better than guessing the mean)"
    )

    model.save(folder / "model")
    print(f"model: {folder / 'model'} (RVI.load reads it)")
    if importlib.util.find_spec("matplotlib") is None:
        print("picture: none; pip install 'rvi_fast[plot]' draws one")
    else:
        print(f"picture: {_draw(folder / 'digits.png', X, holed, filled)}")
    return errors


def _draw(path: Path, X: np.ndarray, holed: np.ndarray, filled: np.ndarray) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, SHOWN, figsize=(SHOWN, 3.3), layout="constrained")
    for row, (title, images) in enumerate((("original", X), ("holed", holed), ("filled", filled))):
        for axis, image in zip(axes[row], images, strict=False):
            axis.imshow(image.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)  # NaN shows the background
            axis.set(xticks=[], yticks=[], facecolor=HOLE)
        axes[row, 0].set_ylabel(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path
