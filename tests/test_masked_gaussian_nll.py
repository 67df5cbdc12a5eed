"""masked_gaussian_nll against a loop over the observed entries."""

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
from rvi_fast.functional import masked_gaussian_nll


def loop(xhat, x, mask, scale) -> np.ndarray:
    nll = np.zeros(len(x))
    for i, j in zip(*np.nonzero(mask), strict=True):
        s = scale[j]
        nll[i] += 0.5 * ((x[i, j] - xhat[i, j]) / s) ** 2 + math.log(s) + 0.5 * math.log(2 * math.pi)
    return nll


def example(
    rows: int = 4,
    columns: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, ...]:
    """xhat, x with NaN behind the mask, mask with a row that has nothing observed, scale."""
    noise = torch.Generator().manual_seed(seed)
    xhat, x = torch.randn(2, rows, columns, dtype=dtype, generator=noise)
    mask = torch.rand(rows, columns, generator=noise) < 0.6
    mask[:1] = False
    scale = 0.1 + torch.rand(columns, dtype=dtype, generator=noise)
    return tuple(t.to(device) for t in (xhat, torch.where(mask, x, math.nan), mask, scale))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 5),
    columns=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equals_a_loop(device, rows, columns, seed, dtype):
    xhat, x, mask, scale = example(rows, columns, seed, dtype)
    nll = masked_gaussian_nll(*(t.to(device) for t in (xhat, x, mask, scale)))
    assert nll.dtype == dtype
    expected = loop(xhat.double().numpy(), x.double().numpy(), mask.numpy(), scale.double().numpy())
    np.testing.assert_allclose(nll.cpu(), expected, rtol=2e-5 if dtype == torch.float32 else 1e-12, atol=1e-5)


@pytest.mark.parametrize("scale", [0.3, torch.tensor(0.3), torch.tensor([0.3])], ids=["float", "[]", "[1]"])
def test_one_scale_for_all_columns(device, scale):
    xhat, x, mask, _ = example(device=device)
    torch.testing.assert_close(
        masked_gaussian_nll(xhat, x, mask, scale), masked_gaussian_nll(xhat, x, mask, torch.full((3,), 0.3))
    )


def test_one_learned_scale_for_all_columns(device):
    xhat, x, mask, _ = example(device=device)
    one = torch.tensor(0.3, dtype=torch.float64, device=device, requires_grad=True)
    each = torch.full((3,), 0.3, dtype=torch.float64, device=device, requires_grad=True)
    for scale in (one, each):
        masked_gaussian_nll(xhat, x, mask, scale).sum().backward()
    torch.testing.assert_close(one.grad, each.grad.sum())


@pytest.mark.parametrize("row_weights", ROW_WEIGHTS)
def test_gradients(device, row_weights):
    xhat, x, mask, scale = example(device=device)
    xhat.requires_grad_(), scale.requires_grad_()
    loss, per_row = loss_of(masked_gaussian_nll(xhat, x, mask, scale), row_weights)
    loss.backward()
    r = torch.where(mask, xhat - x, 0.0)
    torch.testing.assert_close(xhat.grad, per_row[:, None] * r / scale**2)
    torch.testing.assert_close(
        scale.grad, (per_row[:, None] * torch.where(mask, 1 / scale - r**2 / scale**3, 0)).sum(0)
    )


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_gradcheck(device, rows):
    xhat, x, mask, scale = example(rows, device=device)
    inputs = xhat.requires_grad_(), scale.requires_grad_()
    assert torch.autograd.gradcheck(lambda xhat, scale: masked_gaussian_nll(xhat, x, mask, scale), inputs)


@pytest.mark.parametrize("needed", [0, 1])
def test_gradient_of_one_input(device, needed):
    grads = []
    for wanted in ({0, 1}, {needed}):
        xhat, x, mask, scale = example(device=device)
        inputs = [t.requires_grad_(i in wanted) for i, t in enumerate((xhat, scale))]
        masked_gaussian_nll(xhat, x, mask, scale).sum().backward()
        assert {i for i, t in enumerate(inputs) if t.grad is not None} == wanted
        grads.append(inputs[needed].grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.float64])
def test_x_of_another_dtype(device, dtype):
    xhat, x, mask, scale = example(dtype=torch.float32, device=device)
    x = (x > 0).to(dtype)
    nll = masked_gaussian_nll(xhat, x, mask, scale)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, masked_gaussian_nll(xhat, x.float(), mask, scale))


def test_strided_and_expanded_input(device):
    xhat, x, mask, scale = example(device=device)
    strided = xhat.T.contiguous().T, x.repeat_interleave(2, dim=1)[:, ::2], mask.T.contiguous().T
    torch.testing.assert_close(masked_gaussian_nll(*strided, scale), masked_gaussian_nll(xhat, x, mask, scale))
    row = (t[2:3] for t in (xhat, x, mask))
    nll = masked_gaussian_nll(*(t.expand(4, 3) for t in row), scale)
    torch.testing.assert_close(nll, masked_gaussian_nll(xhat, x, mask, scale)[2].expand(4))


@pytest.mark.parametrize(("rows", "columns"), [(1, 2500), (130, 7), (9, 300)], ids=str)
def test_float32_is_no_worse_than_torch(device, rows, columns):
    found = []
    for dtype in (torch.float64, torch.float32, None):
        xhat, x, mask, scale = (t.float() if t.is_floating_point() else t for t in example(rows, columns))
        xhat, scale = (t.to(device, dtype or torch.float32).requires_grad_() for t in (xhat, scale))
        x, mask = x.to(device), mask.to(device)
        operator = masked_gaussian_nll if dtype is None else reference.masked_gaussian_nll
        nll = operator(xhat, x.to(xhat.dtype), mask, scale)
        loss, _ = loss_of(nll, "rows")
        found.append((nll, *torch.autograd.grad(loss, (xhat, scale))))
    for truth, same_dtype, ours in zip(*found, strict=True):
        assert_no_worse(truth, ours, same_dtype)


@pytest.mark.parametrize("form", HOLES)
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 1030])
def test_every_form_of_holes(device, form, columns):
    results = []
    for kind in ("bytes", form):
        xhat, x, mask, scale = example(5, columns, dtype=torch.float32, device=device)
        xhat.requires_grad_(), scale.requires_grad_()
        nll = masked_gaussian_nll(xhat, *holes(x, mask, kind), scale)
        results.append((nll.detach(), *torch.autograd.grad(nll.sum(), (xhat, scale))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("form", ["bytes", "bits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_with_a_scale(device, dtype, form):
    xhat, x, mask, scale = example(6, 11, dtype=dtype, device=device)
    pixels = torch.randint(0, 256, x.shape, dtype=torch.uint8, device=device)
    nll = masked_gaussian_nll(xhat, *holes(pixels, mask, form), scale, x_scale=1 / 255)
    torch.testing.assert_close(nll, masked_gaussian_nll(xhat, pixels.to(dtype) / 255, mask, scale))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(device, dtype):
    inputs = [t.to(dtype) if t.is_floating_point() else t for t in example(5, 40, device=device)]
    xhat, x, mask, scale = inputs[0].requires_grad_(), *inputs[1:3], inputs[3].requires_grad_()
    nll = masked_gaussian_nll(xhat, x, mask, scale)
    assert nll.dtype == dtype
    grads = torch.autograd.grad(nll.sum(), (xhat, scale))
    wide = [t.detach().double().requires_grad_() for t in (xhat, scale)]
    truth = reference.masked_gaussian_nll(wide[0], x.double(), mask, wide[1])
    expected = torch.autograd.grad(truth.sum(), wide)
    for ours, exact in zip((nll, *grads), (truth, *expected), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()


def test_autocast_keeps_the_sum_in_float32(device):
    if rvi_fast.get_backend() != "triton":
        pytest.skip("torch's own rules")
    xhat, x, mask, scale = example(device=device)
    with torch.autocast(device.type, torch.bfloat16):
        nll = masked_gaussian_nll(xhat.bfloat16(), x, mask, scale)
    assert nll.dtype == torch.float32


def test_backward_twice(device):
    xhat, x, mask, scale = example(device=device)
    inputs = xhat.requires_grad_(), scale.requires_grad_()
    nll = masked_gaussian_nll(xhat, x, mask, scale)
    once = torch.autograd.grad(nll.sum(), inputs, retain_graph=True)
    twice = torch.autograd.grad(2 * nll.sum(), inputs)
    assert all(torch.equal(2 * a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize(("rows", "columns"), [(3, 2100), (40, 5)], ids=str)
def test_writes_all_that_it_returns_and_repeats_its_bits(device, monkeypatch, rows, columns):
    def run() -> tuple[Tensor, ...]:
        xhat, x, mask, scale = example(rows, columns, dtype=torch.float32, device=device)
        xhat.requires_grad_(), scale.requires_grad_()
        nll = masked_gaussian_nll(xhat, x, mask, scale)
        return nll.detach(), *torch.autograd.grad(loss_of(nll, "rows")[0], (xhat, scale))

    first = run()
    poison(monkeypatch)
    assert all(torch.equal(*pair) for pair in zip(first, run(), strict=True))


@pytest.mark.parametrize("which", ["xhat", "x", "mask"])
def test_offsets_pass_31_bits(device, which):
    arguments = dict(zip(("xhat", "x", "mask", "scale"), example(2, 3, 1, torch.float32, device), strict=True))
    if rvi_fast.get_backend() != "triton":
        pytest.skip("torch's own indexing")
    arguments["xhat"].requires_grad_(), arguments["scale"].requires_grad_()
    apart = arguments | {which: far_apart(arguments[which].detach())}
    apart["xhat"].requires_grad_()
    results = []
    for case in (arguments, apart):
        nll = masked_gaussian_nll(**case)
        results.append((nll.detach(), *torch.autograd.grad(nll.sum(), (case["xhat"], case["scale"]))))
    torch.testing.assert_close(*results)


QUICK = ("test_schema", "test_faketensor")


def test_opcheck(device):
    operator, by_scale = torch.ops.rvi_fast.masked_gaussian_nll.default, torch.ops.rvi_fast.masked_gaussian_nll_by_scale
    for form, rows in (("bytes", 4), ("bits", 4), ("nan", 0)):
        xhat, x, mask, scale = example(rows, device=device)
        arguments = xhat, *holes(x, mask, form), scale, 0.5
        torch.library.opcheck(operator, (*arguments, True), test_utils=QUICK)
        torch.library.opcheck(by_scale.default, (torch.ones_like(xhat[:, 0]), *arguments), test_utils=QUICK)
    xhat, x, mask, scale = example(device=device)
    torch.library.opcheck(operator, (xhat.requires_grad_(), x, mask, scale.requires_grad_(), 0.5, False))


def test_compiles_into_one_graph(device):
    torch.compiler.reset()  # a graph keeps the backend that it was traced with
    xhat, x, mask, scale = example(device=device)
    inputs = xhat.requires_grad_(), scale.requires_grad_()
    compiled = torch.compile(masked_gaussian_nll, fullgraph=True, backend="aot_eager")
    results = []
    for operator in (masked_gaussian_nll, compiled):
        nll = operator(xhat, x, mask, scale)
        results.append((nll.detach(), *torch.autograd.grad(nll.sum(), inputs)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_what_the_kernel_leaves_to_torch(device):
    xhat, x, mask, scale = example(device=device)
    x.requires_grad_(), xhat.requires_grad_()
    if rvi_fast.get_backend() == "triton":
        with pytest.raises(NotImplementedError, match="no Triton kernel for gradients to x"):
            masked_gaussian_nll(xhat, x, mask, scale)
        nll = masked_gaussian_nll(xhat, x.detach(), mask, scale)
        (dxhat,) = torch.autograd.grad(nll.sum(), xhat, create_graph=True)
        with pytest.raises(RuntimeError, match="gradients of a kernel cannot be differentiated again"):
            dxhat.sum().backward()
    else:
        nll = masked_gaussian_nll(xhat, x, mask, scale)
        assert torch.autograd.grad(nll.sum(), x)[0].shape == x.shape


@pytest.mark.gpu
@pytest.mark.triton
def test_graph_replays_as_eager():
    xhat, x, mask, scale = example(300, 784, dtype=torch.float32, device="cuda")
    inputs = xhat.requires_grad_(), scale.requires_grad_()

    def run() -> tuple[Tensor, ...]:
        nll = masked_gaussian_nll(xhat, x, mask, scale)
        return nll.detach(), *torch.autograd.grad(nll.sum(), inputs)

    eager = run()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(eager, captured, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(4, 2)}, ValueError, r"x must have shape \[B = 4, D = 3\]; got \[4, 2\]"),
        ({"mask": torch.ones(3, 3, dtype=torch.bool)}, ValueError, r"mask must have shape \[B = 4, D = 3\]"),
        ({"mask": torch.ones(4, 3)}, TypeError, "mask must be a bool tensor"),
        ({"xhat": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "xhat must be a floating-point tensor"),
        ({"scale": torch.ones(2)}, ValueError, r"scale must be one number or one per column \(3\)"),
        ({"scale": 0.0}, ValueError, "scale must be above 0"),
        ({"scale": torch.tensor([1.0, 0.0, 2.0])}, ValueError, "scale must be above 0; got 0.0"),
        ({"scale": "1"}, TypeError, "scale must be a number or a torch tensor; got str"),
        ({"x": np.ones((4, 3))}, TypeError, "x must be a torch tensor; got ndarray"),
        ({"mask": np.ones((4, 3), dtype=bool)}, TypeError, "mask must be a torch tensor; got ndarray"),
        (
            {"mask": torch.ones(4, 3, dtype=torch.uint8)},
            ValueError,
            r"mask as uint8 holds bits.*\[4, 1\]; got \[4, 3\]",
        ),
        ({"mask": None, "x": torch.ones(4, 3).int()}, TypeError, "mask=None takes NaN in x as missing.*pass a mask"),
        ({"x_scale": "1"}, TypeError, "x_scale must be a number; got str"),
        ({"scale": math.nan}, ValueError, "scale must be above 0"),
    ],
)
def test_bad_input(change, error, message):
    arguments = dict(zip(("xhat", "x", "mask", "scale"), example(), strict=True))
    with pytest.raises(error, match=message):
        masked_gaussian_nll(**{**arguments, **change})
