"""The engine alone: ways to take a step agree, cells are the same wherever they lie, and nothing is lost between."""

import copy

import numpy as np
import pytest
import torch

from rvi_fast import RVI, train
from rvi_fast.elbo_step import ElboStep
from rvi_fast.likelihoods import Gaussian
from rvi_fast.model import RowModel
from rvi_fast.nn import MLPDecoder, RelayPosterior
from rvi_fast.observations import ColumnStatistics, ColumnUnits, HiddenCells, Observations
from rvi_fast.optim import RowAdam
from rvi_fast.train import Plan, Trainer
from rvi_fast.train.cells import Source
from rvi_fast.train.steps import CapturedStep, FusedStep, SeparateStep

N, D = 50, 7
CPU = torch.device("cpu")


def numbers(seed=0, holes=0.3):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(N, D)).astype(np.float32)
    X[rng.random(X.shape) < holes] = np.nan
    return X


def images(seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (N, D)).astype(np.uint8), rng.random((N, D)) < 0.6


def model_and_optimizer(columns=D, lr=0.01):
    torch.manual_seed(0)
    posterior = RelayPosterior(N, 4, (3, 8), 0.5, seed=1)
    model = RowModel(posterior, MLPDecoder(4, columns, (6,)), Gaussian(0.5), kl_weight=1.0)
    return model, RowAdam(model.parameters(), lr=lr)


def trainer(X=None, schedule="cosine", epochs=4, batch_size=16, **kw):
    return Trainer(
        *model_and_optimizer(), numbers() if X is None else X, plan=Plan(batch_size, epochs, schedule=schedule, **kw)
    )


def state_of(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(value, right[name]) for name, value in left.items())


def test_it_trains_a_model_of_ones_own():
    mine = trainer(epochs=30)
    mine.run(show_progress=False)
    loss = mine.progress.history["loss"]
    assert mine.progress.stopped == "completed" and mine.progress.step == 30 * 4 and len(loss) == 30
    assert loss[-1] < 0.9 * loss[0]


def test_steps_in_parts_and_fused_give_the_same_curve(monkeypatch):
    fused, parts = trainer(epochs=6), trainer(epochs=6)
    fused.run(show_progress=False)
    monkeypatch.setattr("rvi_fast.train.trainer.fusable", lambda *_: False)
    kinds = []
    make = Trainer._make_step
    monkeypatch.setattr(Trainer, "_make_step", lambda self: kinds.append(make(self)) or kinds[-1])
    parts.run(show_progress=False)
    assert [type(kind) for kind in kinds] == [SeparateStep]
    for name in ("loss", "nll", "kl"):
        np.testing.assert_allclose(fused.progress.history[name], parts.progress.history[name], rtol=2e-5)
    assert fused.progress.history["lr"] == parts.progress.history["lr"]


class Graphs:
    """Stands for CUDA's: what was captured runs again when replayed, and not before."""

    def __init__(self):
        self.captured = 0

    def __call__(self, launch):
        self.captured += 1
        return launch


def captured_and_fused():
    X = numbers()
    cells = Source(Observations(X), ColumnUnits.identity(D), None, CPU).resident()
    (model, optimizer), (other, other_optimizer) = model_and_optimizer(), model_and_optimizer()
    graphs = Graphs()
    return CapturedStep(model, optimizer, cells, 16, graphs), FusedStep(other, other_optimizer), cells, graphs


def test_a_captured_step_takes_partial_batches_and_new_rates():
    captured, fused, cells, graphs = captured_and_fused()
    rng = np.random.default_rng(0)
    for number, size in enumerate((16, 16, 5, 16, 1, 16)):
        rows = torch.from_numpy(rng.permutation(N)[:size])
        for step in (captured, fused):
            for group in step.elbo_step.optimizer.param_groups:
                group["lr"] = 0.01 / (1 + number)
            step(rows, cells)
    assert graphs.captured == 1
    assert_same(state_of(captured.elbo_step.model), state_of(fused.elbo_step.model))
    assert captured.sums.tolist() == fused.sums.tolist() and captured.sums[2] == 70


def test_where_nothing_can_be_captured_the_step_is_launched():
    captured, fused, cells, _ = captured_and_fused()

    def fail(launch):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    captured.capture = fail
    rows = torch.arange(16)
    for step in (captured, fused):
        step(rows, cells)
    with pytest.warns(
        UserWarning, match="without a CUDA graph, which could not be captured: operation not .* capturing$"
    ):
        captured(rows + 5, cells)
    fused(rows + 5, cells)
    for step in (captured, fused):
        step(rows + 9, cells)
    assert_same(state_of(captured.elbo_step.model), state_of(fused.elbo_step.model))


def test_a_step_is_captured_anew_where_its_memory_moved_or_its_weight_changed():
    captured, fused, cells, graphs = captured_and_fused()
    rng = np.random.default_rng(0)
    for number in range(70):  # a clock's history holds 64 entries at first
        rows = torch.from_numpy(rng.permutation(N)[:16])
        for step in (captured, fused):
            step.elbo_step.model.kl_weight = 1.0 if number < 20 else 0.5
            step(rows, cells)
        assert graphs.captured == (number > 0) + (number >= 20) + (number >= 63)
    assert_same(state_of(captured.elbo_step.model), state_of(fused.elbo_step.model))


def test_a_table_that_is_flushed_is_captured_anew(monkeypatch):
    monkeypatch.setattr("rvi_fast.row_store.MAX_STEPS_BEHIND", 10)
    monkeypatch.setattr("rvi_fast.elbo_step.MAX_STEPS_BEHIND", 10)
    captured, fused, cells, _ = captured_and_fused()
    rng = np.random.default_rng(0)
    for _ in range(25):
        rows = torch.from_numpy(rng.permutation(N)[:16])
        captured(rows, cells)
        fused(rows, cells)
    assert_same(state_of(captured.elbo_step.model), state_of(fused.elbo_step.model))
    clock = captured.elbo_step.clock
    assert clock.index <= 10 and clock.steps == 25


def test_a_callback_may_freeze_and_thaw(monkeypatch):
    kinds = []
    make = Trainer._make_step
    monkeypatch.setattr(Trainer, "_make_step", lambda self: kinds.append(make(self)) or kinds[-1])
    mine = trainer(epochs=4)
    bias = mine.model.decoder.head.bias
    frozen = []

    def after_epoch(logs):
        bias.requires_grad_(len(mine.progress.history["loss"]) != 2)
        frozen.append(bias.detach().clone())
        return False

    mine.run(after_epoch, show_progress=False)
    assert [type(kind) for kind in kinds] == [FusedStep, SeparateStep]  # the bias is some of Adam's steps behind now
    assert torch.equal(frozen[1], frozen[2]) and not torch.equal(frozen[0], frozen[1])
    assert not torch.equal(frozen[2], frozen[3]) and np.isfinite(mine.progress.history["loss"]).all()


def test_a_callback_may_replace_the_state_of_the_model():
    mine = trainer(epochs=2)
    start = copy.deepcopy(mine.model.decoder.state_dict())
    mine.run(lambda logs: mine.model.decoder.load_state_dict(start) and False, show_progress=False)
    assert mine.progress.step == 8
    assert all(torch.equal(value, start[name]) for name, value in mine.model.decoder.state_dict().items())


def test_a_run_in_two_halves_has_the_bits_of_one():
    whole, halves = trainer(), trainer()
    whole.run(show_progress=False)
    for at in (3, 6, 11, 16):

        def stop(step, at=at):
            if step == at:
                halves.progress.stopped = "callback"

        halves.run(after_step=stop, show_progress=False)
    assert_same(state_of(whole.model), state_of(halves.model))
    for history in (whole.progress.history, halves.progress.history):
        del history["seconds"]
    assert whole.progress.history == halves.progress.history


def test_a_run_leaves_parameters_and_moments_in_memory_of_their_own():
    mine = trainer(epochs=1)
    mine.run(show_progress=False)
    for p in mine.model.decoder.parameters():
        assert p.untyped_storage().nbytes() == p.nbytes
        assert mine.optimizer.state[p]["exp_avg"].untyped_storage().nbytes() == p.nbytes


def test_a_loss_that_is_not_finite_ends_the_run():
    mine = Trainer(*model_and_optimizer(lr=1e30), numbers(), plan=Plan(16, 4))
    with pytest.raises(FloatingPointError, match=r"diverged at step \d+; lower lr or row_lr \(now 1e\+30\)"):
        mine.run(show_progress=False)
    assert mine._step is None


# cells


def sources():
    X, mask = images()
    floats = numbers()
    pixels = ColumnUnits(np.zeros(D), np.full(D, 255.0), np.zeros(D, dtype=bool))
    standard = ColumnStatistics.of(Observations(floats)).units(True)
    hidden = HiddenCells(Observations(floats), 0.3, 0)
    return {
        "uint8, mask": Source(Observations(X, mask), pixels, None, CPU),
        "uint8, whole": Source(Observations(X), pixels, None, CPU),
        "uint8, hidden": Source(Observations(X, mask), pixels, HiddenCells(Observations(X, mask), 0.3, 0), CPU),
        "float32": Source(Observations(floats), ColumnUnits.identity(D), None, CPU),
        "columns first": Source(Observations(np.asfortranarray(floats)), ColumnUnits.identity(D), None, CPU),
        "standardised": Source(Observations(floats), standard, None, CPU),
        "float32, hidden": Source(Observations(floats), standard, hidden, CPU),
    }


@pytest.mark.parametrize("name", sources())
def test_cells_are_the_same_wherever_they_lie(name):
    source = sources()[name]
    rows = np.array([3, 49, 0, 17])
    x, mask = source.read(rows)
    found = [source.batch(rows), source._copy_of_numbers()]
    if source.data.values.dtype == np.uint8:
        found.append(source._copy_of_bytes())
    for cells in found:
        other, observed = cells.at(torch.from_numpy(rows))
        assert torch.equal(observed, mask)
        torch.testing.assert_close(other * observed, x, rtol=1e-6, atol=0)


def test_what_is_in_memory_in_the_models_units_is_not_copied():
    in_place = {name for name, source in sources().items() if source.resident() is not None}
    assert in_place == {"uint8, mask", "uint8, whole", "float32", "columns first"}
    source = sources()["uint8, mask"]
    assert source.resident().x.data_ptr() == source.data.values.ctypes.data
    locked = numbers()
    locked.flags.writeable = False
    for X in (locked, numbers()[::-1], numbers().astype(">f4"), numbers().astype(np.float64)):
        assert Source(Observations(X), ColumnUnits.identity(D), None, CPU).resident() is None


def test_shared_cells_and_batches_train_alike(monkeypatch):
    X, mask = images()
    settings = dict(latent_dim=4, groups=(3, 8), hidden=(6,), epochs=5, batch_size=16, progress=False)
    shared = RVI(**settings).fit(X, mask)
    read = []
    monkeypatch.setattr(Source, "resident", lambda self: read.append(self))
    batches = RVI(**settings).fit(X, mask)
    assert read
    np.testing.assert_allclose(shared.history_["loss"], batches.history_["loss"], rtol=1e-5)


def test_batches_read_ahead_come_in_order():
    source = sources()["standardised"]
    batches = [np.array(rows) for rows in ([1, 2], [5], [9, 0, 3], [7], [8, 4])]
    plain = list(source.ahead(batches))
    source.reads_ahead = True
    ahead = list(source.ahead(batches))
    assert [rows.tolist() for rows, _ in ahead] == [rows.tolist() for rows in batches]
    for (_, one), (_, other) in zip(plain, ahead, strict=True):
        assert torch.equal(one.x, other.x) and torch.equal(one.mask, other.mask)


def test_a_reader_that_fails_or_is_left_ends(monkeypatch):
    source = sources()["standardised"]
    source.reads_ahead = True
    reading = source.ahead([np.array([row]) for row in range(N)])
    next(reading)
    reading.close()  # joins the thread
    monkeypatch.setattr(source, "read", lambda rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(source.ahead([np.array([0])]))


def test_the_engine_is_what_fit_uses():
    steps = []
    RVI(latent_dim=4, groups=(3,), hidden=(6,), epochs=2, batch_size=16, progress=False).fit(
        numbers(), callbacks=[lambda model, logs: steps.append(type(model._fitted_by._step))]
    )
    assert steps == [FusedStep, FusedStep] and train.Trainer is Trainer
    assert ElboStep.supports(*model_and_optimizer()) is None


IN_PLACE = {
    "float32 with a mask": lambda: (numbers(holes=0), images()[1]),
    "float32 with NaN under False": lambda: (numbers(), ~np.isnan(numbers()) & images()[1]),
    "uint8": lambda: (images()[0], None),
    "uint8 with a mask": images,
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_cells_in_place_outlive_a_callback_that_freezes(name, monkeypatch):
    """The step changes from fused to in parts, and both read the user's memory."""
    X, mask = IN_PLACE[name]()

    def losses():
        model, optimizer = model_and_optimizer()
        data = Observations(X, mask)
        mine = Trainer(model, optimizer, data, plan=Plan(16, 4))
        mine.run(lambda logs: model.decoder.requires_grad_(False) and False, show_progress=False)
        return mine.progress.history["loss"]

    found = losses()
    monkeypatch.setattr("rvi_fast.train.trainer.fusable", lambda *_: False)
    np.testing.assert_allclose(found, losses(), rtol=1e-4)


CHANGES = {
    "scale": lambda model, optimizer: setattr(model.likelihood, "fixed", 0.3),
    "selection": lambda model, optimizer: setattr(model.posterior, "active", [3, 8]),
    "betas": lambda model, optimizer: [g.update(betas=(0.8, 0.99)) for g in optimizer.param_groups],
    "eps": lambda model, optimizer: [g.update(eps=1e-3) for g in optimizer.param_groups],
    "seed": lambda model, optimizer: setattr(model.posterior, "seed", 5),
    "evaluation": lambda model, optimizer: model.eval(),
    "moments gone": lambda model, optimizer: optimizer.state.clear(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_callback_changes_is_followed(name, monkeypatch):
    def run():
        model, optimizer = model_and_optimizer()
        mine = Trainer(model, optimizer, numbers(), plan=Plan(16, 4))

        def after_epoch(logs):
            if len(mine.progress.history["loss"]) == 2:
                CHANGES[name](model, optimizer)
            return False

        mine.run(after_epoch, show_progress=False)
        return mine.progress.history["loss"]

    found = run()
    monkeypatch.setattr("rvi_fast.train.trainer.fusable", lambda *_: False)
    np.testing.assert_allclose(found, run(), rtol=2e-5)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(plan=dict(batch_size=0)), "batch_size must be a positive int; got 0"),
        (dict(plan=dict(epochs=0)), "epochs must be a positive int; got 0"),
        (dict(plan=dict(max_steps=-1)), "max_steps must be a positive int or None; got -1"),
        (dict(plan=dict(schedule="linear")), "schedule must be one of constant, cosine; got 'linear'"),
        (dict(plan=dict(device="meta")), "plan.device is meta, but the model is on cpu; move one of them"),
        (dict(X=numbers()[:40]), "X has 40 rows, but the model's table has 50; make the posterior for len(X) rows"),
        (dict(X=numbers()[:, :5]), "X has 5 columns, but the model's decoder 7; make it for X.shape[1]"),
        (dict(X=np.full((N, D), np.inf)), "X[0, 0] is inf; replace infinities by NaN (missing) or by a finite number"),
        (dict(units=ColumnUnits.identity(3)), "X has 7 columns, but units are of 3"),
    ],
)
def test_wrong_input_is_named(change, sentence):
    arguments = {"X": numbers(), "units": None, "plan": {}} | change
    with pytest.raises(ValueError) as error:
        Trainer(*model_and_optimizer(), arguments["X"], arguments["units"], Plan(**arguments["plan"]))
    assert str(error.value) == sentence


def test_memory_that_torch_cannot_share_is_read_in_batches():
    fields = np.zeros((N, D), dtype=np.dtype([("a", "<f4"), ("b", "i1")]))
    fields["a"] = numbers()
    source = Source(Observations(fields["a"]), ColumnUnits.identity(D), None, CPU)
    assert source.resident() is None and source.batch(np.arange(3)).x.shape == (3, D)


@pytest.mark.parametrize("flush", [False, True])
def test_denormals_are_treated_afterwards_as_they_were_before(flush):
    torch.set_flush_denormal(flush)
    try:
        mine = trainer(epochs=1)
        seen = []
        mine.run(after_step=lambda step: seen.append(float(torch.tensor([1e-39]) * 0.5)), show_progress=False)
        assert seen == [0.0] * 4
        assert (float(torch.tensor([1e-39]) * 0.5) == 0) == flush
    finally:
        torch.set_flush_denormal(False)


def test_a_step_that_was_cut_in_two_leaves_no_clock_behind(monkeypatch):
    mine = trainer(epochs=2)

    def interrupted(*_):
        raise KeyboardInterrupt

    def after_step(step):
        if step == 3:
            monkeypatch.setattr("rvi_fast.ops.elbo_cpu._step_shared", interrupted)

    with pytest.raises(KeyboardInterrupt):
        mine.run(after_step=after_step, show_progress=False)
    clock = mine.model.posterior.table.store.columns[0].clock
    assert clock.index == clock.steps == int(clock.counters[0]) == 4


GPU = torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["uint8, mask", "uint8, hidden", "standardised"])
def test_cells_lie_on_the_gpu_as_they_are_read(name):
    source = sources()[name]
    source.device, source.reads_ahead = GPU, True
    rows = np.array([3, 49, 0, 17])
    x, mask = source.read(rows)
    resident = source.resident()
    assert resident is not None and resident.x.is_cuda
    assert resident.x.dtype == (torch.uint8 if name.startswith("uint8") else torch.float32)
    other, observed = resident.at(torch.from_numpy(rows).cuda())
    assert torch.equal(observed.cpu(), mask)
    torch.testing.assert_close((other * observed).cpu(), x, rtol=1e-6, atol=0)
    ((_, cells),) = source.ahead([rows])
    assert torch.equal(cells.x.cpu(), x) and torch.equal(cells.mask.cpu(), mask)


@pytest.mark.gpu
def test_graphs_of_a_gpu_train_as_launches_do_to_the_bit(monkeypatch):
    """70 steps and more: the clock's history moves twice, each epoch ends with a partial batch, the rate changes."""
    kinds, ends, histories = [], [], []
    make = Trainer._make_step
    monkeypatch.setattr(Trainer, "_make_step", lambda self: kinds.append(make(self)) or kinds[-1])
    for captured in (True, False):
        if not captured:
            monkeypatch.setattr(Trainer, "_make_step", lambda self: FusedStep(self.model, self.optimizer))
        model, _ = model_and_optimizer()
        model.to(GPU)
        mine = Trainer(
            model, RowAdam(model.parameters(), lr=0.01), numbers(), plan=Plan(16, 40, schedule="cosine", device=GPU)
        )
        mine.run(show_progress=False)
        ends.append(state_of(model))
        del mine.progress.history["seconds"]
        histories.append(mine.progress.history)
    assert [type(kind) for kind in kinds] == [CapturedStep] and callable(kinds[0].replay)
    assert kinds[0].replay != kinds[0]._launch  # the capture did not fail
    assert_same(*ends)
    assert histories[0] == histories[1]


@pytest.mark.gpu
def test_a_gpu_and_a_cpu_train_alike():
    settings = dict(latent_dim=4, groups=(3, 8), hidden=(6,), epochs=5, batch_size=16, progress=False)
    X, mask = images()
    losses = [RVI(**settings, device=device).fit(X, mask, val_cells=0.1).history_["loss"] for device in ("cuda", "cpu")]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.gpu
def test_a_gpu_run_in_two_halves_has_the_bits_of_one(tmp_path):
    settings = dict(latent_dim=4, groups=(3, 8), hidden=(6,), epochs=6, batch_size=16, progress=False, device="cuda")
    whole = RVI(**settings).fit(numbers(), checkpoint_dir=tmp_path / "whole", checkpoint_every=5)
    stop = [lambda model, logs: logs["step"] == 12]
    RVI(**settings).fit(numbers(), checkpoint_dir=tmp_path / "half", checkpoint_every=5, callbacks=stop)
    half = RVI(**settings).fit(numbers(), checkpoint_dir=tmp_path / "half", checkpoint_every=5, resume=True)
    assert_same(state_of(whole.model_), state_of(half.model_))
