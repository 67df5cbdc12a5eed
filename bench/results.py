"""Files of measurements: lines with a key, of which a new one takes the place of the old."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import io
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rvi_fast import __version__

Line = dict[str, Any]
COMMON = ("device", "state", "machine", "versions", "rvi_fast", "finished")  # of all lines of a run
HERE = Path(__file__).resolve().parent


def text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def merge(path: Path, lines: Sequence[Mapping[str, Any]], key: Sequence[str]) -> None:
    """Add lines to a file; those with the same key go. The file is replaced as a whole.

    A line from a loaded machine takes no quiet one's place.
    """
    quiet = {tuple(line.get(k, "") for k in key) for line in read(path) if line.get("state") == "quiet"}
    new = [{name: text(value) for name, value in line.items()} for line in lines]
    new = [line for line in new if line.get("state") != "loaded" or tuple(line[k] for k in key) not in quiet]
    if not new:
        return
    keys = {tuple(line[k] for k in key) for line in new}
    old = [line for line in read(path) if tuple(line.get(k, "") for k in key) not in keys]
    fields = list(dict.fromkeys(name for line in (*new, *old) for name in line))
    out = io.StringIO()
    writer = csv.DictWriter(out, fields, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows((*old, *new))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(out.getvalue(), encoding="utf-8")
    os.replace(part, path)


def table(lines: Iterable[Sequence[str]]) -> str:
    """Columns side by side."""
    rows = [list(line) for line in lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def default_folder(device: str) -> Path:
    """bench/results/cpu or .../<gpu> in a checkout; where rvi_fast is installed, a folder of the working directory."""
    if not (HERE / "on_gpu.sh").exists():
        return Path("rvi-fast-bench")
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return HERE / "results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def facts(device: str) -> Line:
    """When and where a line was measured."""
    return {
        "machine": machine(device),
        "versions": ", ".join(f"{name} {_version(name)}" for name in ("torch", "jax", "numba", "triton", "numpy")),
        "rvi_fast": __version__,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def machine(device: str) -> str:
    cpu = next((line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")), "")
    parts = [f"{os.cpu_count()} cores", cpu or platform.machine(), f"Python {platform.python_version()}"]
    return ", ".join([torch.cuda.get_device_name(), *parts] if device == "cuda" else parts)


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
