"""Cells with holes in every form, and what the tests of their losses ask of a kernel."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import INTERPRETED
from torch import Tensor

HOLES = ("bytes", "bits", "nan")
ROW_WEIGHTS = ("expanded", "twice", "rows")
PAST_31_BITS = 2**31 + 16


def packed(mask: Tensor) -> Tensor:
    """bool [B, D] -> its bits, uint8 [B, ceil(D / 8)], the lowest first."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=1, bitorder="little")).to(mask.device)


def holes(x: Tensor, mask: Tensor, form: str) -> tuple[Tensor, Tensor | None]:
    """x and mask as an operator takes them. Bytes and bits: a hole may hold anything that x's dtype can."""
    if form == "nan":
        return torch.where(mask, x, math.nan), None
    behind = torch.where(mask, x, math.nan) if x.is_floating_point() else x
    return behind, mask if form == "bytes" else packed(mask)


def loss_of(nll: Tensor, row_weights: str) -> tuple[Tensor, Tensor]:
    """A loss of nll [B], and the gradient that it sends to each row."""
    weight = {"expanded": 1.0, "twice": 2.0}.get(row_weights)
    on = {"dtype": nll.dtype, "device": nll.device}  # made there: a graph that is being captured copies nothing over
    per_row = torch.arange(1, len(nll) + 1, **on) if weight is None else torch.full((len(nll),), weight, **on)
    return (nll.sum() if row_weights == "expanded" else (nll * per_row).sum()), per_row


def assert_no_worse(truth: Tensor, ours: Tensor, same_dtype: Tensor, tolerance: float = 1e-6) -> None:
    """Against the truth in float64, ours errs no more than torch in our dtype, and `tolerance` of the largest entry."""
    truth = truth.detach().double()
    bound = (truth - same_dtype.detach()).abs().max() + tolerance * truth.abs().max()
    assert (truth - ours.detach()).abs().max() <= bound


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, memory that nobody wrote holds NaN."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


def far_apart(tensor: Tensor) -> Tensor:
    """tensor [2, D] with more than 2^31 entries from row to row; on a CPU only the pages in use exist."""
    if not INTERPRETED and torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB")
    storage = torch.empty(PAST_31_BITS + tensor.shape[1], dtype=tensor.dtype, device=tensor.device)
    return storage.as_strided(tensor.shape, (PAST_31_BITS, 1)).copy_(tensor)
