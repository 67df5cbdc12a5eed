"""ElboStep: a model's whole training step in two launches (one call on a CPU), for rows with an MLP decoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .clock import Clock
from .likelihoods import Bernoulli, Gaussian
from .model import RowModel
from .nn import ACTIVATIONS, MeanFieldPosterior, MLPDecoder, RelayPosterior
from .ops.elbo import Batch, ElboModel, RowState, SharedState, elbo_step_, shared_views, unsupported
from .optim import RowAdam
from .reference import AdamHyper
from .row_store import MAX_STEPS_BEHIND, Movement


class ElboStep:
    """Trains `model` as RowAdam's step() after a backward of the mean of model.row_loss would, in two launches.

    The parameters that rows share move into one buffer [3, P], with their Adam moments; the model's parameters and
    the optimiser's state are views of it from then on, so that both can be used and saved as before. Whatever
    replaces these (model.to, optimizer.load_state_dict) asks for a new ElboStep.

    A step waits for nothing and takes its learning rates from the device, so that a CUDA graph can hold it: capture
    `launch`, and before each replay `prepare` and see whether `frozen` is still what it was at the capture; tell
    `replayed` of it.
    """

    def __init__(self, model: RowModel, optimizer: RowAdam):
        reason = self.supports(model, optimizer)
        if reason:
            raise ValueError(f"ElboStep cannot train this model: {reason}; train it with model(...) and RowAdam.step()")
        self.model, self.optimizer = model, optimizer
        self.store = model.posterior.table.store
        self.form = form_of(model)
        self.parameters = list(shared_parameters(model))
        groups = _groups_by_parameter(optimizer)
        self.groups = [groups[id(self.store.parameters[0])], groups[id(self.parameters[0])]]
        self.groups.append(groups[id(self.parameters[-1])])  # of a learned scale, or as the others
        self.shared = self._pack()
        first_moment = self.shared.weights[1].data_ptr()
        self.places = [*(p.data_ptr() for p in self.parameters), first_moment]
        self.rates: list[float] = []  # as written to the device
        self.version = -1  # of that memory then; a RowAdam.step() writes it too
        self.counts: dict[int, Tensor] = {}  # batch sizes seen, on the device
        self.kept: dict[Any, Any] = {}  # the CPU's step's, from one to the next
        self.settings = self._settings()
        self._start_table()
        self.set_rates()

    @staticmethod
    def supports(model: nn.Module, optimizer: RowAdam | None = None) -> str | None:
        """What keeps ElboStep from training this model, or None."""
        return _model_reason(model) or (None if optimizer is None else _optimizer_reason(model, optimizer))

    def _pack(self) -> SharedState:
        """Move the shared parameters and their moments into one buffer."""
        like, settings = self.parameters[0], self.optimizer.param_groups[self.groups[1]]
        weights = like.new_zeros(3, sum(p.numel() for p in self.parameters))
        steps = torch.zeros(len(self.parameters), device=like.device)
        shapes = [tuple(p.shape) for p in self.parameters]
        views = zip(*(shared_views(block, shapes) for block in weights), strict=True)
        for number, (parameter, (p, m, v)) in enumerate(zip(self.parameters, views, strict=True)):
            state = self.optimizer.state[parameter]
            if state:
                m.copy_(state["exp_avg"])
                v.copy_(state["exp_avg_sq"])
                steps[number] = float(state["step"])
            p.copy_(parameter.detach())
            parameter.data = p
            state.update(step=steps[number], exp_avg=m, exp_avg_sq=v)
        hyper = _hyper(settings)
        second = weights.shape[1] - (self.parameters[-1].numel() if self.form.learned else 0)
        constants = torch.tensor([*hyper[:2], *hyper.logs(), hyper.eps], dtype=torch.float64, device=like.device)
        self.rates_there = torch.zeros(3, 2, dtype=torch.float64, device=like.device)  # the rows' first
        rates = self.rates_there[1:]
        loss = torch.zeros(2, 3, dtype=torch.float64, device=like.device)
        return SharedState(weights, constants, rates, steps, second, loss)

    def _start_table(self) -> None:
        """Let all columns of the table move by one clock."""
        hyper = _hyper(self.optimizer.param_groups[self.groups[0]])
        moving = {index: Movement(self.groups[0], hyper) for index in range(len(self.store.names))}
        if self.store.moving != moving or len(self.store.columns) != 1:
            self.store.flush()
            self.store.restart(moving, self.store.steps)
        self._follow_clock()

    def _follow_clock(self) -> None:
        """Read the clock's counters back: a step that was interrupted counted there first."""
        index, offset, *_ = self.clock.counters.tolist()
        self.clock.index, self.clock.steps = index, index + offset

    def valid(self) -> bool:
        """Whether the model and its optimiser are still such that this can step them."""
        unchanged = self._same_memory() and self.supports(self.model, self.optimizer) is None
        return unchanged and self.settings == self._settings()

    def _settings(self) -> tuple:
        """What a step takes from the model and its optimiser once, when it is made."""
        hyper = [_hyper(self.optimizer.param_groups[group]) for group in self.groups]
        return form_of(self.model)._replace(kl_weight=0.0), hyper, self.model.posterior.seed

    def make_room(self, steps: int) -> None:
        """Make ready for `steps` steps, without which their memory may move under a CUDA graph that was captured."""
        if self.clock.index + steps > MAX_STEPS_BEHIND:
            self.store.flush()
        self.clock.reserve(steps)

    def set_rates(self) -> None:
        """Write lr and weight_decay of the optimiser's groups where the step to come reads them."""
        settings = [self.optimizer.param_groups[group] for group in self.groups]
        for group in settings:
            if float(group["lr"]) * group["weight_decay"] >= 1:
                raise ValueError(f"lr * weight_decay must be below 1; got {group['lr']} * {group['weight_decay']}")
        rates = [float(group[name]) for group in settings for name in ("lr", "weight_decay")]
        if self.clock.rates.data_ptr() != self.rates_there.data_ptr():
            self.clock.rates = self.rates_there[0]
        if rates != self.rates or self.rates_there._version != self.version:
            there = self.rates_there
            there.copy_(torch.tensor(rates, dtype=there.dtype, pin_memory=there.is_cuda).view(3, 2), non_blocking=True)
            self.rates, self.version = rates, there._version

    def release(self) -> None:
        """Give every parameter and moment memory of its own again, and the batch's arrays back. Nothing is stepped
        hereafter."""
        for parameter in self.parameters:
            parameter.data = parameter.data.clone()
            state = self.optimizer.state[parameter]
            state.update({name: value.clone() for name, value in state.items() if isinstance(value, Tensor)})
        if self.store.columns:
            self._follow_clock()
        self.kept.clear()

    def replayed(self, steps: int) -> None:
        """Follow, on the host, `steps` steps that a CUDA graph has taken."""
        self.clock.replayed(steps)

    @property
    def clock(self) -> Clock:
        return self.store.columns[0].clock

    @property
    def sums(self) -> Tensor:
        """nll, kl and rows of all steps since the caller last zeroed them, float64 [3]."""
        return self.shared.loss[1]

    def step(
        self,
        rows: Tensor,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        count: Tensor | None = None,
        x_scale: float = 1.0,
        gathered: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """One step on rows (int64 [B], without repeats). Returns the batch's sums of nll and kl, float64 [], which the
        next step overwrites.

        x [N, D], of any dtype, is read at `rows` and multiplied by x_scale; `gathered`: x [B, D] holds the batch alone.
        mask: bool, or its bits (uint8 [.., ceil(D / 8)]), or None for NaN in x. count: int64 [], how many of `rows` are
        there, 1 or more; they come first.
        """
        self.prepare()
        self.launch(rows, x, mask, self._count(len(rows)) if count is None else count, x_scale, gathered)
        if len(rows):
            self.replayed(1)
        return self.shared.loss[0, 0], self.shared.loss[0, 1]

    def prepare(self) -> None:
        """Make room for a step and write its rates; raises where the model's memory was replaced."""
        if not self._same_memory():
            raise RuntimeError(
                "the model's parameters, its RowAdam or that one's state were replaced since this ElboStep was made; "
                "make a new one"
            )
        self.make_room(1)
        self.set_rates()

    def launch(
        self, rows: Tensor, x: Tensor, mask: Tensor | None, count: Tensor, x_scale: float, gathered: bool
    ) -> None:
        """The step alone, as it stands in a CUDA graph; arguments as of `step`."""
        batch = Batch(rows, count, x, mask, float(x_scale), gathered)
        form = self.form._replace(kl_weight=float(self.model.kl_weight))
        elbo_step_(self.table(), batch, self.shared, form, self.kept)

    def frozen(self) -> tuple:
        """What a graph of `launch` holds fast besides the arguments: addresses, and numbers that are no tensors."""
        tensors = (t for t in self.table() if isinstance(t, Tensor))
        return *(t.data_ptr() for t in tensors), self.clock.history.shape[1], float(self.model.kl_weight)

    def table(self) -> RowState:
        """The rows, their clock and their noise as they are now."""
        store, clock = self.store, self.clock
        tensors = store.values, store.last, clock.history, clock.counters, clock.constants, clock.rates
        return RowState(*tensors, clock.closed_form, store.step, self.model.posterior.seed)

    def _count(self, rows: int) -> Tensor:
        if rows not in self.counts:
            self.counts[rows] = torch.full((), rows, dtype=torch.int64, device=self.store.values.device)
        return self.counts[rows]

    def _same_memory(self) -> bool:
        moment = self.optimizer.state[self.parameters[0]].get("exp_avg")
        found = [p.data_ptr() for p in self.parameters] + [None if moment is None else moment.data_ptr()]
        return found == self.places and bool(self.store.columns) and self.store.owner(0) is self.optimizer


def shared_parameters(model: RowModel) -> Iterator[nn.Parameter]:
    """In the order of ElboModel.shared_shapes."""
    if isinstance(model.posterior, RelayPosterior):
        yield model.posterior.relays
    yield from model.decoder.parameters()
    yield from model.likelihood.parameters()


def form_of(model: RowModel) -> ElboModel:
    posterior, decoder, likelihood = model.posterior, model.decoder, model.likelihood
    relays = (tuple(posterior.groups), tuple(posterior.active)) if isinstance(posterior, RelayPosterior) else ((), ())
    hidden = tuple(layer.out_features for layer in decoder.mlp if isinstance(layer, nn.Linear))
    activation = next((n for n, kind in ACTIVATIONS.items() for layer in decoder.mlp if type(layer) is kind), "relu")
    learned = isinstance(likelihood, Gaussian) and likelihood.learned
    scale = 1.0
    if isinstance(likelihood, Gaussian):
        scale = likelihood.min_scale if likelihood.learned else likelihood.fixed
    kind = "gaussian" if isinstance(likelihood, Gaussian) else "bernoulli"
    return ElboModel(*relays, hidden, decoder.linear_path, activation, kind, scale, learned, float(model.kl_weight))


def _model_reason(model: nn.Module) -> str | None:
    if type(model) is not RowModel or type(model.posterior) not in (RelayPosterior, MeanFieldPosterior):
        return "its rows have neither a RelayPosterior nor a MeanFieldPosterior"
    if type(model.decoder) is not MLPDecoder:
        return "its decoder is no MLPDecoder"
    if type(model.likelihood) not in (Gaussian, Bernoulli):
        return "its likelihood is neither Gaussian nor Bernoulli"
    if isinstance(model.likelihood, Gaussian) and model.likelihood.learned and model.likelihood.log_scale is None:
        return "its learned scale has no columns yet (call likelihood.bind(num_columns))"
    if isinstance(model.posterior, RelayPosterior) and model.posterior.coefficients != "linear":
        return f"its coefficients are {model.posterior.coefficients!r}, not 'linear'"
    if not all(p.requires_grad for p in model.parameters()):
        return "some of its parameters are frozen"
    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) > 1:
        return f"its parameters have several dtypes ({', '.join(sorted(map(str, dtypes)))})"
    return unsupported(model.posterior.table.store.values, model.posterior.latent_dim, form_of(model))


def _optimizer_reason(model: Any, optimizer: RowAdam) -> str | None:
    groups = _groups_by_parameter(optimizer)
    rows, shared = model.posterior.table.store.parameters, list(shared_parameters(model))
    if not all(id(p) in groups for p in (*rows, *shared)):
        return "the optimizer does not train all of its parameters"
    if len({groups[id(p)] for p in rows}) > 1:
        return "the columns of its rows are in different groups of the optimizer"
    scale = list(model.likelihood.parameters())
    if len({groups[id(p)] for p in shared[: len(shared) - len(scale)]}) > 1:
        return "relays and decoder are in different groups of the optimizer"
    settings = [optimizer.param_groups[groups[id(p)]] for p in (rows[0], shared[0], shared[-1])]
    if settings[0]["mode"] != "dense":
        return "its rows are trained with mode='lazy'"
    if _hyper(settings[1]) != _hyper(settings[2]):
        return "betas or eps of its learned scale differ from those of its decoder"
    if len({float(optimizer.state[p]["step"]) if optimizer.state[p] else 0.0 for p in shared}) > 1:
        return "its shared parameters have taken different numbers of steps"
    return None


def _groups_by_parameter(optimizer: RowAdam) -> dict[int, int]:
    """By the parameter's id, the number of its group."""
    return {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}


def _hyper(group: dict[str, Any]) -> AdamHyper:
    return AdamHyper(float(group["betas"][0]), float(group["betas"][1]), group["eps"])
