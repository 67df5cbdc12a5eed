"""kernels/select.py and kernels/relays.py: what rows select, against reference.select, to the bit."""

from __future__ import annotations

import pytest
import torch
from conftest import INTERPRETED
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rvi_fast import reference

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from rvi_fast.kernels.relays import (  # noqa: E402
    coefficients,
    layout,
    select_coefficients,
    selected_bits,
    store_bits,
    store_indices,
)

pytestmark = pytest.mark.triton
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


@triton.jit
def select_kernel(
    coef_ptr, table_ptr, bits_ptr, indices_ptr, kept_ptr,  # [B, K], .., uint8 [B, mask_bytes], int32 [B, active], bool
    B, K, groups, mask_bytes, active,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS).to(tl.int64)
    in_batch = row < B
    for first in range(0, groups, GROUPS):
        k, inside = coefficients(table_ptr, groups, first, GROUPS, SIZE)
        mask = in_batch[:, None] & inside[None, :]
        coef = tl.load(coef_ptr + row[:, None] * K + k[None, :], mask=mask, other=0.0)
        selected = select_coefficients(coef, inside, table_ptr, groups, first, GROUPS, SIZE)
        store_bits(bits_ptr, row, in_batch, selected, mask_bytes, table_ptr, groups, first, GROUPS, SIZE)
        store_indices(indices_ptr, row, in_batch, selected, active, table_ptr, groups, first, GROUPS, SIZE)
    tl.debug_barrier()
    k = tl.arange(0, BLOCK_K)
    kept = selected_bits(bits_ptr, mask_bytes, row, in_batch, k, K, table_ptr, groups)
    tl.store(kept_ptr + row[:, None] * K + k[None, :], kept, mask=in_batch[:, None] & (k < K)[None, :])


def check(coef: Tensor, groups: tuple[int, ...], active: tuple[int, ...], places: int = 1 << 20) -> None:
    coef = coef.to(DEVICE)
    parts = layout(groups, active, DEVICE)
    B, K = coef.shape
    rows = max(1, triton.next_power_of_2(B))
    bits = torch.full((B, parts.bytes), 255, dtype=torch.uint8, device=DEVICE)
    indices = torch.full((B, parts.active), -1, dtype=torch.int32, device=DEVICE)
    kept = torch.zeros(B, K, dtype=torch.bool, device=DEVICE)
    _, groups_at_once = parts.tile(rows, places)
    select_kernel[(1,)](
        coef, parts.table, bits, indices, kept, B, K, parts.groups, parts.bytes, parts.active,
        ROWS=rows, GROUPS=groups_at_once, SIZE=parts.size, BLOCK_K=triton.next_power_of_2(K),
    )  # fmt: skip
    expected = torch.cat([reference.select(a, n) for a, n in zip(coef.split(groups, 1), active, strict=True)], dim=1)
    assert torch.equal(kept, expected)
    assert torch.equal(bits, reference.selected_bits(coef, groups, active))
    assert torch.equal(indices.long(), expected.nonzero()[:, 1].view(B, -1))


@st.composite
def problems(draw):
    groups = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=5)))
    active = tuple(draw(st.integers(1, k)) for k in groups)
    noise = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    coef = torch.randn(draw(st.integers(1, 4)), sum(groups), generator=noise, dtype=dtype)
    if draw(st.booleans()):
        coef = (coef * draw(st.sampled_from([0.5, 2.0]))).round()  # ties, and zeros of both signs
    return coef, groups, active, draw(st.sampled_from([64, 1 << 20]))


@settings(max_examples=12, deadline=None)
@given(problem=problems())
def test_equals_the_twin(problem):
    check(*problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("active", [1, 3, 7, 9])
def test_special_numbers(dtype, active):
    tiny, least = torch.finfo(dtype).tiny, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    nan, inf = torch.nan, torch.inf
    check(
        torch.tensor(
            [
                [0.0, -0.0, 0.0, least, -least, tiny, -tiny, 1.0, -1.0],
                [nan, inf, -inf, 0.0, 1.0, -nan, -3.0, 2.0, nan],
                [0.0] * 9,
                [-1.0] * 9,
            ],
            dtype=dtype,
        ),
        (9,),
        (active,),
    )


@pytest.mark.parametrize(
    ("groups", "active"),
    [
        ((1,), (1,)),
        ((1, 1, 200), (1, 1, 7)),
        ((2,) * 40, (1,) * 40),
        (tuple(range(1, 41)), tuple(range(1, 41))),
        ((1000,), (500,)),
        ((4096,), (1,)),
    ],
)
def test_sizes(groups, active):
    coef = torch.randn(2, sum(groups), generator=torch.Generator().manual_seed(0))
    check((coef * 4).round(), groups, active, places=2048)
