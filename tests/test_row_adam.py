"""RowAdam against torch.optim.AdamW on nn.Embeddings, in float64: one training loop runs on both."""

from __future__ import annotations

import copy
import doctest
import io
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rvi_fast import clock, functional, reference, row_store
from rvi_fast.bench.row_adam_accuracy import BETAS, measure
from rvi_fast.clock import AdamClock
from rvi_fast.nn import RowTable
from rvi_fast.ops import Columns
from rvi_fast.optim import RowAdam
from rvi_fast.reference import AdamHyper, Missed

N = 12
WIDTHS = {"wide": 3, "narrow": 2}  # of the first table; the second has one range of 2
DIM = 7
STEPS = 36
HALF = STEPS // 2


class OnRows(nn.Module):
    """Two tables, one of them in two column ranges, under a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([RowTable(N, 5, torch.float64, columns=WIDTHS), RowTable(N, 2, torch.float64)])
        self.head = nn.Linear(DIM, 2, dtype=torch.float64)

    def columns(self) -> list[nn.Parameter]:
        return list(self.tables.parameters())

    def forward(self, rows: Tensor) -> Tensor:
        first, second = self.tables
        return self.head(torch.tanh(torch.cat((first(rows), second(N - 1 - rows)), dim=-1)))

    def values(self) -> list[Tensor]:
        first, second = self.tables
        return [first.read("wide"), first.read("narrow"), second.weight.detach().clone()]


class OnEmbeddings(nn.Module):
    """The same with an nn.Embedding for each column range."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(N, width, dtype=torch.float64) for width in (*WIDTHS.values(), 2))
        self.head = nn.Linear(DIM, 2, dtype=torch.float64)

    def columns(self) -> list[nn.Parameter]:
        return [table.weight for table in self.tables]

    def forward(self, rows: Tensor) -> Tensor:
        wide, narrow, second = self.tables
        return self.head(torch.tanh(torch.cat((wide(rows), narrow(rows), second(N - 1 - rows)), dim=-1)))

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.columns()]


Model = OnRows | OnEmbeddings
Pair = tuple[Model, torch.optim.Optimizer]


def make(kind: type[Model]) -> Model:
    """A model whose values depend on nothing but its shapes."""
    noise = torch.Generator().manual_seed(1)
    values = [torch.randn(N, width, dtype=torch.float64, generator=noise) for width in (3, 2, 2)]
    weight = torch.randn(2, DIM, dtype=torch.float64, generator=noise)
    model = kind()
    model.head.load_state_dict({"weight": weight, "bias": torch.zeros(2)})
    give(model, values)
    return model


def give(model: Model, values: list[Tensor]) -> None:
    """Overwrite the tables' values."""
    if isinstance(model, OnRows):
        model.tables[0].assign(torch.cat(values[:2], dim=1))
        model.tables[1].assign(values[2])
    else:
        for table, value in zip(model.tables, values, strict=True):
            table.load_state_dict({"weight": value})


def optimizer_for(model: Model, **settings: object) -> torch.optim.Optimizer:
    """The same groups for both kinds: every column range with settings of its own, beside the layer."""
    wide, narrow, second = model.columns()
    groups = [
        {"params": [wide], "lr": 3e-2},
        {"params": [narrow, second], "weight_decay": 0.0},
        {"params": list(model.head.parameters()), "lr": 1e-3},
    ]
    kind = RowAdam if isinstance(model, OnRows) else torch.optim.AdamW
    return kind(groups, **{"lr": 1e-2, "weight_decay": 0.1, **settings})


def batches(start: int = 0, stop: int = STEPS) -> Iterator[tuple[int, Tensor]]:
    """Step numbers and rows: with repeats, with gaps, and two rows that appear only in the second half."""
    noise = torch.Generator().manual_seed(2)
    for t in range(stop):
        rows = torch.randint(0, N if t > HALF else N - 2, (3,), generator=noise)
        if t >= start:
            yield t, rows


def snapshot(model: Model, optimizer: torch.optim.Optimizer) -> dict:
    """All that training changes, as copies."""
    saved = optimizer.state_dict()
    settings = [[group["lr"], *group["betas"], group["weight_decay"]] for group in saved["param_groups"]]
    return copy.deepcopy({"model": dict(model.state_dict()), "state": saved["state"], "settings": settings})


def loss_of(model: nn.Module, rows: Tensor, t: int) -> Tensor:
    target = torch.cos(rows[:, None] + t + torch.arange(2.0, dtype=torch.float64))
    return (model(rows) - target).square().sum()


def step(model: Model, optimizer: torch.optim.Optimizer, t: int, rows: Tensor) -> None:
    optimizer.zero_grad()
    loss_of(model, rows, t).backward()
    optimizer.step()


def plain(model: Model, optimizer: torch.optim.Optimizer, start: int = 0, stop: int = STEPS) -> Pair:
    for t, rows in batches(start, stop):
        step(model, optimizer, t, rows)
    return model, optimizer


def cosine(model, optimizer):
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for t, rows in batches():
        step(model, optimizer, t, rows)
        schedule.step()


def one_cycle(model, optimizer):
    """Moves lr and beta1 at every step."""
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[3e-2, 1e-2, 1e-3], total_steps=STEPS + 1)
    for t, rows in batches():
        step(model, optimizer, t, rows)
        schedule.step()


def lr_zero_for_a_while(model, optimizer):
    for t, rows in batches():
        for group, lr in zip(optimizer.param_groups, (3e-2, 1e-2, 1e-3), strict=True):
            group["lr"] = 0.0 if 8 <= t < HALF else lr
        step(model, optimizer, t, rows)


def grad_scaler(model, optimizer):
    """Every seventh gradient is infinite: that step is skipped whole."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for t, rows in batches():
        optimizer.zero_grad()
        scaler.scale(loss_of(model, rows, t) * (math.inf if t % 7 == 3 else 1)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        scaler.step(optimizer)
        scaler.update()


def clip(norm_type, foreach):
    def loop(model, optimizer):
        for t, rows in batches():
            optimizer.zero_grad()
            loss_of(model, rows, t).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5, norm_type=norm_type, foreach=foreach)
            optimizer.step()

    loop.__name__ = f"clip_norm_{norm_type}_foreach_{foreach}"
    return loop


def clip_value(foreach):
    def loop(model, optimizer):
        for t, rows in batches():
            optimizer.zero_grad()
            loss_of(model, rows, t).backward()
            nn.utils.clip_grad_value_(model.parameters(), 0.3, foreach=foreach)
            optimizer.step()

    loop.__name__ = f"clip_value_{foreach}"
    return loop


def accumulate(model, optimizer):
    """Two backward passes a step, with rows in common."""
    for t, rows in batches():
        optimizer.zero_grad()
        loss_of(model, rows, t).backward()
        (0.5 * loss_of(model, torch.cat((rows[:1], (rows + 1) % N)), t)).backward()
        optimizer.step()


def zero_in_place(model, optimizer):
    """Gradients of zero instead of none: the tables age even in steps without a backward."""
    for t, rows in batches():
        optimizer.zero_grad(set_to_none=False)
        if t % 4:
            loss_of(model, rows, t).backward()
        optimizer.step()


def no_backward_in_some_steps(model, optimizer):
    """Gradients of none: the tables do not age."""
    for t, rows in batches():
        optimizer.zero_grad()
        if t % 4:
            loss_of(model, rows, t).backward()
        else:
            model.head(torch.ones(1, DIM, dtype=torch.float64)).sum().backward()
        optimizer.step()


def one_row_twice_in_a_read(model, optimizer):
    for t, rows in batches():
        step(model, optimizer, t, rows[[0, 1, 0, 0]])


def two_reads_in_a_step(model, optimizer):
    for t, rows in batches():
        optimizer.zero_grad()
        (loss_of(model, rows, t) + loss_of(model, rows.flip(0)[:2] // 2, t)).backward()
        optimizer.step()


def rows_read_and_not_trained(model, optimizer):
    for t, rows in batches():
        optimizer.zero_grad()
        with torch.no_grad():
            model(torch.arange(N))
        with torch.inference_mode():
            model(rows)
        model((rows + 3) % N)
        loss_of(model, rows, t).backward()
        optimizer.step()


def closure(model, optimizer):
    for t, rows in batches():

        def evaluate(t: int = t, rows: Tensor = rows) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, rows, t)
            loss.backward()
            return loss

        before = loss_of(model, rows, t)
        assert optimizer.step(evaluate) == before


def recompute(model, optimizer):
    for t, rows in batches():
        optimizer.zero_grad()
        (checkpoint(model, rows, use_reentrant=False) - math.cos(t)).square().sum().backward()
        optimizer.step()


def freeze_and_unfreeze(model, optimizer):
    """A column range that stands still for a while does not age, unlike its neighbours."""
    frozen = model.columns()[1]
    for t, rows in batches():
        frozen.requires_grad_(not 8 <= t < HALF)
        step(model, optimizer, t, rows)


def ranges_with_rows_of_their_own(model, optimizer):
    """Of two backward passes a step, a column range takes part in the second only."""
    narrow = model.columns()[1]
    for t, rows in batches():
        optimizer.zero_grad()
        narrow.requires_grad_(False)
        loss_of(model, rows, t).backward()
        narrow.requires_grad_(True)
        loss_of(model, (rows + 1) % N, t).backward()
        optimizer.step()


def later_group(model, optimizer):
    wide, narrow, second = model.columns()
    kind = type(optimizer)
    optimizer = kind([wide, *model.head.parameters()], lr=1e-2, weight_decay=0.1)
    narrow.requires_grad_(False)
    second.requires_grad_(False)
    plain(model, optimizer, 0, HALF)
    optimizer.add_param_group({"params": [narrow.requires_grad_(), second.requires_grad_()], "lr": 2e-2})
    plain(model, optimizer, HALF)


def copied_together(model, optimizer):
    plain(model, optimizer, 0, HALF)
    copied = copy.deepcopy((model, optimizer))
    plain(model, optimizer, HALF, HALF + 5)  # must not show in the copy
    return plain(*copied, HALF)


def pickled_together(model, optimizer):
    file = io.BytesIO()
    torch.save(plain(model, optimizer, 0, HALF), file)
    file.seek(0)
    return plain(*torch.load(file, weights_only=False), HALF)


def model_copied_alone(model, optimizer):
    """The copy starts an optimiser of its own, from no moments."""
    plain(model, optimizer, 0, HALF)
    copied = copy.deepcopy(model)
    plain(model, optimizer, HALF, HALF + 5)
    return plain(copied, optimizer_for(copied), HALF)


def optimizer_copied_alone(model, optimizer):
    """The copy takes copies of the parameters with it: stepping the original does not touch them, nor the other way."""
    plain(model, optimizer, 0, HALF)
    copied = copy.deepcopy(optimizer)
    mine = [p for group in optimizer.param_groups for p in group["params"]]
    its = [p for group in copied.param_groups for p in group["params"]]
    plain(model, optimizer, HALF, HALF + 3)
    for own, other in zip(mine, its, strict=True):
        other.grad = None if own.grad is None else own.grad.clone()
    for _ in range(3):
        copied.step()
    model.copied_state = copied.state_dict()["state"]
    plain(model, optimizer, HALF + 3)


def through_state_dicts(model, optimizer):
    plain(model, optimizer, 0, HALF)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model = make(type(model))
    optimizer = optimizer_for(model, lr=1.0)
    plain(model, optimizer, 0, 5)  # what is loaded must replace this
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    return plain(model, optimizer, HALF)


LOOPS = [
    plain, cosine, one_cycle, lr_zero_for_a_while, grad_scaler, clip(2.0, None), clip(2.0, True),
    clip(2.0, False), clip(math.inf, None), clip_value(None), clip_value(True), accumulate, zero_in_place,
    no_backward_in_some_steps, one_row_twice_in_a_read, two_reads_in_a_step, rows_read_and_not_trained, closure,
    recompute, freeze_and_unfreeze, ranges_with_rows_of_their_own, later_group, copied_together,
    pickled_together, model_copied_alone, optimizer_copied_alone, through_state_dicts,
]  # fmt: skip


def run(loop, kind: type[Model], **settings: object) -> Model:
    model = make(kind)
    result = loop(model, optimizer_for(model, **settings))
    return result[0] if result else model


def assert_same(ours: Model, truth: Model, atol: float = 1e-11) -> None:
    for value, right in zip(ours.values(), truth.values(), strict=True):
        torch.testing.assert_close(value, right, rtol=0, atol=atol)
    torch.testing.assert_close(ours.head.weight, truth.head.weight, rtol=0, atol=atol)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_follows_dense_adamw(loop):
    ours, truth = run(loop, OnRows), run(loop, OnEmbeddings)
    assert_same(ours, truth)
    moved = [(value - start).abs().amax() for value, start in zip(truth.values(), make(OnRows).values(), strict=True)]
    assert min(moved) > 0.05
    if loop is optimizer_copied_alone:
        torch.testing.assert_close(ours.copied_state, truth.copied_state, rtol=1e-10, atol=1e-12, check_dtype=False)


@pytest.mark.parametrize("betas", [(0.95, 0.9), (0.99, 0.9), (0.9, 0.81), (0.0, 0.0), (0.9, 0.0), (0.0, 0.5)], ids=str)
def test_follows_dense_adamw_where_every_missed_step_is_summed(betas):
    assert_same(run(plain, OnRows, betas=betas, eps=1e-2), run(plain, OnEmbeddings, betas=betas, eps=1e-2), atol=1e-10)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.81)], ids=str)
def test_small_blocks_and_frequent_sweeps_change_nothing(monkeypatch, betas):
    monkeypatch.setattr(row_store, "ELEMENTS_AT_ONCE", 10)
    monkeypatch.setattr(row_store, "MAX_STEPS_BEHIND", 5)
    monkeypatch.setattr(clock, "TERMS_AT_ONCE", 7)
    settings = {"betas": betas, "eps": 1e-2}
    assert_same(run(plain, OnRows, **settings), run(plain, OnEmbeddings, **settings), atol=1e-9)


@pytest.mark.parametrize(("betas", "weight_decay"), [*zip(BETAS, (0.01, 0.0, 0.0, 0.01), strict=True)], ids=str)
def test_accuracy_over_gaps_and_gradient_scales(betas, weight_decay):
    """The grid of rvi_fast.bench.row_adam_accuracy, which runs 5,000 steps, on fewer steps and rows."""
    errors = measure(betas, weight_decay, steps=160, rows_each=4)
    assert max(e.rows64 for e in errors) <= 1e-6
    assert sum(e.rows32 for e in errors) <= sum(e.torch32 for e in errors)


def test_lazy_steps_touched_rows_only():
    model = make(OnRows)
    plain(model, optimizer_for(model, mode="lazy"))
    with pytest.raises(AssertionError, match="not close"):
        assert_same(model, run(plain, OnEmbeddings))
    truth = make(OnEmbeddings)
    head = torch.optim.AdamW(truth.head.parameters(), lr=1e-3, weight_decay=0.1)
    settings = list(zip(truth.columns(), (3e-2, 1e-2, 1e-2), (0.1, 0.0, 0.0), strict=True))
    state = [(torch.zeros_like(p), torch.zeros_like(p), torch.zeros(N, 1, dtype=p.dtype)) for p in truth.columns()]
    for t, rows in batches():
        truth.zero_grad()
        loss_of(truth, rows, t).backward()
        head.step()
        for (p, lr, weight_decay), (m, v, count), touched in zip(
            settings, state, (rows, rows, N - 1 - rows), strict=True
        ):
            i = touched.unique()
            count[i] += 1
            m[i] += 0.1 * (p.grad[i] - m[i])
            v[i] += 0.001 * (p.grad[i] ** 2 - v[i])
            debiased = m[i] / (1 - 0.9 ** count[i]) / ((v[i] / (1 - 0.999 ** count[i])).sqrt() + 1e-8)
            p.data[i] = p.data[i] * (1 - lr * weight_decay) - lr * debiased
    assert_same(model, truth, atol=1e-10)


def test_lazy_through_state_dicts():
    def loop(model, optimizer):
        model.columns()[1].requires_grad_(False)
        plain(model, optimizer, 0, HALF)
        restored = make(OnRows)
        restored.columns()[1].requires_grad_(False)
        other = optimizer_for(restored, mode="lazy")
        restored.load_state_dict(model.state_dict())
        other.load_state_dict(optimizer.state_dict())
        return plain(restored, other, HALF)

    def uninterrupted(model, optimizer):
        model.columns()[1].requires_grad_(False)
        return plain(model, optimizer)

    assert_same(run(loop, OnRows, mode="lazy"), run(uninterrupted, OnRows, mode="lazy"), atol=1e-13)


def test_continuing_from_state_dicts_equals_not_stopping():
    assert_same(run(through_state_dicts, OnRows), run(plain, OnRows), atol=1e-12)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_state_dict_exchanges_with_torch(kind):
    """Rows and embeddings take turns, each taking over the other's values and state."""

    def settings(model: Model) -> dict:
        return {"params": [*model.columns(), *model.head.parameters()], "lr": 1e-2, "weight_decay": 0.0}

    truth = make(OnEmbeddings)
    plain(truth, kind(**settings(truth)))

    model = make(OnEmbeddings)
    optimizer = kind(**settings(model))
    plain(model, optimizer, 0, 9)
    for start, table in ((9, OnRows), (18, OnEmbeddings), (27, OnRows)):
        values, head, state = model.values(), model.head.state_dict(), optimizer.state_dict()
        model = make(table)
        optimizer = (RowAdam if table is OnRows else kind)(**settings(model))
        give(model, values)
        model.head.load_state_dict(head)
        for _ in range(2):  # loading leaves an optimizer that can load again
            optimizer.load_state_dict(copy.deepcopy(state))
        plain(model, optimizer, start, start + 9)
    assert_same(model, truth)


def test_skipped_step_advances_nothing():
    model = make(OnRows)
    optimizer = optimizer_for(model)
    scaler = torch.amp.GradScaler("cpu")
    plain(model, optimizer, 0, 5)
    before = snapshot(model, optimizer)
    optimizer.zero_grad()
    scaler.scale(loss_of(model, torch.arange(3), 0) * math.nan).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(snapshot(model, optimizer), before, rtol=0, atol=0)
    assert [int(table.store.step) for table in model.tables] == [5, 5]


def test_reading_writes_nothing():
    model = make(OnRows)
    optimizer = optimizer_for(model)
    plain(model, optimizer)
    before = [copy.deepcopy((t.store.values, t.store.last, t.store.step, t.store.columns)) for t in model.tables]
    rows = torch.arange(N)
    with torch.inference_mode():
        model(rows)
    with torch.no_grad():
        model(rows)
    model(rows).sum().backward()
    model.values(), model.state_dict(), optimizer.state_dict(), copy.deepcopy(model)
    for table, (values, last, steps, columns) in zip(model.tables, before, strict=True):
        assert torch.equal(table.store.values, values) and torch.equal(table.store.last, last)
        assert torch.equal(table.store.step, steps)
        for now, then in zip(table.store.columns, columns, strict=True):
            assert now.clock.index == then.clock.index > 0
            assert torch.equal(now.clock.history, then.clock.history)


def test_changing_dtype_keeps_identity_and_state():
    model = make(OnRows)
    optimizer = optimizer_for(model)
    plain(model, optimizer, 0, HALF)
    parameters, values = list(model.parameters()), model.values()
    model.float()
    assert all(p is q and q.dtype == torch.float32 for p, q in zip(parameters, model.parameters(), strict=True))
    torch.testing.assert_close(model.values(), [value.float() for value in values])
    model.double()
    rounded = copy.deepcopy(optimizer.state_dict())
    truth = make(OnEmbeddings)
    give(truth, model.values())
    truth.head.load_state_dict(model.head.state_dict())
    its = optimizer_for(truth)
    its.load_state_dict(rounded)
    plain(model, optimizer, HALF)
    plain(truth, its, HALF)
    assert_same(model, truth)


@pytest.mark.parametrize(
    "path", [copy.deepcopy, lambda m: torch.load(_saved(m), weights_only=False)], ids=["copy", "load"]
)
def test_a_copy_of_the_model_alone_reads_but_does_not_train(path):
    model = make(OnRows)
    optimizer = optimizer_for(model)
    plain(model, optimizer)
    copied = path(model)
    torch.testing.assert_close(copied.values(), model.values(), rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(copied(torch.arange(N)), model(torch.arange(N)), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"no RowAdam trains.*rvi_fast\.optim\.RowAdam"):
        copied(torch.arange(N))
    model(torch.arange(N))


def _saved(model: Model) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_columns_take_a_new_mode_together():
    model = make(OnRows)
    plain(model, optimizer_for(model), 0, 5)
    plain(model, optimizer_for(model, mode="lazy"), 5)


def test_docstring_example():
    (example,) = doctest.DocTestFinder().find(functional.row_adam_, "row_adam_")
    assert doctest.DocTestRunner().run(example) == (0, 6)


# --- bad input ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"lr": math.nan}, "lr must be at least 0"),
        ({"lr": math.inf}, "lr must be at least 0 and finite; got inf"),
        ({"lr": None}, "lr must be at least 0 and finite; got None"),
        ({"lr": "1e-3"}, "lr must be at least 0 and finite; got '1e-3'"),
        ({"betas": None}, r"betas must be two numbers in \[0, 1\), such as .*; got None"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"betas": (0.9, None)}, r"betas\[1\] must be in \[0, 1\); got None"),
        ({"betas": (1.0, 0.999)}, r"betas\[0\] must be in"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] must be in"),
        ({"eps": 0.0}, "eps must be above 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"mode": "sparse"}, "mode must be 'dense' or 'lazy'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        RowAdam(RowTable(3, 2).parameters(), **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": None}, "lr must be at least 0"),
        ({"lr": math.nan}, "lr must be at least 0"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"maximize": True}, "RowAdam has no maximize; negate the loss"),
        ({"mode": "lazy"}, "mode cannot change from 'dense' to 'lazy'"),
    ],
)
def test_bad_settings_at_a_step(change, message):
    model = make(OnRows)
    model, optimizer = plain(model, optimizer_for(model), 0, 5)
    group = optimizer.param_groups[1]
    before = [p.detach().clone() for p in model.parameters()]
    group.update(change)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    for p, expected in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, expected)


@pytest.mark.parametrize("later", [{"lr": -1.0}, {"mode": "lazy"}, {"maximize": True}], ids=str)
def test_a_constructor_that_fails_changes_nothing(later):
    model = make(OnRows)
    wide, narrow, second = model.columns()
    model, optimizer = plain(model, optimizer_for(model), 0, 5)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError):
        RowAdam([{"params": [second]}, {"params": [wide]}, {"params": [narrow], **later}])
    torch.testing.assert_close(snapshot(model, optimizer), before, rtol=0, atol=0)
    plain(model, optimizer, 5, 7)


def test_a_later_group_that_fails_changes_nothing():
    model = make(OnRows)
    wide, narrow, _ = model.columns()
    optimizer = RowAdam([wide])
    with pytest.raises(ValueError, match="need the same mode"):
        optimizer.add_param_group({"params": [narrow], "mode": "lazy"})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [narrow]})


@pytest.mark.parametrize("end", [optimizer_for, lambda model: model.tables[0].drop_moments()], ids=["another", "drop"])
def test_a_row_adam_that_lost_its_table_raises(end):
    model = make(OnRows)
    model, optimizer = plain(model, optimizer_for(model), 0, 5)
    owner = end(model)
    with pytest.raises(RuntimeError, match="this RowAdam no longer trains the column range 'wide'"):
        optimizer.step()
    if owner:
        plain(model, owner, 5, 7)


def raises_and_changes_nothing(
    model: Model, optimizer: torch.optim.Optimizer, error: type[Exception], message: str
) -> None:
    before = snapshot(model, optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    torch.testing.assert_close(snapshot(model, optimizer), before, rtol=0, atol=0)


def test_dense_gradient_raises():
    model = make(OnRows)
    model, optimizer = plain(model, optimizer_for(model), 0, 5)
    model.columns()[2].grad = torch.ones(N, 2, dtype=torch.float64)
    raises_and_changes_nothing(model, optimizer, TypeError, "must come from reading the table.*'weight'")


def test_weight_decay_that_would_flip_the_sign_raises():
    model = make(OnRows)
    model, optimizer = plain(model, optimizer_for(model), 0, 5)
    optimizer.param_groups[0]["weight_decay"] = 1 / 3e-2
    raises_and_changes_nothing(model, optimizer, ValueError, "lr \\* weight_decay must be below 1")


def test_lazy_needs_all_columns_at_every_step():
    model = make(OnRows)
    model, optimizer = plain(model, optimizer_for(model, mode="lazy"), 0, 5)
    model.columns()[0].grad = None
    raises_and_changes_nothing(model, optimizer, ValueError, "mode='lazy' counts steps by row")


def test_lazy_range_added_late_raises():
    model = make(OnRows)
    wide, narrow, second = model.columns()
    narrow.requires_grad_(False)
    model, optimizer = plain(model, RowAdam([wide, second], mode="lazy"), 0, 5)
    optimizer.add_param_group({"params": [narrow.requires_grad_()]})
    optimizer.zero_grad()
    loss_of(model, torch.arange(3), 0).backward()
    raises_and_changes_nothing(model, optimizer, ValueError, "mode='lazy' counts steps by row")


def test_modes_do_not_mix_in_one_table():
    wide, narrow, _ = make(OnRows).columns()
    with pytest.raises(ValueError, match=r"need the same mode.*drop_moments"):
        RowAdam([{"params": [wide]}, {"params": [narrow], "mode": "lazy"}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved["state"][0].update(exp_avg=torch.zeros(N, 4)), r"exp_avg.* must have shape \[12, 3\]"),
        (lambda saved: saved["state"][1].pop("exp_avg_sq"), "exp_avg_sq.* found nothing"),
        (lambda saved: saved["state"][1].pop("step"), "must have step"),
        (lambda saved: saved["param_groups"][0].update(amsgrad=True), "amsgrad"),
        (lambda saved: saved["param_groups"][0].update(decoupled_weight_decay=False), "coupled weight_decay"),
        (lambda saved: saved["param_groups"][1].update(mode="lazy"), "mode='lazy'"),
        (lambda saved: saved["param_groups"].pop(), "different number of parameter groups"),
    ],
)
def test_bad_state_dict_raises_and_changes_nothing(change, message):
    model = make(OnRows)
    model, optimizer = plain(model, optimizer_for(model), 0, 5)
    before = snapshot(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    torch.testing.assert_close(snapshot(model, optimizer), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([0, 1, 0], ValueError, "rows must not repeat"),
        ([0, -1, 2], IndexError, "rows must lie in 0 .. 3; got -1"),
        ([0, 4, 2], IndexError, "rows must lie in 0 .. 3; got 4"),
        ([0, 1], ValueError, r"grad must have shape \[B = 2, C = 2\]"),
        ([0.0, 1.0, 2.0], TypeError, "rows must be an int64 tensor"),
    ],
)
def test_row_adam_checks_rows(rows, error, message):
    values, last = torch.ones(4, 3, 2), torch.zeros(4, dtype=torch.int32)
    columns = [Columns(0, 2, AdamClock(AdamHyper(0.9, 0.999, 1e-8)))]
    with pytest.raises(error, match=message):
        functional.row_adam_(values, last, torch.tensor(rows), torch.ones(3, 2), columns, [0.1], [0.0])
    assert torch.equal(values, torch.ones(4, 3, 2)) and columns[0].clock.steps == 0


@pytest.mark.gpu
def test_ordinary_parameters_step_in_a_graph_as_outside():
    start = torch.randn(5, generator=torch.Generator().manual_seed(0)).cuda()
    captured, eager = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [RowAdam([p], lr=0.1) for p in (captured, eager)]
    captured.grad, eager.grad = torch.ones_like(start), torch.ones_like(start)
    graph = torch.cuda.CUDAGraph()
    for optimizer in optimizers:
        optimizer.step()
    with torch.cuda.graph(graph):
        optimizers[0].step()
    for _ in range(3):
        graph.replay()
        optimizers[1].step()
    torch.testing.assert_close(captured, eager)


def test_half_precision_rows_with_the_smallest_moments_are_caught_up():
    """sqrt(v) of the smallest float16 numbers is far above what guards the division."""
    m, v = torch.tensor([[2e-4, 2e-4, 1e-3, 0.0]]).half(), torch.tensor([[6e-8, 2.4e-7, 1e-4, 0.0]]).half()
    missed = Missed(*(torch.tensor([c], dtype=torch.float64) for c in (1e-3, 1.0, 1e-3, 2.0, 1.0, 0.5, 0.9)))
    truth = reference.catch_up(torch.zeros(1, 4).double(), m.double(), v.double(), missed, 1e-8)[0]
    found = reference.catch_up(torch.zeros(1, 4).half(), m, v, missed, 1e-8)[0]
    torch.testing.assert_close(found.double(), truth, rtol=2e-3, atol=1e-7)
    assert truth[0, 0] < -1e-3
