"""What a user hands in (array, tensor, DataFrame, file; holes as NaN or a mask), read in batches in model units."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import masks
from .blocks import BlockReader, is_read_by_slices, shape_and_dtype

EXACT_INTEGERS = 1 << 53  # float64 holds every integer up to here
FLOAT32_SCALES = (1e-37, 1e36)  # columns of a spread within are standardised in float32, others in float64
OTHER_KINDS = {  # of NumPy's dtypes: what to do with an X of theirs
    "O": "; np.asarray(X, dtype=float) reads what are numbers, and None as NaN",
    "c": "; give X.real, or both parts as columns: np.hstack((X.real, X.imag))",
}
OF_COLUMNS = {  # and with a DataFrame's column
    "O": "where it holds numbers use {column} = pd.to_numeric({column}), else ",
    "c": "give its .real and .imag as two columns, ",
}
CELLS_AT_ONCE = 1 << 20  # whole-data passes go in blocks of about this many cells


class Observations:
    """X [N, D] with its observed cells. Holds the user's memory, not a copy, wherever the container allows it.

    X: numpy array, torch tensor, pandas DataFrame, nested lists, or anything with shape, dtype and X[a:b] (np.memmap,
    h5py, zarr), which is read in blocks; bool, integer or float. mask: bool [N, D], True = observed, in any of these;
    without it NaN means missing. Raises on wrong shapes or types, infinity, and NaN under mask True.
    """

    def __init__(self, X: Any, mask: Any = None):
        self.container = X
        self.names = [str(c) for c in X.columns] if hasattr(X, "columns") else None
        self.values = _as_matrix(X, "X")
        self.mask = None if mask is None else _as_mask(mask, self.values)
        if _is_frame(X) and _is_frame(mask):
            _check_labels(X, mask)

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    def num_columns(self) -> int:
        return self.values.shape[1]

    @property
    def buffer(self) -> tuple[int, int] | None:
        """Rows a block and blocks a buffer where X or mask is read in more blocks than one buffer holds; else None."""
        for reader in self.readers[:1]:
            if len(self) > reader.block_rows * reader.capacity:
                return reader.block_rows, reader.capacity
        return None

    @property
    def readers(self) -> list[BlockReader]:
        """Those of X and mask that are read in blocks."""
        return [reader for reader in (self.values, self.mask) if isinstance(reader, BlockReader)]

    def blocks(self) -> Iterator[slice]:
        size = max(1, CELLS_AT_ONCE // max(1, self.num_columns))
        return (slice(start, min(start + size, len(self))) for start in range(0, len(self), size))

    def column_name(self, column: int) -> str:
        return f"{column} ({self.names[column]!r})" if self.names else str(column)

    def read(self, rows: Any) -> tuple[np.ndarray, np.ndarray]:
        """Cells of rows (slice or indices) as the user gave them, and which are observed: [B, D], bool [B, D]."""
        values = np.ascontiguousarray(self.values[rows])  # one order of cells, one order of sums
        if self.mask is not None:
            return values, np.require(self.mask[rows], requirements=["C", "W"])  # torch takes no other
        if values.dtype.kind == "f":
            return values, ~np.isnan(values)
        return values, np.ones(values.shape, dtype=bool)

    def check(self) -> None:
        """Raise on infinity, on NaN where the mask says observed, and on integers that float64 cannot hold."""
        if self.values.dtype.kind != "f":
            self._check_integers()
            return
        for block in self.blocks():
            values, observed = self.read(block)
            bad = ~np.isfinite(values) & observed
            if bad.any():
                row, column = (int(i[0]) for i in np.nonzero(bad))
                value = values[row, column]
                where = f"X[{block.start + row}, {self.column_name(column)}]"
                if np.isnan(value):
                    raise ValueError(f"{where} is NaN but mask says observed; set mask to False there")
                raise ValueError(f"{where} is {value}; replace infinities by NaN (missing) or by a finite number")

    def _check_integers(self) -> None:
        if self.values.dtype.itemsize < 8:
            return
        for block in self.blocks():
            values = np.where(*reversed(self.read(block)), 0)  # type: ignore[call-overload]
            if (values > EXACT_INTEGERS).any() or (values < -EXACT_INTEGERS).any():
                raise ValueError(
                    "X holds integers beyond 2**53, which float64 cannot hold exactly; rescale that column"
                )

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of dtype, all observed cells and all holes."""
        digest = hashlib.blake2b(f"{self.values.dtype} {self.values.shape}".encode(), digest_size=16)
        for block in self.blocks():
            values, observed = self.read(block)
            digest.update(np.where(observed, values, values.dtype.type(0)).tobytes())
            digest.update(np.packbits(observed).tobytes())
        return digest.hexdigest()

    def row_ids(self) -> Tensor:
        """A 64-bit hash of every row's float32 values and mask, int64 [N]: equal rows have equal ids anywhere."""
        ids = np.empty(len(self), dtype=np.uint64)
        for block in self.blocks():
            values, observed = self.read(block)
            with np.errstate(over="ignore"):
                bits = np.where(observed, values, np.nan).astype(np.float32) + np.float32(0)  # -0.0 becomes 0.0
            words = np.where(observed, bits.view(np.uint32), np.uint32(0x7FC00001)).astype(np.uint64)
            column = np.arange(1, self.num_columns + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            ids[block] = _mix(_mix(words + column).sum(axis=1, dtype=np.uint64))
        return torch.from_numpy(ids.view(np.int64))

    def like_container(self, values: np.ndarray) -> Any:
        """values [N, D] in the kind of container that X came in."""
        if _is_frame(self.container):
            return type(self.container)(values, index=self.container.index, columns=self.container.columns)
        if isinstance(self.container, Tensor):
            dtype = self.container.dtype if self.container.is_floating_point() else None
            return torch.from_numpy(values).to(self.container.device, dtype)
        return values

    def output_dtype(self) -> np.dtype:
        """The float type that holds X's observed cells exactly."""
        dtype = self.values.dtype
        if dtype.kind == "f":
            return dtype
        return np.dtype(np.float32 if dtype.itemsize <= 2 else np.float64)


def _mix(h: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every bit of h reaches every bit of the result."""
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


def _is_frame(X: Any) -> bool:
    return hasattr(X, "columns") and hasattr(X, "to_numpy")


def _as_matrix(X: Any, name: str) -> np.ndarray | BlockReader:
    if isinstance(X, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array; pass {name}.filled(np.nan), or {name}.data and mask=~{name}.mask")
    if X is None:
        raise TypeError(f"{name} must be a dense array, tensor or DataFrame [N, D]; got None")
    if hasattr(X, "tocsr"):
        raise TypeError(
            f"{name} must be a dense array, tensor or DataFrame [N, D]; got a sparse one; use {name}.toarray()"
        )
    if hasattr(X, "to_frame"):
        raise ValueError(
            f"{name} must have shape [N, D]; got {list(X.shape)}; give one row of a DataFrame as {name}.to_frame().T, "
            f"one column as {name}.to_frame()"
        )
    if _is_frame(X):
        _check_frame(X)
        one_dtype = len(set(X.dtypes)) == 1 and isinstance(X.dtypes.iloc[0], np.dtype)
        values = X.to_numpy() if one_dtype else _to_float64(X)
    elif isinstance(X, Tensor):
        values = _of_tensor(X, name)
    elif is_read_by_slices(X):
        _check_matrix(*shape_and_dtype(X, name), name)
        return BlockReader(X, name)
    elif isinstance(X, np.ndarray):
        values = X
    else:
        values = _of_lists(X, name)
    _check_matrix(values.shape, values.dtype, name)
    return values


def _of_tensor(X: Tensor, name: str) -> np.ndarray:
    if X.layout != torch.strided or X.is_meta:
        found = "on the meta device, which holds no numbers" if X.is_meta else f"of layout {X.layout}"
        raise TypeError(f"{name} must be a dense array, tensor or DataFrame [N, D]; got a tensor {found}")
    dense = X.detach().cpu().resolve_conj().resolve_neg()
    try:
        return (dense.float() if dense.dtype == torch.bfloat16 else dense).numpy()
    except TypeError:
        raise TypeError(f"{name} must hold bool, integer or float numbers of at most 64 bits; got {X.dtype}") from None


def _of_lists(X: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(X)
    except ValueError:
        raise ValueError(f"{name} must be rectangular, rows of equal length that hold numbers") from None


def _check_matrix(shape: tuple[int, ...], dtype: np.dtype, name: str) -> None:
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        found = f"{dtype}{OTHER_KINDS.get(dtype.kind, '')}"
        raise TypeError(f"{name} must hold bool, integer or float numbers of at most 64 bits; got dtype {found}")
    if 0 in shape:
        raise ValueError(f"{name} must have at least one row and one column; got shape {list(shape)}")
    if len(shape) != 2:
        as_row = "give one row as X[None] (a list as [X]), one column as X[:, None]"
        remedy = as_row if len(shape) == 1 else "use reshape(len(X), -1)"
        raise ValueError(f"{name} must have shape [N, D]; got {list(shape)}; {remedy}")


def _check_labels(X: Any, mask: Any) -> None:
    """Cells are matched by place, so that labels in another order would go to other cells."""
    for axis in ("columns", "index"):
        if list(getattr(mask, axis, ())) != list(getattr(X, axis, ())):
            raise ValueError(
                f"mask's {axis} must be X's, in the same order; give mask.loc[X.index, X.columns], or mask.to_numpy() "
                "if it goes by place"
            )


def _check_frame(X: Any) -> None:
    if not hasattr(X, "iloc"):
        raise TypeError(f"X must be a dense array, tensor or pandas DataFrame; got {type(X)}; use X.to_numpy()")
    for column, dtype in zip(X.columns, X.dtypes, strict=True):
        if getattr(dtype, "kind", "O") not in "biuf":
            remedy = OF_COLUMNS.get(getattr(dtype, "kind", "O"), "").format(column=f"X[{column!r}]")
            raise TypeError(f"X's column {column!r} has dtype {dtype}; {remedy}drop it, or encode it as numbers first")


def _to_float64(X: Any) -> np.ndarray:
    """A DataFrame of several or nullable dtypes."""
    for position, column in enumerate(X.columns):
        values = X.iloc[:, position].dropna()
        if values.dtype.kind in "iu" and (values.abs() > EXACT_INTEGERS).any():
            raise ValueError(
                f"X's column {column!r} holds integers beyond 2**53, which float64 cannot hold exactly; "
                "rescale that column"
            )
    return X.to_numpy(dtype=np.float64, na_value=np.nan)


def _as_mask(mask: Any, values: np.ndarray | BlockReader) -> np.ndarray | BlockReader:
    if is_read_by_slices(mask):
        _check_mask(*shape_and_dtype(mask, "mask"), values)
        return BlockReader(mask, "mask", values if isinstance(values, BlockReader) else None)
    if _is_frame(mask):
        array = _bools_of_frame(mask)
    else:
        array = _of_tensor(mask, "mask") if isinstance(mask, Tensor) else _of_lists(mask, "mask")
    _check_mask(array.shape, array.dtype, values)
    return array


def _bools_of_frame(mask: Any) -> np.ndarray:
    """A DataFrame's cells, where all columns are bool or pandas' nullable "boolean" without NA as bool."""
    values = mask.to_numpy()
    if values.dtype != object or any(getattr(dtype, "kind", "O") != "b" for dtype in mask.dtypes):
        return values
    if mask.isna().any(axis=None):
        raise ValueError("mask must be True (observed) or False in every cell, but has NA; use mask.fillna(False)")
    return mask.to_numpy(dtype=bool)


def _check_mask(shape: tuple[int, ...], dtype: np.dtype, values: np.ndarray | BlockReader) -> None:
    if dtype != np.dtype(bool):
        raise TypeError(f"mask must be bool, True = observed; got dtype {dtype}; use mask.astype(bool)")
    if shape != values.shape:
        raise ValueError(f"mask must have X's shape {list(values.shape)}; got {list(shape)}")


class HiddenCells:
    """Observed cells hidden from training, by which early stopping judges. One bit a cell."""

    def __init__(self, data: Observations, share: float, seed: int):
        self.share = share
        self.num_columns = data.num_columns
        self.bits = np.zeros((len(data), -(-data.num_columns // 8)), dtype=np.uint8)
        for number, block in enumerate(data.blocks()):
            shape = (block.stop - block.start, data.num_columns)
            hidden = ~masks.mcar(shape, share, seed=int(np.random.SeedSequence((seed, number)).generate_state(1)[0]))
            self.bits[block] = np.packbits(hidden & data.read(block)[1], axis=1)

    def read(self, rows: Any) -> np.ndarray:
        """Hidden cells of rows, bool [B, D]."""
        return np.unpackbits(self.bits[rows], axis=1, count=self.num_columns).astype(bool)


@dataclasses.dataclass
class ColumnUnits:
    """How each column's user units map to the model's: model = (user - shift) / scale. float64 [D] each."""

    shift: np.ndarray
    scale: np.ndarray
    constant: np.ndarray  # bool: a column that showed one value only, or none; it is returned as `shift`

    @classmethod
    def identity(cls, columns: int) -> ColumnUnits:
        """Of columns that are in the model's units already."""
        return cls(np.zeros(columns), np.ones(columns), np.zeros(columns, dtype=bool))

    def to_model(self, values: np.ndarray, observed: np.ndarray) -> tuple[Tensor, Tensor]:
        """Cells in the user's units -> float32 [B, D] in the model's, 0 where missing; and the mask, bool [B, D]."""
        exact_in_float32 = values.dtype.itemsize <= (4 if values.dtype.kind == "f" else 2)
        low, high = FLOAT32_SCALES
        in_float32 = exact_in_float32 and (self.scale > low).all() and (self.scale < high).all()
        wide = values.astype(np.float32 if in_float32 else np.float64, copy=False)
        with np.errstate(over="ignore", invalid="ignore"):
            model = (wide - self.shift.astype(wide.dtype)) / self.scale.astype(wide.dtype)
            model = model.astype(np.float32, copy=False)
        model.view(np.uint32)[...] &= -observed.astype(np.uint32)  # 0 in holes; np.where takes eight times as long
        if not np.isfinite(model).all():
            column = int(np.nonzero(~np.isfinite(model))[1][0])
            raise ValueError(
                f"X's column {column} has a value too far from the training data's for float32; rescale it"
            )
        return torch.from_numpy(model), torch.from_numpy(observed)

    def to_user(self, model: np.ndarray) -> np.ndarray:
        """The model's units [..., D] -> float64 in the user's; constant columns as they were."""
        user = model * self.scale + self.shift
        user[..., self.constant] = self.shift[self.constant]
        return user


@dataclasses.dataclass
class ColumnStatistics:
    """Statistics of the observed cells, one entry a column."""

    count: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    @np.errstate(over="ignore", invalid="ignore")  # what it leads to is refused below
    def of(cls, data: Observations, hidden: HiddenCells | None = None) -> ColumnStatistics:
        """One pass over the observed cells that are not hidden: means and squared deviations of blocks, merged."""
        d = data.num_columns
        count, mean, square = np.zeros(d), np.zeros(d), np.zeros(d)
        low, high = np.full(d, math.inf), np.full(d, -math.inf)
        for block in data.blocks():
            values, observed = data.read(block)
            if hidden is not None:
                observed = observed & ~hidden.read(block)
            wide = np.where(observed, values, 0).astype(np.float64)
            n = observed.sum(0)
            block_mean = wide.sum(0) / np.maximum(n, 1)
            deviation = np.where(observed, wide - block_mean, 0.0)
            total = count + n
            weight = n / np.maximum(total, 1)
            gap = block_mean - mean
            square += (deviation * deviation).sum(0) + gap * gap * count * weight
            mean += gap * weight
            count = total
            low = np.minimum(low, np.where(observed, wide, math.inf).min(0))
            high = np.maximum(high, np.where(observed, wide, -math.inf).max(0))
        if not np.isfinite(square).all():
            column = data.column_name(int(np.argmax(~np.isfinite(square))))
            raise ValueError(f"the variance of X's column {column} is beyond float64; rescale that column")
        return cls(count, mean, np.sqrt(square / np.maximum(count, 1)), low, high)

    def with_moments_of(self, other: ColumnStatistics) -> ColumnStatistics:
        """Means and standard deviations from other (fewer cells), where it has any; all else stays."""
        spread = other.std > 0
        return dataclasses.replace(
            self, mean=np.where(spread, other.mean, self.mean), std=np.where(spread, other.std, self.std)
        )

    def units(self, standardize: bool, fixed_scale: float = 1.0) -> ColumnUnits:
        """Zero mean and unit variance in the model if standardize, else model = user / fixed_scale."""
        constant = (self.low >= self.high) | (self.std == 0)  # a spread may be too small for float64 to square
        if standardize:
            shift, scale = self.mean.copy(), np.where(constant, 1.0, self.std)
        else:
            shift, scale = np.zeros_like(self.mean), np.full_like(self.mean, fixed_scale)
        shift[constant] = np.where(self.count > 0, self.low, 0.0)[constant]
        return ColumnUnits(shift, scale, constant)
