"""AdamClock: what a table remembers of its past steps, so that a row can be brought up to date whenever it is read."""

from __future__ import annotations

import functools
import math
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from . import dispatch, reference
from .reference import AdamHyper, Missed

# an entry is summed exactly where sqrt(v) < this * eps / c: two nodes err by more than 1e-7 there
EPS_MEETS_GRADIENT = 10.0
EARLY_STEPS = 250  # with the usual betas that can only happen to rows last touched this early
TERMS_AT_ONCE = 1 << 20  # such sums go in blocks of about this many terms
NEVER = 1 << 62  # a step number that is not reached


class Clock(Protocol):
    """How a table's columns move between and at the steps that touch a row.

    Kernels read a clock from four tensors on the table's device, laid out as kernels/catch_up.py says; `steps` and
    `index` mirror two of their numbers on the host.
    """

    hyper: AdamHyper
    steps: int
    index: int
    by_row: bool  # whether `last` counts a row's own steps
    history: Tensor
    counters: Tensor
    constants: Tensor
    rates: Tensor

    @property
    def closed_form(self) -> bool: ...  # the kernels' CLOSED_FORM
    def next_step(self, last: Tensor) -> int | Tensor: ...
    def touched(self, last: Tensor) -> int | Tensor: ...
    def advance(self, lr: float | Tensor, weight_decay: float | Tensor = 0.0) -> None: ...
    def set_rates(self, lr: float | Tensor, weight_decay: float | Tensor) -> None: ...
    def tick(self) -> None: ...
    def reserve(self, steps: int) -> None: ...
    def replayed(self, steps: int) -> None: ...
    def restore(self, steps: int, index: int, history: Tensor | None) -> None: ...
    def catch_up(self, p: Tensor, m: Tensor, v: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...
    def to(self, device: torch.device | str) -> None: ...


@functools.lru_cache(maxsize=16)
def _window_weights(hyper: AdamHyper, window: int, device: torch.device) -> Tensor:
    """What the moments of the steps `window` .. 1 before the present one keep, float64 [4, window]."""
    age = torch.arange(window, 0, -1, dtype=torch.float64, device=device)
    return reference.skipped_weights(hyper, age)


Kind = TypeVar("Kind", bound="_OnDevice")


class _OnDevice:
    """The tensors by which kernels know a clock."""

    capacity = 1  # steps that the history has room for at first, and the flush

    def __init__(self, hyper: AdamHyper, steps: int = 0, device: torch.device | str = "cpu"):
        self.hyper = hyper
        self.steps = steps
        self.index = 0
        window = hyper.window()
        usual = hyper.beta1 <= 0.9 and hyper.beta2 >= 0.999
        counters = [0, steps, NEVER if window is None else window, EARLY_STEPS if usual else NEVER]
        constants = [hyper.beta1, hyper.beta2, *hyper.logs(), hyper.eps]
        self.history = torch.zeros(6, self.capacity, dtype=torch.float64, device=device)
        self.counters = torch.tensor(counters).to(device, non_blocking=True)
        self.constants = torch.tensor(constants, dtype=torch.float64).to(device, non_blocking=True)
        self.rates = torch.zeros(2, dtype=torch.float64, device=device)

    @classmethod
    def of(cls: type[Kind], history: Tensor, counters: Tensor, constants: Tensor, rates: Tensor) -> Kind:
        """The clock that owns these tensors, where only they are known. Waits for the device."""
        beta1, beta2, _, _, eps = constants.tolist()
        index, offset, _, _ = counters.tolist()
        clock = cls.__new__(cls)  # without tensors of its own: this happens at every step
        clock.hyper, clock.steps, clock.index = AdamHyper(beta1, beta2, eps), index + offset, index
        clock.history, clock.counters, clock.constants, clock.rates = history, counters, constants, rates
        return clock

    def to(self, device: torch.device | str) -> None:
        self.history, self.counters = self.history.to(device), self.counters.to(device)
        self.constants, self.rates = self.constants.to(device), self.rates.to(device)

    def set_rates(self, lr: float | Tensor, weight_decay: float | Tensor) -> None:
        """Write the settings of the step to come where kernels read them, without waiting for the device."""
        for rate, value in zip(self.rates, (lr, weight_decay), strict=True):
            rate.copy_(value) if isinstance(value, Tensor) else rate.fill_(value)


class LazyClock(_OnDevice):
    """Touched rows only, as in torch's SparseAdam but with a step count for each row, kept in `last`."""

    closed_form = by_row = True  # and index stays 0: a row is never behind

    def next_step(self, last: Tensor) -> Tensor:
        return last.double() + 1

    def touched(self, last: Tensor) -> Tensor:
        return last + 1

    def advance(self, lr: float | Tensor, weight_decay: float | Tensor = 0.0) -> None:
        self.steps += 1

    def tick(self) -> None:
        self.steps += 1

    def reserve(self, steps: int) -> None:
        """Nothing grows with the steps."""

    def replayed(self, steps: int) -> None:
        self.steps += steps

    def restore(self, steps: int, index: int, history: Tensor | None) -> None:
        self.steps = steps

    def catch_up(self, p: Tensor, m: Tensor, v: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return p, m, v


class AdamClock(_OnDevice):
    """Four moments a step (and decay and learning rate) of the steps since the table was last flushed.

    `steps` counts all steps of these columns (Adam's bias correction); `index` counts those since the flush. `history`
    is float64 [6, capacity]: F0..F3, log of the accumulated weight decay, learning rate. A row whose `last` is s has
    missed the steps s+1 .. index.

    A CUDA graph that steps the table holds on to these tensors. They are replaced when the history outgrows its
    capacity, so `reserve` room for all steps ahead of a capture, and tell `replayed` how often the graph has run.
    """

    by_row = False
    capacity = 64

    def __init__(self, hyper: AdamHyper, steps: int = 0, device: torch.device | str = "cpu"):
        super().__init__(hyper, steps, device)

    @property
    def closed_form(self) -> bool:
        return self.hyper.closed_form()

    @functools.cached_property
    def window(self) -> int | None:
        return self.hyper.window()

    @property
    def moments(self) -> Tensor:
        return self.history[:4]

    @property
    def log_decay(self) -> Tensor:
        return self.history[4]

    def next_step(self, last: Tensor) -> int:
        """The number of the step that comes next, the same for every row."""
        return self.steps + 1

    def touched(self, last: Tensor) -> int:
        """What `last` becomes for rows that take part in the next step."""
        return self.index + 1

    def advance(self, lr: float | Tensor, weight_decay: float | Tensor = 0.0) -> None:
        """Count one step taken with `lr` and `weight_decay`."""
        self.reserve(1)
        if dispatch.use_triton("row_adam_", self.history.device):
            self.set_rates(lr, weight_decay)
            self.tick()
            return
        lr, weight_decay = float(lr), float(weight_decay)
        u = self.index + 1
        self.history[4, u] = self.history[4, u - 1] + math.log1p(-lr * weight_decay)
        self.history[5, u] = lr
        self.counters[0] += 1
        self.replayed(1)
        if self.window and self.closed_form:
            first = max(0, u - self.window)
            regrow = torch.exp(self.log_decay[first:u] - self.log_decay[u])
            self.moments[:, first:u] += self.step_weights(lr)[:, first - u :] * regrow

    def tick(self) -> None:
        """Count one step taken at the rates that were set, by a kernel."""
        from .kernels.advance import advance

        advance(self.history, self.counters, self.constants, self.rates, self.closed_form)
        self.replayed(1)

    def step_weights(self, lr: float) -> Tensor:
        """What the step just counted, taken with `lr`, adds to the moments of the window's, float64 [4, window]."""
        weights = _window_weights(self.hyper, self.window or 0, self.history.device)
        bc1, bc2 = self.hyper.bias_corrections_at(self.steps)
        per_order = [lr / bc1 * bc2 ** (0.5 * order) for order in (1, 2, 3, 4)]
        return weights * torch.tensor(per_order, dtype=torch.float64, device=self.history.device)[:, None]

    def reserve(self, steps: int) -> None:
        """Make room for `steps` more steps, so that the history stays where it is meanwhile."""
        capacity = self.history.shape[1]
        while capacity < self.index + steps + 1:
            capacity *= 2
        if capacity > self.history.shape[1]:
            self.history = torch.nn.functional.pad(self.history, (0, capacity - self.history.shape[1]))

    def replayed(self, steps: int) -> None:
        """Follow, on the host, `steps` steps that the device has taken by itself."""
        self.index, self.steps = self.index + steps, self.steps + steps

    def restore(self, steps: int, index: int, history: Tensor | None) -> None:
        """Go on from where a saved clock stood."""
        assert history is not None
        self.steps, self.index = steps, index
        self.counters[0], self.counters[1] = index, steps - index
        self.history = history.to(self.history.device)

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
        exact = self.exact_entries(p, m, v, last, missed)
        now = reference.catch_up(p, m, v, missed, self.hyper.eps)
        for at, values in exact:
            now[0][at] = values
        return now

    def exact_entries(
        self, p: Tensor, m: Tensor, v: Tensor, last: Tensor, missed: Missed
    ) -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
        """Entries of p (rows and columns) for which two nodes are not exact enough, and what they are now."""
        summed = self._summed(m, v, last, missed)
        if summed is None:
            return []
        found = []
        rows = summed.any(1).nonzero()[:, 0]
        if len(rows):
            weight, shrink = self._missed_steps(last[rows].long())
            for entries in summed[rows].nonzero().split(max(1, TERMS_AT_ONCE // weight.shape[1])):
                row, column = entries.unbind(1)
                at = rows[row], column
                moved = reference.missed_displacement(m[at], v[at], weight[row], shrink[row], self.hyper.eps)
                found.append((at, ((p[at].double() - moved) * missed.decay[rows[row]]).to(p.dtype)))
        return found

    @property
    def inexact_before(self) -> int:
        """Rows last touched from here on need no exact sum, if the closed form holds at all."""
        usual = self.hyper.beta1 <= 0.9 and self.hyper.beta2 >= 0.999
        return min(self.index, EARLY_STEPS - (self.steps - self.index)) if usual else self.index

    def _summed(self, m: Tensor, v: Tensor, last: Tensor, missed: Missed) -> Tensor | None:
        """Entries for which two nodes are not exact enough, bool [B, C]; None if there are none."""
        if not self.closed_form:
            return (last < self.index)[:, None] & (m != 0)
        limit = self.inexact_before
        if int(last.min()) >= limit:
            return None
        rows = (last < limit).nonzero()[:, 0]
        summed = torch.zeros_like(m, dtype=torch.bool)
        floor = (EPS_MEETS_GRADIENT * self.hyper.eps * missed.node2[rows, None]).square()
        summed[rows] = (m[rows] != 0) & (v[rows] < floor.to(v.dtype).clamp_min(torch.finfo(v.dtype).tiny))
        return summed

    def _missed_steps(self, last: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and shrink [B, J] of the steps after `last` (int64 [B]), the first J of them that can matter."""
        missed = self.index - last
        longest = int(missed.max())
        length = longest if self.window is None else min(longest, self.window)
        age = torch.arange(1, length + 1, device=last.device)
        index = torch.clamp(last[:, None] + age, max=self.index)
        lr = torch.where(age <= missed[:, None], self.history[5, index], 0.0)
        regrow = torch.exp(self.log_decay[last][:, None] - self.log_decay[index])
        step = (index + (self.steps - self.index)).double()
        return reference.missed_steps(age.double(), step, lr, regrow, self.hyper)
