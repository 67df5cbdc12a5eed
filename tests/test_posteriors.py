"""RelayPosterior and MeanFieldPosterior: their pieces agree, and their noise depends on (seed, step, row) alone."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import Tensor

import rvi_fast
from rvi_fast.functional import philox_normal, relay_mean
from rvi_fast.nn import MeanFieldPosterior, RelayPosterior
from rvi_fast.optim import RowAdam

N, T = 11, 5
GROUPS = (4, 6)
KINDS = {
    "relay": lambda **settings: RelayPosterior(N, T, **{"groups": GROUPS, "active": 0.5, **settings}),
    "softmax": lambda **settings: RelayPosterior(N, T, GROUPS, active=1, coefficients="softmax", **settings),
    "mean field": lambda **settings: MeanFieldPosterior(N, T, **settings),
}
Posterior = RelayPosterior | MeanFieldPosterior


with_kernels = pytest.mark.parametrize("device", [pytest.param("triton", marks=pytest.mark.triton)], indirect=True)


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


def train(posterior: Posterior, steps: int = 4) -> RowAdam:
    """A few steps that touch some rows only, so that others are behind."""
    optimizer = RowAdam(posterior.parameters(), lr=0.1)
    for t in range(steps):
        step(posterior, optimizer, torch.tensor([t, 0, t + 3], device=posterior.step.device))
    return optimizer


def step(posterior: Posterior, optimizer: RowAdam, rows: Tensor) -> Tensor:
    optimizer.zero_grad()
    z, kl = posterior(rows)
    loss = ((z - 1).square().sum(1) + 0.1 * kl).mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def mean_by_hand(posterior: Posterior) -> Tensor:
    read = posterior.table.read
    if isinstance(posterior, MeanFieldPosterior):
        return read("mean")
    relays = relay_mean(read("coef"), posterior.relays, posterior.groups, posterior.active, posterior.coefficients)
    return relays + read("residual")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mean_std_distribution_and_divergence_agree(make, dtype):
    posterior = make(dtype=dtype)
    train(posterior)
    rows = torch.tensor([3, 0, 10, 3])
    with torch.no_grad():
        mean, log_std, q = posterior.mean(rows), posterior.log_std(rows), posterior.distribution(rows)
        z, kl = posterior(rows, sample=False)
    torch.testing.assert_close(mean, mean_by_hand(posterior)[rows])
    assert torch.equal(log_std, posterior.table.read("log_std")[rows])
    assert torch.equal(z, mean) and torch.equal(q.mean, mean) and torch.equal(q.stddev, log_std.exp())
    prior = torch.distributions.Normal(torch.zeros(T, dtype=dtype), torch.ones(T, dtype=dtype))
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(q, prior).sum(1))
    assert all(t.dtype == dtype for t in (mean, log_std, z, kl))


@torch.no_grad()
def test_sample_follows_training(make):
    posterior, rows = make(), torch.arange(N)
    mean, (sampled, _) = posterior.mean(rows), posterior.train()(rows)
    assert not torch.equal(sampled, mean)
    assert torch.equal(posterior.train()(rows, sample=False)[0], mean)
    assert torch.equal(posterior.eval()(rows)[0], mean)
    assert torch.equal(posterior.eval()(rows, sample=True)[0], sampled)


@torch.no_grad()
def test_a_sample_is_mean_plus_std_times_keyed_noise(make):
    posterior, rows = make(seed=7), torch.tensor([4, 2, 9])
    for settings, key in (({}, (7, 0)), ({"seed": 3}, (3, 0)), ({"step": 5}, (7, 5)), ({"seed": 3, "step": 5}, (3, 5))):
        z, _ = posterior(rows, **settings)
        noise = philox_normal(key[0], "train", key[1], rows, T)
        torch.testing.assert_close(z, posterior.mean(rows) + posterior.log_std(rows).exp() * noise)


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(make):
    posterior = make()
    z, kl = posterior(torch.arange(N))
    order = torch.tensor([7, 2, 7, 0])
    torch.testing.assert_close(posterior(order), (z[order], kl[order]))


def test_only_a_step_advances_the_noise(make):
    posterior = make()
    optimizer = RowAdam(posterior.parameters(), lr=0.0)  # the values stand still, so that the noise alone can differ
    rows = torch.arange(N)
    first = posterior(rows)[0].detach()
    for expected in (1, 2):
        before = posterior(rows)[0].detach()
        assert torch.equal(posterior(rows)[0], before)
        step(posterior, optimizer, rows)
        after = posterior(rows)[0].detach()
        assert posterior.step.item() == expected and not torch.equal(after, before)
    assert torch.equal(posterior(rows, step=0)[0], first)


def test_training_lowers_the_loss(make):
    posterior = make()
    optimizer = RowAdam(posterior.parameters(), lr=0.03)
    losses = [step(posterior, optimizer, torch.arange(N)) for _ in range(150)]
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("path", ["deepcopy", "pickle", "state_dict"])
def test_copies_keep_values_and_noise(make, path):
    posterior = make()
    train(posterior)
    if path == "deepcopy":
        other = copy.deepcopy(posterior)
    elif path == "pickle":
        file = io.BytesIO()
        torch.save(posterior, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = make(seed=posterior.seed)
        other.load_state_dict(posterior.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(other(torch.arange(N)), posterior(torch.arange(N)), rtol=0, atol=1e-7)
    assert other.step.item() == 4
    step(posterior, RowAdam(posterior.parameters()), torch.arange(N))
    assert other.step.item() == 4


def test_initial_values_are_those_of_the_table(make):
    """What a new row starts from is what a training row of that id started from."""
    posterior = make(seed=3)
    with torch.no_grad():
        assert torch.equal(posterior.initial_values(torch.arange(N)), posterior.table(torch.arange(N)))
        assert not torch.equal(make(seed=4).mean(torch.arange(N)), posterior.mean(torch.arange(N)))


def test_initial_spread():
    settings = {"relay_std": 2.0, "coef_std": 0.5, "residual_std": 0.2, "log_std": -3.0}
    posterior = RelayPosterior(3000, 8, groups=(30, 50), **settings)
    table = posterior.table
    assert float(posterior.relays.detach().std()) == pytest.approx(2.0, rel=0.1)
    assert float(table.read("coef").std()) == pytest.approx(0.5, rel=0.02)
    assert float(table.read("residual").std()) == pytest.approx(0.2, rel=0.02)
    assert (table.read("log_std") == -3.0).all()
    free = MeanFieldPosterior(3000, 8, mean_std=0.5, log_std=-2.0)
    assert float(free.table.read("mean").std()) == pytest.approx(0.5, rel=0.02)
    assert (free.table.read("log_std") == -2.0).all()


def test_memory_of_a_row():
    """Three numbers for each of K coefficients and 2 T latents, and the row's last step."""
    store = RelayPosterior(100, 64, groups=(25, 50, 100)).table.store
    assert store.values.nbytes + store.last.nbytes == 100 * (3 * 4 * (175 + 2 * 64) + 4)


def test_partial_means_add_up():
    posterior = KINDS["relay"]()
    with torch.no_grad():
        values = posterior.table(torch.arange(N))
        mean = posterior.mean_of(values)
        coef, residual = values[:, :10], values[:, 10 : 10 + T]
        torch.testing.assert_close(posterior.partial_mean_of(values, None, residual=True), mean)
        torch.testing.assert_close(posterior.partial_mean_of(values, None, residual=False), mean - residual)
        first = relay_mean(coef[:, :4], posterior.relays[:4], [4], [2])
        torch.testing.assert_close(posterior.partial_mean_of(values, 1, residual=False), first)
        assert not posterior.partial_mean_of(values, 0, residual=False).any()
    with pytest.raises(ValueError, match=r"up_to_group must lie in 0 \.\. 2; got 3"):
        posterior.partial_mean_of(values, 3, residual=True)


@pytest.mark.parametrize(("active", "counts"), [(1, (1, 1)), (0.5, (2, 3)), (1.0, GROUPS), ((2, 0.5), (2, 3))])
def test_active(active, counts):
    assert RelayPosterior(N, T, GROUPS, active).active == counts


def test_sizes_may_be_numpys():
    posterior = RelayPosterior(np.int64(N), np.int32(T), np.array(GROUPS), np.float32(0.5))
    assert posterior.active == (2, 3) and posterior.groups == GROUPS
    assert all(type(size) is int for size in (posterior.num_rows, posterior.latent_dim, *posterior.groups))
    assert RelayPosterior(N, T, GROUPS, np.int64(2)).active == (2, 2)
    assert MeanFieldPosterior(np.int64(N), np.int64(T)).latent_dim == T


def test_half_precision_cannot_sample(make):
    posterior = make().half()
    with pytest.raises(TypeError, match=r"Posterior samples in float32 or float64.*float16.*autocast"), torch.no_grad():
        posterior(torch.arange(3), sample=True)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"groups": ()}, ValueError, "groups must be one or more positive ints"),
        ({"groups": (25, 0)}, ValueError, "groups must be one or more positive ints"),
        ({"groups": (2.5,)}, ValueError, "groups must be one or more positive ints"),
        ({"active": 5}, ValueError, "active=5 is out of range for a group of 4"),
        ({"active": 0}, ValueError, "active=0 is out of range"),
        ({"active": 0.0}, ValueError, "active as a float is a share"),
        ({"active": 1.1}, ValueError, "active as a float is a share"),
        ({"active": "all"}, TypeError, "active must be an int"),
        ({"active": (1, 2, 3)}, ValueError, "active has 3 entries for 2 groups"),
        ({"coefficients": "sparse"}, ValueError, "coefficients must be 'linear' or 'softmax'"),
        ({"latent_dim": 0}, ValueError, "latent_dim must be a positive int"),
        ({"latent_dim": 16384}, ValueError, "dim of a RowTable must be at most 16,384"),
        ({"coef_std": -0.1}, ValueError, "init_std of 'coef' must be a finite number, 0 or above; got -0.1"),
        ({"num_rows": -1}, ValueError, "num_rows must be a positive int"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        RelayPosterior(**{"num_rows": N, "latent_dim": T, "groups": GROUPS, **settings})


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (torch.tensor([N]), IndexError, r"rows must lie in 0 \.\. 10; got 11"),
        (torch.tensor([[0, 1]]), ValueError, r"rows must have shape \[B\]"),
        (torch.tensor([0.5]), TypeError, "rows must be an int64 tensor"),
    ],
)
def test_bad_rows(make, rows, error, message):
    with pytest.raises(error, match=message), torch.no_grad():
        make()(rows)


@with_kernels
@pytest.mark.parametrize("settings", [{}, {"active": 1}, {"active": 1.0, "groups": (1,)}], ids=str)
def test_trains_alike_with_kernels(device, settings):
    """With its columns under one clock and under two, read in one launch and in two."""
    for ranges in (1, 2):
        losses, tables = [], []
        for backend in ("torch", rvi_fast.get_backend()):
            posterior = KINDS["relay"](**settings, dtype=torch.float64).to(device)
            relays, *rows = posterior.relays, *posterior.table.parameters()
            groups = [{"params": [relays, *rows[:ranges]]}, {"params": rows[ranges:], "lr": 0.05}]
            if ranges == 1:
                groups = [{"params": [relays, *rows]}]
            with rvi_fast.backend(backend):
                optimizer = RowAdam(groups, lr=0.1)
                batches = [torch.tensor([t, 0, t + 3], device=device) for t in range(5)]
                losses.append(torch.stack([step(posterior, optimizer, rows) for rows in batches]))
                tables.append(torch.cat((posterior.table.weight.detach().flatten(), relays.detach().flatten())))
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)  # normals of two backends differ by 2e-6
        torch.testing.assert_close(*tables, rtol=1e-4, atol=1e-5)


@with_kernels
def test_a_table_is_read_in_one_launch(device, monkeypatch):
    posterior = KINDS["relay"]().to(device)
    optimizer = train(posterior)
    assert not posterior.table.store.up_to_date()
    monkeypatch.setattr(type(posterior.table), "forward", None)  # would be called to read the rows first
    z, kl = posterior(torch.tensor([2, 9], device=device))
    z.sum().backward()
    optimizer.step()
    assert z.isfinite().all() and kl.isfinite().all()
