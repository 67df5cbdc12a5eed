"""One run: its settings, its measurements, and the two CSV files that keep them."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import math
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

Settings = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the experiments are."""

    train_rows: int
    test_rows: int
    epochs: int
    seeds: int


SIZES = {"quick": Size(4_000, 1_000, 60, 3), "full": Size(10_000, 10_000, 250, 10)}


@dataclasses.dataclass(frozen=True)
class Run:
    """One fit. base: "paper" (its settings) or "auto" (the library's defaults), which `settings` override.

    missing: share of the training cells that are holes (MCAR). hidden: share of the observed training cells that are
    taken from training too, to choose settings by. test: shares of the test rows' cells that are holes, one
    measurement each. seed: of holes, initial values, order and noise.
    """

    data: str
    method: str
    missing: float
    seed: int
    base: str = "paper"
    settings: Settings = ()
    hidden: float = 0.0
    test: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        parts = [self.data, self.method, self.base, f"missing={self.missing:g}", f"seed={self.seed}"]
        parts += [f"hidden={self.hidden:g}"] if self.hidden else []
        parts += [f"test={','.join(f'{rate:g}' for rate in self.test)}"] if self.test else []
        return " ".join([*parts, shown(self.settings)]).strip()

    def with_settings(self, **settings: Any) -> Run:
        """This run with other settings; they are kept in one order, so that equal runs have equal names."""
        merged = {**dict(self.settings), **settings}
        return dataclasses.replace(self, settings=tuple(sorted(merged.items())))


def shown(settings: Settings) -> str:
    """Settings in one line: lr=0.001 scale=learned."""
    return " ".join(f"{name}={f'{v:g}' if isinstance(v, float) else v}".replace(" ", "") for name, v in settings)


@dataclasses.dataclass(frozen=True)
class Point:
    """Elastic errors at one moment of a run; NaN where no cell counts.

    rows: "train" or "test". protocol: of test rows, "row", "epochs", or "encoder". rate: share of holes in these rows.
    step: epochs of training, or steps of inference. observed, missing, hidden: elastic error on these cells.
    mse: mean squared error on missing cells.
    """

    rows: str
    protocol: str
    rate: float
    step: int
    observed: float
    missing: float
    hidden: float
    mse: float


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run measured."""

    points: tuple[Point, ...]
    seconds: float
    finished: str
    machine: str

    @property
    def diverged(self) -> bool:
        """A diverged fit ends in a measurement of NaN, and no test row is measured."""
        last = self.points[-1]
        return all(map(math.isnan, (last.observed, last.missing, last.hidden)))

    def end(self, cells: str, *, rows: str = "train", **where: Any) -> float:
        """The last measurement of `cells` ("observed", "missing", "hidden", "mse") that fits `where`."""
        if self.diverged:
            return math.inf
        return getattr([p for p in self.points if _fits(p, rows=rows, **where)][-1], cells)

    def curve(self, cells: str) -> tuple[list[int], list[float]]:
        """Epochs of training, and the errors then."""
        points = [p for p in self.points if p.rows == "train"]
        return [p.step for p in points], [getattr(p, cells) for p in points]


def _fits(point: Point, **where: Any) -> bool:
    return all(getattr(point, name) == value for name, value in where.items())


def machine() -> str:
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    )


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


RUN_FIELDS = (
    *("run", "size", "data", "method", "base", "missing", "seed", "hidden", "settings"),
    *("seconds", "finished", "machine"),
)
POINT_FIELDS = ("run", *(f.name for f in dataclasses.fields(Point)))


class Results:
    """runs.csv (a line a run) and curves.csv (a line a measurement) in a folder; every write replaces a whole file.

    A run counts as done when it stands in runs.csv, which is written last: a kill loses no more than the runs at work.
    size: "quick" or "full"; a folder holds results of one size.
    """

    def __init__(self, folder: str | os.PathLike[str], size: str):
        self.folder, self.size = Path(folder), size
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lines: dict[str, dict[str, str]] = {}
        self.results: dict[str, Result] = {}
        self._read()

    def __contains__(self, run: Run) -> bool:
        return run.name in self.results

    def __getitem__(self, run: Run) -> Result:
        return self.results[run.name]

    def have(self, runs: Iterable[Run]) -> bool:
        return all(run in self for run in runs)

    def add(self, run: Run, result: Result) -> None:
        """Keep a result, rounded as the files have it: what is chosen now is chosen after a resume, too."""
        kind = self.size, run.data, run.method, run.base, f"{run.missing:g}", run.seed, f"{run.hidden:g}"
        line = (run.name, *kind, shown(run.settings), f"{result.seconds:.1f}", result.finished, result.machine)
        self.lines[run.name] = dict(zip(RUN_FIELDS, map(str, line), strict=True))
        self.results[run.name] = dataclasses.replace(result, points=tuple(map(_rounded, result.points)))
        self.write()

    def write(self) -> None:
        points = ([name, *map(_text, dataclasses.astuple(p))] for name, r in self.results.items() for p in r.points)
        _replace(self.folder / "curves.csv", POINT_FIELDS, points)
        _replace(self.folder / "runs.csv", RUN_FIELDS, (line.values() for line in self.lines.values()))

    def _read(self) -> None:
        runs, curves = self.folder / "runs.csv", self.folder / "curves.csv"
        points: dict[str, list[Point]] = {}
        for line in _lines(curves, POINT_FIELDS):
            numbers = {name: float(line[name]) for name in ("rate", "observed", "missing", "hidden", "mse")}
            point = Point(line["rows"], line["protocol"], step=int(line["step"]), **numbers)
            points.setdefault(line["run"], []).append(point)
        for line in _lines(runs, RUN_FIELDS):
            if line["size"] != self.size:
                raise ValueError(f"{self.folder} holds results of size {line['size']}; choose another --out")
            name = line["run"]
            if name in points:
                self.lines[name] = line
                result = Result(tuple(points[name]), float(line["seconds"]), line["finished"], line["machine"])
                self.results[name] = result


def _rounded(point: Point) -> Point:
    values: dict[str, Any] = {k: float(_text(v)) for k, v in dataclasses.asdict(point).items() if isinstance(v, float)}
    return dataclasses.replace(point, **values)


def _text(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _lines(path: Path, fields: tuple[str, ...]) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != fields:
            raise ValueError(f"{path} was not written by this version of rvi-fast paper; choose another --out")
        return list(reader)


def _replace(path: Path, fields: Iterable[str], lines: Iterable[Iterable[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(fields)
    writer.writerows(lines)
    part = path.with_suffix(".part")
    part.write_text(text.getvalue(), encoding="utf-8")
    os.replace(part, path)
