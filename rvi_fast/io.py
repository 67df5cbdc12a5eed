"""Models on disk: one folder with config.json and one safetensors file that it names."""

from __future__ import annotations

import dataclasses
import json
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import arguments, defaults, likelihoods
from .clock import AdamClock
from .model import LatentModel, RowModel
from .nn import RowTable
from .observations import ColumnUnits
from .reference import AdamHyper
from .row_store import Movement
from .train import Progress

if TYPE_CHECKING:
    from .estimators import Estimator
    from .train import Trainer

FORMAT, FORMAT_VERSION = "rvi_fast", 1
CONFIG = "config.json"


def save(estimator: Estimator, dir: Any, *, rows: bool, trainer: Trainer | None = None) -> None:
    """Write the model, and with `trainer` all that training needs to go on to the same bits.

    The tensors go to a file of a new name, and config.json, which names it, is replaced last and in one piece: a
    reader, or a kill at any moment, sees the old model or the new one.
    """
    folder = make_folder(dir)
    tensors = _model_tensors(estimator, rows and trainer is None)
    config = _config(estimator, rows, trainer)
    if trainer is not None:
        tensors |= _training_tensors(estimator, trainer)
    config["tensors"] = f"tensors-{uuid.uuid4().hex[:12]}.safetensors"
    path = folder / config["tensors"]
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, path)
        _replace_text(folder / CONFIG, json.dumps(config, indent=1))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    for old in folder.glob("tensors-*.safetensors"):
        if old != path:
            old.unlink(missing_ok=True)


def make_folder(dir: Any) -> Path:
    """The folder, made if it is not there; one sentence if it cannot be."""
    folder = Path(dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{folder} is a file, or lies under one; give a folder") from None
    return folder


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _config(estimator: Estimator, rows: bool, trainer: Trainer | None = None) -> dict[str, Any]:
    params = {name: arguments.plain(value) for name, value in estimator.get_params().items()}
    params["likelihood"] = "auto" if isinstance(params["likelihood"], str) else _likelihood_config(params["likelihood"])
    params["device"] = str(params["device"])
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "class": type(estimator).__name__,
        "params": params,
        "resolved": {name: getattr(estimator, name + "_") for name in defaults.AUTO},
        "likelihood": _likelihood_config(estimator.likelihood_),
        "columns": {"count": estimator.n_features_in_, "names": estimator.feature_names_in_},
        "num_rows": estimator.n_rows_ if rows else None,
        "history": estimator.history_,
        "n_steps": estimator.n_steps_ if trainer is None else trainer.progress.step,
        "stopped": estimator.stopped_ if trainer is None else trainer.progress.stopped,
        **({} if trainer is None else {"training": _training_config(estimator, trainer)}),
    }


def _likelihood_config(likelihood: likelihoods.Likelihood) -> dict[str, Any]:
    kind = next((name for name, cls in likelihoods.KINDS.items() if type(likelihood) is cls), None)
    if kind is None:
        known = " and ".join(cls.__name__ for cls in likelihoods.KINDS.values())
        raise TypeError(f"a model with likelihood {type(likelihood).__name__} cannot be saved; {known} can")
    return {"kind": kind, **likelihood.settings()}


def _likelihood_from(config: Any) -> Any:
    if isinstance(config, str):
        return config
    settings = dict(config)
    return likelihoods.KINDS[settings.pop("kind")](**settings)


def _model_tensors(estimator: Estimator, rows: bool) -> dict[str, Tensor]:
    model = estimator.model_
    state = model.state_dict() if rows else _without_rows(model)
    tensors = {f"model.{name}": t.detach().cpu() for name, t in state.items()}
    units = estimator.units_
    tensors |= {f"units.{f.name}": torch.from_numpy(getattr(units, f.name)) for f in dataclasses.fields(units)}
    return tensors


def _without_rows(model: LatentModel) -> dict[str, Tensor]:
    """state_dict without the table of rows, of which it would make a copy."""
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, RowTable):
            module._save_to_state_dict(state, f"{name}." if name else "", keep_vars=False)
    return state


def has_checkpoint(dir: Any) -> bool:
    return (Path(dir) / CONFIG).exists()


def read(dir: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config and tensors of a folder; one clear sentence where it is not a whole model of this format."""
    folder = Path(dir)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{folder} holds no model: {CONFIG} is missing; give the folder that save wrote"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / CONFIG} is not readable as JSON ({error}); restore it from a backup") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{folder / CONFIG} was not written by rvi_fast; give the folder that save wrote")
    if not isinstance(config.get("version"), int) or not isinstance(config.get("params"), dict):
        raise ValueError(f"{folder / CONFIG} is damaged: version or params is missing; restore it from a backup")
    if config["version"] > FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format version {config['version']}, but this rvi_fast reads up to {FORMAT_VERSION}; "
            "upgrade rvi_fast"
        )
    try:
        with safe_open(folder / config["tensors"], framework="pt") as file:
            return config, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(
            f"{folder / config['tensors']} is missing or damaged ({error}); restore it from a backup"
        ) from None


def load(cls: type[Estimator], dir: Any) -> Any:
    """The estimator that `save` wrote to dir."""
    config, tensors = read(dir)
    if config["class"] != cls.__name__:
        raise ValueError(f"{dir} holds a {config['class']}; load it with rvi_fast.{config['class']}.load")
    params = dict(config["params"])
    params["likelihood"] = _likelihood_from(params["likelihood"])
    for name in ("hidden", "groups", "active"):
        if isinstance(params.get(name), list):
            params[name] = tuple(params[name])
    estimator = cls(**params)
    for name, value in config["resolved"].items():
        setattr(estimator, name + "_", tuple(value) if isinstance(value, list) else value)
    estimator.n_features_in_ = config["columns"]["count"]
    estimator.feature_names_in_ = config["columns"]["names"]
    estimator.units_ = _units_from(tensors)
    estimator.likelihood_ = _likelihood_from(config["likelihood"])
    estimator.likelihood_.bind(estimator.n_features_in_)
    try:
        estimator._resolve_device()
    except ValueError:
        estimator.device = "auto"
        estimator._resolve_device()
    estimator._build(config["num_rows"] or 1, None)
    _load_model(estimator, tensors, with_rows=config["num_rows"] is not None and "training" not in config)
    if isinstance(estimator.model_, RowModel) and "training" in config:
        _load_rows(estimator.model_, config["training"]["rows"], tensors)
    estimator.n_rows_ = config["num_rows"]
    estimator.history_ = config["history"]
    estimator.n_steps_, estimator.stopped_ = config["n_steps"], config["stopped"]
    estimator.model_.eval()
    return estimator


def _units_from(tensors: dict[str, Tensor]) -> ColumnUnits:
    return ColumnUnits(**{f.name: tensors[f"units.{f.name}"].numpy() for f in dataclasses.fields(ColumnUnits)})


def _load_model(estimator: Estimator, tensors: dict[str, Tensor], with_rows: bool) -> None:
    state = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    try:
        missing, unexpected = estimator.model_.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"the saved tensors do not fit the saved settings: {error}") from None
    missing = [name for name in missing if with_rows or not name.startswith("posterior.table.")]
    if missing or unexpected:
        raise ValueError(f"the saved tensors do not fit the saved settings: {', '.join([*missing, *unexpected])}")


# training state: what a resumed run needs to end with the same bits


def _training_config(estimator: Estimator, trainer: Trainer) -> dict[str, Any]:
    config = dataclasses.asdict(trainer.progress)
    config["plan"] = {k: v for k, v in dataclasses.asdict(trainer.plan).items() if k != "device"}
    config["data"] = trainer.data.fingerprint
    config["val_cells"] = 0.0 if trainer.hidden is None else trainer.hidden.share
    if trainer.best is not None:
        config["best"] = {"val_mse": trainer.best[0], "epoch": trainer.best[1]}
    if isinstance(estimator.model_, RowModel):
        store = estimator.model_.posterior.table.store
        config["rows"] = {
            "modes": {str(i): mode for i, mode in store.modes.items()},
            "moving": {str(i): [movement.group, *movement.hyper] for i, movement in store.moving.items()},
            "steps": store.steps,
            "clocks": [[column.clock.steps, column.clock.index] for column in store.columns],
        }
    return config


def _training_tensors(estimator: Estimator, trainer: Trainer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for number, state in torch.optim.Optimizer.state_dict(trainer.optimizer)["state"].items():
        tensors |= {f"adam.{number}.{name}": t for name, t in state.items()}
    if trainer.best is not None:
        tensors |= {f"best.{name}": t for name, t in trainer.best[2].items()}
    if isinstance(estimator.model_, RowModel):
        store = estimator.model_.posterior.table.store
        tensors |= {"rows.values": store.values, "rows.last": store.last}
        for number, column in enumerate(store.columns):
            if isinstance(column.clock, AdamClock):
                tensors[f"rows.history.{number}"] = column.clock.history
    return {name: t.detach().cpu() for name, t in tensors.items()}


def load_training_state(dir: Any, estimator: Estimator, trainer: Trainer) -> None:
    """Put estimator and trainer where the checkpoint in dir stopped; raise if it belongs to other settings or data."""
    config, tensors = read(dir)
    training = config.get("training")
    if training is None:
        raise ValueError(f"{dir} holds a finished model, not a checkpoint; fit without resume, or into another folder")
    _check_same_run(dir, config, estimator, trainer)
    _load_model(estimator, tensors, with_rows=False)
    trainer.progress = Progress(**{field.name: training[field.name] for field in dataclasses.fields(Progress)})
    if "best" in training:
        state = {name.removeprefix("best."): t for name, t in tensors.items() if name.startswith("best.")}
        trainer.best = (training["best"]["val_mse"], training["best"]["epoch"], state)
    _load_ordinary_moments(trainer, tensors)
    if isinstance(estimator.model_, RowModel):
        _load_rows(estimator.model_, training["rows"], tensors)


def _check_same_run(dir: Any, config: dict[str, Any], estimator: Estimator, trainer: Trainer) -> None:
    ours, theirs = (_identity(c) for c in (json.loads(json.dumps(_config(estimator, True, trainer))), config))
    for name in theirs | ours:
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"the checkpoint in {dir} belongs to a fit with {name} {theirs.get(name)!r}, not {ours.get(name)!r}; "
                "use another checkpoint_dir"
            )


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for a run to go on from a checkpoint."""
    params = {name: value for name, value in config["params"].items() if name not in ("progress", "device")}
    training = {name: config["training"][name] for name in ("data", "val_cells")}
    settled = {"class": config["class"], "rows": config["num_rows"]}
    training["resolved settings"] = config["resolved"]
    return settled | params | config["training"]["plan"] | training


def _load_ordinary_moments(trainer: Trainer, tensors: dict[str, Tensor]) -> None:
    params = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    for name, t in tensors.items():
        kind, _, rest = name.partition(".")
        number, _, field = rest.partition(".")
        if kind == "adam" and number.isdigit():
            p = params[int(number)]
            trainer.optimizer.state[p][field] = t.clone() if field == "step" else t.to(p.device)


def _load_rows(model: RowModel, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    store = model.posterior.table.store
    store.values.copy_(tensors["rows.values"])
    store.last.copy_(tensors["rows.last"])
    moving = {int(i): Movement(int(m[0]), AdamHyper(*m[1:])) for i, m in config["moving"].items()}
    store.modes = {int(i): mode for i, mode in config["modes"].items()}
    store.restart(moving, config["steps"])
    for number, (column, (steps, index)) in enumerate(zip(store.columns, config["clocks"], strict=True)):
        column.clock.steps, column.clock.index = steps, index
        if isinstance(column.clock, AdamClock):
            column.clock.history = tensors[f"rows.history.{number}"].to(store.values.device)
