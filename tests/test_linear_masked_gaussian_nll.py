"""linear_masked_gaussian_nll against a loop over rows, columns and features."""

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
from rvi_fast.functional import linear_masked_gaussian_nll, masked_gaussian_nll

LEARNED = ("h", "weight", "bias", "scale")


def loop(h, weight, bias, x, mask, scale) -> np.ndarray:
    nll = np.zeros(len(x))
    for i, j in zip(*np.nonzero(mask), strict=True):
        xhat = bias[j] + sum(h[i, k] * weight[j, k] for k in range(h.shape[1]))
        nll[i] += 0.5 * ((x[i, j] - xhat) / scale[j]) ** 2 + math.log(scale[j]) + 0.5 * math.log(2 * math.pi)
    return nll


def example(rows=4, columns=3, width=5, seed=0, dtype=torch.float64, device="cpu") -> dict[str, Tensor]:
    """Tensors by argument name, x with NaN behind the mask."""
    noise = torch.Generator().manual_seed(seed)
    shapes = {"h": (rows, width), "weight": (columns, width), "bias": (columns,), "x": (rows, columns)}
    tensors = {name: torch.randn(shape, dtype=dtype, generator=noise) for name, shape in shapes.items()}
    mask = torch.rand(rows, columns, generator=noise) < 0.6
    scale = 0.1 + torch.rand(columns, dtype=dtype, generator=noise)
    tensors |= {"x": torch.where(mask, tensors["x"], math.nan), "mask": mask, "scale": scale}
    return {name: t.to(device) for name, t in tensors.items()}


def learned(tensors: dict[str, Tensor], names: tuple[str, ...] = LEARNED) -> list[Tensor]:
    """The tensors of these names, which from here on require gradients."""
    return [tensors[name].requires_grad_() for name in names]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 4),
    columns=st.integers(1, 7),
    width=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equals_a_loop(device, rows, columns, width, seed, dtype):
    tensors = example(rows, columns, width, seed, dtype)
    nll = linear_masked_gaussian_nll(**{name: t.to(device) for name, t in tensors.items()})
    assert nll.dtype == dtype
    expected = loop(**{n: (t if t.dtype == torch.bool else t.double()).numpy() for n, t in tensors.items()})
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-11}
    np.testing.assert_allclose(nll.cpu(), expected, **tolerance)


@pytest.mark.parametrize("row_weights", ROW_WEIGHTS)
def test_gradients_equal_the_composition(device, row_weights):
    def grads(fused: bool) -> list[Tensor]:
        tensors = example(device=device)
        inputs = learned(tensors)
        if fused:
            nll = linear_masked_gaussian_nll(**tensors)
        else:
            xhat = torch.nn.functional.linear(tensors["h"], tensors["weight"], tensors["bias"])
            nll = masked_gaussian_nll(xhat, tensors["x"], tensors["mask"], tensors["scale"])
        return list(torch.autograd.grad(loss_of(nll, row_weights)[0], inputs))

    torch.testing.assert_close(grads(True), grads(False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rows", "columns", "width"), [(0, 3, 5), (1, 1, 1), (4, 3, 5)])
def test_gradcheck(device, rows, columns, width):
    tensors = example(rows, columns, width, device=device)

    def function(*inputs: Tensor) -> Tensor:
        return linear_masked_gaussian_nll(**{**tensors, **dict(zip(LEARNED, inputs, strict=True))})

    assert torch.autograd.gradcheck(function, learned(tensors))


@pytest.mark.parametrize("needed", LEARNED)
def test_gradient_of_one_input(device, needed):
    grads = []
    for names in (LEARNED, (needed,)):
        tensors = {n: t.requires_grad_(n in names) for n, t in example(device=device).items()}
        linear_masked_gaussian_nll(**tensors).sum().backward()
        assert {n for n, t in tensors.items() if t.grad is not None} == set(names)
        grads.append(tensors[needed].grad)
    torch.testing.assert_close(*grads, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("scale", [0.3, torch.tensor(0.3, dtype=torch.float64)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_scale_keeps_the_precision_of_h(device, scale, dtype):
    tensors = example(device=device) | {"x": torch.ones(4, 3, dtype=dtype, device=device)}
    rounded = linear_masked_gaussian_nll(**tensors | {"scale": torch.full((3,), 0.3).double()})
    exact = linear_masked_gaussian_nll(**tensors | {"scale": torch.full((3,), 0.3, dtype=torch.float64)})
    torch.testing.assert_close(linear_masked_gaussian_nll(**tensors | {"scale": scale}), exact, rtol=1e-13, atol=0)
    assert not torch.allclose(exact, rounded, rtol=1e-13, atol=0)


def run(tensors: dict, row_weights: str = "expanded", operator=linear_masked_gaussian_nll, **options) -> list[Tensor]:
    """nll, and the gradients to all that is learned."""
    inputs = learned(tensors)
    nll = operator(**tensors, **options)
    return [nll.detach(), *torch.autograd.grad(loss_of(nll, row_weights)[0], inputs)]


@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 300, 20), (70, 65, 64), (130, 3, 130)], ids=str)
def test_float32_is_no_worse_than_torch(device, rows, columns, width):
    tensors = example(rows, columns, width, dtype=torch.float32, device=device)
    wide = {name: t if t.dtype == torch.bool else t.double() for name, t in tensors.items()}
    twin = reference.linear_masked_gaussian_nll
    found = run(wide, "rows", twin), run(tensors, "rows"), run(tensors, "rows", twin)
    for truth, ours, same_dtype in zip(*found, strict=True):
        assert_no_worse(truth, ours, same_dtype, tolerance=4e-6)  # three tf32 products lose some bits


@pytest.mark.parametrize("form", HOLES)
@pytest.mark.parametrize("columns", [1, 8, 33])
def test_every_form_of_holes(device, form, columns):
    tensors = example(5, columns, 3, dtype=torch.float32, device=device)
    x, mask = holes(tensors["x"], tensors["mask"], form)
    torch.testing.assert_close(run(tensors | {"x": x, "mask": mask}), run(tensors))


@pytest.mark.parametrize("form", ["bytes", "bits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_with_a_scale(device, dtype, form):
    tensors = example(6, 11, 4, dtype=dtype, device=device)
    pixels = torch.randint(0, 256, (6, 11), dtype=torch.uint8, device=device)
    x, mask = holes(pixels, tensors["mask"], form)
    ours = run(tensors | {"x": x, "mask": mask}, x_scale=1 / 255)
    torch.testing.assert_close(ours, run(tensors | {"x": pixels.to(dtype) / 255}))


def test_strided_and_expanded_input(device):
    tensors = example(device=device)
    strided = {n: t if t.dim() == 1 else t.T.contiguous().T for n, t in tensors.items()}
    for name in ("bias", "scale"):
        strided[name] = tensors[name].repeat_interleave(2)[::2]
    torch.testing.assert_close(run(strided, "rows"), run(tensors, "rows"))
    row = {n: t[2:3].expand(4, -1) if n in ("h", "x", "mask") else t for n, t in tensors.items()}
    torch.testing.assert_close(linear_masked_gaussian_nll(**row), linear_masked_gaussian_nll(**tensors)[2].expand(4))


def test_backward_twice(device):
    tensors = example(device=device)
    inputs = learned(tensors)
    nll = linear_masked_gaussian_nll(**tensors)
    once = torch.autograd.grad(nll.sum(), inputs, retain_graph=True)
    twice = torch.autograd.grad(2 * nll.sum(), inputs)
    assert all(torch.equal(2 * a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize(("rows", "columns", "width"), [(2, 70, 5), (70, 3, 17)], ids=str)
def test_writes_all_that_it_returns_and_repeats_its_bits(device, monkeypatch, rows, columns, width):
    tensors = example(rows, columns, width, dtype=torch.float32, device=device)
    first = run(tensors, "rows")
    poison(monkeypatch)
    assert all(map(torch.equal, first, run(tensors, "rows")))


def test_memory_does_not_grow_with_rows_times_columns(device):
    if rvi_fast.get_backend() != "triton":
        pytest.skip("the equations write xhat")
    rows, columns = 130, 130
    tensors = example(rows, columns, 1, dtype=torch.float32, device=device)
    run(tensors)
    with torch.profiler.profile(profile_memory=True) as profile:
        run(tensors)
    largest = max(max(e.self_cpu_memory_usage, e.self_device_memory_usage) for e in profile.events())
    assert 0 < largest < 4 * rows * columns / 2


@pytest.mark.parametrize("which", ["h", "weight", "x", "mask"])
def test_offsets_pass_31_bits(device, which):
    if rvi_fast.get_backend() != "triton":
        pytest.skip("torch's own indexing")
    tensors = example(2, 2, 3, dtype=torch.float32, device=device)
    apart = tensors | {which: far_apart(tensors[which])}
    torch.testing.assert_close(run(apart), run(tensors))


def test_wide_layers_and_half_precision_are_left_to_torch(device):
    wide = example(2, 3, 257, device=device)
    half = {n: t if n == "mask" else t.half() for n, t in example(device=device).items()}
    for tensors, what in ((wide, "layers of more than 256 features"), (half, "torch.float16 layers")):
        if rvi_fast.get_backend() == "triton":
            with pytest.raises(NotImplementedError, match=f"no Triton kernel for {what}"):
                linear_masked_gaussian_nll(**tensors)
        else:
            assert linear_masked_gaussian_nll(**tensors).dtype == tensors["h"].dtype


def test_opcheck(device):
    operators = torch.ops.rvi_fast
    quick = ("test_schema", "test_faketensor")
    for form, rows in (("bytes", 4), ("bits", 4), ("nan", 0)):
        t = example(rows, device=device)
        x, mask = holes(t["x"], t["mask"], form)
        arguments = t["h"], t["weight"], t["bias"], x, mask, t["scale"], 0.5
        torch.library.opcheck(operators.linear_masked_gaussian_nll.default, arguments, test_utils=quick)
        backward = torch.ones_like(t["h"][:, 0]), *arguments, [True, form == "bytes", False, True]
        torch.library.opcheck(operators.linear_masked_gaussian_nll_backward.default, backward, test_utils=quick)
    t = example(device=device)
    learned(t)
    torch.library.opcheck(operators.linear_masked_gaussian_nll.default, (*t.values(), 0.5))


def test_autocast_takes_what_a_layer_before_gave(device):
    tensors = example(70, 65, 64, dtype=torch.float32, device=device)
    before = torch.eye(64, device=device)
    expected = linear_masked_gaussian_nll(**tensors)
    with torch.autocast(device.type, torch.bfloat16):
        given = tensors | {"h": tensors["h"] @ before}
        assert given["h"].dtype == torch.bfloat16
        nll = linear_masked_gaussian_nll(**given)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, expected, rtol=0.05, atol=0)


def test_compiles_into_one_graph(device):
    torch.compiler.reset()  # a graph keeps the backend that it was traced with
    tensors = example(device=device)
    compiled = torch.compile(linear_masked_gaussian_nll, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, run(tensors), run(tensors, operator=compiled)))


@pytest.mark.triton
def test_precision_follows_both_of_torchs_settings():
    from rvi_fast.kernels.precision import dot_precision

    def precision() -> str:
        return dot_precision(torch.float32)

    if torch.version.hip:
        pytest.skip("AMD's has no TF32")
    try:
        torch.set_float32_matmul_precision("high")
        assert precision() == "tf32"
        torch.set_float32_matmul_precision("highest")
        assert precision() == "tf32x3"
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # after this torch.get_float32_matmul_precision() raises
        assert precision() == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")


@pytest.mark.gpu
@pytest.mark.triton
def test_graph_replays_as_eager():
    tensors = example(300, 784, 64, dtype=torch.float32, device="cuda")
    eager = run(tensors)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(tensors)
    graph.replay()
    assert all(map(torch.equal, eager, captured))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.ones(3, 4).double()}, ValueError, r"weight must have shape \[D = 3, H = 5\]; got \[3, 4\]"),
        ({"weight": torch.ones(3, 5)}, TypeError, "weight must be torch.float64"),
        ({"bias": torch.ones(4).double()}, ValueError, r"bias must have shape \[D = 3\]"),
        ({"bias": torch.ones(3)}, TypeError, "bias must be torch.float64"),
        ({"h": torch.ones(4, 5, dtype=torch.int64)}, TypeError, "h must be a floating-point tensor"),
        ({"x": torch.ones(3, 3)}, ValueError, r"x must have shape \[B = 4, D = 3\]"),
        ({"mask": torch.ones(4, 3)}, TypeError, "mask must be a bool tensor"),
        ({"scale": torch.ones(4)}, ValueError, r"scale must be one number or one per column \(3\)"),
        ({"scale": -1.0}, ValueError, "scale must be above 0"),
        ({"mask": torch.ones(3, 1, dtype=torch.uint8)}, ValueError, "mask as uint8 holds bits"),
        ({"mask": None, "x": torch.ones(4, 3).int()}, TypeError, "mask=None takes NaN in x as missing.*pass a mask"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        linear_masked_gaussian_nll(**example() | change)
