"""rvi-fast fit, impute and embed: files in, files out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import RVI, VAD, VAE, io
from .estimators import Estimator
from .files import Array, Column, ReadOptions, Table, read, replacing, write_npy
from .observations import Observations

METHODS: dict[str, Any] = {"rvi": RVI, "vad": VAD, "vae": VAE}
TABLE_FILE, TABLE_VERSION = "table.json", 1  # beside a model that was fitted on a table: its columns
ROWS_FILE = "rows.npy"  # beside a model: hashes of the rows that it was fitted on
HIDDEN_SHARE = 0.1  # of the observed cells, for the estimate of the error
REPORTED_COLUMNS = 60

Bools = NDArray[np.bool_]


@dataclasses.dataclass
class Job:
    """A file, and the part of it that a model takes: X [N, D] and mask (bool [N, D] or None: NaN is missing)."""

    path: Path
    file: Table | Array
    X: Any
    mask: Bools | None
    positions: list[int]  # of X's columns in a table; of an array, all
    known: list[Column]  # those that the model was fitted on; empty for an array

    @property
    def observed(self) -> Bools:
        if isinstance(self.file, Array):
            return self.file.observed
        return ~np.isnan(self.X.to_numpy())

    def row_hashes(self) -> NDArray[np.int64]:
        """Of each row's cells and holes [N]."""
        return Observations(self.X, self.mask).row_ids().numpy()


@dataclasses.dataclass
class Errors:
    """Squared errors on hidden cells, summed over each column [D]: of the filling, and of the column's mean."""

    cells: NDArray[np.int64]  # hidden cells of each column
    filling: NDArray[np.float64]
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]  # of the column's other observed cells

    def relative(self) -> float:
        """The filling's error as a share of the means', every column in units of its standard deviation."""
        varied = self.variance > 0
        sums = [(squares[varied] / self.variance[varied]).sum() for squares in (self.filling, self.mean)]
        return float(np.sqrt(sums[0] / sums[1]))


def fit(arguments: argparse.Namespace) -> int:
    """Train on a file and save the model; after Ctrl-C, the model as trained so far."""
    options = _read_options(arguments)
    job = _job(Path(arguments.data), read(arguments.data, options))
    folder = io.make_folder(arguments.out)
    model = _new_model(arguments, job)
    _say(arguments, _described(job))
    interrupted = _fit(model, job.X, job.mask)
    model.save(folder, rows=False)
    _write_columns(folder / TABLE_FILE, job, options)
    with replacing(folder / ROWS_FILE) as part:
        write_npy(part, np.unique(job.row_hashes()))
    if interrupted:
        print(f"rvi-fast fit: interrupted; {folder} holds the model as trained so far", file=sys.stderr)
        return 130
    _say(arguments, f"wrote {folder}")
    return 0


def impute(arguments: argparse.Namespace) -> int:
    """Fill the holes of a file by a saved model, or by one fitted on the file itself."""
    job, model = _job_and_model(arguments)
    outputs = _outputs(arguments)
    _say(arguments, _described(job))
    observed = job.observed
    filled: Any = None
    errors = None
    if observed.all():
        _say(arguments, _nothing_missing(job))
    else:
        if not arguments.no_estimate:
            errors = _errors(arguments, job, model)
        _say(arguments, "imputing")
        filled = _filler(arguments, job, model)(job.mask, arguments.samples)
    holes = ~observed
    if model is None:
        holes[:, ~observed.any(0)] = False  # an empty column stays empty
    _write_filled(job, filled, holes, outputs, arguments.samples)
    if not arguments.quiet:
        _report(job, holes, errors)
        _say(arguments, f"wrote {', '.join(map(str, outputs))}")
    return 0


def embed(arguments: argparse.Namespace) -> int:
    """Write the posterior mean of every row."""
    job, model = _job_and_model(arguments)
    out = _checked_output(Path(arguments.out), arguments)
    if out.suffix.lower() not in (".csv", ".tsv", ".parquet", ".npy"):
        raise ValueError(f"-o {out} must end in .csv, .tsv, .parquet or .npy")
    _say(arguments, _described(job))
    if model is None:
        fitted = _new_model(arguments, job)
        _fit_or_stop(fitted, job.X, job.mask)
        embedding = fitted.embed()
    else:
        embedding = model.embed(job.X, job.mask)
    job.file.write_embedding(out, embedding)
    _say(arguments, f"wrote {out}: {_count(len(embedding), 'row')}, {_count(embedding.shape[1], 'column')}")
    return 0


# what a command works on


def _read_options(arguments: argparse.Namespace) -> ReadOptions:
    return ReadOptions(
        delimiter=arguments.delimiter,
        decimal=arguments.decimal,
        missing=tuple(arguments.missing),
        index=tuple(arguments.index),
        header=not arguments.no_header,
        key=arguments.key,
        mask=arguments.mask,
    )


def _job(path: Path, file: Table | Array) -> Job:
    """All number columns of a table, or all of an array."""
    if isinstance(file, Array):
        return Job(path, file, file.X, file.mask, list(range(file.X.shape[1])), [])
    positions = sorted(file.numbers)
    if not positions:
        kinds = ", ".join(f"{column.name!r} ({column.note or column.kind})" for column in file.columns[:5])
        remedy = "the right --delimiter" if len(file.columns) == 1 and file.columns[0].kind == "text" else "numbers"
        raise ValueError(f"{path} has no column of numbers to learn from: {kinds}; give a table with {remedy}")
    return Job(path, file, file.matrix(positions), None, positions, [file.columns[i] for i in positions])


def _job_and_model(arguments: argparse.Namespace) -> tuple[Job, Estimator | None]:
    options, path = _read_options(arguments), Path(arguments.data)
    if arguments.model is None:
        return _job(path, read(path, options)), None
    model = _load(arguments)
    known, missing = _read_columns(Path(arguments.model), model)
    file = read(path, dataclasses.replace(options, missing=(*options.missing, *missing)))
    if known is None or isinstance(file, Array):
        return _job(path, file), model
    positions = _matched(path, file, known)
    return Job(path, file, file.matrix(positions), None, positions, known), model


def _load(arguments: argparse.Namespace) -> Estimator:
    classes = {cls.__name__: cls for cls in METHODS.values()}
    name = io.read_config(arguments.model)["class"]
    if name not in classes:
        raise ValueError(
            f"{arguments.model} holds a model of class {name!r}, which this rvi_fast does not know; upgrade rvi_fast"
        )
    model = classes[name].load(arguments.model, device=None if arguments.device == "auto" else arguments.device)
    model.progress = _shows_progress(arguments)
    if arguments.seed is not None:
        model.seed = arguments.seed
    return model


def _matched(path: Path, file: Table, known: Sequence[Column]) -> list[int]:
    """The columns of a table that a model knows, in the model's order; the first of equal names is the first."""
    places = {key: position for position, key in enumerate(_numbered([column.name for column in file.columns]))}
    keys = _numbered([column.name for column in known])
    lacking = [name for name, number in keys if (name, number) not in places]
    if lacking:
        raise ValueError(
            f"{path} lacks {', '.join(map(repr, lacking[:5]))}{' and more' if len(lacking) > 5 else ''}, on which the "
            "model was fitted; add the columns (they may be empty), or fit another model"
        )
    positions = [places[key] for key in keys]
    for position in positions:
        column = file.columns[position]
        if column.kind not in ("number", "empty"):
            remedy = "give numbers, or leave it empty"
            if column.kind == "index":
                remedy = "leave out its --index, or make pandas' index a column (reset_index)"
            raise ValueError(
                f"column {column.name!r} of {path} is {column.kind}, but the model was fitted on numbers there; "
                + (column.note or remedy)
            )
    return positions


def _numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    """Each name with how many equal ones stand before it."""
    seen: Counter[str] = Counter()
    keys = []
    for name in names:
        keys.append((name, seen[name]))
        seen[name] += 1
    return keys


def _write_columns(path: Path, job: Job, options: ReadOptions) -> None:
    if isinstance(job.file, Array):
        path.unlink(missing_ok=True)
        return
    columns = [{"name": c.name, "kind": c.kind, "decimals": c.decimals} for c in job.file.columns]
    content = {"version": TABLE_VERSION, "columns": columns, "missing": options.missing}
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def _read_columns(folder: Path, model: Estimator) -> tuple[list[Column] | None, tuple[str, ...]]:
    """The columns that a model was fitted on and the markers that were missing there; None if it was an array."""
    names = model.feature_names_in_
    path = folder / TABLE_FILE
    if names is None:
        return None, ()
    if not path.exists():
        return [Column(name, "number") for name in names], ()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        columns = [Column(c["name"], c["kind"], c["decimals"]) for c in content["columns"] if c["kind"] == "number"]
        if [column.name for column in columns] == names:
            return columns, tuple(content["missing"])
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} is damaged or belongs to another model; delete it, or fit the model again")


# models


def _new_model(arguments: argparse.Namespace, job: Job) -> Estimator:
    given = {name: getattr(arguments, name) for name in ("epochs", "latent_dim", "seed")}
    return METHODS[arguments.method or "rvi"](
        **{name: value for name, value in given.items() if value is not None},
        device=arguments.device,
        progress=_shows_progress(arguments),
        keep_empty_columns=isinstance(job.file, Array),
    )


def _shows_progress(arguments: argparse.Namespace) -> bool:
    return not arguments.quiet and sys.stderr.isatty()  # in a log file a bar is a line for every step


def _fit(model: Any, X: Any, mask: Bools | None) -> bool:
    """Train; whether Ctrl-C ended it early."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fit was interrupted", UserWarning)
        model.fit(X, mask)
    return model.stopped_ == "interrupted"


def _fit_or_stop(model: Any, X: Any, mask: Bools | None) -> None:
    if _fit(model, X, mask):
        raise KeyboardInterrupt


def _filler(arguments: argparse.Namespace, job: Job, model: Estimator | None) -> Callable[..., Any]:
    """mask -> X filled where it is False, by the saved model or by a new one fitted on X."""

    def fill(mask: Bools | None, n_samples: int | None = None) -> Any:
        if model is not None:
            return model.impute(job.X, mask, n_samples=n_samples)
        fitted: Any = _new_model(arguments, job)
        _fit_or_stop(fitted, job.X, mask)
        return fitted.impute(n_samples=n_samples)

    return fill


def _errors(arguments: argparse.Namespace, job: Job, model: Estimator | None) -> Errors | None:
    """Errors on cells that neither the filling nor the training of the model has seen; None, and why, without any."""
    unseen = _unseen_rows(arguments, job)
    if not unseen.any():
        _say(
            arguments,
            "no estimate of the error: the model was trained on these rows and knows their cells; leave out --model "
            "to get one from a fit that does not see the cells it is tested on",
        )
        return None
    where = "" if unseen.all() else f" in the {_count(unseen.sum(), 'row')} that the model was not trained on"
    _say(arguments, f"estimating the error on {HIDDEN_SHARE:.0%} of the observed cells{where}")
    errors = _estimate(job.X, job.observed, unseen, _filler(arguments, job, model), arguments.seed or 0)
    if errors is None:
        _say(arguments, "no estimate: too few observed cells, or all of them constant")
    return errors


def _unseen_rows(arguments: argparse.Namespace, job: Job) -> Bools:
    """Which rows [N] the saved model was not trained on: all of them, if there is no model or it does not say."""
    path = Path(arguments.model or "") / ROWS_FILE
    if arguments.model is None or not path.exists():
        return np.ones(len(job.X), dtype=bool)
    try:
        return ~np.isin(job.row_hashes(), np.load(path, allow_pickle=False))
    except (ValueError, EOFError):
        raise ValueError(f"{path} is damaged; delete it, or fit the model again") from None


def _estimate(X: Any, observed: Bools, unseen: Bools, fill: Callable[..., Any], seed: int) -> Errors | None:
    """Errors on observed cells of unseen rows, hidden from the filling; None without any, or if all are constant."""
    rng = np.random.default_rng([seed, *b"estimate"])  # not masks.mcar, which may have made the holes
    hidden = (rng.random(observed.shape, dtype=np.float32) < HIDDEN_SHARE) & unseen[:, None]
    shown = observed & ~hidden
    lost = ~shown.any(0)
    shown[:, lost] = observed[:, lost]  # a column keeps something to learn from
    rows, columns = np.nonzero(observed & ~shown)
    if len(rows) == 0:
        return None
    cells = np.asarray(X)
    truth = cells[rows, columns].astype(np.float64)
    known = [cells[seen, j].astype(np.float64) for j, seen in enumerate(shown.T)]
    mean, variance = (np.array([f(k) if len(k) else 0.0 for k in known]) for f in (np.mean, np.var))
    width = len(known)
    if not variance[columns].any():
        return None
    filled = np.asarray(fill(shown))[rows, columns]
    squares = [np.square(x - truth) for x in (filled, mean[columns])]
    of_filling, of_mean = (np.bincount(columns, square, width).astype(np.float64) for square in squares)
    return Errors(np.bincount(columns, minlength=width), of_filling, of_mean, variance)


# output


def _outputs(arguments: argparse.Namespace) -> list[Path]:
    """The files that impute will write, checked before any work is done."""
    data, out = Path(arguments.data), Path(arguments.out)
    known = data.suffix.lower() if data.suffix.lower() in (".csv", ".tsv", ".parquet", ".npz") else ".npy"
    if out.suffix.lower() != known:
        raise ValueError(f"-o {out} must end in {known}, the format that {data.name} is given back in")
    numbered = arguments.samples is not None and known not in (".npy", ".npz")
    paths = [out.with_suffix(f".{i}{out.suffix}") for i in range(1, arguments.samples + 1)] if numbered else [out]
    return [_checked_output(path, arguments) for path in paths]


def _checked_output(out: Path, arguments: argparse.Namespace) -> Path:
    if out.is_dir():
        raise ValueError(f"-o {out} is a folder; give a file")
    for given in filter(None, (arguments.data, arguments.mask)):
        if out.exists() and os.path.samefile(out, given):
            raise ValueError(f"-o {out} would overwrite {given}; give another name")
    io.writable_folder(out.parent)
    return out


def _write_filled(job: Job, filled: Any, holes: Bools, outputs: Sequence[Path], samples: int | None) -> None:
    """filled: X without holes, several of it where samples is given, or None if X has no holes."""
    if isinstance(job.file, Array):
        versions = np.asarray(job.X) if filled is None else filled
        if filled is None and samples is not None:
            versions = np.broadcast_to(versions, (samples, *versions.shape))
        job.file.write(outputs[0], versions, holes)
        return
    frames = [job.X] * len(outputs) if filled is None else [filled] if samples is None else filled
    decimals = {p: _decimals(job.file.columns[p], c) for p, c in zip(job.positions, job.known, strict=True)}
    for path, frame in zip(outputs, frames, strict=True):
        values = frame.to_numpy()
        job.file.write(path, {p: values[:, i] for i, p in enumerate(job.positions)}, decimals)


def _decimals(here: Column, fitted: Column) -> int | None:
    if here.kind == "empty":
        return fitted.decimals
    if here.decimals is None or fitted.decimals is None:
        return here.decimals
    return max(here.decimals, fitted.decimals)


def _described(job: Job) -> str:
    if isinstance(job.file, Array):
        return f"{job.path}: {job.file.X.dtype} {list(job.file.shape)}"
    of_all, verb = (
        _count(len(job.file.columns), "column"),
        "holds numbers" if len(job.positions) == 1 else "are numbers",
    )
    table = f"{job.path}: {_count(job.file.num_rows, 'row')}, {len(job.positions)} of {of_all} {verb}"
    return f"{table}; {job.file.note}" if job.file.note else table


def _nothing_missing(job: Job) -> str:
    remedy = "name other marks of missing cells by --missing"
    columns = [] if isinstance(job.file, Array) else job.file.columns
    others = {column.kind for i, column in enumerate(columns) if i not in job.positions} - {"index"}
    if not others:
        return f"nothing is missing there; {remedy}"
    return (
        f"nothing is missing in the columns of numbers; {remedy}; columns of other kinds ({', '.join(sorted(others))}) "
        "are never filled and stay as they are"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _say(arguments: argparse.Namespace, text: str) -> None:
    if not arguments.quiet:
        print(text, file=sys.stderr)


def _report(job: Job, holes: Bools, errors: Errors | None) -> None:
    """What was done with each column, and the error to expect."""
    lines = [_array_line(job.file, holes)] if isinstance(job.file, Array) else _column_lines(job, holes, errors)
    if errors is not None:
        cells = errors.cells.sum()
        on_hidden = f"on {_count(cells, 'observed cell')} that {'was' if cells == 1 else 'were'} hidden"
        if isinstance(job.file, Array):
            error, of_means = (np.sqrt(squares.sum() / cells) for squares in (errors.filling, errors.mean))
            lines.append(f"error: {error:.3g} (column means: {of_means:.3g}), root mean square {on_hidden}")
        else:
            lines.append(
                f"error: root mean square {on_hidden}; overall {errors.relative():.2f} of that of column means"
            )
    print("\n".join(lines), file=sys.stderr)


def _array_line(array: Array, holes: Bools) -> str:
    line = f"imputed {holes.sum()} of {_count(holes.size, 'cell')}"
    left = int((~array.observed).sum() - holes.sum())
    return f"{line}; left {left} empty, in columns with nothing observed" if left else line


def _column_lines(job: Job, holes: Bools, errors: Errors | None) -> list[str]:
    assert isinstance(job.file, Table)
    place = {position: i for i, position in enumerate(job.positions)}
    rows = []
    for position, column in enumerate(job.file.columns):
        i = place.get(position)
        if i is None:
            rows.append((column.name, _passed_through(column), ""))
            continue
        filled = int(holes[:, i].sum())
        values = job.X.iloc[:, i].to_numpy()[~holes[:, i]]
        constant = "constant, " if len(values) and (values == values[0]).all() else ""
        done = f"imputed {_count(filled, 'cell')}" if filled else "complete"
        error = ""
        if errors is not None and errors.mean[i] > 0:
            of_filling, of_mean = (np.sqrt(squares[i] / errors.cells[i]) for squares in (errors.filling, errors.mean))
            error = f"{of_filling:.3g} (column mean: {of_mean:.3g})"
        rows.append((column.name, constant + done, error))
    shown = [("column", "what was done", "error" if errors is not None else ""), *rows[:REPORTED_COLUMNS]]
    widths = [max(len(row[i]) for row in shown) for i in (0, 1)]
    lines = [f"{name:<{widths[0]}}  {done:<{widths[1]}}  {error}".rstrip() for name, done, error in shown]
    return lines if len(rows) < len(shown) else [*lines, f"and {_count(len(rows) - REPORTED_COLUMNS, 'more column')}"]


def _passed_through(column: Column) -> str:
    if column.kind == "number":
        return "not known to the model, passed through"
    if column.kind == "empty":
        return "empty, left empty"
    return f"{column.kind}, passed through" + (f" ({column.note})" if column.note else "")
