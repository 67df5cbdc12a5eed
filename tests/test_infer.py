import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from rvi_fast import RVI, VAD, infer
from rvi_fast.observations import Observations
from rvi_fast.starts import LinearStart

SMALL = dict(epochs=3, batch_size=32, progress=False)
MODELS = [
    (RVI, dict(latent_dim=5, hidden=(7,), groups=(5, 9), **SMALL)),
    (RVI, dict(latent_dim=64, hidden=(64, 64), **SMALL)),
    (VAD, dict(latent_dim=3, hidden=(), **SMALL)),
]


def data(n, d, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 3)) @ rng.normal(size=(3, d)) + 0.1 * rng.normal(size=(n, d))
    return np.where(rng.random((n, d)) < 0.4, np.nan, X).astype(np.float32)


def bits(posterior):
    return torch.cat([posterior.mean, posterior.std, posterior.elbo[:, None], posterior.parameters], dim=1).view(
        torch.int32
    )


@pytest.mark.parametrize("d", [1, 13, 65])
@pytest.mark.parametrize("cls, kw", MODELS)
def test_a_row_gets_the_same_bits_in_every_call(cls, kw, d):
    """Alone, in any batch, in any order, with 1 and with 2 threads."""
    model = (
        cls(**kw).fit(data(80, d, seed=1), mask=None) if d > 1 else cls(**kw).fit(np.nan_to_num(data(80, 1, seed=1)))
    )
    X = data(150, d)
    together = bits(model.infer(X, steps=12))
    order = np.random.default_rng(3).permutation(150)
    assert torch.equal(bits(model.infer(X[order], steps=12)), together[order])
    for row in (0, 63, 64, 149):
        assert torch.equal(bits(model.infer(X[row : row + 1], steps=12))[0], together[row])
    assert torch.equal(bits(model.infer(X[10:117], steps=12)), together[10:117])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(bits(model.infer(X, steps=12)), together)
            assert torch.get_num_threads() == count, "infer gives the threads back"
    finally:
        torch.set_num_threads(threads)


def test_results_that_follow_infer_do_not_depend_on_the_call_either():
    model = RVI(**MODELS[0][1]).fit(data(80, 13, seed=1))
    X = data(100, 13)
    order = np.random.default_rng(0).permutation(100)
    for result, given in [
        (model.impute, {}),
        (model.impute, {"importance_samples": 3}),
        (model.reconstruct, {}),
        (model.score, {}),
        (model.score, {"importance_samples": 3}),
        (model.embed, {}),
    ]:
        together = result(X, steps=5, **given)
        assert np.array_equal(together[40:43], result(X[40:43], steps=5, **given))
        assert np.array_equal(together[order], result(X[order], steps=5, **given))
    for noise in (False, True):
        draws = model.impute(X, n_samples=2, noise=noise, steps=5)
        assert np.array_equal(draws[:, 40:43], model.impute(X[40:43], n_samples=2, noise=noise, steps=5))
    for given in ({"n_samples": 3}, {"importance_samples": 3}):
        together, some = (model.predictive(rows, steps=5, **given) for rows in (X, X[order[:9]]))
        for field in dataclasses.fields(some):
            assert np.array_equal(getattr(together, field.name)[order[:9]], getattr(some, field.name))


def test_row_ids_key_the_noise():
    model = RVI(**MODELS[0][1]).fit(data(80, 13, seed=1))
    X = np.repeat(data(1, 13), 3, axis=0)
    same = model.infer(X, steps=5).mean
    assert torch.equal(same[0], same[1])
    mean = model.infer(X, steps=5, row_ids=np.array([1, 2, 1])).mean
    assert torch.equal(mean[0], mean[2]) and not torch.equal(mean[0], mean[1])
    draws = model.impute(X, n_samples=2, steps=5, row_ids=np.array([1, 2, 1]))
    assert np.array_equal(draws[:, 0], draws[:, 2]) and not np.array_equal(draws[:, 0], draws[:, 1])


def test_row_hashes_see_values_mask_and_place_only():
    X = data(50, 7)
    ids = Observations(X).row_ids()
    assert len(set(ids.tolist())) == 50
    order = np.random.default_rng(0).permutation(50)
    assert torch.equal(Observations(X[order]).row_ids(), ids[order])
    assert torch.equal(Observations(X.astype(np.float64)).row_ids(), ids)
    mask = ~np.isnan(X)
    assert torch.equal(Observations(np.where(mask, X, 5.0), mask).row_ids(), ids)
    assert not torch.equal(Observations(X[:, ::-1].copy()).row_ids(), ids)
    zeros = np.zeros((1, 3))
    assert torch.equal(Observations(zeros).row_ids(), Observations(-zeros).row_ids())


@pytest.mark.parametrize("cls, kw", MODELS[:1])
def test_more_steps_fit_better_and_converge(cls, kw):
    model = cls(**{**kw, "epochs": 60, "lr": 1e-2}).fit(data(200, 13, seed=1))
    X = data(100, 13)
    few, many = (model.infer(X, steps=steps, lr=0.03, start="prior") for steps in (3, 300))
    assert many.elbo.mean() > few.elbo.mean() + 1
    assert many.converged.float().mean() > 0.8 > few.converged.float().mean()


def test_the_linear_start_is_ahead():
    model = RVI(**{**MODELS[0][1], "epochs": 60, "lr": 1e-2}).fit(data(200, 13, seed=1))
    X = data(100, 13)
    prior, linear = (model.infer(X, steps=10, start=start) for start in ("prior", "linear"))
    assert linear.elbo.mean() > prior.elbo.mean() + 1


@pytest.mark.parametrize("lr, worse", [(0.1, 0.5), (1e4, 0.99)])
def test_a_row_does_not_end_below_its_linear_start(lr, worse):
    """Which is the optimum where the decoder is linear, so that steps can only wander off, or far away."""
    model = VAD(**MODELS[2][1] | {"epochs": 60, "lr": 1e-2}).fit(data(200, 13, seed=1))
    X = data(150, 13)
    at_start = model.infer(X, steps=1, lr=1e-12)
    found, from_prior = (model.infer(X, steps=20, lr=lr, start=start) for start in ("linear", "prior"))
    assert (found.elbo >= at_start.elbo - 1e-4 * (1 + at_start.elbo.abs())).all()
    assert (~(from_prior.elbo >= at_start.elbo)).float().mean() > worse
    stayed = (found.mean - at_start.mean).abs().amax(1) < 1e-4
    assert stayed.float().mean() > worse and found.elbo.isfinite().all()


def test_rows_that_have_converged_take_no_more_steps(monkeypatch):
    monkeypatch.setattr(infer, "IMPROBABLE", math.inf)
    model = RVI(**{**MODELS[0][1], "epochs": 60, "lr": 1e-2}).fit(data(200, 13, seed=1))
    X = data(900, 13)
    first, whole, early = (
        model.infer(X, steps=steps, stop_early=stop) for steps, stop in ((60, False), (240, False), (240, True))
    )
    done = first.converged
    assert 0 < done.sum() < 900
    assert torch.equal(bits(early)[done], bits(first)[done]) and early.converged[done].all()
    kept = (bits(early) == bits(first)).all(1)
    assert (early.elbo[~kept] > first.elbo[~kept]).all(), "a row that went on keeps the better of its ends"
    at_start = model.infer(X, steps=1, lr=1e-12)
    moved = ~done & (first.elbo > at_start.elbo + 1e-4)  # the others' start is the best that any descent has met
    assert moved.sum() > 9 and kept[moved].float().mean() < 0.2
    assert early.elbo[~done].mean() > first.elbo[~done].mean()
    assert early.elbo.mean() > whole.elbo.mean() - 0.02 * (1 + whole.elbo.abs().mean())
    some = torch.cat((done.nonzero()[:5, 0], (~done).nonzero()[:5, 0])).numpy()
    assert torch.equal(bits(model.infer(X[some], steps=240)), bits(early)[some])


def fits_of(monkeypatch):
    """The plan of each fit from now on; how many rows one takes depends on the machine."""
    calls = []
    for cls in (infer.Fits, infer.FusedFits):

        def fit(self, plan, p, *rows, whole=cls.fit):
            calls.append(plan)
            return whole(self, plan, p, *rows)

        monkeypatch.setattr(cls, "fit", fit)
    return calls


def test_rows_that_converge_cost_no_second_descent(monkeypatch):
    monkeypatch.setattr(infer, "IMPROBABLE", math.inf)
    model = RVI(**{**MODELS[0][1], "epochs": 60, "lr": 1e-2}).fit(data(200, 13, seed=1))
    X = data(150, 13)
    X = X[model.infer(X, steps=62, stop_early=False).converged.numpy()]
    assert len(X) > 64
    plans = fits_of(monkeypatch)
    assert model.infer(X).converged.all()
    assert {plan.steps for plan in plans} == {62} and len(plans) <= -(-len(X) // 64)


@pytest.mark.parametrize("columns, by", [(slice(-10, -5), 40.0), (slice(-5, None), 200.0)])
def test_rows_that_stick_start_again_from_the_other_side(monkeypatch, columns, by):
    """Some start with means too far off for their steps, or with standard deviations beyond float32."""
    model = RVI(**{**MODELS[0][1], "epochs": 60, "lr": 1e-2}).fit(data(200, 13, seed=1))
    X, there = data(70, 13), LinearStart.__call__
    sticks = torch.from_numpy(X[:, 0] > 0)
    well = model.infer(X, lr=0.03, start="prior", stop_early=False)

    def far(self, p, x, mask):
        p = there(self, p, x, mask)
        p[:, columns] += by * (x[:, :1] > 0)
        return p

    monkeypatch.setattr(LinearStart, "__call__", far)
    stuck = model.infer(X, lr=0.03, stop_early=False)
    assert sticks.sum() > 9 and not (stuck.elbo[sticks] > well.elbo[sticks] - 5).any()
    plans = fits_of(monkeypatch)
    found = model.infer(X, lr=0.03)
    assert {plan.start for plan in plans} == {"linear", None, "prior"}
    assert torch.equal(found.elbo[sticks], well.elbo[sticks])


def test_rows_that_converge_in_a_bad_place_start_again(monkeypatch):
    X, there = data(270, 13, seed=1), LinearStart.__call__
    model, X = RVI(**{**MODELS[0][1], "epochs": 60, "lr": 1e-2}).fit(X[:200]), X[200:]
    moved = torch.from_numpy(X[:, 0] > 0)

    def far(self, p, x, mask):
        p = there(self, p, x, mask)
        p[:, -10:-5] += 40 * (x[:, :1] > 0)
        return p

    monkeypatch.setattr(LinearStart, "__call__", far)
    monkeypatch.setattr(infer, "_cannot_gain", lambda fits, plan, p, *rest: torch.ones(len(p), dtype=torch.bool))
    again = model.infer(X, lr=0.03)
    monkeypatch.setattr(infer, "IMPROBABLE", math.inf)
    bad = model.infer(X, lr=0.03)
    assert moved.sum() > 9 and (again.elbo > bad.elbo + 5)[moved].all()
    same = (bits(again) == bits(bad)).all(1)
    assert again.converged.all() and same[~moved].float().mean() > 0.9 and not same[moved].any()


@pytest.mark.parametrize("cls, kw", MODELS)
def test_parameters_are_those_of_the_better_descent(monkeypatch, cls, kw):
    """Also where no row of the call has converged: a round's rows may be seen in memory that others hold."""
    model, X = cls(**kw).fit(data(80, 13, seed=1)), 3 * data(40, 13)
    monkeypatch.setattr(infer, "CONVERGED", -1.0)
    whole = model.infer(X)
    for rows in (slice(None), slice(0, 1), slice(1, 2), slice(2, 3)):
        found = model.infer(X[rows])
        assert torch.equal(bits(found), bits(whole)[rows])
        torch.testing.assert_close(model.model_.posterior.mean_of(found.parameters).detach(), found.mean)


@pytest.mark.parametrize("argument", [{"start": "ridge"}, {"stop_early": "no"}])
def test_arguments_of_infer_are_checked(argument):
    model = RVI(**MODELS[0][1]).fit(data(80, 13, seed=1))
    with pytest.raises((TypeError, ValueError), match=next(iter(argument))):
        model.infer(data(3, 13), **argument)


def test_epochs_protocol_equals_dense_adam_over_minibatches():
    """One row visited once every ceil(M / B) steps under dense Adam in float64, fed the same noise."""
    model = RVI(**MODELS[0][1], lr=1e-3, schedule="constant").fit(data(80, 13, seed=1))
    X, steps = data(100, 13), 30
    got = model.infer(X, steps=steps, protocol="epochs").parameters
    missed = -(-100 // model.batch_size_) - 1
    assert missed == 3
    module, row_ids = model.model_.double(), Observations(X).row_ids()
    x, mask = model.units_.to_model(*Observations(X).read(slice(None)))
    rows = torch.nn.Parameter(module.posterior.initial_values(row_ids).double())
    adam = torch.optim.Adam([rows], lr=1e-3)
    for step in range(steps):
        for visit in range(missed + 1):
            adam.zero_grad(set_to_none=False)
            if visit == 0:
                noise = module.posterior.noise(row_ids, "infer", step, seed=model.seed).float().double()
                z, kl = module.posterior._sample(rows, noise)
                nll = module.likelihood.nll(module.decoder(z), x.double(), mask)
                module.row_loss(nll, kl).sum().backward()
            elif rows.grad is None:
                rows.grad = torch.zeros_like(rows)
            if step < steps - 1 or visit == 0:
                adam.step()
    assert (got.double() - rows.detach()).abs().max() < 2e-5


def test_row_protocol_does_not_depend_on_the_number_of_rows_but_epochs_does():
    model = RVI(**MODELS[0][1]).fit(data(80, 13, seed=1))
    X = data(100, 13)
    assert torch.equal(bits(model.infer(X, steps=5))[:3], bits(model.infer(X[:3], steps=5)))
    assert not torch.equal(
        bits(model.infer(X, steps=5, protocol="epochs"))[:3], bits(model.infer(X[:3], steps=5, protocol="epochs"))
    )


def test_inference_changes_nothing_in_the_model():
    model = RVI(**MODELS[0][1]).fit(data(80, 13, seed=1))
    before = {k: v.clone() for k, v in model.model_.state_dict().items()}
    model.infer(data(70, 13), steps=5)
    assert all(torch.equal(before[k], v) for k, v in model.model_.state_dict().items())
    assert all(p.grad is None for p in model.model_.decoder.parameters())


def test_calls_in_threads_give_the_number_of_threads_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = RVI(**MODELS[0][1]).fit(data(80, 13, seed=1))
        X = data(100, 13)
        alone = bits(model.infer(X, steps=5))
        with ThreadPoolExecutor(3) as pool:
            for found in pool.map(lambda _: bits(model.infer(X, steps=5)), range(9)):
                assert torch.equal(found, alone)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
