"""The compiled loops of the CPU's step against the equations: noise and selection to the bit, the rest to rounding."""

import numpy as np
import pytest
import torch

from rvi_fast import reference
from rvi_fast.clock import EPS_MEETS_GRADIENT, AdamClock
from rvi_fast.reference import AdamHyper

pytest.importorskip("numba", reason="the loops are compiled by numba")
from rvi_fast.loops import adam, decoder, exponential, likelihood, philox, products, relays
from rvi_fast.loops import rows as of_rows
from rvi_fast.loops import threads as of_loops
from rvi_fast.loops.jit import compiled
from rvi_fast.ops import elbo, rows_cpu
from rvi_fast.ops.elbo import ElboModel
from rvi_fast.ops.table_cpu import adam_factors

HYPER = AdamHyper(0.9, 0.999, 1e-8)


def bits_of(values):
    """As integers of the same size, in the same memory."""
    return values.numpy().view(f"i{values.itemsize}")


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
            relays.sample(zero, zero, zero + 1, *parts, spread, z, 0, zero[:, 0].copy())
            assert torch.equal(torch.from_numpy(z), expected) and np.array_equal(z, spread)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "scales", "nan"])
def test_selection_is_that_of_the_equations(dtype, kind):
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
                for number, (begin, end) in enumerate([(0, 25), (25, 25), (25, 64)]):
                    relays.select((number, begin, end), bits_of(coef), *sizes, guesses, bits_of(weight), kept)
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
    total = likelihood.bernoulli(threads, logits.numpy(), *cells, 0.1, by_bias)
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
    relays.sample(mean.numpy(), rows.numpy(), sigma.numpy(), *parts, spread, sampled, 0, found)
    torch.testing.assert_close(torch.from_numpy(sampled), z.detach())
    torch.testing.assert_close(torch.from_numpy(found), kl.detach())
    by_mean = np.empty((9, 5))
    relays.sample_gradients(by_z.numpy(), 0, mean.numpy(), sigma.numpy(), spread, 0.3, by_mean, grad)
    assert np.array_equal(by_mean, grad[:, 2:7])
    torch.testing.assert_close(torch.from_numpy(grad[:, 2:]), torch.cat(expected, dim=1))
    found = grad.copy()
    found[:, :2] = np.nan
    kept = np.where(np.arange(18).reshape(9, 2) % 3 == 0, -1, 0)
    relays.keep(grad.view(np.int64), kept, found.view(np.int64))
    assert np.array_equal(found[:, :2], np.where(kept, grad[:, :2], 0)) and np.array_equal(found[:, 2:], grad[:, 2:])


@pytest.fixture(params=["packed", "blas", "loops"])
def way(request):
    """Of making products."""
    if (request.param == "packed" and not products.HAS_PACKING) or (request.param == "blas" and not products.HAS_BLAS):
        pytest.skip("PyTorch's BLAS cannot be called here")
    return request.param


def packed_for(way, block, b, transposed):
    if way != "packed" or b.dtype != np.float32 or not b.size:
        return np.empty(0, b.dtype)
    room = torch.empty(products.packed_size(block, b, transposed)).numpy()
    products.pack(block, b, transposed, room)
    return room


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 7, 3), (3, 1, 70), (70, 5, 1), (4, 0, 6), (0, 5, 2)])
@pytest.mark.parametrize("block", [0, 32])
def test_products(way, dtype, sizes, block):
    generator, (inner, columns, beside), rows = torch.Generator().manual_seed(0), sizes, 69

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    a, weight, start = normal(rows, inner + beside)[:, beside:], normal(columns, inner), normal(rows, columns)
    for transposed, b in ((True, weight), (False, weight.T.contiguous())):
        out = torch.full((rows, columns + beside), torch.nan, dtype=dtype)
        out[:, :columns] = start
        packed = packed_for(way, block, b.numpy(), transposed) if block else np.empty(0, b.numpy().dtype)
        products.multiply(way != "loops", block, a.numpy(), b.numpy(), transposed, packed, out[:, :columns].numpy())
        torch.testing.assert_close(out[:, :columns], start + a @ weight.T, rtol=1e-5, atol=1e-5)
        assert out[:, columns:].isnan().all()
    out = torch.full((inner, columns + beside), torch.nan, dtype=dtype)
    products.multiply_columns(way != "loops", a.numpy(), start.numpy(), out[:, :columns].numpy())
    torch.testing.assert_close(out[:, :columns], a.T @ start, rtol=1e-5, atol=1e-5)
    assert out[:, columns:].isnan().all()


def test_a_block_of_a_product_has_its_bits_wherever_it_stands(way):
    a, b = np.random.default_rng(0).standard_normal((2, 160, 33)).astype(np.float32)
    packed, together = packed_for(way, 32, b[:19], True), np.zeros((160, 19), np.float32)
    products.multiply(way != "loops", 32, a, b[:19], True, packed, together)
    for rows in np.arange(160).reshape(5, 32):
        alone = np.zeros((32, 19), np.float32)
        products.multiply(way != "loops", 32, a[rows], b[:19], True, packed, alone)
        assert np.array_equal(alone, together[rows])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sizes", [(5, 13), (13, 7), (14, 5), (33, 19), (64, 100)])
def test_a_row_of_a_product_has_its_bits_wherever_it_stands(way, dtype, sizes):
    inner, columns = sizes
    rng = np.random.default_rng(0)
    b, row = rng.standard_normal((columns, inner)).astype(dtype), rng.standard_normal(inner).astype(dtype)
    packed, found = packed_for(way, 32, b, True), []
    for place in range(32):
        a, out = (torch.zeros(32, 128, dtype=torch.from_numpy(b).dtype).numpy() for _ in range(2))
        a[:, :inner] = rng.standard_normal((32, inner))
        a[place, :inner] = row
        products.multiply(way != "loops", 32, a[:, :inner], b, True, packed, out[:, :columns])
        found.append(out[place])
    assert np.array_equal(found, [found[0]] * 32)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exponentials_and_what_is_made_of_them(dtype):
    info = np.finfo(dtype)
    edges = np.log([info.tiny, info.max / 2]).astype(dtype)
    a = np.concatenate((np.linspace(*edges, 10_001), np.linspace(-3, 3, 10_001), [0.0, -0.0, 1e-30])).astype(dtype)
    found = np.empty_like(a)
    for sign in (1, -1):
        exponential.exp(sign, sign * a, found)
        assert np.max(np.abs(found / np.exp(a.astype(np.longdouble)) - 1)) < info.eps
    softplus, sigmoid, b = np.empty_like(a), np.empty_like(a), a.astype(np.longdouble)
    exponential.softplus_and_sigmoid(a, softplus, sigmoid)
    wide = np.abs(a) < info.maxexp / 2  # further out, one of them is denormal
    assert np.max(np.abs(softplus / np.logaddexp(0, b) - 1)[wide]) < 2 * info.eps
    assert np.max(np.abs(sigmoid * (1 + np.exp(-b)) - 1)[wide]) < 2 * info.eps
    wild = np.array([np.nan, np.inf, -np.inf, 1e6, -1e6], dtype)
    exponential.softplus_and_sigmoid(wild, softplus[:5], sigmoid[:5])
    assert np.array_equal(softplus[:5], [np.nan, np.inf, 0, 1e6, 0], equal_nan=True)
    assert np.array_equal(sigmoid[:5], [np.nan, 1, 0, 1, 0], equal_nan=True)
    exponential.exp(1, wild, found[:5])
    assert np.array_equal(found[:5], [np.nan, np.inf, 0, np.inf, 0], equal_nan=True)


def test_every_activation_is_known():
    assert set(decoder.ACTIVATIONS) == set(reference.ACTIVATIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", decoder.ACTIVATIONS)
def test_activations_are_those_of_the_equations(activation, dtype):
    a = torch.cat((torch.randn(1000, dtype=dtype) * 4, torch.tensor([0.0, -100.0, 100.0, 1e-20], dtype=dtype)))
    leaf, grad = a.clone().requires_grad_(), torch.randn(len(a), dtype=dtype)
    expected = reference.ACTIVATIONS[activation](leaf)
    kind, h, found = decoder.ACTIVATIONS.index(activation), torch.empty_like(a), grad.clone()
    decoder.activate(kind, a.numpy(), h.numpy())
    torch.testing.assert_close(h, expected.detach())
    decoder.differentiate(kind, a.numpy(), h.numpy(), np.empty_like(a.numpy()), found.numpy())
    torch.testing.assert_close(found, torch.autograd.grad(expected, leaf, grad)[0])
    lost = np.empty(1)
    decoder.activate(kind, np.array([np.nan]), lost)
    assert np.isnan(lost).all()


def model_of(groups=(3, 5), hidden=(7, 6), linear_path=True, activation="silu", learned=True):
    active = tuple(-(-group // 2) for group in groups)
    return ElboModel(groups, active, hidden, linear_path, activation, "gaussian", 0.3, learned, 0.7)


MODELS = {
    "linear path": model_of(),
    "none": model_of(linear_path=False, activation="relu", learned=False),
    "one hidden layer": model_of(hidden=(9,), activation="tanh"),
    "no hidden layer": model_of(hidden=(), linear_path=False),
    "no relays": model_of(groups=(), activation="gelu"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [1, 2, 37])
def test_a_batch_goes_forth_and_back_as_by_the_equations(threads, way, dtype, name, size):
    generator, model, latents, columns = torch.Generator().manual_seed(0), MODELS[name], 5, 11

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    shapes, relays = model.shared_shapes(latents, columns), sum(model.groups)
    moving = normal(3, sum(torch.Size(shape).numel() for shape in shapes))
    moving[2].square_()
    weights = rows_cpu.weights_of(moving[0].numpy(), model, latents, columns)._replace(blas=way != "loops")
    if way == "packed" and dtype == torch.float32:
        weights = decoder.packed(weights._replace(block=8))
    rows = rows_cpu.Rows(size, latents, columns, weights, model)
    ids, by_xhat = torch.arange(size), normal(size, columns)
    rows.arrays.p[:] = normal(size, relays + 2 * latents).numpy()
    rows.draw(3, "train", 7, ids, 0)
    of_rows.forward(threads, rows.arrays, weights)

    p, flat = torch.from_numpy(rows.arrays.p).clone().requires_grad_(), moving[0].clone().requires_grad_()
    of_relays, *layers = elbo.shared_views(flat, shapes)
    log_scale = [layers.pop()] if model.learned else []
    coef, residual, log_std = p.split([relays, latents, latents], dim=1)
    kept = reference.selected(coef, model.groups, model.active) if relays else torch.ones_like(coef, dtype=torch.bool)
    mean = residual + torch.where(kept, coef, 0.0) @ of_relays
    noise = reference.philox_normal(3, "train", torch.tensor(7), ids, latents, 0, dtype)
    z, kl = reference.gaussian_sample(mean, log_std, noise), reference.gaussian_kl(mean, log_std)
    pairs = list(zip(layers[::2], layers[1::2], strict=True))
    xhat = reference.mlp_decoder(z, pairs, model.activation, model.linear_path)
    near = {} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(torch.from_numpy(rows.arrays.kl), kl.detach(), **near)
    of_columns = torch.from_numpy(rows.arrays.xhat)[:, :columns]
    torch.testing.assert_close(of_columns, xhat.detach(), **near)

    by_p, by_flat = torch.autograd.grad((by_xhat * xhat).sum() + 0.7 * kl.sum(), (p, flat))
    of_columns.copy_(by_xhat)
    of_rows.backward(threads, rows.arrays, weights, 0.7)
    torch.testing.assert_close(torch.from_numpy(rows.arrays.grad), by_p, **near)

    rest = columns * (1 + len(log_scale))
    grad = torch.full_like(by_flat, torch.nan)
    grad[-rest:] = by_flat[-rest:] + 1
    by_flat[-rest:] += 1
    factors = [adam_factors(3, lr, 0.1, HYPER) for lr in (0.1, 0.2)]
    stepped = reference.adamw_step(*moving, by_flat, 3, 0.1, HYPER, 0.1)
    of_scales = reference.adamw_step(*moving, by_flat, 3, 0.2, HYPER, 0.1)
    expected = torch.stack(stepped)
    if log_scale:
        expected[:, -columns:] = torch.stack(of_scales)[:, -columns:]
    of_rows.step_shared(threads, rows.arrays, weights, moving.numpy(), grad.numpy(), *factors)
    torch.testing.assert_close(grad, by_flat, **near)
    torch.testing.assert_close(moving, expected, **near)
