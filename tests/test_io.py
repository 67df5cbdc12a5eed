import json
import os
import subprocess
import sys

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
    config = json.loads((tmp_path / "config.json").read_text())
    config["params"]["device"] = "cuda:99"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert RVI.load(tmp_path).device == "auto"


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
        ({}, table(seed=3), "belongs to a fit with data"),
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


def damage(folder, how):
    config, tensors = folder / "config.json", next(folder.glob("tensors*"))
    if how == "truncated tensors":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif how == "no tensors":
        tensors.unlink()
    elif how == "no config":
        config.unlink()
    elif how == "config cut":
        config.write_text(config.read_text()[:50])
    elif how == "no params":
        config.write_text(json.dumps({"format": "rvi_fast", "version": 1}))
    elif how == "foreign":
        config.write_text('{"model_type": "bert"}')
    elif how == "newer":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"version": 99}))
    elif how == "other tensors":
        torch_file = json.loads(config.read_text())
        torch_file["resolved"]["hidden"] = [9]
        config.write_text(json.dumps(torch_file))


@pytest.mark.parametrize(
    "how, error, match",
    [
        ("truncated tensors", ValueError, "is missing or damaged"),
        ("no tensors", ValueError, "is missing or damaged"),
        ("no config", FileNotFoundError, "holds no model: config.json is missing"),
        ("no params", ValueError, "is damaged: version or params is missing"),
        ("config cut", ValueError, "is not readable as JSON"),
        ("foreign", ValueError, "was not written by rvi_fast"),
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


def test_a_failed_write_keeps_the_old_model(tmp_path, monkeypatch):
    model = RVI(**KINDS[0][1]).fit(table())
    model.save(tmp_path)
    expected = model.embed()
    other = RVI(**KINDS[0][1], seed=5).fit(table())

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        other.save(tmp_path)
    assert files(tmp_path) == ["config.json", "tensors"]
    assert np.array_equal(RVI.load(tmp_path).embed(), expected)


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
