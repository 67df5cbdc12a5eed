"""The parts of the CPU's step against the equations: noise to the bit, the clock to rounding."""

import numpy as np
import pytest
import torch

from rvi_fast import reference
from rvi_fast.clock import AdamClock
from rvi_fast.ops import clock_cpu, noise_cpu
from rvi_fast.reference import AdamHyper


@pytest.mark.parametrize("dim", [1, 4, 5, 64, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_has_the_bits_of_the_equations(dim, dtype):
    rng = np.random.default_rng(dim)
    for rows in (1, 7, 256):
        ids = torch.from_numpy(rng.integers(-(1 << 63), (1 << 63) - 1, rows))
        seed, step = int(rng.integers(1 << 63)), int(rng.integers(1 << 32))
        for stream in ("train", "infer"):
            expected = reference.philox_normal(seed, stream, torch.tensor(step), ids, dim, dtype=dtype)
            assert torch.equal(noise_cpu.philox_normal(seed, stream, step, ids, dim, dtype), expected)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.999), (0.5, 0.9), (0.9, 0.0)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_clock_is_that_of_the_equations(betas, weight_decay):
    hyper = AdamHyper(*betas, 1e-8)
    ours, equations = AdamClock(hyper), AdamClock(hyper)
    rng = np.random.default_rng(0)
    for _ in range(500):
        lr = float(rng.choice([0.0, 1e-3, 1e-2]))
        ours.reserve(1)
        clock_cpu.advance(ours, lr, weight_decay)
        equations.advance(lr, weight_decay)
    assert (ours.index, ours.steps, int(ours.counters[0])) == (500, 500, 500)
    torch.testing.assert_close(ours.history, equations.history, rtol=1e-12, atol=0)
    last = torch.from_numpy(rng.integers(0, 501, 200).astype(np.int32))
    last[0], last[1] = 0, 500
    for found, expected in zip(clock_cpu.missed(ours, last), equations.missed(last), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-300)
