"""Tables and arrays in files: what the estimators take from them, and the same file with its holes filled."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib
import io
import os
import re
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .data import load_idx

Floats = NDArray[np.float64]

MISSING = ("", "NA", "NaN", "nan", "null", "None", "N/A", "?")
TEXT_SUFFIXES = (".csv", ".tsv")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".npy", ".npz")
DIGITS = 6  # what float32 carries

# A whole number with a leading zero is a code, not a number.
NUMBER = r"[+-]?(?:0|[1-9][0-9]*|[0-9]+{mark}[0-9]*|{mark}[0-9]+)(?:[eE][+-]?[0-9]+)?"
INFINITY = r"[+-]?[iI][nN][fF](?:[iI][nN][iI][tT][yY])?"
DATE = r"[0-9]{1,4}[-/.][0-9]{1,2}[-/.][0-9]{1,4}(?:[T ].*)?"
QUOTED = r'(?<![^\r\n{delimiter}])"[^"]*+(?:""[^"]*+)*+"'
HIDDEN_IN_QUOTES = ("\ufdd0", "\ufdd1", "\ufdd2")  # stand for the delimiter, \n and \r; Unicode never assigns them


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """How to read a file, where its name and content do not say."""

    delimiter: str | None = None
    decimal: str | None = None
    missing: tuple[str, ...] = ()
    index: tuple[str, ...] = ()
    header: bool = True
    key: str | None = None
    mask: str | None = None

    @property
    def missing_numbers(self) -> list[float]:
        return [float(marker) for marker in self.missing if re.fullmatch(NUMBER.format(mark=r"\."), marker)]


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table. kind: "number", "text", "date", "empty" or "index"; all but numbers pass through.

    decimals: digits behind the mark of its most precise number, None if it has exponents. note: what is odd in it.
    """

    name: str
    kind: str
    decimals: int | None = None
    note: str = ""


class Table:
    """Rows with named columns, of which `numbers` holds those that a model takes: float64 [N], NaN = missing."""

    suffix: str
    columns: list[Column]
    numbers: dict[int, Floats]
    num_rows: int
    note = ""  # what is odd about the file

    def matrix(self, positions: Sequence[int]) -> Any:
        """DataFrame [N, len(positions)] of number columns; an empty column is one of holes."""
        hole = np.full(self.num_rows, np.nan)
        values = np.column_stack([self.numbers.get(position, hole) for position in positions])
        return _pandas().DataFrame(values, columns=[self.columns[position].name for position in positions])

    def row_labels(self) -> Any:
        """The index columns as a pandas Index; row numbers if there are none."""
        raise NotImplementedError

    def write(self, path: Path, filled: Mapping[int, Floats], decimals: Mapping[int, int | None]) -> None:
        """This table with the holes of some columns filled. decimals: of the numbers, where they are text."""
        raise NotImplementedError

    def write_embedding(self, path: Path, embedding: NDArray[np.float32]) -> None:
        _write_embedding(path, embedding, self.row_labels())


class TextTable(Table):
    """A csv or tsv file. Cells are kept as they stand in it, quotes included, and only holes are written anew."""

    def __init__(self, path: Path, options: ReadOptions):
        self.suffix = path.suffix.lower()
        self.bom, text = _decoded(path)
        self.delimiter = options.delimiter or _sniffed_delimiter(text, self.suffix)
        text = _hide_in_quotes(text, self.delimiter)
        self.ending = "\r\n" if "\r\n" in text else "\n" if "\n" in text or "\r" not in text else "\r"
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        self.ends_with_newline = text.endswith("\n")
        cells = _cells(path, text.removesuffix("\n") + "\n", self.delimiter)
        self.header = cells.iloc[0].tolist() if options.header else None
        self.cells = cells.iloc[1:].reset_index(drop=True) if options.header else cells
        self.num_rows = len(self.cells)
        if self.num_rows == 0:
            raise ValueError(f"{path} has a header but no rows; give a file with at least one row below it")
        names = [self._unquoted(cell) for cell in self.header or map(str, range(cells.shape[1]))]
        index = _index_positions(path, names, options.index)
        if options.header and names[0] == "" and len(names) > 1:
            index.add(0)
        texts = [self._texts(position) for position in range(len(names))]
        holes = [_text_holes(column, options) for column in texts]
        self.decimal = options.decimal or self._sniffed_decimal(texts)
        if options.header and all(re.fullmatch(NUMBER.format(mark="[.,]"), name) for name in names):
            self.note = "its first line, taken as the header, is all numbers: --no-header makes it a row"
        self.columns, self.numbers = [], {}
        for position, name in enumerate(names):
            column = Column(name, "index")
            if position not in index:
                column, values = _text_column(path, name, texts[position], holes[position], self.decimal)
                if values is not None:
                    self.numbers[position] = values
            self.columns.append(column)

    def _unquoted(self, cell: str) -> str:
        cell = cell.strip()
        if not cell.startswith('"'):
            return cell
        return self._restored(cell).removeprefix('"').removesuffix('"').replace('""', '"')

    def _restored(self, text: str) -> str:
        for stand_in, character in zip(HIDDEN_IN_QUOTES, (self.delimiter, "\n", "\r"), strict=True):
            text = text.replace(stand_in, character)
        return text

    def _texts(self, position: int) -> Any:
        """A column's cells without quotes and outer spaces."""
        texts = self.cells[position].str.strip()
        quoted = texts.str.startswith('"')
        return texts.where(~quoted, texts[quoted].map(self._unquoted)) if quoted.any() else texts

    def _sniffed_decimal(self, texts: list[Any]) -> str:
        if self.delimiter != ";":
            return "."
        with_mark = {
            mark: any(column.str.fullmatch(rf"[+-]?[0-9]*{re.escape(mark)}[0-9]+").any() for column in texts)
            for mark in ",."
        }
        return "," if with_mark[","] and not with_mark["."] else "."

    def row_labels(self) -> Any:
        pandas = _pandas()
        index = [position for position, column in enumerate(self.columns) if column.kind == "index"]
        if not index:
            return pandas.RangeIndex(self.num_rows)
        labels = pandas.DataFrame({position: self._texts(position) for position in index})
        return pandas.MultiIndex.from_frame(labels, names=[self.columns[position].name for position in index])

    def write(self, path: Path, filled: Mapping[int, Floats], decimals: Mapping[int, int | None]) -> None:
        columns = [self.cells[position].tolist() for position in range(len(self.columns))]
        for position, values in filled.items():
            known = self.numbers.get(position)
            holes = range(self.num_rows) if known is None else np.flatnonzero(np.isnan(known))
            for row in holes:
                number = format_number(values[row], decimals.get(position)).replace(".", self.decimal)
                quoted = columns[position][row].lstrip().startswith('"') or self.delimiter in number
                columns[position][row] = f'"{number}"' if quoted else number
        rows = zip(*columns, strict=True)
        lines = [self.delimiter.join(row) for row in ([self.header, *rows] if self.header else rows)]
        text = self._restored(self.ending.join(lines) + (self.ending if self.ends_with_newline else ""))
        with replacing(path) as part:
            part.write_bytes((b"\xef\xbb\xbf" if self.bom else b"") + text.encode())

    def write_embedding(self, path: Path, embedding: NDArray[np.float32]) -> None:
        same = path.suffix.lower() == self.suffix
        _write_embedding(
            path, embedding, self.row_labels(), *((self.delimiter, self.decimal, self.ending) if same else ())
        )


def _decoded(path: Path) -> tuple[bool, str]:
    """Whether the file begins with a byte order mark, and its text."""
    content = path.read_bytes()
    bom = content.startswith(b"\xef\xbb\xbf")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start} is 0x{content[error.start]:02x}); convert it first, for example: "
            f"iconv -f WINDOWS-1252 -t UTF-8 {path.name} > utf8{path.suffix}"
        ) from None
    if "\0" in text:
        raise ValueError(f"{path} holds zero bytes, so it is no {path.suffix} text; give a text file in UTF-8")
    if not text.strip():
        raise ValueError(f"{path} is empty; give a file with a header and at least one row")
    return bom, text


def _sniffed_delimiter(text: str, suffix: str) -> str:
    """The candidate of which every one of the first lines has most."""
    if suffix == ".tsv":
        return "\t"
    lines = [line for line in re.sub(r'"[^"]*"', "", text[: 1 << 16]).splitlines()[:20] if line.strip()]
    return max(",;\t", key=lambda candidate: min((line.count(candidate) for line in lines[:-1] or lines), default=0))


def _hide_in_quotes(text: str, delimiter: str) -> str:
    """text with delimiters and line ends inside quoted cells replaced, so that what is left separates cells."""
    if '"' not in text:
        return text
    hide = str.maketrans(dict(zip((delimiter, "\n", "\r"), HIDDEN_IN_QUOTES, strict=True)))
    return re.sub(QUOTED.format(delimiter=re.escape(delimiter)), lambda quoted: quoted[0].translate(hide), text)


def _cells(path: Path, text: str, delimiter: str) -> Any:
    """DataFrame of str, one for every cell."""
    pandas = _pandas()
    one_column = delimiter not in text  # there a blank line is a hole
    try:
        cells = pandas.read_csv(
            io.StringIO(text),
            sep=delimiter,
            header=None,
            dtype=str,
            keep_default_na=False,
            quoting=csv.QUOTE_NONE,
            skip_blank_lines=not one_column,
        )
    except pandas.errors.ParserError as error:
        ragged = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", str(error))
        if not ragged:
            raise ValueError(f"{path} cannot be read as a table: {error}") from None
        raise _ragged(path, text, delimiter, int(ragged[1])) from None
    if text.count(delimiter) != (cells.shape[1] - 1) * len(cells):
        raise _ragged(path, text, delimiter, cells.shape[1])
    return cells


def _ragged(path: Path, text: str, delimiter: str, expected: int) -> ValueError:
    number = 1
    for line in text.split("\n"):
        found = line.count(delimiter) + 1
        if line.strip() and found != expected:
            break
        number += 1 + line.count(HIDDEN_IN_QUOTES[1])
    cells = f"{found} cell{'s' * (found != 1)}"
    return ValueError(
        f"line {number} of {path} has {cells}, but the first line has {expected}; correct that line, put cells that "
        f"hold {delimiter!r} in double quotes, or give the right --delimiter"
    )


def _text_holes(texts: Any, options: ReadOptions) -> Any:
    markers = {marker.lower() for marker in (*MISSING, *options.missing)}
    holes = texts.str.lower().isin(markers)
    if options.missing_numbers:
        numeric = texts.str.fullmatch(NUMBER.format(mark="[.,]"))
        values = texts[numeric].str.replace(",", ".").astype(np.float64)
        holes[values.index[values.isin(options.missing_numbers)]] = True
    return holes


def _text_column(path: Path, name: str, texts: Any, holes: Any, decimal: str) -> tuple[Column, Floats | None]:
    """A column's kind, and its numbers if it has any."""
    observed = texts[~holes]
    if observed.empty:
        return Column(name, "empty"), None
    is_number = observed.str.fullmatch(f"{NUMBER.format(mark=re.escape(decimal))}|{INFINITY}")
    if not is_number.all():
        kind = "date" if observed.str.fullmatch(DATE).all() else "text"
        first, note = is_number.idxmin(), ""
        if kind == "text" and is_number.mean() > 0.5:
            note = f"row {first + 1} holds {texts[first]!r}, no number; if it means a hole: --missing={texts[first]}"
        elif observed.str.fullmatch(NUMBER.format(mark="[.,]")).all():
            note = f"row {first + 1} holds {texts[first]!r}; if that is a number, give the --decimal mark"
        return Column(name, kind, note=note), None
    plain = observed.str.replace(decimal, ".", regex=False)
    values = np.full(len(texts), np.nan)
    values[~holes.to_numpy()] = plain.astype(np.float64)
    if np.isinf(values).any():
        row = int(np.argmax(np.isinf(values)))
        raise ValueError(
            f"row {row + 1} of column {name!r} of {path} holds {texts[row]!r}, which is infinite in float64; replace "
            "it by a finite number or leave it empty"
        )
    if plain.str.contains("[eE]").any():
        return Column(name, "number"), values
    mark = plain.str.find(".")
    return Column(name, "number", int((plain.str.len() - 1 - mark).where(mark >= 0, 0).max())), values


def format_number(value: float, decimals: int | None) -> str:
    """A number with as many decimals as its column has, but no more than six significant digits behind the mark."""
    if decimals is None:
        return f"{value:.{DIGITS}g}"
    leading = int(np.floor(np.log10(abs(value)))) if value else 0
    text = f"{value:.{min(decimals, max(0, DIGITS - 1 - leading))}f}"
    return text.removeprefix("-") if float(text) == 0 else text


class ParquetTable(Table):
    """A parquet file. Types and metadata, pandas' index included, are those of the file."""

    suffix = ".parquet"

    def __init__(self, path: Path, options: ReadOptions):
        arrow = _pyarrow()
        try:
            self.table = importlib.import_module("pyarrow.parquet").ParquetFile(path).read()
        except arrow.ArrowException as error:
            raise ValueError(f"{path} cannot be read as parquet: {error}") from None
        self.num_rows = self.table.num_rows
        if 0 in self.table.shape:
            raise ValueError(f"{path} has no rows or no columns; give a file with at least one of each")
        index = _index_positions(path, self.table.column_names, options.index)
        by_pandas = (self.table.schema.pandas_metadata or {}).get("index_columns", [])  # names, or a dict for a range
        index |= {i for i, name in enumerate(self.table.column_names) if name in by_pandas}
        self.columns, self.numbers = [], {}
        for position, name in enumerate(self.table.column_names):
            column, values = Column(name, "index"), None
            if position not in index:
                column, values = _arrow_column(path, name, self.table.column(position), options.missing_numbers)
            self.columns.append(column)
            if values is not None:
                self.numbers[position] = values

    def row_labels(self) -> Any:
        chosen = [column.name for column in self.columns if column.kind == "index"]
        frame = self.table.select([i for i, column in enumerate(self.columns) if column.kind == "index"]).to_pandas()
        chosen = [name for name in chosen if name in frame.columns]
        return frame.set_index(chosen).index if chosen else frame.index

    def write(self, path: Path, filled: Mapping[int, Floats], decimals: Mapping[int, int | None]) -> None:
        arrow = _pyarrow()
        compute, parquet = (importlib.import_module(f"pyarrow.{part}") for part in ("compute", "parquet"))
        table = self.table
        for position, values in filled.items():
            field, column = table.schema.field(position), table.column(position)
            hole = np.isnan(self.numbers[position]) if position in self.numbers else np.ones(self.num_rows, bool)
            if hole.any():
                numbers = _arrow_numbers(values, field.type)
                table = table.set_column(position, field, compute.if_else(arrow.array(hole), numbers, column))
        with replacing(path) as part:
            parquet.write_table(table, part)


def _arrow_column(path: Path, name: str, column: Any, missing: list[float]) -> tuple[Column, Floats | None]:
    arrow = _pyarrow()
    kind, types = column.type, arrow.types
    if types.is_null(kind) or column.null_count == len(column):
        return Column(name, "empty"), None
    if types.is_temporal(kind):
        return Column(name, "date"), None
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind) or types.is_boolean(kind)):
        return Column(name, "text"), None
    if types.is_boolean(kind):
        column = column.cast(arrow.uint8())
    values = column.cast(arrow.float64(), safe=False).to_numpy().copy()
    values[np.isin(values, missing)] = np.nan
    if np.isinf(values).any():
        row = int(np.argmax(np.isinf(values)))
        raise ValueError(
            f"row {row + 1} of column {name!r} of {path} is {values[row]}; replace it by null or a finite number"
        )
    if np.isnan(values).all():
        return Column(name, "empty"), None
    whole = not (types.is_floating(kind) or types.is_decimal(kind))
    return Column(name, "number", 0 if whole else None), values


def _arrow_numbers(values: Floats, kind: Any) -> Any:
    """Numbers as an arrow array of a column's own type."""
    arrow = _pyarrow()
    if arrow.types.is_null(kind):
        raise ValueError("a column of type null cannot hold numbers; write it as float64 with nulls")
    if arrow.types.is_decimal(kind):
        return arrow.array(values).cast(kind, safe=False)
    return arrow.array(as_dtype(values, np.dtype(kind.to_pandas_dtype())), kind)


def as_dtype(values: NDArray[Any], dtype: np.dtype) -> NDArray[Any]:
    """values in a dtype; what is no integer goes to the nearest one that the dtype holds."""
    if dtype.kind == "b":
        return values >= 0.5
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return np.rint(np.clip(values, limits.min, np.nextafter(np.float64(limits.max), 0))).astype(dtype)
    return values.astype(dtype)


class Array:
    """An array in an npy, npz or idx file: rows [N, ...], flattened to X [N, D]."""

    def __init__(self, path: Path, options: ReadOptions):
        self.path, self.key = path, options.key
        self.suffix = path.suffix.lower() if path.suffix.lower() in SUFFIXES else ".npy"
        values = self._read()
        if values.ndim < 2 or 0 in values.shape:
            what = path if self.key is None else f"array {self.key!r} of {path} (--key chooses another)"
            raise ValueError(
                f"{what} has shape {list(values.shape)}; it must be [rows, columns] or [rows, height, width], not empty"
            )
        if values.dtype.kind not in "biuf" or values.dtype.itemsize > 8:
            raise ValueError(f"{path} holds {values.dtype}; it must hold bool, integer or float numbers of <= 64 bits")
        self.shape = values.shape
        self.X = values.reshape(len(values), -1)
        self.mask = None if options.mask is None else self._read_mask(options.mask)
        if options.missing_numbers:
            self.mask = self.observed & ~np.isin(self.X, options.missing_numbers)

    def _read(self) -> NDArray[Any]:
        if self.suffix == ".npz":
            with _open_npz(self.path) as arrays:
                names = arrays.files
                if not names or (self.key is not None and self.key not in names):
                    raise ValueError(f"{self.path} has no array {self.key!r}; it has {', '.join(names) or 'none'}")
                self.key = self.key or names[0]
                return _member(self.path, arrays, self.key)
        if self.path.suffix.lower() == ".npy":
            return _open_npy(self.path)
        return load_idx(self.path)

    def _read_mask(self, path: str) -> NDArray[np.bool_]:
        given = _open_npy(_existing(path))
        if given.dtype != bool or given.shape != self.shape:
            raise ValueError(
                f"{path} must be a bool array of shape {list(self.shape)}, True = observed; got {given.dtype} of "
                f"{list(given.shape)}"
            )
        return given.reshape(self.X.shape)

    @property
    def observed(self) -> NDArray[np.bool_]:
        """Which cells are, [N, D]."""
        if self.mask is not None:
            return self.mask
        return ~np.isnan(self.X) if self.X.dtype.kind == "f" else np.ones(self.X.shape, dtype=bool)

    def write(self, path: Path, filled: NDArray[Any], holes: NDArray[np.bool_]) -> None:
        """This array with filled [N, D], or [S, N, D] for S versions, where there are holes [N, D]."""
        values = as_dtype(filled, self.X.dtype)
        np.copyto(values, self.X, where=~holes)
        values = values.reshape(*filled.shape[:-2], *self.shape)
        with replacing(path) as part:
            if self.suffix == ".npz":
                self._write_npz(part, values)
            else:
                _write_npy(part, values)

    def _write_npz(self, path: Path, values: NDArray[Any]) -> None:
        """All arrays of the input, in their order."""
        with _open_npz(self.path) as arrays, path.open("wb") as file:
            members: dict[str, Any] = {name: _member(self.path, arrays, name) for name in arrays.files}
            np.savez(file, **(members | {str(self.key): values}))

    def write_embedding(self, path: Path, embedding: NDArray[np.float32]) -> None:
        _write_embedding(path, embedding, None)


def _open_npz(path: Path) -> Any:
    try:
        arrays = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile):
        arrays = None
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise ValueError(f"{path} is damaged, or no npz file; write it with numpy.savez")
    return arrays


def _open_npy(path: Path) -> NDArray[Any]:
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError):
        raise ValueError(
            f"{path} is damaged, or no npy file of numbers (Python objects are never loaded); use numpy.save"
        ) from None


def _member(path: Path, arrays: Any, name: str) -> NDArray[Any]:
    try:
        return arrays[name]
    except (ValueError, EOFError, zlib.error, zipfile.BadZipFile):
        raise ValueError(
            f"array {name!r} of {path} is damaged, or holds Python objects, which are never loaded; write it anew"
        ) from None


def read(path: str | os.PathLike[str], options: ReadOptions = ReadOptions()) -> Table | Array:
    """The table (csv, tsv, parquet) or array (npy, npz, idx) in a file. Raises one sentence where it cannot be used."""
    file = _existing(path)
    suffix = file.suffix.lower()
    of_text = {"--delimiter": options.delimiter, "--decimal": options.decimal, "--no-header": not options.header}
    of_arrays = {"--mask": options.mask, "--key": options.key}
    if suffix in TEXT_SUFFIXES:
        _refuse(file, of_arrays)
        return TextTable(file, options)
    if suffix == ".parquet":
        _refuse(file, of_arrays | of_text)
        return ParquetTable(file, options)
    with file.open("rb") as opened:
        is_idx = opened.read(2) in (b"\0\0", b"\x1f\x8b")
    if suffix not in (".npy", ".npz") and not is_idx:
        raise ValueError(f"{file} is of no known kind; give a file that ends in {', '.join(SUFFIXES)}, or an idx file")
    _refuse(file, of_text | {"--index": options.index, "--key": options.key if suffix != ".npz" else None})
    return Array(file, options)


def _existing(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is a folder; give a file" if file.is_dir() else f"there is no file {file}")
    return file


def _refuse(file: Path, options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if value:
            raise ValueError(f"{name} has no meaning for {file.name}; leave it out")


def _index_positions(path: Path, names: Sequence[str], chosen: Sequence[str]) -> set[int]:
    for name in chosen:
        if name not in names:
            raise ValueError(f"--index {name!r} is no column of {path}; it has {', '.join(map(repr, names))}")
    return {position for position, name in enumerate(names) if name in chosen}


def _write_embedding(
    path: Path,
    embedding: NDArray[np.float32],
    labels: Any,
    delimiter: str | None = None,
    decimal: str = ".",
    ending: str = "\n",
) -> None:
    """A csv, tsv or parquet file with columns z0, z1, ... and the labels as index, or an npy file."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        with replacing(path) as part:
            _write_npy(part, embedding)
        return
    pandas = _pandas()
    frame = pandas.DataFrame(embedding, columns=[f"z{i}" for i in range(embedding.shape[1])], index=labels)
    with replacing(path) as part:
        if suffix == ".parquet":
            _pyarrow()
            frame.to_parquet(part)
        else:
            delimiter = delimiter or ("\t" if suffix == ".tsv" else ",")
            numbered = isinstance(frame.index, pandas.RangeIndex) and frame.index.name is None
            frame.to_csv(part, sep=delimiter, decimal=decimal, lineterminator=ending, index=not numbered)


def _write_npy(path: Path, values: NDArray[Any]) -> None:
    with path.open("wb") as file:
        np.lib.format.write_array(file, values, allow_pickle=False)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside path, which takes its name when it is complete; path itself is old or new, never in part."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}; nothing was changed") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _pandas() -> Any:
    return _extra("pandas")


def _pyarrow() -> Any:
    return _extra("pyarrow")


def _extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this kind of file needs {module}; run pip install 'rvi_fast[files]'") from error
