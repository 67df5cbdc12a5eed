"""Claims of the paper, each against paired differences over seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np

from .experiments import DATA, IMAGES, RATES, TEST_RATES, form_run, lazy_run, main_run, tuned_runs
from .fitting import INFERENCE_STEPS
from .runs import Results, Run, Size

CONFIDENCE = 0.975  # two-sided 95 %


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Errors of two contestants in one setting, paired by seed: ours [S], theirs [S]."""

    setting: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def difference(self) -> float:
        """Ours minus theirs, mean over seeds: below 0, ours is better."""
        return float(np.mean(np.subtract(self.ours, self.theirs)))

    @property
    def error(self) -> float:
        """The difference's standard error."""
        return float(np.std(np.subtract(self.ours, self.theirs), ddof=1) / math.sqrt(len(self.ours)))

    @property
    def verdict(self) -> str:
        """holds, fails or unclear, by Student's t at 95 %."""
        from scipy.stats import t

        if abs(self.difference) <= t.ppf(CONFIDENCE, len(self.ours) - 1) * self.error:
            return "unclear"
        return "holds" if self.difference < 0 else "fails"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence, how it is measured, and the settings it was looked at in."""

    sentence: str
    measure: str
    ours: str
    theirs: str
    comparisons: tuple[Comparison, ...]

    def count(self, verdict: str) -> int:
        return sum(c.verdict == verdict for c in self.comparisons)

    @property
    def verdict(self) -> str:
        """holds: in every setting. fails: in more settings than it holds in. Else unclear."""
        if self.count("holds") == len(self.comparisons):
            return "holds"
        return "fails" if self.count("fails") > self.count("holds") else "unclear"


Measure = Callable[[Run, Run], float]  # of a run, beside the one that it is compared with
Pairs = Iterator[tuple[str, Sequence[Run], Sequence[Run]]]  # setting, our runs and theirs in the order of seeds


def claims(results: Results, size: Size) -> list[Claim]:
    """Those whose runs have all been measured."""
    made = []
    for sentence, measure, ours, theirs, value, pairs in _questions(results, size):
        comparisons = []
        for setting, our_runs, their_runs in pairs:
            if our_runs and their_runs and results.have((*our_runs, *their_runs)):
                values = tuple(map(value, our_runs, their_runs)), tuple(map(value, their_runs, our_runs))
                comparisons.append(Comparison(setting, *values))
        if comparisons:
            made.append(Claim(sentence, measure, ours, theirs, tuple(comparisons)))
    return made


def _questions(results: Results, size: Size) -> Iterator[tuple[str, str, str, str, Measure, Pairs]]:
    def at_end(run: Run, other: Run) -> float:
        """On holes of the training rows; without holes there, of test rows with half of their cells missing."""
        return results[run].end("missing") if run.missing else on_test(run, max(INFERENCE_STEPS), 0.5)

    def on_test(run: Run, step: int, rate: float) -> float:
        where: dict[str, Any] = {"protocol": "encoder"} if run.method == "VAE" else {"protocol": "row", "step": step}
        return results[run].end("missing", rows="test", rate=rate, **where)

    def until(run: Run, other: Run) -> float:
        """Epochs until the least error that both reach."""
        level = max(curve(run)[1].min(), curve(other)[1].min())
        return epochs_to(level, *curve(run))

    def curve(run: Run) -> tuple[np.ndarray, np.ndarray]:
        points = [p for p in results[run].points if p.rows == "train"]
        cells = "missing" if run.missing else "observed"
        return np.array([p.step for p in points]), np.array([getattr(p, cells) for p in points])

    def tested(run: Run, other: Run) -> float:
        return on_test(run, max(INFERENCE_STEPS), run.test[0])

    def disparity(run: Run, other: Run) -> float:
        """How much more error a model of complete rows makes than one trained on rows with holes."""
        return tested(run, other) - tested(dataclasses.replace(run, missing=0.5), other)

    def seeds(data: str, method: str, rate: float) -> list[Run]:
        return [main_run(data, method, rate, s) for s in range(size.seeds)]

    def tuned(data: str, method: str, rate: float, mode: str = "dense") -> list[Run]:
        return tuned_runs(results, size, data, method, rate, mode)

    def equal(other: str, rates: Sequence[float] = RATES) -> Pairs:
        kinds = IMAGES if rates is TEST_RATES else DATA
        return ((_setting(d, r), seeds(d, "RVI", r), seeds(d, other, r)) for d, r in product(kinds, rates))

    def each_best(other: str) -> Pairs:
        return ((_setting(d, r), tuned(d, "RVI", r), tuned(d, other, r)) for d, r in product(DATA, RATES))

    def form(name: str) -> Pairs:
        for d, r in product(IMAGES, (0.0, 0.5)):
            yield _setting(d, r), seeds(d, "RVI", r), [form_run(d, r, s, name) for s in range(size.seeds)]

    def lazy(best: bool) -> Pairs:
        for d in IMAGES:
            plain = [lazy_run(d, s) for s in range(size.seeds)]
            pair = (tuned(d, "RVI", 0.5), tuned(d, "RVI", 0.5, "lazy")) if best else (seeds(d, "RVI", 0.5), plain)
            yield _setting(d, 0.5), *pair

    holes = "holes of training rows (complete training rows: holes of test rows) at the end"
    start = "epochs until the least error that both reach, on holes of training rows (complete rows: on all cells)"
    test = "holes of test rows, 250 steps a row"
    for other in ("VAD", "VAE"):
        yield f"RVI converges faster than {other}, lr 1e-3", start, "RVI", other, until, equal(other)
        yield f"RVI ends better than {other}, lr 1e-3", holes, "RVI", other, at_end, equal(other)
        yield f"RVI converges faster than {other}, each at its best lr", start, "RVI", other, until, each_best(other)
        yield f"RVI ends better than {other}, each at its best lr", holes, "RVI", other, at_end, each_best(other)
        yield f"RVI fills new rows better than {other}", test, "RVI", other, tested, equal(other, TEST_RATES)
        yield (
            f"RVI fills new rows better than {other}, each at its best lr",
            test,
            "RVI",
            other,
            tested,
            each_best(other),
        )
    yield (
        "Trained on complete rows, RVI fills rows with half missing better than VAE",
        test,
        "RVI",
        "VAE",
        tested,
        equal("VAE", (0.0,)),
    )
    yield (
        "RVI suffers less than VAE when only test rows have holes",
        "error of the model of complete rows less that of the model trained with half missing, on the same test rows",
        "RVI",
        "VAE",
        disparity,
        equal("VAE", (0.0,)),
    )
    for name in ("clustering", "softmax mixture"):
        yield f"The main form is better than {name}", holes, "main", name, at_end, form(name)
    end = "holes of training rows at the end"
    yield "Dense-equivalent Adam is better than lazy Adam, lr 1e-3", end, "dense", "lazy", at_end, lazy(False)
    yield (
        "Dense-equivalent Adam is better than lazy Adam, each at its best lr",
        end,
        "dense",
        "lazy",
        at_end,
        lazy(True),
    )


def epochs_to(level: float, epochs: np.ndarray, errors: np.ndarray) -> float:
    """When a curve first falls to `level`, interpolated in the logarithm of the epoch; it must fall so far."""
    after = int(np.argmax(errors <= level))
    if after == 0:
        return float(epochs[0])
    span = slice(after - 1, after + 1)
    return float(np.exp(np.interp(-level, -errors[span], np.log(epochs[span]))))


def _setting(data: str, rate: float) -> str:
    return f"{data}, {rate:.0%} missing"
