"""The compiled loops of the CPU's step against the equations: noise and selection to the bit, the rest to rounding."""

import numpy as np
import pytest
import torch

from rvi_fast import reference
from rvi_fast.clock import EPS_MEETS_GRADIENT, AdamClock
from rvi_fast.reference import AdamHyper

pytest.importorskip("numba", reason="the loops are compiled by numba")
from rvi_fast.loops import adam, likelihood, philox, products, relays
from rvi_fast.loops import threads as of_loops
from rvi_fast.loops.jit import compiled
from rvi_fast.ops import fit_rows_cpu
from rvi_fast.ops.rows_cpu import bits_of

HYPER = AdamHyper(0.9, 0.999, 1e-8)


@pytest.fixture(params=[1, 3])
def threads(request):
    if request.param > 1 and not of_loops.HAS_OPENMP:
        pytest.skip("PyTorch's operators are not shared by OpenMP's threads here")
    return request.param


@compiled
def visit_part(part, visits, numbers, halves):
    number, begin, end = part
    for b in range(begin, end):
        visits[b] += 1
        numbers[b] = number
        halves[b] *= np.float32(0.5)


@compiled
def visit(threads, visits, numbers, halves):
    of_loops.share(visit_part, threads, len(visits), (visits, numbers, halves))


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 100])
def test_every_row_is_one_threads(threads, rows):
    visits, numbers = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    visit(threads, visits, numbers, np.ones(rows, np.float32))
    assert (visits == 1).all() and (np.diff(numbers) >= 0).all()
    assert rows < 3 or len(set(numbers)) == threads


@pytest.mark.parametrize("flush", [False, True])
def test_threads_treat_denormals_as_their_caller(threads, flush):
    if not of_loops.HAS_MXCSR:
        pytest.skip("on this processor threads keep their own ways")
    halves = np.full(100, 1e-38, np.float32)
    torch.set_flush_denormal(flush)
    try:
        visit(threads, np.zeros(100, np.int64), np.zeros(100, np.int64), halves)
    finally:
        torch.set_flush_denormal(False)
    assert (halves == (0 if flush else np.float32(5e-39))).all()


def test_loops_take_as_many_threads_as_operators_do():
    before = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            assert of_loops.available() == (number if of_loops.HAS_OPENMP else 1)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dim", [1, 4, 5, 64, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_has_the_bits_of_the_equations(dim, dtype):
    rng = np.random.default_rng(dim)
    for rows in (0, 1, 7, 256):
        ids = torch.from_numpy(rng.integers(-(1 << 63), (1 << 63) - 1, rows))
        seed, step = int(rng.integers(1 << 63)), int(rng.integers(1 << 32))
        for stream, draw in (("train", 0), ("infer", 9)):
            expected = reference.philox_normal(seed, stream, torch.tensor(step), ids, dim, draw, dtype)
            radius, angle = (torch.full((rows, 2 * -(-dim // 4)), torch.nan, dtype=dtype) for _ in range(2))
            number = np.uint64(reference.STREAMS[stream] << 28 | draw << 12)
            key = np.uint64(seed), np.uint64(step), number
            philox.uniforms(*key, ids.numpy().view(np.uint64), radius.numpy(), angle.numpy())
            zero = np.zeros((rows, dim), radius.numpy().dtype)
            z, spread = np.empty_like(zero), np.empty_like(zero)
            parts = (t.numpy() for t in (radius.log().mul(-2).sqrt(), angle.cos(), angle.sin()))
            relays.sample(zero, zero, zero + 1, *parts, spread, z, zero[:, 0].copy())
            assert torch.equal(torch.from_numpy(z), expected) and np.array_equal(z, spread)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "scales", "nan"])
def test_selection_is_that_of_the_equations(threads, dtype, kind):
    generator = torch.Generator().manual_seed(0)
    for groups, active in [((1,), (1,)), ((25, 50, 100), (13, 25, 50)), ((3, 70), (3, 1)), ((1000,), (999,))]:
        coef = torch.randn(64, sum(groups), generator=generator, dtype=dtype)
        if kind == "ties":
            coef = (2 * coef).round()
        elif kind == "zeros":
            coef = torch.where(coef > 1, coef, 0.0)
        elif kind == "scales":  # from row to row and within one
            coef = coef * torch.logspace(-30, 30, 64, dtype=dtype)[:, None] * coef.abs() ** 9
        elif kind == "nan":
            coef[::3, 0] = torch.nan
        weight = torch.full_like(coef, torch.nan)
        kept = np.zeros_like(bits_of(coef))
        expected = reference.selected(coef, groups, active)
        generate = np.random.default_rng(0)
        wild = generate.integers(-(1 << 31), (1 << 31) - 1, (64, len(groups)))
        for guesses in (np.zeros((64, len(groups)), np.int64), wild):
            for _ in range(2):  # the second time from what was found
                sizes = np.array(groups), np.array(active)
                relays.select(threads, bits_of(coef), *sizes, guesses, bits_of(weight), kept)
                assert np.array_equal(kept, -expected.numpy().astype(kept.dtype))
                assert np.array_equal(weight.numpy(), torch.where(expected, coef, 0.0).numpy(), equal_nan=True)


def clocks(betas=(0.9, 0.999), weight_decay=0.0, steps=500):
    """One that the loop has moved, and one that the equations have."""
    ours, equations = (AdamClock(AdamHyper(*betas, 1e-8)) for _ in range(2))
    rng = np.random.default_rng(0)
    for _ in range(steps):
        lr = float(rng.choice([0.0, 1e-3, 1e-2]))
        ours.reserve(1)
        ours.replayed(1)
        window = (ours.window or 0) if ours.closed_form else 0
        corrections = ours.hyper.bias_corrections_at(ours.steps)
        rates = lr, weight_decay
        adam.advance(ours.history.numpy(), ours.index, window, *rates, *corrections, *ours.hyper.logs())
        equations.advance(*rates)
    return ours, equations


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.999), (0.5, 0.9), (0.9, 0.0)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_clock_is_that_of_the_equations(betas, weight_decay):
    ours, equations = clocks(betas, weight_decay)
    torch.testing.assert_close(ours.history, equations.history, rtol=1e-11, atol=0)
    for last in (0, 1, 250, 499, 500):
        found = adam.missed(ours.history.numpy(), ours.index, last, *ours.hyper.logs())
        expected = equations.missed(torch.tensor([last]))
        found = torch.tensor(found, dtype=torch.float64)
        torch.testing.assert_close(found, torch.cat(expected), rtol=1e-8, atol=1e-300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_read_and_stepped_as_by_the_equations(threads, dtype):
    ours, equations = clocks(weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, 3, 17, generator=generator, dtype=dtype)
    values[:, 2].square_()
    values[::2, 1:, ::3] = 0  # never touched
    values[1, 2, 1] = 1e-18  # gradients that meet eps
    last = torch.randint(0, 501, (40,), generator=generator, dtype=torch.int32)
    last[0], last[1], last[2] = 500, 3, 0
    rows = torch.randperm(40, generator=generator)
    now, apart = torch.full((3, 40, 17), torch.nan, dtype=dtype), np.zeros(40, bool)
    least = reference.least_root(dtype)
    adam.read_rows(
        threads, values.flatten(1).numpy(), rows.numpy(), last.numpy(), ours.history.numpy(), ours.index,
        *HYPER.logs(), HYPER.eps, least, ours.inexact_before, EPS_MEETS_GRADIENT, *now.numpy(), apart,
    )  # fmt: skip
    assert rows[torch.from_numpy(apart)].tolist() == [1]
    expected = torch.stack(equations.catch_up(*values[rows].unbind(1), last[rows]))
    ordinary = rows != 1
    tolerance = dict(rtol=1e-5, atol=1e-7) if dtype == torch.float32 else dict(rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(now[:, ordinary], expected[:, ordinary], **tolerance)

    grad = torch.randn(40, 17, generator=generator, dtype=dtype)
    stepped = reference.adamw_step(*now.clone(), grad, 501, 1e-2, HYPER, 0.1)
    bc1, bc2 = HYPER.bias_corrections_at(501)
    factors = 1e-2 / bc1, bc2**-0.5, 1 - 1e-3, *HYPER
    at = values.flatten(1).numpy(), last.numpy(), rows.numpy()
    adam.step_rows(threads, *at, *now.numpy(), grad.numpy(), factors, 501)
    torch.testing.assert_close(values[rows], torch.stack(stepped, 1), **tolerance)
    assert (last == 501).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("holes", ["bool", "bits", "nan"])
@pytest.mark.parametrize("columns", [1, 8, 13, 784])
def test_losses_are_those_of_the_equations(threads, dtype, holes, columns):
    generator = torch.Generator().manual_seed(columns)
    for kind in ("float", "uint8"):
        if kind == "uint8" and holes == "nan":
            continue
        mask = torch.rand(50, columns, generator=generator) < 0.6
        x = torch.rand(50, columns, generator=generator, dtype=dtype)
        x_scale = 1.0
        if kind == "uint8":
            x, x_scale = (255 * x).byte(), 1 / 255
        else:
            x[~mask] = torch.nan
        rows = torch.randperm(50, generator=generator)[:37]
        cells = x.numpy(), x_scale, as_given(mask, holes), rows.numpy()
        truth = reference.without_holes(x[rows].to(dtype) * x_scale, mask[rows])
        xhat = torch.randn(37, columns, generator=generator, dtype=dtype)
        check_gaussian(threads, xhat.clone(), truth, mask[rows], cells)
        check_bernoulli(threads, xhat.clone(), truth, mask[rows], cells)


def as_given(mask, holes):
    if holes == "nan":
        return None
    return mask.numpy().view(np.uint8) if holes == "bool" else np.packbits(mask.numpy(), axis=1, bitorder="little")


def check_gaussian(threads, xhat, x, mask, cells):
    scale = torch.linspace(0.2, 2, xhat.shape[1], dtype=xhat.dtype)
    leaf = xhat.clone().requires_grad_()
    reference.masked_gaussian_nll(leaf, x, mask, scale).sum().mul(0.1).backward()
    squares, count, by_bias = np.full(len(scale), np.nan), np.full(len(scale), np.nan), np.empty_like(scale.numpy())
    factors = (1 / scale).numpy(), (0.1 / scale).numpy()
    likelihood.gaussian(threads, xhat.numpy(), *cells, *factors, squares, count, by_bias)
    torch.testing.assert_close(xhat, leaf.grad)
    torch.testing.assert_close(torch.from_numpy(by_bias), leaf.grad.sum(0), rtol=1e-4, atol=1e-5)
    assert np.array_equal(count, mask.sum(0).double().numpy())
    residual = torch.where(mask, (leaf.detach() - x) / scale, 0.0)
    torch.testing.assert_close(torch.from_numpy(squares), residual.double().square().sum(0), rtol=1e-5, atol=1e-9)


def check_bernoulli(threads, logits, x, mask, cells):
    leaf = logits.clone().requires_grad_()
    nll = reference.masked_bernoulli_nll(leaf, x, mask)
    nll.sum().mul(0.1).backward()
    by_bias = np.empty_like(logits[0].numpy())
    softplus, sigmoid = torch.nn.functional.softplus(logits).numpy(), torch.sigmoid(logits).numpy()
    total = likelihood.bernoulli(threads, logits.numpy(), softplus, sigmoid, *cells, 0.1, by_bias)
    torch.testing.assert_close(logits, leaf.grad)
    torch.testing.assert_close(torch.from_numpy(by_bias), leaf.grad.sum(0), rtol=1e-4, atol=1e-5)
    assert total == pytest.approx(float(nll.detach().double().sum()), rel=1e-5)


def test_gradients_of_the_sample_are_those_of_the_equations():
    generator = torch.Generator().manual_seed(0)
    mean, log_std, noise, by_z = (torch.randn(9, 5, generator=generator, dtype=torch.float64) for _ in range(4))
    leaves = mean.clone().requires_grad_(), log_std.clone().requires_grad_()
    z, kl = reference.gaussian_sample(*leaves, noise), reference.gaussian_kl(*leaves)
    expected = torch.autograd.grad((by_z * z).sum() + 0.3 * kl.sum(), leaves)
    sigma = log_std.exp()
    spread, sampled, grad = np.empty((9, 5)), np.empty((9, 5)), np.ones((9, 12))
    rows = torch.cat((noise, log_std), dim=1)
    even, odd = (torch.nn.functional.pad(noise, (0, 1))[:, start::2].contiguous().numpy() for start in (0, 1))
    parts = np.ones((9, 3)), even, odd
    found = np.empty(9)
    relays.sample(mean.numpy(), rows.numpy(), sigma.numpy(), *parts, spread, sampled, found)
    torch.testing.assert_close(torch.from_numpy(sampled), z.detach())
    torch.testing.assert_close(torch.from_numpy(found), kl.detach())
    relays.sample_gradients(by_z.numpy(), mean.numpy(), sigma.numpy(), spread, 0.3, grad)
    torch.testing.assert_close(torch.from_numpy(grad[:, 2:]), torch.cat(expected, dim=1))
    found = grad.copy()
    kept = np.where(np.arange(18).reshape(9, 2) % 3 == 0, -1, 0)
    relays.keep(bits_of(torch.from_numpy(found)), kept)
    assert np.array_equal(found[:, :2], np.where(kept, grad[:, :2], 0)) and np.array_equal(found[:, 2:], grad[:, 2:])


@pytest.mark.parametrize("by", ["packed", "blas", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 7, 3), (3, 1, 70), (70, 5, 1), (4, 0, 6)])
def test_products_by_blocks(monkeypatch, by, dtype, sizes):
    has = {"packed": products.HAS_PACKING and dtype == torch.float32, "blas": products.HAS_BLAS, "torch": True}
    if not has[by]:
        pytest.skip("PyTorch's BLAS cannot be called here")
    monkeypatch.setattr(products, "HAS_BLAS", by != "torch")
    monkeypatch.setattr(products, "HAS_PACKING", by == "packed")
    product = fit_rows_cpu.BlockProducts()
    generator, (inner, columns, beside) = torch.Generator().manual_seed(0), sizes
    rows = 2 * fit_rows_cpu.BLOCK + 5

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    a, weight, start = normal(rows, inner + beside)[:, beside:], normal(columns, inner), normal(rows, columns)
    for b in (weight.T, weight.T.contiguous()):
        for begin in (None, start, start[0]):
            out = torch.full((rows, columns + beside), torch.nan, dtype=dtype)
            product(a, b, out[:, :columns], begin)
            expected = a @ b + (0 if begin is None else begin)
            torch.testing.assert_close(out[:, :columns], expected, rtol=1e-5, atol=1e-5)
            assert out[:, columns:].isnan().all()


def test_a_block_of_a_product_has_its_bits_wherever_it_stands():
    a, b = torch.randn(5 * fit_rows_cpu.BLOCK, 33), torch.randn(33, 19)
    together = fit_rows_cpu.BlockProducts()(a, b, a.new_empty(len(a), 19))
    for rows in torch.arange(len(a)).split(fit_rows_cpu.BLOCK):
        alone = fit_rows_cpu.BlockProducts()(a[rows], b, a.new_empty(len(rows), 19))
        assert torch.equal(alone, together[rows])
