"""The fused training step against the same step taken apart: a model's forward and backward, then RowAdam."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, library, nn

import rvi_fast
from rvi_fast import dispatch
from rvi_fast.elbo_step import ElboStep, form_of
from rvi_fast.likelihoods import Bernoulli, Gaussian
from rvi_fast.model import RowModel
from rvi_fast.nn import MeanFieldPosterior, MLPDecoder, RelayPosterior
from rvi_fast.ops import elbo, elbo_cpu
from rvi_fast.ops.elbo import Batch, elbo_step_
from rvi_fast.optim import RowAdam

N = 20
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6}


def make_model(
    latent_dim=5, columns=19, groups=(3, 9), active=0.5, hidden=(7, 6), linear_path=False, activation="relu",
    likelihood=None, kl_weight=0.7, dtype=torch.float64,
):  # fmt: skip
    torch.manual_seed(0)
    likelihood = likelihood or Gaussian(0.4)
    likelihood.bind(columns)
    if groups:
        posterior = RelayPosterior(N, latent_dim, groups, active, seed=3, log_std=-1.0, coef_std=0.5)
    else:
        posterior = MeanFieldPosterior(N, latent_dim, seed=3, log_std=-1.0)
    decoder = MLPDecoder(latent_dim, columns, hidden, linear_path=linear_path, activation=activation)
    return RowModel(posterior, decoder, likelihood, kl_weight).to(dtype)


def exact(device: torch.device) -> torch.dtype:
    """The dtype in which the step is compared most closely: compiled kernels have float32 alone."""
    return torch.float32 if device.type == "cuda" else torch.float64


def make_optimizer(model: RowModel, lr=0.02, row_lr=0.05, weight_decay=0.1, row_decay=0.0) -> RowAdam:
    scale = list(model.likelihood.parameters())
    rows = list(model.posterior.table.parameters())
    relays = [model.posterior.relays] if isinstance(model.posterior, RelayPosterior) else []
    weights = [*relays, *model.decoder.parameters()]
    return RowAdam(
        [
            {"params": rows, "lr": row_lr, "weight_decay": row_decay},
            {"params": weights, "lr": lr, "weight_decay": weight_decay},
            *([{"params": scale, "lr": 2 * lr}] if scale else []),
        ]
    )


def make_data(columns=19, missing=0.3, dtype=torch.float64, binary=False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(N, columns, generator=generator, dtype=torch.float64)
    mask = torch.rand(N, columns, generator=generator) >= missing
    x = (x > 0.5).double() if binary else x
    return x.to(dtype), mask


def batches(sizes=(12, 9, 16, 3)) -> list[Tensor]:
    """Rows of each step: without repeats, some revisited after a gap, some never."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randperm(N, generator=generator)[:size] for size in sizes]


def train_apart(model: RowModel, optimizer: RowAdam, x: Tensor, mask: Tensor, steps: list[Tensor]) -> list[float]:
    """What ElboStep does, by autograd and RowAdam, in PyTorch."""
    sums = []
    with rvi_fast.backend("torch"):
        for rows in steps:
            optimizer.zero_grad()
            nll, kl = model(rows, x[rows], mask[rows])
            model.row_loss(nll, kl).mean().backward()
            optimizer.step()
            sums += [nll.detach().sum().item(), kl.detach().sum().item()]
    return sums


def train_fused(
    model: RowModel, optimizer: RowAdam, x: Tensor, mask: Tensor | None, steps: list[Tensor], **how
) -> list[float]:
    fused = ElboStep(model, optimizer)
    sums = []
    for rows in steps:
        sums += [value.item() for value in fused.step(rows.to(x.device), x, mask, **how)]
    return sums


def state_of(model: RowModel, optimizer: RowAdam) -> dict[str, Tensor]:
    """Parameters and moments, up to date."""
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    for number, moments in optimizer.state_dict()["state"].items():
        state |= {f"{name} of {number}": torch.as_tensor(value) for name, value in moments.items()}
    return {name: value.detach().double().cpu().clone() for name, value in state.items()}


def assert_near(found: dict[str, Tensor], truth: dict[str, Tensor], peer: dict[str, Tensor], tolerance: float) -> None:
    """|found - truth| <= |peer - truth| + tolerance, in the largest entry of every tensor."""
    assert found.keys() == truth.keys() == peer.keys()
    for name in truth:
        error, allowed = ((state[name] - truth[name]).abs().max() for state in (found, peer))
        assert error <= 2 * allowed + tolerance, f"{name}: {error:.3g} > {allowed:.3g}"


def check(
    device: torch.device,
    *,
    missing=0.3,
    binary=False,
    dtype=None,
    sizes=(12, 9),
    mask_as="bool",
    **form,
) -> None:
    """Equal to the step taken apart in float64; in float32 no further from it than that step in float32 is."""
    columns, dtype = form.get("columns", 19), dtype or exact(device)
    x, mask = make_data(columns, missing, binary=binary)
    states = {}
    for kind in {dtype, torch.float64}:
        apart = make_model(**form, dtype=kind)
        optimizer = make_optimizer(apart)
        expected = train_apart(apart, optimizer, x.to(kind), mask, batches(sizes))
        states[kind] = state_of(apart, optimizer), expected
    truth, expected = states[torch.float64]
    fused = make_model(**form, dtype=dtype).to(device)
    fused_optimizer = make_optimizer(fused)
    data = as_given(x.to(dtype), mask, mask_as)
    found = train_fused(fused, fused_optimizer, *(t if t is None else t.to(device) for t in data), batches(sizes))
    assert found == pytest.approx(expected, rel=1e-10 if dtype == torch.float64 else 1e-4)
    assert_near(state_of(fused, fused_optimizer), truth, states[dtype][0], TOLERANCE[dtype])


def as_given(x: Tensor, mask: Tensor, mask_as: str) -> tuple[Tensor, Tensor | None]:
    """The same data with their holes as a bool mask, as bits or as NaN; NaN behind the holes in any case."""
    if not x.is_floating_point() or mask_as == "nan":
        return x.masked_fill(~mask, torch.nan), None
    x = x.masked_fill(~mask, torch.nan)
    if mask_as == "bits":
        return x, torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))
    return x, mask


FORMS = {
    "two layers": {"sizes": (9, 7, 8, 3)},
    "learned scale and linear path, columns beyond a tile": {
        "likelihood": Gaussian("learned"), "linear_path": True, "hidden": (17,), "columns": 131, "activation": "silu",
        "mask_as": "bits",
    },
    "bernoulli without hidden layers, one relay": {
        "likelihood": Bernoulli(), "binary": True, "hidden": (), "groups": (1,), "active": 1, "mask_as": "nan",
    },
    "three layers, one column, one latent, all relays": {
        "hidden": (3, 18, 4), "activation": "tanh", "columns": 1, "latent_dim": 1, "active": 1.0, "missing": 0.0,
    },
    "wide latents, many groups, half missing": {
        "latent_dim": 33, "hidden": (20,), "activation": "gelu", "missing": 0.5, "active": 1, "groups": (4, 5, 6),
        "linear_path": True,
    },
    "several programs": {"sizes": (20,)},
    "nothing observed": {"missing": 1.1, "sizes": (5,)},
    "float32": {"dtype": torch.float32},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_equals_the_step_taken_apart(device, form):
    check(device, **copy.deepcopy(FORMS[form]))


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory holds NaN."""
    fresh = torch.Tensor.new_empty

    def new_empty(self, *size, **how):
        made = fresh(self, *size, **how)
        return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(77)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def test_more_blocks_than_programs(device, monkeypatch, poisoned):
    if rvi_fast.get_backend() == "triton":
        monkeypatch.setattr("rvi_fast.kernels.elbo_step.multiprocessors", lambda device: 1)
    check(device, sizes=(20,), hidden=(6,))


def test_same_bits_on_every_run(device, poisoned):
    x, mask = (t.to(device) for t in make_data(dtype=torch.float32))
    states = []
    for _ in range(2):
        model = make_model(dtype=torch.float32, hidden=()).to(device)
        optimizer = make_optimizer(model)
        train_fused(model, optimizer, x, mask, batches((18,)))
        states.append(state_of(model, optimizer))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_bytes_that_were_gathered_with_places_left_over(device):
    """The batch's own rows of bytes, and fewer of them than places, are a smaller batch of scaled floats."""
    x, mask = make_data()
    pixels = (255 * x).to(torch.uint8)
    rows = batches((9,))[0]
    apart = make_model(hidden=())
    optimizer = make_optimizer(apart)
    train_apart(apart, optimizer, pixels.double() / 255, mask, [rows])
    fused = make_model(hidden=(), dtype=exact(device)).to(device)
    fused_optimizer = make_optimizer(fused)
    step = ElboStep(fused, fused_optimizer)
    places = torch.cat((rows, rows[:4])).to(device)
    batch = (t[places.cpu()].to(device) for t in (pixels, mask))
    step.step(places, *batch, count=torch.tensor(9, device=device), x_scale=1 / 255, gathered=True)
    assert step.sums[2] == 9
    truth = state_of(apart, optimizer)
    assert_near(state_of(fused, fused_optimizer), truth, truth, TOLERANCE[exact(device)])


def test_an_empty_batch_changes_nothing(device):
    model = make_model(dtype=exact(device)).to(device)
    optimizer = make_optimizer(model)
    step = ElboStep(model, optimizer)
    before = state_of(model, optimizer)
    x = torch.zeros(N, 19, dtype=torch.float64, device=device)
    step.step(torch.empty(0, dtype=torch.int64, device=device), x)
    after = state_of(model, optimizer)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_steps_apart_before_and_after():
    """Fused steps take over from RowAdam's and give back to them; rates may change on the way; the table is flushed."""
    x, mask = make_data()
    models = [make_model(likelihood=Gaussian("learned")) for _ in range(2)]
    optimizers = [make_optimizer(model, row_decay=0.2) for model in models]
    first, second, third = batches((12, 9, 16, 3))[:3]
    expected = train_apart(models[0], optimizers[0], x, mask, [first])
    train_apart(models[1], optimizers[1], x, mask, [first])
    for optimizer in optimizers:
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] *= 0.5 + number
    expected = train_apart(models[0], optimizers[0], x, mask, [second, third])
    step = ElboStep(models[1], optimizers[1])
    found = [float(s) for s in step.step(second, x, mask)]
    models[1].posterior.table.store.flush()
    found += [float(s) for s in step.step(third, x, mask)]
    assert found == pytest.approx(expected, rel=1e-10)
    for model, optimizer in zip(models, optimizers, strict=True):
        train_apart(model, optimizer, x, mask, [first])
    truth = state_of(models[0], optimizers[0])
    assert_near(state_of(models[1], optimizers[1]), truth, truth, 1e-11)


def test_new_rates_reach_the_next_step():
    x, mask = make_data()
    model = make_model()
    optimizer = make_optimizer(model, weight_decay=0.0)
    step = ElboStep(model, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = {name: value.clone() for name, value in model.state_dict().items() if "extra" not in name}
    step.step(batches()[0], x, mask)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_rates_that_a_row_adam_wrote_in_between_are_written_anew(device):
    x, mask = (t.to(device) for t in make_data(dtype=exact(device)))
    model = make_model(dtype=exact(device)).to(device)
    optimizer = make_optimizer(model)
    step = ElboStep(model, optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]
    for lr in (rates, [0.0] * len(rates), rates):
        for group, value in zip(optimizer.param_groups, lr, strict=True):
            group["lr"] = value
        if lr is rates:
            step.step(torch.tensor([1], device=device), x, mask)
            assert step.clock.rates[0] == rates[0]
        else:
            optimizer.zero_grad()
            torch.cat(model(torch.tensor([1], device=device), x[1:2], mask[1:2])).sum().backward()
            optimizer.step()


def test_a_new_kl_weight_reaches_the_next_step():
    x, mask = make_data()
    models = [make_model() for _ in range(2)]
    optimizers = [make_optimizer(model) for model in models]
    step = ElboStep(models[1], optimizers[1])
    for model in models:
        model.kl_weight = 0.1
    train_apart(models[0], optimizers[0], x, mask, batches((12,)))
    step.step(batches((12,))[0], x, mask)
    truth = state_of(models[0], optimizers[0])
    assert_near(state_of(models[1], optimizers[1]), truth, truth, 1e-11)


@pytest.mark.triton
def test_a_count_of_zero_leaves_the_shared_parameters():
    """It is refused, but on a GPU nobody looks."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(dtype=exact(device)).to(device)
    step = ElboStep(model, make_optimizer(model))
    before = step.shared.weights.clone()
    x, mask = (t.to(device) for t in make_data(dtype=exact(device)))
    none, rows = torch.zeros((), dtype=torch.int64, device=device), torch.arange(3, device=device)
    elbo.launch(step.table(), Batch(rows, none, x, mask, 1.0, False), step.shared, step.form)
    assert torch.equal(step.shared.weights, before) and step.clock.counters[0] == 0


def test_room_is_made_when_the_clock_is_full(monkeypatch):
    monkeypatch.setattr("rvi_fast.elbo_step.MAX_STEPS_BEHIND", 2)
    check(torch.device("cpu"))


def test_losses_add_up_until_they_are_zeroed():
    x, mask = make_data()
    model = make_model()
    step = ElboStep(model, make_optimizer(model))
    sums = [[float(s) for s in step.step(rows, x, mask)] for rows in batches((12, 9))]
    assert step.sums.tolist() == pytest.approx([sums[0][0] + sums[1][0], sums[0][1] + sums[1][1], 21])


def test_operator_is_registered_properly(device):
    x, mask = make_data(4)
    model = make_model(columns=4, hidden=(), groups=(2,), latent_dim=2, dtype=exact(device)).to(device)
    step = ElboStep(model, make_optimizer(model))
    table, rows = step.table(), torch.arange(3, device=device)
    step.clock.reserve(1)
    batch = rows, torch.tensor(3, device=device), x.to(device), mask.to(device), 1.0, False
    arguments = (*table, *batch, *step.shared, *step.form)
    utilities = (
        ("test_schema", "test_faketensor") if rvi_fast.get_backend() == "triton" else ("test_autograd_registration",)
    )
    library.opcheck(torch.ops.rvi_fast.elbo_step_.default, arguments, test_utils=utilities)


def test_offsets_pass_31_bits(device):
    """A row far into a table: only the pages of that row are there."""
    model = make_model(columns=4, hidden=(), groups=(2,), latent_dim=2, dtype=exact(device)).to(device)
    optimizer = make_optimizer(model)
    step = ElboStep(model, optimizer)
    table = step.table()
    size = table.values[0].numel()
    rows = torch.tensor([2**31 // size + 7], device=device)
    number = int(rows) + 1
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 8 * number * size:
        pytest.skip("needs 17 GB")
    values = torch.empty(number, *table.values.shape[1:], dtype=exact(device), device=device)
    values[rows] = table.values[:1]
    last = torch.empty(number, dtype=torch.int32, device=device)
    last[rows] = 0
    x, mask = (t[:1].to(device) for t in make_data(4))
    far = table._replace(values=values, last=last)
    batch = Batch(rows, torch.tensor(1, device=device), x, mask, 1.0, True)
    elbo_step_(far, batch, step.shared, step.form)
    moved = values[rows].cpu()
    peer = make_model(columns=4, hidden=(), groups=(2,), latent_dim=2, dtype=exact(device))
    peer_step = ElboStep(peer, make_optimizer(peer))
    with rvi_fast.backend("torch"):
        start = peer_step.table().values[:1].clone()
        near = peer_step.table()._replace(values=torch.empty(values.shape, dtype=values.dtype), last=last.cpu())
        near.values[rows.cpu()], near.last[rows.cpu()] = start, 0
        batch = Batch(rows.cpu(), torch.tensor(1), x.cpu(), mask.cpu(), 1.0, True)
        elbo_step_(near, batch, peer_step.shared, peer_step.form)
    torch.testing.assert_close(moved, near.values[rows.cpu()].cpu(), rtol=0, atol=TOLERANCE[exact(device)])


def other_likelihood() -> RowModel:
    class Laplace(Gaussian):
        pass

    return make_model(likelihood=Laplace(1.0))


def softmax() -> RowModel:
    model = make_model()
    model.posterior = RelayPosterior(N, 5, (3,), 1, coefficients="softmax")
    return model


def unbound() -> RowModel:
    model = make_model()
    model.likelihood = Gaussian()
    return model


def frozen() -> RowModel:
    model = make_model()
    model.decoder.head.bias.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (softmax, "its coefficients are 'softmax', not 'linear'"),
        (other_likelihood, "neither Gaussian nor Bernoulli"),
        (frozen, "some of its parameters are frozen"),
        (unbound, "its learned scale has no columns yet"),
        (lambda: make_model(dtype=torch.float16), "torch.float16 tables"),
        (lambda: nn.Linear(2, 2), "neither a RelayPosterior nor a MeanFieldPosterior"),
    ],
)
def test_says_which_models_it_cannot_train(model, reason):
    assert reason in ElboStep.supports(model())


def test_wide_models_are_for_the_cpu_alone():
    model = make_model(hidden=(129,))
    assert ElboStep.supports(model) is None
    table = model.posterior.table.store.values.float().to("meta")  # stands for a GPU's
    assert elbo.unsupported(table, 5, form_of(model)) == "latent_dim or hidden layers above 128"


def test_says_which_optimizers_it_cannot_follow():
    model = make_model(likelihood=Gaussian("learned"))
    rows, relays = list(model.posterior.table.parameters()), model.posterior.relays
    rest = [*model.decoder.parameters(), *model.likelihood.parameters()]
    assert ElboStep.supports(model, make_optimizer(model)) is None
    for groups, reason in [
        ([*rows, relays], "does not train all"),
        ([{"params": rows[:1]}, {"params": [*rows[1:], relays, *rest]}], "different groups"),
        ([{"params": [*rows, relays]}, {"params": rest}], "relays and decoder are in different groups"),
        ([{"params": [*rows, relays, *rest[:-1]]}, {"params": rest[-1:], "eps": 1e-7}], "betas or eps"),
    ]:
        assert reason in ElboStep.supports(model, RowAdam(groups))
    lazy = make_model()
    reason = ElboStep.supports(lazy, RowAdam(lazy.parameters(), mode="lazy"))
    assert "lazy" in reason
    with pytest.raises(ValueError, match=r"ElboStep cannot train this model: its rows are trained with mode='lazy'"):
        ElboStep(lazy, RowAdam(lazy.parameters(), mode="lazy"))


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"rows": torch.tensor([N])}, IndexError, "rows must lie in 0 .. 19; got 20"),
        ({"rows": torch.tensor([0.5])}, TypeError, "rows must be an int64 tensor"),
        ({"rows": torch.tensor([3, 3])}, ValueError, "rows must not repeat within a step"),
        ({"count": torch.tensor(0)}, ValueError, r"count must lie in 1 .. 1, the number of rows; got 0"),
        ({"count": torch.tensor(2)}, ValueError, r"count must lie in 1 .. 1, the number of rows; got 2"),
        ({"x": torch.zeros(N - 1, 19)}, ValueError, "x must have shape"),
        ({"x": torch.zeros(N, 3)}, ValueError, r"x must have shape \[rows = 20, 19\]|x must have shape"),
        ({"mask": torch.ones(N, 19)}, TypeError, "mask must be a bool tensor"),
        ({"mask": torch.ones(3, 19, dtype=torch.bool)}, ValueError, "mask must have shape"),
        ({"x": torch.zeros(N, 19, dtype=torch.uint8)}, TypeError, "mask=None takes NaN in x as missing"),
    ],
)
def test_wrong_input_is_named(change, error, sentence):
    model = make_model()
    step = ElboStep(model, make_optimizer(model))
    with pytest.raises(error, match=sentence):
        step.step(**({"rows": torch.tensor([1]), "x": torch.zeros(N, 19)} | change))


def test_replaced_parameters_are_noticed():
    model = make_model()
    step = ElboStep(model, make_optimizer(model))
    model.posterior.relays.data = model.posterior.relays.data.clone()
    sentence = "were replaced since this ElboStep was made; make a new one"
    with pytest.raises(RuntimeError, match=sentence):
        step.step(torch.tensor([1]), torch.zeros(N, 19))
    optimizer = make_optimizer(model)
    step = ElboStep(model, optimizer)
    step.step(torch.tensor([1]), torch.zeros(N, 19))
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=sentence):
        step.step(torch.tensor([1]), torch.zeros(N, 19))
    step = ElboStep(model, optimizer)
    step.step(torch.tensor([1]), torch.zeros(N, 19))
    make_optimizer(model)
    with pytest.raises(RuntimeError, match=sentence):
        step.step(torch.tensor([1]), torch.zeros(N, 19))


def plain(dtype=torch.float64, **form):
    model = make_model(dtype=dtype, **form)
    return model, make_optimizer(model)


def test_ties_and_rows_at_rest_are_selected_as_the_equations_do(ties=(0.0, 0.5)):
    x, mask = make_data()
    states = []
    for train in (train_apart, train_fused):
        model, optimizer = plain()
        with torch.no_grad():
            table = model.posterior.table
            values = table.weight.clone()
            values[:10, :12] = torch.tensor(ties, dtype=torch.float64).repeat(6)
            table.store.assign_rows(torch.arange(N), values)
        losses = train(model, optimizer, x, mask, batches())
        states.append((losses, state_of(model, optimizer)))
    assert states[1][0] == pytest.approx(states[0][0], rel=1e-10)
    assert_near(states[1][1], states[0][1], states[0][1], TOLERANCE[torch.float64])


@pytest.mark.parametrize("likelihood", [Gaussian(0.4), Gaussian("learned"), Bernoulli()])
@pytest.mark.parametrize("hole", [torch.finfo(torch.float32).min, torch.inf, torch.nan])
def test_whatever_a_hole_holds_is_never_used(likelihood, hole):
    x, mask = make_data(dtype=torch.float32)
    states = []
    for filled in (0.0, hole):
        model, optimizer = plain(torch.float32, likelihood=copy.deepcopy(likelihood))
        train_fused(model, optimizer, x.masked_fill(~mask, filled), mask, batches())
        states.append(state_of(model, optimizer))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_nan_where_it_was_observed_is_not_hidden():
    x, mask = make_data()
    x[batches()[0][0]] = torch.nan
    model, optimizer = plain()
    assert math.isnan(train_fused(model, optimizer, x, torch.ones_like(mask), batches()[:1])[0])


def test_models_of_one_size_do_not_share_their_arrays():
    x, mask = make_data()
    alone, optimizer = plain()
    train_fused(alone, optimizer, x, mask, batches())
    pairs = [plain() for _ in range(2)]
    steps = [ElboStep(*pair) for pair in pairs]
    for rows in batches():
        for step in steps:
            step.step(rows, x, mask)
    for pair in pairs:
        assert all(torch.equal(value, state_of(alone, optimizer)[name]) for name, value in state_of(*pair).items())


@pytest.mark.skipif(not dispatch.use_numba(torch.device("cpu")), reason="the loops need numba")
def test_arrays_are_kept_for_two_sizes_and_go_when_the_step_is_released():
    x, mask = make_data()
    fused = ElboStep(*plain())
    for rows in (*batches(), *batches()):
        fused.step(rows, x, mask)
        assert 1 <= len(fused.kept) <= elbo_cpu.SIZES
    fused.release()
    assert not fused.kept


@pytest.mark.skipif(not dispatch.use_numba(torch.device("cpu")), reason="the loops need numba")
def test_loops_and_equations_take_the_same_steps():
    x, mask = make_data(dtype=torch.float32)
    states = []
    for backend in ("auto", "torch"):
        model, optimizer = plain(torch.float32)
        fused = ElboStep(model, optimizer)
        with dispatch.backend(backend):
            for rows in batches():
                fused.step(rows, x, mask)
        assert bool(fused.kept) == (backend == "auto")
        states.append(state_of(model, optimizer))
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("likelihood", [Gaussian(0.4), Gaussian("learned"), Bernoulli()])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_without_relays(likelihood, dtype):
    cpu = torch.device("cpu")
    binary = isinstance(likelihood, Bernoulli)
    check(cpu, groups=(), likelihood=likelihood, binary=binary, dtype=dtype, sizes=(12, 9, 16, 3), linear_path=True)
    reason = elbo.unsupported(torch.empty(1, 3, 4, device="meta"), 2, form_of(make_model(groups=())))
    assert reason == "rows without relays"


def test_a_step_that_would_turn_weights_round_is_refused_before_anything_moves():
    x, mask = make_data()
    model, optimizer = plain()
    fused = ElboStep(model, optimizer)
    optimizer.param_groups[1].update(lr=20.0, weight_decay=0.1)
    before = state_of(model, optimizer)
    with pytest.raises(ValueError, match=r"lr \* weight_decay must be below 1; got 20.0 \* 0.1"):
        fused.step(batches()[0], x, mask)
    assert all(torch.equal(value, before[name]) for name, value in state_of(model, optimizer).items())


def test_under_autocast_the_step_stays_in_the_models_dtype():
    x, mask = make_data(dtype=torch.float32)
    states = []
    for autocast in (False, True):
        model, optimizer = plain(torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            train_fused(model, optimizer, x, mask, batches())
        states.append(state_of(model, optimizer))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
