"""Tables in csv and tsv files."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .extras import extra
from .options import NUMBER, ReadOptions
from .table import Column, Floats, Table, index_positions
from .writing import replacing, write_embedding

SUFFIXES = (".csv", ".tsv")
MISSING = ("", "NA", "NaN", "nan", "null", "None", "N/A", "?")
DIGITS = 6  # what float32 carries

INFINITY = r"[+-]?[iI][nN][fF](?:[iI][nN][iI][tT][yY])?"
DATE = r"[0-9]{1,4}[-/.][0-9]{1,2}[-/.][0-9]{1,4}(?:[T ].*)?"
QUOTED = r'(?<![^\r\n{delimiter}])"[^"]*+(?:""[^"]*+)*+"'
HIDDEN_IN_QUOTES = ("\ufdd0", "\ufdd1", "\ufdd2")  # stand for the delimiter, \n and \r; Unicode never assigns them


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
        index = index_positions(path, names, options.index)
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
        if len(cell) < 2 or not (cell.startswith('"') and cell.endswith('"')):
            return self._restored(cell)
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
        pandas = extra("pandas")
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
        write_embedding(
            path, embedding, self.row_labels(), *((self.delimiter, self.decimal, self.ending) if same else ())
        )


def _decoded(path: Path) -> tuple[bool, str]:
    """Whether the file begins with a byte order mark, and its text."""
    content = path.read_bytes()
    bom = content.startswith(b"\xef\xbb\xbf")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        likely = "UTF-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "WINDOWS-1252"
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start} is 0x{content[error.start]:02x}); convert it first, for example: "
            f"iconv -f {likely} -t UTF-8 {path.name} > utf8{path.suffix}"
        ) from None
    if any(stand_in in text for stand_in in HIDDEN_IN_QUOTES):
        raise ValueError(f"{path} holds U+FDD0, U+FDD1 or U+FDD2, which are no characters; remove them")
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
    pandas = extra("pandas")
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
