"""Step time over rows and over the batch, from steps.csv."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import results
from .contestants import ENTRIES, OURS

AXES = {"rows": ("num_rows", "rows of the table (N)"), "batch": ("batch", "rows a batch")}
QUIET = ("quiet",)


def plot(folder: Path, states: Sequence[str] = QUIET) -> list[Path]:
    """A figure for each axis of which steps.csv has two points or more."""
    import matplotlib

    matplotlib.use("Agg")
    lines = [line for line in results.read(folder / "steps.csv") if line["state"] in states and line["step_us"]]
    if not lines:
        raise ValueError(f"{folder / 'steps.csv'} has no times that were taken on a quiet machine")
    made = [_plot(folder / f"steps-{axis}.png", curves_of(lines, axis), label) for axis, (_, label) in AXES.items()]
    return [path for path in made if path]


def curves_of(lines: Sequence[dict[str, str]], axis: str) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds a step over the axis by contestant, at the most threads. The paper's setting belongs to `batch`."""
    threads = max(int(line["threads"]) for line in lines)
    names = [axis, "none"] if axis == "batch" else [axis]
    found: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        if line["axis"] in names and int(line["threads"]) == threads:
            point = float(line[AXES[axis][0]]), float(line["graph_us"] or line["step_us"]) / 1e3
            found.setdefault(line["contestant"], []).append(point)
    return {e.name: sorted(found[e.name]) for e in ENTRIES if len(found.get(e.name, ())) > 1}


def _plot(path: Path, curves: dict[str, list[tuple[float, float]]], label: str) -> Path | None:
    if not curves:
        return None
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", linewidth=2.5 if name == OURS else 1.2, label=name)
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="ms a step")
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
