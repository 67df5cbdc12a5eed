"""Claims, each against paired differences over seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from . import experiments as ex
from .fitting import INFERENCE_STEPS
from .runs import Results, Run, Size

LEVELS = (1.05, 1.25)  # speed is judged by the epochs until an error this many times the least that both reach
PROTOCOL = "epochs"  # of test rows: the published one
CONFIDENCE = 0.975  # two-sided 95 %
MOST = 0.75


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Errors of two contestants in one setting, paired by seed: ours [S], theirs [S]; infinite where one diverged."""

    setting: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def difference(self) -> float:
        """Ours minus theirs, mean over seeds: below 0, ours is better."""
        return float(np.mean(self._differences()))

    @property
    def error(self) -> float:
        """The difference's standard error."""
        differences = self._differences()
        finite = np.isfinite(differences).all()
        return float(np.std(differences, ddof=1) / math.sqrt(len(differences))) if finite else math.nan

    def _differences(self) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # both diverged
            return np.subtract(self.ours, self.theirs)

    @property
    def verdict(self) -> str:
        """holds, fails or unclear, by Student's t at 95 %; who alone diverges loses."""
        from scipy.stats import t

        difference = self.difference
        within = math.isfinite(difference) and abs(difference) <= t.ppf(CONFIDENCE, len(self.ours) - 1) * self.error
        if within or math.isnan(difference):
            return "unclear"
        return "holds" if difference < 0 else "fails"


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
        """holds, or fails: where that is the verdict in MOST of the settings; else unclear."""
        enough = MOST * len(self.comparisons)
        return next((verdict for verdict in ("holds", "fails") if self.count(verdict) >= enough), "unclear")


Measure = Callable[[Run, Run], float]  # of a run, beside the one that it is compared with
Pairs = Iterator[tuple[str, Sequence[Run], Sequence[Run]]]  # setting, our runs and theirs in the order of seeds
Question = tuple[str, str, str, str, Sequence[tuple[str, Measure, Pairs]]]

HOLES = "holes of training rows (complete training rows: holes of test rows) at the end"
SPEED = "epochs until an error of so many times the least that both reach; training rows, holes (complete: all cells)"
TEST = f"holes of test rows, protocol {PROTOCOL!r}, {max(INFERENCE_STEPS)} steps"
DISPARITY = "error of the model of complete rows less that of the one trained with half missing, on the same test rows"


def claims(results: Results, size: Size) -> list[Claim]:
    """Those of which some setting has been measured whole."""
    made = []
    for sentence, measure, ours, theirs, parts in _questions(results, size):
        comparisons = [c for note, value, pairs in parts for c in _compared(note, value, pairs)]
        if comparisons:
            made.append(Claim(sentence, measure, ours, theirs, tuple(comparisons)))
    return made


def _compared(note: str, value: Measure, pairs: Pairs) -> Iterator[Comparison]:
    for setting, ours, theirs in pairs:
        try:
            values = tuple(map(value, ours, theirs)), tuple(map(value, theirs, ours))
        except KeyError:  # a run that is not measured yet
            continue
        if ours and theirs:
            yield Comparison(setting + note, *values)


def _questions(results: Results, size: Size) -> Iterator[Question]:
    measured, rows = Measured(results), Contestants(results, size)
    for other in ("VAD", "VAE"):
        for how, pairs in (("lr 1e-3", rows.equal), ("each at its best", rows.each_best)):
            speed = [(f", {x:g} x", measured.until(x), pairs(other, ex.DATA, ex.RATES)) for x in LEVELS]
            yield f"RVI converges faster than {other}, {how}", SPEED, "RVI", other, speed
            end = [("", measured.at_end, pairs(other, ex.DATA, ex.RATES))]
            yield f"RVI ends better than {other}, {how}", HOLES, "RVI", other, end
        new = [("", measured.on_test, rows.equal(other, ex.IMAGES, ex.TEST_RATES))]
        yield f"RVI fills new rows better than {other}, lr 1e-3", TEST, "RVI", other, new
        new = [("", measured.on_test, rows.each_best(other, ex.DATA, (0.5, 0.9)))]
        yield f"RVI fills new rows better than {other}, each at its best", TEST, "RVI", other, new
    for how, pairs in (("lr 1e-3", rows.equal), ("each at its best", rows.each_best)):
        sentence = f"Trained on complete rows, RVI fills rows with half missing better than VAE, {how}"
        yield sentence, TEST, "RVI", "VAE", [("", measured.on_test, pairs("VAE", ex.DATA, (0.0,)))]
    sentence = "RVI suffers less than VAE when only test rows have holes, lr 1e-3"
    yield sentence, DISPARITY, "RVI", "VAE", [("", measured.disparity, rows.equal("VAE", ex.DATA, (0.0,)))]
    for form in ("clustering", "softmax mixture"):
        yield (
            f"The main form is better than {form}, lr 1e-3",
            HOLES,
            "main",
            form,
            [("", measured.at_end, rows.form(form))],
        )
    adams = ("Dense-equivalent Adam is better than lazy Adam", HOLES, "dense", "lazy")
    yield f"{adams[0]}, lr 1e-3", *adams[1:], [("", measured.at_end, rows.lazy())]
    yield f"{adams[0]}, each at its best", *adams[1:], [("", measured.at_end, rows.lazy_best())]
    half = "Half of the relays is better than another share, lr 1e-3"
    yield half, HOLES, "0.5", "other", [("", measured.at_end, rows.share())]
    scale = "RVI: scale 0.14 is better than another, lr 1e-3"
    yield scale, HOLES, "0.14", "other", [("", measured.at_end, rows.scale())]
    initial = "The default initial values are better than others, lr 1e-3"
    yield initial, HOLES, "default", "other", [("", measured.at_end, rows.initial())]
    tables = "Tables: RVI is better than VAD, each with its best latent size"
    yield tables, "squared error on holes", "RVI", "VAD", [("", measured.square, rows.tables())]
    for other in ex.PEERS[1:]:
        parts = [("", measured.square, rows.defaults(other, ex.TABLES, (0.5,)))]
        yield f"Tables: RVI with its defaults is better than {other}", "squared error on holes", "RVI", other, parts
        parts = [("", measured.at_end, rows.defaults(other, ex.IMAGES, (0.5, 0.9)))]
        yield f"Images: RVI with its defaults is better than {other}", HOLES, "RVI", other, parts


class Measured:
    """What a run is judged by."""

    def __init__(self, results: Results):
        self.results = results

    def at_end(self, run: Run, other: Run) -> float:
        return self.results[run].end("missing") if run.missing else self.on_test(run, other)

    def square(self, run: Run, other: Run) -> float:
        return self.results[run].end("mse")

    def on_test(self, run: Run, other: Run) -> float:
        where: dict[str, Any] = {"protocol": "encoder"}
        if run.method != "VAE":
            where = {"protocol": PROTOCOL, "step": max(INFERENCE_STEPS)}
        return self.results[run].end("missing", rows="test", **where)

    def disparity(self, run: Run, other: Run) -> float:
        return self.on_test(run, other) - self.on_test(dataclasses.replace(run, missing=0.5), other)

    def until(self, factor: float) -> Measure:
        def epochs(run: Run, other: Run) -> float:
            cells = "missing" if run.missing else "observed"
            curves = [self.results[r].curve(cells) for r in (run, other)]
            return epochs_to(factor * max(np.nanmin([np.inf, *errors]) for _, errors in curves), *curves[0])

        return epochs


def epochs_to(level: float, epochs: Sequence[int], errors: Sequence[float]) -> float:
    """When a curve first falls to `level`, interpolated in the logarithm of the epoch; infinite if it never does."""
    below = np.flatnonzero(np.array(errors) <= level)
    if not len(below):
        return math.inf
    after = int(below[0])
    if after == 0:
        return float(epochs[0])
    span = slice(after - 1, after + 1)
    return float(np.exp(np.interp(-level, np.negative(errors[span]), np.log(epochs[span]))))


class Contestants:
    """Pairs of runs, setting by setting."""

    def __init__(self, results: Results, size: Size):
        self.results, self.size = results, size

    def of_seeds(self, make: Callable[[int], Run]) -> list[Run]:
        return [make(seed) for seed in range(self.size.seeds)]

    def main(self, data: str, method: str, rate: float) -> list[Run]:
        return self.of_seeds(partial(ex.main_run, data, method, rate))

    def equal(self, other: str, datas: Sequence[str], rates: Sequence[float]) -> Pairs:
        for d, r in product(datas, rates):
            yield _setting(d, r), self.main(d, "RVI", r), self.main(d, other, r)

    def best(self, data: str, method: str, rate: float, mode: str = "dense") -> list[Run]:
        return ex.tuned_runs(self.results, self.size, data, method, rate, mode)

    def each_best(self, other: str, datas: Sequence[str], rates: Sequence[float]) -> Pairs:
        for d, r in product(datas, rates):
            yield _setting(d, r), self.best(d, "RVI", r), self.best(d, other, r)

    def form(self, name: str) -> Pairs:
        for d, r in product(ex.IMAGES, (0.0, 0.5)):
            yield _setting(d, r), self.main(d, "RVI", r), self.of_seeds(partial(ex.form_run, d, r, name))

    def lazy(self) -> Pairs:
        for d in ex.IMAGES:
            yield _setting(d, 0.5), self.main(d, "RVI", 0.5), self.of_seeds(partial(ex.lazy_run, d))

    def lazy_best(self) -> Pairs:
        for d in ex.IMAGES:
            yield _setting(d, 0.5), self.best(d, "RVI", 0.5), self.best(d, "RVI", 0.5, "lazy")

    def share(self) -> Pairs:
        for d, share in product(ex.IMAGES, ex.ACTIVE):
            if share != 0.5:
                other = self.of_seeds(partial(ex.active_run, d, share))
                yield f"{_setting(d, 0.5)}, share {share:g}", self.main(d, "RVI", 0.5), other

    def scale(self) -> Pairs:
        for d, r, value in product(ex.IMAGES, (0.5, 0.9), ex.SCALES):
            if value != ex.PAPER_SCALE:
                name = f"{value:.2g}" if isinstance(value, float) else value
                other = self.of_seeds(partial(ex.scale_run, d, "RVI", r, value))
                yield f"{_setting(d, r)}, scale {name}", self.main(d, "RVI", r), other

    def initial(self) -> Pairs:
        for d, (name, values) in product(ex.IMAGES, ex.INITIAL.items()):
            for value in (values[0], values[2]):
                other = self.of_seeds(partial(ex.initial_run, d, name, value))
                yield f"{_setting(d, 0.5)}, {name} {value:g}", self.main(d, "RVI", 0.5), other

    def tables(self) -> Pairs:
        for d in ex.TABLES:
            yield _setting(d, 0.5), self.best_latent(d, "RVI"), self.best_latent(d, "VAD")

    def best_latent(self, data: str, method: str) -> list[Run]:
        """The runs of the latent size with the least error on hidden cells, all else by default; [] if not all ran."""
        make = partial(ex.table_run, data, method, linear_path=True, scale="learned")
        candidates = [self.of_seeds(partial(make, latent_dim=dim)) for dim in ex.LATENT_DIMS]
        if not all(map(self.results.have, candidates)):
            return []
        return min(candidates, key=lambda runs: float(np.mean([self.results[run].end("hidden") for run in runs])))

    def defaults(self, other: str, datas: Sequence[str], rates: Sequence[float]) -> Pairs:
        for d, r in product(datas, rates):
            ours, theirs = (self.of_seeds(partial(ex.default_run, d, method, r)) for method in ("RVI", other))
            yield _setting(d, r), ours, theirs


def _setting(data: str, rate: float) -> str:
    return f"{data}, {rate:.0%} missing"
