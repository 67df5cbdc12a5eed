"""What a user hands in (array, tensor, memmap, DataFrame; holes as NaN or a mask), read in batches in model units."""

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

EXACT_INTEGERS = 1 << 53  # float64 holds every integer up to here
CELLS_AT_ONCE = 1 << 20  # whole-data passes go in blocks of about this many cells


class Observations:
    """X [N, D] with its observed cells. Holds the user's memory, not a copy, wherever the container allows it.

    X: numpy array or memmap, torch tensor, pandas DataFrame or nested lists; bool, integer or float. mask: bool [N,
    D], True = observed; without it NaN means missing. Raises on wrong shapes or types, infinity, and NaN under mask
    True.
    """

    def __init__(self, X: Any, mask: Any = None):
        self.container = X
        self.names = [str(c) for c in X.columns] if _is_frame(X) else None
        self.values = _as_matrix(X, "X")
        self.mask = None if mask is None else _as_mask(mask, self.values.shape)

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    def num_columns(self) -> int:
        return self.values.shape[1]

    def blocks(self) -> Iterator[slice]:
        size = max(1, CELLS_AT_ONCE // max(1, self.num_columns))
        return (slice(start, min(start + size, len(self))) for start in range(0, len(self), size))

    def column_name(self, column: int) -> str:
        return f"{column} ({self.names[column]!r})" if self.names else str(column)

    def read(self, rows: Any) -> tuple[np.ndarray, np.ndarray]:
        """Cells of rows (slice or indices) as the user gave them, and which are observed: [B, D], bool [B, D]."""
        values = np.ascontiguousarray(self.values[rows])  # one order of cells, one order of sums
        if self.mask is not None:
            return values, np.asarray(self.mask[rows])
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


def _as_matrix(X: Any, name: str) -> np.ndarray:
    if isinstance(X, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array; pass {name}.filled(np.nan), or {name}.data and mask=~{name}.mask")
    if X is None or (isinstance(X, Tensor) and X.layout != torch.strided):
        found = "None" if X is None else f"a tensor of layout {X.layout}"
        raise TypeError(f"{name} must be a dense array, tensor or DataFrame [N, D]; got {found}")
    if _is_frame(X):
        _check_frame(X)
        one_dtype = len(set(X.dtypes)) == 1 and isinstance(X.dtypes.iloc[0], np.dtype)
        values = X.to_numpy() if one_dtype else X.to_numpy(dtype=np.float64, na_value=np.nan)
    elif isinstance(X, Tensor):
        dense = X.detach().cpu()
        values = (dense.float() if dense.dtype == torch.bfloat16 else dense).numpy()
    elif isinstance(X, np.ndarray):
        values = X
    else:
        try:
            values = np.asarray(X)
        except ValueError as error:
            raise ValueError(f"{name} must be rectangular, rows of equal length; {error}") from None
    if values.dtype.kind not in "biuf" or values.dtype.itemsize > 8:
        raise TypeError(f"{name} must hold bool, integer or float numbers of at most 64 bits; got dtype {values.dtype}")
    if values.ndim != 2:
        raise ValueError(f"{name} must have shape [N, D]; got {list(values.shape)}; use reshape(len(X), -1)")
    if 0 in values.shape:
        raise ValueError(f"{name} must have at least one row and one column; got shape {list(values.shape)}")
    return values


def _check_frame(X: Any) -> None:
    for column, dtype in zip(X.columns, X.dtypes, strict=True):
        if getattr(dtype, "kind", "O") not in "biuf":
            raise TypeError(f"X's column {column!r} has dtype {dtype}; drop it, or encode it as numbers first")


def _as_mask(mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    array = mask.to_numpy() if _is_frame(mask) else mask.cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if array.dtype != bool:
        raise TypeError(f"mask must be bool, True = observed; got dtype {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"mask must have X's shape {list(shape)}; got {list(array.shape)}")
    return array


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

    def to_model(self, values: np.ndarray, observed: np.ndarray) -> tuple[Tensor, Tensor]:
        """Cells in the user's units -> float32 [B, D] in the model's, 0 where missing; and the mask, bool [B, D]."""
        exact_in_float32 = values.dtype.itemsize <= (4 if values.dtype.kind == "f" else 2)
        wide = values.astype(np.float32 if exact_in_float32 else np.float64, copy=False)
        with np.errstate(over="ignore"):
            model = (wide - self.shift.astype(wide.dtype)) / self.scale.astype(wide.dtype)
            model = np.where(observed, model, 0.0).astype(np.float32)
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
        constant = self.low >= self.high
        if standardize:
            shift, scale = self.mean.copy(), np.where(constant, 1.0, self.std)
        else:
            shift, scale = np.zeros_like(self.mean), np.full_like(self.mean, fixed_scale)
        shift[constant] = np.where(self.count > 0, self.low, 0.0)[constant]
        return ColumnUnits(shift, scale, constant)
