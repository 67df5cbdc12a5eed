"""kernels/philox.py: the device function's words are those of the reference, to the bit."""

from __future__ import annotations

import pytest
import torch
from conftest import INTERPRETED

from rvi_fast import reference

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from rvi_fast.kernels.philox import philox  # noqa: E402

pytestmark = pytest.mark.triton


@triton.jit
def philox_kernel(key_ptr, counter_ptr, words_ptr, N: tl.constexpr):  # int64 [N, 2], [N, 4], [N, 4]
    n = tl.arange(0, N)
    k0 = tl.load(key_ptr + 2 * n).to(tl.uint32)
    k1 = tl.load(key_ptr + 2 * n + 1).to(tl.uint32)
    c0 = tl.load(counter_ptr + 4 * n).to(tl.uint32)
    c1 = tl.load(counter_ptr + 4 * n + 1).to(tl.uint32)
    c2 = tl.load(counter_ptr + 4 * n + 2).to(tl.uint32)
    c3 = tl.load(counter_ptr + 4 * n + 3).to(tl.uint32)
    w0, w1, w2, w3 = philox(k0, k1, c0, c1, c2, c3)
    tl.store(words_ptr + 4 * n, w0.to(tl.int64))
    tl.store(words_ptr + 4 * n + 1, w1.to(tl.int64))
    tl.store(words_ptr + 4 * n + 2, w2.to(tl.int64))
    tl.store(words_ptr + 4 * n + 3, w3.to(tl.int64))


def test_words_equal_the_reference():
    device = "cpu" if INTERPRETED else "cuda"
    inputs = torch.randint(1 << 32, (1024, 6), generator=torch.Generator().manual_seed(0))
    inputs[0], inputs[1] = 0, (1 << 32) - 1
    key, counter = inputs[:, :2].contiguous().to(device), inputs[:, 2:].contiguous().to(device)
    words = torch.zeros_like(counter)
    philox_kernel[(1,)](key, counter, words, len(key))
    assert torch.equal(words, torch.stack(reference.philox(key.unbind(1), counter.unbind(1)), dim=1))
