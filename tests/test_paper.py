"""The paper's experiments: what is measured, how it is kept, and what is made of it."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from rvi_fast import RVI, cli, metrics
from rvi_fast.bench.paper import experiments, main
from rvi_fast.bench.paper.claims import Claim, Comparison, claims, epochs_to
from rvi_fast.bench.paper.fitting import INFERENCE_STEPS, Cells, _inferred, estimator, execute
from rvi_fast.bench.paper.runs import SIZES, Point, Result, Results, Run, Size
from rvi_fast.infer import TRAINING_ADAM, InferencePlan, fit_new_rows
from rvi_fast.observations import Observations

TINY = Size(train_rows=48, test_rows=8, epochs=2, seeds=2)


def result(error: float, run: Run) -> Result:
    """As if measured: two moments of training, and of test rows what the run asks for."""
    points = [Point("train", "", run.missing, epoch, error, error / epoch, error, error) for epoch in (1, 2)]
    for rate in run.test:
        if run.method == "VAE":
            points.append(Point("test", "encoder", rate, 0, error, error, float("nan"), error))
        else:
            for protocol, step in itertools.product(("row", "epochs"), INFERENCE_STEPS):
                points.append(Point("test", protocol, rate, step, error, error, float("nan"), error))
    return Result(tuple(points), 1.5, "2026-01-01T00:00:00+00:00", "a machine")


def test_errors_are_those_of_the_metrics():
    rng = np.random.default_rng(0)
    X, xhat = rng.normal(size=(2, 30, 7)).astype(np.float32)
    observed = rng.random(X.shape) < 0.6
    hidden = observed & (rng.random(X.shape) < 0.2)
    scale = rng.uniform(0.5, 3, size=7)
    errors = Cells(X, scale, observed, hidden).errors(torch.from_numpy(xhat))
    for name, where in {"observed": observed & ~hidden, "missing": ~observed, "hidden": hidden}.items():
        assert errors[name] == pytest.approx(metrics.elastic(X / scale, xhat / scale, where), rel=1e-5)
    assert errors["mse"] == pytest.approx(metrics.rmse(X / scale, xhat / scale, ~observed) ** 2, rel=1e-5)
    whole = Cells(X, scale, np.ones_like(observed), np.zeros_like(observed)).errors(torch.from_numpy(xhat))
    assert np.isnan([whole["missing"], whole["hidden"], whole["mse"]]).all() and whole["observed"] > 0


@pytest.mark.parametrize("protocol", ["row", "epochs"])
def test_inference_is_the_librarys(protocol):
    X = np.random.default_rng(1).normal(size=(64, 12)).astype(np.float32)
    X[np.random.default_rng(2).random(X.shape) < 0.3] = np.nan
    model = RVI.paper(batch_size=16, epochs=2, latent_dim=4, groups=(5,), progress=False).fit(X)
    x, mask = model.units_.to_model(X, ~np.isnan(X))
    found = dict(_inferred(model, x, mask, protocol))
    assert list(found) == list(INFERENCE_STEPS)
    for steps in INFERENCE_STEPS[:2]:
        missed = -(-64 // model.batch_size_) - 1 if protocol == "epochs" else 0
        plan = InferencePlan(steps, model._row_lr(), model.schedule_, model.seed, missed, hyper=TRAINING_ADAM)
        posterior = fit_new_rows(model.model_, Observations(X), model.units_, torch.arange(64), plan, False)
        np.testing.assert_allclose(found[steps], model.reconstruct(X, posterior=posterior), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["RVI", "VAD", "VAE"])
def test_a_run_measures_what_it_says(method):
    run = Run("artificial", method, 0.5, 3, hidden=0.1, test=(0.3,)).with_settings(lr=3e-3, scale="learned")
    model = estimator(run, TINY)
    assert (model.lr, model.hidden, model.epochs, model.seed) == (3e-3, (64, 64), 2, 3) and model.likelihood.learned
    found = execute(run, TINY)
    train = [p for p in found.points if p.rows == "train"]
    assert [p.step for p in train] == [1, 2] and all(p.rate == 0.5 for p in train)
    assert np.isfinite([dataclasses.astuple(p)[4:] for p in train]).all()
    steps = [("encoder", 0)] if method == "VAE" else list(itertools.product(("row", "epochs"), INFERENCE_STEPS))
    assert [(p.protocol, p.step) for p in found.points if p.rows == "test"] == steps
    again = execute(run, TINY)
    assert str(again.points) == str(found.points)  # NaN is not equal to itself


def test_a_run_that_diverges_is_never_best(tmp_path):
    run = Run("artificial", "RVI", 0.5, 0, hidden=0.1, test=(0.5,)).with_settings(lr=1e30)
    found = execute(run, TINY)
    assert found.diverged and found.end("hidden") == math.inf and not any(p.rows == "test" for p in found.points)
    results = Results(tmp_path, "quick")
    results.add(run, found)
    other = run.with_settings(lr=1.0)
    results.add(other, result(1e9, other))
    assert experiments.best(results, [run, other]) == other


def test_results_are_read_back_and_an_unfinished_run_is_forgotten(tmp_path):
    runs = [Run("wine", m, 0.5, 0, base="auto").with_settings(latent_dim=4, scale=0.5) for m in ("RVI", "VAD")]
    results = Results(tmp_path, "quick")
    results.add(runs[0], result(0.25, runs[0]))
    before = (tmp_path / "runs.csv").read_text()
    results.add(runs[1], result(0.5, runs[1]))
    again = Results(tmp_path, "quick")
    assert again.have(runs) and again[runs[1]].end("missing") == 0.25
    assert again.results[runs[0].name].seconds == 1.5
    (tmp_path / "runs.csv").write_text(before)  # killed between the two files
    resumed = Results(tmp_path, "quick")
    assert runs[0] in resumed and runs[1] not in resumed
    resumed.add(runs[1], result(0.75, runs[1]))
    assert (tmp_path / "curves.csv").read_text().count("VAD") == 2
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(
        ValueError, match=r"runs\.csv was not written by this version of rvi-fast paper; choose another"
    ):
        Results(tmp_path, "quick")


def test_a_folder_holds_one_size_and_serves_one_process(tmp_path, capsys):
    pytest.importorskip("scipy")
    run = Run("wine", "RVI", 0.5, 0)
    results = Results(tmp_path, "quick")
    results.add(run, result(0.123456789, run))
    assert results[run] == Results(tmp_path, "quick")[run]  # rounded alike before and after a resume
    with pytest.raises(ValueError, match="holds results of size quick; choose another --out"):
        Results(tmp_path, "full")
    with main._alone(tmp_path):
        assert cli.main(["paper", "--quick", "--only", "fig2", "-o", str(tmp_path)]) == 1
    assert "another rvi-fast paper is at work in" in capsys.readouterr().err


def test_names_tell_runs_apart(tmp_path):
    results, names = Results(tmp_path, "quick"), {}
    for make in experiments.EXPERIMENTS.values():
        for run in make(results, SIZES["quick"]):
            assert names.setdefault(run.name, run) == run
    assert len(names) > 500


def test_the_search_finds_the_least_error_of_the_grid(tmp_path):
    results, seen = Results(tmp_path, "quick"), 0
    results.write = lambda: None
    surface = {(a, b): abs(i - 2) + abs(j - 1) + 0.1 for (i, a), (j, b) in _grid()}
    while True:
        runs, winner = experiments.search(results, "mnist", "RVI", 0.5)
        if winner is not None:
            break
        for run in runs:
            settings = dict(run.settings)
            results.add(run, result(surface[settings["lr"], settings["row_lr"]], run))
        assert len(results.results) > seen
        seen = len(results.results)
    assert dict(winner.settings) == {"lr": experiments.LRS[2], "row_lr": experiments.LRS[1]} and len(runs) == 13
    tuned = experiments.tuned_runs(results, TINY, "mnist", "RVI", 0.5)
    assert [run.seed for run in tuned] == [0, 1] and all(run.hidden == 0 and run.test == (0.5,) for run in tuned)
    assert winner.seed not in [run.seed for run in tuned]


def _grid():
    return itertools.product(enumerate(experiments.LRS), enumerate(experiments.LRS))


def test_verdicts():
    pytest.importorskip("scipy")
    below = Comparison("a", (1.0, 1.1, 0.9), (2.0, 2.1, 1.91))
    above = Comparison("b", (2.0, 2.1, 1.9), (1.0, 1.1, 0.91))
    equal = Comparison("c", (1.0, 1.1, 0.9), (1.1, 0.9, 1.0))
    assert [c.verdict for c in (below, above, equal)] == ["holds", "fails", "unclear"]
    assert below.difference == pytest.approx(-1.00333, abs=1e-5) and below.error == pytest.approx(0.00333, abs=1e-5)

    def verdict(*comparisons):
        return Claim("", "", "", "", comparisons).verdict

    assert verdict(below, below) == verdict(below, below, below, equal) == "holds"
    assert verdict(below, equal) == verdict(below, below, above) == verdict(above, above, below) == "unclear"
    assert verdict(above, above, above, below) == "fails"


def test_who_alone_diverges_loses():
    pytest.importorskip("scipy")
    fine, diverged = (1.0, 1.1, 0.9), (1.0, math.inf, 0.9)
    assert Comparison("", fine, diverged).verdict == "holds" and Comparison("", diverged, fine).verdict == "fails"
    assert Comparison("", diverged, diverged).verdict == "unclear"


def test_epochs_to_a_level():
    epochs, errors = [1, 2, 8, 16], [1.0, 0.8, 0.4, 0.6]
    assert epochs_to(1.0, epochs, errors) == 1 and epochs_to(0.8, epochs, errors) == pytest.approx(2)
    assert epochs_to(0.6, epochs, errors) == pytest.approx(4)  # half-way from 2 to 8 in the logarithm
    assert epochs_to(0.4, epochs, errors) == pytest.approx(8)
    assert epochs_to(0.3, epochs, errors) == math.inf
    assert epochs_to(0.8, [1, 2, 3], [math.nan, 0.8, math.nan]) == 2


def test_the_page_has_every_claim_and_figure(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    from rvi_fast.bench.paper.page import write_page

    results, rng = Results(tmp_path, "quick"), np.random.default_rng(0)
    write, results.write = results.write, lambda: None
    for name in experiments.EXPERIMENTS:
        while runs := main.wanted(results, name, SIZES["quick"]):
            for run in runs:
                results.add(run, result({"RVI": 0.1, "VAD": 0.2}.get(run.method, 0.3) + 1e-3 * rng.random(), run))
    write()
    text = write_page(results, list(experiments.EXPERIMENTS)).read_text(encoding="utf-8")
    made = {claim.sentence: claim for claim in claims(results, SIZES["quick"])}
    assert len(made) == 29 and all(sentence in text for sentence in made)
    assert made["RVI ends better than VAD, lr 1e-3"].verdict == "holds"
    assert made["RVI ends better than VAE, each at its best"].count("holds") == 9
    for figure in ("fig2", "fig3", "fig4", "fig8", "fig10"):
        assert f"]({figure}.png)" in text and 0 < (tmp_path / f"{figure}.png").stat().st_size < 150_000
    assert "nan" not in text.lower()


def test_the_command_resumes_and_names_what_it_takes(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    monkeypatch.setitem(SIZES, "quick", TINY)
    for name in ("DATA", "IMAGES"):
        monkeypatch.setattr(experiments, name, ("artificial",))
        monkeypatch.setattr(f"rvi_fast.bench.paper.figures.{name}", ("artificial",))
    done = Run("artificial", "RVI", 0.5, 0, test=(0.5,))
    Results(tmp_path, "quick").add(done, result(0.125, done))
    assert cli.main(["paper", "--quick", "--only", "fig8", "--workers", "2", "-o", str(tmp_path)]) == 0
    results = Results(tmp_path, "quick")
    assert results[done].end("missing") == 0.0625 and results[done].machine == "a machine"  # kept, not measured again
    assert len(results.results) == 12 and not main.wanted(results, "fig8", TINY)
    assert (tmp_path / "README.md").exists() and str(tmp_path) in capsys.readouterr().out
    assert cli.main(["paper", "--only", "fig9", "-o", str(tmp_path)]) == 1
    assert "--only takes fig2, " in capsys.readouterr().err
