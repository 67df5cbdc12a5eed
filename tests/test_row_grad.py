"""RowGrad gives what the dense gradient would give."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from rvi_fast.row_grad import RowGrad, sum_repeats

N, C = 6, 3
ROWS = {"repeats": [4, 1, 4, 0, 4], "sorted": [1, 2, 5], "empty": [], "all": [5, 4, 3, 2, 1, 0]}


@pytest.fixture(params=ROWS)
def grad(request) -> RowGrad:
    rows = torch.tensor(ROWS[request.param], dtype=torch.int64)
    noise = torch.Generator().manual_seed(len(rows))
    return RowGrad(rows, torch.randn(len(rows), C, dtype=torch.float64, generator=noise), N)


def dense(grad: RowGrad) -> Tensor:
    """Independent of RowGrad.dense."""
    out = torch.zeros(N, C, dtype=torch.float64)
    for row, values in zip(grad.rows.tolist(), grad.values, strict=True):
        out[row] += values
    return out


@pytest.fixture
def other() -> RowGrad:
    return RowGrad(torch.tensor([1, 3, 1]), torch.arange(9.0, dtype=torch.float64).view(3, C), N)


STAYS_SPARSE = {
    "detach": lambda g, h: g.detach(),
    "data": lambda g, h: g.data,
    "clone": lambda g, h: g.clone(),
    "deepcopy": lambda g, h: copy.deepcopy(g),
    "times a number": lambda g, h: g * 3,
    "a number times": lambda g, h: -2.5 * g,
    "times a scalar tensor": lambda g, h: g * torch.tensor(0.5),
    "over a number": lambda g, h: g / 7,
    "over a scalar tensor": lambda g, h: g / torch.tensor(0.25),
    "negative": lambda g, h: -g,
    "sum of two": lambda g, h: g + h,
    "weighted sum": lambda g, h: torch.add(g, h, alpha=-2),
}
READS = {
    **{f"norm {p}": lambda g, h, p=p: torch.linalg.vector_norm(g, p) for p in (0, 0.5, 1, 2, 3, math.inf, -math.inf)},
    "norm method": lambda g, h: g.norm(),
    "norms of rows": lambda g, h: torch.linalg.vector_norm(g, 2, dim=1),
    "norm with kept dimensions": lambda g, h: torch.linalg.vector_norm(g, 2, keepdim=True),
    "foreach norm": lambda g, h: torch._foreach_norm([g, torch.ones(2)])[0],
    "foreach norm inf": lambda g, h: torch._foreach_norm([g], math.inf)[0],
    "total norm": lambda g, h: nn.utils.get_total_norm([g, torch.ones(2, dtype=torch.float64)], 3.0),
    "sum": lambda g, h: g.sum(),
    "largest": lambda g, h: g.abs().max(),
    "a row": lambda g, h: g[4],
    "finite": lambda g, h: torch.isfinite(g).all(),
    "plus dense": lambda g, h: g + torch.ones(N, C),
    "dense plus": lambda g, h: torch.ones(N, C) + g,
    "times dense": lambda g, h: g * torch.arange(float(C)),
    "matrix product": lambda g, h: g @ torch.ones(C, 2, dtype=torch.float64),
    "float32": lambda g, h: g.float(),
    "written to dense": lambda g, h: torch.ones(N, C, dtype=torch.float64).add_(g, alpha=2),
    "copied to dense": lambda g, h: torch.ones(N, C, dtype=torch.float64).copy_(g),
}
WRITES = {
    "mul_": lambda g, h: g.mul_(3),
    "mul_ scalar tensor": lambda g, h: g.mul_(torch.tensor(0.5)),
    "div_": lambda g, h: g.div_(7),
    "div_ scalar tensor": lambda g, h: g.div_(torch.tensor(0.25)),
    "zero_": lambda g, h: g.zero_(),
    "zero_ and add_": lambda g, h: g.zero_().add_(h),
    "add_": lambda g, h: g.add_(h),
    "add_ alpha": lambda g, h: g.add_(h, alpha=-2),
    "+=": lambda g, h: g.__iadd__(h),
    "foreach mul_": lambda g, h: torch._foreach_mul_([torch.ones(2), g], 2.5),
    "foreach mul_ tensor": lambda g, h: torch._foreach_mul_([g], torch.tensor(2.5)),
    "foreach div_": lambda g, h: torch._foreach_div_([g], 2.5),
    "foreach zero_": lambda g, h: torch._foreach_zero_([g, torch.ones(2)]),
    "clamp_": lambda g, h: g.clamp_(-0.3, 0.5),
    "clamp_ from above": lambda g, h: g.clamp_(max=0.1),
    "foreach clamp_": lambda g, h: (
        torch._foreach_clamp_min_([torch.ones(2), g], -0.5),
        torch._foreach_clamp_max_([g], 0),
    ),
    "unscale": lambda g, h: torch._amp_foreach_non_finite_check_and_unscale_([g], torch.zeros(1), torch.tensor([0.5])),
    "through an alias": lambda g, h: g.data.mul_(2),
    "add through an alias": lambda g, h: g.detach().add_(h),
    "zero through an alias": lambda g, h: g.data.zero_(),
    "alias of before a reading": lambda g, h: (g.data, g.norm())[0].mul_(2),
}
UNSUPPORTED = {
    "fill_": lambda g, h: g.fill_(1.0),
    "copy_": lambda g, h: g.copy_(torch.ones(N, C)),
    "clamp_ away from zero": lambda g, h: g.clamp_(0.1, 1),
    "clamp_ below zero": lambda g, h: g.clamp_(max=-0.1),
    "clamp_ by a tensor": lambda g, h: g.clamp_(torch.zeros(N, C)),
    "a row": lambda g, h: g.__setitem__(0, 1.0),
    "add_ dense": lambda g, h: g.add_(torch.ones(N, C)),
    "mul_ dense": lambda g, h: g.mul_(torch.ones(N, C)),
    "foreach add_": lambda g, h: torch._foreach_add_([g], 1.0),
    "out": lambda g, h: torch.add(torch.ones(N, C), 1, out=g),
}


@pytest.mark.parametrize("name", STAYS_SPARSE)
def test_stays_sparse(grad, other, name):
    expected = STAYS_SPARSE[name](dense(grad), dense(other))
    result = STAYS_SPARSE[name](grad, other)
    assert type(result) is RowGrad and result.shape == (N, C) and result.dtype == expected.dtype
    torch.testing.assert_close(dense(result), expected)


@pytest.mark.parametrize("name", READS)
def test_reads_as_dense(grad, other, name):
    before = dense(grad)
    expected = READS[name](before.clone(), dense(other))
    result = READS[name](grad, other)
    assert type(result) is Tensor
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(dense(grad), before)


@pytest.mark.parametrize("name", WRITES)
def test_writes_as_dense(grad, other, name):
    expected = dense(grad)
    WRITES[name](expected, dense(other))
    WRITES[name](grad, other)
    torch.testing.assert_close(dense(grad), expected)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_writes_raise(grad, other, name):
    before = dense(grad)
    with pytest.raises(NotImplementedError, match=r"gradient of a RowTable"):
        UNSUPPORTED[name](grad, other)
    torch.testing.assert_close(dense(grad), before)


def test_dense(grad):
    torch.testing.assert_close(grad.dense(), dense(grad))


def test_merge_sorts_and_sums():
    grad = RowGrad(torch.tensor([4, 1, 4]), torch.tensor([[1.0], [2.0], [3.0]]), 5).merge_()
    assert grad.rows.tolist() == [1, 4] and grad.values.tolist() == [[2.0], [4.0]]


@pytest.mark.parametrize("n", [0, 1, 7, 50])
def test_sum_repeats_merges_without_changing_the_shape(n):
    rows, values = torch.arange(n) ** 2 % 13, torch.randn(n, C)
    merged, (kept, summed) = RowGrad(rows, values, 13).merge_(), sum_repeats(rows, values)
    repeats = n - len(merged.rows)
    assert torch.equal(kept, torch.cat((merged.rows, torch.full((repeats,), -1))))
    assert torch.equal(summed, torch.cat((merged.values, torch.zeros(repeats, C))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unscale_finds_infinity(dtype):
    grad = RowGrad(torch.tensor([1]), torch.tensor([[math.inf, 1.0]], dtype=dtype), 3)
    found = torch.zeros(1)
    torch._amp_foreach_non_finite_check_and_unscale_([grad], found, torch.tensor([0.5]))
    assert found.item() == 1


def test_zeroing_forgets_the_rows(grad):
    """Else a table trained with zero_grad(set_to_none=False) would carry every row that it ever saw."""
    grad.zero_()
    assert len(grad.rows) == 0 and grad.values.shape == (0, C)
