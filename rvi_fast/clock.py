"""AdamClock: what a table remembers of its past steps, so that a row can be brought up to date whenever it is read."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from . import reference
from .reference import AdamHyper, Missed

# an entry is summed exactly where sqrt(v) < this * eps / c: two nodes err by more than 1e-7 there
EPS_MEETS_GRADIENT = 10.0
EARLY_STEPS = 250  # with the usual betas that can only happen to rows last touched this early
TERMS_AT_ONCE = 1 << 20  # such sums go in blocks of about this many terms


class Clock(Protocol):
    """How a table's columns move between and at the steps that touch a row."""

    hyper: AdamHyper
    steps: int
    index: int

    def next_step(self, last: Tensor) -> int | Tensor: ...
    def touched(self, last: Tensor) -> int | Tensor: ...
    def advance(self, lr: float, weight_decay: float = 0.0) -> None: ...
    def catch_up(self, p: Tensor, m: Tensor, v: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...
    def to(self, device: torch.device | str) -> None: ...


class LazyClock:
    """Touched rows only, as in torch's SparseAdam but with a step count for each row, kept in `last`."""

    def __init__(self, hyper: AdamHyper, steps: int = 0):
        self.hyper = hyper
        self.steps = steps
        self.index = 0  # a row is never behind

    def next_step(self, last: Tensor) -> Tensor:
        return last.double() + 1

    def touched(self, last: Tensor) -> Tensor:
        return last + 1

    def advance(self, lr: float, weight_decay: float = 0.0) -> None:
        self.steps += 1

    def catch_up(self, p: Tensor, m: Tensor, v: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return p, m, v

    def to(self, device: torch.device | str) -> None:
        """Nothing to move: the counts live in the table."""


class AdamClock:
    """Four moments a step (and decay and learning rate) of the steps since the table was last flushed.

    `steps` counts all steps of these columns (Adam's bias correction); `index` counts those since the flush. `history`
    is float64 [6, capacity]: F0..F3, log of the accumulated weight decay, learning rate. A row whose `last` is s has
    missed the steps s+1 .. index.
    """

    def __init__(self, hyper: AdamHyper, steps: int = 0, device: torch.device | str = "cpu"):
        self.hyper = hyper
        self.steps = steps
        self.index = 0
        self.history = torch.zeros(6, 64, dtype=torch.float64, device=device)
        self._window = hyper.window()
        self._weights: Tensor | None = None  # of the steps W..1 before the present one

    @property
    def moments(self) -> Tensor:
        return self.history[:4]

    @property
    def log_decay(self) -> Tensor:
        return self.history[4]

    def to(self, device: torch.device | str) -> None:
        self.history = self.history.to(device)
        self._weights = None

    def next_step(self, last: Tensor) -> int:
        """The number of the step that comes next, the same for every row."""
        return self.steps + 1

    def touched(self, last: Tensor) -> int:
        """What `last` becomes for rows that take part in the next step."""
        return self.index + 1

    def advance(self, lr: float, weight_decay: float = 0.0) -> None:
        """Count one step taken with `lr` and `weight_decay`."""
        u = self.index + 1
        self._reserve(u + 1)
        self.history[4, u] = self.history[4, u - 1] + math.log1p(-lr * weight_decay)
        self.history[5, u] = lr
        self.index, self.steps = u, self.steps + 1
        if self._window and self.hyper.closed_form():
            first = max(0, u - self._window)
            regrow = torch.exp(self.log_decay[first:u] - self.log_decay[u])
            self.moments[:, first:u] += self._step_weights(lr)[:, first - u :] * regrow

    def _step_weights(self, lr: float) -> Tensor:
        if self._weights is None:
            age = torch.arange(self._window or 0, 0, -1, dtype=torch.float64, device=self.history.device)
            self._weights = reference.skipped_weights(self.hyper, age)
        bc1, bc2 = (float(c) for c in self.hyper.bias_corrections(self.steps))
        per_order = [lr / bc1 * bc2 ** (0.5 * order) for order in (1, 2, 3, 4)]
        return self._weights * torch.tensor(per_order, dtype=torch.float64, device=self.history.device)[:, None]

    def _reserve(self, length: int) -> None:
        if length > self.history.shape[1]:
            self.history = torch.cat((self.history, torch.zeros_like(self.history)), dim=1)

    def missed(self, last: Tensor) -> Missed:
        """What rows with `last` (int [B]) need: nodes and decays, float64 [B] each."""
        last = last.long()
        age = (self.index - last).double()
        decay = torch.exp(self.log_decay[self.index] - self.log_decay[last])
        return Missed(
            *reference.gauss_nodes(self.moments[:, last]), decay, self.hyper.beta1**age, self.hyper.beta2**age
        )

    def catch_up(self, p: Tensor, m: Tensor, v: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows p, m, v [B, C] last touched at `last` (int [B]) as they are after all steps so far."""
        if self.index == 0 or len(last) == 0:
            return p, m, v
        missed = self.missed(last)
        now = reference.catch_up(p, m, v, missed, self.hyper.eps)
        summed = self._summed(m, v, last, missed)
        rows = summed.any(1).nonzero()[:, 0]
        if len(rows):
            weight, shrink = self._missed_steps(last[rows].long())
            for entries in summed[rows].nonzero().split(max(1, TERMS_AT_ONCE // weight.shape[1])):
                row, column = entries.unbind(1)
                at = rows[row], column
                moved = reference.missed_displacement(m[at], v[at], weight[row], shrink[row], self.hyper.eps)
                now[0][at] = ((p[at].double() - moved) * missed.decay[rows[row]]).to(p.dtype)
        return now

    def _summed(self, m: Tensor, v: Tensor, last: Tensor, missed: Missed) -> Tensor:
        """Entries for which two nodes are not exact enough, bool [B, C]."""
        behind = last < self.index
        if not self.hyper.closed_form():
            return behind[:, None] & (m != 0)
        if self.hyper.beta1 <= 0.9 and self.hyper.beta2 >= 0.999:
            behind = behind & (last + (self.steps - self.index) < EARLY_STEPS)
        summed = torch.zeros_like(m, dtype=torch.bool)
        rows = behind.nonzero()[:, 0]
        floor = (EPS_MEETS_GRADIENT * self.hyper.eps * missed.node2[rows, None]).to(v.dtype)
        summed[rows] = (m[rows] != 0) & (v[rows].sqrt() < floor)
        return summed

    def _missed_steps(self, last: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and shrink [B, J] of the steps after `last` (int64 [B]), the first J of them that can matter."""
        missed = self.index - last
        longest = int(missed.max())
        length = longest if self._window is None else min(longest, self._window)
        age = torch.arange(1, length + 1, device=last.device)
        index = torch.clamp(last[:, None] + age, max=self.index)
        lr = torch.where(age <= missed[:, None], self.history[5, index], 0.0)
        regrow = torch.exp(self.log_decay[last][:, None] - self.log_decay[index])
        step = (index + (self.steps - self.index)).double()
        return reference.missed_steps(age.double(), step, lr, regrow, self.hyper)
