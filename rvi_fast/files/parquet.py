"""Tables in parquet files."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import as_dtype
from .extras import extra
from .options import ReadOptions
from .table import Column, Floats, Table, index_positions
from .writing import replacing


class ParquetTable(Table):
    """A parquet file. Types and metadata, pandas' index included, are those of the file."""

    suffix = ".parquet"

    def __init__(self, path: Path, options: ReadOptions):
        arrow = extra("pyarrow")
        try:
            self.table = importlib.import_module("pyarrow.parquet").ParquetFile(path).read()
        except (arrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} cannot be read as parquet: {' '.join(str(error).split())}") from None
        self.num_rows = self.table.num_rows
        if 0 in self.table.shape:
            raise ValueError(f"{path} has no rows or no columns; give a file with at least one of each")
        index = index_positions(path, self.table.column_names, options.index)
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
        arrow = extra("pyarrow")
        compute, parquet = (importlib.import_module(f"pyarrow.{part}") for part in ("compute", "parquet"))
        table = self.table
        for position, values in filled.items():
            field, column = table.schema.field(position), table.column(position)
            hole = np.isnan(self.numbers[position]) if position in self.numbers else np.ones(self.num_rows, bool)
            if hole.any():
                numbers = _arrow_numbers(values, field)
                table = table.set_column(position, field, compute.if_else(arrow.array(hole), numbers, column))
        with replacing(path) as part:
            parquet.write_table(table, part)


def _arrow_column(path: Path, name: str, column: Any, missing: list[float]) -> tuple[Column, Floats | None]:
    arrow = extra("pyarrow")
    kind, types = column.type, arrow.types
    if types.is_null(kind) or column.null_count == len(column):
        return Column(name, "empty"), None
    if types.is_temporal(kind):
        return Column(name, "date"), None
    if not _holds_numbers(kind):
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


def _holds_numbers(kind: Any) -> bool:
    types = extra("pyarrow").types
    return types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind) or types.is_boolean(kind)


def _arrow_numbers(values: Floats, field: Any) -> Any:
    """Numbers as an arrow array of a column's own type."""
    arrow, kind = extra("pyarrow"), field.type
    if not _holds_numbers(kind):
        raise ValueError(
            f"column {field.name!r} is of type {kind}, which cannot hold numbers; write it as float64 with nulls"
        )
    if arrow.types.is_decimal(kind):
        return arrow.array(values).cast(kind, safe=False)
    return arrow.array(as_dtype(values, np.dtype(kind.to_pandas_dtype())), kind)
