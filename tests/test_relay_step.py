"""The backward of a sample and the step of its rows at once, against one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TRITON_RUNS
from tables import tall_programs
from test_relay_sample import Model
from torch import Tensor

import rvi_fast
from rvi_fast import ops
from rvi_fast.functional import Columns, LazyClock

__all__ = ["tall_programs"]
pytestmark = pytest.mark.usefixtures("tall_programs")


def fill_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of many rows, as large batches have."""
    if TRITON_RUNS:
        monkeypatch.setattr("rvi_fast.kernels.relay_sample.PROGRAMS", 1)


def gradients(model: Model, B: int, T: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    by_z = torch.randn(T, B, generator=draw, dtype=torch.float64).mT.to(model.values)
    return by_z, torch.randn((), generator=draw, dtype=torch.float64).to(model.values).expand(B)


def after_a_step(
    model: Model, by: tuple[Tensor | None, Tensor | None], rows: int, *, at_once: bool, **change: Any
) -> list[Tensor]:
    """The relays' gradient, and the table and its clock after the step: at once, or by the twins."""
    arguments = model.arguments(rows=rows, **change)
    clock = arguments["clock"]
    columns = [Columns(0, model.values.shape[2], clock)]
    _, _, sampled = ops.relay_sample_rows(**arguments)
    keys = [arguments[n] for n in ("relays", "groups", "active", "seed", "sample")]
    if at_once:
        by_relays = ops.relay_step_(model.values, model.last, columns, *by, sampled, *keys, [1e-2], [0.1])
    else:
        with rvi_fast.backend("torch"):
            by_rows, by_relays = ops.relay_sample_rows_backward(*by, sampled, *keys)
            ops.row_adam_(model.values, model.last, sampled.rows, by_rows, columns, [1e-2], [0.1])
    assert clock.index in (0, 321)
    return [t.cpu() for t in (by_relays, model.values, model.last, clock.history, clock.counters)]


@pytest.mark.parametrize("many_rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sample", [True, False])
def test_equals_one_after_the_other(device, sample, dtype, many_rows, monkeypatch):
    if many_rows:
        fill_programs(monkeypatch)
    if many_rows and not sample:
        pytest.skip("the other cases have all its kernels do")
    rows = (19 if dtype == torch.float32 else 6) if many_rows else 2
    results = []
    for at_once in (True, False):
        model = Model(device, dtype, (7, 12), 9)
        results.append(after_a_step(model, gradients(model, rows, 9), rows, at_once=at_once, sample=sample))
    tolerance = 3e-6 if dtype == torch.float32 else 1e-12
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got, right, rtol=tolerance, atol=tolerance * float(right.abs().max()))


@pytest.mark.parametrize("missing", [0, 1])
def test_one_gradient_may_be_missing(device, missing, monkeypatch):
    fill_programs(monkeypatch)
    results = []
    for at_once in (True, False):
        model = Model(device, torch.float64, (7,), 5)
        by = [None if i == missing else grad for i, grad in enumerate(gradients(model, 3, 5))]
        results.append(after_a_step(model, by, 3, at_once=at_once))
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)


def test_lazy_rows_take_one_after_the_other(device, monkeypatch):
    fill_programs(monkeypatch)
    results = []
    for at_once in (True, False):
        model = Model(device, torch.float64, (7,), 5)
        clock = LazyClock(model.clock.hyper, 9, device)
        results.append(after_a_step(model, gradients(model, 4, 5), 4, at_once=at_once, clock=clock))
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)


def test_repeated_rows_raise(device):
    model = Model(device, torch.float64, (7,), 5)
    arguments = model.arguments(rows=2)
    arguments["rows"] = arguments["rows"][:1].repeat(2)
    _, _, sampled = ops.relay_sample_rows(**arguments)
    if device.type != "cpu":
        pytest.skip("a GPU would have to wait")
    keys = [arguments[n] for n in ("relays", "groups", "active", "seed", "sample")]
    columns = [Columns(0, model.values.shape[2], model.clock)]
    with pytest.raises(ValueError, match="rows must not repeat within a step"):
        ops.relay_step_(model.values, model.last, columns, *gradients(model, 2, 5), sampled, *keys, [1e-2], [0.1])


def test_no_rows_are_a_step_too(device):
    model = Model(device, torch.float32, (7,), 5)
    before = model.values.cpu().clone()
    by_relays, values, _, _, counters = after_a_step(model, gradients(model, 0, 5), 0, at_once=True)
    assert not by_relays.any() and torch.equal(values, before) and counters[0] == 321


def test_repeats_to_the_bit(device, monkeypatch):
    fill_programs(monkeypatch)
    first, second = (Model(device, torch.float32, (7, 12), 9) for _ in range(2))
    results = [after_a_step(model, gradients(model, 19, 9), 19, at_once=True) for model in (first, second)]
    assert all(map(torch.equal, *results))


@pytest.mark.triton
def test_offsets_pass_31_bits():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stride = 2**31 + 16
    with rvi_fast.backend("triton"):
        small, wide = (Model(device, torch.float32, (3,), 2, num_rows=2) for _ in range(2))
        storage = torch.empty(stride + 32, device=device)
        wide.values = storage.as_strided(small.values.shape, (stride, 7, 1)).copy_(small.values)
        results = [after_a_step(model, gradients(model, 2, 2), 2, at_once=True) for model in (small, wide)]
    assert all(map(torch.equal, *results))


def test_opcheck(device, monkeypatch):
    fill_programs(monkeypatch)
    model = Model(device, torch.float64, (7,), 5)
    arguments = model.arguments(rows=2)
    _, _, sampled = ops.relay_sample_rows(**arguments)
    clock = model.clock
    clock.set_rates(0.1, 0.1)
    tensors = clock.history, clock.counters, clock.constants, clock.rates
    given = (model.values, model.last, *tensors, True, *gradients(model, 2, 5), *sampled, model.relays)
    torch.library.opcheck(torch.ops.rvi_fast.relay_step_.default, (*given, [7], [4], 5, True))
