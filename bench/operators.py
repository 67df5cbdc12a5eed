"""Times every operator against its twin, torch.compile and what torch has for the job: bench/on_gpu.sh runs this.

    python -m rvi_fast.bench.operators [--dry] [--out FOLDER]

On a GPU: runs the operators' tests, then times each operator in a process of its own, so that one that crashes or hangs
costs only its own lines. A ratio is printed only for an operator whose tests passed. --dry goes through the same steps
on a CPU with small inputs; its times mean nothing.

Writes environment.json, tests.csv, operators.csv and log.txt to the folder, by default bench/results/<device>.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import rvi_fast
from rvi_fast import info
from rvi_fast.dispatch import KERNELS

from . import gpu_tests, timing
from .timing import Contestant, Spread, spread
from .workloads import Draw, Workload, differentiated, workloads

BATCHES, DRY_BATCHES = (256, 65_536), (64,)
SECONDS_EACH, DRY_SECONDS_EACH = 1.0, 0.0  # of timing a workload, beyond what its first calls take
PARTS = ("philox_device", "posteriors", "relay_step", "select", "train")  # tested, too, though not timed by themselves
DRY_TESTED = ("philox_normal",)  # a dry run starts the tests of these alone
LIMITS = {"tests": 170.0, "operator": 120.0, "all operators": 300.0}  # seconds
DRY_LIMITS = dict.fromkeys(LIMITS, 900.0)  # whose machine may be busy with other tests


class Line(NamedTuple):
    """A contestant's times. Rates are the operator's least bytes and flops over its time, in a graph if it has one."""

    operator: str
    setting: str
    precision: str  # torch.get_float32_matmul_precision() for every contestant
    contestant: str
    cold_us: float | None = None  # one call with the caches flushed, launches included: median and quartiles
    cold_low: float | None = None
    cold_high: float | None = None
    graph_us: float | None = None  # in a CUDA graph over more inputs than the cache holds
    graph_low: float | None = None
    graph_high: float | None = None
    first_call_s: float | None = None
    peak_mb: float | None = None
    bytes: int | None = None
    gb_per_s: float | None = None
    percent_of_copy: float | None = None
    tflop_per_s: float | None = None
    times_ours: float | None = None  # its time over ours: above 1 we win
    cold_times_ours: float | None = None
    note: str = ""


OURS = "rvi_fast"


def ratio(theirs: Spread | None, ours: Spread | None, tests: str) -> float | None:
    """Their time over ours; None unless both ran and the operator's tests passed."""
    if tests != gpu_tests.PASSED or theirs is None or ours is None:
        return None
    return theirs.median / ours.median


def contestants(workload: Workload, clock: timing.Clock) -> Iterator[Contestant]:
    """Ours, the twin in eager mode, torch's own, the twin compiled: on the same inputs."""
    dry = isinstance(clock, timing.Cpu)
    draw = Draw(clock.device)
    sets = [workload.draw(draw, number) for number in range(timing.sets_of(clock, workload.bytes))]
    ways: dict[str, Callable[..., Any]] = {OURS: workload.ours, "eager": workload.twin, **workload.peers}
    if workload.compiled:
        compiler = "eager" if dry else "inductor"
        ways["torch.compile"] = torch.compile(workload.twin, backend=compiler, dynamic=False)
    for name, way in ways.items():
        backend = "torch" if dry or not name.startswith(OURS) else "triton" if name == OURS else "auto"
        calls = [_in_backend(backend, differentiated(way, inputs, workload.wrt)) for inputs in sets]
        contestant = Contestant(name, calls)
        if name == OURS and absent(workload.operator) and not dry:
            contestant.note = "absent"
        yield contestant


def _in_backend(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    def wrapped() -> Any:
        with rvi_fast.backend(name):
            return call()

    return wrapped


def absent(operator: str) -> bool:
    return importlib.util.find_spec(f"rvi_fast.kernels.{operator}") is None


def measure(workload: Workload, clock: timing.Clock, copy_gb_per_s: float, tests: str) -> list[Line]:
    torch.set_float32_matmul_precision(workload.precision)
    runners = list(contestants(workload, clock))
    seconds = DRY_SECONDS_EACH if isinstance(clock, timing.Cpu) else SECONDS_EACH
    timing.compare(clock, [c for c in runners if c.note != "absent"], workload.bytes, seconds)
    ours = next(c for c in runners if c.name == OURS)
    return [line(workload, c, ours, copy_gb_per_s, tests) for c in runners]


def line(workload: Workload, c: Contestant, ours: Contestant, copy_gb_per_s: float, tests: str) -> Line:
    cold, graph = spread(c.cold_us), spread(c.graph_us)
    times = graph or cold
    rate = workload.bytes / times.median / 1e3 if times else None
    share = 100 * rate / copy_gb_per_s if rate else None
    notes = [c.note] if c.note else []
    if share and share > 100:
        notes.append("over 100 % of the copy rate: look again")
    if c is ours and tests != gpu_tests.PASSED:
        notes.append(f"tests: {tests}")
    return Line(
        operator=workload.operator,
        setting=workload.setting,
        precision=workload.precision,
        contestant=c.name,
        **_columns("cold", cold),
        **_columns("graph", graph),
        first_call_s=c.first_call_s or None,
        peak_mb=c.peak_mb,
        bytes=workload.bytes,
        gb_per_s=rate,
        percent_of_copy=share,
        tflop_per_s=workload.flops / times.median / 1e6 if times and workload.flops else None,
        times_ours=ratio(graph, spread(ours.graph_us), tests),
        cold_times_ours=ratio(cold, spread(ours.cold_us), tests),
        note="; ".join(notes),
    )


def _columns(name: str, times: Spread | None) -> dict[str, Any]:
    return dict(zip((f"{name}_us", f"{name}_low", f"{name}_high"), times or (None, None, None), strict=True))


def time_operators(operators: Sequence[str], out: Path, dry: bool) -> None:
    """Time the named operators here and add their lines to OUT/operators.csv as they come."""
    clock = timing.clock(dry)
    copy = json.loads((out / "environment.json").read_text())["copy_gb_per_s"]
    tests = gpu_tests.read(out)
    for workload in workloads(DRY_BATCHES if dry else BATCHES, full=not dry):
        if workload.operator in operators:
            add(out, measure(workload, clock, copy, tests.get(workload.operator, "not run")))
            torch._dynamo.reset()
            clock.clear()


def add(out: Path, lines: Sequence[Line]) -> None:
    path = out / "operators.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(Line._fields)
        writer.writerows([f"{x:.5g}" if isinstance(x, float) else x for x in one] for one in lines)


def time_apart(operators: Sequence[str], out: Path, dry: bool, limit: float) -> None:
    """Time the named operators in a process of their own; what ends it early is a line of its own."""
    command = [sys.executable, "-m", __spec__.name, "--out", str(out), "--only", ",".join(operators)]
    with tempfile.TemporaryDirectory() as caches, (out / "log.txt").open("a") as log:  # empty: first calls are first
        print(f"\n--- times: {', '.join(operators)}", file=log, flush=True)
        paths = {"TRITON_CACHE_DIR": f"{caches}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor"}
        try:
            code = subprocess.run(
                [*command, "--dry"] if dry else command,
                stdout=log, stderr=subprocess.STDOUT, timeout=limit, env=os.environ | paths,
            ).returncode  # fmt: skip
            ended = f"ended with exit status {code}; see log.txt" if code else ""
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit:.0f} s"
    if ended:
        add(out, [Line(",".join(operators), "", "", OURS, note=ended)])


def environment(clock: timing.Clock, dry: bool) -> dict[str, Any]:
    """What times depend on, and the rates that they are compared with."""
    facts: dict[str, Any] = {**info.describe(), "dry": dry}
    facts["copy_gb_per_s"] = timing.copy_rate(clock, megabytes=64 if dry else 2048)
    if not dry:
        properties = torch.cuda.get_device_properties(clock.device)
        facts |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda or torch.version.hip,
            "nvidia-smi": nvidia_smi(),
        }
        for precision, dtype in (("highest", torch.float32), ("high", torch.float32), ("highest", torch.bfloat16)):
            torch.set_float32_matmul_precision(precision)
            name = f"matmul_tflop_per_s_{str(dtype).removeprefix('torch.')}_{precision}"
            facts[name] = timing.matmul_rate(clock, 8192, dtype)
        torch.set_float32_matmul_precision("highest")
    return facts


def nvidia_smi() -> str:
    """Driver, clocks and power as they are."""
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,power.limit"
    try:
        return subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"], capture_output=True, text=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "not available"


def default_folder(dry: bool) -> Path:
    """bench/results/<device>; a temporary one for a dry run."""
    if dry:
        return Path(tempfile.mkdtemp(prefix="rvi_fast-"))
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return Path(__file__).resolve().parent / "results" / name


def run(out: Path, dry: bool) -> None:
    """Every step: environment, tests, times."""
    out.mkdir(parents=True, exist_ok=True)
    for file in ("operators.csv", "log.txt"):
        (out / file).unlink(missing_ok=True)
    facts = environment(timing.clock(dry), dry)
    (out / "environment.json").write_text(json.dumps(facts, indent=1) + "\n")
    for name, fact in facts.items():
        print(f"{name}: {fact}")
    if not dry:
        torch.cuda.empty_cache()
    operators, limits = sorted(KERNELS), DRY_LIMITS if dry else LIMITS
    print("\ntests of the kernels")
    tested = DRY_TESTED if dry else [*operators, *PARTS]
    for verdict in gpu_tests.run_all(tested, out, limits["tests"]).values():
        print("  ", *(f"{x:.0f} s" if isinstance(x, float) else x for x in verdict), flush=True)
    start = time.monotonic()
    for group in [operators] if dry else [[operator] for operator in operators]:
        left = limits["all operators"] - (time.monotonic() - start)
        time_apart(group, out, dry, max(5.0, min(limits["operator"], left)))
    timed = {row["operator"] for row in read(out)}
    for operator in operators:
        if operator not in timed:
            note = "absent" if absent(operator) else "no workload"
            add(out, [Line(operator, "", "", OURS, note=note)])
    show(out)
    if not dry:
        print(nvidia_smi())


def read(out: Path) -> list[dict[str, str]]:
    path = out / "operators.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


SHOWN = ("contestant", "cold_us", "graph_us", "first_call_s", "peak_mb", "percent_of_copy", "times_ours", "note")


def show(out: Path) -> None:
    """The table a person reads."""
    lines = read(out)
    cells = [SHOWN, *(tuple(line[key] for key in SHOWN) for line in lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    heading = functools.partial("{0[operator]}  {0[setting]}  {0[precision]}".format)
    last = ""
    for row, line in zip(cells, [{}, *lines], strict=True):
        if line and heading(line) != last:
            last = heading(line)
            print(f"\n{last}")
        print("  " + "  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="every step on a CPU, small")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", help="time these operators here, into a folder that has the other files")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        parser.error("needs a GPU; --dry goes through the steps without one")
    out = args.out or default_folder(args.dry)
    if args.only:
        time_operators(args.only.split(","), out, args.dry)
    else:
        run(out, args.dry)


if __name__ == "__main__":
    main()
