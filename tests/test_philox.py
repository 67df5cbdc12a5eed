"""The generator under the noise: Philox-4x32-10, the layout of its key and counter, and the order of an epoch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rvi_fast import reference

WORD = 0xFFFFFFFF
KNOWN_ANSWERS = {  # counter, key -> words, from the Random123 distribution's kat_vectors
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((WORD, WORD, WORD, WORD), (WORD, WORD), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


def python_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Salmon et al. 2011, figure 2 and section 4.3, on Python's unbounded ints."""
    left, right = [counter[0], counter[1]], [counter[2], counter[3]]
    for r in range(10):
        k0, k1 = (key[0] + r * 0x9E3779B9) & WORD, (key[1] + r * 0xBB67AE85) & WORD
        high0, low0 = divmod(0xD2511F53 * left[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * right[0], 2**32)
        left, right = [high1 ^ left[1] ^ k0, low1], [high0 ^ right[1] ^ k1, low0]
    return (*left, *right)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS)
def test_known_answers(counter, key, words):
    assert python_philox(counter, key) == words
    assert tuple(w.item() for w in reference.philox(key, [torch.tensor(c) for c in counter])) == words


@given(
    seed=st.integers(0, 2**64 - 1),
    stream=st.sampled_from(sorted(reference.STREAMS)),
    step=st.integers(0, WORD),
    row=st.integers(-(2**63), 2**63 - 1),
    block=st.integers(0, 20),
    draw=st.integers(0, 2**16 - 1),
)
@settings(deadline=None, max_examples=50)
def test_words_come_from_the_documented_key_and_counter(seed, stream, step, row, block, draw):
    words = reference.philox_words(seed, stream, step, torch.tensor([0, row]), blocks=block + 1, draw=draw)
    number = {"train": 0, "infer": 1, "impute": 2, "init": 3, "permutation": 4}[stream]
    counter = (row & WORD, row >> 32 & WORD, step, block | draw << 12 | number << 28)
    assert tuple(words[1, block].tolist()) == python_philox(counter, (seed & WORD, seed >> 32))


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_permutation_holds_every_row_once(n):
    assert torch.equal(reference.permutation(3, 0, n).sort().values, torch.arange(n))


def test_permutation_depends_on_seed_and_epoch_alone():
    order = reference.permutation(3, 1, 1000)
    assert torch.equal(order, reference.permutation(3, 1, 1000, block=7))
    assert not torch.equal(order, reference.permutation(3, 2, 1000))
    assert not torch.equal(order, reference.permutation(4, 1, 1000))
    displaced = (order - torch.arange(1000)).abs().double().mean()
    assert displaced == pytest.approx(1000 / 3, rel=0.1)  # of a random order
