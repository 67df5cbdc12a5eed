"""Reading rows up to date: the kernel against the twin, and that it writes nothing but its result."""

from __future__ import annotations

import pytest
import torch
from conftest import INTERPRETED
from tables import BETAS, aged_table, sparse_rows_tensor, tall_programs

import rvi_fast
from rvi_fast.ops import Columns, read_rows, rows

__all__ = ["tall_programs"]
SOME = torch.tensor([3, 0, 10, 3, 7])


def twin(table, ids):
    with rvi_fast.backend("torch"):
        return [t.cpu() for t in read_rows(*table[:2], ids, table.columns)]


def in_float64(table):
    columns = [Columns(start, stop, clock) for start, stop, clock in table.columns]
    return type(table)(table.values.double(), table.last, columns)


@pytest.mark.usefixtures("tall_programs")
@pytest.mark.parametrize("scale", [1.0, 1e-7])
@pytest.mark.parametrize("betas", BETAS)
def test_float64_equals_the_twin(device, betas, scale):
    table = aged_table(device, torch.float64, betas=betas, scale=scale, steps=60)
    ids = SOME.to(device)
    for got, right in zip(read_rows(*table[:2], ids, table.columns), twin(table, ids), strict=True):
        torch.testing.assert_close(got.cpu(), right, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("tall_programs")
@pytest.mark.parametrize("scale", [1.0, 1e-7])
@pytest.mark.parametrize("betas", BETAS[:2])
def test_float32_errs_no_more_than_torch(device, betas, scale):
    table = aged_table(device, betas=betas, scale=scale)
    ids = SOME.to(device)
    truth = twin(in_float64(table), ids)
    results = zip(read_rows(*table[:2], ids, table.columns), twin(table, ids), truth, strict=True)
    for got, torch32, right in results:
        allowed = (torch32 - right).abs().max() + 2e-7 * right.abs().max()
        assert (got.cpu() - right).abs().max() <= allowed


@pytest.mark.usefixtures("tall_programs")
@pytest.mark.parametrize(("width", "count"), [(1, 1), (303, 2), (128, 3), (130, 1)])
def test_odd_shapes(device, width, count):
    table = aged_table(device, torch.float64, width=width, spans=((0, width),))
    ids = SOME[:count].to(device)
    for got, right in zip(read_rows(*table[:2], ids, table.columns), twin(table, ids), strict=True):
        torch.testing.assert_close(got.cpu(), right, rtol=1e-12, atol=1e-14)


def test_a_row_a_program(device):
    table = aged_table(device, torch.float64)
    ids = SOME.to(device)
    (got,) = read_rows(*table[:2], ids, table.columns, moments=False)
    torch.testing.assert_close(got.cpu(), twin(table, ids)[0], rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("tall_programs")
@pytest.mark.parametrize("spans", [((0, 2), (2, 5)), ((1, 2), (3, 5)), ((2, 5),), ()])
@pytest.mark.parametrize("moments", [True, False])
def test_each_range_has_its_clock_and_the_others_rest(device, spans, moments):
    table = aged_table(device, torch.float64, spans=spans)
    ids = SOME.to(device)
    got = read_rows(*table[:2], ids, table.columns, moments=moments)
    assert len(got) == (3 if moments else 1)
    for ours, right in zip(got, twin(table, ids), strict=False):
        torch.testing.assert_close(ours.cpu(), right, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("tall_programs")
def test_lazy_rows_are_never_behind(device):
    table = aged_table(device, lazy=True)
    ids = SOME.to(device)
    got = torch.stack(read_rows(*table[:2], ids, table.columns), dim=1)
    assert torch.equal(got, table.values[ids])


@pytest.mark.usefixtures("tall_programs")
def test_writes_nothing_and_repeats_to_the_bit(device):
    table = aged_table(device)
    before = table.snapshot()
    first, second = (torch.stack(read_rows(*table[:2], SOME.to(device), table.columns)) for _ in range(2))
    assert torch.equal(first, second)
    assert all(map(torch.equal, table.snapshot(), before))


@pytest.mark.usefixtures("tall_programs")
def test_writes_all_of_its_result(device, monkeypatch):
    table = aged_table(device)
    ids = SOME.to(device)
    right = read_rows(*table[:2], ids, table.columns)
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        fresh = new_empty(*args, **kwargs)
        return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    assert all(map(torch.equal, read_rows(*table[:2], ids, table.columns), right))


@pytest.mark.usefixtures("tall_programs")
def test_rows_and_values_may_be_strided(device):
    table = aged_table(device, torch.float64, width=7)
    ids = SOME.to(device)
    right = twin(table, ids[::2])
    apart = table.values.new_full((11, 4, 9), torch.nan)
    apart[:, 1:, 1:8] = table.values
    for index in (ids[::2], ids[::2].int()):
        got = read_rows(apart[:, 1:, 1:8], table.last, index, table.columns)
        for ours, expected in zip(got, right, strict=True):
            torch.testing.assert_close(ours.cpu(), expected, rtol=1e-12, atol=1e-14)


def test_empty(device):
    table = aged_table(device)
    for part in read_rows(*table[:2], SOME[:0].to(device), table.columns):
        assert part.shape == (0, 5)


@pytest.mark.triton
@pytest.mark.usefixtures("tall_programs")
def test_rows_outside_the_table_read_as_nan():
    device = torch.device("cpu" if INTERPRETED else "cuda")
    table = aged_table(device)
    with rvi_fast.backend("triton"):
        parts = read_rows(*table[:2], torch.tensor([2, 11, -1, 3], device=device), table.columns)
    for part in parts:
        assert part.isnan().any(1).tolist() == [False, True, True, False]
        assert part[1:3].isnan().all()


@pytest.mark.triton
@pytest.mark.skipif(not INTERPRETED, reason="the interpreter's memory is virtual")
def test_offsets_pass_31_bits():
    small = aged_table(torch.device("cpu"), rows=2)
    values = sparse_rows_tensor(2, 5, 2**31 + 16)
    values.copy_(small.values)
    with rvi_fast.backend("triton"):
        got = read_rows(values, small.last, torch.tensor([1]), small.columns)
    for ours, right in zip(got, twin(small, torch.tensor([1])), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("tall_programs")
def test_opcheck(device):
    table = aged_table(device, spans=((0, 2), (2, 4)))
    arguments = (*table[:2], SOME.to(device), *rows._tensors(table.columns), [True, True], True)
    torch.library.opcheck(torch.ops.rvi_fast.read_rows.default, arguments)


@pytest.mark.triton
@pytest.mark.usefixtures("tall_programs")
def test_compiles():
    device = torch.device("cpu" if INTERPRETED else "cuda")
    table = aged_table(device)
    with rvi_fast.backend("triton"):
        twice = torch.compile(
            lambda ids: read_rows(*table[:2], ids, table.columns)[0] * 2, fullgraph=True, backend="aot_eager"
        )
        ids = SOME.to(device)
        assert torch.equal(twice(ids), read_rows(*table[:2], ids, table.columns)[0] * 2)
