"""The race of training steps: it goes through, checks curves before it times, and keeps away from a busy machine."""

from __future__ import annotations

import csv
import subprocess
import sys

import numpy as np
import pytest
import torch

from rvi_fast import cli
from rvi_fast.bench import calibration, contestants, curves, inference, load, main, race, results, settings
from rvi_fast.bench.contestants import APART, DECODER, DENSE, EAGER, ENTRIES, JAX, OURS, Entry
from rvi_fast.bench.steps import Data, DenseAdamStep, RowAdamStep
from rvi_fast.predictive import Predictive

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def denormals():
    """A bench has them count as 0, in a process of its own; here other tests follow."""
    yield
    torch.set_flush_denormal(False)


def lines_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    run = subprocess.run(
        [sys.executable, "-m", "rvi_fast.bench", "--dry", "-o", str(out)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return out, run.stdout


def test_a_dry_run_times_every_contestant(dry_run):
    out, printed = dry_run
    lines = {line["contestant"]: line for line in lines_of(out / "steps.csv")}
    assert list(lines) == [e.name for e in ENTRIES] and all(name in printed for name in lines)
    for entry in ENTRIES:
        line = lines[entry.name]
        if entry.absent():
            assert line["note"] == entry.absent() and not line["step_us"]
            continue
        assert line["note"] == "" and line["state"] == "dry" and line["threads"] == "1"
        assert 0 < float(line["step_low"]) <= float(line["step_us"]) <= float(line["step_high"])
        assert bool(line["curve_difference"]) == entry.checked
    assert lines[OURS]["times_ours"] == lines[DECODER]["times_decoder"] == "1"
    assert float(lines[OURS]["first_call_s"]) > 0 and float(lines[OURS]["peak_mb"]) >= 0


def test_a_dry_run_leaves_the_results_alone(dry_run):
    kept = results.read(results.default_folder("cpu") / "steps.csv")
    assert not any(line["state"] == "dry" for line in kept)


# curves


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    return curves.Checks(settings.DRY, tmp_path_factory.mktemp("start") / "start.npz", CPU, dry=True)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.checked], ids=lambda e: e.name)
def test_who_claims_dense_adam_follows_it(checks, entry):
    if entry.absent():
        pytest.skip(entry.absent())
    assert not checks.objection(checks.difference(entry.make))


@pytest.mark.parametrize("package", ["jax"])
def test_jax_trains_as_eager_does(checks, package):
    pytest.importorskip(package)
    ends = []
    for name in (JAX, EAGER):
        there = Data.of(checks.sizes, checks.start.x, checks.start.mask)
        peer = contestants.entry(name).make(checks.sizes, there, CPU, True)
        curves.train(peer, checks.start, CPU)
        ends.append(peer.values())
    for name, value in ends[1].items():
        torch.testing.assert_close(ends[0][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("differences, noted", [((1.0, 0.0), False), ((1.0, 1.0), True), ((0.0,), False)])
def test_data_on_which_rounding_tips_over_are_drawn_again(monkeypatch, differences, noted):
    found, drawn = iter(differences), []
    make = curves.Checks.__init__

    def start(self, *given):
        make(self, *given)
        drawn.append(self.start.x)

    monkeypatch.setattr(curves.Checks, "__init__", start)
    monkeypatch.setattr(curves.Checks, "difference", lambda self, make: next(found))
    notes: dict[str, str] = {}
    race._checked(settings.DRY, [contestants.entry(EAGER)], notes, CPU, True)
    assert bool(notes[EAGER]) is noted and len(drawn) == len(differences)
    assert len(drawn) == 1 or not torch.equal(*drawn)


class LazyRows(DenseAdamStep):
    """A wrong update: rows that are not in the batch stay."""

    def __call__(self, rows, noise=None):
        loss = super().__call__(rows, noise)
        model = self._made[1]
        before = getattr(self, "before", None)
        with torch.no_grad():
            if before is not None:
                for embedding, old in zip(model.embeddings, before, strict=True):
                    kept = torch.ones(len(old), dtype=torch.bool)
                    kept[rows] = False
                    embedding.weight[kept] = old[kept]
        self.before = [e.weight.detach().clone() for e in model.embeddings]
        return loss


class OtherBeta(DenseAdamStep):
    def _optimizers(self, peer, device):
        (adam,) = super()._optimizers(peer, device)
        for group in adam.param_groups:
            group["betas"] = (0.9, 0.99)
        return [adam]


def lazy_ours(sizes, data, device, dry):
    peer = RowAdamStep(sizes, data, fused=False)
    made = peer._make

    def make(device):
        model, optimizer, step = made(device)
        return model, type(optimizer)(model.parameters(), lr=1e-3, mode="lazy"), step

    peer._make = make
    return peer


@pytest.mark.parametrize(
    "wrong",
    [lambda s, d, *_: LazyRows(s, d, None), lambda s, d, *_: OtherBeta(s, d, None), lazy_ours],
    ids=["rows that wait", "another beta", "RowAdam lazy"],
)
def test_a_wrong_update_gets_no_time(wrong, monkeypatch):
    wrong_entry = Entry("wrong", DENSE, 3, wrong)
    monkeypatch.setattr(race, "ROUNDS", (1, 1))
    entries = [contestants.entry(OURS), contestants.entry(DECODER), wrong_entry]
    lines = {line["contestant"]: line for line in race.race(settings.DRY, entries, CPU, dry=True)}
    assert lines["wrong"]["step_us"] is None and lines["wrong"]["note"].startswith("curve differs by ")
    assert lines[OURS]["step_us"] > 0 and lines[OURS]["note"] == ""


def test_a_contestant_that_fails_leaves_the_others(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such luck\nand more")

    monkeypatch.setattr(race, "ROUNDS", (1, 1))
    entries = [contestants.entry(OURS), contestants.entry(DECODER), Entry("broken", DENSE, 3, broken)]
    lines = {line["contestant"]: line for line in race.race(settings.DRY, entries, CPU, dry=True)}
    assert lines["broken"]["note"] == "RuntimeError: no such luck" and lines[OURS]["step_us"] > 0


def test_the_file_holds_our_noise(tmp_path):
    start = curves.check_start(settings.DRY)
    curves.write_start(start, tmp_path / "start.npz")
    again = curves.read_start(tmp_path / "start.npz")
    assert all(torch.equal(a, b) for a, b in zip(start[1:], again[1:], strict=True))
    assert start.values.keys() == again.values.keys()
    sizes = settings.DRY.sizes(len(start.x))
    peer = RowAdamStep(sizes, Data.of(sizes, start.x, start.mask), fused=False)
    posterior = peer.make(CPU)[0].posterior
    assert torch.equal(posterior.noise(start.rows[3], "train", 3), start.noise[3])


def test_every_row_of_a_check_is_met_in_every_epoch():
    start = curves.check_start(settings.DRY)
    assert torch.bincount(start.rows.flatten()).unique().tolist() == [curves.CHECK_EPOCHS]


def test_difference_of_curves():
    assert curves.difference(np.array([1.0, 2.1]), np.array([1.0, 2.0])) == pytest.approx(0.05)
    assert curves.difference(np.array([1.0, np.nan]), np.ones(2)) == np.inf


def test_a_curve_is_held_to_what_float32_can_follow(checks, monkeypatch):
    assert 0 < checks.rounding < curves.TOLERANCE
    assert checks.objection(np.inf) and checks.objection(2.1e-5) and not checks.objection(1.9e-5)
    monkeypatch.setitem(vars(checks), "rounding", 1e-4)
    assert checks.objection(1.6e-4) and not checks.objection(1.4e-4)


# load


def test_a_busy_machine_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(load, "look", lambda seconds=1.0: 0.5)
    monkeypatch.setattr(load, "average", lambda: 0.0)
    assert main.main(["--quick"]) == 2
    sentence = capsys.readouterr().err
    assert "50%" in sentence and "--allow-load" in sentence and sentence.count("\n") == 1


def test_a_high_load_average_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(load, "look", lambda seconds=1.0: 0.0)
    monkeypatch.setattr(load.os, "getloadavg", lambda: (64.0, 1.0, 1.0))
    monkeypatch.setattr(load.os, "cpu_count", lambda: 2)
    assert main.main(["--quick"]) == 2
    assert "the load average is 64.00 on 2 cores" in capsys.readouterr().err


def test_what_others_take_is_seen():
    before, after = load.Ticks(1000, 4000, 200.0), load.Ticks(1600, 5000, 500.0)
    assert load.foreign(before, after) == pytest.approx(0.3)
    assert load.foreign(None, after) == 0.0 and load.objection(0.3) and not load.objection(0.2)


@pytest.mark.parametrize("busy, allow, state", [(0.0, False, "quiet"), (0.5, False, "loaded"), (0.0, True, "loaded")])
def test_rows_say_whether_the_machine_was_loaded(monkeypatch, busy, allow, state):
    monkeypatch.setattr(load, "look", lambda seconds=1.0: busy)
    monkeypatch.setattr(load, "foreign", lambda before, after: 0.0)
    monkeypatch.setattr(race, "race", lambda *_: [{"contestant": OURS}])
    (line,) = race.run(settings.DRY, [], "cpu", False, allow, {OURS: {"peak_mb": 1.0}})
    assert line["state"] == state and line["peak_mb"] == 1.0


# memory, choices, files


def test_contestants_race_in_groups_that_fit():
    entries, needs = list(ENTRIES), {e.name: 10 for e in ENTRIES}
    parties = [[e.name for e in party] for party in race.parties(entries, needs, room=45)]
    assert all(party[:2] == [OURS, DECODER] and len(party) <= 4 for party in parties)
    assert sorted(name for party in parties for name in party[2:]) == sorted(e.name for e in ENTRIES[2:])
    assert len(list(race.parties(entries, needs, room=1e9))) == 1


def test_what_does_not_fit_says_so(monkeypatch):
    monkeypatch.setattr(race, "free_bytes", lambda device: 10**10)
    setting = settings.setting("rows-1e6", "cpu")
    assert "more than 60% of the 10 GB free" in race.too_large(contestants.entry(EAGER), setting, CPU)
    assert not race.too_large(contestants.entry(EAGER), settings.setting("paper", "cpu"), CPU)


def test_choices():
    assert [e.name for e in contestants.chosen(("apart",))] == [OURS, DECODER, APART]
    assert [s.name for s in settings.chosen(("paper", "missing"), "cpu")] == ["paper", "missing-0", "missing-0.9"]
    with pytest.raises(ValueError, match="no workload is called 'row_s'"):
        settings.chosen(("row_s",), "cpu")
    with pytest.raises(ValueError, match="no contestant is called 'tensorflow'"):
        contestants.chosen(("tensorflow",))


def test_workloads_change_one_thing():
    paper, *others = settings.settings("cuda")
    for other in others:
        changed = {k for k, v in other._asdict().items() if v != getattr(paper, k)} - {"name", "axis"}
        allowed = {"rows": {"num_rows", "dtype"}, "relays": {"groups"}}.get(other.axis, {other.axis, "num_rows"})
        assert changed <= allowed, other.name
    assert len({s.name for s in (paper, *others)}) == 1 + len(others)


def test_a_new_line_takes_the_place_of_the_old(tmp_path):
    path, key = tmp_path / "a.csv", ("workload", "contestant")
    results.merge(path, [{"workload": "a", "contestant": c, "step_us": 1.0} for c in "xy"], key)
    results.merge(path, [{"workload": "a", "contestant": "y", "step_us": 2.0, "note": "n"}], key)
    found = [(line["contestant"], line["step_us"], line["note"]) for line in results.read(path)]
    assert found == [("x", "1", ""), ("y", "2", "n")] and not list(tmp_path.glob("*.part"))


def test_the_command_line_has_it(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "--help"])
    assert end.value.code == 0 and "--quick" in capsys.readouterr().out
    assert cli.main(["bench", "--workloads", "nothing", "--allow-load"]) == 1
    assert "no workload is called 'nothing'" in capsys.readouterr().err


@pytest.fixture
def images(monkeypatch):
    """Noise in the place of MNIST."""
    rng = np.random.default_rng(0)
    images = {"train": rng.integers(0, 256, (600, 784), np.uint8), "test": rng.integers(0, 256, (80, 784), np.uint8)}
    monkeypatch.setitem(inference.LOADERS, "mnist", lambda split: (images[split], None))


def test_inference_is_measured(tmp_path, images, capsys):
    inference.main(["--data", "mnist", "--quick", "-o", str(tmp_path)])
    lines = results.read(tmp_path / "inference.csv")
    assert {line["way"] for line in lines} == {"default", "prior", "linear", "epochs", "eager", "encoder"}
    assert all(float(line["rows_per_s"]) > 0 and 0 < float(line["missing_error"]) < 2 for line in lines)
    of = {(line["way"], line["steps"]): float(line["observed_error"]) for line in lines}
    assert of["eager", "25"] == pytest.approx(of["prior", "25"], rel=0.05)  # other noise, the same descent
    assert all(line["state"] == "dry" for line in lines) and "inference.csv" in capsys.readouterr().out


def test_errors_of_test_rows_are_those_of_the_settings_that_hidden_cells_choose(tmp_path, images):
    inference.main(
        ["--errors", "--model", "paper", "--data", "mnist", "--missing", "0.9", "--quick", "-o", str(tmp_path)]
    )
    lines = results.read(tmp_path / "errors.csv")
    assert [line["settings"] for line in lines] == list(inference.CANDIDATES["paper"])
    best, other = sorted(lines, key=lambda line: float(line["hidden_error"]))
    assert float(best["missing_error"]) > 0 and not other["missing_error"] and best["ppca"] == "0.14"
    assert int(best["missing_cells"]) == pytest.approx(0.9 * 70 * 784, rel=0.01) and best["steps"] == "250"
    with pytest.raises(SystemExit):
        inference.main(["--model", "chosen"])


def test_calibration_is_measured(tmp_path, capsys):
    pytest.importorskip("sklearn")
    calibration.main(["--data", "wine", "--seeds", "2", "--quick", "-o", str(tmp_path)])
    lines = results.read(tmp_path / "calibration.csv")
    assert [(line["seed"], line["weights"]) for line in lines] == [(s, w) for s in "01" for w in calibration.WEIGHTS]
    for line in lines:
        assert 0 <= float(line["coverage_50"]) <= float(line["coverage_90"]) <= 1
        assert float(line["z_coverage_90"]) <= float(line["coverage_90"]) and 1 <= float(line["ess_median"]) <= 10
    assert capsys.readouterr().out.splitlines() == calibration.table(lines)


def test_coverage_counts_hidden_cells_of_columns_that_vary():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(4000, 3)) * [1, 10, 0]
    spread = np.broadcast_to([1.0, 10.0, 0.0], X.shape)
    found = Predictive(0 * X, 0 * X, spread / 1e6, spread, np.full(len(X), 7.0))
    mask = rng.random(X.shape) < 0.5
    line = calibration.coverage(found, X, mask, np.array([True, True, False]), np.array([1.0, 10.0, 1.0]))
    assert line["cells"] == (~mask[:, :2]).sum() and line["ess_median"] == line["ess_tenth"] == 7
    assert line["coverage_50"] == pytest.approx(0.5, abs=0.02) and line["coverage_90"] == pytest.approx(0.9, abs=0.02)
    assert line["observed_coverage_90"] == pytest.approx(0.9, abs=0.02) and line["z_coverage_90"] < 1e-3
    assert line["mse"] == pytest.approx(1, abs=0.05) and line["mse"] == line["mse_at_mean"]
