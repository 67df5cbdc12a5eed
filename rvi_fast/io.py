"""Models on disk: a folder with config.json and the safetensors file that it names; docs/checkpoints.md has the format.

A checkpoint also keeps the one before it, as previous.json and the file that this names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
import uuid
import warnings
import zlib
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
CONFIG, PREVIOUS = "config.json", "previous.json"
TENSORS = "tensors-*.safetensors"
STAGING = ".writing-"  # the folder, inside the model's, in which files are made
READ_BYTES = 1 << 24


class DamagedError(ValueError):
    """A part of a saved model is missing, or is not what save wrote."""

    def __init__(self, what: str):
        super().__init__(f"{what}; restore it from a backup, or fit again")
        self.what = what


def save(estimator: Estimator, dir: Any, *, rows: bool, trainer: Trainer | None = None) -> None:
    """Write the model, and with `trainer` all that training needs to go on to the same bits.

    Files are made in a folder of their own and moved from there, config.json last: a reader, or a kill at any moment,
    sees the old model or the new one. What a killed run has left behind is removed.
    """
    folder = make_folder(dir)
    _remove_leftovers(folder)
    tensors = _model_tensors(estimator, rows and trainer is None)
    config = _config(estimator, rows, trainer)
    if trainer is not None:
        tensors |= _training_tensors(estimator, trainer)
    try:
        with tempfile.TemporaryDirectory(prefix=STAGING, dir=folder, ignore_cleanup_errors=True) as staging:
            _write(folder, Path(staging), config, tensors)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).rpartition(": ")[2]  # of the system
        raise OSError(
            f"{folder} cannot be written to ({reason}) and is as before; free space there, or choose another folder"
        ) from None
    finally:
        _remove_leftovers(folder)


def checkpoint(estimator: Estimator, dir: Any, trainer: Trainer) -> None:
    """Save the state of training; where that fails, warn: hours of training are worth more than one checkpoint."""
    try:
        save(estimator, dir, rows=True, trainer=trainer)
    except OSError as error:
        warnings.warn(f"step {trainer.progress.step} has no checkpoint: {error}; the fit goes on", stacklevel=2)


def make_folder(dir: Any) -> Path:
    """The folder to write a model to, made if it is not there; one sentence if it holds something else."""
    folder = writable_folder(dir)
    if (folder / CONFIG).exists() and not any(folder.glob(TENSORS)):
        raise FileExistsError(f"{folder} holds a {CONFIG} but no model of rvi_fast; choose another folder")
    return folder


def writable_folder(dir: Any) -> Path:
    """A folder to write to, made if it is not there; one sentence if it cannot be."""
    folder = Path(dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(prefix=STAGING, dir=folder).cleanup()
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{folder} is a file, or lies under one; give a folder") from None
    except OSError as error:
        raise OSError(f"{folder} cannot be written to ({error.strerror}); choose another folder") from None
    return folder


def _write(folder: Path, staging: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Make both files in `staging` and move them to `folder`."""
    made = staging / TENSORS.replace("*", uuid.uuid4().hex[:12])
    save_file({name: t.contiguous() for name, t in tensors.items()}, made)
    config["tensors"] = {"file": made.name, "bytes": made.stat().st_size, "crc32": _file_checksum(made)}
    config["crc32"] = _checksum(config)
    (staging / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    shutil.copymode(staging / CONFIG, made)  # safetensors makes files that only their owner can read
    _sync(made)
    _sync(staging / CONFIG)
    os.replace(made, folder / made.name)
    if "training" not in config:
        (folder / PREVIOUS).unlink(missing_ok=True)
    elif _named_tensors(folder / CONFIG):
        shutil.copyfile(folder / CONFIG, staging / PREVIOUS)
        _sync(staging / PREVIOUS)
        os.replace(staging / PREVIOUS, folder / PREVIOUS)
    _sync(folder)  # names first, then the file that relies on them
    os.replace(staging / CONFIG, folder / CONFIG)
    _sync(folder)


def _sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk, to be there after a power failure too."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left, and tensors that no config names; nothing if a config cannot be read."""
    for staging in folder.glob(STAGING + "*"):
        shutil.rmtree(staging, ignore_errors=True)
    named = [_named_tensors(folder / name) for name in (CONFIG, PREVIOUS) if (folder / name).exists()]
    if None in named:
        return
    for tensors in folder.glob(TENSORS):
        if tensors.name not in named:
            with contextlib.suppress(OSError):
                tensors.unlink()


def _named_tensors(path: Path) -> str | None:
    """The tensor file that a config names; None where there is no sound config."""
    try:
        return _read_config(path)["tensors"]["file"]
    except (ValueError, OSError):
        return None


def _file_checksum(path: Path) -> str:
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(READ_BYTES):
            checksum = zlib.crc32(part, checksum)
    return f"{checksum:08x}"


def _checksum(config: dict[str, Any]) -> str:
    """Of all of config but its own checksum, however the JSON is spaced."""
    rest = {name: value for name, value in config.items() if name != "crc32"}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"


def _config(estimator: Estimator, rows: bool, trainer: Trainer | None = None) -> dict[str, Any]:
    params = {name: arguments.plain(value) for name, value in estimator.get_params().items()}
    params["likelihood"] = "auto" if isinstance(params["likelihood"], str) else _likelihood_config(params["likelihood"])
    params["device"] = str(params["device"])
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "class": type(estimator).__name__,
        "params": params,
        "resolved": {name: getattr(estimator, name + "_") for name in _resolved_names(estimator)},
        "likelihood": _likelihood_config(estimator.likelihood_),
        "columns": {"count": estimator.n_features_in_, "names": estimator.feature_names_in_},
        "num_rows": estimator.n_rows_ if rows else None,
        "history": estimator.history_,
        "n_steps": estimator.n_steps_ if trainer is None else trainer.progress.step,
        "stopped": estimator.stopped_ if trainer is None else trainer.progress.stopped,
        **({} if trainer is None else {"training": _training_config(estimator, trainer)}),
    }


def _resolved_names(estimator: Estimator) -> tuple[str, ...]:
    return (*defaults.AUTO, "row_lr") if hasattr(estimator, "row_lr_") else defaults.AUTO


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
    return any((Path(dir) / name).exists() for name in (CONFIG, PREVIOUS))


def read(dir: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config and tensors of a folder; one clear sentence where it is not a whole model of this format.

    Where the newer of two checkpoints is damaged, the older one, with a warning.
    """
    return _read(dir)[1:]


def read_config(dir: Any) -> dict[str, Any]:
    """What read gives first, without the tensors; they are not looked at."""
    folder = Path(dir)
    if not has_checkpoint(folder):
        raise FileNotFoundError(f"{folder} holds no model: {CONFIG} is missing; give the folder that save wrote")
    return _read_config(folder / CONFIG)


def _read(dir: Any) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """CONFIG or PREVIOUS, whichever was read, its content and its tensors."""
    folder = Path(dir)
    try:
        config = read_config(folder)
        return CONFIG, config, _read_tensors(folder, config)
    except DamagedError as error:
        if not (folder / PREVIOUS).exists():
            raise
        newest = error
    try:
        config = _read_config(folder / PREVIOUS)
        tensors = _read_tensors(folder, config)
    except DamagedError as error:
        raise DamagedError(f"{newest.what}, and {error.what}") from None
    warnings.warn(f"{newest.what}; the checkpoint before it, of step {config['n_steps']}, is used", stacklevel=4)
    return PREVIOUS, config, tensors


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path} is not readable as JSON ({error})") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by rvi_fast; give the folder that save wrote")
    version = config.get("version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, but this rvi_fast reads up to {FORMAT_VERSION}; upgrade rvi_fast"
        )
    if config.get("crc32") != _checksum(config):
        raise DamagedError(f"{path} is damaged: its content does not have the checksum that it names")
    return config


def _read_tensors(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    expected = config["tensors"]
    path = folder / expected["file"]
    if not path.is_file():
        raise DamagedError(f"{path} is missing")
    if path.stat().st_size != expected["bytes"]:
        raise DamagedError(f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}")
    if _file_checksum(path) != expected["crc32"]:
        raise DamagedError(f"{path} is damaged: its content does not have the checksum that was saved with it")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict


def load(cls: type[Estimator], dir: Any, device: Any = None) -> Any:
    """The estimator that `save` wrote to dir, on the device it had or on the given one."""
    config, tensors = read(dir)
    if config["class"] != cls.__name__:
        article = "an" if config["class"] == "RVI" else "a"
        raise ValueError(f"{dir} holds {article} {config['class']}; load it with rvi_fast.{config['class']}.load")
    params = dict(config["params"])
    params["likelihood"] = _likelihood_from(params["likelihood"])
    for name in ("hidden", "groups", "active"):
        if isinstance(params.get(name), list):
            params[name] = tuple(params[name])
    estimator = cls(**params)
    for name, value in config["resolved"].items():
        setattr(estimator, name + "_", tuple(value) if isinstance(value, list) else value)
    if "row_lr" in params and "row_lr" not in config["resolved"]:  # saved before rows had a rate of their own by data
        setattr(estimator, "row_lr_", estimator.lr_ if params["row_lr"] is None else params["row_lr"])  # noqa: B010
    estimator.n_features_in_ = config["columns"]["count"]
    estimator.feature_names_in_ = config["columns"]["names"]
    estimator.units_ = _units_from(tensors)
    estimator.likelihood_ = _likelihood_from(config["likelihood"])
    estimator.likelihood_.bind(estimator.n_features_in_)
    if device is not None:
        estimator.device = device
        estimator._check_arguments()
    try:
        estimator._resolve_device()
    except ValueError:
        if device is not None:
            raise
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
    name, config, tensors = _read(dir)
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
    if name == PREVIOUS:
        os.replace(Path(dir) / PREVIOUS, Path(dir) / CONFIG)  # the next checkpoint replaces the damaged one, not this


def _check_same_run(dir: Any, config: dict[str, Any], estimator: Estimator, trainer: Trainer) -> None:
    ours, theirs = (_identity(c) for c in (json.loads(json.dumps(_config(estimator, True, trainer))), config))
    for name in theirs | ours:
        if ours.get(name) == theirs.get(name):
            continue
        if name == "data":
            raise ValueError(
                f"the checkpoint in {dir} belongs to a fit with data other than this X and mask; give the X and mask "
                "of that fit to go on with it, or use another checkpoint_dir"
            )
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
        column.clock.restore(steps, index, tensors.get(f"rows.history.{number}"))
