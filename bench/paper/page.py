"""The page: every claim beside its numbers, written from the two CSV files alone."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from . import experiments as ex
from .claims import CONFIDENCE, PROTOCOL, Claim, claims
from .figures import FIGURES, TITLES, on_test
from .fitting import INFERENCE_STEPS
from .runs import SIZES, Results, Run, Size

PAGE = "README.md"
EARLY_EPOCHS = 20  # initial values matter most here
HEAD = """\
# What relays are good for: the paper's experiments

Written by `{command}`
from `runs.csv` and `curves.csv` beside it. {runs} runs, {cost}, one thread a run
({machines}).

Images and the artificial set (300 columns, tanh of mixtures of ten distributions; in the style of the paper's, whose
generator is not published): {rows}, all columns, {size.epochs} epochs in batches
of 256, {size.seeds} seeds (of holes, initial values, order and noise). The paper's decoder [64, 64], T = 64, relays
25/50/100, half of each group active, no weight decay, constant learning rate; Gaussian likelihood of variance 0.02
unless said otherwise. Holes are MCAR. Tables: the library's defaults, all rows.

Errors are elastic, the mean of |r| + r², at the posterior mean, in units of the data (images in [0, 1]). *Missing*
counts the holes, *observed* the cells trained on, *hidden* a tenth of the observed training cells, taken from training
to choose settings by. Learning rates were chosen with another seed than those reported; for complete rows, too, by
hidden cells, so with a tenth missing. ± is the standard error over seeds. "The end" is after {size.epochs} epochs,
where curves still fall (fig2). The VAE has the decoder reversed as its encoder, which sees 0 in a hole unless it was
chosen otherwise. Test rows are fitted by protocol {protocol!r}, the published one, unless said otherwise.

A verdict is *holds* or *fails* where the paired difference over seeds differs from 0 by Student's t at {confidence},
else *unclear*; whoever alone diverges loses. A claim holds, or fails, where three quarters of its settings do, and is
else unclear. No correction is made for the number of settings. How speed is measured was settled after the first curves
had been seen. The paper prints curves and no tables, so its claims stand here in our words; settings that it does not
print are ours ([docs/math.md](../../../../docs/math.md))."""
CAPTIONS = {
    "fig2": "Training rows, lr 1e-3. Full: holes (complete rows: all cells); dotted: observed cells; bands: all seeds.",
    "fig3": f"Test rows, observed cells, protocol {PROTOCOL!r}. Full: 250 steps a row; dotted: 50. VAE: its encoder.",
    "fig4": "Test rows, holes. Lines as above.",
    "fig8": "Forms of the combination. Training rows: holes; complete rows: all cells.",
    "fig10": "Share of relays that a row combines. Training rows, holes, at the end; a dot a seed.",
}
TABLES_TEXT = """\
## Tables

The library's defaults but for what is named; half of the cells missing, a tenth of the others hidden. Mean squared
error on missing cells, in z-scores of the complete data. Of each line the best by *hidden* cells is bold."""
LEARNING_RATES_TEXT = """\
## Each method at its best learning rates

Grid {{{}}}, searched by coordinates: one rate for all, then the rows', then the decoder's; for a VAE its rate, then
what its encoder sees in a hole. Models of complete rows are tested with half of the cells missing."""
PEER_TITLES = ("RVI, defaults", "VAD, defaults", "low-rank EM", "PPCA")


def write_page(results: Results, names: Sequence[str]) -> Path:
    """Draw the figures and write the page of the experiments `names`, all of whose runs are there; returns its path."""
    size = SIZES[results.size]
    made = claims(results, size)
    parts = [_head(results, names), *([_verdicts(made)] if made else [])]
    for name in names:
        if name in FIGURES:
            FIGURES[name](results, size, results.folder / f"{name}.png")
            parts.append(f"![{name}]({name}.png)\n\n{CAPTIONS[name]}")
    parts += [SECTIONS[name](results, size) for name in names if name in SECTIONS]
    if made:
        parts.append("## Every comparison\n\n" + "\n\n".join(map(_comparisons, made)))
    page = results.folder / PAGE
    part = page.with_suffix(".part")
    part.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    os.replace(part, page)
    return page


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def spread(values: Iterable[float], form: str = ".4f") -> str:
    """Mean and standard error over seeds."""
    found = np.array(list(values), dtype=float)
    error = found.std(ddof=1) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    return f"{found.mean():{form}} ± {error:.4f}"


def _title(data: str, rate: float) -> str:
    return f"{TITLES.get(data, data)}, {rate:.0%}"


def _head(results: Results, names: Sequence[str]) -> str:
    size, found = SIZES[results.size], results.results.values()
    seconds = sum(result.seconds for result in found)
    return HEAD.format(
        command=f"rvi-fast paper {'--quick ' if results.size == 'quick' else ''}--only {','.join(names)}",
        runs=len(found),
        cost=f"{_wall(results) / 3600:.1f} h of wall time for {seconds / 3600:.1f} h of runs",
        machines="; ".join(sorted({result.machine for result in found})),
        rows=f"the first {size.train_rows:,} training and {size.test_rows:,} test rows",
        size=size,
        confidence=f"{2 * CONFIDENCE - 1:.0%}",
        protocol=PROTOCOL,
    )


def _wall(results: Results) -> float:
    """Seconds in which at least one run was at work."""
    spans = []
    for result in results.results.values():
        finished = datetime.datetime.fromisoformat(result.finished).timestamp()
        spans.append((finished - result.seconds, finished))
    total, end = 0.0, -math.inf
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _verdicts(made: Sequence[Claim]) -> str:
    rows = [(c.sentence, *map(c.count, ("holds", "unclear", "fails")), f"**{c.verdict}**") for c in made]
    return "## Verdicts\n\n" + table(("claim", "settings: holds", "unclear", "fails", "verdict"), rows)


def _comparisons(claim: Claim) -> str:
    rows = []
    for c in claim.comparisons:
        difference = f"{c.difference:+.3g} ± {c.error:.1g}"
        rows.append((c.setting, f"{np.mean(c.ours):.4g}", f"{np.mean(c.theirs):.4g}", difference, c.verdict))
    header = ("setting", claim.ours, claim.theirs, "difference", "verdict")
    return f"**{claim.sentence}**: {claim.verdict}. Measured: {claim.measure}.\n\n{table(header, rows)}"


def _learning_rates(results: Results, size: Size) -> str:
    rows = []
    for data, rate, method in product(ex.DATA, ex.RATES, ex.METHODS):
        _, winner = ex.search(results, data, method, rate)
        assert winner is not None
        chosen = dict(winner.settings)
        tuned = [results[run] for run in ex.tuned_runs(results, size, data, method, rate)]
        step = {"protocol": "encoder"} if method == "VAE" else {"protocol": PROTOCOL, "step": max(INFERENCE_STEPS)}
        rows.append(
            (
                *(_title(data, rate), method, _rate(chosen["lr"])),
                _rate(chosen["row_lr"]) if "row_lr" in chosen else chosen["missing"],
                f"{results[winner].end('hidden'):.4f}",
                spread(result.end("missing") for result in tuned) if rate else "",
                spread(result.end("missing", rows="test", **step) for result in tuned),
            )
        )
    return f"{LEARNING_RATES_TEXT.format(', '.join(f'{lr:g}' for lr in ex.LRS))}\n\n{table(LEARNING_RATES, rows)}"


LEARNING_RATES = (
    *("setting", "method", "lr", "row lr, or encoder's input", "hidden, when chosen"),
    *("missing, training rows", "missing, test rows"),
)


def _rate(lr: float) -> str:
    return f"{lr:g}{' (edge)' if lr in (ex.LRS[0], ex.LRS[-1]) else ''}"


def _scale(results: Results, size: Size) -> str:
    rows = []
    for data, rate, method in product(ex.IMAGES, (0.5, 0.9), ("RVI", "VAD")):
        runs = ([ex.scale_run(data, method, rate, value, s) for s in range(size.seeds)] for value in ex.SCALES)
        rows.append((_title(data, rate), method, *(_missing(results, of_scale) for of_scale in runs)))
    names = [f"{value:.2g}" if isinstance(value, float) else value for value in ex.SCALES]
    text = "## Scale of the Gaussian\n\nlr 1e-3. Standard deviations; learned: one a column."
    return f"{text}\n\n{table(('missing, training rows', 'method', *names), rows)}"


def _missing(results: Results, runs: Iterable[Run]) -> str:
    return spread(results[run].end("missing") for run in runs)


def _lazy(results: Results, size: Size) -> str:
    rows = []
    for data, (mode, make) in product(ex.IMAGES, (("dense", ex.dense_run), ("lazy", ex.lazy_run))):
        plain = [make(data, s) for s in range(size.seeds)]
        tuned = ex.tuned_runs(results, size, data, "RVI", 0.5, mode)
        at_best, which = "", ""
        if tuned and results.have(tuned):  # dense ones belong to the experiment lr
            at_best = _missing(results, tuned)
            which = ", ".join(f"{name} {_rate(value)}" for name, value in tuned[0].settings if name.endswith("lr"))
        rows.append((_title(data, 0.5), mode, _missing(results, plain), at_best, which))
    header = ("missing, training rows", "rows' Adam", "lr 1e-3", "at its best", "which is")
    return f"## Dense-equivalent and lazy Adam\n\n{table(header, rows)}"


def _protocols(results: Results, size: Size) -> str:
    rows = []
    for data, method, protocol, step in product(ex.IMAGES, ("RVI", "VAD"), ("row", "epochs"), INFERENCE_STEPS):
        errors = (on_test(results, size, data, method, r, "missing", step, protocol) for r in ex.TEST_RATES)
        rows.append((TITLES[data], method, protocol, step, *map(spread, errors)))
    header = ("missing, test rows", "method", "protocol", "steps", *(f"{r:.0%}" for r in ex.TEST_RATES))
    return f"## Protocols of inference\n\nlr 1e-3.\n\n{table(header, rows)}"


def _share(results: Results, size: Size) -> str:
    rows = []
    for data in ex.IMAGES:
        runs = ([ex.active_run(data, share, s) for s in range(size.seeds)] for share in ex.ACTIVE)
        rows.append((_title(data, 0.5), *(_missing(results, of_share) for of_share in runs)))
    return "## Share of active relays\n\nlr 1e-3.\n\n" + table(("missing, training rows", *ex.ACTIVE), rows)


def _initial(results: Results, size: Size) -> str:
    rows = []
    for data, (name, values) in product(ex.IMAGES, ex.INITIAL.items()):
        for value in values:
            runs = [ex.initial_run(data, name, value, s) for s in range(size.seeds)]
            early = (
                [p.missing for p in results[r].points if p.rows == "train" and p.step <= EARLY_EPOCHS] for r in runs
            )
            rows.append((_title(data, 0.5), name, value, spread(map(np.mean, early)), _missing(results, runs)))
    header = ("missing, training rows", "initial", "value", f"first {EARLY_EPOCHS} epochs", "end")
    return f"## Initial values\n\nlr 1e-3, one changed at a time.\n\n{table(header, rows)}"


def _tables(results: Results, size: Size) -> str:
    parts = [TABLES_TEXT]
    for data in ex.TABLES:
        rows = []
        for method, linear, value in ex.TABLE_KINDS:
            errors = []
            for dim in ex.LATENT_DIMS:
                settings = {"linear_path": linear, "scale": value, "latent_dim": dim}
                found = [results[ex.table_run(data, method, s, **settings)] for s in range(size.seeds)]
                errors.append((np.mean([r.end("hidden") for r in found]), spread(r.end("mse") for r in found)))
            least = min(errors)[0]
            marked = (f"**{text}**" if hidden == least else text for hidden, text in errors)
            rows.append((method, "yes" if linear else "no", value, *marked))
        header = (data, "linear path", "scale", *(f"latent {dim}" for dim in ex.LATENT_DIMS))
        parts.append(table(header, rows))
    parts += ["The defaults, one setting changed at a time:"]
    parts += [_variants(results, size, ex.TABLES, partial(ex.table_run, method="RVI"), ex.TABLE_VARIANTS)]
    peers = _peers(results, size, [(data, 0.5) for data in ex.TABLES], "mse")
    return "\n\n".join([*parts, "With nothing hidden besides, squared error on holes:", peers])


def _variants(
    results: Results, size: Size, datas: Sequence[str], make: Callable[..., Run], variants: dict[str, dict[str, Any]]
) -> str:
    """Elastic error on hidden training cells: of the defaults, and how it differs where one setting does."""

    def errors(data: str, variant: str) -> np.ndarray:
        runs = (make(data=data, seed=s, **variants[variant]) for s in range(size.seeds))
        return np.array([results[run].end("hidden") for run in runs])

    rows = [("default", *(spread(errors(data, "default")) for data in datas))]
    for variant in list(variants)[1:]:
        rows.append((variant, *(spread(errors(d, variant) - errors(d, "default"), "+.4f") for d in datas)))
    return table(("hidden; below: difference from the default", *(_title(data, 0.5) for data in datas)), rows)


def _images(results: Results, size: Size) -> str:
    changed = _variants(results, size, ex.IMAGES, ex.image_run, ex.IMAGE_VARIANTS)
    peers = _peers(results, size, list(product(ex.IMAGES, (0.5, 0.9))), "missing")
    return (
        f"## Images with the library's defaults\n\nTrained for {size.epochs} epochs, one setting changed at a time:"
        f"\n\n{changed}\n\nOn holes, with nothing hidden besides:\n\n{peers}"
    )


def _peers(results: Results, size: Size, settings: Sequence[tuple[str, float]], cells: str) -> str:
    rows = []
    for data, rate in settings:
        runs = ([ex.default_run(data, method, rate, s) for s in range(size.seeds)] for method in ex.PEERS)
        rows.append((_title(data, rate), *(spread(results[run].end(cells) for run in peer) for peer in runs)))
    return table((f"{'squared error, ' if cells == 'mse' else ''}missing", *PEER_TITLES), rows)


SECTIONS: dict[str, Callable[[Results, Size], str]] = {
    "lr": _learning_rates,
    "scale": _scale,
    "lazy": _lazy,
    "fig4": _protocols,
    "fig10": _share,
    "init": _initial,
    "tables": _tables,
    "images": _images,
}
