"""relay_sample: z and KL against torch.distributions, the twin in float64, and a table read row by row."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from conftest import TRITON_RUNS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import rvi_fast
from rvi_fast import ops, reference
from rvi_fast.clock import AdamClock, LazyClock
from rvi_fast.functional import AdamHyper, Columns, philox_normal, relay_mean, relay_sample

GROUPS, ACTIVE = (3, 1), (2, 1)
NAMES = ("coef", "residual", "log_std", "relays", "noise")
per_backend = functools.partial(settings, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def example(
    rows: int = 3,
    dim: int = 5,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    relays: int = 4,
) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    shapes = {"coef": (rows, relays), "relays": (relays, dim)}
    return {n: torch.randn(shapes.get(n, (rows, dim)), dtype=dtype, generator=noise).to(device) for n in NAMES}


def sample(tensors: dict[str, Any], **changed: Any) -> tuple[Tensor, Tensor]:
    return relay_sample(**{"groups": GROUPS, "active": ACTIVE, **tensors, **changed})


@pytest.fixture(autouse=True)
def many_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Let a program take many rows, as in a large batch; or one, where a test says so."""
    many = getattr(request, "param", True)
    if TRITON_RUNS:
        monkeypatch.setattr("rvi_fast.kernels.relay_sample.PROGRAMS", 1 if many else 132)
    return many


both_cuts = pytest.mark.parametrize("many_rows", [False, True], indirect=True, ids=["few rows", "many rows"])


@per_backend(max_examples=10)
@given(
    rows=st.integers(0, 4),
    dim=st.integers(1, 7),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equals_the_distribution(device, rows, dim, seed, dtype):
    check_distribution(example(rows, dim, seed, device=device), dtype, "linear")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [0, 3])
def test_softmax_equals_the_distribution(rows, dtype):
    check_distribution(example(rows), dtype, "softmax")


def check_distribution(tensors: dict[str, Tensor], dtype: torch.dtype, coefficients: str) -> None:
    z, kl = sample({n: t.to(dtype) for n, t in tensors.items()}, coefficients=coefficients)
    mean = relay_mean(tensors["coef"], tensors["relays"], GROUPS, ACTIVE, coefficients) + tensors["residual"]
    posterior = torch.distributions.Normal(mean, tensors["log_std"].exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean), 1.0)
    assert z.dtype == kl.dtype == dtype and z.shape == mean.shape and kl.shape == mean.shape[:1]
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(z.double(), mean + posterior.stddev * tensors["noise"], **tolerance)
    torch.testing.assert_close(kl.double(), torch.distributions.kl_divergence(posterior, prior).sum(1), **tolerance)


def test_what_no_kernel_does(device):
    tensors = {n: t.half() for n, t in example().items()}
    if rvi_fast.dispatch.get_backend() == "triton":
        with pytest.raises(NotImplementedError, match=r"no Triton kernel for torch\.float16"):
            sample({n: t.to(device) for n, t in tensors.items()})
        with pytest.raises(NotImplementedError, match="no Triton kernel for coefficients='softmax'"):
            sample(example(device=device), coefficients="softmax")
    else:
        assert sample(tensors)[0].dtype == torch.float16


def test_no_noise_gives_the_mean(device):
    tensors = example(device=device)
    z, kl = sample(tensors, noise=None)
    mean = relay_mean(tensors["coef"], tensors["relays"], GROUPS, ACTIVE) + tensors["residual"]
    torch.testing.assert_close(z, mean, rtol=1e-14, atol=1e-14)
    assert torch.equal(kl, sample(tensors)[1])


def test_the_prior_has_no_divergence(device):
    tensors = {name: torch.zeros_like(t) for name, t in example(device=device).items()}
    assert not sample(tensors)[1].any()


def gradcheck(tensors: dict[str, Tensor], coefficients: str = "linear") -> None:
    inputs = [t.requires_grad_() for t in tensors.values()]

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return sample(dict(zip(NAMES, values, strict=True)), coefficients=coefficients)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("rows", [0, 2])
def test_gradcheck(device, rows):
    gradcheck(example(rows, 2, device=device))


def test_gradcheck_of_softmax():
    gradcheck(example(), "softmax")


@pytest.mark.parametrize("needed", NAMES)
def test_gradient_of_one_input(device, needed):
    grads = []
    for names in (NAMES, (needed,)):
        tensors = {n: t.requires_grad_(n in names) for n, t in example(device=device).items()}
        z, kl = sample(tensors)
        (2 * z.sum() + (kl * torch.arange(3, device=device)).sum()).backward()
        assert [n for n, t in tensors.items() if t.grad is not None] == list(names)
        grads.append(tensors[needed].grad)
    assert torch.equal(*grads)


def test_gradient_reaches_selected_coefficients_only(device):
    tensors = {n: t.requires_grad_(n == "coef") for n, t in example(device=device).items()}
    z, kl = sample(tensors)
    (z.sum() + kl.sum()).backward()
    smallest = tensors["coef"][:, :3].abs().argmin(1)
    expected = torch.ones(3, 4, dtype=torch.bool, device=device).scatter_(1, smallest[:, None], False)
    assert torch.equal(tensors["coef"].grad != 0, expected)


# --- against the twin in float64 ---

SHAPES = {
    "one": (1, (1,), (1,), 1),
    "uneven groups": (3, (70, 1, 8, 9), (30, 1, 8, 2), 65),
    "40 groups": (2, (1, 2, 3, 4) * 10, (1, 1, 2, 3) * 10, 3),
    "clusters": (3, (40, 30), (1, 1), 3),
    "wide": (2, (1000,), (500,), 3),
    "whole groups": (5, (7, 9), (7, 9), 4),
}


def gradients(tensors: dict[str, Tensor], by_z: Tensor | None, by_kl: Tensor | None) -> list[Tensor]:
    """z and kl, and the gradients of all inputs from those of z and kl."""
    leaves = {n: t.requires_grad_() if isinstance(t, Tensor) else t for n, t in tensors.items()}
    outputs = sample(leaves)
    found = [(out, by) for out, by in zip(outputs, (by_z, by_kl), strict=True) if by is not None]
    inputs = [t for t in leaves.values() if isinstance(t, Tensor)]
    differentiated, by = zip(*found, strict=True)
    grads = torch.autograd.grad(differentiated, inputs, by, allow_unused=True, materialize_grads=True)
    return [t.detach() for t in (*outputs, *grads)]


def assert_no_worse(tensors: dict[str, Any], by_z: Tensor, by_kl: Tensor) -> None:
    """No further from the twin in float64 than torch in the same dtype, in the mean square."""
    ours = gradients(tensors, by_z, by_kl)
    with rvi_fast.backend("torch"):
        torchs = gradients(tensors, by_z, by_kl)
        wide = {n: t.detach().double() if isinstance(t, Tensor) else t for n, t in tensors.items()}
        truths = gradients(wide, by_z.double(), by_kl.double())
    for mine, other, truth in zip(ours, torchs, truths, strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        tolerance = 8 * torch.finfo(mine.dtype).eps * float(truth.norm())
        assert float((mine - truth).norm()) <= float((other - truth).norm()) + tolerance


@both_cuts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_torch(device, shape, dtype, many_rows):
    rows, groups, active, dim = SHAPES[shape]
    rows += 15 if many_rows else 0
    if many_rows + (dtype == torch.float64) + (shape == "wide") > 1:
        pytest.skip("the other cases have all its kernels do")
    tensors = example(rows, dim, dtype=dtype, device=device, relays=sum(groups))
    by = example(rows, dim, 1, dtype, device)
    assert_no_worse({**tensors, "groups": groups, "active": active}, by["noise"], by["residual"][:, 0])


def test_ties_go_to_the_lower_index(device):
    tensors = example(4, device=device, relays=12)
    tensors["coef"] = (tensors["coef"] * 1.5).round().requires_grad_()
    z, kl = sample(tensors, groups=(7, 5), active=(3, 2))
    kept = [reference.select(a, n) for a, n in zip(tensors["coef"].split((7, 5), dim=1), (3, 2), strict=True)]
    mean = torch.where(torch.cat(kept, 1), tensors["coef"], 0.0) @ tensors["relays"] + tensors["residual"]
    torch.testing.assert_close(z, reference.gaussian_sample(mean, tensors["log_std"], tensors["noise"]))
    (grad,) = torch.autograd.grad(z.sum() + kl.sum(), tensors["coef"])
    assert torch.equal(grad != 0, torch.cat(kept, 1))  # selected zeros have a gradient too


def test_incoming_gradients(device):
    tensors, by = example(device=device), example(seed=1, device=device)
    by_z, by_kl = by["noise"], by["residual"][:, 0]
    both = gradients(tensors, by_z, by_kl)
    of_z, of_kl = gradients(tensors, by_z, None), gradients(tensors, None, by_kl)
    for whole, *parts in zip(both[2:], of_z[2:], of_kl[2:], strict=True):
        torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-12)
    for doubled, single in zip(gradients(tensors, 2 * by_z, 2 * by_kl)[2:], both[2:], strict=True):
        torch.testing.assert_close(doubled, 2 * single, rtol=1e-12, atol=1e-12)
    one = torch.ones((), dtype=torch.float64, device=device)
    for expanded in (one.expand(3, 5), torch.rand(5, 3, dtype=torch.float64, device=device).T):
        weight = torch.arange(3, dtype=torch.float64, device=device)
        for strided, dense in zip(
            gradients(tensors, expanded, one.expand(3)),
            gradients(tensors, expanded.contiguous(), torch.ones_like(weight)),
            strict=True,
        ):
            assert torch.equal(strided, dense)


def test_inputs_may_be_strided(device):
    tensors, by = example(4, device=device), example(4, seed=1, device=device)
    arguments = by["noise"], by["residual"][:, 0]
    dense = gradients(tensors, *arguments)
    rows = torch.cat([tensors[n].detach() for n in ("coef", "residual", "log_std")], dim=1)
    columns = dict(zip(("coef", "residual", "log_std"), rows.split([4, 5, 5], dim=1), strict=True))
    turned = {n: t.detach().T.contiguous().T for n, t in tensors.items()}
    for strided in ({**tensors, **columns}, turned):
        strided = {n: t.detach() for n, t in strided.items()}
        for got, expected in zip(gradients(strided, *arguments), dense, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def test_nothing_is_read_before_it_is_written(device, monkeypatch):
    tensors, by = example(device=device), example(seed=1, device=device)
    arguments = by["noise"], by["residual"][:, 0]
    expected = gradients(tensors, *arguments)
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *size: Any, **kwargs: Any) -> Tensor:
        made = new_empty(self, *size, **kwargs)
        return made.fill_(torch.nan if made.is_floating_point() else 85)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    for got, want in zip(gradients(tensors, *arguments), expected, strict=True):
        assert torch.equal(got, want)


@both_cuts
def test_repeats_to_the_bit(device):
    tensors, by = (example(5, 9, seed, torch.float32, device) for seed in (0, 1))
    first = gradients(tensors, by["noise"], by["residual"][:, 0])
    assert all(map(torch.equal, first, gradients(tensors, by["noise"], by["residual"][:, 0])))


def test_operator_equals_the_function(device):
    tensors, by = example(device=device), example(seed=1, device=device)
    arguments = by["noise"], by["residual"][:, 0]
    inputs = [t.requires_grad_() for t in tensors.values()]
    z, kl, mean, bits = torch.ops.rvi_fast.relay_sample(*inputs, GROUPS, ACTIVE)
    assert torch.equal(bits, reference.selected_bits(tensors["coef"], GROUPS, ACTIVE))
    torch.testing.assert_close(mean, z - tensors["log_std"].exp() * tensors["noise"])
    found = [z, kl, *torch.autograd.grad((z, kl), inputs, arguments)]
    for got, expected in zip(found, gradients(tensors, *arguments), strict=True):
        torch.testing.assert_close(got, expected)


def test_as_an_operator(device):
    tensors = {n: t.requires_grad_() for n, t in example(2, 2, device=device).items()}
    arguments = (*tensors.values(), list(GROUPS), list(ACTIVE))
    torch.library.opcheck(torch.ops.rvi_fast.relay_sample.default, arguments)
    without = (*arguments[:4], None, *arguments[5:])
    shapes = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.rvi_fast.relay_sample.default, without, test_utils=shapes)


def test_compiles_in_one_graph(device):
    tensors = {n: t.requires_grad_() for n, t in example(device=device).items()}

    def loss(*values: Tensor) -> Tensor:
        z, kl = sample(dict(zip(NAMES, values, strict=True)))
        return (z * z).sum() + kl.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for function in (loss, compiled):
        function(*tensors.values()).backward()
    eager = torch.autograd.grad(loss(*tensors.values()), list(tensors.values()))
    for t, grad in zip(tensors.values(), eager, strict=True):
        torch.testing.assert_close(t.grad, 2 * grad)


@pytest.mark.triton
def test_a_second_derivative_raises():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with rvi_fast.backend("triton"):
        tensors = {n: t.requires_grad_() for n, t in example(device=device).items()}
        for loss in (lambda z, kl: (z * z).sum(), lambda z, kl: kl.sum()):
            (grad,) = torch.autograd.grad(loss(*sample(tensors)), tensors["coef"], create_graph=True)
            with pytest.raises(RuntimeError, match="gradients of a kernel cannot be differentiated again"):
                grad.square().sum().backward()


@pytest.mark.triton
def test_offsets_pass_31_bits():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small, stride = example(2, dtype=torch.float32, device=device), 2**31 + 16
    storage = torch.empty(stride + 16, device=device)  # memory that is not touched costs nothing on a CPU
    apart = {}
    for start, name in ((0, "coef"), (5, "log_std")):
        apart[name] = storage.as_strided(small[name].shape, (stride, 1), start).copy_(small[name])
    with rvi_fast.backend("triton"):
        for got, expected in zip(sample({**small, **apart}), sample(small), strict=True):
            assert torch.equal(got, expected)


# --- rows of a table ---


class Model:
    """A table whose rows were last touched at many steps, some never, and relays."""

    def __init__(self, device: torch.device, dtype: torch.dtype, groups: tuple[int, ...], dim: int, num_rows: int = 30):
        draw = torch.Generator().manual_seed(0)
        self.groups, self.active = groups, tuple(-(-k // 2) for k in groups)
        self.relays = torch.randn(sum(groups), dim, generator=draw, dtype=dtype).to(device)
        self.values = torch.randn(num_rows, 3, sum(groups) + 2 * dim, generator=draw, dtype=dtype).to(device) * 0.1
        self.values[:, 1] *= 0.01
        self.values[:, 2] *= self.values[:, 2] * 1e-4
        self.last = torch.randint(0, 300, (num_rows,), generator=draw, dtype=torch.int32).to(device)
        self.last[::3], self.values[::3, 1:] = 0, 0.0  # never touched
        self.clock = AdamClock(AdamHyper(0.9, 0.999, 1e-8), device=device)
        with rvi_fast.backend("torch"):
            for step in range(320):
                self.clock.advance(1e-3 * (1 + step % 7), 0.01)
        self.rows = torch.randperm(num_rows, generator=draw).to(device)

    def arguments(self, rows: int, sample: bool = True, clock: Any = "its own") -> dict[str, Any]:
        return dict(
            values=self.values,
            last=self.last,
            rows=self.rows[:rows],
            clock=self.clock if clock == "its own" else clock,
            relays=self.relays,
            groups=self.groups,
            active=self.active,
            seed=2**63 + 5,
            step=torch.tensor(9, device=self.values.device),
            sample=sample,
        )

    def twin(self, arguments: dict[str, Any], by_z: Tensor, by_kl: Tensor) -> list[Tensor]:
        """z, kl, the gradients of rows and relays, by plain autograd in float64."""
        K, T = self.relays.shape
        with rvi_fast.backend("torch"):
            state = self.values[arguments["rows"], 0].double()
            if isinstance(arguments["clock"], AdamClock):
                columns = [Columns(0, K + 2 * T, self.clock)]
                state = ops.read_rows(self.values.double(), self.last, arguments["rows"], columns)[0]
            noise = None
            if arguments["sample"]:
                noise = philox_normal(arguments["seed"], "train", 9, arguments["rows"], T, dtype=torch.float64)
            leaves = state.requires_grad_(), self.relays.double().requires_grad_()
            coef, residual, log_std = leaves[0].split([K, T, T], dim=1)
            z, kl = relay_sample(coef, residual, log_std, leaves[1], self.groups, self.active, noise)
            grads = torch.autograd.grad((z, kl), leaves, (by_z.double(), by_kl.double()))
            return [z.detach(), kl.detach(), *grads]


def both_ways(model: Model, arguments: dict[str, Any], by_z: Tensor | None, by_kl: Tensor | None) -> list[Tensor]:
    z, kl, sampled = ops.relay_sample_rows(**arguments)
    keys = {n: arguments[n] for n in ("relays", "groups", "active", "seed", "sample")}
    return [z, kl, *ops.relay_sample_rows_backward(by_z, by_kl, sampled, **keys)]


@both_cuts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("clock", ["its own", None, LazyClock(AdamHyper(0.9, 0.999, 1e-8))])
def test_rows_equal_reading_and_sampling(device, clock, sampled, dtype, many_rows):
    if many_rows != (sampled and clock == "its own"):
        pytest.skip("the other cases have all its kernels do")
    model = Model(device, dtype, (7, 12), 9)
    arguments = model.arguments(rows=23 if many_rows else 4, sample=sampled, clock=clock)
    by = example(len(arguments["rows"]), 9, 1, dtype, device)
    grads = by["noise"], by["residual"][:, 0]
    tolerance = 3e-6 if dtype == torch.float32 else 1e-12
    for got, truth in zip(both_ways(model, arguments, *grads), model.twin(arguments, *grads), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), truth, rtol=tolerance, atol=tolerance * float(truth.abs().max()))


def test_rows_draw_the_keyed_noise(device):
    model = Model(device, torch.float32, (7,), 9)
    model.values.zero_()
    arguments = model.arguments(rows=5)
    z, _, _ = ops.relay_sample_rows(**arguments)
    assert torch.equal(z, philox_normal(arguments["seed"], "train", 9, arguments["rows"], 9))
    assert torch.equal(z, ops.relay_sample_rows(**{**arguments, "step": 9})[0])


def test_rows_backward_remembers_the_forward(device):
    model = Model(device, torch.float32, (7,), 9)
    arguments = model.arguments(rows=5)
    by_z, keys = torch.ones(5, 9, device=device), ("relays", "groups", "active", "seed", "sample")
    expected = both_ways(model, arguments, by_z, None)[2:]
    _, _, sampled = ops.relay_sample_rows(**arguments)
    arguments["step"] += 1
    model.values.fill_(torch.nan)
    model.clock.counters.zero_()
    got = ops.relay_sample_rows_backward(by_z, None, sampled, **{n: arguments[n] for n in keys})
    assert all(map(torch.equal, got, expected))


def test_rows_may_be_strided(device):
    model = Model(device, torch.float64, (7,), 9)
    by_z, by_kl = torch.ones(4, 9, dtype=torch.float64, device=device), torch.ones(4, device=device).double()
    arguments = model.arguments(rows=8)
    strided, together = arguments["rows"][::2], arguments["rows"][::2].contiguous()
    got, expected, short = (
        both_ways(model, {**arguments, "rows": rows}, by_z, by_kl) for rows in (strided, together, together.int())
    )
    assert all(map(torch.equal, got, expected)) and all(map(torch.equal, short, expected))


def test_rows_gradients_of_some(device):
    model = Model(device, torch.float64, (7,), 9)
    arguments = model.arguments(rows=5)
    keys = {n: arguments[n] for n in ("relays", "groups", "active", "seed", "sample")}
    by_kl = torch.ones((), dtype=torch.float64, device=device).expand(5)
    _, _, sampled = ops.relay_sample_rows(**arguments)
    both = ops.relay_sample_rows_backward(None, by_kl, sampled, **keys)
    of_rows, nothing = ops.relay_sample_rows_backward(None, by_kl, sampled, **keys, needed=(True, False))
    assert torch.equal(of_rows, both[0]) and nothing is None
    nothing, of_relays = ops.relay_sample_rows_backward(None, by_kl, sampled, **keys, needed=(False, True))
    assert torch.equal(of_relays, both[1]) and nothing is None
    assert ops.relay_sample_rows_backward(None, None, sampled, **keys) == (None, None)


def test_no_rows(device):
    model = Model(device, torch.float32, (7,), 9)
    arguments = model.arguments(rows=0)
    z, kl, by_rows, by_relays = both_ways(
        model, arguments, torch.ones(0, 9, device=device), torch.ones(0, device=device)
    )
    assert z.shape == (0, 9) and kl.shape == (0,) and by_rows.shape == (0, 25) and not by_relays.any()


def test_rows_as_an_operator(device):
    model = Model(device, torch.float32, (7,), 3)
    given = model.arguments(rows=2)
    clock = model.clock
    state = (clock.history, clock.counters, clock.constants)
    for tensors, sampled in ((state, True), ((None, None, None), False)):
        arguments = (given["values"], given["last"], given["rows"], *tensors, True, given["relays"])
        arguments += (list(model.groups), list(model.active), 5, given["step"], sampled)
        torch.library.opcheck(torch.ops.rvi_fast.relay_sample_rows.default, arguments)
        z, kl, values, bits, step = torch.ops.rvi_fast.relay_sample_rows(*arguments)
        arguments = (z, kl, given["rows"], values, bits, step, given["relays"], list(model.groups), list(model.active))
        backward = torch.ops.rvi_fast.relay_sample_rows_backward.default
        torch.library.opcheck(backward, (*arguments, 5, sampled, [True, True]))


@pytest.mark.triton
def test_rows_offsets_pass_31_bits():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, stride = Model(device, torch.float32, (3,), 2, num_rows=2), 2**31 + 16
    with rvi_fast.backend("triton"):
        expected = ops.relay_sample_rows(**model.arguments(rows=2))
        storage = torch.empty(stride + 32, device=device)
        model.values = storage.as_strided(model.values.shape, (stride, 7, 1)).copy_(model.values)
        got = ops.relay_sample_rows(**model.arguments(rows=2))
    assert torch.equal(got[0], expected[0]) and torch.equal(got[2].state, expected[2].state)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": torch.zeros(30, 3, 24)}, ValueError, r"values must have shape \[N, 3, K \+ 2 T = 25\]; got"),
        ({"relays": torch.zeros(7, 9).double()}, TypeError, "relays must be torch.float32"),
        ({"last": torch.zeros(29)}, ValueError, r"last must have shape \[N = 30\]"),
        ({"rows": torch.tensor([30])}, IndexError, "rows must lie in 0 .. 29; got 30"),
        ({"values": torch.zeros(30, 25, 3).mT}, ValueError, "columns of a row side by side"),
        ({"seed": 0.5}, TypeError, "seed must be an int"),
        ({"step": torch.tensor(1.5)}, TypeError, r"step must be an int or an int64 tensor \[\]; got torch.float32"),
        ({"rows": torch.zeros(2, device="meta").long()}, ValueError, "rows is on meta but values is on cpu"),
        ({"last": torch.zeros(30, device="meta")}, ValueError, "last is on meta but values is on cpu"),
    ],
)
def test_bad_table(change, error, message):
    arguments = Model(torch.device("cpu"), torch.float32, (7,), 9).arguments(rows=3)
    with pytest.raises(error, match=message):
        ops.relay_sample_rows(**{**arguments, **change})


@pytest.mark.parametrize("name", ["residual", "log_std", "noise"])
@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        (torch.ones(3, 4, dtype=torch.float64), ValueError, r"must have shape \[B = 3, T = 5\]; got \[3, 4\]"),
        (torch.ones(2, 5, dtype=torch.float64), ValueError, r"must have shape \[B = 3, T = 5\]; got \[2, 5\]"),
        (torch.ones(3, 5), TypeError, "must be torch.float64"),
        (torch.ones(3, 5, dtype=torch.int64), TypeError, "must be a floating-point tensor"),
    ],
)
def test_bad_input(name, tensor, error, message):
    with pytest.raises(error, match=f"{name} {message}"):
        sample(example(), **{name: tensor})
