"""Times the training steps of all contestants in one setting: in turns, in one process, after a check of their curves.

`python -m rvi_fast.bench` starts a process of its own for every setting and number of threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import curves, load, timing
from .contestants import DECODER, JAX, OURS, REFERENCES, Entry
from .contestants import entry as entry_of
from .results import Line, facts
from .settings import Setting
from .steps import Data, Peer
from .timing import Spread, spread

SHARE = 0.6  # of the free memory that contestants may fill
TURN_S, MAX_STEPS = 0.05, 50  # a turn: about so long, with at most so many steps
ROUNDS, SECONDS = (5, 40), 20.0  # of turns; after the fewest, no new round starts later than this
WARM_UP_S, MAX_BATCHES = 15.0, 4096  # until the rows to be timed have moments and an age
GRAPH_STEPS = 16
MIB = 1 << 20


class Runner:
    """A contestant at work: its batches, and the microseconds a step took."""

    def __init__(self, entry: Entry, peer: Peer, order: Tensor):
        self.entry, self.peer, self.order = entry, peer, order
        self.steps = 1  # of a turn
        self.position = 0  # of the batch that comes next
        self.step_us: list[float] = []
        self.graph_us: list[float] = []
        self.contestant = timing.Contestant(entry.name, [])

    def batches(self) -> Tensor:
        """Rows [steps, B] of the next turn."""
        at = (self.position + torch.arange(self.steps, device=self.order.device)) % len(self.order)
        self.position = (self.position + self.steps) % len(self.order)
        return self.order[at]

    def prepare(self, clock: timing.Clock, _: timing.Contestant) -> None:
        """First call, warm-up, and how many steps make a turn."""
        before = _peak_before(clock)
        self.peer.make(clock.device)
        start = time.perf_counter()
        clock.timed(lambda: self.peer.run(self.batches()))
        self.contestant.first_call_s = time.perf_counter() - start
        clock.timed(lambda: self.peer.run(self.batches()))
        one_us = clock.timed(lambda: self.peer.run(self.batches()))
        self.contestant.peak_mb = _peak_since(clock, before)
        if self.entry.copies == 3:  # rows that only batches move: their cost depends on their age
            self._warm_up()
        self.steps = max(1, min(MAX_STEPS, int(1e6 * TURN_S / one_us)))
        clock.timed(lambda: self.peer.run(self.batches()))

    def _warm_up(self) -> None:
        start = time.perf_counter()
        taken = 0
        while taken < len(self.order) and time.perf_counter() - start < WARM_UP_S:
            self.peer.run(self.order[taken : taken + 1])
            taken += 1
        self.order, self.position = self.order[:taken], 0

    def capture(self, clock: timing.Clock, _: timing.Contestant) -> None:
        calls = [functools.partial(self.peer, rows) for rows in self.order[:GRAPH_STEPS]]
        self.contestant.calls = calls
        self.contestant.replay = clock.graph(calls) if self.peer.capture else None

    def best(self) -> Spread | None:
        """As a replayed graph where it can be one."""
        return spread(self.graph_us) or spread(self.step_us)

    def turn(self, clock: timing.Clock) -> None:
        before = self.batches()
        self.peer.run(before[-1:] if self.entry.name != JAX else before)  # the caches are now its own
        batches = self.batches()
        self.step_us.append(clock.timed(lambda: self.peer.run(batches)) / self.steps)
        if self.contestant.replay:
            steps = len(self.contestant.calls)
            self.graph_us.append(clock.timed(self.contestant.replay) / steps)
            self.peer.replayed(steps)


def _peak_before(clock: timing.Clock) -> int:
    if isinstance(clock, timing.Cpu):
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak_since(clock: timing.Clock, before: int) -> float | None:
    return None if isinstance(clock, timing.Cpu) else (torch.cuda.max_memory_allocated() - before) / MIB


def clock_of(device: str) -> timing.Clock:
    return timing.clock(dry=device == "cpu")


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def parties(entries: Sequence[Entry], needs: Mapping[str, int], room: float) -> Iterator[list[Entry]]:
    """Races of contestants that fit into memory together; the references are in each."""
    references = [e for e in entries if e.name in REFERENCES]
    taken = sum(needs[e.name] for e in references)
    party, used = list(references), taken
    for entry in entries:
        if entry in references:
            continue
        if len(party) > len(references) and used + needs[entry.name] > room:
            yield party
            party, used = list(references), taken
        party.append(entry)
        used += needs[entry.name]
    yield party


def race(setting: Setting, entries: Sequence[Entry], device: torch.device, dry: bool) -> list[Line]:
    """A line for each contestant; all that is known of one that takes no part is its note."""
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    clock, sizes, data = clock_of(device.type), setting.sizes(), setting.data()
    notes = {e.name: e.absent() or too_large(e, setting, device) for e in entries}
    differences = _checked(setting, [e for e in entries if e.checked and not notes[e.name]], notes, device, dry)
    data.on(device)
    room = SHARE * free_bytes(device)
    needs = {e.name: e.needs(sizes, setting.data_bytes) for e in entries}
    lines: dict[str, Line] = {}
    ready = [e for e in entries if not notes[e.name]]
    if OURS not in (e.name for e in ready):
        ready = []
    for party in parties(ready, needs, room):
        for line in _race(setting, party, data, clock, dry):
            lines.setdefault(line["contestant"], line)
    floor = _floor(setting, clock, dry)
    return [_line(setting, e, lines.get(e.name, {}), differences.get(e.name), notes[e.name], floor) for e in entries]


def too_large(entry: Entry, setting: Setting, device: torch.device) -> str:
    """Why a contestant is left out before its data are made, or nothing."""
    sizes, free = setting.sizes(), free_bytes(device)
    beside = 0 if entry.name == OURS else entry_of(OURS).needs(sizes, 0)
    needed = setting.data_bytes + beside + entry.needs(sizes, setting.data_bytes)
    if needed <= SHARE * free:
        return ""
    return f"needs {needed / 1e9:.0f} GB with the data and ours, more than {SHARE:.0%} of the {free / 1e9:.0f} GB free"


def _order(setting: Setting, device: torch.device) -> Tensor:
    """Batches of an epoch, or of the first part of one: int64 [.., B]."""
    batches = min(MAX_BATCHES, setting.num_rows // setting.batch)
    return torch.randperm(setting.num_rows, device=device)[: batches * setting.batch].view(batches, setting.batch)


def _checked(
    setting: Setting, entries: Sequence[Entry], notes: dict[str, str], device: torch.device, dry: bool
) -> dict[str, float]:
    """How far each one's curve is from float64's; a note for those that are too far or fail.

    Other data are drawn for those that are too far: float32 may tip over a rectifier whose input is nearly 0, and
    Adam's first step makes as much of that as of a mistake; but a mistake shows with any data.
    """
    found: dict[str, float] = {}
    left = list(entries)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(curves.DRAWS):
            if left:
                checks = curves.Checks(setting, Path(folder) / "start.npz", device, dry)
            for entry in left:
                notes[entry.name] = _objection(checks, entry, found)
                gc.collect()
            left = [entry for entry in left if entry.name in found and notes[entry.name]]
    return found


def _objection(checks: curves.Checks, entry: Entry, found: dict[str, float]) -> str:
    try:
        found[entry.name] = checks.difference(entry.make)
        return checks.objection(found[entry.name])
    except Exception as error:  # whatever a contestant does, the others are measured
        return f"{type(error).__name__}: {str(error).strip()[:160]}".splitlines()[0]


def _race(setting: Setting, party: Sequence[Entry], data: Data, clock: timing.Clock, dry: bool) -> list[Line]:
    order = _order(setting, clock.device)
    runners = [Runner(e, e.make(setting.sizes(), data, clock.device, dry), order) for e in party]
    for r in runners:
        timing.attempt(clock, r.contestant, "", r.prepare)
        if not r.contestant.note and not isinstance(clock, timing.Cpu):
            timing.attempt(clock, r.contestant, "no graph: ", r.capture)
    ready = [r for r in runners if not r.contestant.note or r.contestant.note.startswith("no graph")]
    start = time.perf_counter()
    for done in range(ROUNDS[1]):
        if done >= ROUNDS[0] and (dry or time.perf_counter() - start > SECONDS):
            break
        for r in ready:
            r.turn(clock)
    times = {r.entry.name: r.best() for r in runners}
    lines = [_times(r, times[OURS], times[DECODER]) for r in runners]
    runners.clear()
    ready.clear()
    clock.clear()
    gc.collect()
    return lines


def _times(r: Runner, ours: Spread | None, decoder: Spread | None) -> Line:
    """What a race says of one contestant; ratios are between medians of the same rounds."""
    step, graph, best = spread(r.step_us), spread(r.graph_us), r.best()
    return {
        "contestant": r.entry.name,
        **dict(zip(("step_us", "step_low", "step_high"), step or (None,) * 3, strict=True)),
        **dict(zip(("graph_us", "graph_low", "graph_high"), graph or (None,) * 3, strict=True)),
        "rounds": len(r.step_us),
        "steps": r.steps * len(r.step_us),
        "times_ours": best.median / ours.median if best and ours else None,
        "times_decoder": best.median / decoder.median if best and decoder else None,
        "first_call_s": r.contestant.first_call_s if r.contestant.peak_mb else None,  # of a CPU: `cost`
        "peak_mb": r.contestant.peak_mb,
        "note": r.contestant.note,
    }


def _floor(setting: Setting, clock: timing.Clock, dry: bool) -> Line:
    """The time that a step's least bytes or products take at rates measured here, whichever is longer."""
    sizes = setting.sizes()
    x_bytes = getattr(torch, setting.dtype).itemsize
    moved, flops = sizes.step_bytes(setting.batch, x_bytes), sizes.step_flops(setting.batch)
    large = clock.device.type == "cuda"
    copy = timing.copy_rate(clock, 1 if dry else 2048 if large else 256)
    matmul = timing.matmul_rate(clock, 64 if dry else 8192 if large else 1024, torch.float32)
    floor = max(moved / copy / 1e3, flops / matmul / 1e6)
    rates = {"copy_gb_per_s": copy, "matmul_tflop_per_s": matmul}
    return {"bytes": moved, "flops": flops, **rates, "floor_us": floor}


def _line(setting: Setting, entry: Entry, times: Line, difference: float | None, note: str, floor: Line) -> Line:
    """All of a row of steps.csv but what the whole run has in common."""
    best = times.get("graph_us") or times.get("step_us")
    blank = dict.fromkeys(
        ("step_us", "step_low", "step_high", "times_ours", "times_decoder", "first_call_s", "peak_mb")
    )
    described = setting._asdict()
    return {
        "workload": described.pop("name"),
        "contestant": entry.name,
        "algorithm": entry.algorithm,
        **blank,
        **times,
        **floor,
        "percent_of_floor": 100 * floor["floor_us"] / best if best else None,
        "curve_difference": difference,
        "note": note or times.get("note", ""),
        **{name: "/".join(map(str, v)) if isinstance(v, tuple) else v for name, v in described.items()},
    }


def run(
    setting: Setting, entries: Sequence[Entry], device: str, dry: bool, allow_load: bool, costs: Mapping[str, Line]
) -> list[Line]:
    """The race, with the load before, while and after."""
    average, busy = load.average(), load.look(0.1 if dry else load.LOOK_S)
    before = load.ticks()
    lines = race(setting, entries, torch.device(device), dry)
    others = load.foreign(before, load.ticks())
    busy_after = load.look(0.1 if dry else load.LOOK_S)
    loaded = allow_load or any(load.objection(share) for share in (busy, others, busy_after))
    common = {
        "load1_before": average,
        "busy_before": busy,
        "busy_by_others": others,
        "busy_after": busy_after,
        "load1_after": load.average(),
        **conditions(device, dry, loaded),
    }
    return [{**line, **costs.get(line["contestant"], {}), **common} for line in lines]


def conditions(device: str, dry: bool, loaded: bool) -> Line:
    state = "dry" if dry else "loaded" if loaded else "quiet"
    return {"device": device, "threads": torch.get_num_threads(), "state": state, **facts(device)}


def cost(setting: Setting, entry: Entry, device: str, dry: bool) -> Line:
    """Of a contestant alone in a fresh process: seconds of its first step, and how far its memory grows in four.

    The memory is a second copy's, made when the first is gone and all libraries are loaded.
    """
    torch.set_flush_denormal(True)
    there, data = torch.device(device), setting.data()
    data.on(there)
    order = _order(setting, there)
    peer = entry.make(setting.sizes(), data, there, dry)
    peer.make(there)
    start = time.perf_counter()
    peer.run(order[:1])
    first = time.perf_counter() - start
    del peer
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # or what the first copy left in the heap is given to the second
    before = _reset_peak()
    again = entry.make(setting.sizes(), data, there, dry)
    for batch in order[:4]:
        again.run(batch[None])
    return {"first_call_s": first, "peak_mb": (_peak() - before) / MIB}


def _reset_peak() -> int:
    """Start measuring the peak anew where Linux lets us; the bytes that are resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak()
    return _status("VmRSS")


def _peak() -> int:
    try:
        return _status("VmHWM")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
