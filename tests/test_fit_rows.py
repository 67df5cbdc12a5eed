"""Frozen inference in one launch against the equations in float64, and as infer uses it."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from conftest import INTERPRETED
from torch import Tensor, library
from torch.utils._python_dispatch import TorchDispatchMode

import rvi_fast
from rvi_fast import RVI, VAD, data, infer, masks
from rvi_fast.elbo_step import form_of, shared_parameters
from rvi_fast.ops import fit_rows as ops
from rvi_fast.ops.elbo import ElboModel
from rvi_fast.ops.fit_rows import FittedRows, fit_rows
from rvi_fast.reference import AdamHyper

HYPER = AdamHyper(0.9, 0.999, 1e-8)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def exact(device: torch.device) -> torch.dtype:
    """The dtype in which rows are compared most closely: compiled kernels have float32 alone."""
    return torch.float32 if device.type == "cuda" else torch.float64


def form(
    groups=(3, 9), active=(2, 5), hidden=(7, 6), linear_path=False, activation="relu", likelihood="gaussian",
    scale=0.4, learned=False, kl_weight=0.7,
) -> ElboModel:  # fmt: skip
    return ElboModel(groups, active, hidden, linear_path, activation, likelihood, scale, learned, kl_weight)


def problem(model: ElboModel, rows=5, latent_dim=5, columns=21, missing=0.3, seed=0, ties=False) -> dict[str, Tensor]:
    """Arguments of fit_rows in float64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    new = {"generator": generator, "dtype": torch.float64}
    sizes = [torch.Size(shape) for shape in model.shared_shapes(latent_dim, columns)]
    weights = torch.cat([torch.randn(s.numel(), **new) / (s[-1] ** 0.5 if len(s) > 1 else 5) for s in sizes])
    start = 0.3 * torch.randn(rows, sum(model.groups) + 2 * latent_dim, **new)
    if ties:
        start[:, : sum(model.groups)] = (4 * start[:, : sum(model.groups)]).round() / 4
    x = torch.rand(rows, columns, **new)
    return {
        "start": start,
        "row_ids": torch.randint(-(2**62), 2**62, (rows,), generator=generator),
        "x": (x > 0.5).double() if model.likelihood == "bernoulli" else x,
        "mask": torch.rand(rows, columns, **new) >= missing,
        "weights": weights,
    }


def fitted(given: dict[str, Tensor], model: ElboModel, device="cpu", dtype=torch.float64, steps=6, **how) -> FittedRows:
    there = {
        name: t if t is None else t.to(device, dtype if t.dtype == torch.float64 else t.dtype)
        for name, t in given.items()
    }
    rates = 0.03 * torch.linspace(1, 0.4, steps, dtype=torch.float64, device=device)
    found = fit_rows(**there, model=model, rates=rates, hyper=HYPER, seed=11, **how)
    return FittedRows(*(t.double().cpu() for t in found))


def check(device, model, *, mask_as="bool", dtype=None, steps=6, draws=3, **sizes) -> None:
    """As close to the equations in float64 as the equations in the same dtype are."""
    dtype = dtype or exact(device)
    given = problem(model, **sizes)
    with rvi_fast.backend("torch"):
        truth, peer = (fitted(given, model, dtype=kind, steps=steps, draws=draws) for kind in (torch.float64, dtype))
    found = fitted(as_given(given, mask_as), model, device, dtype, steps, draws=draws)
    for name, value, true, twin in zip(FittedRows._fields, found, truth, peer, strict=True):
        error, allowed = ((t - true).abs().max() if t.numel() else 0 for t in (value, twin))
        assert error <= 3 * allowed + TOLERANCE[dtype] * (1 + true.abs().max() if true.numel() else 1), name


def as_given(given: dict[str, Tensor], mask_as: str) -> dict[str, Tensor]:
    """Holes as a bool mask, as bits or as NaN; NaN behind the holes in any case."""
    mask = given["mask"]
    bits = torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))
    x = given["x"].masked_fill(~mask, torch.nan)
    return given | {"x": x, "mask": {"bool": mask, "bits": bits, "nan": None}[mask_as]}


FORMS = {
    "two layers, two programs": (form(), {"rows": 19, "steps": 3}),
    "twenty steps in float32": (form(), {"dtype": torch.float32, "steps": 20}),
    "learned scale and linear path, columns beyond a tile, bits": (
        form(learned=True, linear_path=True, hidden=(17,), activation="silu"),
        {"columns": 131, "mask_as": "bits"},
    ),
    "bernoulli without hidden layers, one relay, NaN": (
        form(likelihood="bernoulli", hidden=(), groups=(1,), active=(1,)),
        {"mask_as": "nan"},
    ),
    "three layers, one column, one latent, all relays": (
        form(hidden=(3, 18, 4), activation="tanh", active=(3, 9)),
        {"columns": 1, "latent_dim": 1, "missing": 0.0},
    ),
    "coefficients in two pieces, five groups, wide latents": (
        form(groups=(4, 5, 6, 40, 21), active=(1, 5, 2, 20, 11), hidden=(20,), activation="gelu", linear_path=True),
        {"latent_dim": 33, "rows": 5},
    ),
    "bernoulli and a linear path": (form(likelihood="bernoulli", linear_path=True), {"rows": 3}),
    "equal coefficients": (form(groups=(9, 30), active=(4, 15)), {"ties": True}),
    "rows without relays": (form(groups=(), active=()), {"mask_as": "nan"}),
    "one row": (form(hidden=()), {"rows": 1}),
    "nothing observed": (form(hidden=()), {"missing": 1.1, "rows": 3}),
    "no step": (form(hidden=()), {"steps": 0, "rows": 3}),
    "no row": (form(hidden=()), {"rows": 0}),
}


@pytest.mark.parametrize("name", FORMS)
def test_equals_the_equations(device, name):
    model, how = FORMS[name]
    check(device, model, **how)


loops = pytest.mark.skipif(not importlib.util.find_spec("numba"), reason="the loops are compiled by numba")


@loops
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FORMS)
def test_compiled_loops_equal_the_equations(name, dtype):
    model, how = FORMS[name]
    with rvi_fast.backend("auto"):
        check(torch.device("cpu"), model, **how | {"dtype": dtype})


@loops
@pytest.mark.parametrize("name", FORMS)
def test_gradients_by_loops_and_by_autograd(name):
    model, how = FORMS[name]
    given = problem(model, **{key: how[key] for key in how.keys() - {"steps", "dtype", "mask_as"}})
    p, others = given.pop("start"), {"weights": given.pop("weights"), "model": model, "seed": 5, "draws": range(9, 13)}
    found = []
    for backend in ("auto", "torch"):
        with rvi_fast.backend(backend):
            found.append(ops.row_gradients(p, **given, **others))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_narrow_products_stay_near(device):
    """bfloat16 weights move float32 rows by no more than their rounding."""
    model = form(hidden=(8,), kl_weight=1.0)
    given = problem(model, rows=4)
    with rvi_fast.backend("torch"):
        truth = fitted(given, model, steps=3)
    precisions = {"float32": 1e-5, "tf32": 0.02} | ({} if INTERPRETED else {"bfloat16": 0.05})  # it has none
    for precision, allowed in precisions.items():
        found = fitted(given, model, device, torch.float32, steps=3, precision=precision)
        assert (found.parameters - truth.parameters).abs().mean() < allowed
        assert (found.elbo - truth.elbo).abs().max() < allowed * (1 + truth.elbo.abs().max())


class NarrowProducts(TorchDispatchMode):
    """Factors rounded to bfloat16 and their products summed in float32, as the kernel has it with this precision."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default:
            args = tuple(factor.bfloat16().float() for factor in args)
        return function(*args, **kwargs or {})


def test_narrow_products_end_with_the_same_elbo(device):
    """250 steps of new rows: by the kernel on a GPU, elsewhere by the equations with its rounding."""
    if INTERPRETED:
        pytest.skip("too many steps for the interpreter, which has no bfloat16 products")
    X = data.digits()[0]
    observed = masks.mcar(X.shape, 0.5, seed=0)
    model = RVI(epochs=20, device=device, progress=False).fit(X[:1000], mask=observed[:1000])
    x, mask = (torch.from_numpy(cells[1000:1128]).to(device) for cells in (X, observed))
    weights = torch.cat([parameter.detach().reshape(-1) for parameter in shared_parameters(model.model_)])
    plan = infer.InferencePlan(250, 0.1, "cosine", 0)
    rates = torch.tensor([plan.lr_at(step) for step in range(plan.steps)], dtype=torch.float64, device=device)
    row_ids = torch.arange(len(x), device=device)
    start = model.model_.posterior.initial_values(row_ids).to(device)

    def fitted_elbo(precision: str) -> Tensor:
        model_form = form_of(model.model_)
        given = start, row_ids, x, mask, weights, model_form, rates, plan.hyper
        return fit_rows(*given, seed=0, draws=8, precision=precision).elbo.mean()

    wide = fitted_elbo("float32")
    with NarrowProducts():
        narrow = fitted_elbo("bfloat16")
    assert narrow != wide
    assert (narrow - wide).abs() < 1e-3 * wide.abs()


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory holds NaN."""
    fresh, like = torch.Tensor.new_empty, torch.empty_like

    def fill(made: Tensor) -> Tensor:
        return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(77)

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size, **how: fill(fresh(self, *size, **how)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **how: fill(like(*args, **how)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_on_every_run_whatever_the_other_rows(device, poisoned, dtype):
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("compiled kernels have float32 alone")
    if rvi_fast.get_backend() == "torch":
        pytest.skip("matmuls of a CPU change bits with the batch; infer pads its blocks")
    model = form(hidden=(6,), groups=(5, 2), active=(2, 1))
    given = problem(model, rows=18)
    together = fitted(given, model, device, dtype, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(together, fitted(given, model, device, dtype, steps=3), strict=True))
    some, per_row = [17, 2, 9], [name for name in given if name != "weights"]
    others = problem(model, rows=18, seed=1)
    for name in per_row:
        others[name][some] = given[name][some]
    elsewhere = fitted(others | {"weights": given["weights"]}, model, device, dtype, steps=3)
    assert all(torch.equal(a[some], b[some]) for a, b in zip(together, elsewhere, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(together, elsewhere, strict=True))
    if device.type == "cuda":  # NumPy's products, which the interpreter takes, may round by a row's place
        alone = fitted(given | {name: given[name][some] for name in per_row}, model, device, dtype, steps=3)
        assert all(torch.equal(a[some], b) for a, b in zip(together, alone, strict=True))
    assert not any(t.isnan().any() for t in together)


def test_bytes_of_rows_that_lie_apart(device):
    """x of bytes with a scale, every second row of a wider array, is the same x in floats."""
    model = form(hidden=())
    given = problem(model, rows=5)
    pixels = (255 * given["x"]).to(torch.uint8)
    wide = torch.zeros(10, 30, dtype=torch.uint8)
    wide[::2, :21] = pixels
    truth = fitted(given | {"x": pixels.double() / 255}, model, device, exact(device), steps=2)
    apart = wide.to(device)[::2, :21]
    found = fitted(given | {"x": apart}, model, device, exact(device), steps=2, x_scale=1 / 255)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 if device.type == "cuda" else 1e-9)


@pytest.mark.parametrize("steps", [1, 7])
def test_selection_follows_coefficients_that_change_places(device, steps):
    """A large rate carries coefficients past each other, and past 0, at every step."""
    model = form(groups=(16, 33), active=(8, 1), hidden=())
    given = problem(model, rows=3)
    truths = []
    for kind in ("torch", rvi_fast.get_backend()):
        with rvi_fast.backend(kind):
            there = {n: t.to(device if kind != "torch" else "cpu") for n, t in given.items()}
            dtype = exact(device)
            there = {n: t.to(dtype) if t.is_floating_point() else t for n, t in there.items()}
            rates = torch.full((steps,), 0.5, dtype=torch.float64, device=there["start"].device)
            truths.append(fit_rows(**there, model=model, rates=rates, hyper=HYPER, seed=1).parameters.double().cpu())
    assert (truths[0] - truths[1]).abs().max() < (1e-9 if exact(device) == torch.float64 else 1e-2)


def test_operator_is_registered_properly(device):
    model = form(hidden=(), groups=(2,), active=(1,))
    given = {n: t.to(device) for n, t in problem(model, rows=3, latent_dim=2, columns=4).items()}
    given = {n: t.to(exact(device)) if t.is_floating_point() else t for n, t in given.items()}
    arguments = (*given.values(), torch.full((2,), 0.1, dtype=torch.float64, device=device))
    arguments += (*HYPER, 5, 2, 1.0, None, *model)
    utilities = (
        ("test_schema", "test_faketensor") if rvi_fast.get_backend() == "triton" else ("test_autograd_registration",)
    )
    library.opcheck(torch.ops.rvi_fast.fit_rows.default, arguments, test_utils=utilities)


WRONG = [
    ({"start": torch.zeros(19, 21)}, ValueError, "start must have K \\+ 2 T columns, with K = 12 relays; got 21"),
    ({"start": torch.zeros(19, 22, dtype=torch.int64)}, TypeError, "start must be a floating-point tensor"),
    ({"row_ids": torch.zeros(18, dtype=torch.int64)}, ValueError, "row_ids must have shape \\[M = 19\\]"),
    ({"row_ids": torch.zeros(19)}, TypeError, "row_ids must be int64; got torch.float32"),
    ({"x": torch.zeros(18, 21)}, ValueError, "x must have shape"),
    ({"mask": torch.ones(19, 21)}, TypeError, "mask must be a bool tensor"),
    ({"x": torch.zeros(19, 21, dtype=torch.uint8), "mask": None}, TypeError, "mask=None takes NaN in x as missing"),
    ({"weights": torch.zeros(7, dtype=torch.float64)}, ValueError, "weights must hold \\d+ numbers for this model"),
    ({"rates": torch.zeros(3, dtype=torch.int64)}, TypeError, "rates must be a floating-point tensor"),
    ({"draws": 0}, ValueError, "draws must lie in 1 .. 65535; got 0"),
    ({"precision": "half"}, ValueError, "precision must be one of float32, tf32, bfloat16, or None; got 'half'"),
    ({"seed": 0.5}, TypeError, "seed must be an int"),
]


@pytest.mark.parametrize(("change", "error", "sentence"), WRONG)
def test_wrong_input_is_named(change, error, sentence):
    model = form()
    arguments = problem(model, rows=19) | {"rates": torch.full((2,), 0.1), "seed": 1} | change
    with pytest.raises(error, match=sentence):
        fit_rows(**arguments, model=model, hyper=HYPER)


def test_says_what_the_kernel_cannot_hold():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for model, dtype, device, reason in [
        (form(), torch.float64, gpu, "torch.float64 rows"),
        (form(hidden=(129,)), torch.float32, gpu, "latent_dim or hidden layers above 128"),
        (form(groups=(1,) * 7, active=(1,) * 7), torch.float32, cpu, "more than 6 groups or 512 relays"),
        (form(groups=(513,), active=(1,)), torch.float32, cpu, "more than 6 groups or 512 relays"),
        (form(groups=(1,) * 6, active=(1,) * 6), torch.float64, cpu, None),
    ]:
        assert ops.unsupported(dtype, device, 5, model) == reason


# infer


SMALL = dict(latent_dim=3, hidden=(5,), epochs=2, batch_size=32, progress=False)


@pytest.mark.triton
@pytest.mark.skipif(not INTERPRETED, reason="a fit on a GPU has bits of its own")
@pytest.mark.parametrize("make", [lambda: RVI(groups=(3, 4), **SMALL), lambda: VAD(**SMALL)], ids=["RVI", "VAD"])
def test_infer_takes_one_launch(make, monkeypatch):
    """As the steps one by one, for more rows than a launch takes, one of them with nothing observed."""
    monkeypatch.setattr(infer, "ROWS_OF_LAUNCH", 16)
    monkeypatch.setattr(infer, "ROWS_OF_PRODUCTS", 8)
    monkeypatch.setattr(infer, "LAUNCHES_AT_ONCE", 1)  # the interpreter has one thread
    rng = np.random.default_rng(0)
    X = np.where(rng.random((21, 6)) < 0.3, np.nan, rng.normal(size=(21, 6))).astype(np.float32)
    X[4] = np.nan
    with rvi_fast.backend("torch"):
        model = make().fit(rng.normal(size=(40, 6)).astype(np.float32))
        truth = model.infer(X, steps=4)
    with rvi_fast.backend("triton"):
        assert infer.FusedFits.can_take(model.model_, infer.InferencePlan(4, 0.1, "constant", 0))
        found = model.infer(X, steps=4)
        alone = model.infer(X[18:20], steps=4)
        assert not infer.FusedFits.can_take(model.model_, infer.InferencePlan(4, 0.1, "constant", 0, missed=2))
    for name in ("mean", "std", "elbo", "parameters"):
        torch.testing.assert_close(getattr(found, name), getattr(truth, name), rtol=1e-5, atol=1e-5)
        assert torch.equal(getattr(found, name)[18:20], getattr(alone, name))
    assert torch.equal(found.converged, truth.converged) and found.elbo[4] == 0
    assert (found.std[4] == 1).all()
