"""One AdamW step of a batch's rows, in place: against dense AdamW over the whole table, and against the twin."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from conftest import INTERPRETED
from tables import BETAS, Table, aged_table, sparse_rows_tensor, tall_programs
from torch import Tensor

import rvi_fast
from rvi_fast.functional import AdamClock, AdamHyper, Columns, row_adam_
from rvi_fast.nn import RowTable
from rvi_fast.ops import read_rows, rows
from rvi_fast.optim import RowAdam

__all__ = ["tall_programs"]
N, C = 16, 6
STEPS = 320
TOUCHING = (0, 1, 2, 9, 30, 90, 180, 249, 250, 300, 318)  # steps at which rows are touched
SOME = torch.tensor([0, 3, 7, 10])
WEIGHT_DECAY = 0.1


class Run(NamedTuple):
    """A schedule: what every step does."""

    start: Tensor  # float64 [N, C]
    batches: list[tuple[Tensor, Tensor]]  # rows and float64 gradients, empty at most steps
    lr: list[float]


def schedule(scale: float) -> Run:
    """Gaps of all lengths, rows first touched late or never, zero gradients, a cosine of learning rates."""
    noise = torch.Generator().manual_seed(0)
    batches = []
    for t in range(STEPS):
        ids = torch.randperm(N - 1 if t > 200 else N // 2, generator=noise)[: 5 if t in TOUCHING else 0].sort()[0]
        grad = scale * torch.randn(len(ids), C, dtype=torch.float64, generator=noise)
        batches.append((ids, grad * (torch.rand(grad.shape, generator=noise) < 0.6)))
    lr = [5e-3 * (1 + math.cos(math.pi * t / STEPS)) for t in range(STEPS)]
    return Run(0.1 * torch.randn(N, C, dtype=torch.float64, generator=noise), batches, lr)


def densely(run: Run, betas: tuple[float, float]) -> Tensor:
    weight = run.start.clone().requires_grad_()
    adam = torch.optim.AdamW([weight], betas=betas, weight_decay=WEIGHT_DECAY)
    for (ids, grad), lr in zip(run.batches, run.lr, strict=True):
        adam.param_groups[0]["lr"] = lr
        weight.grad = torch.zeros_like(weight).index_copy_(0, ids, grad)
        adam.step()
    return weight.detach()


def by_rows(run: Run, betas: tuple[float, float], dtype: torch.dtype, device: torch.device) -> Tensor:
    values = torch.zeros(N, 3, C, dtype=dtype, device=device)
    values[:, 0] = run.start
    last = torch.zeros(N, dtype=torch.int32, device=device)
    columns = [Columns(0, C, AdamClock(AdamHyper(*betas, 1e-8), device=device))]
    for (ids, grad), lr in zip(run.batches, run.lr, strict=True):
        if len(ids):
            ids, grad = ids.to(device), grad.to(device, dtype)
            row_adam_(values, last, ids, grad, columns, [lr], [WEIGHT_DECAY])
        else:  # the torch backend's clock is quicker where kernels are interpreted; they take turns
            with rvi_fast.backend("torch"):
                columns[0].clock.advance(lr, WEIGHT_DECAY)
    (p,) = read_rows(values, last, torch.arange(N, device=device), columns, moments=False)
    return p.double().cpu()


@pytest.mark.usefixtures("tall_programs")
@pytest.mark.parametrize("scale", [1.0, 1e-7])
@pytest.mark.parametrize("betas", BETAS)
def test_follows_dense_adamw(device, betas, scale):
    run = schedule(scale)
    truth = densely(run, betas)
    moved = (truth - run.start).abs().max()
    with rvi_fast.backend("torch"):
        torch32 = (by_rows(run, betas, torch.float32, torch.device("cpu")) - truth).abs().max()
    assert torch32 < 1e-5 * moved
    assert (by_rows(run, betas, torch.float32, device) - truth).abs().max() <= torch32 + 5e-7 * moved
    if betas == BETAS[0]:
        assert (by_rows(run, betas, torch.float64, device) - truth).abs().max() <= 2e-7 * moved


def step_both(table: Table, ids: Tensor, grad: Tensor, lr: float = 1e-2) -> tuple[list[Tensor], list[Tensor]]:
    """The table after a step of the backend in force, and after one of the twin in float64."""
    values, last, columns = table.values.cpu().double(), table.last.cpu().clone(), []
    for start, stop, clock in table.columns:
        tensors = (t.cpu().clone() for t in (clock.history, clock.counters, clock.constants, clock.rates))
        columns.append(Columns(start, stop, type(clock).of(*tensors)))
    twin = Table(values, last, columns)
    rates = [lr * (1 + n) for n in range(len(columns))], [0.1] * len(columns)
    row_adam_(*table[:2], ids, grad, table.columns, *rates)
    with rvi_fast.backend("torch"):
        row_adam_(*twin[:2], ids.cpu(), grad.cpu().double(), twin.columns, *rates)
    return table.snapshot(), twin.snapshot()


def assert_equal(ours: list[Tensor], right: list[Tensor]) -> None:
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def gradient(device: torch.device, count: int = 4, width: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, width, dtype=dtype, generator=torch.Generator().manual_seed(1)).to(device)


@pytest.mark.usefixtures("tall_programs")
@pytest.mark.parametrize("scale", [1.0, 1e-7])
@pytest.mark.parametrize("betas", BETAS)
def test_float64_equals_the_twin(device, betas, scale):
    table = aged_table(device, torch.float64, betas=betas, scale=scale, steps=60)
    assert_equal(*step_both(table, SOME.to(device), gradient(device) * scale))


@pytest.mark.usefixtures("tall_programs")
@pytest.mark.parametrize(("width", "count"), [(1, 1), (303, 2), (128, 3), (130, 1)])
def test_odd_shapes(device, width, count):
    table = aged_table(device, torch.float64, width=width, spans=((0, width),))
    assert_equal(*step_both(table, SOME[:count].to(device), gradient(device, count, width)))


def test_a_row_a_program(device):
    table = aged_table(device, torch.float64)
    assert_equal(*step_both(table, SOME.to(device), gradient(device)))


@pytest.mark.usefixtures("tall_programs")
@pytest.mark.parametrize("spans", [((0, 2), (2, 5)), ((1, 2), (3, 5)), ((2, 5),)])
def test_each_range_has_its_clock_and_the_others_rest(device, spans):
    table = aged_table(device, torch.float64, spans=spans)
    assert_equal(*step_both(table, SOME.to(device), gradient(device)))


@pytest.mark.usefixtures("tall_programs")
def test_lazy_rows_count_their_own_steps(device):
    table = aged_table(device, torch.float64, spans=((0, 2), (2, 5)), lazy=True)
    assert_equal(*step_both(table, SOME.to(device), gradient(device)))
    assert [column.clock.steps for column in table.columns] == [31, 31]


@pytest.mark.usefixtures("tall_programs")
def test_rows_values_and_gradients_may_be_strided(device):
    right, expanded = aged_table(device, torch.float64), gradient(device)[:1].expand(4, 5)
    row_adam_(*right[:2], SOME.to(device), expanded.contiguous(), right.columns, [1e-2], [0.1])
    for grad in (expanded, expanded.mT.contiguous().mT):
        table = aged_table(device, torch.float64)
        apart = table.values.new_full((11, 4, 9), torch.nan)
        apart[:, 1:, 1:6] = table.values
        ids = SOME.to(device).repeat_interleave(2)[::2].int()
        row_adam_(apart[:, 1:, 1:6], table.last, ids, grad, table.columns, [1e-2], [0.1])
        assert torch.equal(apart[:, 1:, 1:6], right.values) and torch.equal(table.last, right.last)
        assert apart[:, :, 6:].isnan().all() and apart[:, 0].isnan().all()


@pytest.mark.usefixtures("tall_programs")
def test_repeats_to_the_bit(device):
    first, second = (aged_table(device) for _ in range(2))
    for table in (first, second):
        row_adam_(*table[:2], SOME.to(device), gradient(device, dtype=torch.float32), table.columns, [1e-2], [0.1])
    assert all(map(torch.equal, first.snapshot(), second.snapshot()))


def test_an_empty_batch_is_a_step_too(device):
    table = aged_table(device)
    values, last, *_ = table.snapshot()
    row_adam_(*table[:2], SOME[:0].to(device), gradient(device, 0, dtype=torch.float32), table.columns, [0.1], [0.1])
    assert torch.equal(table.values.cpu(), values) and torch.equal(table.last.cpu(), last)
    clock = table.columns[0].clock
    assert clock.index == 31 and clock.counters[0] == 31 and clock.history[5, 31] == 0.1


@pytest.mark.usefixtures("tall_programs")
def test_rates_may_live_on_the_device(device):
    tables = [aged_table(device, torch.float64) for _ in range(2)]
    for table, kind in zip(tables, (float, torch.tensor), strict=True):
        lr, weight_decay = [kind(0.25)], [kind(0.125)]  # float32 holds them exactly
        row_adam_(*table[:2], SOME.to(device), gradient(device), table.columns, lr, weight_decay)
    assert all(map(torch.equal, *(table.snapshot() for table in tables)))


@pytest.mark.triton
@pytest.mark.usefixtures("tall_programs")
def test_rows_outside_the_table_are_left_out():
    device = torch.device("cpu" if INTERPRETED else "cuda")
    ids, grad = torch.tensor([-1, 3, 7, 11], device=device), gradient(device, dtype=torch.float32)
    right, table = aged_table(device), aged_table(device)
    with rvi_fast.backend("triton"):
        row_adam_(*right[:2], ids[1:3], grad[1:3], right.columns, [0.1], [0.1])
        rates = [table.columns[0].clock.rates]
        table.columns[0].clock.set_rates(0.1, 0.1)
        rows._row_adam_(*table[:2], ids, grad, *rows._tensors(table.columns), rates, [True], False)
    assert torch.equal(table.values, right.values) and torch.equal(table.last, right.last)


@pytest.mark.triton
@pytest.mark.skipif(not INTERPRETED, reason="the interpreter's memory is virtual")
def test_offsets_pass_31_bits():
    small = aged_table(torch.device("cpu"), rows=2)
    values = sparse_rows_tensor(2, 5, 2**31 + 16)
    values.copy_(small.values)
    table = Table(values, small.last, small.columns)
    with rvi_fast.backend("triton"):
        row_adam_(*table[:2], torch.tensor([1]), gradient("cpu", 1, dtype=torch.float32), table.columns, [0.1], [0.1])
        same = aged_table(torch.device("cpu"), rows=2)
        row_adam_(*same[:2], torch.tensor([1]), gradient("cpu", 1, dtype=torch.float32), same.columns, [0.1], [0.1])
    assert torch.equal(values, same.values)


@pytest.mark.usefixtures("tall_programs")
@pytest.mark.parametrize("lazy", [False, True])
def test_opcheck(device, lazy):
    table = aged_table(device, spans=((0, 2), (2, 4)), lazy=lazy)
    clocks = [column.clock for column in table.columns]
    for clock in clocks:
        clock.set_rates(0.1, 0.1)
    arguments = (*table[:2], SOME.to(device), gradient(device, dtype=torch.float32), *rows._tensors(table.columns))
    arguments += ([clock.rates for clock in clocks], [True, True], lazy)
    torch.library.opcheck(torch.ops.rvi_fast.row_adam_.default, arguments)


# --- the clock ---


@pytest.mark.parametrize("betas", BETAS)
def test_clock_advances_alike_on_every_backend(device, betas):
    clocks = [AdamClock(AdamHyper(*betas, 1e-8), 7, place) for place in (device, "cpu")]
    for t in range(400):
        for clock, backend in zip(clocks, (rvi_fast.get_backend(), "torch"), strict=True):
            with rvi_fast.backend(backend if t in (0, 1, 2, 250, 399) else "torch"):
                clock.advance(1e-2 / (1 + t), 0.1)
    ours, right = clocks
    torch.testing.assert_close(ours.history.cpu(), right.history, rtol=1e-13, atol=1e-18)
    assert ours.counters.tolist() == right.counters.tolist() == [400, 7, *right.counters.tolist()[2:]]
    assert (ours.index, ours.steps) == (right.index, right.steps) == (400, 407)


def test_reserved_history_stays_where_it_is(device):
    clock = AdamClock(AdamHyper(0.9, 0.999, 1e-8), device=device)
    with rvi_fast.backend("torch"):
        clock.advance(0.1)
        clock.reserve(1000)
        place = clock.history.data_ptr()
        for _ in range(1000):
            clock.advance(0.1)
    assert clock.history.data_ptr() == place
    assert clock.history[5, 1] == 0.1


@pytest.mark.gpu
def test_graph_replays_as_eager_steps():
    device = torch.device("cuda")
    eager, captured = (aged_table(device, rows=300) for _ in range(2))
    ids, grad = torch.zeros(4, dtype=torch.int64, device=device), torch.zeros(4, 5, device=device)
    lr = torch.zeros((), dtype=torch.float64, device=device)
    clock = captured.columns[0].clock
    clock.reserve(20)
    graph = torch.cuda.CUDAGraph()
    with rvi_fast.backend("triton"):
        row_adam_(*aged_table(device, rows=300)[:2], ids[:1], grad[:1], aged_table(device).columns, [lr], [0.1])
        with torch.cuda.graph(graph):
            row_adam_(*captured[:2], ids, grad, captured.columns, [lr], [0.1])
        clock.replayed(-1)  # capturing took no step
        for t in range(10):
            ids.copy_(torch.randperm(300)[:4])
            grad.normal_()
            lr.fill_(0.1 / (1 + t))
            graph.replay()
            clock.replayed(1)
            row_adam_(*eager[:2], ids, grad, eager.columns, [lr], [0.1])
    assert all(map(torch.equal, (captured.values, captured.last), (eager.values, eager.last)))
    assert torch.equal(clock.counters, eager.columns[0].clock.counters)


@pytest.mark.gpu
def test_training_a_table_waits_for_nothing():
    table = RowTable(50, 5).cuda()
    optimizer = RowAdam(table.parameters())
    ids = torch.tensor([3, 7, 3], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.zero_grad()
            table(ids).square().sum().backward()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert table.store.columns[0].clock.counters[0] == 3


@pytest.mark.gpu
def test_a_read_captured_when_no_row_was_behind_is_up_to_date_in_its_replays():
    table = RowTable(50, 5).cuda()
    optimizer = RowAdam(table.parameters(), lr=0.1)
    ids = torch.tensor([3, 7], device="cuda")

    def step() -> None:
        optimizer.zero_grad()
        table(ids[:1].repeat(2)).square().sum().backward()
        optimizer.step()

    step()
    step()
    table.store.flush()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        read = table(ids)
    step()
    step()
    graph.replay()
    assert torch.equal(read, table(ids))
