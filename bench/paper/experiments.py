"""The experiments: for each figure or table, the runs it needs.

An experiment is a function of what has been measured so far. It returns all the runs that it can name by now: the
tuned ones appear once the runs that choose their settings are there.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

from rvi_fast.defaults import PAPER_SCALE

from .fitting import IMAGES
from .runs import Results, Run, Size

DATA = ("mnist", "fashion", "artificial")
METHODS = ("RVI", "VAD", "VAE")
RATES = (0.0, 0.5, 0.9)
TEST_RATES = (0.1, 0.3, 0.5, 0.7, 0.9)
LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
ENCODER_INPUTS = ("zero", "mean", "zero+mask")  # what a VAE's encoder sees in a hole
CHOOSING_SEED = 100  # of the runs that settings are chosen by: other holes, other initial values
HIDDEN = 0.1  # share of observed training cells hidden in these
SCALES = (0.1, PAPER_SCALE, 0.1**0.5, "learned")
ACTIVE = (0.1, 0.3, 0.5, 0.7, 0.9)
FORMS: dict[str, dict[str, Any]] = {
    "main": {},
    "clustering": {"active": 1},
    "softmax mixture": {"coefficients": "softmax", "active": 1.0},
}
INITIAL = {"relay_std": (0.3, 1.0, 3.0), "coef_std": (0.01, 0.1, 1.0), "residual_std": (0.0, 0.01, 0.1)}
TABLES = ("breast_cancer", "digits", "wine", "diabetes")
LATENT_DIMS = (4, 8, 16, 64)
TABLE_KINDS = (  # method, linear path, scale
    ("RVI", True, "learned"),
    ("RVI", False, "learned"),
    ("RVI", True, 0.5),
    ("RVI", False, 0.5),
    ("VAD", True, "learned"),
    ("VAD", False, "learned"),
)
TABLE_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "row lr 3e-3": {"row_lr": 3e-3},
    "row lr 3e-2": {"row_lr": 3e-2},
    "lr 3e-3": {"lr": 3e-3},
    "weight decay 1": {"weight_decay": 1.0},
    "no weight decay": {"weight_decay": 0.0},
    "KL weight 1.5": {"kl_weight": 1.5},
    "coefficients from N(0, 0.3²)": {"coef_std": 0.3},
    "half the epochs": {"epochs": 100},
    "share of relays 0.9": {"active": 0.9},
}
PEERS = ("RVI", "VAD", "low-rank", "PPCA")
IMAGE_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no linear path": {"linear_path": False},
    "scale 0.14": {"scale": PAPER_SCALE},
    "lr 1e-2": {"lr": 1e-2},
    "row lr 3e-3": {"row_lr": 3e-3},
    "constant lr": {"schedule": "constant"},
    "share of relays 0.9": {"active": 0.9},
}


def main_run(data: str, method: str, missing: float, seed: int) -> Run:
    """The paper's setting at lr 1e-3; a model of complete rows is tested on rows with half of their cells missing."""
    run = Run(data, method, missing, seed, test=(missing or 0.5,))
    return run.with_settings(missing="zero") if method == "VAE" else run


def fig2(results: Results, size: Size) -> list[Run]:
    """Convergence in the paper's setting."""
    return [main_run(d, m, r, s) for s in range(size.seeds) for d, r, m in product(DATA, RATES, METHODS)]


def search(
    results: Results, data: str, method: str, missing: float, mode: str = "dense"
) -> tuple[list[Run], Run | None]:
    """A coordinate search of the grid: one learning rate for all, then the rows', then the decoder's; for a VAE its
    rate, then what its encoder sees in a hole.

    Judged by hidden training cells. Returns the runs that can be named by now, and the best once all are measured.
    """
    run = Run(data, method, missing, CHOOSING_SEED, hidden=HIDDEN)
    if method == "VAE":
        run, stages = run.with_settings(missing="zero"), [("lr", LRS), ("missing", ENCODER_INPUTS)]
        runs = []
    else:
        run = run.with_settings(optimizer_mode="lazy") if mode == "lazy" else run
        runs = [run.with_settings(lr=lr, row_lr=lr) for lr in LRS]
        stages = [("row_lr", LRS), ("lr", LRS)]
    for name, values in stages:
        found = best(results, runs) if runs else run
        if found is None:
            return runs, None
        runs = list(dict.fromkeys([*runs, *(found.with_settings(**{name: value}) for value in values)]))
    return runs, best(results, runs)


def best(results: Results, runs: list[Run]) -> Run | None:
    """The run with the least error on hidden training cells at its end; None until all are measured."""
    if not results.have(runs):
        return None

    return min(runs, key=lambda run: results[run].end("hidden"))


def tuned_runs(results: Results, size: Size, data: str, method: str, missing: float, mode: str = "dense") -> list[Run]:
    """The best learning rates with all cells and the reported seeds; [] while they are not known."""
    _, winner = search(results, data, method, missing, mode)
    if winner is None:
        return []
    test = () if mode == "lazy" else (missing or 0.5,)
    return [Run(data, method, missing, s, settings=winner.settings, test=test) for s in range(size.seeds)]


def lr(results: Results, size: Size) -> list[Run]:
    """Every method at its own best learning rates."""
    runs: list[Run] = []
    for rate, data, method in product((0.5, 0.9, 0.0), DATA, METHODS):
        runs += search(results, data, method, rate)[0] + tuned_runs(results, size, data, method, rate)
    return runs


def scale(results: Results, size: Size) -> list[Run]:
    """The Gaussian likelihood's scale."""
    settings = product(range(size.seeds), IMAGES, (0.5, 0.9), ("RVI", "VAD"), SCALES)
    return [scale_run(d, m, r, value, s) for s, d, r, m, value in settings]


def scale_run(data: str, method: str, missing: float, value: float | str, seed: int) -> Run:
    if value == PAPER_SCALE:
        return main_run(data, method, missing, seed)
    return Run(data, method, missing, seed).with_settings(scale=value)


def lazy(results: Results, size: Size) -> list[Run]:
    """Rows that move only when touched, at the paper's learning rate and at their own best ones."""
    runs = []
    for data in IMAGES:
        runs += [make(data, s) for s in range(size.seeds) for make in (lazy_run, dense_run)]
        runs += search(results, data, "RVI", 0.5, "lazy")[0] + tuned_runs(results, size, data, "RVI", 0.5, "lazy")
    return runs


def dense_run(data: str, seed: int) -> Run:
    return main_run(data, "RVI", 0.5, seed)


def lazy_run(data: str, seed: int) -> Run:
    return Run(data, "RVI", 0.5, seed).with_settings(optimizer_mode="lazy")


def fig3(results: Results, size: Size) -> list[Run]:
    """Test rows, at the rate of holes that the model was trained with."""
    return [main_run(d, m, r, s) for s in range(size.seeds) for d, r, m in product(IMAGES, TEST_RATES, METHODS)]


def fig8(results: Results, size: Size) -> list[Run]:
    """The forms of the combination."""
    return [form_run(d, r, form, s) for s, d, r, form in product(range(size.seeds), IMAGES, (0.0, 0.5), FORMS)]


def form_run(data: str, missing: float, form: str, seed: int) -> Run:
    if form == "main":
        return main_run(data, "RVI", missing, seed)
    return Run(data, "RVI", missing, seed, test=() if missing else (0.5,)).with_settings(**FORMS[form])


def fig10(results: Results, size: Size) -> list[Run]:
    """How many relays a row combines."""
    return [active_run(d, share, s) for s, d, share in product(range(size.seeds), IMAGES, ACTIVE)]


def active_run(data: str, share: float, seed: int) -> Run:
    return main_run(data, "RVI", 0.5, seed) if share == 0.5 else Run(data, "RVI", 0.5, seed).with_settings(active=share)


def init(results: Results, size: Size) -> list[Run]:
    """The initial scales of relays, coefficients and residual, one at a time."""
    runs = []
    for s, d in product(range(size.seeds), IMAGES):
        for name, values in INITIAL.items():
            runs += [initial_run(d, name, value, s) for value in values]
    return runs


def initial_run(data: str, name: str, value: float, seed: int) -> Run:
    if value == INITIAL[name][1]:
        return main_run(data, "RVI", 0.5, seed)
    return Run(data, "RVI", 0.5, seed).with_settings(**{name: value})


def table_run(data: str, method: str, seed: int, **settings: Any) -> Run:
    """The library's defaults on a table with half of its cells missing; some more are hidden to choose by."""
    return Run(data, method, 0.5, seed, base="auto", hidden=HIDDEN).with_settings(**settings)


def tables(results: Results, size: Size) -> list[Run]:
    """Linear path, learned scale, latent size, relays or not; and the linear peers."""
    runs = []
    for s, d in product(range(size.seeds), TABLES):
        for (method, linear, value), dim in product(TABLE_KINDS, LATENT_DIMS):
            runs.append(table_run(d, method, s, linear_path=linear, scale=value, latent_dim=dim))
        runs += [table_run(d, "RVI", s, **settings) for settings in TABLE_VARIANTS.values()]
        runs += [default_run(d, method, 0.5, s) for method in PEERS]
    return runs


def default_run(data: str, method: str, missing: float, seed: int) -> Run:
    """The library's defaults with nothing hidden besides, or a linear peer."""
    return Run(data, method, missing, seed, base="auto")


def images(results: Results, size: Size) -> list[Run]:
    """The library's defaults for images, one changed at a time; and the linear peers."""
    runs = []
    for s, d in product(range(size.seeds), IMAGES):
        runs += [image_run(d, s, **settings) for settings in IMAGE_VARIANTS.values()]
        runs += [default_run(d, method, r, s) for r, method in product((0.5, 0.9), PEERS)]
    return runs


def image_run(data: str, seed: int, **settings: Any) -> Run:
    return Run(data, "RVI", 0.5, seed, base="auto", hidden=HIDDEN).with_settings(**settings)


EXPERIMENTS: dict[str, Callable[[Results, Size], list[Run]]] = {
    "fig2": fig2,
    "lr": lr,
    "scale": scale,
    "lazy": lazy,
    "fig3": fig3,
    "fig4": fig3,
    "fig8": fig8,
    "fig10": fig10,
    "init": init,
    "tables": tables,
    "images": images,
}
