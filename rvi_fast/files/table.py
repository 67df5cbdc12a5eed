"""What csv, tsv and parquet files have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .extras import extra
from .writing import write_embedding

Floats = NDArray[np.float64]


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
        return extra("pandas").DataFrame(values, columns=[self.columns[position].name for position in positions])

    def row_labels(self) -> Any:
        """The index columns as a pandas Index; row numbers if there are none."""
        raise NotImplementedError

    def write(self, path: Path, filled: Mapping[int, Floats], decimals: Mapping[int, int | None]) -> None:
        """This table with the holes of some columns filled. decimals: of the numbers, where they are text."""
        raise NotImplementedError

    def write_embedding(self, path: Path, embedding: NDArray[np.float32]) -> None:
        write_embedding(path, embedding, self.row_labels())


def index_positions(path: Path, names: Sequence[str], chosen: Sequence[str]) -> set[int]:
    for name in chosen:
        if name not in names:
            raise ValueError(f"--index {name!r} is no column of {path}; it has {', '.join(map(repr, names))}")
    return {position for position, name in enumerate(names) if name in chosen}
