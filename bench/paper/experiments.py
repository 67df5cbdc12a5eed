"""The experiments: for each figure or table, the runs it needs.

An experiment is a function of what has been measured so far. It returns all the runs that it can name by now: the
tuned ones appear once the runs that choose their settings are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import product

from .runs import Results, Run, Size

DATA = ("mnist", "fashion", "artificial")
IMAGES = ("mnist", "fashion")
METHODS = ("RVI", "VAD", "VAE")
RATES = (0.0, 0.5, 0.9)
TEST_RATES = (0.1, 0.3, 0.5, 0.7, 0.9)
LRS = (3e-4, 1e-3, 3e-3, 1e-2)
LAZY_ROW_LRS = (*LRS, 3e-2)  # a lazy row takes fewer steps, so it may want larger ones
CHOOSING_SEED = 100  # of the runs that settings are chosen by: other holes, other initial values
HIDDEN = 0.1  # share of observed training cells hidden in these
SCALES = (0.1, 0.02**0.5, 0.1**0.5, "learned")
ACTIVE = (0.1, 0.3, 0.5, 0.7, 0.9)
FORMS = {
    "main": {},
    "clustering": {"active": 1},
    "softmax mixture": {"coefficients": "softmax", "active": 1.0},
}
INITIAL = {"relay_std": (0.3, 1.0, 3.0), "coef_std": (0.01, 0.1, 1.0), "residual_std": (0.0, 0.01, 0.1)}
TABLES = ("breast_cancer", "digits", "wine", "diabetes")
LATENT_DIMS = (4, 8, 16, 64)
TABLE_SCALES = (0.5, "learned")
IMAGE_VARIANTS = {
    "default": {},
    "no linear path": {"linear_path": False},
    "scale 0.14": {"scale": 0.02**0.5},
    "lr 1e-3": {"lr": 1e-3},
    "lr 1e-2": {"lr": 1e-2},
    "constant lr": {"schedule": "constant"},
}


def main_run(data: str, method: str, missing: float, seed: int) -> Run:
    """The paper's setting at lr 1e-3; a model of complete rows is tested on rows with half of their cells missing."""
    return Run(data, method, missing, seed, test=(missing or 0.5,))


def fig2(results: Results, size: Size) -> list[Run]:
    """Convergence in the paper's setting."""
    return [main_run(d, m, r, s) for s in range(size.seeds) for d, r, m in product(DATA, RATES, METHODS)]


def choices(data: str, method: str, missing: float, mode: str = "dense") -> list[Run]:
    """The grid of learning rates: of the decoder, and of the rows where there are any."""
    run = Run(data, method, missing, CHOOSING_SEED, hidden=HIDDEN)
    if method == "VAE":
        return [run.with_settings(lr=lr) for lr in LRS]
    if mode == "lazy":
        return [run.with_settings(lr=a, row_lr=b, optimizer_mode="lazy") for a, b in product(LRS, LAZY_ROW_LRS)]
    return [run.with_settings(lr=a, row_lr=b) for a, b in product(LRS, LRS)]


def best(results: Results, runs: Iterable[Run]) -> Run:
    """The run with the least error on hidden training cells at its end; one that diverged is never best."""

    def error(run: Run) -> float:
        value = results[run].end("hidden")
        return math.inf if math.isnan(value) else value

    return min(runs, key=error)


def tuned_runs(results: Results, size: Size, candidates: list[Run], test: tuple[float, ...] = ()) -> list[Run]:
    """The best candidate's settings with all cells and the reported seeds; [] while candidates are missing."""
    if not results.have(candidates):
        return []
    winner = best(results, candidates)
    return [
        Run(winner.data, winner.method, winner.missing, seed, settings=winner.settings, test=test)
        for seed in range(size.seeds)
    ]


def lr(results: Results, size: Size) -> list[Run]:
    """Every method at its own best learning rates."""
    runs: list[Run] = []
    for rate, data, method in product((0.5, 0.9, 0.0), DATA, METHODS):
        candidates = choices(data, method, rate)
        runs += candidates + tuned_runs(results, size, candidates, (rate or 0.5,))
    return runs


def scale(results: Results, size: Size) -> list[Run]:
    """The Gaussian likelihood's scale."""
    runs = []
    for s, d, r, m, value in product(range(size.seeds), IMAGES, (0.5, 0.9), ("RVI", "VAD"), SCALES):
        run = main_run(d, m, r, s)
        runs.append(run if value == 0.02**0.5 else Run(d, m, r, s).with_settings(scale=value))
    return runs


def lazy(results: Results, size: Size) -> list[Run]:
    """Rows that move only when touched, at the paper's learning rate and at their own best ones."""
    runs = []
    for data in IMAGES:
        runs += [Run(data, "RVI", 0.5, s).with_settings(optimizer_mode="lazy") for s in range(size.seeds)]
        candidates = choices(data, "RVI", 0.5, "lazy")
        runs += candidates + tuned_runs(results, size, candidates)
    return runs


def fig3(results: Results, size: Size) -> list[Run]:
    """Test rows, at the rate of holes that the model was trained with."""
    return [main_run(d, m, r, s) for s in range(size.seeds) for d, r, m in product(DATA, TEST_RATES, METHODS)]


def fig8(results: Results, size: Size) -> list[Run]:
    """The forms of the combination."""
    runs = []
    for s, d, r, settings in product(range(size.seeds), IMAGES, (0.0, 0.5), FORMS.values()):
        run = main_run(d, "RVI", r, s)
        test = () if r else run.test
        runs.append(Run(d, "RVI", r, s, test=test).with_settings(**settings) if settings else run)
    return runs


def fig10(results: Results, size: Size) -> list[Run]:
    """How many relays a row combines."""
    runs = []
    for s, d, share in product(range(size.seeds), IMAGES, ACTIVE):
        run = main_run(d, "RVI", 0.5, s)
        runs.append(run if share == 0.5 else Run(d, "RVI", 0.5, s).with_settings(active=share))
    return runs


def init(results: Results, size: Size) -> list[Run]:
    """The initial scales of relays, coefficients and residual, one at a time."""
    runs = []
    for s, d in product(range(size.seeds), IMAGES):
        for name, values in INITIAL.items():
            runs += [initial_run(d, s, name, value) for value in values]
    return runs


def initial_run(data: str, seed: int, name: str, value: float) -> Run:
    if value == INITIAL[name][1]:
        return main_run(data, "RVI", 0.5, seed)
    return Run(data, "RVI", 0.5, seed).with_settings(**{name: value})


def table_run(data: str, method: str, seed: int, **settings: object) -> Run:
    """The library's defaults on a table with half of its cells missing; some more are hidden to choose by."""
    return Run(data, method, 0.5, seed, base="auto", hidden=HIDDEN).with_settings(**settings)


def tables(results: Results, size: Size) -> list[Run]:
    """Linear path, learned scale, latent size, relays or not; and the low-rank peer."""
    runs = []
    for s, d in product(range(size.seeds), TABLES):
        for method, linear, value, dim in product(("RVI", "VAD"), (True, False), TABLE_SCALES, LATENT_DIMS):
            runs.append(table_run(d, method, s, linear_path=linear, scale=value, latent_dim=dim))
        runs.append(Run(d, "low-rank", 0.5, s))
        runs += [Run(d, method, 0.5, s, base="auto") for method in ("RVI", "VAD")]
    return runs


def images(results: Results, size: Size) -> list[Run]:
    """The library's defaults for images, one changed at a time; and the low-rank peer."""
    runs = []
    for s, d, r in product(range(size.seeds), IMAGES, (0.5, 0.9)):
        for settings in IMAGE_VARIANTS.values():
            runs.append(Run(d, "RVI", r, s, base="auto", hidden=HIDDEN).with_settings(**settings))
        runs += [Run(d, "RVI", r, s, base="auto"), Run(d, "VAD", r, s, base="auto"), Run(d, "low-rank", r, s)]
    return runs


EXPERIMENTS: dict[str, Callable[[Results, Size], list[Run]]] = {
    "fig2": fig2,
    "fig3": fig3,
    "fig4": fig3,
    "fig8": fig8,
    "fig10": fig10,
    "lr": lr,
    "scale": scale,
    "lazy": lazy,
    "init": init,
    "tables": tables,
    "images": images,
}
