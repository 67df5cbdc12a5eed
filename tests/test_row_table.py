"""RowTable reads like nn.Embedding, trains by RowAdam alone, and holds no more memory than it says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rvi_fast import large_pages
from rvi_fast.nn import RowTable
from rvi_fast.optim import RowAdam

N, DIM = 9, 4


def trained(steps: int = 30, **settings: object) -> tuple[RowTable, nn.Embedding, list[torch.optim.Optimizer]]:
    """A table and an embedding after the same steps, with rows left behind."""
    table = RowTable(N, DIM, torch.float64, **settings)
    embedding = nn.Embedding(N, DIM, dtype=torch.float64)
    embedding.load_state_dict({"weight": table.weight})
    optimizers = [RowAdam(table.parameters(), lr=0.1), torch.optim.AdamW(embedding.parameters(), 0.1, weight_decay=0.0)]
    train(table, embedding, optimizers, steps)
    return table, embedding, optimizers


def train(table: RowTable, embedding: nn.Embedding, optimizers: list[torch.optim.Optimizer], steps: int) -> None:
    for t in range(steps):
        rows = torch.tensor([t % 3, t // 5 % N])
        for module, optimizer in zip((table, embedding), optimizers, strict=True):
            optimizer.zero_grad()
            (module(rows) - t % 4).square().sum().backward()
            optimizer.step()


def assert_same(table: RowTable, embedding: nn.Embedding) -> None:
    torch.testing.assert_close(table.weight, embedding.weight, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("rows", [3, [], [2], [0, 8, 0], [[1, 2], [2, 1], [8, 8]]], ids=str)
def test_reads_like_an_embedding(rows, dtype):
    rows = torch.tensor(rows, dtype=dtype)
    table, embedding, _ = trained()
    values, expected = table(rows), embedding(rows)
    assert values.shape == expected.shape and values.dtype == expected.dtype
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-11)
    weight = torch.arange(DIM, dtype=torch.float64)
    for module, read in ((table, values), (embedding, expected)):
        module.zero_grad()
        (read * weight).sum().backward()
    grads = [p.grad.dense() for p in table.parameters()]
    torch.testing.assert_close(torch.cat(grads, dim=1), embedding.weight.grad)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (torch.tensor([0, N]), IndexError, r"rows must lie in 0 \.\. 8; got 9"),
        (torch.tensor([0, -1]), IndexError, r"rows must lie in 0 \.\. 8; got -1"),
        (torch.tensor([0.0]), TypeError, r"rows must be an int64 tensor.*float32"),
        (torch.tensor([True]), TypeError, r"rows must be an int64 tensor.*bool"),
        ([0, 1], TypeError, r"rows must be an int64 tensor.*list; use torch.tensor\(rows\)"),
        (3, TypeError, r"rows must be an int64 tensor.*int; use torch.tensor\(rows\)"),
    ],
)
def test_bad_rows(rows, error, message):
    with pytest.raises(error, match=message), torch.no_grad():
        RowTable(N, DIM)(rows)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_rows": 0}, ValueError, "num_rows must be a positive int"),
        ({"dim": 2.0}, ValueError, "dim must be a positive int"),
        ({"columns": {"a": 1, "b": 2}}, ValueError, "columns must sum to dim=4"),
        ({"columns": {"a": 4, "b": 0}}, ValueError, "the width of column 'b' must be a positive int; got 0"),
        ({"columns": {"a": 5, "b": -1}}, ValueError, "the width of column 'b' must be a positive int; got -1"),
        ({"columns": {}}, ValueError, "columns must sum to dim=4"),
        ({"init_std": -0.1}, ValueError, "init_std of 'weight' must be a finite number, 0 or above; got -0.1"),
        ({"init_std": float("nan")}, ValueError, "init_std of 'weight' must be a finite number, 0 or above; got nan"),
        ({"init_std": {"a": 0.1}}, ValueError, "init_std must name the columns weight; got a"),
        ({"dim": 20_000}, ValueError, r"dim of a RowTable must be at most 16,384.*got 20,000"),
        ({"dtype": torch.int64}, TypeError, "dtype must be one of torch.float32"),
        ({"dtype": torch.float8_e5m2}, TypeError, "dtype must be one of torch.float32"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        RowTable(**{"num_rows": N, "dim": DIM, **arguments})


def test_sizes_may_be_numpys_and_wide_tables_start_at_zero():
    table = RowTable(np.int64(N), np.int32(DIM), columns={"a": np.int8(1), "b": np.int64(3)}, init_std=np.float32(0.1))
    assert table.weight.shape == (N, DIM)
    assert not RowTable(2, 20_000, init_std=0.0).weight.any()


def test_initial_values_depend_on_seed_and_row_alone():
    small, large = RowTable(3, DIM, seed=5), RowTable(3000, DIM, seed=5)
    assert torch.equal(small.weight, large.weight[:3])
    assert not torch.equal(small.weight, RowTable(3, DIM, seed=6).weight)
    assert abs(float(large.weight.detach().std()) - 1) < 0.05
    columns = RowTable(3000, DIM, columns={"a": 1, "b": 3}, init_std={"a": 0.0, "b": 0.1})
    assert not columns.read("a").any() and abs(float(columns.read("b").std()) - 0.1) < 0.005


def test_the_caller_may_fill_its_rows_anew_after_the_backward():
    table = RowTable(10, 2)
    optimizer = RowAdam(table.parameters())
    rows = torch.tensor([1, 2])
    for batch in ([1, 2], [3, 4]):
        rows.copy_(torch.tensor(batch))
        table(rows).sum().backward()
    rows.zero_()
    before = table.weight.clone()
    optimizer.step()
    assert (table.weight != before).any(1).nonzero()[:, 0].tolist() == [1, 2, 3, 4]


def test_weight_is_up_to_date_when_read():
    table, embedding, _ = trained()
    assert not table.store.up_to_date()
    assert_same(table, embedding)
    torch.testing.assert_close(table(torch.arange(N)), table.weight, rtol=0, atol=0)
    torch.testing.assert_close(table.state_dict()["weight"], table.weight, rtol=0, atol=0)


def test_columns_read_and_assign_by_name():
    table = RowTable(N, DIM, columns={"a": 1, "b": 3})
    table.assign(torch.arange(3.0 * N).view(N, 3), "b")
    torch.testing.assert_close(table.weight, torch.cat((table.read("a"), table.read("b")), dim=1))
    assert torch.equal(table.read("b"), torch.arange(3.0 * N).view(N, 3))
    with pytest.raises(KeyError, match="columns a, b; got 'c'"):
        table.read("c")


def test_assign_keeps_the_moments():
    table, embedding, optimizers = trained()
    table.assign(torch.ones(N, DIM))
    embedding.load_state_dict({"weight": torch.ones(N, DIM)})
    assert_same(table, embedding)
    train(table, embedding, optimizers, 12)
    assert_same(table, embedding)


@pytest.mark.parametrize(("shape", "name"), [((N, DIM + 1), None), ((N,), None), ((N - 1, 1), "a")])
def test_assign_checks_the_shape(shape, name):
    table = RowTable(N, DIM, columns={"a": 1, "b": 3})
    before = table.weight
    with pytest.raises(ValueError, match="values must have shape"):
        table.assign(torch.zeros(shape), name)
    assert torch.equal(table.weight, before)


def test_state_dict_exchanges_with_an_embedding():
    table, embedding, _ = trained()
    fresh = nn.Embedding(N, DIM, dtype=torch.float64)
    fresh.load_state_dict(table.state_dict())
    assert_same(table, fresh)
    other = RowTable(N, DIM, torch.float64, seed=1)
    other.load_state_dict(embedding.state_dict())
    assert_same(other, embedding)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.zeros(N, DIM + 1)}, r"weight: expected shape \[9, 4\], found \[9, 5\]"),
        ({}, r"Missing key.*weight"),
        ({"weight": [[0.0] * DIM] * N}, "weight: expected a tensor, found list"),
        ({"weight": None}, "weight: expected a tensor, found NoneType"),
        ({"weight": torch.zeros(N, DIM), "bias": torch.zeros(N)}, r"Unexpected key.*bias"),
    ],
)
def test_loading_what_does_not_fit_raises(state, message):
    with pytest.raises(RuntimeError, match=message):
        RowTable(N, DIM).load_state_dict(state)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, None])
def test_another_optimizer_raises_at_the_first_forward_that_needs_gradients(kind):
    table = RowTable(N, DIM)
    if kind:
        kind(table.parameters(), lr=0.1)
    with torch.no_grad():
        table(torch.arange(N))
    with torch.inference_mode():
        table(torch.arange(N))
    with pytest.raises(RuntimeError, match=r"no RowAdam trains.*'weight'.*make rvi_fast\.optim\.RowAdam"):
        table(torch.arange(N))
    table.requires_grad_(False)
    assert torch.equal(table(torch.arange(N)), table.weight)


def test_every_column_range_needs_a_row_adam():
    table = RowTable(N, DIM, columns={"a": 1, "b": 3})
    a, b = table.parameters()
    optimizer = RowAdam([a])
    with pytest.raises(RuntimeError, match=r"no RowAdam trains.*'b'"):
        table(torch.arange(N))
    b.requires_grad_(False)
    table(torch.arange(N)).sum().backward()
    optimizer.step()
    assert a.grad is not None and b.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_is_three_numbers_an_entry_and_four_bytes_a_row(dtype):
    def held() -> int:
        tensors = [*(v for v in vars(table.store).values() if isinstance(v, torch.Tensor)), *table.parameters()]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    rows, dim = 1000, 16
    table = RowTable(rows, dim, dtype)
    step_count = 8
    assert held() == rows * (3 * dtype.itemsize * dim + 4) + step_count
    table.drop_moments()
    assert held() == rows * (dtype.itemsize * dim + 4) + step_count
    assert RowTable(rows, dim, dtype, moments=False).store.values.nbytes == rows * dtype.itemsize * dim


def test_drop_moments_keeps_the_values_and_starts_afresh():
    table, embedding, _ = trained()
    table.drop_moments()
    assert_same(table, embedding)
    with pytest.raises(RuntimeError, match="no RowAdam trains"):
        table(torch.arange(N))
    optimizers = [RowAdam(table.parameters(), lr=0.1), torch.optim.AdamW(embedding.parameters(), 0.1, weight_decay=0.0)]
    train(table, embedding, optimizers, 12)
    assert_same(table, embedding)


def test_row_adam_makes_room_for_moments():
    assert_same(*trained(moments=False)[:2])


@pytest.mark.parametrize("columns", [None, {"a": 1, "b": 3}])
def test_weight_is_differentiable_while_a_row_adam_trains(columns):
    """An L2 term over all rows, tied weights: as for an embedding."""
    table = RowTable(N, DIM, torch.float64, columns=columns)
    embedding = nn.Embedding(N, DIM, dtype=torch.float64)
    embedding.load_state_dict({"weight": table.weight.detach()} if columns is None else {"weight": table.weight})
    optimizers = [RowAdam(table.parameters(), 0.1), torch.optim.AdamW(embedding.parameters(), 0.1, weight_decay=0.0)]
    for t in range(8):
        rows = torch.tensor([t % 3, t])
        for module, optimizer in zip((table, embedding), optimizers, strict=True):
            optimizer.zero_grad()
            loss = (module(rows) @ module.weight.T).square().sum() if t % 2 else module(rows).cos().sum()
            (loss + (module.weight.square().sum() if t > 5 else 0)).backward()
            optimizer.step()
    assert_same(table, embedding)
    with torch.no_grad():
        assert not table.weight.requires_grad
    table.requires_grad_(False)
    assert not table.weight.requires_grad


def test_weight_is_the_parameter_before_a_row_adam_trains():
    table = RowTable(N, DIM)
    nn.init.constant_(table.weight, 3.0)
    optimizer = RowAdam([table.weight])
    table(torch.arange(N)).sum().backward()
    optimizer.step()
    assert (table.weight < 3).all()
    with torch.no_grad():
        table.weight.zero_()  # a copy
    assert (table.weight > 2).all()


def replace_data(table):
    next(table.parameters()).data = torch.zeros(N, DIM)


def replace_parameter(table):
    table.weight = nn.Parameter(torch.zeros(N, DIM))


@pytest.mark.parametrize("replace", [replace_data, replace_parameter])
def test_foreign_memory_raises_until_assign(replace):
    table = RowTable(N, DIM)
    replace(table)
    with pytest.raises(RuntimeError, match=r"'weight' of this RowTable was replaced.*table\.assign"), torch.no_grad():
        table(torch.arange(N))
    table.assign(torch.ones(N, DIM))
    with torch.no_grad():
        assert (table(torch.arange(N)) == 1).all()
    assert table.weight is next(table.parameters()) and (table.weight == 1).all()


def test_functional_call_raises():
    table = RowTable(N, DIM)
    with pytest.raises(RuntimeError, match=r"functional_call.*table\.assign"):
        torch.func.functional_call(table, {"weight": torch.zeros(N, DIM)}, (torch.arange(N),))


def test_meta_raises_and_changes_nothing():
    table = RowTable(N, DIM)
    with pytest.raises(NotImplementedError, match="a RowTable cannot move to the meta device"):
        table.to("meta")
    with torch.no_grad():
        assert torch.equal(table(torch.arange(N)), table.weight)


def test_another_optimizer_raises_once_the_row_adam_is_gone():
    table = RowTable(N, DIM)
    optimizer = RowAdam(table.parameters())
    table(torch.arange(N))
    del optimizer
    torch.optim.SGD(table.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="no RowAdam trains"):
        table(torch.arange(N))


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_reading_compiles_into_one_graph(fresh_compiler):
    table = RowTable(N, DIM)
    rows = torch.tensor([3, 0, 3])
    read = torch.compile(table, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(read(rows), table.weight[rows])


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_training_compiled_equals_eager(fresh_compiler):
    def train(wrap):
        table = RowTable(N, DIM)
        optimizer = RowAdam(table.parameters(), lr=0.1)
        loss = wrap(lambda rows: torch.tanh(table(rows)).square().sum())
        for t in range(6):
            optimizer.zero_grad()
            loss(torch.tensor([t % 3, N - 1 - t])).backward()
            optimizer.step()
        return table.weight.detach()

    torch.testing.assert_close(train(lambda f: torch.compile(f, backend="aot_eager")), train(lambda f: f))


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no large pages")
def test_a_large_table_asks_for_large_pages():
    table = RowTable(300_000, 8)
    first = table.store.values.data_ptr() + table.store.values.nbytes // 2
    flags, inside = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= first < int(found[2], 16)
        elif inside and line.startswith("VmFlags"):
            flags = line.split()
    assert "hg" in flags
    assert not large_pages.zeros((300_000, 8), torch.float32, torch.device("cpu")).any()
