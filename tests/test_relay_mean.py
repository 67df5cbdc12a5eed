"""relay_mean against loops over rows, groups and coefficients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rvi_fast.functional import relay_mean
from rvi_fast.ops import active_counts

GROUPS, ACTIVE = (3, 5), (2, 3)


@st.composite
def problems(draw):
    """coef [B, K] with many ties, relays [K, T], groups, active, coefficients, dtype."""
    groups = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    active = [draw(st.integers(1, k)) for k in groups]
    noise = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    coef = noise.integers(-3, 4, (draw(st.integers(0, 4)), sum(groups))) / 2
    relays = noise.normal(size=(sum(groups), draw(st.integers(1, 5))))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return coef, relays, groups, active, draw(st.sampled_from(["linear", "softmax"])), dtype


def weights(coef: np.ndarray, groups, active, coefficients: str = "linear") -> tuple[np.ndarray, np.ndarray]:
    """The coefficients that count (the largest of every group, ties to the lower index) among zeros; where they are."""
    out, selected = np.zeros(coef.shape), np.zeros(coef.shape, dtype=bool)
    for row, a in enumerate(coef):
        start = 0
        for size, count in zip(groups, active, strict=True):
            group = list(a[start : start + size])
            if coefficients == "softmax":
                total = sum(np.exp(group))
                group = [np.exp(value) / total for value in group]
            for k in sorted(range(size), key=lambda k: (-abs(group[k]), k))[:count]:
                out[row, start + k] = group[k]
                selected[row, start + k] = True
            start += size
    return out, selected


def leaves(coef, relays, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(value, dtype=dtype, requires_grad=True) for value in (coef, relays))


def example(rows: int = 3, dim: int = 4) -> tuple[Tensor, Tensor]:
    noise = np.random.default_rng(0)
    return leaves(noise.normal(size=(rows, sum(GROUPS))), noise.normal(size=(sum(GROUPS), dim)))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_equals_loops(problem):
    coef, relays, groups, active, coefficients, dtype = problem
    mean = relay_mean(*leaves(coef, relays, dtype), groups, active, coefficients)
    expected = weights(coef, groups, active, coefficients)[0] @ relays
    assert mean.dtype == dtype
    np.testing.assert_allclose(mean.detach(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)


@settings(max_examples=30, deadline=None)
@given(problems(), st.sampled_from(["sum", "twice", "rows"]))
def test_gradients(problem, loss):
    """Selected coefficients get upstream @ relays', the others zero, and the relays get weights' @ upstream."""
    values, vectors, groups, active, _, _ = problem
    coef, relays = leaves(values, vectors)
    mean = relay_mean(coef, relays, groups, active)
    upstream = np.ones(mean.shape)
    if loss == "rows":
        upstream *= np.arange(len(values))[:, None] - 0.5
        (mean.sum(1) * (torch.arange(len(values)) - 0.5)).sum().backward()
    elif loss == "twice":
        upstream *= 2
        (2 * mean.sum()).backward()
    else:
        mean.sum().backward()  # an expanded gradient
    kept, selected = weights(values, groups, active)
    np.testing.assert_allclose(coef.grad, np.where(selected, upstream @ vectors.T, 0), atol=1e-12)
    np.testing.assert_allclose(relays.grad, kept.T @ upstream, atol=1e-12)


@pytest.mark.parametrize("coefficients", ["linear", "softmax"])
@pytest.mark.parametrize("rows", [1, 3])
def test_gradcheck(rows, coefficients):
    coef, relays = example(rows)
    assert torch.autograd.gradcheck(lambda a, r: relay_mean(a, r, GROUPS, ACTIVE, coefficients), (coef, relays))


@pytest.mark.parametrize("needed", [(True, False), (False, True)], ids=str)
def test_gradients_of_a_subset(needed):
    both = example()
    relay_mean(*both, GROUPS, ACTIVE).square().sum().backward()
    some = tuple(tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(both, needed, strict=True))
    relay_mean(*some, GROUPS, ACTIVE).square().sum().backward()
    for full, part, wanted in zip(both, some, needed, strict=True):
        assert part.grad is None if not wanted else torch.equal(part.grad, full.grad)


def test_strided_input():
    coef, relays = (tensor.detach() for tensor in example())
    strided = coef.T.contiguous().T, relays.repeat_interleave(2, dim=1)[:, ::2]
    assert torch.equal(relay_mean(*strided, GROUPS, ACTIVE), relay_mean(coef, relays, GROUPS, ACTIVE))


@pytest.mark.parametrize("active", [1, 300, 699])
def test_ties_go_to_the_lower_index_in_a_large_group(active):
    values = np.random.default_rng(0).integers(-1, 2, (4, 700)).astype(float)
    mean = relay_mean(*leaves(values, np.eye(700)), [700], [active])
    np.testing.assert_array_equal(mean.detach(), weights(values, [700], [active])[0])


def test_one_active_coefficient_is_clustering():
    coef, relays = example(rows=5)
    best = coef.abs().argmax(1)
    mean = relay_mean(coef, relays, [sum(GROUPS)], [1])
    torch.testing.assert_close(mean, coef.gather(1, best[:, None]) * relays[best])


def test_all_active_is_a_matrix_product():
    coef, relays = example(rows=5)
    torch.testing.assert_close(relay_mean(coef, relays, GROUPS, [1.0, 1.0]), coef @ relays)


def test_softmax_of_all_is_a_mixture():
    coef, relays = example(rows=5)
    mixture = sum(a.softmax(1) @ r for a, r in zip(coef.split(GROUPS, 1), relays.split(GROUPS), strict=True))
    torch.testing.assert_close(relay_mean(coef, relays, GROUPS, GROUPS, "softmax"), mixture)


@pytest.mark.parametrize(
    ("groups", "active", "counts"),
    [
        ((25, 50, 100), 0.5, (13, 25, 50)),
        ((25, 50, 100), 1.0, (25, 50, 100)),
        ((25, 50, 100), 1, (1, 1, 1)),
        ((25, 50), (0.02, 7), (1, 7)),
        ((1,), 1e-6, (1,)),
        ((3, 5), 0.1, (1, 1)),
        ((5,), 0.3, (2,)),
    ],
)
def test_active_counts_round_half_up(groups, active, counts):
    assert active_counts(groups, active) == counts


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"active": (2, 6)}, ValueError, "active=6 is out of range for a group of 5"),
        ({"active": (0, 3)}, ValueError, "active=0 is out of range"),
        ({"active": (2, 1.5)}, ValueError, r"active as a float is a share in \(0, 1\]; got 1.5"),
        ({"active": (True, 2)}, TypeError, "active must be an int"),
        ({"active": (2,)}, ValueError, "active has 1 entries for 2 groups"),
        ({"groups": (3, 4)}, ValueError, r"coef must have shape \[B = 3, K = 7\]"),
        ({"groups": ()}, ValueError, "groups must be one or more positive ints"),
        ({"groups": (8, 0)}, ValueError, "groups must be one or more positive ints"),
        ({"relays": torch.ones(7, 4, dtype=torch.float64)}, ValueError, r"relays must have shape \[K = 8, T = 4\]"),
        ({"relays": torch.ones(8, 4)}, TypeError, "relays must be torch.float64"),
        ({"coef": torch.ones(3, 8, dtype=torch.int64)}, TypeError, "coef must be a floating-point tensor"),
        ({"coef": torch.ones(8)}, ValueError, "coef must have shape"),
        ({"coefficients": "sparse"}, ValueError, "coefficients must be 'linear' or 'softmax'"),
    ],
)
def test_bad_input(change, error, message):
    coef, relays = example()
    arguments = {"coef": coef, "relays": relays, "groups": GROUPS, "active": ACTIVE, **change}
    with pytest.raises(error, match=message):
        relay_mean(**arguments)
