"""RVI in JAX: jit of a lax.scan over many steps, donated buffers, dense Adam over all rows.

The gradient of the tables reaches the batch's rows alone, so Adam's moments decay everywhere and are added to there:
the same numbers as with a dense gradient, without writing one.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from torch import Tensor

from ..steps import TABLE, Data, Peer, Sizes, Values

BETAS, EPS = (0.9, 0.999), 1e-8
Params = dict[str, Any]


class JaxScanStep(Peer):
    """Data and parameters stay on JAX's default device."""

    capture = False

    def _make(self, device: torch.device) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        return {"state": fresh(_initial(self.sizes, rng)), "data": _arrays(self.data, device), "steps": 0}

    def train(self, rows: Tensor, noise: Tensor) -> Tensor:
        return self._steps(rows, jnp.asarray(noise.cpu().numpy()))

    def run(self, rows: Tensor) -> None:
        made = self.make(rows.device)
        key = jax.random.key(made["steps"], impl="unsafe_rbg")  # threefry is far slower
        self._steps(rows, jax.random.split(key, len(rows)))

    def __call__(self, rows: Tensor, noise: Tensor | None = None) -> None:
        self.run(rows[None])

    def _steps(self, rows: Tensor, given: Any) -> Tensor:
        made, steps = self.make(rows.device), len(rows)
        order = jnp.asarray(rows.cpu().numpy().astype(np.int32))
        corrections = self._corrections(made["steps"], steps)
        made["steps"] += steps
        model = _Static(self.sizes, self.data.x_scale, self.rates)
        made["state"], losses = _scan(made["state"], *made["data"], order, given, corrections, model)
        return torch.from_numpy(np.array(losses))  # waits

    @staticmethod
    def _corrections(done: int, steps: int) -> list[Any]:
        """1 / (1 - beta1^t) and 1 / sqrt(1 - beta2^t): on the host, or XLA takes the powers anew at every entry."""
        t = done + 1 + np.arange(steps)
        return [jnp.asarray((1 - beta**t) ** power, jnp.float32) for beta, power in zip(BETAS, (-1, -0.5), strict=True)]

    def load(self, values: Values) -> None:
        self._made["state"] = fresh({name: jnp.array(v.cpu().float().numpy()) for name, v in values.items()})

    def values(self) -> Values:
        return {name: torch.from_numpy(np.array(p)) for name, p in self._made["state"][0].items()}


class _Static:
    """What a compiled step is specialised to; equal where it may be used again."""

    def __init__(self, sizes: Sizes, x_scale: float, rates: tuple[float, float]):
        self.groups, self.active = tuple(sizes.groups), tuple(sizes.active)
        self.layers, self.latents, self.scale = len(sizes.hidden) + 1, sizes.latents, sizes.scale
        self.x_scale, self.rates = x_scale, rates

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))


def _arrays(data: Data, device: torch.device) -> tuple[Any, Any]:
    x, mask = data.on(device)
    return jnp.asarray(x.cpu().numpy()), jnp.asarray(mask.cpu().numpy())


def _initial(s: Sizes, rng: np.random.Generator) -> Params:
    def normal(std: float, *shape: int) -> Any:
        return jnp.asarray(std * rng.standard_normal(shape, dtype=np.float32))

    rows = s.num_rows
    params = {"coef": normal(0.1, rows, sum(s.groups)), "residual": normal(0.01, rows, s.latents)}
    params |= {"log_std": jnp.full((rows, s.latents), -2.0), "relays": normal(1.0, sum(s.groups), s.latents)}
    for number, (n_in, n_out) in enumerate(itertools.pairwise((s.latents, *s.hidden, s.columns))):
        params |= {f"weight{number}": normal(n_in**-0.5, n_out, n_in), f"bias{number}": jnp.zeros(n_out)}
    return params


def fresh(params: Params) -> list[Params]:
    """Parameters and both moments."""
    first, second = ({name: jnp.zeros_like(p) for name, p in params.items()} for _ in range(2))
    return [params, first, second]


def negative_elbo(batch: Params, shared: Params, x: Any, mask: Any, noise: Any, model: _Static) -> Any:
    """Mean over rows, as peers/eager.py has it. batch: the table's rows [B, ...]."""
    mean, first = batch["residual"], 0
    for size, active in zip(model.groups, model.active, strict=True):
        coef = batch["coef"][:, first : first + size]
        top = lax.top_k(lax.stop_gradient(jnp.abs(coef)), active)[1]
        kept = jnp.zeros_like(coef).at[jnp.arange(len(coef))[:, None], top].set(1.0)
        mean = mean + (coef * kept) @ shared["relays"][first : first + size]
        first += size
    log_std = batch["log_std"]
    h = mean + jnp.exp(log_std) * noise
    for number in range(model.layers):
        h = h @ shared[f"weight{number}"].T + shared[f"bias{number}"]
        h = jax.nn.relu(h) if number < model.layers - 1 else h
    r = (x - h) / model.scale
    nll = jnp.where(mask, 0.5 * r * r + math.log(model.scale) + 0.5 * math.log(2 * math.pi), 0.0)
    kl = 0.5 * (mean**2 + jnp.exp(2 * log_std) - 1) - log_std
    return (nll.sum() + kl.sum()) / len(x)


@functools.partial(jax.jit, static_argnums=6, donate_argnums=0)
def _scan(state: Any, x: Any, mask: Any, order: Any, given: Any, corrections: Any, model: _Static) -> Any:
    drawn = not jnp.issubdtype(given.dtype, jnp.floating)

    def step(state: Any, now: Any) -> Any:
        params, first, second = state
        rows, noise, root1, root2 = now
        if drawn:
            noise = jax.random.normal(noise, (len(rows), model.latents))
        batch = {name: params[name][rows] for name in TABLE}
        shared = {name: p for name, p in params.items() if name not in TABLE}
        values = x[rows].astype(jnp.float32) * model.x_scale
        loss, grads = jax.value_and_grad(negative_elbo, (0, 1))(batch, shared, values, mask[rows], noise, model)
        moved = {}
        for name in params:
            grad, at, lr = (grads[0], rows, model.rates[0]) if name in TABLE else (grads[1], None, model.rates[1])
            adam = params[name], first[name], second[name]
            moved[name] = _adam(*adam, grad[name], at, lr * root1, root2)
        return [{name: parts[i] for name, parts in moved.items()} for i in range(3)], loss

    state, losses = lax.scan(step, state, (order, given, *corrections))
    return state, losses


def _adam(p: Any, m: Any, v: Any, grad: Any, rows: Any, rate: Any, factor: Any) -> tuple[Any, Any, Any]:
    """Adam's step; rows: where grad belongs, or None for all of p. rate, factor: lr and 1/sqrt, bias-corrected."""
    one, two = (1 - beta for beta in BETAS)
    if rows is None:
        m, v = BETAS[0] * m + one * grad, BETAS[1] * v + two * grad**2
    else:
        m, v = (BETAS[0] * m).at[rows].add(one * grad), (BETAS[1] * v).at[rows].add(two * grad**2)
    # always taken: with the step's own scalars in one fusion with p, XLA (jax 0.10.2, CPU) needs nine times as long
    return lax.cond(rate >= 0, _move, lambda p, *_: p, p, m, v, rate, factor), m, v


def _move(p: Any, m: Any, v: Any, rate: Any, factor: Any) -> Any:
    return p - rate * (m / (jnp.sqrt(v) * factor + EPS))
