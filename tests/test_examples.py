"""examples/ at small size: what they learn, and that the table trains as nn.Embedding under Adam does."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from rvi_fast.optim import RowAdam

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = ["deepsdf", "ratings", "gplvm"]


@pytest.fixture(autouse=True)
def as_scripts(monkeypatch):
    """Scripts find each other in their own folder. They flush denormal numbers, which other tests must not."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("name", NAMES)
def test_the_table_trains_as_an_embedding_does(name):
    example, compare = (importlib.import_module(module) for module in (name, "compare"))
    problem = example.problem(300, 60)
    ours, default, fused = running = compare.contestants(problem)
    lazy = compare.contestants(problem)[0]
    lazy.optimizer = RowAdam(lazy.model.parameters(), problem.lr, mode="lazy")
    compare.race([*running, lazy], problem.batches)
    assert len(ours.losses) == 60 and ours.losses[-1] < 0.6 * ours.losses[0]
    assert compare.difference(ours, default) < 1e-4 and compare.difference(ours, fused) < 1e-4
    assert compare.difference(lazy, default) > 1e-2  # so the rows' momentum counts at this size
    assert ours.megabytes() < default.megabytes()


@pytest.mark.parametrize(
    "name, rows, steps, share", [("deepsdf", 200, 600, 0.3), ("ratings", 500, 400, 0.8), ("gplvm", 500, 500, 0.3)]
)
def test_the_model_beats_its_baseline(name, rows, steps, share):
    error, baseline = importlib.import_module(name).train(rows, steps)
    assert 0 < error < share * baseline


def test_the_script_prints_its_figures_and_table(capsys):
    gplvm, compare = (importlib.import_module(module) for module in ("gplvm", "compare"))
    compare.main(gplvm.train, gplvm.problem, 5, ["--rows", "50", "300", "--steps", "10"])
    summary, *table = capsys.readouterr().out.splitlines()
    assert summary.startswith("50 rows, 5 steps: error 0.")
    assert [line.split("|")[1].strip() for line in table[2:]] == ["50", "300"]
    assert len({line.count("|") for line in table}) == 1
