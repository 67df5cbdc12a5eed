"""The numbers of docs/math.md that a formula or a run gives."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from rvi_fast import reference
from rvi_fast.clock import AdamClock
from rvi_fast.ops import active_counts
from rvi_fast.reference import AdamHyper

PAGE = (Path(__file__).parent.parent / "docs" / "math.md").read_text(encoding="utf-8")
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def cells(line_start: str) -> list[str]:
    """The cells of the one table line that starts so, without its first."""
    (line,) = [line for line in PAGE.splitlines() if line.startswith(line_start)]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def move_per_visit(gap: int) -> float:
    """Equation (19)."""
    rho = BETA1 / math.sqrt(BETA2)
    first, second = (1 - BETA1) / (1 - BETA1**gap), math.sqrt((1 - BETA2**gap) / (1 - BETA2))
    return first * second * (1 - rho**gap) / (1 - rho)


def test_move_per_visit_against_its_formula_and_adam():
    gaps, printed = [int(g) for g in cells("| g |")], [float(x) for x in cells("| Δ(g) / lr |")]
    steps = 4 * max(gaps)
    assert f"after {steps:,} steps" in PAGE and all(steps % gap == 0 for gap in gaps)
    rows = torch.zeros(len(gaps), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([rows], lr=1.0, betas=(BETA1, BETA2), eps=EPS, fused=True)
    visits = (torch.arange(steps)[:, None] % torch.tensor(gaps) == 0).double()
    path = torch.zeros(steps + 1, len(gaps), dtype=torch.float64)
    for t in range(steps):
        rows.grad = visits[t]
        adam.step()
        path[t + 1] = rows.detach()
    moves = [(path[-1 - gap, i] - path[-1, i]).item() for i, gap in enumerate(gaps)]
    assert moves == pytest.approx(printed, abs=0.006)
    assert [move_per_visit(gap) for gap in gaps] == pytest.approx(printed, abs=0.005)


def test_what_follows_from_the_move_per_visit():
    assert max(abs(move_per_visit(gap) / math.sqrt(gap) - 1) for gap in range(1, 401)) < 0.09
    assert move_per_visit(10**6) == pytest.approx(31.77, abs=0.005)
    assert move_per_visit(39) / move_per_visit(390) == pytest.approx(0.34, abs=0.005)
    assert move_per_visit(390) / move_per_visit(3900) == pytest.approx(0.57, abs=0.005)


def test_windows():
    printed = re.findall(r"(\d+) for \(([\d.]+), ([\d.]+)\)", " ".join(PAGE.split()))
    assert len(printed) == 4
    for window, beta1, beta2 in printed:
        assert AdamHyper(float(beta1), float(beta2), EPS).window() == int(window)


def test_error_of_two_nodes_where_no_sum_is_taken():
    """Equation (18) at a constant rate: at the threshold for early rows, at v = 0 for later ones."""
    clock = AdamClock(AdamHyper(BETA1, BETA2, EPS))
    for _ in range(700):
        clock.advance(1.0)
    worst = {True: 0.0, False: 0.0}
    for s in (1, 2, 5, 20, 100, 249, 250, 251, 300):
        u = torch.arange(s + 1, clock.index + 1, dtype=torch.float64)
        bc1, bc2 = clock.hyper.bias_corrections(u)
        x = torch.sqrt(bc2 / BETA2 ** (u - s))
        weight = BETA1 ** (u - s) / bc1 * x
        w1, e1, w2, e2 = (n.item() for n in reference.gauss_nodes(clock.moments[:, s : s + 1]))
        root = 10 * EPS * e2 if s < 250 else 0.0
        exact = (weight / (root + EPS * x)).sum().item()
        nodes = w1 / (root + EPS * e1) + w2 / (root + EPS * e2)
        worst[s < 250] = max(worst[s < 250], (exact - nodes) / exact)
    assert worst == pytest.approx({True: 6.2e-7, False: 6.2e-7}, abs=5e-9)


def test_streams():
    for name, number in reference.STREAMS.items():
        assert f"\n| {number} | {name} |" in PAGE


def test_default_counts():
    assert active_counts((25, 50, 100), 0.5) == (13, 25, 50)
