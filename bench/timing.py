"""How calls are timed: interleaved, cold and as replayed graphs, and the rates that times are compared with."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]
SETS = (4, 256)  # inputs to rotate over, at least and at most
ROUNDS = (5, 50)  # likewise
GRAPH_BYTES = 2 << 30  # larger calls keep the device busy by themselves, and their graphs would not fit side by side


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


class Contestant:
    """One way to do the work, called on each of the input sets."""

    def __init__(self, name: str, calls: Sequence[Call]):
        self.name = name
        self.calls = calls
        self.replay: Call | None = None
        self.first_call_s = 0.0  # compilation included
        self.peak_mb: float | None = None  # allocated by a call beyond its inputs
        self.cold_us: list[float] = []  # one call, caches flushed, launches included
        self.graph_us: list[float] = []  # a call's share of a graph that runs over all input sets
        self.note = ""

    @property
    def runs(self) -> bool:
        return bool(self.cold_us)


class Cpu:
    """The dry run's clock: no cache to flush, no graph."""

    cache_bytes = 0
    device = torch.device("cpu")

    def cold(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - start)

    def graph(self, calls: Sequence[Call]) -> Call | None:
        return None

    def timed(self, call: Call) -> float:
        return self.cold(call)

    def peak_mb(self, call: Call) -> float | None:
        return None

    def clear(self) -> None:
        pass


class Gpu:
    """Times by events on the current device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.cache_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
        self._flush = torch.empty(2 * self.cache_bytes, dtype=torch.uint8, device=self.device)

    def cold(self, call: Call) -> float:
        self._flush.fill_(1)
        return self.timed(call)

    def timed(self, call: Call) -> float:
        """Microseconds between events on either side of the call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)

    def graph(self, calls: Sequence[Call]) -> Call | None:
        """The calls, one after another, as one CUDA graph. Their results are dropped inside it."""
        torch.cuda.set_sync_debug_mode(
            "error"
        )  # a call that waits cannot be captured, and a failed capture leaves traces
        try:
            calls[0]()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:  # what a call allocates or sets up at first must not be captured
                call()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=side):
                for call in calls:
                    call()
        torch.cuda.current_stream().wait_stream(side)
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay

    def peak_mb(self, call: Call) -> float | None:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def clear(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


Clock = Cpu | Gpu


def clock(dry: bool) -> Clock:
    return Cpu() if dry else Gpu()


def compare(clock: Clock, contestants: Sequence[Contestant], call_bytes: int, seconds: float) -> None:
    """Time the contestants in turns, for about `seconds` in all. One that fails says why in its note."""
    for c in contestants:
        attempt(clock, c, "", _prepare)
        if not c.note and call_bytes <= GRAPH_BYTES:
            attempt(clock, c, "no graph: ", _capture)
    ready = [c for c in contestants if not c.note or c.note.startswith("no graph")]
    start = time.perf_counter()
    for done in range(ROUNDS[1]):
        if done >= ROUNDS[0] and time.perf_counter() - start > seconds:
            break
        for c in ready:
            c.cold_us.append(clock.cold(c.calls[done % len(c.calls)]))
            if c.replay:
                c.graph_us.append(clock.timed(c.replay) / len(c.calls))


def _prepare(clock: Clock, c: Contestant) -> None:
    start = time.perf_counter()
    clock.cold(c.calls[0])
    c.first_call_s = time.perf_counter() - start
    c.peak_mb = clock.peak_mb(c.calls[0])
    clock.cold(c.calls[0])


def _capture(clock: Clock, c: Contestant) -> None:
    c.replay = clock.graph(c.calls)


def attempt(clock: Clock, c: Contestant, prefix: str, step: Callable[[Clock, Contestant], None]) -> None:
    try:
        step(clock, c)
    except torch.OutOfMemoryError:
        c.note = prefix + "out of memory"
    except Exception as error:  # whatever a contestant does, the others are measured
        c.note = prefix + f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:160]
    if c.note:
        clock.clear()


def copy_rate(clock: Clock, megabytes: int) -> float:
    """GB/s of a device-to-device copy, bytes read plus bytes written."""
    source = torch.ones(megabytes << 18, dtype=torch.float32, device=clock.device)
    target = torch.empty_like(source)
    times = [clock.timed(lambda: target.copy_(source)) for _ in range(12)][2:]
    return 2 * source.nbytes / statistics.median(times) / 1e3


def matmul_rate(clock: Clock, size: int, dtype: torch.dtype) -> float:
    """TFLOP/s of a square product of random matrices."""
    a, b = (torch.randn(size, size, device=clock.device).to(dtype) for _ in range(2))
    times = [clock.timed(lambda: torch.mm(a, b)) for _ in range(8)][2:]
    return 2 * size**3 / statistics.median(times) / 1e6


def sets_of(clock: Clock, call_bytes: int) -> int:
    """How many input sets outgrow the cache twice, so that none is found there when its turn comes again."""
    if call_bytes > GRAPH_BYTES:
        return 1
    return max(SETS[0], min(SETS[1], -(-2 * clock.cache_bytes // call_bytes)))
