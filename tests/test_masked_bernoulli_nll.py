"""masked_bernoulli_nll against a loop over the observed entries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cells import HOLES, ROW_WEIGHTS, assert_no_worse, far_apart, holes, loss_of, poison
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import rvi_fast
from rvi_fast import reference
from rvi_fast.functional import masked_bernoulli_nll


def loop(logits, x, mask) -> np.ndarray:
    nll = np.zeros(len(x))
    for i, j in zip(*np.nonzero(mask), strict=True):
        log_p, log_q = (-np.logaddexp(0, -sign * logits[i, j]) for sign in (1, -1))
        nll[i] -= x[i, j] * log_p + (1 - x[i, j]) * log_q
    return nll


def example(
    rows: int = 4,
    columns: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, ...]:
    """logits of all sizes, x in [0, 1] with NaN behind the mask, mask with a row that has nothing observed."""
    noise = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, columns, dtype=dtype, generator=noise) ** 5
    x = torch.rand(rows, columns, dtype=dtype, generator=noise)
    x = torch.where(torch.rand(rows, columns, generator=noise) < 0.5, x.round(), x)
    mask = torch.rand(rows, columns, generator=noise) < 0.6
    mask[:1] = False
    return tuple(t.to(device) for t in (logits, torch.where(mask, x, math.nan), mask))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 5),
    columns=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equals_a_loop(device, rows, columns, seed, dtype):
    logits, x, mask = example(rows, columns, seed, dtype)
    nll = masked_bernoulli_nll(*(t.to(device) for t in (logits, x, mask)))
    assert nll.dtype == dtype
    expected = loop(logits.double().numpy(), x.double().numpy(), mask.numpy())
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(nll.cpu(), expected, **tolerance)


@pytest.mark.parametrize("logit", [0.0, -0.0, 1e-9, 3.0, -40.0, 40.0, -1000.0, 1000.0])
@pytest.mark.parametrize("x", [0.0, 0.25, 1.0])
def test_gradient_is_the_residual_at_any_logit(device, logit, x):
    logits = torch.tensor([[logit]], dtype=torch.float64, device=device, requires_grad=True)
    nll = masked_bernoulli_nll(logits, torch.tensor([[x]], device=device), torch.tensor([[True]], device=device))
    nll.sum().backward()
    assert nll.isfinite().all()
    torch.testing.assert_close(logits.grad, torch.sigmoid(logits.detach()) - x, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("logit", [-30.0, -300.0])
def test_a_sure_guess_that_is_right_costs_its_odds(device, logit):
    logits = torch.tensor([[logit]], dtype=torch.float64, device=device)
    nll = masked_bernoulli_nll(logits, torch.zeros_like(logits), torch.ones_like(logits, dtype=torch.bool))
    torch.testing.assert_close(nll.item(), math.exp(logit), rtol=1e-9, atol=0)


@pytest.mark.parametrize("row_weights", ROW_WEIGHTS)
def test_gradients(device, row_weights):
    logits, x, mask = example(device=device)
    logits.requires_grad_()
    loss, per_row = loss_of(masked_bernoulli_nll(logits, x, mask), row_weights)
    loss.backward()
    torch.testing.assert_close(logits.grad, per_row[:, None] * torch.where(mask, torch.sigmoid(logits) - x, 0.0))


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_gradcheck(device, rows):
    logits, x, mask = example(rows, device=device)
    assert torch.autograd.gradcheck(lambda logits: masked_bernoulli_nll(logits, x, mask), logits.requires_grad_())


def test_integer_x_and_strides(device):
    logits, x, mask = example(device=device)
    x = (x > 0.5).to(torch.uint8)
    strided = logits.T.contiguous().T, x.repeat_interleave(2, dim=1)[:, ::2], mask.T.contiguous().T
    torch.testing.assert_close(masked_bernoulli_nll(*strided), masked_bernoulli_nll(logits, x.double(), mask))


@pytest.mark.parametrize(("rows", "columns"), [(1, 2500), (130, 7), (9, 300)], ids=str)
def test_float32_is_no_worse_than_torch(device, rows, columns):
    found = []
    for dtype in (torch.float64, torch.float32, None):
        logits, x, mask = example(rows, columns, dtype=torch.float32, device=device)
        logits = logits.to(dtype or torch.float32).requires_grad_()
        operator = masked_bernoulli_nll if dtype is None else reference.masked_bernoulli_nll
        nll = operator(logits, x.to(logits.dtype), mask)
        found.append((nll, *torch.autograd.grad(loss_of(nll, "rows")[0], logits)))
    for truth, same_dtype, ours in zip(*found, strict=True):
        assert_no_worse(truth, ours, same_dtype)


@pytest.mark.parametrize("form", HOLES)
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 1030])
def test_every_form_of_holes(device, form, columns):
    results = []
    for kind in ("bytes", form):
        logits, x, mask = example(5, columns, dtype=torch.float32, device=device)
        nll = masked_bernoulli_nll(logits.requires_grad_(), *holes(x, mask, kind))
        results.append((nll.detach(), *torch.autograd.grad(nll.sum(), logits)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("form", ["bytes", "bits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_with_a_scale(device, dtype, form):
    logits, x, mask = example(6, 11, dtype=dtype, device=device)
    pixels = torch.randint(0, 256, x.shape, dtype=torch.uint8, device=device)
    nll = masked_bernoulli_nll(logits, *holes(pixels, mask, form), x_scale=1 / 255)
    torch.testing.assert_close(nll, masked_bernoulli_nll(logits, pixels.to(dtype) / 255, mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(device, dtype):
    logits, x, mask = example(5, 40, device=device)
    logits = logits.clamp(-9, 9).to(dtype).requires_grad_()
    nll = masked_bernoulli_nll(logits, x, mask)
    wide = logits.detach().double().requires_grad_()
    truth = reference.masked_bernoulli_nll(wide, x, mask)
    found = nll, torch.autograd.grad(nll.sum(), logits)[0]
    for ours, exact in zip(found, (truth, torch.autograd.grad(truth.sum(), wide)[0]), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize(("rows", "columns"), [(3, 2100), (40, 5)], ids=str)
def test_writes_all_that_it_returns_and_repeats_its_bits(device, monkeypatch, rows, columns):
    def run() -> tuple[Tensor, ...]:
        logits, x, mask = example(rows, columns, dtype=torch.float32, device=device)
        nll = masked_bernoulli_nll(logits.requires_grad_(), x, mask)
        once = torch.autograd.grad(nll.sum(), logits, retain_graph=True)
        return nll.detach(), *once, *torch.autograd.grad(loss_of(nll, "rows")[0], logits)

    first = run()
    poison(monkeypatch)
    assert all(torch.equal(*pair) for pair in zip(first, run(), strict=True))


@pytest.mark.parametrize("which", ["logits", "x", "mask"])
def test_offsets_pass_31_bits(device, which):
    arguments = dict(zip(("logits", "x", "mask"), example(2, 3, 1, torch.float32, device), strict=True))
    if rvi_fast.get_backend() != "triton":
        pytest.skip("torch's own indexing")
    results = []
    for case in (arguments, arguments | {which: far_apart(arguments[which])}):
        logits = case["logits"].requires_grad_()
        nll = masked_bernoulli_nll(**case)
        results.append((nll.detach(), *torch.autograd.grad(nll.sum(), logits)))
        logits.requires_grad_(False)
    torch.testing.assert_close(*results)


def test_opcheck(device):
    operator = torch.ops.rvi_fast.masked_bernoulli_nll.default
    for form, rows in (("bytes", 4), ("bits", 4), ("nan", 0)):
        logits, x, mask = example(rows, device=device)
        arguments = logits, *holes(x, mask, form), 0.5, True
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    logits, x, mask = example(device=device)
    torch.library.opcheck(operator, (logits.requires_grad_(), x, mask, 0.5, False))


def test_compiles_into_one_graph(device):
    torch.compiler.reset()  # a graph keeps the backend that it was traced with
    logits, x, mask = example(device=device)
    logits.requires_grad_()
    compiled = torch.compile(masked_bernoulli_nll, fullgraph=True, backend="aot_eager")
    results = []
    for operator in (masked_bernoulli_nll, compiled):
        nll = operator(logits, x, mask)
        results.append((nll.detach(), *torch.autograd.grad(nll.sum(), logits)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(4, 2)}, ValueError, r"x must have shape \[B = 4, D = 3\]; got \[4, 2\]"),
        ({"logits": torch.ones(4)}, ValueError, "logits must have shape"),
        ({"logits": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "logits must be a floating-point tensor"),
        ({"x": torch.full((4, 3), 1.5)}, ValueError, r"x must lie in \[0, 1\] where it is observed; got 0.0 .. 1.5"),
        ({"x": torch.full((4, 3), -0.5)}, ValueError, r"x must lie in \[0, 1\] where it is observed"),
        ({"x": torch.full((4, 3), torch.nan)}, ValueError, r"x must lie in \[0, 1\] where it is observed"),
        ({"logits": np.ones((4, 3))}, TypeError, "logits must be a torch tensor; got ndarray"),
        ({"mask": torch.ones(4, 3)}, TypeError, "mask must be a bool tensor"),
        ({"mask": torch.ones(4, 3, dtype=torch.uint8)}, ValueError, "mask as uint8 holds bits"),
        ({"x": torch.ones(4, 3), "x_scale": 2.0}, ValueError, r"x must lie in \[0, 1\] where it is observed"),
    ],
)
def test_bad_input(change, error, message):
    arguments = dict(zip(("logits", "x", "mask"), example(), strict=True))
    with pytest.raises(error, match=message):
        masked_bernoulli_nll(**{**arguments, **change})
