"""RVI, VAD and VAE: fit, infer, impute, embed, reconstruct, score, sample, save, load."""

from __future__ import annotations

import copy
import difflib
import inspect
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from . import arguments, defaults, io, ops
from .blocks import release, shape_and_dtype
from .infer import (
    BLOCK,
    ELBO_DRAWS,
    PROTOCOLS,
    ROW_LR,
    ROW_SCHEDULE,
    STARTS,
    TRAINING_ADAM,
    InferencePlan,
    Posterior,
    fit_new_rows,
    map_blocks,
    padded_block,
)
from .likelihoods import Gaussian, Likelihood
from .model import Encoder, EncoderModel, LatentModel, RowModel
from .nn import ACTIVATIONS, MeanFieldPosterior, MLPDecoder, RelayPosterior
from .observations import ColumnStatistics, ColumnUnits, HiddenCells, Observations
from .optim import MODES, RowAdam
from .predictive import Predictive, importance_bound, running_moments, weighted_draws
from .row_store import RowParameter
from .train import SCHEDULES, Plan, Trainer

ROWS_AT_ONCE = 1024  # rows decoded together when reading results,
CELLS_AT_ONCE = 1 << 22  # unless they hold more cells than this
MAX_DRAWS = 1 << 16  # the noise's counter has 16 bits for a draw
MAX_LOG_STD = 20  # of a posterior's initial log standard deviation
INFER_ARGUMENTS = ("steps", "lr", "protocol", "row_ids", "start", "stop_early")
_default_generator = threading.Lock()  # PyTorch's, which modules' initial values come from; a fit borrows it
NAMES_SHOWN = 5  # of columns, in a message
PATIENCE = 0.2  # early stopping waits for this share of the epochs

CellsOf = Callable[[slice], np.ndarray]  # of rows: their cells [B, D] in the model's units, float64


class Estimator:
    """What RVI, VAD and VAE share. Their own docstrings say what they are."""

    optimizer_mode: str = "dense"

    latent_dim: int | str
    hidden: Sequence[int] | str
    linear_path: bool | str
    likelihood: Likelihood | str
    kl_weight: float
    standardize: bool | str
    lr: float | str
    schedule: str
    weight_decay: float | str
    batch_size: int | str
    epochs: int | str
    activation: str
    keep_empty_columns: bool
    seed: int
    device: str | torch.device
    progress: bool

    # what fit makes of them
    latent_dim_: int
    hidden_: tuple[int, ...]
    linear_path_: bool
    activation_: str
    likelihood_: Likelihood
    standardize_: bool
    lr_: float
    schedule_: str
    weight_decay_: float
    batch_size_: int
    epochs_: int
    device_: torch.device
    n_features_in_: int
    feature_names_in_: list[str] | None
    units_: ColumnUnits
    model_: LatentModel
    n_rows_: int
    history_: dict[str, list[float]]
    n_steps_: int
    stopped_: str

    def _set_arguments(self, given: dict[str, Any]) -> None:
        """Store a constructor's arguments under their own names."""
        unknown = given.pop("unknown")
        if unknown:
            raise TypeError(_unknown_argument(type(self), next(iter(unknown))))
        for name in _argument_defaults(type(self)):
            setattr(self, name, given[name])
        self._check_arguments()

    def _check_arguments(self) -> None:
        for name in ("latent_dim", "batch_size", "epochs"):
            arguments.positive_int(name, getattr(self, name), "auto")
        for name in ("lr", "weight_decay"):
            arguments.number(name, getattr(self, name), "auto")
        arguments.number("kl_weight", self.kl_weight)
        arguments.widths("hidden", self.hidden, "auto")
        arguments.one_of("schedule", self.schedule, ("auto", *SCHEDULES))
        arguments.one_of("activation", self.activation, ("auto", *ACTIVATIONS))
        arguments.one_of("linear_path", self.linear_path, (True, False, "auto"))
        arguments.one_of("standardize", self.standardize, (True, False, "auto"))
        arguments.one_of("keep_empty_columns", self.keep_empty_columns, (True, False))
        arguments.one_of("progress", self.progress, (True, False))
        arguments.seed("seed", self.seed)
        is_auto = isinstance(self.likelihood, str) and self.likelihood == "auto"
        if not (is_auto or isinstance(self.likelihood, Likelihood)):
            raise TypeError(
                "likelihood must be 'auto' or one of rvi_fast.likelihoods, such as Gaussian(0.1); "
                f"got {self.likelihood!r}"
            )
        try:
            torch.device("cpu" if self.device == "auto" else self.device)
        except (RuntimeError, TypeError):
            raise ValueError(f"device must be 'auto' or a torch device such as 'cuda:0'; got {self.device!r}") from None

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments; `deep` is there for scikit-learn's clone."""
        return {name: getattr(self, name) for name in _argument_defaults(type(self))}

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_fitted_by": None}  # the optimiser and its data stay behind
        if state.get("_data") is not None and state["_data"].readers:
            state["_data"] = None  # an open file cannot be copied
        return state

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v!r}" for k, v in self.get_params().items() if v != _argument_defaults(type(self))[k])
        return f"{type(self).__name__}({shown})"

    # fitting

    def fit(
        self,
        X: Any,
        mask: Any = None,
        *,
        val_cells: float = 0.0,
        max_steps: int | None = None,
        callbacks: Iterable[Callable[[Estimator, dict[str, float]], Any]] = (),
        checkpoint_dir: str | os.PathLike | None = None,
        checkpoint_every: int | None = None,
        resume: bool = False,
    ) -> Self:
        """Train on the observed cells of X.

        X: [N, D] array, tensor, DataFrame, memmap, or anything with shape, dtype and X[a:b] (docs/data.md: larger than
        memory); NaN = missing. mask: bool [N, D], True = observed. val_cells: share of the observed cells to hide from
        training; it stops early when the error on them no longer falls, and keeps the best state. max_steps: an upper
        bound of the optimisation steps. callbacks: called as callback(self, logs) after every epoch, a true result
        stops. checkpoint_dir: where to save all of the training state every `checkpoint_every` steps (default: an
        epoch); resume=True goes on from there (docs/checkpoints.md). Ctrl-C ends the fit after the step at hand and
        leaves the model usable. A fitted model is held until the new one is done, and stays if the fit fails; what a
        callback raises ends the fit and leaves the model as trained so far.
        """
        callbacks = self._check_fit(val_cells, max_steps, callbacks, checkpoint_dir, checkpoint_every, resume)
        data = Observations(X, mask)
        data.check()
        hidden = HiddenCells(data, val_cells, self.seed) if val_cells else None
        statistics = ColumnStatistics.of(data)
        if hidden is not None:
            statistics = statistics.with_moments_of(ColumnStatistics.of(data, hidden))
        if not self.keep_empty_columns and (statistics.count == 0).any():
            column = data.column_name(int(np.argmax(statistics.count == 0)))
            raise ValueError(f"column {column} of X has nothing observed; drop it, or set keep_empty_columns=True")
        fitted = copy.copy(self)
        fitted._resolve(data, statistics)
        fitted._build(len(data), statistics)
        trainer = fitted._trainer(data, hidden, max_steps)
        if resume and io.has_checkpoint(checkpoint_dir):
            io.load_training_state(checkpoint_dir, fitted, trainer)
        before = self.__dict__
        self.__dict__ = fitted.__dict__
        try:
            failed_callback = self._train(trainer, callbacks, checkpoint_dir, checkpoint_every)
        except Exception:
            self.__dict__ = before
            raise
        if failed_callback is not None:
            raise failed_callback
        return self

    def _check_fit(
        self,
        val_cells: Any,
        max_steps: Any,
        callbacks: Any,
        checkpoint_dir: Any,
        checkpoint_every: Any,
        resume: bool,
    ) -> list[Callable]:
        """Raise before anything is changed; returns the callbacks as a list."""
        self._check_arguments()
        if not arguments.is_number(val_cells) or not 0 <= val_cells < 1:
            raise ValueError(f"val_cells must be a share in [0, 1); got {val_cells!r}")
        arguments.positive_int("max_steps", max_steps, None)
        arguments.positive_int("checkpoint_every", checkpoint_every, None)
        if (resume or checkpoint_every is not None) and checkpoint_dir is None:
            raise ValueError("resume and checkpoint_every need checkpoint_dir, the folder of the checkpoint")
        if checkpoint_dir is not None:
            io.make_folder(arguments.path("checkpoint_dir", checkpoint_dir))
        listed: list[Any] = list(callbacks) if isinstance(callbacks, Iterable) else [None]
        if not all(callable(callback) for callback in listed):
            raise TypeError(f"callbacks must be a sequence of functions (model, logs); got {callbacks!r}")
        return listed

    def _resolve(self, data: Observations, statistics: ColumnStatistics) -> defaults.Settings:
        """Replace every "auto" by what the data ask for, and return that; results carry a trailing underscore."""
        auto = defaults.settings_for(data.values.dtype, statistics, len(data))
        for name in defaults.AUTO:
            value = getattr(self, name)
            is_auto = isinstance(value, str) and value == "auto"
            setattr(self, name + "_", getattr(auto, name) if is_auto else arguments.plain(value))
        if self.lr_ * self.weight_decay_ >= 1:
            raise ValueError(f"lr * weight_decay must be below 1; got {self.lr_} * {self.weight_decay_}")
        self.batch_size_ = min(self.batch_size_, len(data))
        self.likelihood_ = (
            defaults.likelihood_for(auto) if isinstance(self.likelihood, str) else copy.deepcopy(self.likelihood)
        )
        if not self.likelihood_.standardizable:
            if self.standardize is True:
                raise ValueError(
                    f"standardize=True does not go with {type(self.likelihood_).__name__}, which needs X in [0, 1]"
                )
            self.standardize_ = False
        self._resolve_device()
        self.n_features_in_ = data.num_columns
        self.feature_names_in_ = data.names
        full_scale = 255.0 if data.values.dtype == np.uint8 else 1.0
        self.units_ = statistics.units(self.standardize_, full_scale)
        self.likelihood_.check_range(statistics.low / full_scale, statistics.high / full_scale)
        self.likelihood_.bind(data.num_columns)
        return auto

    def _resolve_device(self) -> None:
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        self.device_ = torch.device(auto if self.device == "auto" else self.device)
        try:
            torch.zeros(1, device=self.device_).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            device, why = str(self.device_), str(error).partition("\n")[0].partition(". ")[0]
            raise ValueError(f"device {device!r} cannot be used here ({why}); choose 'auto' or 'cpu'") from None

    def _decoder(self) -> MLPDecoder:
        return MLPDecoder(
            self.latent_dim_,
            self.n_features_in_,
            self.hidden_,
            linear_path=self.linear_path_,
            activation=self.activation_,
        )

    def _make_model(self, num_rows: int, statistics: ColumnStatistics | None) -> LatentModel:
        raise NotImplementedError

    def _build(self, num_rows: int, statistics: ColumnStatistics | None) -> None:
        with _default_generator, torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.model_ = self._make_model(num_rows, statistics).to(self.device_)
        self.n_rows_ = num_rows
        self.history_ = {}
        self.n_steps_, self.stopped_ = 0, "running"
        self._data: Observations | None = None
        self._fitted_by: Trainer | None = None

    def _parameter_groups(self) -> list[dict[str, Any]]:
        learned_scale = list(self.model_.likelihood.parameters())
        apart = {id(p) for p in learned_scale}
        weights = [p for p in self.model_.parameters() if id(p) not in apart and not isinstance(p, RowParameter)]
        return [
            {"params": weights, "lr": self.lr_, "weight_decay": self.weight_decay_},
            *([{"params": learned_scale, "lr": self.lr_}] if learned_scale else []),
        ]

    def _trainer(self, data: Observations, hidden: HiddenCells | None, max_steps: int | None) -> Trainer:
        optimizer = RowAdam(self._parameter_groups(), mode=self.optimizer_mode)
        plan = Plan(
            self.batch_size_,
            self.epochs_,
            max_steps,
            self.schedule_,
            self.seed,
            self.device_,
            patience=max(5, round(PATIENCE * self.epochs_)),
            buffer=data.buffer,
        )
        self._data = data
        self._fitted_by = Trainer(self.model_, optimizer, data, self.units_, plan, hidden)
        return self._fitted_by

    def _train(
        self, trainer: Trainer, callbacks: list[Callable], checkpoint_dir: Any, checkpoint_every: int | None
    ) -> Exception | None:
        """Train, with checkpoints; returns what a callback raised, if one did."""
        every = checkpoint_every or trainer.plan.steps_per_epoch(len(trainer.data))
        progress = trainer.progress
        self.history_ = progress.history
        failed: list[Exception] = []

        def after_step(step: int) -> None:
            if checkpoint_dir is not None and step % every == 0 and step < trainer.total:
                trainer.collect()
                io.checkpoint(self, checkpoint_dir, trainer)

        def after_epoch(logs: dict[str, float]) -> bool:
            try:
                return any([callback(self, logs) for callback in callbacks])
            except Exception as error:  # raised again when the model is in order
                failed.append(error)
                return True

        try:
            trainer.run(after_epoch, after_step, self.progress)
            progress.stopped = "failed" if failed else progress.stopped
            if checkpoint_dir is not None and not failed:
                io.checkpoint(self, checkpoint_dir, trainer)
        finally:
            trainer.restore_best()
            self.n_steps_, self.stopped_ = progress.step, progress.stopped
        empty = trainer.empty_rows()
        for reader in trainer.data.readers:
            reader.forget()
        if len(empty) and isinstance(self.model_, RowModel):
            self.model_.posterior.set_prior(empty)
        if len(empty) or trainer.hidden is not None:
            self._fitted_by = None  # the model shown is no longer the one in training
        if progress.stopped == "interrupted":
            warnings.warn(
                f"fit was interrupted after step {progress.step} of {trainer.total}; the model is usable as it is",
                stacklevel=3,
            )
        return failed[0] if failed else None

    # new rows

    def infer(
        self,
        X: Any,
        mask: Any = None,
        *,
        steps: int = 250,
        lr: float | None = None,
        protocol: str = "row",
        row_ids: Any = None,
        start: str = "linear",
        stop_early: bool = True,
    ) -> Posterior:
        """The posterior of new rows: decoder and relays stay as they are, each row fits its own parameters.

        X, mask: as in fit, [M, D]. steps: Adam steps of a row's descent. lr: their size at first, which falls to 0 as a
        cosine (default 0.1). protocol: "row", each row by itself; "epochs", as minibatches of dense Adam over all M
        rows, the published way: with the training's row lr and schedule, from "prior", and never early. row_ids: int64
        [M], what the rows' noise is keyed by; default a hash of the row, so that a row's result does not depend on the
        others in the call. start: "linear", the posterior under the linear map that is closest to the decoder (ridge
        regression on the observed cells), or "prior", the values that training rows start from. stop_early: rows that
        have converged after a quarter of the steps take no more, those that have not after all of them, or in a place
        where their cells are improbable, start again from the other start, and a row keeps the end with the highest
        ELBO; False, or fewer than 158 steps: all in one descent.
        """
        data = self._new_rows(X, mask)
        self._check_inference(steps, lr, protocol, start, stop_early)
        ids = data.row_ids() if row_ids is None else _as_row_ids(row_ids, len(data))
        if protocol == "row":
            plan = InferencePlan(
                steps, ROW_LR if lr is None else lr, ROW_SCHEDULE, self.seed, start=start, stop_early=stop_early
            )
        else:
            missed = -(-len(data) // self.batch_size_) - 1
            lr = self._row_lr() if lr is None else lr
            plan = InferencePlan(steps, lr, self.schedule_, self.seed, missed, hyper=TRAINING_ADAM)
        assert isinstance(self.model_, RowModel)
        return fit_new_rows(self.model_, data, self.units_, ids, plan, self.progress)

    def _row_lr(self) -> float:
        return self.lr_

    def _check_inference(self, steps: int, lr: float | None, protocol: str, start: str, stop_early: bool) -> None:
        arguments.positive_int("steps", steps)
        arguments.number("lr", lr, None, above_zero=True)
        arguments.one_of("protocol", protocol, PROTOCOLS)
        arguments.one_of("start", start, STARTS)
        arguments.one_of("stop_early", stop_early, (True, False))

    def _new_rows(self, X: Any, mask: Any) -> Observations:
        self._check_fitted()
        data = Observations(X, mask)
        if data.num_columns != self.n_features_in_:
            raise ValueError(
                f"X has {data.num_columns} columns, but the model was fitted on {self.n_features_in_}"
                + _other_columns(data.names, self.feature_names_in_)
            )
        if data.names and self.feature_names_in_ and data.names != self.feature_names_in_:
            first = next(i for i, (a, b) in enumerate(zip(data.names, self.feature_names_in_, strict=True)) if a != b)
            raise ValueError(
                f"X's column {first} is {data.names[first]!r}, but the model was fitted with "
                f"{self.feature_names_in_[first]!r} there; give the columns in the order of feature_names_in_"
            )
        data.check()
        if not self.likelihood_.standardizable:
            statistics = ColumnStatistics.of(data)
            self.likelihood_.check_range(statistics.low / self.units_.scale, statistics.high / self.units_.scale)
        return data

    def _check_fitted(self) -> None:
        if not hasattr(self, "model_"):
            raise RuntimeError(
                f"this {type(self).__name__} is not fitted; call fit(X) or {type(self).__name__}.load(dir) first"
            )

    # results

    @property
    def posterior_(self) -> Posterior:
        """The training rows' posterior; its elbo and converged are not evaluated (NaN, False)."""
        self._check_fitted()
        return self._training_posterior()

    @property
    def scale_(self) -> np.ndarray:
        """The Gaussian likelihood's standard deviation of every column, in the user's units, float64 [D]."""
        self._check_fitted()
        likelihood = self.model_.likelihood
        if not isinstance(likelihood, Gaussian):
            raise AttributeError(f"scale_ belongs to a Gaussian likelihood; this model has {type(likelihood).__name__}")
        return likelihood.scale().detach().cpu().double().numpy() * self.units_.scale

    def _training_posterior(self) -> Posterior:
        assert isinstance(self.model_, RowModel)
        post = self.model_.posterior
        if post.num_rows != self.n_rows_:
            raise RuntimeError("this model was saved with rows=False: its training rows are gone; pass X")
        parameters = post.table.weight.detach().clone()
        with torch.no_grad():
            parts = [(post.mean_of(p), post.log_std_of(p).exp()) for p in parameters.split(ROWS_AT_ONCE)]
        mean, std = (torch.cat(t).cpu() for t in zip(*parts, strict=True))
        unknown = torch.full((len(mean),), float("nan"))
        converged = torch.zeros(len(mean), dtype=torch.bool)
        return Posterior(mean, std, unknown, converged, torch.arange(len(mean)), parameters.cpu())

    def _posterior_of(self, X: Any, mask: Any, posterior: Posterior | None, **infer: Any) -> Posterior:
        if X is None and mask is not None:
            raise TypeError("mask needs X beside it; without X the training rows are used, with their own mask")
        if posterior is not None:
            self._check_posterior(X, posterior)
        if unknown := set(infer) - set(INFER_ARGUMENTS):
            raise TypeError(_unknown_result_argument(min(unknown)))
        if infer and (posterior is not None or X is None):
            why = "has no effect beside posterior" if X is not None else "needs X: training rows are not inferred again"
            raise TypeError(f"{next(iter(infer))} {why}; drop one of them")
        if posterior is not None:
            return posterior
        return self.posterior_ if X is None else self.infer(X, mask, **infer)

    def _check_posterior(self, X: Any, posterior: Any) -> None:
        if not isinstance(posterior, Posterior):
            raise TypeError(f"posterior must be what infer or posterior_ gave; got {type(posterior).__name__}")
        rows = self.n_rows_ if X is None else X.shape[0] if hasattr(X, "shape") else len(X)
        if len(posterior) != rows:
            raise ValueError(f"posterior has {len(posterior)} rows, but X has {rows}")
        if posterior.mean.shape[1] != self.latent_dim_:
            raise ValueError(f"posterior has {posterior.mean.shape[1]} latents, but the model has {self.latent_dim_}")

    def _decode(self, z: Tensor, noise: tuple[Tensor, int] | None = None) -> np.ndarray:
        """E[x | z] in the model's units, float64 [B, D]; in blocks, so that a row's bits are its own.

        noise: row ids and number of a draw of x itself, instead of its mean.
        """
        model = self.model_

        @torch.no_grad()
        def decode(block: slice) -> Tensor:
            part = z[block]
            xhat = model.decoder(padded_block(part).to(self.device_))[: len(part)]
            if noise is None:
                return model.likelihood.mean(xhat).cpu()
            return model.likelihood.draw(xhat, self._cell_noise(noise[0][block], noise[1]).to(xhat)).cpu()

        return torch.cat(list(map_blocks(decode, len(z)))).double().numpy()

    def _in_blocks(
        self, data: Observations, post: Posterior, of_block: Callable[..., tuple[Tensor, ...]], rows: slice
    ) -> list[Tensor]:
        """of_block(x, mask, mean, std, row ids) of the rows, in full blocks of their own, put together on the CPU."""

        @torch.no_grad()
        def found(block: slice) -> list[Tensor]:
            part = slice(rows.start + block.start, min(rows.start + block.stop, rows.stop))
            cells = self.units_.to_model(*data.read(part))
            given = (padded_block(t).to(self.device_) for t in (*cells, post.mean[part], post.std[part]))
            ids = padded_block(post.row_ids[part]).to(self.device_)
            return [t[: part.stop - part.start].cpu() for t in of_block(*given, ids)]

        blocks = map_blocks(found, rows.stop - rows.start)
        return [torch.cat(parts) for parts in zip(*blocks, strict=True)]

    def impute(
        self,
        X: Any = None,
        mask: Any = None,
        *,
        n_samples: int | None = None,
        noise: bool = False,
        importance_samples: int | None = None,
        posterior: Posterior | None = None,
        out: Any = None,
        **infer: Any,
    ) -> Any:
        """Fill the holes; observed cells come back bit for bit.

        X, mask: new rows, or None for the training rows. By default a hole gets the decoder's output at the posterior
        mean. n_samples: an int L returns L fillings [L, N, D] with z drawn from the posterior (their mean is
        E[x_missing | x_observed] under q, their spread the uncertainty of z); noise: with the likelihood's own noise
        added, so that they are draws of the cells themselves. importance_samples: an int L fills with the conditional
        mean E[x_missing | x_observed], from L draws weighted by p(x_observed, z) / q(z) (eq. 23). posterior: of these
        rows, from infer. out: where to write the result block by block, [N, D], instead of a new array: an array,
        memmap, h5py or zarr dataset. Other keywords go to infer. Returns out, or the kind of container that X is; a
        list of DataFrames where n_samples is given and X is one.
        """
        self._check_fitted()
        _check_draws("n_samples", n_samples)
        _check_draws("importance_samples", importance_samples)
        arguments.one_of("noise", noise, (True, False))
        if n_samples is not None and importance_samples is not None:
            raise TypeError("n_samples draws fillings and importance_samples takes their mean; drop one of them")
        if noise and n_samples is None:
            raise TypeError("noise=True needs n_samples, the number of draws")
        data = self._training_data() if X is None else self._new_rows(X, mask)
        if out is not None:
            _check_out(out, data, n_samples)
        post = self._posterior_of(X, mask, posterior, **infer)
        if n_samples is None:
            cells = self._filling(data, post, importance_samples)
            filled = self._fill(data, cells, _empty_like(data) if out is None else out)
            return data.like_container(filled) if out is None else filled
        draws = (self._drawn(post, draw, noise) for draw in range(n_samples))
        fillings = [self._fill(data, cells, _empty_like(data)) for cells in draws]
        if isinstance(data.container, (np.ndarray, Tensor)):
            return data.like_container(np.stack(fillings))
        return [data.like_container(filled) for filled in fillings]

    def _filling(self, data: Observations, post: Posterior, importance_samples: int | None) -> CellsOf:
        """f(mean), or E[x | x_observed] of weighted draws."""
        if importance_samples is None:
            return lambda rows: self._decode(post.mean[rows])
        return lambda rows: self._moments(data, post, importance_samples, True, rows)[0].numpy()

    def _drawn(self, post: Posterior, draw: int, noise: bool) -> CellsOf:
        z = post.mean + post.std * self._noise(post.row_ids, draw)
        return lambda rows: self._decode(z[rows], (post.row_ids[rows], draw) if noise else None)

    def _training_data(self) -> Observations:
        if self._data is None:
            raise ValueError(
                "a saved model holds no data: pass X, with posterior=model.posterior_ if these are the training rows"
            )
        return self._data

    def _noise(self, ids: Tensor, draw: int) -> Tensor:
        return ops.philox_normal(self.seed, "impute", 0, ids, self.latent_dim_, draw=draw)

    def _cell_noise(self, ids: Tensor, draw: int) -> Tensor:
        """Normals for the likelihood's noise of every cell [B, D]; step 0 drew z."""
        starts = range(0, self.n_features_in_, ops.MAX_LATENTS)
        widths = [min(ops.MAX_LATENTS, self.n_features_in_ - start) for start in starts]
        parts = [
            ops.philox_normal(self.seed, "impute", 1 + number, ids, width, draw=draw)
            for number, width in enumerate(widths)
        ]
        return torch.cat(parts, dim=1)

    def _row_blocks(self, data: Observations) -> Iterator[slice]:
        """Rows that are decoded together when results are written."""
        size = min(ROWS_AT_ONCE, max(BLOCK, CELLS_AT_ONCE // data.num_columns // BLOCK * BLOCK))
        return (slice(start, min(start + size, len(data))) for start in range(0, len(data), size))

    def _fill(self, data: Observations, cells: CellsOf, out: Any) -> Any:
        """Write the rows of data to out, with cells(rows) [B, D], in the model's units, in their holes; returns out."""
        dtype = data.output_dtype()
        for block in self._row_blocks(data):
            values, observed = data.read(block)
            filled = self.units_.to_user(cells(block))
            filled = filled.clip(np.finfo(dtype).min, np.finfo(dtype).max).astype(dtype)  # no infinity in float16
            np.copyto(filled, values.astype(dtype, copy=False), where=observed)
            out[block] = filled
            release(out)
        return out

    def _moments(
        self, data: Observations, post: Posterior, draws: int, weighted: bool, rows: slice
    ) -> tuple[Tensor, ...]:
        """reference.PredictiveMoments of the rows, float64, in the model's units."""

        def of_block(x: Tensor, mask: Tensor, mean: Tensor, std: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
            noises = (self._noise(ids, draw) for draw in range(draws))
            return running_moments(self.model_, weighted_draws(self.model_, x, mask, mean, std, noises), weighted)

        return tuple(self._in_blocks(data, post, of_block, rows))

    def predictive(
        self,
        X: Any = None,
        mask: Any = None,
        *,
        n_samples: int | None = None,
        importance_samples: int | None = None,
        posterior: Posterior | None = None,
        **infer: Any,
    ) -> Predictive:
        """Means and standard errors of every cell given the row's observed ones, in the user's units: a Predictive.

        X, mask: new rows, or None for the training rows. n_samples: from so many draws of z ~ q, the row's posterior;
        or importance_samples: from so many, weighted by p(x_observed, z) / q(z), which corrects what q gets wrong as
        far as its draws reach (eqs. 21 to 24; look at ess). Exactly one of them. posterior: of these rows, from infer.
        Other keywords go to infer. Memory is that of the result, whatever the number of draws.
        """
        self._check_fitted()
        if (n_samples is None) == (importance_samples is None):
            raise TypeError(
                "predictive needs n_samples (draws of q) or importance_samples (weighted draws), one of them"
            )
        _check_draws("n_samples", n_samples)
        _check_draws("importance_samples", importance_samples)
        weighted = importance_samples is not None
        draws = importance_samples if n_samples is None else n_samples
        assert draws is not None
        data = self._training_data() if X is None else self._new_rows(X, mask)
        post = self._posterior_of(X, mask, posterior, **infer)
        at_mean, mean, std, std_with_noise = (np.empty((len(data), data.num_columns)) for _ in range(4))
        ess = np.empty(len(data))
        scale = np.where(self.units_.constant, 0.0, self.units_.scale)
        for rows in self._row_blocks(data):
            of_z, variance, noise, effective, _ = (t.numpy() for t in self._moments(data, post, draws, weighted, rows))
            at_mean[rows] = self.units_.to_user(self._decode(post.mean[rows]))
            mean[rows], ess[rows] = self.units_.to_user(of_z), effective
            std[rows], std_with_noise[rows] = scale * np.sqrt(variance), scale * np.sqrt(variance + noise)
        return Predictive(at_mean, mean, std, std_with_noise, ess)

    def embed(self, X: Any = None, mask: Any = None, *, posterior: Posterior | None = None, **infer: Any) -> np.ndarray:
        """Posterior means, float32 [N, T], of new rows or (X=None) of the training rows. Other keywords go to infer."""
        self._check_fitted()
        return self._posterior_of(X, mask, posterior, **infer).mean.numpy()

    def reconstruct(
        self,
        X: Any = None,
        mask: Any = None,
        *,
        posterior: Posterior | None = None,
        up_to_group: int | None = None,
        residual: bool = True,
        **infer: Any,
    ) -> np.ndarray:
        """The decoder's output at the posterior mean for every cell, in the user's units, [N, D].

        up_to_group: use the relays of the first so many groups only; residual: whether to add the row's own residual
        (RVI only, both).
        """
        self._check_fitted()
        post = self._posterior_of(X, mask, posterior, **infer)
        z = post.mean if up_to_group is None and residual else self._partial_mean(post, up_to_group, residual)
        return self.units_.to_user(self._decode(z))

    def _partial_mean(self, posterior: Posterior, up_to_group: int | None, residual: bool) -> Tensor:
        raise TypeError(f"up_to_group and residual belong to RVI's relays; {type(self).__name__} has none")

    def score(
        self,
        X: Any = None,
        mask: Any = None,
        *,
        importance_samples: int | None = None,
        posterior: Posterior | None = None,
        **infer: Any,
    ) -> np.ndarray:
        """The ELBO of every row's observed cells, in nats and in the model's units, float32 [N].

        importance_samples: an int L gives log (1/L) sum of w_l instead, of weights w_l = p(x_observed, z_l) / q(z_l) of
        L draws (eq. 22): in expectation a lower bound of log p(x_observed), the ELBO at L = 1 and higher with every
        further draw.
        """
        self._check_fitted()
        _check_draws("importance_samples", importance_samples)
        post = self._posterior_of(X, mask, posterior, **infer)
        if importance_samples is None and posterior is None and X is not None:
            return post.elbo.numpy()  # infer has just taken it
        return self._bound(self._training_data() if X is None else self._new_rows(X, mask), post, importance_samples)

    def _bound(self, data: Observations, post: Posterior, importance_samples: int | None = None) -> np.ndarray:
        """The ELBO [N], or that of weighted draws."""

        def of_block(x: Tensor, mask: Tensor, mean: Tensor, std: Tensor, ids: Tensor) -> tuple[Tensor]:
            noises = (self._noise(ids, draw) for draw in range(importance_samples or ELBO_DRAWS))
            if importance_samples is not None:
                return (importance_bound(weighted_draws(self.model_, x, mask, mean, std, noises)).float(),)
            total = -ops.gaussian_sample(mean, std.log(), None)[1]
            for noise in noises:
                xhat = self.model_.decoder(mean + std * noise)
                total -= self.model_.likelihood.nll(xhat, x, mask) / ELBO_DRAWS
            return (total,)

        return self._in_blocks(data, post, of_block, slice(0, len(data)))[0].numpy()

    def sample(self, n: int, *, source: str = "prior", noise: bool = False, seed: int | None = None) -> np.ndarray:
        """n new rows [n, D] in the user's units: z from the prior N(0, I), or from the posteriors of random training
        rows.

        noise: add the likelihood's own noise (False gives its mean). seed: default the model's.
        """
        self._check_fitted()
        arguments.positive_int("n", n)
        arguments.one_of("source", source, ("prior", "posterior"))
        seed = self.seed if seed is None else seed
        arguments.seed("seed", seed)
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(n, self.latent_dim_, generator=generator)
        if source == "posterior":
            post = self.posterior_
            rows = torch.randint(len(post), (n,), generator=generator)
            z = post.mean[rows] + post.std[rows] * z
        with torch.no_grad():
            xhat = self.model_.decoder(z.to(self.device_))
            likelihood = self.model_.likelihood
            if noise:
                x = likelihood.draw(xhat, torch.randn(xhat.shape, generator=generator).to(xhat))
            else:
                x = likelihood.mean(xhat)
        return self.units_.to_user(x.cpu().double().numpy())

    # files

    def save(self, dir: str | os.PathLike, *, rows: bool = True, optimizer: bool = False) -> None:
        """Write the model to a folder (safetensors and JSON). rows: with the training rows' parameters; optimizer: with
        the training state, from which an unfinished fit goes on by fit(X, checkpoint_dir=dir, resume=True). X itself is
        never written. The folder holds the old model until the new one is complete.
        """
        self._check_fitted()
        if optimizer and (self._fitted_by is None or not rows):
            why = "rows=True" if not rows else "a fit in this process, without val_cells and rows with nothing observed"
            raise ValueError(f"optimizer=True needs {why}; fit(checkpoint_dir=...) saves the training state of any fit")
        io.save(self, arguments.path("dir", dir), rows=rows, trainer=self._fitted_by if optimizer else None)

    @classmethod
    def load(cls, dir: str | os.PathLike, device: str | torch.device | None = None) -> Self:
        """Read what save wrote, to `device`: by default the saved one, or "auto" where that is not to be had."""
        return io.load(cls, arguments.path("dir", dir), device)


class RowEstimator(Estimator):
    """An estimator whose training rows own parameters: RVI and VAD."""

    row_lr: float | None
    log_std: float

    row_lr_: float

    def _check_arguments(self) -> None:
        super()._check_arguments()
        arguments.number("row_lr", self.row_lr, None)
        arguments.one_of("optimizer_mode", self.optimizer_mode, MODES)
        if not arguments.is_number(self.log_std) or abs(self.log_std) > MAX_LOG_STD:
            raise ValueError(f"log_std must be a number between -{MAX_LOG_STD} and {MAX_LOG_STD}; got {self.log_std!r}")

    def _resolve(self, data: Observations, statistics: ColumnStatistics) -> defaults.Settings:
        auto = super()._resolve(data, statistics)
        by_data = auto.row_lr if self.lr == "auto" else self.lr_
        self.row_lr_ = by_data if self.row_lr is None else float(self.row_lr)
        return auto

    def _row_lr(self) -> float:
        return self.row_lr_

    def _make_posterior(self, num_rows: int) -> RelayPosterior | MeanFieldPosterior:
        raise NotImplementedError

    def _make_model(self, num_rows: int, statistics: ColumnStatistics | None) -> RowModel:
        return RowModel(self._make_posterior(num_rows), self._decoder(), self.likelihood_, self.kl_weight)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        assert isinstance(self.model_, RowModel)
        rows = list(self.model_.posterior.table.parameters())
        return [{"params": rows, "lr": self._row_lr()}, *super()._parameter_groups()]


class RVI(RowEstimator):
    """Relay Variational Inference: a generative model with no encoder, for data with any holes in it.

    Every row i owns q(z|x_i) = N(mu_i, diag(sigma_i^2)); mu_i is a sparse combination of relay vectors shared by all
    rows, plus a residual of its own. "auto" is resolved from the data at fit and stored with a trailing underscore
    (defaults.py).

    latent_dim: T. hidden: the decoder's widths, () for a linear decoder. linear_path: a linear path beside the MLP.
    groups: relays in each group. active: how many of a group a row uses, an int, a share in (0, 1], or one for each
    group. coefficients: "linear" or "softmax" (mixture form). likelihood: Gaussian(scale), Bernoulli() or "auto".
    kl_weight: of the KL term. standardize: zero mean and unit variance columns inside. lr: of decoder and relays;
    row_lr: of the rows (None: lr, or by the data where lr is). schedule: "constant" or "cosine" (to 0). weight_decay:
    of decoder and relays, decoupled. batch_size: rows a step. epochs: passes over the rows. optimizer_mode: "dense" or
    "lazy" (see optim.RowAdam). activation: of the decoder. relay_std, coef_std, residual_std: of the normal initial
    values of relays, coefficients and residuals. log_std: its initial value. keep_empty_columns: let columns with
    nothing observed pass; they are filled with 0. seed: of everything random. device: "auto", "cpu", "cuda", ...
    progress: a bar for work longer than two seconds, and a line on stderr when loops are compiled for the CPU.
    """

    groups: Sequence[int]
    active: int | float | Sequence[int | float]
    coefficients: str
    relay_std: float
    coef_std: float
    residual_std: float

    def __init__(
        self,
        latent_dim: int | str = "auto",
        hidden: Sequence[int] | str = "auto",
        linear_path: bool | str = "auto",
        groups: Sequence[int] = (25, 50, 100),
        active: int | float | Sequence[int | float] = 0.5,
        likelihood: Likelihood | str = "auto",
        kl_weight: float = 1.0,
        standardize: bool | str = "auto",
        lr: float | str = "auto",
        row_lr: float | None = None,
        batch_size: int | str = "auto",
        epochs: int | str = "auto",
        optimizer_mode: str = "dense",
        seed: int = 0,
        device: str | torch.device = "auto",
        progress: bool = True,
        *,
        schedule: str = "auto",
        weight_decay: float | str = "auto",
        coefficients: str = "linear",
        activation: str = "auto",
        relay_std: float = 1.0,
        coef_std: float = 0.1,
        residual_std: float = 0.01,
        log_std: float = -2.0,
        keep_empty_columns: bool = False,
        **unknown: Any,
    ):
        self._set_arguments(locals())

    @classmethod
    def paper(cls, **kw: Any) -> Self:
        """The paper's settings (docs/math.md); keywords override them."""
        return cls(**{**defaults.PAPER, "likelihood": Gaussian(defaults.PAPER_SCALE), **kw})

    def _check_arguments(self) -> None:
        super()._check_arguments()
        arguments.widths("groups", self.groups)
        ops.active_counts(ops.check_groups(arguments.plain(self.groups)), arguments.plain(self.active))
        arguments.one_of("coefficients", self.coefficients, ops.COEFFICIENTS)
        for name in ("relay_std", "coef_std", "residual_std"):
            arguments.number(name, getattr(self, name))

    def _make_posterior(self, num_rows: int) -> RelayPosterior:
        return RelayPosterior(
            num_rows,
            self.latent_dim_,
            arguments.plain(self.groups),
            arguments.plain(self.active),
            coefficients=self.coefficients,
            relay_std=self.relay_std,
            coef_std=self.coef_std,
            residual_std=self.residual_std,
            log_std=self.log_std,
            seed=self.seed,
        )

    @torch.no_grad()
    def _partial_mean(self, posterior: Posterior, up_to_group: int | None, residual: bool) -> Tensor:
        assert isinstance(self.model_, RowModel) and posterior.parameters is not None
        relays = self.model_.posterior
        assert isinstance(relays, RelayPosterior)
        return relays.partial_mean_of(posterior.parameters.to(self.device_), up_to_group, residual).cpu()


class VAD(RowEstimator):
    """The variational auto-decoder: every row owns a mean-field posterior and shares nothing. RVI without relays.

    Arguments as in RVI.
    """

    def __init__(
        self,
        latent_dim: int | str = "auto",
        hidden: Sequence[int] | str = "auto",
        linear_path: bool | str = "auto",
        likelihood: Likelihood | str = "auto",
        kl_weight: float = 1.0,
        standardize: bool | str = "auto",
        lr: float | str = "auto",
        row_lr: float | None = None,
        batch_size: int | str = "auto",
        epochs: int | str = "auto",
        optimizer_mode: str = "dense",
        seed: int = 0,
        device: str | torch.device = "auto",
        progress: bool = True,
        *,
        schedule: str = "auto",
        weight_decay: float | str = "auto",
        activation: str = "auto",
        log_std: float = -2.0,
        keep_empty_columns: bool = False,
        **unknown: Any,
    ):
        self._set_arguments(locals())

    def _make_posterior(self, num_rows: int) -> MeanFieldPosterior:
        return MeanFieldPosterior(num_rows, self.latent_dim_, log_std=self.log_std, seed=self.seed)


class VAE(Estimator):
    """A variational autoencoder with the same decoder: its encoder sees the row with its holes filled.

    missing: what the encoder sees in a hole: "zero", "mean" (the column's), or "zero+mask" (0, and the mask as further
    inputs). The encoder's widths are the decoder's, reversed. Other arguments as in RVI.
    """

    missing: str

    def __init__(
        self,
        latent_dim: int | str = "auto",
        hidden: Sequence[int] | str = "auto",
        linear_path: bool | str = "auto",
        likelihood: Likelihood | str = "auto",
        kl_weight: float = 1.0,
        standardize: bool | str = "auto",
        lr: float | str = "auto",
        batch_size: int | str = "auto",
        epochs: int | str = "auto",
        seed: int = 0,
        device: str | torch.device = "auto",
        progress: bool = True,
        *,
        missing: str = "zero+mask",
        schedule: str = "auto",
        weight_decay: float | str = "auto",
        activation: str = "auto",
        keep_empty_columns: bool = False,
        **unknown: Any,
    ):
        self._set_arguments(locals())

    def _check_arguments(self) -> None:
        super()._check_arguments()
        arguments.one_of("missing", self.missing, Encoder.MISSING)

    def _make_model(self, num_rows: int, statistics: ColumnStatistics | None) -> EncoderModel:
        mean = np.zeros(self.n_features_in_) if statistics is None else statistics.mean
        model_mean = torch.tensor((mean - self.units_.shift) / self.units_.scale, dtype=torch.float32)
        encoder = Encoder(model_mean, self.latent_dim_, self.hidden_[::-1], self.activation_, self.missing)
        return EncoderModel(encoder, self._decoder(), self.likelihood_, self.kl_weight, self.seed)

    def infer(
        self,
        X: Any,
        mask: Any = None,
        *,
        steps: int = 250,
        lr: float | None = None,
        protocol: str = "row",
        row_ids: Any = None,
        start: str = "linear",
        stop_early: bool = True,
    ) -> Posterior:
        """The posterior of new rows, by one pass of the encoder; steps, lr, protocol, start and stop_early have no
        effect."""
        data = self._new_rows(X, mask)
        self._check_inference(steps, lr, protocol, start, stop_early)
        ids = data.row_ids() if row_ids is None else _as_row_ids(row_ids, len(data))
        posterior = self._encode(data, ids)
        posterior.elbo = torch.from_numpy(self._bound(data, posterior))
        return posterior

    def _encode(self, data: Observations, ids: Tensor) -> Posterior:
        model = self.model_
        assert isinstance(model, EncoderModel)

        @torch.no_grad()
        def encode(block: slice) -> list[Tensor]:
            x, mask = self.units_.to_model(*data.read(block))
            encoded = model.encoder(padded_block(x).to(self.device_), padded_block(mask).to(self.device_))
            return [t[: len(x)].cpu() for t in encoded]

        mean, log_std = (torch.cat(t) for t in zip(*map_blocks(encode, len(data)), strict=True))
        unknown = torch.full((len(mean),), float("nan"))
        return Posterior(mean, log_std.exp(), unknown, torch.ones(len(mean), dtype=torch.bool), ids)

    def _training_posterior(self) -> Posterior:
        data = self._training_data()
        return self._encode(data, torch.arange(len(data)))


def _argument_defaults(cls: type[Estimator]) -> dict[str, Any]:
    parameters = inspect.signature(cls.__init__).parameters
    return {name: p.default for name, p in parameters.items() if name not in ("self", "unknown")}


def _unknown_argument(cls: type[Estimator], name: str) -> str:
    known = _argument_defaults(cls)
    return f"{cls.__name__} has no argument {name!r}; {_nearest(name, known, known)}"


def _unknown_result_argument(name: str) -> str:
    """Of a method that gives the keywords which are not its own to infer."""
    methods = (Estimator.impute, Estimator.predictive, Estimator.reconstruct, Estimator.score)
    own = sorted({parameter for method in methods for parameter in inspect.signature(method).parameters})
    known = INFER_ARGUMENTS if name in own else (*INFER_ARGUMENTS, *own)  # of another method
    return f"infer has no argument {name!r}; {_nearest(name, known, INFER_ARGUMENTS)}"


def _nearest(name: str, known: Iterable[str], shown: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(shown)}"


def _other_columns(names: list[str] | None, fitted: list[str] | None) -> str:
    """Which columns are lacking or too many, where both sides have names."""
    if names is None or fitted is None:
        return "; give the columns of the fit, in their order"
    lists = {"lacks": set(fitted) - set(names), "also has": set(names) - set(fitted)}
    differences = [f"{verb} {_listed(columns)}" for verb, columns in lists.items() if columns]
    difference = " and ".join(differences) or "has names twice"
    return f": it {difference}; give the columns of feature_names_in_, in their order"


def _listed(columns: set[str]) -> str:
    """The first few of them."""
    shown = ", ".join(map(repr, sorted(columns)[:NAMES_SHOWN]))
    return f"{shown} and {len(columns) - NAMES_SHOWN} more" if len(columns) > NAMES_SHOWN else shown


def _empty_like(data: Observations) -> np.ndarray:
    return np.empty((len(data), data.num_columns), dtype=data.output_dtype())


def _check_draws(name: str, draws: int | None) -> None:
    arguments.positive_int(name, draws, None)
    if draws is not None and draws > MAX_DRAWS:
        raise ValueError(f"{name} must be at most {MAX_DRAWS:,}; got {draws:,}")


def _check_out(out: Any, data: Observations, n_samples: int | None) -> None:
    if n_samples is not None:
        raise TypeError("out goes with n_samples=None; drop one of them")
    if not all(hasattr(out, name) for name in ("shape", "dtype", "__setitem__")):
        raise TypeError(f"out must be an array, memmap, h5py or zarr dataset to write to; got {type(out).__name__}")
    shape, dtype = shape_and_dtype(out, "out")
    if shape != data.values.shape or not np.can_cast(data.output_dtype(), dtype):
        raise ValueError(
            f"out must be {data.output_dtype()} {list(data.values.shape)}, to hold X's cells exactly; "
            f"got {dtype} {list(shape)}"
        )


def _as_row_ids(row_ids: Any, num_rows: int) -> Tensor:
    ids = row_ids.cpu() if isinstance(row_ids, Tensor) else np.asarray(row_ids)
    if tuple(ids.shape) != (num_rows,) or str(ids.dtype).removeprefix("torch.") != "int64":
        raise ValueError(f"row_ids must be int64 [{num_rows}], one a row of X; got {ids.dtype} {list(ids.shape)}")
    return torch.as_tensor(ids)
