"""RowAdam: torch's AdamW, at a cost that does not grow with the number of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .reference import AdamHyper
from .row_store import Movement, RowParameter, RowStore

__all__ = ["RowAdam"]

MODES = ("dense", "lazy")
FRESH = dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), torch.zeros(()))  # the state of what no step has moved


class RowAdam(torch.optim.Optimizer):
    """AdamW for tables of rows and ordinary parameters together.

    A RowTable's rows follow the trajectory of dense AdamW over the whole table, momentum of untouched rows included,
    but a step only touches the rows that its batch read. Ordinary parameters get torch's AdamW.

    params: parameters, or dicts of them with their own settings, of RowTables and of anything else.
    lr: step size; it may change at every step, and so may weight_decay (decoupled). A change of betas or eps costs one
        pass over the table.
    betas, eps: as in torch.optim.AdamW.
    mode: "dense" (equivalent to dense AdamW) or "lazy" (touched rows only, each with its own step count: a different
        algorithm, like torch.optim.SparseAdam).

    state_dict() holds exp_avg, exp_avg_sq and step, and exchanges with torch.optim.Adam(W) on an nn.Embedding. A table
    that saw no backward in a step does not age, as a parameter without gradient does not under Adam.
    """

    _built = False  # until then no table is touched, so that a constructor that raises changes nothing

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        mode: str = "dense",
    ):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, mode=mode))
        self._attach(self.param_groups)
        self._built = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if self._built:
            try:
                self._attach(self.param_groups[-1:])
            except ValueError:
                self.param_groups.pop()
                raise

    def _attach(self, groups: Sequence[dict[str, Any]]) -> None:
        modes: dict[RowStore, dict[int, str]] = {}
        for group in groups:
            for p in group["params"]:
                if isinstance(p, RowParameter):
                    modes.setdefault(p.store, {})[p.index] = group["mode"]
        for store, added in modes.items():
            store.check_modes(added)
        for store, added in modes.items():
            for index, mode in added.items():
                store.attach(index, mode, self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._built = True
        for _, p in self._numbered_rows():
            p.store.own(p.index, self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; closure, if given, recomputes and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_ownership()
        for group in self.param_groups:
            _check_settings(group)
            if float(group["lr"]) * group["weight_decay"] >= 1:
                raise ValueError(f"lr * weight_decay must be below 1; got {group['lr']} * {group['weight_decay']}")
        tables = self._tables_with_grad()
        for store, moving in tables.items():
            store.prepare(moving)
        for group in self.param_groups:
            self._step_ordinary(group)
        for store in tables:
            store.take_step(self.param_groups)
        return loss

    def _step_ordinary(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if not isinstance(p, RowParameter) and p.grad is not None]
        if not params:
            return
        on_gpu = all(p.is_cuda and p.is_floating_point() for p in params)  # one launch, and a CUDA graph may hold it
        for p in params:
            state = self.state[p]
            if not state:
                state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            if on_gpu:
                state["step"] = state["step"].to(p.device)
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=on_gpu or None,  # None: as torch chooses
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _tables_with_grad(self) -> dict[RowStore, dict[int, Movement]]:
        tables: dict[RowStore, dict[int, Movement]] = {}
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                if isinstance(p, RowParameter) and p.grad is not None:
                    tables.setdefault(p.store, {})[p.index] = Movement(number, _hyper(group))
        return tables

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.AdamW's: exp_avg, exp_avg_sq and step of every parameter; rows are up to date, in a copy."""
        self._check_ownership()
        packed = super().state_dict()
        for number, p in self._numbered_rows():
            if p.store.steps_of(p.index):
                packed["state"][number] = _row_state(p)
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what state_dict() of a RowAdam, or of torch.optim.Adam(W) on an nn.Embedding, returned."""
        self._check_ownership()
        modes = [group["mode"] for group in self.param_groups]
        for mode, group in zip(modes, state_dict["param_groups"], strict=False):
            _check_loadable(group, mode)
        rows = dict(self._numbered_rows())
        states = state_dict["state"]
        for number, p in rows.items():
            if number in states:
                _check_row_state(p, states[number])
        ordinary = {number: state for number, state in states.items() if number not in rows}
        super().load_state_dict({**state_dict, "state": ordinary})
        for mode, group in zip(modes, self.param_groups, strict=True):
            group["mode"] = mode
        for number, p in sorted(rows.items(), key=lambda row: row[0] in states):  # lazy counts are shared: zeros first
            state = states.get(number, FRESH)
            p.store.assign_moments(p.index, state["exp_avg"], state["exp_avg_sq"], torch.as_tensor(state["step"]))

    def _check_ownership(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if not isinstance(p, RowParameter):
                    continue
                if p.store.owner(p.index) is not self:
                    raise RuntimeError(
                        f"this RowAdam no longer trains the column range {p.store.names[p.index]!r} of its RowTable: "
                        "another RowAdam took it over, or drop_moments() ended it; use the newest RowAdam alone"
                    )
                if group["mode"] != p.store.modes[p.index]:
                    raise ValueError(
                        f"mode cannot change from {p.store.modes[p.index]!r} to {group['mode']!r} while a RowAdam "
                        "trains; make a new RowAdam after table.drop_moments()"
                    )

    def _numbered_rows(self) -> list[tuple[int, RowParameter]]:
        """Row parameters with the numbers that state_dict gives them: their place among all parameters."""
        params = [p for group in self.param_groups for p in group["params"]]
        return [(number, p) for number, p in enumerate(params) if isinstance(p, RowParameter)]


def _hyper(group: dict[str, Any]) -> AdamHyper:
    return AdamHyper(float(group["betas"][0]), float(group["betas"][1]), group["eps"])


def _row_state(p: RowParameter) -> dict[str, Tensor]:
    store = p.store
    lazy = store.modes[p.index] == "lazy"
    return {
        "step": store.last.float() if lazy else torch.tensor(float(store.steps_of(p.index))),
        "exp_avg": store.read_all(1, p.index),
        "exp_avg_sq": store.read_all(2, p.index),
    }


def _check_row_state(p: RowParameter, state: dict[str, Any]) -> None:
    for name in ("exp_avg", "exp_avg_sq"):
        if name not in state or state[name].shape != p.shape:
            found = list(state[name].shape) if name in state else "nothing"
            raise ValueError(f"state_dict: {name} of a RowTable must have shape {list(p.shape)}; found {found}")
    if "step" not in state:
        raise ValueError("state_dict: a RowTable's state must have step, as torch.optim.Adam stores it")


def _check_settings(group: dict[str, Any]) -> None:
    betas = group["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers in [0, 1), such as (0.9, 0.999); got {betas!r}")
    _check_number("lr", group["lr"], "at least 0 and finite", lambda value: 0 <= value < math.inf)
    for number, beta in enumerate(betas):
        _check_number(f"betas[{number}]", beta, "in [0, 1)", lambda value: 0 <= value < 1)
    _check_number("eps", group["eps"], "above 0 and finite", lambda value: 0 < value < math.inf)
    _check_number("weight_decay", group["weight_decay"], "at least 0 and finite", lambda value: 0 <= value < math.inf)
    if group["mode"] not in MODES:
        raise ValueError(f"mode must be 'dense' or 'lazy'; got {group['mode']!r}")
    for name, remedy in (("amsgrad", "leave it out"), ("maximize", "negate the loss")):
        if group.get(name):
            raise ValueError(f"RowAdam has no {name}; {remedy}")


def _check_number(name: str, value: Any, bound: str, good: Callable[[float], bool]) -> None:
    is_number = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
    if not is_number or not good(float(value)):
        raise ValueError(f"{name} must be {bound}; got {value!r}")


def _check_loadable(group: dict[str, Any], mode: str) -> None:
    if group.get("mode", mode) != mode:
        raise ValueError(f"state_dict was saved with mode={group['mode']!r}; load it into a RowAdam of the same mode")
    if group.get("amsgrad") or group.get("maximize"):
        raise ValueError("state_dict: amsgrad and maximize have no row-wise form; train without them")
    if group.get("weight_decay") and group.get("decoupled_weight_decay") is False:
        raise ValueError("state_dict: Adam's coupled weight_decay has no row-wise form; use AdamW's decoupled one")
