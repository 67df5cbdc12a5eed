"""Figures, drawn from the results alone: one function a figure, one small PNG each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from .claims import PROTOCOL
from .experiments import ACTIVE, DATA, FORMS, IMAGES, METHODS, RATES, TEST_RATES, active_run, form_run, main_run
from .fitting import INFERENCE_STEPS
from .runs import Results, Run, Size

COLORS = {"RVI": "#1b6ca8", "VAD": "#d1495b", "VAE": "#6b8f3c"}
FORM_COLORS = dict(zip(FORMS, ("#1b6ca8", "#d1495b", "#6b8f3c"), strict=True))
TITLES = {"mnist": "MNIST", "fashion": "Fashion-MNIST", "artificial": "artificial"}
PANEL = (3.0, 2.3)  # inches
DPI = 90


def curves(results: Results, runs: Sequence[Run], cells: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs [E] and the errors [S, E] of training rows, one line a seed; NaN where a fit had diverged."""
    lines = [results[run].curve(cells) for run in runs]
    epochs = max((epochs for epochs, _ in lines), key=len)
    return np.array(epochs), np.array([errors + [np.nan] * (len(epochs) - len(errors)) for _, errors in lines])


def _draw(axis: Any, results: Results, runs: Sequence[Run], cells: str, color: str, label: str, style: str) -> None:
    """Mean over seeds, and a band from the least to the largest."""
    epochs, errors = curves(results, runs, cells)
    axis.plot(epochs, errors.mean(0), color=color, linestyle=style, label=label, linewidth=1.4)
    axis.fill_between(epochs, errors.min(0), errors.max(0), color=color, alpha=0.2, linewidth=0)


def _panels(rows: int, columns: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    size = PANEL[0] * columns, PANEL[1] * rows
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=DPI, metadata={"Software": None})  # the same bytes from the same numbers
    plt.close(figure)
    return path


def fig2(results: Results, size: Size, path: Path) -> Path:
    """Convergence: holes (full lines) and observed cells (dotted) of the training rows."""
    figure, axes = _panels(len(RATES), len(DATA))
    for (i, rate), (j, data) in product(enumerate(RATES), enumerate(DATA)):
        axis = axes[i, j]
        for method in METHODS:
            runs = [main_run(data, method, rate, s) for s in range(size.seeds)]
            _draw(axis, results, runs, "observed", COLORS[method], "_" if rate else method, ":" if rate else "-")
            if rate:
                _draw(axis, results, runs, "missing", COLORS[method], method, "-")
        axis.set(xscale="log", title=f"{TITLES[data]}, {rate:.0%} missing" if rate else f"{TITLES[data]}, complete")
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
    for axis in axes[:, 0]:
        axis.set_ylabel("elastic error")
    axes[0, 0].legend(frameon=False)
    return _save(figure, path)


def fig3(results: Results, size: Size, path: Path) -> Path:
    return _test_rows(results, size, path, "observed")


def fig4(results: Results, size: Size, path: Path) -> Path:
    return _test_rows(results, size, path, "missing")


def _test_rows(results: Results, size: Size, path: Path, cells: str) -> Path:
    """Test rows against the rate of holes; inference of 250 steps a row (full lines) and 50 (dotted)."""
    figure, axes = _panels(1, len(IMAGES))
    for axis, data in zip(axes[0], IMAGES, strict=True):
        for method in METHODS:
            steps = (0,) if method == "VAE" else (max(INFERENCE_STEPS), min(INFERENCE_STEPS))
            for step, style in zip(steps, "-:", strict=False):
                means = [np.mean(on_test(results, size, data, method, r, cells, step)) for r in TEST_RATES]
                label = method if style == "-" else "_"
                axis.plot(TEST_RATES, means, style, marker=".", color=COLORS[method], label=label)
        axis.set(title=TITLES[data], xlabel="share of cells missing")
    axes[0, 0].set_ylabel(f"elastic error, {cells}")
    axes[0, 0].legend(frameon=False)
    return _save(figure, path)


def on_test(
    results: Results, size: Size, data: str, method: str, rate: float, cells: str, step: int, protocol: str = PROTOCOL
) -> list[float]:
    """Errors of test rows with as many holes as the training rows had, one a seed."""
    where: dict[str, Any] = {"protocol": "encoder"} if method == "VAE" else {"protocol": protocol, "step": step}
    runs = [main_run(data, method, rate, s) for s in range(size.seeds)]
    return [results[run].end(cells, rows="test", rate=rate or 0.5, **where) for run in runs]


def fig8(results: Results, size: Size, path: Path) -> Path:
    """The forms of the combination: holes of the training rows; complete rows: all cells."""
    figure, axes = _panels(2, len(IMAGES))
    for (i, rate), (j, data) in product(enumerate((0.0, 0.5)), enumerate(IMAGES)):
        for form in FORMS:
            runs = [form_run(data, rate, form, s) for s in range(size.seeds)]
            _draw(axes[i, j], results, runs, "missing" if rate else "observed", FORM_COLORS[form], form, "-")
        title = f"{TITLES[data]}, {rate:.0%} missing" if rate else f"{TITLES[data]}, complete"
        axes[i, j].set(xscale="log", title=title, xlabel="epoch")
    for axis in axes[:, 0]:
        axis.set_ylabel("elastic error")
    axes[0, 0].legend(frameon=False)
    return _save(figure, path)


def fig10(results: Results, size: Size, path: Path) -> Path:
    """The share of relays that a row combines: holes of training rows at the end, a dot a seed."""
    figure, axes = _panels(1, len(IMAGES))
    for axis, data in zip(axes[0], IMAGES, strict=True):
        errors = np.array([[results[active_run(data, a, s)].end("missing") for a in ACTIVE] for s in range(size.seeds)])
        axis.plot(ACTIVE, errors.mean(0), color=COLORS["RVI"])
        axis.plot(np.tile(ACTIVE, size.seeds), errors.ravel(), ".", color=COLORS["RVI"], alpha=0.6)
        axis.set(title=f"{TITLES[data]}, 50% missing", xlabel="|B| / K")
    axes[0, 0].set_ylabel("elastic error, missing")
    return _save(figure, path)


FIGURES: dict[str, Callable[[Results, Size, Path], Path]] = {
    "fig2": fig2,
    "fig3": fig3,
    "fig4": fig4,
    "fig8": fig8,
    "fig10": fig10,
}
