"""How busy the machine is: times taken beside other work say nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

MAX_LOAD = 0.6  # of a core, averaged over the last minute, a core of the machine
MAX_BUSY = 0.25  # of all cores, while we look; or by others, while we time
LOOK_S = 1.0
STAT = Path("/proc/stat")


class Ticks(NamedTuple):
    """Clock ticks since boot of all cores, and of this process."""

    busy: int
    total: int
    own: float


def ticks() -> Ticks | None:
    """None where there is no /proc/stat."""
    try:
        numbers = [int(x) for x in STAT.read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return None
    idle = numbers[3] + numbers[4]
    times = os.times()
    own = (times.user + times.system + times.children_user + times.children_system) * os.sysconf("SC_CLK_TCK")
    return Ticks(sum(numbers) - idle, sum(numbers), own)


def foreign(before: Ticks | None, after: Ticks | None) -> float:
    """Share of all cores' time that other processes took between two moments; 0 where that cannot be known."""
    if before is None or after is None or after.total == before.total:
        return 0.0
    used = (after.busy - before.busy) - (after.own - before.own)
    return max(0.0, used / (after.total - before.total))


def look(seconds: float = LOOK_S) -> float:
    """The share of all cores that others take now."""
    before = ticks()
    time.sleep(seconds)
    return foreign(before, ticks())


def average() -> float:
    """Load average of the last minute."""
    return os.getloadavg()[0]


def objection(busy: float, load: float | None = None) -> str:
    """Why no time should be taken now, in one sentence, or nothing. load: not given once we have worked ourselves."""
    cores = os.cpu_count() or 1
    if load is not None and load > MAX_LOAD * cores:
        return f"the machine is loaded: the load average is {load:.2f} on {cores} cores, above {MAX_LOAD * cores:.1f}"
    if busy > MAX_BUSY:
        return f"the machine is loaded: other processes take {busy:.0%} of its cores, above {MAX_BUSY:.0%}"
    return ""
