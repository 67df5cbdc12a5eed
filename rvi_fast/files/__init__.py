"""Tables and arrays in files: what the estimators take from them, and the same file with its holes filled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import arrays, text
from .arrays import Array, as_dtype, existing
from .options import ReadOptions
from .parquet import ParquetTable
from .table import Column, Table
from .text import TextTable, format_number
from .writing import replacing, write_npy

SUFFIXES = (*text.SUFFIXES, ".parquet", *arrays.SUFFIXES)


def read(path: str | os.PathLike[str], options: ReadOptions | None = None) -> Table | Array:
    """The table (csv, tsv, parquet) or array (npy, npz, idx) in a file. Raises one sentence where it cannot be used."""
    file, options = existing(path), options or ReadOptions()
    suffix = file.suffix.lower()
    of_text = {"--delimiter": options.delimiter, "--decimal": options.decimal, "--no-header": not options.header}
    of_arrays = {"--mask": options.mask, "--key": options.key}
    if suffix in text.SUFFIXES:
        _refuse(file, of_arrays)
        return TextTable(file, options)
    if suffix == ".parquet":
        _refuse(file, of_arrays | of_text)
        return ParquetTable(file, options)
    with file.open("rb") as opened:
        is_idx = opened.read(2) in (b"\0\0", b"\x1f\x8b")
    if suffix not in arrays.SUFFIXES and not is_idx:
        raise ValueError(f"{file} is of no known kind; give a file that ends in {', '.join(SUFFIXES)}, or an idx file")
    _refuse(file, of_text | {"--index": options.index, "--key": options.key if suffix != ".npz" else None})
    return Array(file, options)


def _refuse(file: Path, options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if value:
            raise ValueError(f"{name} has no meaning for {file.name}; leave it out")
