"""Keyed standard normals: what they depend on, how they are distributed, and that every backend gives the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import rvi_fast
from rvi_fast import reference
from rvi_fast.functional import philox_normal

ROW_IDS = (0, 1, 5, -1, 2**53, 2**53 + 1, 2**63 - 1, -(2**63))
SEEDS = (0, 1, 2**31, 2**32 + 5, 2**63 + 11, 2**64 - 1, -3)


def row_ids(device: torch.device | str) -> torch.Tensor:
    return torch.tensor(ROW_IDS, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [1, 3, 4, 63, 65, 700])
def test_equals_the_twin(device, dim, dtype):
    ids = row_ids(device)
    noise = philox_normal(2**63 + 11, "infer", 2**32 - 1, ids, dim, draw=2**16 - 1, dtype=dtype)
    twin = reference.philox_normal(2**63 + 11, "infer", 2**32 - 1, ids.cpu(), dim, 2**16 - 1, dtype)
    assert noise.dtype == dtype and noise.device == ids.device
    torch.testing.assert_close(noise.cpu(), twin, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("seed", SEEDS)
def test_equals_the_twin_for_any_seed(device, seed):
    noise = philox_normal(seed, "train", 3, row_ids(device), 8)
    twin = reference.philox_normal(seed, "train", 3, row_ids("cpu"), 8)
    torch.testing.assert_close(noise.cpu(), twin, rtol=0, atol=2e-6)


def test_box_muller_of_the_words(device):
    words = reference.philox_words(5, "train", 0, row_ids("cpu"), blocks=1)[:, 0].double()
    radius = torch.sqrt(-2 * torch.log((words[:, [0, 0, 2, 2]] + 0.5) / 2**32))
    angle = 2 * math.pi * (words[:, [1, 1, 3, 3]] + 0.5) / 2**32
    expected = radius * torch.stack([f(angle[:, i]) for i, f in enumerate((torch.cos, torch.sin) * 2)], dim=1)
    # the uniforms are rounded to float32, which moves small radii: the exact normals are met to 1e-5 only
    torch.testing.assert_close(
        philox_normal(5, "train", 0, row_ids(device), 4).cpu().double(), expected, rtol=0, atol=1e-5
    )


def test_a_row_does_not_depend_on_its_batch(device):
    noise = philox_normal(1, "train", 2, row_ids(device), 65)
    order = torch.randperm(len(ROW_IDS), generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(philox_normal(1, "train", 2, row_ids(device)[order], 65), noise[order])
    for row in range(len(ROW_IDS)):
        assert torch.equal(philox_normal(1, "train", 2, row_ids(device)[row : row + 1], 65)[0], noise[row])
    assert torch.equal(philox_normal(1, "train", 2, row_ids(device).repeat(5), 65), noise.repeat(5, 1))


def test_a_latent_does_not_depend_on_their_number(device):
    wide = philox_normal(1, "train", 2, row_ids(device), 700)
    for dim in (1, 3, 64):
        assert torch.equal(philox_normal(1, "train", 2, row_ids(device), dim), wide[:, :dim])


def test_step_may_live_on_the_device(device):
    step = torch.tensor(2**31 + 7, device=device)
    noise = philox_normal(1, "train", 2**31 + 7, row_ids(device), 8)
    assert torch.equal(philox_normal(1, "train", step, row_ids(device), 8), noise)


def test_row_ids_may_be_strided(device):
    ids = row_ids(device)
    assert torch.equal(philox_normal(1, "train", 0, ids[::2], 8), philox_normal(1, "train", 0, ids, 8)[::2])
    assert torch.equal(
        philox_normal(1, "train", 0, ids[1:2].expand(3), 8), philox_normal(1, "train", 0, ids, 8)[[1, 1, 1]]
    )


def test_integers_may_be_numpys(device):
    numbers = np.uint32(5), np.int64(7), np.int32(9), np.uint8(2)
    seed, step, dim, draw = numbers
    noise = philox_normal(seed, "train", step, row_ids(device), dim, draw=draw)
    seed, step, dim, draw = (int(n) for n in numbers)
    assert torch.equal(noise, philox_normal(seed, "train", step, row_ids(device), dim, draw=draw))


@pytest.mark.gpu
def test_step_may_live_on_another_device():
    ids = torch.arange(5, device="cuda")
    for backend in ("torch", "auto"):
        with rvi_fast.backend(backend):
            noise = philox_normal(1, "train", torch.tensor(3), ids, 4)
            assert torch.equal(noise, philox_normal(1, "train", 3, ids, 4))


@pytest.mark.parametrize(("rows", "dim"), [(0, 64), (3, 0), (0, 0)])
def test_empty(device, rows, dim):
    assert philox_normal(1, "train", 0, torch.arange(rows, device=device), dim).shape == (rows, dim)


def test_moments_and_tails():
    noise = philox_normal(0, "train", 0, torch.arange(8000), 64).double()
    n = noise.numel()
    five_sigma = 5 / math.sqrt(n)
    assert abs(noise.mean()) < five_sigma
    assert abs(noise.var() - 1) < five_sigma * math.sqrt(2)
    assert abs(noise.pow(3).mean()) < five_sigma * math.sqrt(15)
    assert abs(noise.pow(4).mean() - 3) < five_sigma * math.sqrt(96)
    for bound in (1.0, 2.0, 3.0, 4.0):
        share = math.erfc(bound / math.sqrt(2))
        assert abs((noise.abs() > bound).double().mean() - share) < five_sigma * math.sqrt(share)
    per_latent = noise.mean(0).abs() * math.sqrt(len(noise))
    assert per_latent.max() < 5
    assert ((noise.T @ noise / len(noise)).fill_diagonal_(0).abs() * math.sqrt(len(noise))).max() < 6


def test_changing_any_part_of_the_key_gives_independent_noise():
    ids = torch.arange(2000)
    base = philox_normal(1, "train", 5, ids, 32)
    others = {
        "seed": philox_normal(2, "train", 5, ids, 32),
        "high word of the seed": philox_normal(1 + 2**32, "train", 5, ids, 32),
        "stream": philox_normal(1, "infer", 5, ids, 32),
        "step": philox_normal(1, "train", 6, ids, 32),
        "draw": philox_normal(1, "train", 5, ids, 32, draw=1),
        "row": philox_normal(1, "train", 5, ids + 2000, 32),
        "high word of the row": philox_normal(1, "train", 5, ids + 2**32, 32),
    }
    for changed, noise in others.items():
        assert abs((base * noise).mean()) < 5 / math.sqrt(base.numel()), changed


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"stream": "test"}, ValueError, "stream must be one of train, infer, impute, init, permutation; got 'test'"),
        ({"draw": 1 << 16}, ValueError, "draw must lie in 0 .. 65535; got 65536"),
        ({"draw": -1}, ValueError, "draw must lie in 0 .. 65535; got -1"),
        ({"dim": 16385}, ValueError, "dim must lie in 0 .. 16384; got 16385"),
        ({"dim": -1}, ValueError, "dim must lie in 0 .. 16384; got -1"),
        ({"seed": 1.0}, TypeError, "seed must be an int; got 1.0"),
        ({"seed": None}, TypeError, "seed must be an int; got None"),
        ({"draw": "0"}, TypeError, "draw must be an int; got '0'"),
        ({"dim": 4.0}, TypeError, "dim must be an int; got 4.0"),
        ({"step": 0.5}, TypeError, "step must be an int; got 0.5"),
        ({"step": -1}, ValueError, "step must lie in 0 .. 4294967295; got -1"),
        ({"step": 1 << 32}, ValueError, "step must lie in 0 .. 4294967295; got 4294967296"),
        ({"row_ids": [0, 1]}, TypeError, r"row_ids must be an int64 tensor \[B\]; got list"),
        (
            {"row_ids": torch.arange(3).int()},
            TypeError,
            r"row_ids must be an int64 tensor \[B\]; got torch.int32 \[3\]",
        ),
        (
            {"row_ids": torch.arange(3)[None]},
            TypeError,
            r"row_ids must be an int64 tensor \[B\]; got torch.int64 \[1, 3\]",
        ),
    ],
)
def test_wrong_input_is_named(change, error, sentence):
    arguments = {"seed": 0, "stream": "train", "step": 0, "row_ids": torch.arange(3), "dim": 4} | change
    with pytest.raises(error, match=sentence):
        philox_normal(**arguments)


@pytest.mark.gpu
@pytest.mark.triton
def test_graph_replays_with_the_step_of_the_moment():
    ids, step = torch.arange(300, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    eager = [philox_normal(1, "train", t, ids, 64) for t in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        noise = philox_normal(1, "train", step, ids, 64)
        step += 1
    step.zero_()
    for expected in eager:
        graph.replay()
        assert torch.equal(noise, expected)


@pytest.mark.gpu
def test_kernel_is_the_default_on_a_gpu():
    with rvi_fast.backend("triton"):
        kernel = philox_normal(1, "train", 0, torch.arange(9, device="cuda"), 8)
    assert torch.equal(philox_normal(1, "train", 0, torch.arange(9, device="cuda"), 8), kernel)


@pytest.mark.gpu
def test_offsets_pass_31_bits():
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GiB")
    ids = torch.arange(2**31 // 64 + 100, device="cuda")
    last = philox_normal(1, "train", 0, ids, 64)[-100:]
    assert torch.equal(last, philox_normal(1, "train", 0, ids[-100:], 64))


def test_opcheck(device):
    step = torch.tensor(3, device=device)
    arguments = -5, reference.STREAMS["train"], step, row_ids(device), 7, 2, torch.float32
    torch.library.opcheck(torch.ops.rvi_fast.philox_normal.default, arguments)


def test_compiles_into_one_graph(device):
    torch.compiler.reset()  # a graph keeps the backend that it was traced with
    compiled = torch.compile(philox_normal, fullgraph=True, backend="aot_eager")
    arguments = 0, "train", torch.tensor(3, device=device), row_ids(device), 7
    assert torch.equal(compiled(*arguments), philox_normal(*arguments))
