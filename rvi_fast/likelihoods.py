"""Likelihoods of the observed entries given the decoder's output."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import ops

__all__ = ["Bernoulli", "Gaussian", "Likelihood"]


class Likelihood(nn.Module):
    """p(x | z) for one datapoint: what the decoder's output means."""

    standardizable = True  # whether columns may be shifted and scaled

    def check_range(self, low: np.ndarray, high: np.ndarray) -> None:
        """Raise if observed values between low and high [D] cannot come from this likelihood."""

    def bind(self, num_columns: int) -> None:
        """Make room for what is learned per column. Called once the number of columns is known."""

    def nll(self, xhat: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        """Negative log-likelihood of the observed entries, in nats: [B, D], [B, D], bool [B, D] -> [B]."""
        raise NotImplementedError

    def linear_nll(self, head: nn.Linear, h: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        """nll where head(h) is the decoder's output, h [B, H]: [B]."""
        return self.nll(head(h), x, mask)

    def mean(self, xhat: Tensor) -> Tensor:
        """E[x | z] from the decoder's output."""
        raise NotImplementedError

    def variance(self, xhat: Tensor) -> Tensor:
        """Var[x | z] of every cell from the decoder's output, of its shape."""
        raise NotImplementedError

    def draw(self, xhat: Tensor, noise: Tensor) -> Tensor:
        """A draw of x given the decoder's output and standard normals of its shape."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {}


class Gaussian(Likelihood):
    """x ~ N(xhat, scale^2), independent columns.

    scale: a number, in the model's units (columns that are standardised inside have unit variance there), or
    "learned": one scale a column, sqrt(min_scale^2 + exp(2 s)) with s trained from `start`. A small fixed scale fits
    observed entries closely; a large one regularises.
    """

    def __init__(self, scale: float | str = "learned", *, min_scale: float = 0.05, start: float = 1.0):
        super().__init__()
        if isinstance(scale, str):
            if scale != "learned":
                raise ValueError(f"scale must be a number above 0 or 'learned'; got {scale!r}")
            if not 0 < min_scale < start:
                raise ValueError(f"min_scale must lie between 0 and start={start}; got {min_scale}")
        elif not 0 < scale < math.inf:
            raise ValueError(f"scale must be a number above 0 or 'learned'; got {scale}")
        self.learned = isinstance(scale, str)
        self.fixed = 0.0 if isinstance(scale, str) else float(scale)
        self.min_scale, self.start = min_scale, start
        self.log_scale: nn.Parameter | None = None

    def bind(self, num_columns: int) -> None:
        if self.learned:
            free = 0.5 * math.log(self.start**2 - self.min_scale**2)
            self.log_scale = nn.Parameter(torch.full((num_columns,), free))

    def scale(self) -> Tensor:
        """[D] if learned, else []."""
        if not self.learned:
            return torch.tensor(self.fixed, dtype=torch.float64)
        if self.log_scale is None:
            raise RuntimeError("a learned scale needs the number of columns first: call bind(num_columns)")
        return torch.sqrt(self.min_scale**2 + torch.exp(2 * self.log_scale))

    def _scale_or_number(self) -> Tensor | float:
        return self.scale() if self.learned else self.fixed  # a number need not be copied to a device

    def nll(self, xhat: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return ops.masked_gaussian_nll(xhat, x, mask, self._scale_or_number())

    def linear_nll(self, head: nn.Linear, h: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        scale = self._scale_or_number()
        return ops.linear_masked_gaussian_nll(h, head.weight, head.bias, x, mask, scale)

    def mean(self, xhat: Tensor) -> Tensor:
        return xhat

    def variance(self, xhat: Tensor) -> Tensor:
        return self.scale().to(xhat).square().expand_as(xhat)

    def draw(self, xhat: Tensor, noise: Tensor) -> Tensor:
        return xhat + self.scale().to(xhat) * noise

    def settings(self) -> dict[str, Any]:
        return {"scale": "learned" if self.learned else self.fixed, "min_scale": self.min_scale, "start": self.start}


class Bernoulli(Likelihood):
    """x in [0, 1] ~ Bernoulli(sigmoid(xhat)), independent columns; values between 0 and 1 count as probabilities."""

    standardizable = False

    def check_range(self, low: np.ndarray, high: np.ndarray) -> None:
        outside = np.nonzero((low < 0) | (high > 1) & (low <= high))[0]
        if len(outside):
            c = int(outside[0])
            raise ValueError(
                f"Bernoulli needs X in [0, 1], but column {c} spans {low[c]:g} to {high[c]:g}; "
                "rescale X or use Gaussian()"
            )

    def nll(self, xhat: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return ops.masked_bernoulli_nll(xhat, x, mask)

    def mean(self, xhat: Tensor) -> Tensor:
        return torch.sigmoid(xhat)

    def variance(self, xhat: Tensor) -> Tensor:
        p = torch.sigmoid(xhat)
        return p * (1 - p)

    def draw(self, xhat: Tensor, noise: Tensor) -> Tensor:
        uniform = 0.5 * torch.erfc(-noise / math.sqrt(2))
        return (uniform < torch.sigmoid(xhat)).to(xhat.dtype)


KINDS = {"gaussian": Gaussian, "bernoulli": Bernoulli}
