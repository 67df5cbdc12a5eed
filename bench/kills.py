"""Kill fits and saves with SIGKILL, let them go on, and compare the end with a run that was never killed.

    python -m rvi_fast.bench.kills --kills 50

A kill falls at a random moment of a fit with checkpoints, or of one of its writes, or a random moment of a loop that
saves three models in turn. After each, no file may be partial under its final name, at most one interval of a fit may
be lost, and the folder of the models must hold the last one saved or the one after it. Every fit is resumed until it is
done, and its last checkpoint must have the bits of the run that was never killed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from rvi_fast import RVI, io
from rvi_fast.train import Trainer

ROWS, COLUMNS, BATCH = 300, 6, 32
EPOCHS = 10  # of 10 steps
EVERY = 3  # steps from checkpoint to checkpoint
MODELS = 3  # saved in turn
DELAY_S = 0.02  # a kill comes up to so long after the step, save or begin of a write that was drawn for it
SETTINGS: dict[str, Any] = dict(latent_dim=8, hidden=(16,), groups=(8, 8), batch_size=BATCH, progress=False)

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["rvi_fast"])  # a process then starts in milliseconds


@dataclasses.dataclass
class Tally:
    """What the kills did."""

    kills: Counter[str] = dataclasses.field(default_factory=Counter)  # "fit", "write" (of a fit) and "save"
    in_write: int = 0  # kills that left an unfinished write behind
    fits: int = 0
    most_lost: int = 0  # steps

    def in_fits(self) -> int:
        return self.kills["fit"] + self.kills["write"]


# what is killed


def table() -> np.ndarray:
    """Of rank 2 with holes, so that the error on hidden cells falls and no fit stops early."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(ROWS, 2)) @ rng.normal(size=(2, COLUMNS))
    return np.where(rng.random(X.shape) < 0.2, np.nan, X)


def fit(folder: Path, steps: Any = None, stop_at: int | None = None, die_at: int | None = None) -> None:
    """Go on with the fit in folder. steps: shared, counts its steps. die_at: at which use of the folder to die."""
    step = Trainer.step

    def counted(self: Trainer, *batch: Any) -> None:
        if self.progress.step == 0:
            log_state(folder, self)
        step(self, *batch)
        if self.progress.step == 1:
            log_state(folder, self)
        if steps is not None:
            steps.value = self.progress.step

    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process would leave behind
    Trainer.step = counted  # type: ignore[assignment, method-assign]
    if die_at is not None:
        die_in(folder, die_at)
    stop = [lambda model, logs: logs["step"] == stop_at]
    RVI(**SETTINGS, epochs=EPOCHS).fit(
        table(), val_cells=0.1, checkpoint_dir=folder, checkpoint_every=EVERY, resume=True, callbacks=stop
    )


def log_state(folder: Path, trainer: Trainer) -> None:
    """Append to a file beside folder where a fit stands, so that two which end differently show where they parted."""
    crcs = {name: zlib.crc32(bits(value)) for name, value in trainer.model.state_dict().items()}
    with Path(f"{folder}.log").open("a") as file:
        print(trainer.progress.step, trainer.progress.sums, crcs, file=file)


def save_in_turn(folder: Path, saves: Any) -> None:
    tqdm.set_lock(threading.RLock())
    models = [model(seed) for seed in range(MODELS)]
    for number in itertools.count():
        models[number % MODELS].save(folder)
        saves.value = number + 1


def model(seed: int) -> RVI:
    return RVI(**SETTINGS, epochs=1, seed=seed).fit(table())


def die_in(folder: Path, count: int) -> None:
    """Kill this process right before it opens, makes, renames or removes something in folder for the count-th time."""
    left = itertools.count(count - 1, -1)

    def hook(event: str, args: tuple) -> None:
        inside = bool(args) and isinstance(args[0], str | Path) and str(args[0]).startswith(str(folder))
        if inside and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


# killing it


def start(target: Callable, *args: Any) -> BaseProcess:
    process = processes.Process(target=target, args=args)
    process.start()
    return process


def finish(target: Callable, *args: Any) -> None:
    process = start(target, *args)
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{target.__name__} ended with exit code {process.exitcode}")


def writing(folder: Path) -> bool:
    return any(folder.glob(io.STAGING + "*"))


def reached(counter: Any, count: int, aim: str, folder: Path) -> bool:
    """Whether so many steps or saves are done and, where a write is the aim, one has begun."""
    return counter.value >= count and (aim != "write" or writing(folder))


def kill(process: BaseProcess, ready: Callable[[], bool], delay_s: float) -> bool:
    """SIGKILL delay_s seconds after ready() is true; False if the process was done before."""
    while process.is_alive() and not ready():
        time.sleep(1e-4)
    process.join(delay_s)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def check_files(folder: Path) -> None:
    """Raise unless all that has a final name is whole, and the newest state can be read without falling back."""
    for path in folder.glob("*.json"):
        json.loads(path.read_text())
    for path in folder.glob(io.TENSORS):
        load_file(path)
    if io.has_checkpoint(folder):
        with warnings.catch_warnings(action="error"):
            io.read(folder)


def step_of(folder: Path) -> int:
    return io.read_config(folder)["n_steps"] if io.has_checkpoint(folder) else 0


def same_end(folder: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same bits, times and file names apart."""
    (config, tensors), (config2, tensors2) = io.read(folder), io.read(other)
    for each in (config, config2):
        for history in (each["history"], each["training"]["history"]):
            del history["seconds"]
        del each["tensors"], each["crc32"]
    same_bits = all(bits(tensors[name]) == bits(tensors2[name]) for name in tensors)
    return config == config2 and tensors.keys() == tensors2.keys() and same_bits


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def kill_fits(folder: Path, count: int, tally: Tally, rng: np.random.Generator) -> None:
    """Kill fits until count is reached, and resume each to its end."""
    finish(fit, folder / "never-killed")
    last = step_of(folder / "never-killed")
    while tally.in_fits() < count:
        run = folder / f"fit-{tally.fits}"
        done = False
        while not done and tally.in_fits() < count:
            steps = processes.RawValue("q", step_of(run))
            kill_at, aim = steps.value + int(rng.integers(last // 2)), str(rng.choice(["fit", "write"]))
            process = start(fit, run, steps)
            done = not kill(process, partial(reached, steps, kill_at, aim, run), rng.uniform(0, DELAY_S))
            if process.exitcode not in (0, -signal.SIGKILL):
                raise RuntimeError(f"a fit in {run} ended with exit code {process.exitcode}")
            check_files(run)
            tally.kills[aim] += not done
            tally.in_write += not done and writing(run)
            tally.most_lost = max(tally.most_lost, steps.value - step_of(run))
        finish(fit, run)
        if not same_end(run, folder / "never-killed"):
            logs = (Path(f"{path}.log").read_text() for path in (run, folder / "never-killed"))
            raise AssertionError(f"{run} does not end as a run that was never killed:\n" + "\n".join(logs))
        tally.fits += 1
    if tally.most_lost > EVERY:
        raise AssertionError(f"a kill cost {tally.most_lost} steps, more than the interval of {EVERY}")


def kill_saves(folder: Path, count: int, tally: Tally, rng: np.random.Generator) -> None:
    """Kill a loop that saves models in turn; the folder must hold the last one that was counted, or the next."""
    expected = [model(seed).embed() for seed in range(MODELS)]
    for _ in range(count):
        saves = processes.RawValue("q", 0)
        process = start(save_in_turn, folder, saves)
        ready = partial(reached, saves, int(rng.integers(1, 9)), "save", folder)
        if not kill(process, ready, rng.uniform(0, DELAY_S)):
            raise RuntimeError(f"a loop of saves ended with exit code {process.exitcode}")
        check_files(folder)
        tally.kills["save"] += 1
        tally.in_write += writing(folder)
        held = RVI.load(folder)
        complete = ((saves.value - 1) % MODELS, saves.value % MODELS)
        if held.seed not in complete or not np.array_equal(held.embed(), expected[held.seed]):
            raise AssertionError(f"{folder} does not hold the model that was saved last")


def run(folder: Path, kills: int, seed: int) -> Tally:
    """Kill a third of the times in saves, the rest in fits; raises where something was lost."""
    tally, rng = Tally(), np.random.default_rng(seed)
    kill_fits(folder, kills - kills // 3, tally, rng)
    kill_saves(folder / "saves", kills // 3, tally, rng)
    return tally


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    tally = run(folder, arguments.kills, arguments.seed)
    shutil.rmtree(folder)
    by_aim = ", ".join(f"{count} in {aim}" for aim, count in tally.kills.items())
    print(f"{tally.kills.total()} kills ({by_aim}), {tally.in_write} of them left an unfinished write behind")
    print(f"{tally.fits} fits resumed to their end, each with the bits of a run that was never killed")
    print(f"most steps lost to a kill: {tally.most_lost} of an interval of {EVERY}; no partial file, no model lost")


if __name__ == "__main__":
    main()
