"""What several operators ask of their tensors: shapes, dtypes, indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import arguments


def checked_int(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    if not arguments.is_int(value):
        raise TypeError(f"{name} must be an int; got {value!r}")
    value = int(value)
    if low is not None and high is not None and not low <= value <= high:
        raise ValueError(f"{name} must lie in {low} .. {high}; got {value}")
    return value


def values_at_hand(tensor: Tensor) -> bool:
    """Whether looking at a tensor's values costs no wait: on the CPU, and not in a graph that is being compiled."""
    return tensor.device.type == "cpu" and tensor.numel() > 0 and not torch.compiler.is_compiling()


def check_rows(rows: Tensor, num_rows: int, name: str = "rows") -> None:
    """rows must be integer indices into num_rows rows. Values are checked on the CPU only: a GPU would have to wait."""
    if not isinstance(rows, Tensor) or rows.dtype not in (torch.int64, torch.int32):
        found = rows.dtype if isinstance(rows, Tensor) else f"{type(rows).__name__}; use torch.tensor({name})"
        raise TypeError(f"{name} must be an int64 tensor of row indices; got {found}")
    if values_at_hand(rows):
        low, high = torch.aminmax(rows)
        _check_range(int(low), int(high), num_rows, name)


def _check_range(low: int, high: int, num_rows: int, name: str) -> None:
    if low < 0 or high >= num_rows:
        raise IndexError(f"{name} must lie in 0 .. {num_rows - 1}; got {low if low < 0 else high}")


def check_distinct_rows(rows: Tensor, num_rows: int) -> None:
    """The rows of a step must lie in the table and not repeat; looked at on the CPU only."""
    at_hand = values_at_hand(rows)
    if not at_hand or rows.dtype != torch.int64:
        check_rows(rows, num_rows)
    if not at_hand:
        return
    ascending = np.sort(rows.numpy())  # torch.unique takes several times as long
    _check_range(int(ascending[0]), int(ascending[-1]), num_rows, "rows")
    if (ascending[1:] == ascending[:-1]).any():
        raise ValueError("rows must not repeat within a step; sum the gradients of a repeated row first")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int | str], sizes: dict[str, int]) -> None:
    """Raise unless tensor has `shape`; a letter takes its size from the first tensor that has it."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch tensor; got {type(tensor).__name__}")
    wanted = [sizes.setdefault(s, n) if isinstance(s, str) else s for s, n in zip(shape, tensor.shape, strict=False)]
    if tensor.dim() != len(shape) or list(tensor.shape) != wanted:
        expected = ", ".join(f"{s} = {sizes[s]}" if s in sizes else str(s) for s in shape)
        raise ValueError(f"{name} must have shape [{expected}]; got {list(tensor.shape)}")


def check_float(name: str, tensor: Tensor, like: Tensor | None = None) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor; got {tensor.dtype}")
    if like is not None and (tensor.dtype != like.dtype or tensor.device != like.device):
        raise TypeError(
            f"{name} must be {like.dtype} on {like.device} as the first argument is; "
            f"got {tensor.dtype} on {tensor.device}"
        )


def check_one_device(**tensors: Tensor | None) -> None:
    """All tensors that are given must be where the first one is."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    (first, like), *others = given.items()
    for name, tensor in others:
        if tensor.device != like.device:
            raise ValueError(
                f"{name} is on {tensor.device} but {first} is on {like.device}; move it with .to({str(like.device)!r})"
            )
