"""Arrays in npy, npz and idx files."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data import load_idx
from .options import ReadOptions
from .writing import replacing, write_embedding, write_npy

SUFFIXES = (".npy", ".npz")


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
                    wanted = "" if self.key is None else f" {self.key!r}"
                    raise ValueError(f"{self.path} has no array{wanted}; it has {', '.join(names) or 'none'}")
                self.key = self.key or names[0]
                return _member(self.path, arrays, self.key)
        if self.path.suffix.lower() == ".npy":
            return _open_npy(self.path)
        return load_idx(self.path)

    def _read_mask(self, path: str) -> NDArray[np.bool_]:
        given = _open_npy(existing(path))
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
                write_npy(part, values)

    def _write_npz(self, path: Path, values: NDArray[Any]) -> None:
        """All arrays of the input, in their order."""
        with _open_npz(self.path) as arrays, path.open("wb") as file:
            members: dict[str, Any] = {name: _member(self.path, arrays, name) for name in arrays.files}
            np.savez(file, **(members | {str(self.key): values}))

    def write_embedding(self, path: Path, embedding: NDArray[np.float32]) -> None:
        write_embedding(path, embedding, None)


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


def existing(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is a folder; give a file" if file.is_dir() else f"there is no file {file}")
    return file


def as_dtype(values: NDArray[Any], dtype: np.dtype) -> NDArray[Any]:
    """values in a dtype; what is no integer goes to the nearest one that the dtype holds."""
    if dtype.kind == "b":
        return values >= 0.5
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return np.rint(np.clip(values, limits.min, np.nextafter(np.float64(limits.max), 0))).astype(dtype)
    return values.astype(dtype)
