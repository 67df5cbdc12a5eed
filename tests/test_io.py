import json
import os
import re
import signal
import subprocess
import sys
import warnings
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch

from rvi_fast import RVI, VAD, VAE, io
from rvi_fast.likelihoods import Bernoulli, Gaussian

SMALL = dict(latent_dim=4, hidden=(8,), batch_size=16, epochs=3, progress=False)
KINDS = [(RVI, SMALL | {"groups": (5, 10), "active": (2, 0.5)}), (VAD, SMALL), (VAE, SMALL)]


def table(n=50, d=6, seed=0):
    rng = np.random.default_rng(seed)
    return np.where(rng.random((n, d)) < 0.3, np.nan, rng.normal(size=(n, d)) * 10 + 5)


def files(folder):
    return sorted(p.name.split("-")[0] for p in folder.iterdir())


def tensors_of(folder, name=io.CONFIG):
    return folder / json.loads((folder / name).read_text())["tensors"]["file"]


def rewrite(folder, change):
    """Change config.json as another rvi_fast might have written it, with its checksum."""
    config = json.loads((folder / io.CONFIG).read_text())
    change(config)
    config["crc32"] = io._checksum(config)
    (folder / io.CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize("cls, kw", KINDS)
def test_a_loaded_model_gives_the_same_bits(cls, kw, tmp_path):
    X, new = table(), table(20, seed=1)
    model = cls(**kw).fit(X)
    model.save(tmp_path / "m")
    again = cls.load(tmp_path / "m")
    assert files(tmp_path / "m") == ["config.json", "tensors"]
    assert again.get_params() == model.get_params() and again.history_ == model.history_
    assert np.array_equal(again.impute(new, steps=4), model.impute(new, steps=4))
    assert np.array_equal(again.sample(5), model.sample(5))
    if cls is not VAE:
        assert np.array_equal(again.embed(), model.embed())
        assert np.array_equal(again.impute(X, posterior=again.posterior_), model.impute())
    with pytest.raises(ValueError, match="a saved model holds no data: pass X"):
        again.impute()


@pytest.mark.parametrize("likelihood", [Gaussian(0.3), Gaussian("learned", min_scale=0.2), "auto", Bernoulli()])
def test_likelihoods_are_saved(likelihood, tmp_path):
    X = np.random.default_rng(0).random((30, 5))
    model = RVI(likelihood=likelihood, **KINDS[0][1]).fit(X)
    model.save(tmp_path)
    again = RVI.load(tmp_path)
    assert (
        type(again.likelihood_) is type(model.likelihood_)
        and again.likelihood_.settings() == model.likelihood_.settings()
    )
    assert np.array_equal(again.score(X, steps=3), model.score(X, steps=3))


def test_without_rows_new_rows_still_work(tmp_path):
    model = RVI(**KINDS[0][1]).fit(table())
    model.save(tmp_path / "all")
    model.save(tmp_path / "some", rows=False)
    size = {d: sum(f.stat().st_size for f in (tmp_path / d).glob("tensors*")) for d in ("all", "some")}
    assert size["all"] - size["some"] > 50 * (15 + 8) * 4 - 500
    again = RVI.load(tmp_path / "some")
    assert np.array_equal(again.impute(table(9), steps=3), model.impute(table(9), steps=3))
    with pytest.raises(RuntimeError, match="saved with rows=False: its training rows are gone"):
        again.embed()


def test_a_model_saved_with_its_optimizer_trains_on(tmp_path):
    kw = KINDS[0][1] | {"epochs": 6}
    whole = RVI(**kw).fit(table())
    stopped = RVI(**kw).fit(table(), callbacks=[lambda model, logs: logs["step"] == 8])
    assert stopped.n_steps_ == 8
    stopped.save(tmp_path, optimizer=True)
    resumed = RVI(**kw).fit(table(), checkpoint_dir=tmp_path, resume=True)
    assert resumed.n_steps_ == 24 and np.array_equal(resumed.embed(), whole.embed())
    for other in (RVI.load(tmp_path), RVI(**kw).fit(table(), val_cells=0.2)):
        with pytest.raises(ValueError, match="optimizer=True needs a fit in this process, without val_cells"):
            other.save(tmp_path / "again", optimizer=True)
    with pytest.raises(ValueError, match="optimizer=True needs a fit in this process"):
        RVI.load(tmp_path).save(tmp_path / "again", optimizer=True)
    with pytest.raises(ValueError, match="optimizer=True needs rows=True"):
        whole.save(tmp_path / "again", optimizer=True, rows=False)


def test_a_likelihood_of_ones_own_cannot_be_saved(tmp_path):
    class Mine(Gaussian):
        pass

    model = RVI(**KINDS[0][1], likelihood=Mine(0.5)).fit(table())
    with pytest.raises(TypeError, match="a model with likelihood Mine cannot be saved"):
        model.save(tmp_path)


def test_a_device_that_is_not_here_becomes_auto(tmp_path):
    RVI(**KINDS[0][1]).fit(table()).save(tmp_path)
    rewrite(tmp_path, lambda config: config["params"].update(device="cuda:99"))
    assert RVI.load(tmp_path).device == "auto"


def test_a_device_that_is_asked_for_is_used_or_an_error(tmp_path):
    RVI(**KINDS[0][1]).fit(table()).save(tmp_path)
    rewrite(tmp_path, lambda config: config["params"].update(device="cuda:99"))
    assert RVI.load(tmp_path, device="cpu").device == "cpu"
    for device, sentence in (("cuda:98", "'cuda:98' cannot be used here"), ("toaster", "device must be 'auto' or")):
        with pytest.raises(ValueError, match=sentence) as caught:
            RVI.load(tmp_path, device=device)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cls, kw", KINDS)
def test_every_key_and_tensor_is_documented(cls, kw, tmp_path):
    text = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    names = {re.sub("<[^>]*>", "*", name) for name in re.findall(r"`([^`]+)`", text.replace("```", ""))}
    cls(**kw).fit(table(), val_cells=0.2, checkpoint_dir=tmp_path / "run").save(tmp_path / "model")
    for folder in ("run", "model"):
        config, tensors = io.read(tmp_path / folder)
        assert {*config, *config.get("training", {}), *config["columns"], *config["tensors"]} <= names
        assert {name for name in tensors if not any(fnmatch(name, pattern) for pattern in names)} == set()


# resuming


class Stop(Exception):
    pass


@pytest.mark.parametrize("every", [None, 5])
@pytest.mark.parametrize("cls, kw", KINDS)
@pytest.mark.parametrize("val_cells", [0.0, 0.2])
def test_a_resumed_fit_ends_with_the_same_bits(cls, kw, every, val_cells, tmp_path):
    X, kw = table(), kw | {"epochs": 6}
    fit = dict(val_cells=val_cells)
    whole = cls(**kw).fit(X, **fit)

    def stop(model, logs):
        if logs["step"] >= 12:
            raise Stop

    first = cls(**kw)
    with pytest.raises(Stop):
        first.fit(X, checkpoint_dir=tmp_path, checkpoint_every=every, callbacks=[stop], **fit)
    saved = io.read(tmp_path)[0]["training"]["step"]
    assert saved == (10 if every else 12)
    resumed = cls(**kw).fit(X, checkpoint_dir=tmp_path, checkpoint_every=every, resume=True, **fit)
    assert resumed.n_steps_ == whole.n_steps_ == 24
    state, expected = resumed.model_.state_dict(), whole.model_.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    for name in set(whole.history_) - {"seconds"}:
        assert resumed.history_[name] == whole.history_[name]


@pytest.mark.parametrize("cls, kw", KINDS)
@pytest.mark.parametrize("mode", ["dense", "lazy"])
def test_a_checkpoint_loads_as_a_model(cls, kw, mode, tmp_path):
    """It holds the rows once, as they stand in training, and gives the same bits."""
    kw = kw if cls is VAE else kw | {"optimizer_mode": mode}
    model = cls(**kw).fit(table(), checkpoint_dir=tmp_path)
    again = cls.load(tmp_path)
    assert again.n_steps_ == model.n_steps_ == 12 and again.stopped_ == "completed"
    assert np.array_equal(again.impute(table(9), steps=3), model.impute(table(9), steps=3))
    if cls is not VAE:
        assert np.array_equal(again.embed(), model.embed())
        assert not any("posterior.table" in name for name in io.read(tmp_path)[1])
        again.save(tmp_path / "plain")
        assert np.array_equal(cls.load(tmp_path / "plain").embed(), model.embed())


def test_the_end_of_a_fit_is_a_checkpoint(tmp_path):
    """Also where no interval ends there, and where a callback or Ctrl-C ended it."""
    for number, callbacks in enumerate(([], [lambda model, logs: logs["step"] == 8])):
        folder = tmp_path / str(number)
        model = RVI(**KINDS[0][1]).fit(table(), checkpoint_dir=folder, checkpoint_every=1000, callbacks=callbacks)
        assert io.read(folder)[0]["training"]["step"] == model.n_steps_


def test_an_early_stop_is_not_forgotten(tmp_path):
    X, kw = (
        np.random.default_rng(0).normal(size=(60, 8)),
        KINDS[0][1] | {"epochs": 200, "lr": 0.03, "schedule": "constant"},
    )
    model = RVI(**kw).fit(X, val_cells=0.2, checkpoint_dir=tmp_path)
    again = RVI(**kw).fit(X, val_cells=0.2, checkpoint_dir=tmp_path, resume=True)
    assert model.stopped_ == again.stopped_ == "early" and model.history_ == again.history_
    assert np.array_equal(model.embed(), again.embed())


@pytest.mark.parametrize(
    "first, second",
    [(np.uint8, np.float32), (np.float64, np.float32)],
    ids=["uint8, then float32", "float64, then float32"],
)
def test_a_run_does_not_go_on_with_other_types(first, second, tmp_path):
    X = np.random.default_rng(0).integers(0, 9, (50, 6)).astype(first)
    RVI(**KINDS[0][1]).fit(X, checkpoint_dir=tmp_path, max_steps=5)
    with pytest.raises(ValueError, match="belongs to a fit with data"):
        RVI(**KINDS[0][1]).fit(X.astype(second), checkpoint_dir=tmp_path, max_steps=5, resume=True)


def test_a_run_does_not_go_on_with_data_that_float32_cannot_tell_apart(tmp_path):
    X = 1e9 + np.random.default_rng(0).random((50, 6))
    RVI(**KINDS[0][1]).fit(X, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="belongs to a fit with data"):
        RVI(**KINDS[0][1]).fit(X[::-1], checkpoint_dir=tmp_path, resume=True)


def test_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path):
    model = RVI(**KINDS[0][1]).fit(table(), checkpoint_dir=tmp_path / "new", resume=True)
    assert model.n_steps_ == 12
    assert np.array_equal(model.embed(), RVI(**KINDS[0][1]).fit(table()).embed())


def test_resume_into_another_run_is_refused(tmp_path):
    RVI(**KINDS[0][1]).fit(table(), checkpoint_dir=tmp_path)
    for kw, X, match in (
        ({"lr": 0.5}, table(), "belongs to a fit with lr 'auto', not 0.5"),
        ({"standardize": False}, table(), "belongs to a fit with standardize 'auto', not False"),
        ({}, table(seed=3), "belongs to a fit with data other than this X and mask; give the X and mask of that fit"),
        ({}, table(49), "belongs to a fit with rows 50, not 49"),
    ):
        with pytest.raises(ValueError, match=match):
            RVI(**(KINDS[0][1] | kw)).fit(X, checkpoint_dir=tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"belongs to a fit with val_cells 0.0, not 0.2"):
        RVI(**KINDS[0][1]).fit(table(), val_cells=0.2, checkpoint_dir=tmp_path, resume=True)
    RVI(**(KINDS[0][1] | {"progress": True})).fit(table(), checkpoint_dir=tmp_path, resume=True)  # asks for no new run
    model = RVI(**KINDS[0][1]).fit(table())
    model.save(tmp_path / "finished")
    with pytest.raises(ValueError, match="holds a finished model, not a checkpoint"):
        RVI(**KINDS[0][1]).fit(table(), checkpoint_dir=tmp_path / "finished", resume=True)
    with pytest.raises(ValueError, match="resume and checkpoint_every need checkpoint_dir"):
        RVI(**KINDS[0][1]).fit(table(), resume=True)


# what is wrong with a folder is said in one sentence


def flip_bit(path, seed=0):
    content = bytearray(path.read_bytes())
    bit = int(np.random.default_rng(seed).integers(8 * len(content)))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def damage(folder, how, name=io.CONFIG):
    config, tensors = folder / name, tensors_of(folder, name)
    if how == "truncated tensors":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif how == "empty tensors":
        tensors.write_bytes(b"")
    elif how == "flipped tensors":
        flip_bit(tensors)
    elif how == "foreign tensors":
        tensors.write_bytes(os.urandom(tensors.stat().st_size))
    elif how == "no tensors":
        tensors.unlink()
    elif how == "no config":
        config.unlink()
    elif how == "config cut":
        config.write_text(config.read_text()[:50])
    elif how == "config empty":
        config.write_text("")
    elif how == "config changed":
        config.write_text(config.read_text().replace('"latent_dim": 4', '"latent_dim": 5'))
    elif how == "foreign":
        config.write_text('{"model_type": "bert"}')
    elif how == "newer":
        rewrite(folder, lambda config: config.update(version=99))
    elif how == "other tensors":
        rewrite(folder, lambda config: config["resolved"].update(hidden=[9]))


DAMAGE = {
    "truncated tensors": r"tensors-\w+.safetensors has \d+ bytes instead of \d+; restore it from a backup",
    "empty tensors": "has 0 bytes instead of",
    "flipped tensors": r"is damaged: its content does not have the checksum that was saved with it; restore it",
    "foreign tensors": "does not have the checksum",
    "no tensors": r"tensors-\w+.safetensors is missing; restore it from a backup, or fit again",
    "config cut": r"config.json is not readable as JSON \(.*\); restore it from a backup, or fit again",
    "config empty": "config.json is not readable as JSON",
    "config changed": "config.json is damaged: its content does not have the checksum that it names; restore",
}


@pytest.mark.parametrize(
    "how, error, match",
    [
        *((how, ValueError, match) for how, match in DAMAGE.items()),
        ("no config", FileNotFoundError, "holds no model: config.json is missing; give the folder that save wrote"),
        ("foreign", ValueError, "config.json was not written by rvi_fast; give the folder that save wrote"),
        ("newer", ValueError, "has format version 99, but this rvi_fast reads up to 1; upgrade rvi_fast"),
        ("other tensors", ValueError, "do not fit the saved settings"),
    ],
)
def test_damaged_folders(how, error, match, tmp_path):
    RVI(**KINDS[0][1]).fit(table()).save(tmp_path)
    damage(tmp_path, how)
    with pytest.raises(error, match=match):
        RVI.load(tmp_path)


def test_the_wrong_class_is_named(tmp_path):
    VAD(**SMALL).fit(table()).save(tmp_path)
    with pytest.raises(ValueError, match=r"holds a VAD; load it with rvi_fast.VAD.load"):
        RVI.load(tmp_path)


def test_the_article_is_right(tmp_path):
    RVI(**KINDS[0][1]).fit(table()).save(tmp_path)
    with pytest.raises(ValueError, match=r"holds an RVI; load it with rvi_fast.RVI.load"):
        VAD.load(tmp_path)


@pytest.mark.parametrize("folder", [None, 3])
def test_what_is_no_path_is_named(folder):
    with pytest.raises(TypeError, match=f"dir must be a str or a pathlib.Path; got {folder}"):
        RVI.load(folder)
    model = RVI(**KINDS[0][1]).fit(table())
    with pytest.raises(TypeError, match=f"dir must be a str or a pathlib.Path; got {folder}"):
        model.save(folder)
    with pytest.raises(TypeError, match=r"checkpoint_dir must be a str or a pathlib.Path; got 3"):
        model.fit(table(), checkpoint_dir=3)


def test_no_flipped_bit_is_overlooked(tmp_path):
    """Wherever it is, in the tensors or in config.json."""
    VAD(**SMALL).fit(table(20)).save(tmp_path)
    for path in (tensors_of(tmp_path), tmp_path / io.CONFIG):
        whole = path.read_bytes()
        for seed in range(50):
            flip_bit(path, seed)
            with pytest.raises(ValueError, match=path.name):
                VAD.load(tmp_path)
            path.write_bytes(whole)
    VAD.load(tmp_path)


def test_a_file_or_a_foreign_folder_is_named(tmp_path):
    file = tmp_path / "model.pt"
    torch.save({"weight": torch.zeros(3)}, file)
    with pytest.raises(FileNotFoundError, match=r"model.pt holds no model: config.json is missing"):
        RVI.load(file)
    with pytest.raises(FileNotFoundError, match=r"holds no model: config.json is missing"):
        RVI.load(tmp_path)


def test_a_config_of_another_program_is_not_overwritten(tmp_path):
    (tmp_path / io.CONFIG).write_text('{"model_type": "bert"}')
    model = RVI(**KINDS[0][1])
    with pytest.raises(FileExistsError, match=r"holds a config.json but no model of rvi_fast; choose another folder"):
        model.fit(table(), checkpoint_dir=tmp_path)
    with pytest.raises(FileExistsError, match="choose another folder"):
        model.fit(table()).save(tmp_path)
    assert (tmp_path / io.CONFIG).read_text() == '{"model_type": "bert"}'


# the rotating pair


def pair(folder, steps=8, **kw):
    """A fit that an error ended, with the checkpoints of the last two intervals."""

    def stop(model, logs):
        if logs["step"] >= steps + 4:
            raise Stop

    with pytest.raises(Stop):
        RVI(**KINDS[0][1] | {"epochs": 6} | kw).fit(
            table(), checkpoint_dir=folder, checkpoint_every=4, callbacks=[stop]
        )


def test_a_fit_keeps_its_last_two_checkpoints(tmp_path):
    pair(tmp_path, 12)
    assert files(tmp_path) == ["config.json", "previous.json", "tensors", "tensors"]
    steps = [json.loads((tmp_path / name).read_text())["training"]["step"] for name in (io.CONFIG, io.PREVIOUS)]
    assert steps == [16, 12]
    RVI.load(tmp_path).save(tmp_path)  # a model is one
    assert files(tmp_path) == ["config.json", "tensors"]


@pytest.mark.parametrize("how", [*DAMAGE, "no config"])
def test_where_the_newest_is_damaged_the_older_one_is_used(how, tmp_path):
    kw = KINDS[0][1] | {"epochs": 6}
    whole = RVI(**kw).fit(table())
    pair(tmp_path)
    damage(tmp_path, how)
    with pytest.warns(UserWarning, match=r".*; the checkpoint before it, of step 8, is used"):
        assert RVI.load(tmp_path).n_steps_ == 8
    with pytest.warns(UserWarning, match=r".*; the checkpoint before it, of step 8, is used"):
        RVI(**kw).fit(table(), checkpoint_dir=tmp_path, resume=True, callbacks=[lambda model, logs: True])
    with warnings.catch_warnings(action="error"):  # the damaged one is gone, and the good one in its place
        resumed = RVI(**kw).fit(table(), checkpoint_dir=tmp_path, resume=True)
    assert np.array_equal(resumed.embed(), whole.embed())
    assert files(tmp_path) == ["config.json", "previous.json", "tensors", "tensors"]


def test_two_damaged_checkpoints_are_both_named(tmp_path):
    pair(tmp_path)
    damage(tmp_path, "no tensors")
    damage(tmp_path, "flipped tensors", io.PREVIOUS)
    with pytest.raises(ValueError, match=r"is missing, and .* is damaged: .*; restore it from a backup, or fit again"):
        RVI.load(tmp_path)


def test_a_newer_checkpoint_is_not_stepped_over(tmp_path):
    pair(tmp_path)
    damage(tmp_path, "newer")
    with pytest.raises(ValueError, match="format version 99"):
        RVI(**KINDS[0][1] | {"epochs": 6}).fit(table(), checkpoint_dir=tmp_path, resume=True)


def test_what_a_killed_run_leaves_is_removed_by_the_next_save(tmp_path):
    pair(tmp_path)
    (tmp_path / f"{io.STAGING}abc").mkdir()
    (tmp_path / f"{io.STAGING}abc" / "config.json").write_text("{")
    (tmp_path / "tensors-0123456789ab.safetensors").write_bytes(b"never named")
    (tmp_path / "notes.txt").write_text("the user's own")
    RVI(**KINDS[0][1] | {"epochs": 6}).fit(table(), checkpoint_dir=tmp_path, resume=True)
    assert files(tmp_path) == ["config.json", "notes.txt", "previous.json", "tensors", "tensors"]


# disks that are full, folders that cannot be written to


FAILING = ("copyfile", "fsync", "replace")


def fail_on(monkeypatch, name):
    def full(*args, **kw):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io.shutil if name == "copyfile" else io.os, name, full)


@pytest.mark.parametrize("name", FAILING)
def test_a_failed_save_keeps_the_old_model(name, tmp_path, monkeypatch):
    pair(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = RVI(**KINDS[0][1], seed=5).fit(table())
    fail_on(monkeypatch, name)
    match = r"cannot be written to \(No space left on device\) and is as before; free space there, or choose another"
    with pytest.raises(OSError, match=match):
        other.save(tmp_path, optimizer=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_failed_checkpoint_does_not_end_the_fit(tmp_path, monkeypatch):
    kw = KINDS[0][1] | {"epochs": 6}
    whole = RVI(**kw).fit(table())

    def fill_the_disk(model, logs):
        if logs["step"] == 12:
            fail_on(monkeypatch, "fsync")
        elif logs["step"] == 20:
            monkeypatch.undo()

    with pytest.warns(
        UserWarning, match=r"step \d+ has no checkpoint: .* \(No space left .*; the fit goes on"
    ) as found:
        model = RVI(**kw).fit(table(), checkpoint_dir=tmp_path, callbacks=[fill_the_disk])
    assert [str(w.message).split()[1] for w in found] == ["12", "16"]
    assert np.array_equal(model.embed(), whole.embed())
    assert io.read_config(tmp_path)["n_steps"] == 24


QUOTA = """
import resource, signal, sys, warnings
import numpy as np
from rvi_fast import RVI, io

X = np.random.default_rng(0).normal(size=(200, 6))
kw = dict(latent_dim=4, hidden=(8,), groups=(5, 10), batch_size=16, epochs=3, progress=False)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def quota(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def later(model, logs):
    quota(20_000 if logs["step"] == 26 else resource.RLIM_INFINITY)

with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    RVI(**kw).fit(X, checkpoint_dir=sys.argv[1], callbacks=[later])
print(*(w.message for w in found), sep="\\n")
print(io.read_config(sys.argv[1])["n_steps"])
quota(20_000)
try:
    RVI(**kw).fit(X).save(sys.argv[1])
except OSError as error:
    print(error)
quota(resource.RLIM_INFINITY)
print(RVI.load(sys.argv[1]).n_steps_)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no quota on the size of files here")
def test_a_quota_costs_a_checkpoint_and_nothing_else(tmp_path):
    """The system itself refuses to write more, in the middle of a file."""
    run = subprocess.run([sys.executable, "-c", QUOTA, tmp_path], capture_output=True, text=True, check=True)
    warning, step, error, again = run.stdout.splitlines()
    assert warning.startswith("step 26 has no checkpoint: ") and "File too large" in warning
    assert error.startswith(f"{tmp_path} cannot be written to (") and "File too large" in error
    assert step == again == "39"
    assert files(tmp_path) == ["config.json", "previous.json", "tensors", "tensors"]


def test_a_folder_that_cannot_be_made_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match="is a file, or lies under one; give a folder"):
            RVI(**KINDS[0][1]).fit(table(), checkpoint_dir=folder)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write to")
def test_a_folder_that_cannot_be_written_to_is_refused_before_training():
    with pytest.raises(OSError, match=r"/proc/self cannot be written to \(.*\); choose another folder"):
        RVI(**KINDS[0][1]).fit(table(), checkpoint_dir="/proc/self")


def test_others_may_read_what_one_may(tmp_path):
    RVI(**KINDS[0][1]).fit(table()).save(tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


PEAK = """
import numpy as np
from rvi_fast import RVI

def peak_kb():  # not ru_maxrss, which a child takes over from its parent
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

n, d, t = 120_000, 10, 16
kw = dict(latent_dim=t, hidden=(16,), epochs=1, batch_size=2048, progress=False)
RVI(**kw).fit(np.random.default_rng(0).random((3000, d), dtype=np.float32))
X = np.random.default_rng(0).random((n, d), dtype=np.float32)
before = peak_kb()
model = RVI(**kw).fit(X)
print((peak_kb() - before) * 1024, n * (12 * (175 + 2 * t) + 12))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_a_fit_is_the_table_its_moments_and_a_constant():
    """X is there before; the table is 300 MB, so a second copy of it, or of its moments, would show."""
    out = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True).stdout
    grown, table_bytes = (int(v) for v in out.split())
    assert table_bytes / 2 < grown < table_bytes + 80e6
